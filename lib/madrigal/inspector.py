"""What an image file is, from its own bytes: format, virtual size, and whether it names another file.

qemu-img is not asked: it opens whatever a header names, and what it guesses a guest may have written.  Only
headers are read, in bounded pieces; a length in a header is a claim (docs/contract.md, "What may be imported").
"""

from __future__ import annotations

import os

from madrigal.errors import BadImage

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable

# Formats that are their own disk: what a VM sees is what the file holds.
_AS_RAW = ("raw", "iso", "luks")
_IMPORTED = (*_AS_RAW, "qcow2", "vmdk", "vdi", "vpc", "vhdx")

_MAGIC = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "cowd",
    b"conectix": "vpc",
    b"vhdxfile": "vhdx",
    b"LUKS\xba\xbe": "luks",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
}
_VDI_MAGIC = b"\x7f\x10\xda\xbe"
_MAY_BE_PARTITIONED = ("iso", "luks")  # a hybrid; salt is as it comes
_VOLUME_DESCRIPTORS = (b"CD001", b"BEA01", b"NSR02", b"NSR03")  # ISO 9660 and UDF

# qcow2: dirty, corrupt, external data file, compression type, extended L2 entries
_CORRUPT, _DATA_FILE, _KNOWN_FEATURES = 0x2, 0x4, 0x1F
_MAX_EXTENSIONS = 256

_VHDX_METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
_VHDX_SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
_VHDX_PARENT = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")


class Found:
    """What an image is.  `format`: raw (nothing known), iso, luks, qcow2, qcow1, qed, vmdk, cowd, vdi, vpc, vhdx or
    parallels.  `virtual_size`: bytes a VM would see.  `refers_to`: "backing file '/x'" if it names another file.
    """

    __slots__ = ("format", "refers_to", "virtual_size")

    def __init__(self, format: str, virtual_size: int, refers_to: str | None = None) -> None:
        self.format = format
        self.virtual_size = virtual_size
        self.refers_to = refers_to

    @property
    def driver(self) -> str:
        """The format as qemu and a front-end call it: an ISO and a LUKS container are raw to both."""
        return "raw" if self.format in _AS_RAW else self.format

    def __repr__(self) -> str:
        return f"Found({self.format!r}, {self.virtual_size}, {self.refers_to!r})"


class _Short(Exception):
    """More of the file is needed than is there yet."""


class _File:
    """An image as bytes to be read anywhere; reading past its end gives less."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        here = os.lseek(fd, 0, os.SEEK_CUR)
        self.size = os.lseek(fd, 0, os.SEEK_END)  # of a block device too, which st_size is not
        os.lseek(fd, here, os.SEEK_SET)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset) if offset < self.size else b""

    def end(self, length: int) -> bytes:
        return self.read(max(0, self.size - length), length)


class _Head(_File):
    """The beginning of an image whose rest has not been read, or all of one."""

    def __init__(self, head: bytes, whole: bool) -> None:
        self._head = head
        self._whole = whole
        self.size = len(head)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self._head) and not self._whole:
            raise _Short
        return self._head[offset : offset + length]

    def end(self, length: int) -> bytes:
        # What stands at the end can only repeat the header; check_import(), which has all of the file, sees to that.
        return super().end(length) if self._whole else b""


class _Ends(_File):
    """An image of SIZE bytes of which only the beginning and the end are at hand."""

    def __init__(self, head: bytes, tail: bytes, size: int) -> None:
        self._head, self._tail = head, tail
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if end <= offset or end <= len(self._head):
            return self._head[offset:end]
        start = self.size - len(self._tail)
        if offset < start:
            raise BadImage("the image has a header far behind its beginning, where it is not looked for")
        return self._tail[offset - start : end - start]


def inspect(fd: int) -> Found:
    """What the open file FD is.  Its offset is left as it is.

    Raises BadImage for a damaged header of a known format, a qcow2 feature this version does not know, and
    for a file that is two formats at once, of which two programs could see a different one each.
    """
    return _inspect(_File(fd))


def inspect_head(head: bytes, whole: bool) -> Found | None:
    """The same from the first bytes of a file, or all of them if WHOLE; None if they are too few to tell.

    The virtual size of what is as raw is then the length of HEAD.
    """
    try:
        return _inspect(_Head(head, whole))
    except _Short:
        return None


def check_import(fd: int) -> Found:
    """What the open file FD is, if a datastore may take it; raises BadImage if not."""
    return accept(inspect(fd))


def check_ends(head: bytes, tail: bytes, size: int) -> Found:
    """The same from the beginning and the end of a file of SIZE bytes, which the rest has passed between."""
    return accept(_inspect(_Ends(head, tail, size)))


def accept(found: Found) -> Found:
    """FOUND, unless it refers to another file or is of a format that is not imported: BadImage."""
    if found.refers_to:
        raise BadImage(
            f"the {found.format} image refers to another file ({found.refers_to}), so it is not imported: "
            "convert it to an image that stands alone first (qemu-img convert -O qcow2)"
        )
    if found.format not in _IMPORTED:
        raise BadImage(
            f"images of the format {found.format} are not imported: convert it first (qemu-img convert -O qcow2)"
        )
    return found


def _inspect(file: _File) -> Found:
    head = file.read(0, 1024)
    formats = [name for magic, name in _MAGIC.items() if head.startswith(magic)]
    if head[0x40:0x44] == _VDI_MAGIC:
        formats.append("vdi")
    if _is_descriptor(head):
        formats.append("vmdk descriptor")
    if file.read(0x8001, 5) in _VOLUME_DESCRIPTORS:
        formats.append("iso")
    if formats and formats[0] not in _MAY_BE_PARTITIONED and _is_partitioned(head):
        formats.append("a disk with partitions")
    if len(formats) > 1:
        raise BadImage(f"the image is {' and '.join(formats)} at once: it is not what it seems to be")
    if not formats:
        return Found("raw", file.size)
    found = _READERS.get(formats[0], _plain(formats[0]))(file)
    if found.virtual_size >= 1 << 63:
        raise BadImage(f"the {found.format} image claims a size of {found.virtual_size} bytes: its header is damaged")
    return found


def _is_partitioned(head: bytes) -> bool:
    """Whether a file that begins with HEAD is a disk with a partition table to whoever reads it as raw."""
    entries = [head[start : start + 16] for start in range(446, 510, 16)]
    is_mbr = head[510:512] == b"\x55\xaa" and any(
        entry[:1] in (b"\0", b"\x80") and entry[4:5] > b"\0" for entry in entries
    )
    return is_mbr or head[512:520] == b"EFI PART"


def _plain(format: str) -> Callable[[_File], Found]:
    return lambda file: Found(format, file.size)


def _take(file: _File, format: str, offset: int, length: int) -> bytes:
    """LENGTH bytes of a header, all of them."""
    data = file.read(offset, length)
    if len(data) < length:
        raise BadImage(f"the {format} image is cut off inside its header")
    return data


def _be(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "big")


def _le(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "little")


def _name(data: bytes) -> str:
    """A file name out of a header, fit for a message."""
    text = data[:100].split(b"\0")[0].decode("utf-8", "replace")
    return "'" + "".join(c if c.isprintable() else "?" for c in text) + "'"


def _qcow2(file: _File) -> Found:
    header = _take(file, "qcow2", 0, 48)
    version = _be(header, 4, 4)
    backing, backing_length = _be(header, 8, 8), _be(header, 16, 4)
    if version == 1:
        refers = f"backing file {_name(file.read(backing, min(backing_length, 1023)))}" if backing else None
        return Found("qcow1", _be(header, 24, 8), refers)
    if version not in (2, 3):
        raise BadImage(f"the qcow2 image is of version {version}, which is not known")
    cluster_bits, size = _be(header, 20, 4), _be(header, 24, 8)
    if not 9 <= cluster_bits <= 21:
        raise BadImage(f"the qcow2 image has clusters of 2^{cluster_bits} bytes: its header is damaged")
    cluster, features, length = 1 << cluster_bits, 0, 72
    if version == 3:
        header = _take(file, "qcow2", 0, 104)
        features, length = _be(header, 72, 8), _be(header, 100, 4)
        if features & ~_KNOWN_FEATURES:
            raise BadImage(f"the qcow2 image uses features that are not known (bits {features & ~_KNOWN_FEATURES:#x})")
        if not 104 <= length <= cluster:
            raise BadImage(f"the qcow2 image has a header of {length} bytes: it is damaged")
        if features & _CORRUPT:
            raise BadImage("the qcow2 image is marked as corrupt: repair it first (qemu-img check -r all)")
    if backing:
        if backing_length > 1023 or backing + backing_length > cluster:
            raise BadImage("the qcow2 image names a backing file that lies outside its header: it is damaged")
        return Found("qcow2", size, f"backing file {_name(file.read(backing, backing_length))}")
    data_file = _qcow2_data_file(file, length, cluster)
    if data_file is None and features & _DATA_FILE:
        data_file = "''"
    return Found("qcow2", size, data_file and f"data file {data_file}")


def _qcow2_data_file(file: _File, offset: int, end: int) -> str | None:
    """The name in the header extension for an external data file, None without one."""
    for _ in range(_MAX_EXTENSIONS):
        if offset + 8 > end or offset >= file.size:
            return None
        extension = _take(file, "qcow2", offset, 8)
        kind, length = extension[:4], _be(extension, 4, 4)
        if kind == b"\0\0\0\0":
            return None
        if length > end - offset - 8:
            raise BadImage("the qcow2 image has a header extension longer than its header: it is damaged")
        if kind == b"DATA":
            return _name(file.read(offset + 8, min(length, 1023)))
        offset += 8 + (length + 7 & ~7)
    raise BadImage(f"the qcow2 image has more than {_MAX_EXTENSIONS} header extensions: it is damaged")


def _qed(file: _File) -> Found:
    header = _take(file, "qed", 0, 64)
    backing = _name(file.read(_le(header, 56, 4), min(_le(header, 60, 4), 1023))) if header[16] & 1 else None
    return Found("qed", _le(header, 48, 8), backing and f"backing file {backing}")


def _is_descriptor(head: bytes) -> bool:
    """Whether a file that begins with HEAD is the text file that names the parts of a VMDK image."""
    lower = head.lower()
    if b"createtype" not in lower:
        return False
    lines = [line.strip() for line in lower.split(b"\n") if line.strip()]
    says = next((line for line in lines if not line.startswith(b"#")), b"")
    return lines[0] == b"# disk descriptorfile" or says in (b"version=1", b"version=2", b"version=3")


def _descriptor(file: _File) -> Found:
    text = file.read(0, min(file.size, 64 << 10))
    sectors, names, _ = _extents(text)
    return Found("vmdk", sectors * 512, f"extent {names[0]}" if names else "the files its descriptor lists")


def _quoted(line: bytes) -> str:
    """The name that stands in quotation marks in LINE, else what there is."""
    return _name(line.partition(b'"')[2].partition(b'"')[0] or line.partition(b"\n")[0])


def _extents(text: bytes) -> tuple[int, list[str], set[bytes]]:
    """The sectors, the names and the kinds of the files that a VMDK descriptor puts together."""
    sectors, names, kinds = 0, [], set()
    for line in text.split(b"\n"):
        words = line.split(None, 3)
        if len(words) > 2 and words[0].upper() in (b"RW", b"RDONLY", b"NOACCESS"):
            sectors += int(words[1][:18]) if words[1].isdigit() else 0
            names.append(_quoted(line))
            kinds.add(words[2].upper())
    return sectors, names, kinds


def _vmdk(file: _File) -> Found:
    header = _take(file, "vmdk", 0, 72)
    version, capacity = _le(header, 4, 4), _le(header, 12, 8)
    if not 1 <= version <= 3:
        raise BadImage(f"the vmdk image is of version {version}, which is not known")
    # Wherever the header says its descriptor is: qemu looks for a parent in the second sector.
    if _le(header, 28, 8) != 1:
        raise BadImage("the vmdk image has no descriptor of its own: it is a part of a disk, or damaged")
    text = file.read(512, min(max(_le(header, 36, 8) * 512, 20 * 512), (1 << 20) - 1))
    lower = text.lower()
    parent = lower.partition(b"parentcid=")[2][:8]
    if b"parentfilenamehint" in lower or parent.strip() not in (b"", b"ffffffff"):
        return Found("vmdk", capacity * 512, f"parent {_quoted(text[lower.find(b'parentfilenamehint') :])}")
    kind = lower.partition(b"createtype")[2].partition(b"\n")[0].strip(b' \t\r="')
    if not kind:
        raise BadImage("the vmdk image has an empty descriptor: it is a part of a disk, or damaged")
    _, names, kinds = _extents(text.partition(b"\0")[0])
    # the one extent there may be is this file
    is_alone = len(names) <= 1 and "/" not in "".join(names) and kinds <= {b"SPARSE"}
    if kind not in (b"monolithicsparse", b"streamoptimized") or not is_alone:
        return Found("vmdk", capacity * 512, f"extent {names[0]}" if names else f"create type {_name(kind)}")
    if not capacity:  # then qemu follows the descriptor
        raise BadImage("the vmdk image has no size: its header is damaged")
    if _le(header, 56, 8) == (1 << 64) - 1:
        _vmdk_footer(file, header)
    return Found("vmdk", capacity * 512)


def _vmdk_footer(file: _File, header: bytes) -> None:
    """A streamed image has its header again at its end, where qemu believes it: it must say the same."""
    tail = file.end(1536)
    again = tail[512:1024]
    if tail and (again[:8] != header[:8] or again[12:44] != header[12:44] or _le(tail, 12, 4) != 3):
        raise BadImage("the vmdk image ends in a header other than it begins with: it is cut off or damaged")


def _vdi(file: _File) -> Found:
    header = _take(file, "vdi", 0, 512)
    parent = _le(header, 0x4C, 4) == 4 or any(header[0x1A8:0x1C8])
    return Found("vdi", _le(header, 0x170, 8), "the image it is a difference to" if parent else None)


def _vpc(file: _File) -> Found:
    footer = _take(file, "vpc", 0, 512)
    kind, where, size = _be(footer, 60, 4), _be(footer, 16, 8), _be(footer, 48, 8)
    if kind not in (3, 4):
        raise BadImage(f"the vpc image is of type {kind}, which its beginning cannot say: its header is damaged")
    cylinders, heads, sectors = _be(footer, 56, 2), footer[58], footer[59]
    # Virtual PC and qemu mean the geometry unless it is the largest one, everybody else the size.
    if footer[28:32] in (b"vpc ", b"qemu") and (cylinders, heads, sectors) != (65535, 16, 255):
        size = cylinders * heads * sectors * 512
    header = _take(file, "vpc", where, 1024)
    if not header.startswith(b"cxsparse"):
        raise BadImage("the vpc image has no second header: it is damaged")
    name = header[64:576].decode("utf-16-be", "replace").encode()
    parent = kind == 4 or any(header[40:56])
    return Found("vpc", size, f"parent {_name(name)}" if parent else None)


def _vhdx(file: _File) -> Found:
    metadata = _vhdx_entry(file, 192 << 10, b"regi", 8, 16, _VHDX_METADATA, 8)
    if metadata is None:
        raise BadImage("the vhdx image has no metadata region: it is damaged")
    values = {}
    for item, length in ((_VHDX_SIZE, 8), (_VHDX_PARAMETERS, 8), (_VHDX_PARENT, 0)):
        offset = _vhdx_entry(file, metadata, b"metadata", 10, 32, item, 4)
        values[item] = None if offset is None else _take(file, "vhdx", metadata + offset, length)
    size, parameters = values[_VHDX_SIZE], values[_VHDX_PARAMETERS]
    if size is None or parameters is None:
        raise BadImage("the vhdx image says no size: it is damaged")
    parent = values[_VHDX_PARENT] is not None or parameters[4] & 2
    return Found("vhdx", _le(size, 0, 8), "the image it is a difference to" if parent else None)


def _vhdx_entry(
    file: _File, table: int, magic: bytes, count_at: int, first: int, item: bytes, offset_length: int
) -> int | None:
    """The offset that the table of 32-byte entries at TABLE has for ITEM; None if it does not list it."""
    header = _take(file, "vhdx", table, first)
    count = _le(header, count_at, 4 if magic == b"regi" else 2)
    if not header.startswith(magic) or count > 2047:
        raise BadImage("the vhdx image has a table that is none: it is damaged")
    entries = _take(file, "vhdx", table + first, count * 32)
    for start in range(0, len(entries), 32):
        if entries[start : start + 16] == item:
            return _le(entries, start + 16, offset_length)
    return None


def _parallels(file: _File) -> Found:
    return Found("parallels", _le(_take(file, "parallels", 0, 64), 36, 8) * 512)


def _cowd(file: _File) -> Found:
    return Found("cowd", _le(_take(file, "cowd", 0, 16), 12, 4) * 512)


_READERS: dict[str, Callable[[_File], Found]] = {
    "qcow2": _qcow2,
    "qed": _qed,
    "vmdk": _vmdk,
    "vmdk descriptor": _descriptor,
    "cowd": _cowd,
    "vdi": _vdi,
    "vpc": _vpc,
    "vhdx": _vhdx,
    "parallels": _parallels,
}
