"""Unpacking gzip, bzip2, xz, zstd and lz4 as the bytes come, in bounded pieces, to the last byte of the last member."""

from __future__ import annotations

import re

from madrigal.errors import BadImage

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

_SKIPPABLE = rb"[\x50-\x5f]\x2a\x4d\x18"
# How a member begins, and how many bytes that takes.
_STARTS = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), 3),
    "bzip2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), 10),
    "xz": (re.compile(rb"\xfd7zXZ\0"), 6),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd|" + _SKIPPABLE), 4),
    "lz4": (re.compile(rb"\x04\x22\x4d\x18|" + _SKIPPABLE), 4),
}
# `xz -9` needs 65 MiB to unpack; zstd stops at 128 MiB by itself.
_XZ_MEMORY = 256 << 20


def kind(head: bytes) -> str | None:
    """gzip, bzip2, xz, zstd or lz4, as the first bytes of a file say; None for anything else."""
    while re.match(_SKIPPABLE, head) and len(head) > 8:  # pzstd begins with a frame that says only a size
        head = head[8 + int.from_bytes(head[4:8], "little") :]
        if head and not any(_STARTS[name][0].match(head) for name in ("zstd", "lz4")):
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
    from madrigal.source import clib

    return clib.zstd()


def _lz4() -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    from madrigal.source import clib

    return clib.lz4()


_IMPLEMENTATIONS = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd, "lz4": _lz4}


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
