"""How long something packed will be, from what its packer wrote down: a few bytes are read, none unpacked.

xz has an index at its end.  zstd and lz4 frames may begin with it, but nothing says how many frames there are: from far
away all of them have to pass by, unless what the beginning of the disk says (a GPT, a file system) agrees with the
first.  gzip ends with it modulo 4 GiB, of its last member alone; so the disk has to agree with that.
"""

from __future__ import annotations

import re
import zlib

from madrigal.errors import NotSupported

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable

    from madrigal.source.schemes import Source

_INDEX = 16 << 20
"""The most bytes of an xz index that are looked at, a record of 10 or so for each block of, mostly, 24 MiB."""

_RATIO = 1032
"""How much deflate can make of a byte."""

_TAIL = 1 << 20
"""The bytes at the end in which another member or frame would be seen, if it is a small one."""

_PASSED = 4 << 30
"""The most bytes that pass by for the headers in them."""


class _Odd(Exception):
    """The marks are missing, or not what the format says."""


def length(source: Source, kind: str, head: bytes, begun: bytes | None, seen: Callable[[bytes], object]) -> int | None:
    """The bytes that SOURCE, packed by KIND (codec.kind), will have; HEAD are the first of them.  None: unpack it.

    BEGUN: what has been read of it, None if that was too much to keep.  If the rest is, SEEN is called with that, and
    the source is of no other use then.  Raises NotSupported if it turns out to have no size.
    """
    reader = {"xz": _xz, "zstd": _frames, "lz4": _frames, "gzip": _gzip}.get(kind)
    if reader is None or source.size is None:
        return None
    try:
        found = reader(_Marks(source, source.size), head)
    except _Odd:
        return None
    except _Unsure:
        if source.size > _PASSED or begun is None:
            return None
        return _passed(source, _Passing(source, source.size, begun, seen), head)
    return found if found >= len(head) else None


def _passed(source: Source, marks: _Passing, head: bytes) -> int:
    try:
        found = _frames(marks, head)
        if found >= len(head):
            return found
    except _Odd:
        pass
    raise NotSupported(f"the size of {source.name} is not known, as not all in it says its own: give SIZE")


class _Unsure(Exception):
    """There may be more than one can see from here."""


class _Marks:
    """A packed source of SIZE bytes, as bytes to be read anywhere."""

    def __init__(self, source: Source, size: int) -> None:
        self.size, self._source = size, source
        self.is_near = source.local_fd is not None
        """Whether reading here and there takes no time."""

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise _Odd
        data = self._source.peek(offset, length) if length else b""
        if data is None or len(data) < length:
            raise _Odd
        return data


class _Passing(_Marks):
    """The same, read to its end, forwards: what has been asked for before goes."""

    def __init__(self, source: Source, size: int, begun: bytes, seen: Callable[[bytes], object]) -> None:
        super().__init__(source, size)
        self.is_near = True
        self._seen, self._start, self._kept = seen, 0, bytearray(begun)

    def read(self, offset: int, length: int) -> bytes:
        if offset < self._start or offset + length > self.size:
            raise _Odd
        while self._start + len(self._kept) < offset + length:
            gone = min(offset - self._start, len(self._kept))
            del self._kept[:gone]
            self._start += gone
            data = self._source.read(1 << 20)
            if not data:
                raise _Odd
            self._seen(data)
            self._kept += data
        return bytes(self._kept[offset - self._start : offset - self._start + length])


# -- xz -----------------------------------------------------------------------------------------------------------


def _xz(marks: _Marks, _head: bytes) -> int:
    """The sum of all streams, from the last to the first."""
    total, end = 0, marks.size
    while end:
        footer = marks.read(end - 12, 12)
        if footer == bytes(12) or footer[8:] == bytes(4):
            end -= 4  # padding, in fours
            continue
        backward = (_le(footer[4:8]) + 1) * 4
        if footer[10:] != b"YZ" or zlib.crc32(footer[4:10]) != _le(footer[:4]) or backward > _INDEX:
            raise _Odd
        index = marks.read(end - 12 - backward, backward)
        if index[:1] != b"\0" or zlib.crc32(index[:-4]) != _le(index[-4:]):
            raise _Odd
        blocks, size = _records(index)
        total, end = total + size, end - 12 - backward - blocks - 12
        if end < 0 or marks.read(end, 6) != b"\xfd7zXZ\0":
            raise _Odd
    return total


def _records(index: bytes) -> tuple[int, int]:
    """Bytes that all blocks take, and that they have when unpacked."""
    count, at = _number(index, 1)
    packed = size = 0
    for _ in range(count):
        unpadded, at = _number(index, at)
        unpacked, at = _number(index, at)
        packed, size = packed + unpadded + -unpadded % 4, size + unpacked
    return packed, size


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits in each byte, and where it ends."""
    number = shift = 0
    while at < len(data) and shift < 63:
        byte = data[at]
        number, at, shift = number | (byte & 0x7F) << shift, at + 1, shift + 7
        if not byte & 0x80:
            return number, at
    raise _Odd


# -- zstd and lz4 -------------------------------------------------------------------------------------------------


def _frames(marks: _Marks, head: bytes) -> int:
    """The sum of all frames; from far away the first, if the disk itself says that it is all."""
    total, at = 0, 0
    while at < marks.size:
        start = marks.read(at, min(32, marks.size - at)).ljust(32, b"\0")
        if start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:
            if not marks.is_near:
                raise _Unsure
            at += 8 + _le(start[4:8])
            continue
        if start.startswith(b"\x28\xb5\x2f\xfd"):
            size, blocks = _zstd_header(start)
        elif start.startswith(b"\x04\x22\x4d\x18"):
            size, blocks = _lz4_header(start)
        else:
            raise _Odd
        if not marks.is_near:
            # no packer makes more of anything than this
            if size not in _said(head) or marks.size > size + size // 128 + (1 << 16):
                raise _Unsure
            if _has_another(marks, re.escape(start[:4])):
                raise _Unsure
            return size
        end = _lz4_end if start[0] == 0x04 else _zstd_end
        total, at = total + size, end(marks, at + blocks, start[4])
    if at != marks.size:
        raise _Odd
    return total


def _zstd_header(start: bytes) -> tuple[int, int]:
    """The content size and the length of a frame's header."""
    what = start[4]
    single, flag = what >> 5 & 1, what >> 6
    length = (single, 2, 4, 8)[flag]
    at = 5 + (1 - single) + (0, 1, 2, 4)[what & 3]
    if not length:
        raise _Odd
    return _le(start[at : at + length]) + (256 if length == 2 else 0), at + length


def _zstd_end(marks: _Marks, at: int, flags: int) -> int:
    last = False
    while not last:
        header = _le(marks.read(at, 3))
        last = bool(header & 1)
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # a run-length block has one byte
    return at + 4 * (flags >> 2 & 1)


def _lz4_header(start: bytes) -> tuple[int, int]:
    flags = start[4]
    if not flags & 0x08:
        raise _Odd
    return _le(start[6:14]), 6 + 8 + 4 * (flags & 1) + 1


def _lz4_end(marks: _Marks, at: int, flags: int) -> int:
    while size := _le(marks.read(at, 4)):
        at += 4 + (size & 0x7FFFFFFF) + 4 * (flags >> 4 & 1)
    return at + 4 + 4 * (flags >> 2 & 1)


# -- gzip ---------------------------------------------------------------------------------------------------------


def _gzip(marks: _Marks, head: bytes) -> int:
    """What the disk's own beginning says, if the end of the file and what deflate can do agree with it."""
    if _has_another(marks, rb"\x1f\x8b\x08[\x00-\x1f]"):
        raise _Odd
    modulo = _le(marks.read(marks.size - 4, 4))
    for size in _said(head):
        if size % (1 << 32) == modulo and marks.size * 0.99 - 4096 < size <= marks.size * _RATIO:
            return size
    raise _Odd


def _has_another(marks: _Marks, start: bytes) -> bool:
    """Whether something that begins with START, a pattern, may be at the end, behind what begins the file."""
    tail = min(_TAIL, marks.size - 4)
    return re.search(start, marks.read(marks.size - tail, tail), re.DOTALL) is not None


def _said(head: bytes) -> list[int]:
    """How long a disk is that begins with HEAD, as its partition table or its file system says."""
    found = []
    for sector in (512, 4096):
        table = head[sector : sector + 92]
        if table.startswith(b"EFI PART"):
            found.append((_le(table[32:40]) + 1) * sector)  # where the other copy of the table is
    if head[1080:1082] == b"\x53\xef":
        found.append(_le(head[1028:1032]) << (10 + min(_le(head[1048:1052]), 6)))
    if head.startswith(b"XFSB"):
        found.append(int.from_bytes(head[4:8], "big") * int.from_bytes(head[8:16], "big"))
    return found


def _le(data: bytes) -> int:
    return int.from_bytes(data, "little")
