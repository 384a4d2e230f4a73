"""Unpacking gzip, bzip2, xz and zstd as the bytes come, in bounded pieces, to the last byte of the last member."""

from __future__ import annotations

import re
import sys

from madrigal.errors import BadImage, MissingProgram

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class _Member(Protocol):
        """One member, stream or frame being unpacked, as the classes of bz2 and lzma do it."""

        @property
        def eof(self) -> bool: ...
        @property
        def needs_input(self) -> bool: ...
        @property
        def unused_data(self) -> bytes: ...
        def decompress(self, data: bytes, max_length: int) -> bytes: ...


HEAD = 64
"""How many bytes of a file decompressor() wants to see, if there are so many."""

_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = rb"[\x50-\x5f]\x2a\x4d\x18"
# How a member begins, and how many bytes that takes.
_STARTS = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), 3),
    "bzip2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), 10),
    "xz": (re.compile(rb"\xfd7zXZ\0"), 6),
    "zstd": (re.compile(re.escape(_ZSTD) + rb"|" + _SKIPPABLE), 4),
}
# `xz -9` needs 65 MiB to unpack; zstd stops at 128 MiB by itself.
_XZ_MEMORY = 256 << 20


def kind(head: bytes) -> str | None:
    """gzip, bzip2, xz or zstd, as the first bytes of a file say; None for anything else."""
    while re.match(_SKIPPABLE, head) and len(head) > 8:  # pzstd begins with a frame that says only a size
        head = head[8 + int.from_bytes(head[4:8], "little") :]
        if head and not _STARTS["zstd"][0].match(head):
            return None
    return next((name for name, (start, _) in _STARTS.items() if start.match(head)), None)


def decompressor(head: bytes) -> Decompressor | None:
    """What unpacks a file that begins with HEAD (which is still to be fed to it); None if it is not packed.

    Raises MissingProgram.
    """
    name = kind(head)
    return Decompressor(name) if name else None


class Decompressor:
    """Unpacks what it is fed: as many members as follow each other, and the zeros that gzip and xz may end in."""

    def __init__(self, name: str) -> None:
        self.kind = name
        self._new, self._errors = _IMPLEMENTATIONS[name]()
        self._member: _Member | None = None
        self._rest = b""

    def feed(self, data: bytes, most: int) -> bytes:
        """Take DATA, give at most MOST unpacked bytes.

        Feed b"" until b"" comes, before more DATA.  Raises BadImage for what cannot be unpacked.
        """
        self._rest = self._rest + data if self._rest else data
        while self._begun():
            member = self._member
            assert member is not None
            try:
                unpacked = member.decompress(self._rest, most)
            except self._errors as error:
                raise BadImage(f"the {self.kind} data is damaged ({error})") from None
            self._rest = b""
            if member.eof:
                self._rest, self._member = member.unused_data, None
            if unpacked or (not member.eof and member.needs_input):
                return unpacked
        return b""

    def finish(self) -> None:
        """Say that nothing follows; raises BadImage if something should."""
        if self._member:
            raise BadImage(f"the {self.kind} data is cut off")
        if self._rest:
            raise BadImage(f"the {self.kind} data has something else after its end")

    def _begun(self) -> bool:
        """Whether there is a member to go on with."""
        if self._member:
            return True
        if self.kind in ("gzip", "xz"):
            self._rest = self._rest.lstrip(b"\0")  # tapes and some mirrors pad
        start, length = _STARTS[self.kind]
        if len(self._rest) < length:
            return False
        if not start.match(self._rest):
            raise BadImage(f"the {self.kind} data has something else after its end")
        self._member = self._new()
        return True


def _gzip() -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    import zlib

    return _GzipMember, (zlib.error,)


def _bzip2() -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    import bz2

    return bz2.BZ2Decompressor, (OSError, EOFError)


def _xz() -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    import lzma

    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY), (lzma.LZMAError, EOFError)


def _zstd() -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor, (zstd.ZstdError, EOFError)
    try:
        import zstandard
    except ImportError:
        raise MissingProgram("unpacking zstd needs python3-zstandard: install that package") from None
    return _ZstdFrame, (zstandard.ZstdError,)


_IMPLEMENTATIONS = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}


class _GzipMember:
    """zlib's object with the manners of bz2's."""

    def __init__(self) -> None:
        import zlib

        self._object = zlib.decompressobj(31)
        self.eof, self.needs_input, self.unused_data = False, True, b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        unpacked = self._object.decompress(self._object.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._object.eof, self._object.unused_data
        self.needs_input = not self._object.unconsumed_tail and len(unpacked) < max_length
        return unpacked


class _ZstdFrame:
    """One frame through python3-zstandard, whose object has no bound for what it gives at once.

    So it is fed block by block, of which each gives 128 KiB at most (RFC 8878, 3.1.1).
    """

    def __init__(self) -> None:
        import zstandard

        self._object = zstandard.ZstdDecompressor().decompressobj()
        self._input, self._output = bytearray(), b""
        self._inside = False  # the header has been seen
        self._checksum = 0  # bytes after the last block
        self._skip = 0  # bytes of a skippable frame that are still to come
        self._last = False  # the block just fed was the last one
        self._over = False
        self.eof, self.needs_input, self.unused_data = False, True, b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._input += data
        while not self._output and not self._over and (length := self._piece()) and length <= len(self._input):
            piece = bytes(self._input[:length])
            del self._input[:length]
            if self._skip:
                self._skip -= length
                self._over = not self._skip
            else:
                self._output = self._object.decompress(piece)
                self._over = self._inside and self._last
                self._inside = True
        unpacked, self._output = self._output[:max_length], self._output[max_length:]
        self.needs_input = not self._output
        if self._over and not self._output:
            self.eof, self.unused_data = True, bytes(self._input)
        return unpacked

    def _piece(self) -> int:
        """The length of the header or block that comes next; 0 if it does not say yet."""
        data = self._input
        if self._skip:
            return min(self._skip, len(data))
        if self._inside:
            if len(data) < 3:
                return 0
            header = int.from_bytes(data[:3], "little")
            self._last = bool(header & 1)
            size = 1 if header >> 1 & 3 == 1 else header >> 3  # a run-length block has one byte
            return 3 + size + (self._checksum if self._last else 0)
        if len(data) < 8:
            return 0
        if not data.startswith(_ZSTD):
            self._skip = 8 + int.from_bytes(data[4:8], "little")
            return min(self._skip, len(data))
        what = data[4]
        single = what >> 5 & 1
        self._checksum = 4 * (what >> 2 & 1)
        return 5 + (1 - single) + (0, 1, 2, 4)[what & 3] + (single, 2, 4, 8)[what >> 6]
