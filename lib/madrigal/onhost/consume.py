"""Converting or moving an image that nobody needs afterwards: it gives back its room on the way, so there is one copy.

It is converted in steps, from its end to its beginning, and what a step has read is given back before the next: a raw
image is cut off there, another gets holes where its file system knows them.  It is converted at once if it is small,
if nobody knows which of its bytes belong to what the disk holds (compressed data, VHDX), or by a qemu-img before 5.0.
"""

import os

from madrigal.errors import NotSupported
from madrigal.onhost import image, part, stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from typing import Callable, Iterable, List, Optional, Tuple, Union

    from madrigal.onhost.part import Nameless, Part

    Waiting = Callable[[], None]

SMALL = 32 << 20
"""Bytes of data that there may be twice."""

_STEPS = 16
_ALIGN = 2 << 20  # the largest cluster of qcow2: none is written in two steps


def convert(
    source: "Union[Part, Nameless]", format: str, target: str, target_format: str, waiting: "Waiting", timeout: float
) -> None:
    """As image.convert(); SOURCE is worth nothing afterwards, whatever happens."""
    about = (source.path, format, target, target_format)
    disk: "Union[_Raw, Optional[_Mapped]]" = _Raw(source.fd)
    if os.fstat(source.fd).st_blocks * 512 <= SMALL:
        disk = None
    elif format != "raw":
        disk = _mapped(source, format, os.path.dirname(target), waiting, timeout)
    if disk is None:
        image.convert(*about, waiting=waiting, timeout=timeout)
        return
    image.create(target, target_format, disk.size, "", waiting, timeout)
    end = disk.size
    for start in reversed(_cuts(disk.pieces(), disk.data)):
        try:
            image.convert_range(*about, start=start, end=end, waiting=waiting, timeout=timeout)
        except NotSupported:
            if end != disk.size:
                raise
            image.convert(*about, waiting=waiting, timeout=timeout)
            return
        disk.give_back(start)
        end = start


def move(source: "Union[Part, Nameless]", target: "Part", waiting: "Callable[..., None]") -> None:
    """Let TARGET, an empty file elsewhere, have what SOURCE has, which is worth nothing afterwards whatever happens."""
    from madrigal.onhost import copy

    if copy.clone(source.fd, target.fd):
        return
    disk = _Raw(source.fd)
    if os.fstat(source.fd).st_dev != os.fstat(target.fd).st_dev:
        copy.check_room(disk.data, target.fd)
    filler, end, count = copy.Filler(source.fd, target.fd), disk.size, 0
    extents = stream.Extents(source.fd)
    os.ftruncate(target.fd, end)
    for start in reversed(_cuts(disk.pieces(), disk.data)):
        for offset, length in extents.within(start, end):
            waiting(bytes=count)
            filler.copy(offset, offset + length)
            count += length
        disk.give_back(start)
        end = start


def _cuts(pieces: "Iterable[Tuple[int, int]]", data: int) -> "List[int]":
    """Where steps begin, each with about as much of the DATA, which lie in PIECES (start, length), as the others."""
    share = max(SMALL, -(-data // _STEPS))
    found, taken = [0], 0
    for start, length in pieces:
        end = start + length
        while taken + end - start > share:
            cut = -(-(start + share - taken) // _ALIGN) * _ALIGN
            if cut >= end:
                break
            found.append(cut)
            start, taken = cut, 0
        taken += end - start
    return found


class _Raw:
    """The raw image in the file FD: SIZE bytes, of which DATA are not holes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size, self.data = os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512

    def pieces(self) -> "Iterable[Tuple[int, int]]":
        """Where the disk has data: (start, length), in order."""
        return stream.Extents(self._fd).within(0, self.size)

    def give_back(self, start: int) -> None:
        """Give back the room of all from START on."""
        os.ftruncate(self._fd, start)


class _Mapped:
    """The same of an image whose file FD has its data elsewhere: (start, length) at OFFSETS."""

    def __init__(self, fd: int, size: int, starts: "array[int]", lengths: "array[int]", offsets: "array[int]") -> None:
        self._fd = fd
        self.size, self.data = size, sum(lengths)
        self._starts, self._lengths, self._offsets = starts, lengths, offsets

    def pieces(self) -> "Iterable[Tuple[int, int]]":
        return ((self._starts[index], self._lengths[index]) for index in range(len(self._starts)))

    def has_any_twice(self) -> bool:
        """Whether something in the file is in two places of the disk."""
        end = 0
        for index in sorted(range(len(self._offsets)), key=self._offsets.__getitem__):
            if self._offsets[index] < end:
                return True
            end = self._offsets[index] + self._lengths[index]
        return False

    def give_back(self, start: int) -> None:
        from madrigal.onhost.device import punch

        while self._starts and self._starts[-1] + self._lengths[-1] > start:
            first, length, offset = self._starts.pop(), self._lengths.pop(), self._offsets.pop()
            kept = max(start - first, 0)
            if kept:
                self._starts.append(first)
                self._lengths.append(kept)
                self._offsets.append(offset)
            try:
                punch(self._fd, offset + kept, length - kept)
            except OSError:
                return  # a file system that has no holes


def _mapped(
    source: "Union[Part, Nameless]", format: str, directory: str, waiting: "Waiting", timeout: float
) -> "Optional[_Mapped]":
    """None if what is read cannot be given back, or is to be read twice, or lies in more pieces than can be told.

    DIRECTORY: where there is room for a moment.
    """
    from array import array  # here, because most images are raw

    starts, lengths, offsets = array("q"), array("q"), array("q")
    size = unknown = 0
    room = part.nameless(directory)
    try:
        for start, length, offset in image.extents(source.path, format, room, waiting, timeout):
            size = start + length
            if offset is None:
                unknown += length
            elif offset >= 0:
                starts.append(start)
                lengths.append(length)
                offsets.append(offset)
    except NotSupported:
        return None
    finally:
        os.close(room)
    disk = _Mapped(source.fd, size, starts, lengths, offsets)
    return None if disk.data <= unknown or disk.has_any_twice() else disk
