"""The one file in a tar or zip archive, as it comes: nothing is laid out anywhere, and no name in it becomes a path."""

from __future__ import annotations

from madrigal.errors import BadImage

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = 512
"""How many bytes of a file kind() wants to see."""

_ENTRIES, _NAMES = 1000, 1 << 20
"""How many entries an archive may have, and how many bytes all that stands between them may take."""

_ZIP = b"PK\x03\x04"
_BLOCK = 512


def kind(head: bytes) -> str | None:
    """tar or zip, as the first bytes of a file say; None for anything else."""
    if head.startswith(_ZIP):
        return "zip"
    return "tar" if len(head) >= _BLOCK and head[257:262] == b"ustar" and _sum_is_right(head[:_BLOCK]) else None


def extracted(archive: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The one file in the ARCHIVE (tar or zip) that PIECES are.

    Raises BadImage for one that is damaged, or has another number of files, links, devices, or names that lead out.
    """
    yield from _TAR_OR_ZIP[archive](_Bytes(archive, pieces))
    for _ in pieces:  # what follows the end of a tar is padding; a digest counts it
        pass


class _Bytes:
    """PIECES of an archive as bytes to be taken in any portions."""

    def __init__(self, archive: str, pieces: Iterator[bytes]) -> None:
        self._archive, self._pieces, self._rest = archive, pieces, b""
        self._entries = self._between = 0

    def upto(self, most: int) -> bytes:
        """Some bytes, at most MOST; b"" at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        if most >= len(self._rest):
            data, self._rest = self._rest, b""
        else:
            data, self._rest = self._rest[:most], self._rest[most:]
        return data

    def all(self, length: int) -> Iterator[bytes]:
        """LENGTH bytes in pieces."""
        while length:
            data = self.upto(min(length, 1 << 20))
            if not data:
                raise self.wrong("is cut off")
            length -= len(data)
            yield data

    def header(self, length: int) -> bytes:
        """LENGTH bytes of what stands between files."""
        self._between += length
        if self._between > _NAMES:
            raise self.wrong(f"has more than {_NAMES >> 20} MiB of names and the like")
        return b"".join(self.all(length))

    def back(self, data: bytes) -> None:
        self._rest = data + self._rest

    def entry(self, name: str, is_plain: bool) -> None:
        """Count an entry, and refuse one that is no file or directory, or whose NAME leads out of where it lies."""
        self._entries += 1
        if self._entries > _ENTRIES:
            raise self.wrong(f"has more than {_ENTRIES} entries")
        said = f"'{_fit(name)}'"
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise self.wrong(f"has the name {said}, which leads out of it")
        if not is_plain:
            raise self.wrong(f"has {said}, which is a link, a device or in pieces")

    def wrong(self, text: str) -> BadImage:
        return BadImage(f"the {self._archive} archive {text}: give the image itself")

    def more_than_one(self, first: str, second: str) -> BadImage:
        return self.wrong(f"has more than one file ('{_fit(first)}' and '{_fit(second)}')")


def _fit(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:100])


# -- tar: blocks of 512 bytes -------------------------------------------------------------------------------------


def _tar(source: _Bytes) -> Iterator[bytes]:
    found, name, size = "", "", -1
    while True:
        head = source.header(_BLOCK)
        if head == bytes(_BLOCK):
            break
        if not _sum_is_right(head):
            raise source.wrong("is damaged")
        type, length = head[156:157], _number(source, head[124:136])
        if type in b"xgLK":
            more = source.header(length + -length % _BLOCK)[:length]
            if type == b"L":
                name = more.rstrip(b"\0").decode("utf-8", "replace")
            elif type == b"x":
                name, size = _pax(source, more, name, size)
            continue
        name = name or "/".join(filter(None, (_text(head[345:500]), _text(head[:100]))))
        length = size if size >= 0 else length
        source.entry(name, is_plain=type in (b"0", b"\0", b"7", b"5"))
        if type != b"5" and not name.endswith("/"):
            if found:
                raise source.more_than_one(found, name)
            found = name
            yield from source.all(length)
            for _ in source.all(-length % _BLOCK):
                pass
        name, size = "", -1
    if not found:
        raise source.wrong("has no file")


def _pax(source: _Bytes, records: bytes, name: str, size: int) -> tuple[str, int]:
    """The NAME and SIZE that a header with RECORDS (`LENGTH KEY=VALUE\\n`) gives what follows."""
    while records:
        digits = records.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        if not len(digits) + 3 <= length <= len(records):
            raise source.wrong("is damaged")
        key, _, value = records[len(digits) + 1 : length - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise source.wrong("was made with holes (tar --sparse)")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise source.wrong("is damaged")
            size = int(value)
        records = records[length:]
    return name, size


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _number(source: _Bytes, field: bytes) -> int:
    if field[0] & 0x80:  # more than 8 GiB: GNU tar writes it in binary
        number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        digits = field.strip(b" \0")
        if digits.strip(b"01234567"):
            raise source.wrong("is damaged")
        number = int(digits or b"0", 8)
    if number >= 1 << 63:
        raise source.wrong("is damaged")
    return number


def _sum_is_right(head: bytes) -> bool:
    digits = head[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return False
    return int(digits, 8) == sum(head[:148]) + 8 * 0x20 + sum(head[156:])


# -- zip: local headers, each followed by its data; the directory at the end repeats them -------------------------


def _zip(source: _Bytes) -> Iterator[bytes]:
    found = ""
    while (signature := source.header(4)) == _ZIP:
        head = source.header(26)
        flags, method = _le(head, 2, 2), _le(head, 4, 2)
        name = source.header(_le(head, 22, 2)).decode("utf-8", "replace")
        extra = source.header(_le(head, 24, 2))
        packed, size = _le(head, 14, 4), _le(head, 18, 4)
        source.entry(name, is_plain=True)
        wide = _zip64(extra)
        if 0xFFFFFFFF in (packed, size):
            if not wide:
                raise source.wrong("is damaged")
            size, packed = wide
        if flags & 0x1:
            raise source.wrong("is encrypted")
        if method not in (0, 8) or (method == 0 and flags & 0x8 and not name.endswith("/")):
            raise source.wrong("is packed in a way that is not known")
        if not name.endswith("/"):
            if found:
                raise source.more_than_one(found, name)
            found = name
            yield from _zip_file(source, method, packed, size, _le(head, 10, 4), bool(flags & 0x8), bool(wide))
        else:
            for _ in source.all(packed):
                pass
    if signature not in (b"PK\x01\x02", b"PK\x05\x06"):
        raise source.wrong("is damaged")
    if not found:
        raise source.wrong("has no file")
    while source.upto(1 << 20):
        pass


def _zip_file(
    source: _Bytes, method: int, packed: int, size: int, crc: int, described: bool, wide: bool
) -> Iterator[bytes]:
    import zlib

    made = sum = 0
    pieces = source.all(packed) if method == 0 else _inflated(source)
    for piece in pieces:
        made, sum = made + len(piece), zlib.crc32(piece, sum)
        yield piece
    if described:  # sizes stand behind the data then, with or without a signature
        first = source.header(4)
        crc = _le(source.header(4) if first == b"PK\x07\x08" else first, 0, 4)
        length = 8 if wide else 4
        size = _le(source.header(2 * length), length, length)
    if (crc, size) != (sum, made):
        raise source.wrong("is damaged")


def _inflated(source: _Bytes) -> Iterator[bytes]:
    import zlib

    member = zlib.decompressobj(-15)
    while not member.eof:
        data = member.unconsumed_tail or source.upto(64 << 10)
        if not data:
            raise source.wrong("is cut off")
        try:
            piece = member.decompress(data, 1 << 20)
        except zlib.error as error:
            raise source.wrong(f"is damaged ({error})") from None
        if piece:
            yield piece
    source.back(member.unused_data)


def _zip64(extra: bytes) -> tuple[int, int] | None:
    """The size and the packed size in the EXTRA field of what may need more than 32 bits for them."""
    while len(extra) >= 4:
        length = _le(extra, 2, 2)
        if _le(extra, 0, 2) == 1 and length >= 16:
            return _le(extra, 4, 8), _le(extra, 12, 8)
        extra = extra[4 + length :]
    return None


def _le(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "little")


_TAR_OR_ZIP = {"tar": _tar, "zip": _zip}
