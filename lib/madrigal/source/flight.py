"""One import of a source at a time: who wants the same while it runs gets a copy of what comes of it.

The first import holds `<key>` in the run directory alone.  The others hold `<key>.others` together until they have
their copy, and until then the first does not answer: nobody knows its image yet, so nobody can have changed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time

from madrigal import config, deadline
from madrigal.errors import BY_NAME, DeadlineExceeded, MadrigalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class Flight:
    """`landed`: what the first one said of its image, None for the first one itself."""

    def __init__(self, landed: Any = None) -> None:
        self.landed = landed
        self.note = b""

    def land(self, about: Any) -> None:
        """Tell the others what has come of it; called by the first."""
        self.note = json.dumps({"landed": about}).encode()


@contextlib.contextmanager
def of(*identity: object) -> Iterator[Flight]:
    """The import of what IDENTITY says; inside, its first one does it, another has what the first has `landed`.

    Raises what the first one has raised, where the others have waited for it.
    """
    import hashlib

    key = hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = f"{config.run_dir()}/import-{key}"
    end = deadline.Deadline(deadline.source(), "the import of the same image that was waited for")
    while True:
        with contextlib.ExitStack() as stack:
            others, first = (_opened(stack, name) for name in (f"{path}.others", path))
            if _lock(first, fcntl.LOCK_EX):
                if not _is_there(first, path):
                    continue  # of one that has just ended
                os.ftruncate(first, 0)
                yield from _lead(path, others, first, end)
                return
            _wait(others, fcntl.LOCK_SH, end)
            _wait(first, fcntl.LOCK_SH, end)
            said = os.pread(first, 1 << 20, 0)
            if not said:
                continue  # the first was killed, or has answered by now
            note = json.loads(said)
            if "error" in note:
                name, text = note["error"]
                raise BY_NAME.get(name, MadrigalError)(text)
            yield Flight(note["landed"])
            return


def _lead(path: str, others: int, first: int, end: deadline.Deadline) -> Iterator[Flight]:
    flight = Flight()
    try:
        yield flight
    except MadrigalError as error:
        flight.note = json.dumps({"error": [type(error).__name__, str(error)]}).encode()
        raise
    finally:
        if flight.note and not _lock(others, fcntl.LOCK_EX):
            os.pwrite(first, flight.note, 0)
            fcntl.flock(first, fcntl.LOCK_SH)
            with contextlib.suppress(DeadlineExceeded):
                _wait(others, fcntl.LOCK_EX, end)
            os.ftruncate(first, 0)
        for name in (path, f"{path}.others"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _opened(stack: contextlib.ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return fd


def _is_there(fd: int, path: str) -> bool:
    """Whether FD still has the name PATH."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(fd: int, how: int, end: deadline.Deadline) -> None:
    pause = 0.01
    while not _lock(fd, how):
        time.sleep(min(pause, end.left()))
        pause = min(pause * 1.5, 0.5)
