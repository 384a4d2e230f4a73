"""Run one driver executable as a front-end does, and read what it answered as that front-end would.

docs/contract.md, "Two forms" and "What a driver says".
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from madrigal.errors import ConfigError, MadrigalError

NICE = "19"
LOST = 0.1  # seconds a front-end waits for a stream that something started by the driver still holds open
PATIENCE = 30.0  # seconds an interrupted driver has to undo what it did before it is killed

_TAGGED = re.compile(r"^(ERROR|INFO|WARN|DEBUG):\s+(\d+)?\s*(.*)$")
_EXIT_CODE = re.compile(r"^ExitCode: (\d*)$", re.MULTILINE)
_MOVED = re.compile(r"^INFO: .*\((\d+) bytes streamed", re.MULTILINE)  # how our drivers say how much they moved
_MARKED = re.compile(r"^ERROR MESSAGE --8<------\n(.*?)^ERROR MESSAGE ------>8--$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One driver action to run."""

    path: str
    argv: tuple[str, ...]
    """The arguments after the path."""
    title: str
    """What people read: `clone host01 disk.0`."""
    stdin: bytes = b""
    secret: bytes = field(default=b"", repr=False)
    """An argument that is not shown: the dump, which 3.4 passes in argv."""
    source: str = ""
    """A file on the front-end that is read or written, for the number of bytes."""

    @property
    def command(self) -> list[str]:
        """Path and arguments as they may be shown."""
        shown = ("<dump>" if self.secret and argument == self.secret.decode() else argument for argument in self.argv)
        return [self.path, *shown]


@dataclass(frozen=True)
class Outcome:
    """How it went."""

    call: Call
    seconds: float
    status: int
    stdout: str
    stderr: str
    message: str
    """What a front-end shows its user after a failure; "" if the driver gave no reason, or succeeded."""
    bytes: int | None
    """Bytes it says it moved, else those the file on the front-end that it read or wrote takes; None if not known."""

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def reason(self) -> str:
        return self.message or f"the driver gave no reason (exit status {self.status})"

    @property
    def answer(self) -> str:
        """The first line of stdout, which is all that a front-end reads."""
        return self.stdout.split("\n", 1)[0].rstrip("\r")


class ActionFailed(MadrigalError):
    """A driver action ended with a status other than 0, or answered something else than the contract says."""

    status = 1


class Observer:
    """Is told what happens; a front-end without one is silent."""

    def started(self, call: Call) -> None:
        """An action starts."""

    def working(self, call: Call, seconds: float) -> None:
        """It still runs; called about ten times a second."""

    def finished(self, outcome: Outcome) -> None:
        """It has ended."""

    def warn(self, text: str) -> None:
        """Something went wrong that does not stop the operation."""


def allocated(path: str) -> int | None:
    """Bytes that the file PATH takes on disk, None if there is no such file here."""
    try:
        return os.stat(path).st_blocks * 512 if path else None
    except OSError:
        return None


def run(call: Call, contract: str, cwd: str, env: Mapping[str, str], observer: Observer) -> Outcome:
    """Run CALL to its end.  Interrupted by a signal or Ctrl-C, it ends the driver first and passes the exception on."""
    before = allocated(call.source)
    observer.started(call)
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            ["nice", "-n", NICE, call.path, *call.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=dict(env),
            process_group=0,
            umask=0o022,
        )
    except OSError as error:
        raise ConfigError(f"cannot run {call.path}: {error.strerror}") from None
    try:
        out, err = _streams(process, call.stdin, lambda: observer.working(call, time.monotonic() - start))
    except BaseException:
        _end(process)
        raise
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
    stdout, stderr = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
    status, message = _read(contract, process.returncode, stderr)
    sizes = [size for size in (before, allocated(call.source)) if size is not None]
    if moved := _MOVED.findall(stderr):
        sizes = [sum(map(int, moved))]
    outcome = Outcome(call, time.monotonic() - start, status, stdout, stderr, message, max(sizes) if sizes else None)
    observer.finished(outcome)
    return outcome


def _streams(process: subprocess.Popen[bytes], stdin: bytes, tick: Callable[[], None]) -> tuple[bytes, bytes]:
    """Feed PROCESS and read it until it ends; what something else then still holds open is lost, as it is for oned."""
    assert process.stdin and process.stdout and process.stderr
    chunks: dict[int, list[bytes]] = {process.stdout.fileno(): [], process.stderr.fileno(): []}
    streams = tuple(chunks)
    todo = memoryview(stdin)
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in (*streams, ended):
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            if todo:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
            else:
                process.stdin.close()
            open_streams = set(streams)
            last = 0.0  # when to stop listening, once the process has ended
            while open_streams or not last:
                left = last - time.monotonic() if last else LOST
                if last and left <= 0:
                    break
                events = selector.select(left)
                for key, _ in events:
                    if key.fd == ended:
                        selector.unregister(ended)
                        last = time.monotonic() + LOST
                    elif key.fd in chunks:
                        data = os.read(key.fd, 1 << 16)
                        chunks[key.fd].append(data)
                        if not data:
                            selector.unregister(key.fd)
                            open_streams.discard(key.fd)
                    else:
                        try:
                            todo = todo[os.write(key.fd, todo) :]
                        except BrokenPipeError:  # it does not read its input, which is its own business
                            todo = todo[:0]
                        if not todo:
                            selector.unregister(key.fd)
                            process.stdin.close()
                if not last:
                    tick()
    finally:
        os.close(ended)
    process.wait()
    out, err = (b"" if fd in open_streams else b"".join(chunks[fd]) for fd in streams)
    return out, err


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the driver: it is asked first, because it undoes what it did; a second interruption kills it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE)
            return
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


def _read(contract: str, returncode: int, stderr: str) -> tuple[int, str]:
    """Exit status and message as the front-end of CONTRACT gets them."""
    if contract == "3.4":
        # It runs `sh -c "COMMAND ; echo ExitCode: $? 1>&2"` and believes the first such line it finds; a last line
        # of the driver without an end swallows it, and none found is a failure.
        found = _EXIT_CODE.search(f"{stderr}ExitCode: {returncode if returncode >= 0 else 128 - returncode}\n")
        status = int(found[1] or 255) if found else 255
        marked = _MARKED.search(stderr)
        return status, marked[1].strip() if marked and status else ""
    status = returncode if returncode >= 0 else 255
    lines = (line.strip() for line in stderr.split("\n"))
    text = "".join(line for line in lines if not _TAGGED.match(line)).strip() if status else ""
    return status, "" if text.startswith("-") else text
