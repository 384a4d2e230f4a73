"""Frames from one host straight to another: an ssh from here to there, or what such a one brings here.

The worker that is to receive them waits at a socket.  The other one starts ssh, which starts onhost/relay.py, and that
passes its stdin, which is the connection, on to the worker it finds.  So it is that worker or none that gets the data,
wherever the name leads to; requests and answers go between the workers and the front-end as ever.
"""

import io
import json
import os
import select
import socket
import struct
import time

from madrigal.errors import DeadlineExceeded, HostUnreachable, MadrigalError, explain
from madrigal.onhost import pipe, stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Optional, Union

    from madrigal.onhost.stream import Frame
    from madrigal.onhost.undo import Undo

MARKER = "madrigal relay, ready"

_OPTIONS = ("ControlMaster=no", "ControlPath=none", "StrictHostKeyChecking=yes", "UpdateHostKeys=no", "CheckHostIP=no")
# The last three: ssh is to write no known_hosts on a host, whatever the configuration there says.

_TICK = 1.0  # seconds between two looks whether the front-end is still there
_COMING = 10.0  # seconds for what the relay has announced to be here


class Direct:
    """Both ends, of which a session is one.  SECONDS: how long nothing may move; WAITING may be told `bytes`."""

    def __init__(self, undo: "Undo", waiting: "Callable[..., None]", seconds: float) -> None:
        self._undo, self._waiting, self._seconds = undo, waiting, seconds
        self._listener: "Optional[socket.socket]" = None
        self._ssh: "Optional[subprocess.Popen[bytes]]" = None
        self._host = ""
        self._next = 0.0

    # -- who sends -------------------------------------------------------------------------------------------

    def connect(self, host: str, command: str, program: str, seconds: float) -> "Dict[str, Any]":
        """Start COMMAND, a Python that reads PROGRAM, on HOST within SECONDS: {"rtt": seconds there and back}.

        Or {"status", "said"}: what is left by an ssh that does not get there; or {"missing": why there is none}.
        """
        import subprocess

        from madrigal import command as programs
        from madrigal.onhost.ssh import ciphers, options

        argv = ["ssh"] + options(seconds, *_OPTIONS) + ["-c", ciphers(), "--", host, command]
        env = programs.environment()
        try:
            ssh = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            return {"missing": error.strerror}
        self._host, self._ssh = host, ssh
        self._undo.push(self._end)
        for file in (ssh.stdin, ssh.stdout, ssh.stderr):
            os.set_blocking(file.fileno(), False)  # type: ignore[union-attr]
        pipe.widen(ssh.stdin.fileno())  # type: ignore[union-attr]
        text = program.encode()
        try:
            self._write(b"%d\n%s" % (len(text), text))
            rtt = self._started(time.monotonic() + seconds + min(seconds, 10))
        except (HostUnreachable, DeadlineExceeded) as error:
            said = self._said() or str(error)
            self._undo.forget(self._end)
            self._end()
            return {"status": ssh.returncode if ssh.returncode > 0 else 255, "said": said}
        return {"rtt": rtt}

    def _started(self, end: float) -> float:
        """Wait for the relay; returns the time there and back."""
        said = b""
        while not said.endswith(MARKER.encode() + b"\n"):  # a login shell may have written something before
            said += self._read(end)
        took = []
        for sent in b"?", b"?", b"?", b"!":
            began = time.monotonic()
            self._write(sent)
            self._read(end)
            took.append(time.monotonic() - began)
        return min(took)

    def _read(self, end: float) -> bytes:
        fd = self._ssh.stdout.fileno()  # type: ignore[union-attr]
        while not _ready(fd, select.POLLIN, 0.2):
            if time.monotonic() > end:
                raise DeadlineExceeded("Connection timed out")
            self._waiting()
        data = os.read(fd, 4096)
        if not data:
            raise HostUnreachable("Connection closed")
        return data

    def put(self, frames: "Iterator[Frame]") -> int:
        """Send FRAMES, which are not all yet; returns how many bytes of data they had."""
        count = 0
        try:
            for kind, offset, payload in frames:
                self._write(stream.header(kind, offset, len(payload)), payload, count)
                count += len(payload) if kind in (b"D", b"P") else 0
        except (OSError, MadrigalError) as error:
            known = explain(error) if isinstance(error, OSError) else error
            if not known.is_interruption:  # else there is something to go on with
                said = json.dumps([type(known).__name__, str(known)]).encode()
                self._write(stream.header(b"E", 0, len(said)), said)
                self._flush()
            raise
        return count

    def complete(self) -> None:
        """Those were all frames."""
        self._write(stream.header(b"X", 0, 0))
        self._ssh.stdin.close()  # type: ignore[union-attr]

    def _flush(self) -> None:
        """Wait until the other side has seen what was written, and ended the connection."""
        end = time.monotonic() + _COMING
        self._ssh.stdin.close()  # type: ignore[union-attr]
        while self._ssh.poll() is None and time.monotonic() < end:  # type: ignore[union-attr]
            time.sleep(0.01)

    def _write(self, head: "Union[bytes, memoryview]", body: "Union[bytes, memoryview]" = b"", count: int = 0) -> None:
        """Write both, or raise what stands in the way; COUNT: what the front-end is told has been sent."""
        fd = self._ssh.stdin.fileno()  # type: ignore[union-attr]
        parts, end = [memoryview(head), memoryview(body)], time.monotonic() + self._seconds
        while parts:
            if time.monotonic() > self._next:
                self._next = time.monotonic() + _TICK
                self._waiting(bytes=count)
            try:
                parts = pipe.put(fd, parts)
            except BlockingIOError:
                if _ready(fd, select.POLLOUT, _TICK / 2):
                    continue
                if time.monotonic() > end:
                    text = "{} took no data for {:g} s".format(self._host, self._seconds)
                    raise DeadlineExceeded(text) from None
                continue
            except BrokenPipeError:
                text = "the connection to {} broke: {}".format(self._host, self._said() or "it was closed there")
                raise HostUnreachable(text) from None

    def _said(self) -> str:
        """The last line that ssh has written, which has ended or will."""
        end = time.monotonic() + 2
        while self._ssh.poll() is None and time.monotonic() < end:  # type: ignore[union-attr]
            time.sleep(0.01)
        said = b""
        try:
            while True:
                data = os.read(self._ssh.stderr.fileno(), 4096)  # type: ignore[union-attr]
                said = (said + data)[-4096:]
                if not data:
                    break
        except BlockingIOError:
            pass
        return said.decode("utf-8", "replace").strip()

    def _end(self) -> None:
        from madrigal import command as programs

        programs.end_group(self._ssh)  # type: ignore[arg-type]

    # -- who receives ----------------------------------------------------------------------------------------

    def listen(self) -> str:
        """Where the relay is to look for us: a name that is gone with this process."""
        name = "madrigal-" + os.urandom(16).hex()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + name)
        self._listener.listen(4)
        return name

    def arriving(self) -> "BinaryIO":
        """What the relay has been sent, from its first frame; the relay ends when it is closed."""
        listener = self._listener
        if listener is None:
            raise HostUnreachable("nobody was told to bring data here")
        end = time.monotonic() + _COMING
        while time.monotonic() < end:
            if not _ready(listener.fileno(), select.POLLIN, _TICK / 2):
                self._waiting()
                continue
            relay = listener.accept()[0]
            fds = _passed(relay)
            if fds:
                os.set_blocking(fds[0], False)
                raw = _Arriving(fds[0], relay, self._waiting, self._seconds)
                return io.BufferedReader(raw, 1 << 16)
            relay.close()
        raise HostUnreachable("the other host did not begin to bring the data")


class _Arriving(io.RawIOBase):
    """The data on the descriptor FD, which RELAY keeps open as long as we do that socket."""

    def __init__(self, fd: int, relay: "socket.socket", waiting: "Callable[..., None]", seconds: float) -> None:
        self._fd, self._relay, self._waiting, self._seconds = fd, relay, waiting, seconds
        self._next = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, view: "Any") -> int:
        end = time.monotonic() + self._seconds
        while True:
            if time.monotonic() > self._next:
                self._next = time.monotonic() + _TICK
                self._waiting()
            try:
                return os.readv(self._fd, [view])
            except BlockingIOError:
                if _ready(self._fd, select.POLLIN, _TICK / 2):
                    continue
            except ConnectionError:
                return 0
            if time.monotonic() > end:
                raise DeadlineExceeded("the other host sent nothing for {:g} s".format(self._seconds))

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
            self._relay.close()
        super().close()


def _ready(fd: int, event: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


def _passed(relay: "socket.socket") -> "List[int]":
    """The descriptor that RELAY passes, if it is a process of our user."""
    credentials = relay.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if struct.unpack("iII", credentials)[1] != os.geteuid():
        return []
    relay.settimeout(_COMING)
    try:
        _, extra, _, _ = relay.recvmsg(1, socket.CMSG_SPACE(4), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    except OSError:
        return []
    return [
        struct.unpack("i", data[:4])[0]
        for level, kind, data in extra
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= 4
    ]
