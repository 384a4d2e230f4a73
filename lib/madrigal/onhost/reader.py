"""A file of a host as the source of an image: what main() writes to stdout, once, and all of it.

A line {"size": bytes, "version": what changes when the file does} or {"error": [class of madrigal.errors, text]}; then
pieces, each a HEADER with its offset and length and the data, without holes.  A piece of no length, at the file's end,
is the last, if the file is then as it was.
"""

import errno
import json
import os
import pwd
import struct

from madrigal.errors import MadrigalError, explain
from madrigal.onhost import guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Iterator, List, Sequence, Tuple

HEADER = struct.Struct(">QI")
_PIECE = 1 << 20


def main(marker: str, path: str, safe: str, restricted: str, always: "Sequence[str]", offset: int) -> None:
    """Send the file PATH from OFFSET on, if it may be read (guard.py), after MARKER: a login shell may speak first."""
    _write(marker.encode() + b"\n")
    try:
        fd = guard.open_allowed(path, safe, restricted, list(always) + _homes())
        about = _about(fd)
        _write(json.dumps(about).encode() + b"\n")
    except OSError as error:
        return _refuse(explain(error))
    except MadrigalError as error:
        return _refuse(error)
    try:
        for start, length in _extents(fd, offset, about["size"]):
            data = os.pread(fd, length, start)
            if len(data) < length:
                return None
            _write(HEADER.pack(start, length) + data)
        if _about(fd) == about:
            _write(HEADER.pack(about["size"], 0))
    except BrokenPipeError:
        pass  # nobody wants more of it


def _homes() -> "List[str]":
    """What this user's home directory is called: by the environment, and by the list of users."""
    try:
        known = [pwd.getpwuid(os.getuid()).pw_dir]
    except KeyError:
        known = []
    return [home for home in [os.path.expanduser("~")] + known if home.startswith("/") and home != "/"]


def _about(fd: int) -> "Dict[str, int]":
    found = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END)  # of a block device too
    return {"size": size, "version": [found.st_dev, found.st_ino, found.st_mtime_ns, size]}  # type: ignore[dict-item]


def _extents(fd: int, offset: int, size: int) -> "Iterator[Tuple[int, int]]":
    """(offset, length) of what is not a hole from OFFSET on."""
    while offset < size:
        end = size
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
            end = min(os.lseek(fd, offset, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
                raise
        while offset < end:
            length = min(_PIECE, end - offset)
            yield offset, length
            offset += length


def _refuse(error: MadrigalError) -> None:
    _write(json.dumps({"error": [type(error).__name__, str(error)]}).encode() + b"\n")


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
