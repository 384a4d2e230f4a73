"""A command running on a host: its pipes, with a deadline on every wait, and what its end means."""

from __future__ import annotations

import _thread
import os
import select
import time

from madrigal.errors import DeadlineExceeded, Forbidden, HostKeyRefused, HostUnreachable, MadrigalError, MissingProgram
from madrigal.onhost import pipe

_BLOCK = 1 << 20
_LINE = 64 << 20
"""The most bytes of one line: the digests of all blocks of a file take some 6 MiB."""

# What ssh says, and what that is.
_CROWDED = (
    "kex_exchange_identification",  # sshd's MaxStartups: it closes before it says anything
    "Connection reset by peer",
    "Session open refused",
    "open failed: administratively prohibited",
    "Connection closed by ",
)
_KEY = ("Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED", "No matching host key")


class Channel:
    """A remote command.  A transport subclasses it with `_poll` and `stderr` and gives the two pipes."""

    def __init__(self, host: str, stdin: int, stdout: int) -> None:
        self.host = host
        self._stdin, self._stdout = stdin, stdout
        self._buffer = bytearray()
        self._turn, self._is_midway = _thread.allocate_lock(), False
        """Who writes, and whether what is to be in one piece has been written in part."""
        self._over = _thread.allocate_lock()
        """Can be had when stdin is closed."""
        self._over.acquire()
        os.set_blocking(stdin, False)
        for fd in (stdin, stdout):
            pipe.widen(fd)

    # -- what a transport knows ------------------------------------------------------------------------------

    def _poll(self) -> int | None:
        """The exit status, None while it runs."""
        raise NotImplementedError

    def _end(self) -> None:
        """Cut the connection of this command."""
        raise NotImplementedError

    def stderr(self) -> bytes:
        """What the command and ssh have written to stderr."""
        raise NotImplementedError

    def abandon(self) -> bool:
        """Let no other command take the connection of this one, which does not answer; False if it has its own."""
        return False

    # -- pipes -----------------------------------------------------------------------------------------------

    def read(self, timeout: float) -> bytes:
        """Some bytes of the output, b"" at its end; raises DeadlineExceeded after TIMEOUT seconds without any."""
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            return data
        self._wait_for(self._stdout, select.POLLIN, timeout)
        return os.read(self._stdout, _BLOCK)

    def readline(self, timeout: float) -> bytes:
        """The next line of the output, b"" at its end; raises HostUnreachable if it does not come to one."""
        end, seen = time.monotonic() + timeout, 0
        while (index := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen > _LINE:
                raise HostUnreachable(f"{self.host} says more than {_LINE >> 20} MiB in one line")
            self._wait_for(self._stdout, select.POLLIN, max(0, end - time.monotonic()))
            data = os.read(self._stdout, _BLOCK)
            if not data:
                index = len(self._buffer) - 1
                break
            self._buffer += data
        return self._take(index + 1)

    def read_into(self, view: memoryview, timeout: float) -> int:
        """Fill VIEW; returns how many bytes there were, fewer only at the end.  TIMEOUT is for each pause."""
        done = min(len(self._buffer), len(view))
        view[:done] = self._take(done)
        while done < len(view):
            self._wait_for(self._stdout, select.POLLIN, timeout)
            count = os.readv(self._stdout, [view[done:]])
            if not count:
                break
            done += count
        return done

    def _take(self, length: int) -> bytes:
        data = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        return data

    def write(self, timeout: float, *data: bytes | memoryview) -> None:
        """Write all of DATA; raises BrokenPipeError if nobody reads it, DeadlineExceeded after a pause of TIMEOUT.

        It is no pause when the command says something meanwhile, as a worker does that waits for a lock.
        """
        left = [memoryview(part) for part in data]
        with self._turn:
            self._is_midway = True
            while left:
                try:
                    left = pipe.put(self._stdin, left)
                except BlockingIOError:
                    self._wait_for_room(timeout)
            self._is_midway = False

    def beat(self, pause: float) -> None:
        """Write an empty line every so many seconds, between what write() is given, until stdin is closed.

        In a thread: whatever we wait for meanwhile, be it a disk that does not answer, we are still there.
        """
        _thread.start_new_thread(self._beat, (pause,))

    def _beat(self, pause: float) -> None:
        while not self._over.acquire(timeout=pause):
            if self._turn.acquire(blocking=False):  # else something is being written, which is as good
                try:
                    if self._stdin >= 0 and not self._is_midway:
                        os.write(self._stdin, b"\n")
                except OSError:
                    pass  # there is no room, or nobody reads it, which whoever waits for an answer finds out
                finally:
                    self._turn.release()

    def close_stdin(self) -> None:
        with self._turn:
            if self._stdin >= 0:
                os.close(self._stdin)
                self._stdin = -1
                self._over.release()

    def communicate(self, data: bytes, timeout: float) -> bytes:
        """Write DATA, close, and return the whole output, all within TIMEOUT seconds."""
        end = time.monotonic() + timeout
        output, view = bytearray(), memoryview(data)
        while True:
            poll = select.poll()
            poll.register(self._stdout, select.POLLIN)
            if not view:
                self.close_stdin()
            else:
                poll.register(self._stdin, select.POLLOUT)
            events = dict(poll.poll(max(0, end - time.monotonic()) * 1000))
            if not events:
                raise DeadlineExceeded(f"the command on {self.host} took longer than {timeout:g} s")
            if self._stdin in events:
                try:
                    view = view[os.write(self._stdin, view) :]
                except BrokenPipeError:
                    view = view[:0]
            if self._stdout in events:
                block = os.read(self._stdout, _BLOCK)
                if not block:
                    return bytes(output)
                output += block

    def _wait_for_room(self, timeout: float) -> None:
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        poll.register(self._stdout, select.POLLIN)
        events = dict(poll.poll(timeout * 1000))
        if not events:
            raise self._silence(timeout)
        if self._stdout in events and len(self._buffer) <= _LINE and (data := os.read(self._stdout, _BLOCK)):
            self._buffer += data
        elif self._stdin not in events:
            self._wait_for(self._stdin, select.POLLOUT, timeout)

    def _wait_for(self, fd: int, event: int, timeout: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(timeout * 1000):
            raise self._silence(timeout)

    def _silence(self, timeout: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.host} was silent for {timeout:g} s")

    # -- the end ---------------------------------------------------------------------------------------------

    def wait(self, timeout: float) -> int:
        """The exit status; raises DeadlineExceeded."""
        end, pause = time.monotonic() + timeout, 0.0005
        while (status := self._poll()) is None:
            if time.monotonic() > end:
                raise DeadlineExceeded(f"the command on {self.host} did not end in {timeout:g} s")
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return status

    def close(self) -> None:
        """Let go of it; what still runs there sees the end of its input."""
        self.close_stdin()
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1
        if self._poll() is None:
            self._end()


def failure(host: str, status: int, stderr: bytes) -> MadrigalError:
    """Why a command could not be started on HOST, from ssh's or the shell's exit STATUS and STDERR."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1] if lines else "it gave no reason"
    if status == 127:
        return MissingProgram(f"{host} has no python3 (3.6 or newer): install it there ({said})")
    if any(mark in line for line in lines for mark in _KEY):
        return HostKeyRefused(
            f"{host} shows a host key that is not the known one, or is not known yet; "
            f"make sure that it is the right machine and put its key into known_hosts"
        )
    if any("Permission denied" in line for line in lines):
        return Forbidden(f"{host} does not let us in: {said}")
    error = HostUnreachable(f"{host} cannot be reached: {said}")
    error.crowded = any(mark in line for line in lines for mark in _CROWDED)  # type: ignore[attr-defined]
    return error
