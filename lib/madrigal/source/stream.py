"""One pass over a source: every byte is read once, digested as it was fetched, unpacked, and handed on."""

from __future__ import annotations

import re

from madrigal.errors import BadImage, DigestMismatch, UsageError
from madrigal.source import archive, codec

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from madrigal.source.schemes import Source

PIECE = 1 << 20
"""The most bytes that are read, and that are handed on, at once."""

# A file may be made of tens of thousands of empty members, and each leaves what follows it to be copied.
_FED = 64 << 10

_LARGE = 8 << 20  # bytes for which it is worth to start a thread
_SLOW = ("gzip", "bzip2", "xz")  # the others unpack 1 GB/s, and a thread costs them a third of that

_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}


HEAD = max(codec.HEAD, archive.HEAD)
"""How many bytes of a file is_packed() wants to see, if there are so many."""


def is_packed(head: bytes) -> bool:
    """Whether a file that begins with HEAD is packed, or an archive."""
    return codec.kind(head) is not None or archive.kind(head) is not None


class Unpacked:
    """The bytes of SOURCE in pieces, if DECOMPRESS unpacked and taken out of an archive of one file.

    `packed`: whether they are.  SEEN is called with the bytes as they are fetched.
    """

    def __init__(self, source: Source, decompress: bool, seen: Callable[[bytes], object]) -> None:
        self._source, self._decompress, self._seen = source, decompress, seen
        self._head = b""
        while decompress and len(self._head) < HEAD and (piece := self._fetched()):
            self._head += piece
        self._decompressor = codec.decompressor(self._head)
        self.packed = is_packed(self._head)
        self.kind = self._decompressor.kind if self._decompressor else ""
        """gzip, bzip2, xz, zstd, lz4 or "", as it was fetched."""
        self.archive: str | None = None
        """tar or zip, when that has been seen: by then the first piece has been asked for."""

    def __iter__(self) -> Iterator[bytes]:
        pieces = self._unpacked()
        if not self._decompress:
            return pieces
        head = b""
        while len(head) < archive.HEAD and (piece := next(pieces, b"")):
            head += piece
        rest = _chain(head, pieces)
        self.archive = archive.kind(head)
        return archive.extracted(self.archive, rest) if self.archive else rest

    def _unpacked(self) -> Iterator[bytes]:
        data = self._head or self._fetched()
        if self._decompressor:
            is_work = self.kind in _SLOW and (self._source.size is None or self._source.size >= _LARGE)
            yield from (self._beside if is_work else self._inline)(self._decompressor, data)
            self._decompressor.finish()
            return
        while data:
            yield data
            data = self._fetched()

    def _inline(self, decompressor: codec.Decompressor, data: bytes) -> Iterator[bytes]:
        while data:
            for fed in _fed(data):
                while unpacked := decompressor.feed(fed, PIECE):
                    yield unpacked
                    fed = b""
            data = self._fetched()

    def _beside(self, decompressor: codec.Decompressor, data: bytes) -> Iterator[bytes]:
        """The same, unpacking while what comes is read and digested, and what was unpacked is used."""
        from madrigal.source.beside import Beside

        portions = _Portions(decompressor)
        unpacking, is_hungry = Beside(portions.next), True
        try:
            unpacking.begin(data)
            is_over = False
            while True:
                data = self._fetched() if is_hungry and not is_over else b""
                is_over = is_over or (is_hungry and not data)
                unpacked = unpacking.result()
                if not unpacked and is_over and not data:
                    return
                is_hungry = portions.are_few
                unpacking.begin(data)
                if unpacked:
                    yield unpacked
        finally:
            unpacking.close()

    def _fetched(self) -> bytes:
        data = self._source.read(PIECE)
        self._seen(data)
        return data


def _fed(data: bytes) -> list[bytes]:
    return [data[start : start + _FED] for start in range(0, len(data), _FED)]


class _Portions:
    """What DECOMPRESSOR makes, in portions: each call in another thread has its price.

    On a machine with more to do than it can, portions of 64 KiB come in half the time that those of 1 MiB take.
    """

    def __init__(self, decompressor: codec.Decompressor) -> None:
        self._feed = decompressor.feed
        self._waiting: list[bytes] = []

    @property
    def are_few(self) -> bool:
        """Whether more should come: not while next() is at work."""
        return len(self._waiting) < PIECE // _FED

    def next(self, data: bytes) -> bytes:
        """Take DATA, give some unpacked bytes; b"" when there are no more of what was taken."""
        self._waiting += _fed(data)
        made, length, fed = [], 0, b""
        while length < _FED:
            if unpacked := self._feed(fed, PIECE):
                made.append(unpacked)
                length += len(unpacked)
                fed = b""
            elif self._waiting:
                fed = self._waiting.pop(0)
            else:
                break
        return made[0] if len(made) == 1 else b"".join(made)


def _chain(head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from pieces


def check_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """DIGESTS (attribute name to hexadecimal value) that are not empty, by algorithm and in lower case.

    The names are MD5, SHA1 and SHA256 in any case.  Raises UsageError for another name and for a value that
    cannot be its digest.
    """
    wanted = {}
    for name, value in digests.items():
        digits = _DIGITS.get(name.lower())
        if not digits:
            raise UsageError(f"{name} is not a digest that can be checked: give MD5, SHA1 or SHA256")
        value = value.strip().lower()
        if value and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise UsageError(f"{name.upper()} is '{value[:80]}', not {digits} hexadecimal digits")
        if value:
            wanted[name.lower()] = value
    return wanted


def fetch(
    source: Source, sink: Callable[[bytes], object], *, decompress: bool, digests: Mapping[str, str], limit: int | None
) -> int:
    """Hand all of SOURCE to SINK in pieces; return the bytes handed on.

    LIMIT: the most bytes SINK takes, or BadImage is raised; the rest as pieces(), and what the sink raises.
    """
    written = 0
    for piece in pieces(source, decompress=decompress, digests=digests):
        written += len(piece)
        if limit is not None and written > limit:
            raise BadImage(f"{source.name} gives more than the {limit} bytes it may have")
        sink(piece)
    return written


def pieces(source: Source, *, decompress: bool, digests: Mapping[str, str]) -> Iterator[bytes]:
    """All of SOURCE.  DECOMPRESS: unpack what is packed.  DIGESTS: of the bytes as fetched, as for check_digests().

    Raises DigestMismatch at the end, BadImage for damaged or cut off data, and what the source raises; what was
    given before that is worth nothing.
    """
    wanted = check_digests(digests)
    sums = {}
    if wanted:
        import hashlib

        sums = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}

    def seen(data: bytes) -> None:
        for digest in sums.values():
            digest.update(data)

    yield from Unpacked(source, decompress, seen)
    for name, digest in sums.items():
        if digest.hexdigest() != wanted[name]:
            raise DigestMismatch(
                f"{source.name} has the {name.upper()} {digest.hexdigest()}, not the expected {wanted[name]}"
            )
