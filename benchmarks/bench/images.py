"""Images to move, and whether what arrived is what was sent."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

MIB = 1 << 20
KIB = 1 << 10


def dense(path: str, size: int) -> None:
    """SIZE bytes that no codec makes smaller."""
    with open(path, "wb") as file:
        left = size
        while left:
            left -= file.write(os.urandom(min(left, MIB)))


def sparse(path: str, size: int, data: int, smallest: int, largest: int, zeros: bool = False) -> None:
    """An image of SIZE bytes with DATA bytes in extents of SMALLEST to LARGEST bytes, spread evenly.

    ZEROS: what is between them has been written too, and is no hole.
    """
    choice = random.Random(7)
    lengths: list[int] = []
    while (left := data - sum(lengths)) > 0:
        lengths.append(min(left, choice.randrange(smallest, largest + 1, 64 * KIB)))
    gap = (size - data) // len(lengths) // (64 * KIB) * 64 * KIB
    with open(path, "wb") as file:
        file.truncate(size)
        if zeros:
            while file.tell() < size:
                file.write(bytes(MIB))
        offset = 0
        for length in lengths:
            offset += gap
            file.seek(offset)
            file.write(os.urandom(length))
            offset += length


def change(path: str, share: float, block: int) -> None:
    """Write other bytes to SHARE of the blocks of BLOCK bytes, at random."""
    count = os.path.getsize(path) // block
    with open(path, "r+b") as file:
        for number in random.Random(os.urandom(8)).sample(range(count), round(count * share)):
            file.seek(number * block)
            file.write(os.urandom(block))


def load(path: str) -> None:
    """Read all of PATH, so that it is in memory."""
    with open(path, "rb") as file:
        while file.read(MIB):
            pass


def touch(directory: str, size: int) -> None:
    """Take SIZE bytes of memory, by a file in DIRECTORY, and give them back.

    What is free in a virtual machine may have gone back to its host, and who takes it next would pay for that.
    """
    path = f"{directory}/.touched"
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    os.unlink(path)


def allocated(path: str) -> int:
    """Bytes that a file takes."""
    return os.stat(path).st_blocks * 512


def check_same(path: str, other: str) -> None:
    """Raises ValueError if the two files do not have the same content."""
    with open(path, "rb") as one, open(other, "rb") as two:
        size = os.fstat(one.fileno()).st_size
        if os.fstat(two.fileno()).st_size != size:
            raise ValueError(f"{other} has another size than {path}")
        for fd in (one.fileno(), two.fileno()):
            for offset, end in _data(fd, size):
                while offset < end:
                    length = min(4 * MIB, end - offset)
                    if os.pread(one.fileno(), length, offset) != os.pread(two.fileno(), length, offset):
                        raise ValueError(f"{other} is not what {path} is, at {offset}")
                    offset += length
            if one.fileno() == fd and allocated(path) >= size:
                break  # all has been compared


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, end) of what is allocated."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        yield offset, end
        offset = end
