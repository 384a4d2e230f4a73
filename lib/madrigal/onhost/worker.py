"""The process on a host: takes requests from stdin, one JSON line each, until it is told that all is well.

    ["method of Session", {arguments}]   answered by   {"ok": result} or {"error": [class, text, [log lines]]}

The frames of `receive` follow its request, those of `send` come before its answer, if they do not go between two
hosts (onhost/direct.py).  Before an answer that takes long comes {"busy": true} now and then, with the `bytes` that a
host has sent to another.  After an error, or when stdin ends before `done`, everything is
taken back and the process ends.
"""

import json
import os
import select
import signal
import sys
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


class _Told(BaseException):
    """A signal: a delete wants what we hold."""


def main(marker: str, timeouts: "Dict[str, float]", umask: int) -> None:
    """Serve; MARKER tells our output from what a login shell may have written before."""
    os.umask(umask)
    signal.signal(signal.SIGTERM, _tell)
    signal.signal(signal.SIGHUP, _tell)
    os.write(1, marker.encode() + b"\n")
    inp = sys.stdin.buffer
    session = Session(timeouts, _waiting)
    try:
        while _serve(session, inp):
            pass
    except _Told:
        _fail(session)
        _answer({"error": [Deleted.__name__, "the action was ended because its object is being deleted", []]})
    except BrokenPipeError:
        pass
    finally:
        _fail(session, HostUnreachable("the front-end is gone"))  # nothing to take back after `done`
    os._exit(0)


def _serve(session: Session, inp: "BinaryIO") -> bool:
    """Answer one request; returns whether there may be another."""
    line = inp.readline()
    if not line:
        return False
    method, arguments = json.loads(line.decode())
    try:
        directly = arguments.pop("directly", False)  # from or to another host
        if method in ("receive", "lane"):
            if directly:
                inp = session.direct("arriving")
            else:
                pipe.widen(inp.fileno())
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


def _write(data: "Union[bytes, memoryview]") -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _frames(inp: "BinaryIO") -> "Iterator[Frame]":
    header, payload = memoryview(bytearray(stream.HEADER.size)), memoryview(bytearray(stream.CHUNK))
    while True:
        _read(inp, header)
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
    try:
        for kind, offset, payload in frames:
            left = [memoryview(stream.header(kind, offset, len(payload))), memoryview(payload)]
            while left:
                left = pipe.put(1, left)
    except (OSError, MadrigalError) as error:
        known = explain(error) if isinstance(error, OSError) else error
        payload = json.dumps([type(known).__name__, str(known)]).encode()
        _write(stream.header(b"E", 0, len(payload)) + payload)
        raise
    _write(stream.header(b"X", 0, 0))


def _waiting(**more: int) -> None:
    """Called while something takes time: stop if nobody waits for it any more, else say that we live, and MORE."""
    global _said
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
