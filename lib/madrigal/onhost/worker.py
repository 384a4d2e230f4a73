"""The process on a host: takes requests from stdin, one JSON line each, until it is told that all is well.

    ["method of Session", {arguments}]   answered by   {"ok": result} or {"error": [class, text, [log lines]]}

The frames of `receive` follow its request, those of `send` come before its answer, if they do not go between two
hosts (onhost/direct.py).  Before an answer that takes long comes {"busy": true} now and then, with the `bytes` that a
host has sent to another.  Between requests and between frames come empty lines: they say that the front-end lives.
After an error, or when stdin ends before `done` or brings nothing for long, everything is taken back and the process
ends.
"""

import fcntl
import io
import json
import os
import select
import signal
import struct
import sys
import termios
import time

from madrigal.errors import Deleted, HostUnreachable, MadrigalError, explain
from madrigal.onhost import pipe, stream
from madrigal.onhost.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Union

    from madrigal.onhost.stream import Frame


HEARTBEAT = 5.0  # seconds
_said = 0.0

_LOOKS = 6
"""How often it is looked, at least, whether there is something to hear in the time after which there is nobody."""


class _Told(BaseException):
    """A signal: a delete wants what we hold."""


class _Silence(HostUnreachable):
    """There is no front-end any more, or no way to it, and nobody can be told."""


class _Hearing(io.RawIOBase):
    """What the front-end says after BEGUN, which has been read already; it says something all SECONDS at least."""

    def __init__(self, begun: bytes, seconds: float) -> None:
        self._begun, self._seconds = begun, seconds
        self.pause = seconds / _LOOKS
        self._quiet, self._looked, self._seen = 0.0, time.monotonic(), 0
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, view: "Any") -> int:
        count = min(len(view), len(self._begun))
        if count:
            view[:count], self._begun = self._begun[:count], self._begun[count:]
            return count
        while not self._poll.poll(self.pause * 1000):
            self.look()
        self._quiet, self._seen = 0.0, 0
        return os.readv(0, [view])

    def look(self) -> None:
        """Raise _Silence if it has said nothing for so long; to be called now and then by what does not read."""
        now, count = time.monotonic(), struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, bytes(4)))[0]
        if count > self._seen or count >= pipe.room(0) // 2:  # nothing may come because there is no room for it
            self._quiet = 0.0
        else:
            # If it was us who did not run, or our sshd, for however long: what was said meanwhile has yet to come.
            self._quiet += min(now - self._looked, self.pause)
        self._looked, self._seen = now, count
        if self._quiet >= self._seconds:
            raise _Silence("the front-end was not heard there for {:g} s".format(self._seconds))


_hearing: "_Hearing"


def main(marker: str, timeouts: "Dict[str, float]", umask: int) -> None:
    """Serve; MARKER tells our output from what a login shell may have written before."""
    os.umask(umask)
    signal.signal(signal.SIGTERM, _tell)
    signal.signal(signal.SIGHUP, _tell)
    os.write(1, marker.encode() + b"\n")
    global _hearing
    os.set_blocking(0, False)
    begun = sys.stdin.buffer.peek()  # type: ignore[union-attr]
    os.set_blocking(0, True)
    os.set_blocking(1, False)
    _hearing = _Hearing(begun, timeouts["silence"])
    inp = io.BufferedReader(_hearing)
    session = Session(timeouts, _waiting)
    try:
        try:
            while _serve(session, inp):
                pass
        except _Told:
            _fail(session)
            _answer({"error": [Deleted.__name__, "the action was ended because its object is being deleted", []]})
        except _Silence as silence:
            _fail(session, silence)
            os.write(2, str(silence).encode() + b"\n")  # to who is there after all, and has stood still
    except (BrokenPipeError, _Silence):
        pass
    finally:
        _fail(session, HostUnreachable("the front-end is gone"))  # nothing to take back after `done`
    os._exit(0)


def _serve(session: Session, inp: "BinaryIO") -> bool:
    """Answer one request; returns whether there may be another."""
    line = inp.readline()
    if line in (b"", b"\n"):
        return bool(line)
    method, arguments = json.loads(line.decode())
    try:
        directly = arguments.pop("directly", False)  # from or to another host
        if method in ("receive", "lane"):
            if directly:
                inp = session.direct("arriving")
            else:
                pipe.widen(0)
            arguments["frames"] = _frames(inp)
        result = getattr(session, method)(**arguments)
        if method == "send" and not directly:
            _write_frames(result)
            result = None
        elif method == "send":
            result = session.direct("put", frames=result)
        elif directly:
            inp.close()
    except OSError as error:
        return _refuse(session, explain(error))
    except _Silence:
        raise
    except MadrigalError as error:
        return _refuse(session, error)
    _answer({"ok": result})
    return bool(method != "done")


def _refuse(session: Session, error: MadrigalError) -> bool:
    _answer({"error": [type(error).__name__, str(error), _fail(session, error)]})
    return False


def _fail(session: Session, error: "Optional[Exception]" = None) -> "List[str]":
    _ignore_signals()  # a delete must not leave behind what it interrupts us in taking back
    return session.fail(error)


def _answer(answer: "Dict[str, Any]") -> None:
    _write(json.dumps(answer).encode() + b"\n")


def _write(*data: "Union[bytes, memoryview]") -> None:
    left = [memoryview(part) for part in data]
    while left:
        try:
            left = pipe.put(1, left)
        except BlockingIOError:
            if not select.select([], [1], [], _hearing.pause)[1]:
                _hearing.look()


def _frames(inp: "BinaryIO") -> "Iterator[Frame]":
    header, payload = memoryview(bytearray(stream.HEADER.size)), memoryview(bytearray(stream.CHUNK))
    while True:
        _read(inp, header[:1])
        if header[0] == ord("\n"):
            continue
        _read(inp, header[1:])
        kind, offset, length = stream.parse(header)
        if kind == b"X":
            return
        _read(inp, payload[:length])
        yield kind, offset, payload[:length]


def _read(inp: "BinaryIO", view: memoryview) -> None:
    while view:
        count = inp.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise HostUnreachable("the connection broke in the middle of the data")
        view = view[count:]


def _write_frames(frames: "Iterator[Frame]") -> None:
    pipe.widen(1)
    try:
        for kind, offset, payload in frames:
            _write(stream.header(kind, offset, len(payload)), payload)
    except _Silence:
        raise
    except (OSError, MadrigalError) as error:
        known = explain(error) if isinstance(error, OSError) else error
        payload = json.dumps([type(known).__name__, str(known)]).encode()
        _write(stream.header(b"E", 0, len(payload)), payload)
        raise
    _write(stream.header(b"X", 0, 0))


def _waiting(**more: int) -> None:
    """Called while something takes time: stop if nobody waits for it any more, else say that we live, and MORE."""
    global _said
    _hearing.look()
    poll = select.poll()
    poll.register(0, getattr(select, "POLLRDHUP", 0x2000))
    if poll.poll(0):
        raise HostUnreachable("the front-end is gone")
    if time.monotonic() - _said > HEARTBEAT:
        _said = time.monotonic()
        _answer(dict(more, busy=True))


def _tell(number: int, frame: "Any") -> None:
    _ignore_signals()
    raise _Told()


def _ignore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
