"""A file, or a directory with all in it, as a stream of frames: holes and zeros are not sent.

A frame is a kind, an offset and a payload, behind a header that has a check of its own:

    O  an object begins: JSON with path ("" for the one that was asked for), type, mode, ...
    D  data of the file that is open, at this offset
    P  the same, packed (squeeze.py)
    Z  zeros of the file that is open, at this offset: the payload is how many.  Only where the other side may have
       something else there
    V  the checks of all data and zeros since the last V, one after the other; how they are made, before anything is
       packed, says `verify` in the O frame
    C  the object is complete: as V; its size as the offset if the O frame has none
    X  all objects are complete
    E  the sender failed: JSON [class of madrigal.errors, text]

A payload of data is good until the next frame is asked for.
"""

import errno
import json
import os
import stat
import struct
import time
import zlib

from madrigal.errors import BadImage, DigestMismatch, MadrigalError, NotFound
from madrigal.onhost import blocks, squeeze
from madrigal.onhost.pace import Pace
from madrigal.onhost.part import is_part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

    Payload = Union[bytes, memoryview]
    Frame = Tuple[bytes, int, Payload]

HEADER = struct.Struct(">cQII")
_CHECKED = struct.Struct(">cQI")
LENGTH = struct.Struct(">Q")
CHUNK = 1 << 20
"""The most bytes in a frame of data."""

STRIPE = 8 << 20
"""Of several lanes each has every so many bytes of a file in its turn."""

WITHIN = {"verify": "none"}
"""The terms for a stream that leaves no machine: nothing happens to it on the way."""

_SEVERAL = 4096  # checks in a V frame
_END = 1 << 62  # bytes; no file is as long
_SILENCE = 5.0  # seconds, after which one says that we live
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


def header(kind: bytes, offset: int, length: int) -> bytes:
    """What stands before a payload of LENGTH bytes."""
    fields = _CHECKED.pack(kind, offset, length)
    return fields + zlib.crc32(fields).to_bytes(4, "big")


def parse(data: "Payload") -> "Tuple[bytes, int, int]":
    """(kind, offset, length) that a header has; raises DigestMismatch, or BadImage if more is to follow than may."""
    kind, offset, length, check = HEADER.unpack(data)
    if check != zlib.crc32(data[: _CHECKED.size]):
        raise DigestMismatch("the stream was damaged on its way")
    if length > CHUNK or offset >= _END:
        raise BadImage("the stream has a frame that is too large, or for a place that no file has")
    return kind, offset, length


class Extents:
    """What is allocated in the open file FD.

    What was found is not asked for again: a file system may look through all the file for a hole that is not there
    (tmpfs does), and whoever wants a thousand ranges would have it do so a thousand times.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._from, self._data, self._hole = 0, 0, 0  # nothing from the first to the second, then data up to the third

    def within(self, start: int, end: int) -> "Iterator[Tuple[int, int]]":
        """(offset, length) of what is allocated from START to END, at most CHUNK each and within one CHUNK."""
        offset = start
        while offset < end:
            if not self._from <= offset < self._hole:
                self._look(offset)
            offset, stop = max(offset, self._data), min(self._hole, end)
            while offset < stop:
                length = min(CHUNK - offset % CHUNK, stop - offset)
                yield offset, length
                offset += length

    def _look(self, offset: int) -> None:
        self._from = offset
        try:
            self._data = os.lseek(self._fd, offset, os.SEEK_DATA)
            self._hole = os.lseek(self._fd, self._data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._data = self._hole = _END  # nothing but a hole up to the end
            elif error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                self._data, self._hole = offset, _END  # a file system without holes, or a device
            else:
                raise


def not_zero(data: bytearray, size: int) -> "Iterator[Tuple[int, int]]":
    """(start, end) of the runs of blocks in the first SIZE bytes of DATA that are not all zeros."""
    begun = -1
    for start in range(0, size, _BLOCK):
        if data.startswith(_ZEROS if size - start >= _BLOCK else _ZEROS[: size - start], start):
            if begun >= 0:
                yield begun, start
            begun = -1
        elif begun < 0:
            begun = start
    if begun >= 0:
        yield begun, size


def describe(path: str) -> "Dict[str, Any]":
    """What is at PATH: type (file, dir, link or other), size and allocated bytes, mode, mtime in ns, owner."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("{} does not exist".format(path)) from None
    kind = "file" if stat.S_ISREG(found.st_mode) else "dir" if stat.S_ISDIR(found.st_mode) else "other"
    about: "Dict[str, Any]" = {
        "type": "link" if stat.S_ISLNK(found.st_mode) else kind,
        "size": found.st_size,
        "allocated": found.st_blocks * 512,
        "mode": stat.S_IMODE(found.st_mode),
        "mtime": found.st_mtime_ns,
        "owner": [found.st_uid, found.st_gid],
    }
    if about["type"] == "link":
        about["target"] = os.readlink(path)
    return about


def measure(path: str) -> "Dict[str, Any]":
    """As describe(), of what PATH leads to; of a directory `allocated` is the sum of what is in it.

    `source` is another when something in it has been changed; of a block device nobody can say that, so it is "".
    """
    path = os.path.realpath(path)
    about = describe(path)
    if about["type"] == "other" and stat.S_ISBLK(os.stat(path).st_mode):
        return _measure_device(path, about)
    if about["type"] != "dir":
        return dict(about, source=identity([path]))
    below = [os.path.join(base, name) for base, _, names in os.walk(path) for name in names if not is_part(name)]
    about["allocated"] += sum(os.lstat(name).st_blocks * 512 for name in below)
    return dict(about, source=identity(below))


def _measure_device(path: str, about: "Dict[str, Any]") -> "Dict[str, Any]":
    from madrigal.onhost import survey

    size = survey.device_size(path)
    return dict(about, type="device", size=size, allocated=size, source="")


def identity(paths: "Sequence[str]") -> str:
    """A name for what the files at PATHS hold now."""
    found = [(path, os.lstat(path)) for path in sorted(paths)]
    text = repr([(path, about.st_ino, about.st_size, about.st_mtime_ns) for path, about in found])
    data = text.encode("utf-8", "backslashreplace")
    return "{:08x}{:08x}".format(zlib.crc32(data), zlib.crc32(data[::-1]))


def give(path: str, within: str = "", terms: "Optional[Dict[str, Any]]" = None) -> "Iterator[Frame]":
    """The frames, without the closing X, of what PATH leads to.  Sockets and the like in a directory stay behind.

    TERMS: as for give_open().
    """
    if within:
        about = describe(path)
    else:
        path = os.path.realpath(path)
        about = measure(path)
    if about["type"] == "other":
        return
    about["path"] = within
    if about["type"] == "device":
        about = dict(about, type="file", needs=0)  # how much of it are zeros shows when it is read
    if about["type"] != "file":
        yield b"O", 0, json.dumps(about).encode()
        if about["type"] == "dir":
            for name in sorted(os.listdir(path)):
                if not is_part(name):  # what an interrupted run left
                    for frame in give(os.path.join(path, name), os.path.join(within, name), terms):
                        yield frame
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for frame in give_open(fd, about, terms):
            yield frame
    finally:
        os.close(fd)


def give_open(fd: int, about: "Dict[str, Any]", terms: "Optional[Dict[str, Any]]" = None) -> "Iterator[Frame]":
    """The frames of the open file FD, described by ABOUT (its path within the stream, its mode, ...).

    TERMS, which all may be missing: `verify`, how data are checked (blocks.check); `lane`, [which, of how many] if
    there are several streams, each with its share; `known`, by path within the stream, what the other side has of
    files already (blocks.describe); `note`, also by path, files in which the digests of what is given are kept;
    `squeeze`, whether data may be packed (squeeze.py); `rate`, bytes a second at most.
    """
    wanted = terms or {}
    before = os.fstat(fd)
    verify = wanted.get("verify", "crc32")
    size = os.lseek(fd, 0, os.SEEK_END)  # also of a block device
    about = dict(about, size=size, mtime=before.st_mtime_ns, verify=verify)
    squeezer = squeeze.Squeezer() if wanted.get("squeeze") else None
    pace = Pace(wanted["rate"]) if wanted.get("rate") else None
    yield b"O", 0, json.dumps(about).encode()
    described = wanted.get("known", {}).get(about["path"])
    known = blocks.Known(described) if described else None
    checks = Checks(verify)
    lane = wanted.get("lane") or (0, 1)
    where = wanted.get("note", {}).get(about["path"])
    notes = blocks.Notes(fd, where) if where and not known and lane[1] == 1 else None  # of what is given whole
    for kind, offset, payload in _content(fd, size, known, lane, notes):
        if kind == b"D":
            checks.add(offset, payload)
            packed = squeezer.packed(payload) if squeezer else None
            if packed is not None:
                kind, payload = b"P", packed
            began = time.monotonic()
            if pace:
                pace.took(len(payload))
            yield kind, offset, payload
            if squeezer:
                squeezer.sent(len(payload), time.monotonic() - began)
        elif kind == b"Z":
            checks.add(offset, payload)
            yield kind, offset, payload
        if kind == b"V" or checks.are_many:
            yield b"V", 0, checks.take()
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        name = os.readlink("/proc/self/fd/{}".format(fd))
        raise MadrigalError("{} was changed while it was copied; try again when nobody uses it".format(name))
    if notes:
        notes.keep()
    yield b"C", 0, checks.take()


class Checks:
    """Of data and where they go, in their order, until they are taken; how they are made says VERIFY (blocks.check)."""

    def __init__(self, verify: str) -> None:
        self._check = blocks.check(verify)
        self._made: "List[bytes]" = []

    def add(self, offset: int, data: "Payload") -> None:
        self._made.append(self._check(offset, data))

    @property
    def are_many(self) -> bool:
        """Whether it is time for a frame with them."""
        return len(self._made) >= _SEVERAL

    def take(self) -> bytes:
        made, self._made = b"".join(self._made), []
        return made


def _content(
    fd: int,
    size: int,
    known: "Optional[blocks.Known]",
    lane: "Sequence[int]",
    notes: "Optional[blocks.Notes]",
) -> "Iterator[Frame]":
    """The D frames, and Z where the other side has something, of a file; V when there are none for long."""
    reader, allocated, said = blocks.Reader(fd), Extents(fd), time.monotonic()
    for start, end, is_bare in _ranges(fd, size, known, lane):
        if time.monotonic() - said > _SILENCE:
            yield b"V", 0, b""
            said = time.monotonic()
        reached = start
        for offset, length in allocated.within(start, end):
            data = reader.read(offset, length)
            if len(data) < length:
                raise BadImage("a file became shorter while it was read; try again when nobody changes it")
            if notes:
                notes.see(offset, data)
            for first, last in not_zero(reader.buffer, length):
                if not is_bare and offset + first > reached:
                    yield b"Z", reached, LENGTH.pack(offset + first - reached)
                yield b"D", offset + first, data[first:last]
                reached = offset + last
        if not is_bare and reached < end:
            yield b"Z", reached, LENGTH.pack(end - reached)


def _ranges(
    fd: int, size: int, known: "Optional[blocks.Known]", lane: "Sequence[int]"
) -> "Iterator[Tuple[int, int, bool]]":
    """(start, end, whether the other side has nothing there) of what a lane has to bring of SIZE bytes."""
    number, lanes = lane
    stripe = max(STRIPE, known.block if known else 0) if lanes > 1 else max(size, 1)
    for start in range(number * stripe, size, lanes * stripe):
        end = min(start + stripe, size)
        if known:
            for span in known.spans(start, end, fd):
                yield span
        else:
            yield start, end, True
