"""An image on its way into a datastore, read once: what it is shows while it passes."""

from __future__ import annotations

import json
import os
import stat

from madrigal import inspector
from madrigal.onhost import stream
from madrigal.onhost.images import HEAD, TAIL
from madrigal.source.pace import Paced, paced
from madrigal.source.stream import HEAD as FIRST
from madrigal.source.stream import is_packed, pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from madrigal.onhost.stream import Frame
    from madrigal.source.schemes import Source

_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


class Arrival:
    """What SOURCE gives, unpacked if DECOMPRESS; DIGESTS (of the bytes as fetched) are checked on the way.

    Nothing of it is kept but its beginning and its end, however large it is.
    """

    def __init__(self, source: Source, decompress: bool, digests: Mapping[str, str]) -> None:
        self._source, self._decompress, self._digests = source, decompress, digests
        self._head, self._tail = bytearray(), bytearray()
        self.size = 0
        self._seen = 0  # where the last data ended

    @property
    def is_plain(self) -> bool:
        """Whether it is a file of this machine that comes as it is: its holes need not be read."""
        fd = self._source.local_fd
        if fd is None or self._digests or not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        return not self._decompress or not is_packed(os.pread(fd, FIRST, 0))

    def frames(self, checked: bool) -> Iterator[Frame]:
        """The file as a stream (onhost/stream.py); raises, before its end, if it is not what it should be.

        CHECKED: so that damage on the way is seen, which takes as long as to compute a digest.
        """
        if self.is_plain:
            assert self._source.local_fd is not None
            yield from self._of_file(self._source.local_fd)
            return
        about = {"path": "", "type": "file", "size": None, "mode": 0o600, "allocated": 0, "owner": [0, 0]}
        verify = "crc32" if checked else "none"
        yield b"O", 0, json.dumps(dict(about, verify=verify)).encode()
        checks, end = stream.Checks(verify), 0
        for piece in pieces(self._source, decompress=self._decompress, digests=self._digests):
            for start, data in _not_zero(piece):
                checks.add(end + start, data)
                self._see(end + start, data)
                yield b"D", end + start, data
            if checks.are_many:
                yield b"V", 0, checks.take()
            end += len(piece)
        self.size = end
        yield b"C", end, checks.take()

    def _of_file(self, fd: int) -> Iterator[Frame]:
        rate = self._source.rate if isinstance(self._source, Paced) else None
        allocated = os.fstat(fd).st_blocks * 512
        about = {"path": "", "type": "file", "mode": 0o600, "allocated": allocated, "owner": [0, 0]}
        frames = stream.give_open(fd, about)
        for kind, offset, payload in paced(frames, rate) if rate else frames:
            if kind == b"D":
                self._see(offset, payload)
            yield kind, offset, payload
        self.size = os.fstat(fd).st_size

    def found(self) -> inspector.Found:
        """What it was, when all of it has passed; raises BadImage for what a VM must not have as a disk."""
        head = bytes(self._head).ljust(min(HEAD, self.size), b"\0")
        gap = self.size - self._seen
        return inspector.check_ends(head, (bytes(self._tail) + bytes(min(gap, TAIL)))[-TAIL:], self.size)

    def _see(self, offset: int, data: bytes | memoryview) -> None:
        if offset < HEAD:
            self._head += bytes(offset - len(self._head))
            self._head += data[: HEAD - offset]
        self._tail += bytes(min(offset - self._seen, TAIL))
        self._tail += data[-TAIL:]
        del self._tail[:-TAIL]
        self._seen = offset + len(data)


def _not_zero(piece: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the runs of blocks in PIECE that are not all zeros."""
    begun = -1
    for start in range(0, len(piece), _BLOCK):
        block = piece[start : start + _BLOCK]
        if block == _ZEROS[: len(block)]:
            if begun >= 0:
                yield begun, piece[begun:start]
            begun = -1
        elif begun < 0:
            begun = start
    if begun >= 0:
        yield begun, piece[begun:] if begun else piece
