"""What the front-end tells about an image, a datastore or a VM, as typed objects.

A datastore action gets the base64 of a `DS_DRIVER_ACTION_DATA` document (docs/contract.md, "The dump"); a VM
is described by the `VM` document that one.vm.info answers.  Whatever is absent reads as "" or None.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator

from lxml import etree

from madrigal.errors import UsageError

MAX_BYTES = 64 << 20
"""A dump larger than this is refused; the largest seen under a real front-end has 200 kB."""


def _parse(document: bytes, root: str, what: str) -> etree._Element:
    # Made anew for each document: lxml parsers may not be shared, and lxml 4.9 resolves entities unless told.
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        element = etree.fromstring(document, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise UsageError(f"{what} is not XML: {error}") from None
    if b"<!DOCTYPE" in document[:4096] or element.getroottree().docinfo.internalDTD is not None:
        raise UsageError(f"{what} has a document type declaration, which no front-end sends")
    if element.tag != root:
        raise UsageError(f"{what} is a <{element.tag}> document, not <{root}>")
    return element


def decode(text: bytes, what: str = "the dump") -> bytes:
    """The bytes of a base64 TEXT, wrapped or not; raises UsageError with WHAT in it."""
    packed = b"".join(text.split())
    if not packed:
        raise UsageError(f"{what} is empty: it has to come as base64 on standard input, or in 3.4 as an argument")
    if len(packed) > MAX_BYTES:
        raise UsageError(f"{what} is larger than {MAX_BYTES >> 20} MiB")
    try:
        return binascii.a2b_base64(packed, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{what} is not base64: {error}") from None


class Element:
    """An XML element; an absent one behaves as an empty one."""

    __slots__ = ("_element",)

    def __init__(self, element: etree._Element | None) -> None:
        self._element = element

    def text(self, path: str, default: str = "") -> str:
        """The text of the element at PATH (`A/B`), blanks around it removed; DEFAULT if absent or empty."""
        found = self._element.find(path) if self._element is not None else None
        return (found.text or "").strip() or default if found is not None else default

    def int(self, path: str) -> int | None:
        """The integer at PATH, None if absent or empty; raises UsageError for anything else."""
        text = self.text(path)
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{path} is '{text[:40]}' in the dump, not a number") from None

    def one(self, path: str) -> Element:
        return Element(self._element.find(path) if self._element is not None else None)

    def all(self, path: str) -> Iterator[Element]:
        if self._element is not None:
            for found in self._element.iterfind(path):
                yield Element(found)

    def __bool__(self) -> bool:
        return self._element is not None


class Image(Element):
    """The IMAGE of a dump.  Sizes in MiB."""

    TYPES = ("OS", "CDROM", "DATABLOCK", "KERNEL", "RAMDISK", "CONTEXT", "BACKUP", "FILESYSTEM")

    @property
    def id(self) -> int | None:
        return self.int("ID")

    @property
    def type(self) -> str:
        """OS, CDROM, DATABLOCK, KERNEL, RAMDISK, CONTEXT, BACKUP or FILESYSTEM."""
        number = self.int("TYPE") or 0
        return self.TYPES[number] if 0 <= number < len(self.TYPES) else str(number)

    @property
    def path(self) -> str:
        """What to import; for `clone` the source of the original image."""
        return self.text("PATH")

    @property
    def source(self) -> str:
        """What the driver answered when it made the image."""
        return self.text("SOURCE")

    @property
    def size(self) -> int | None:
        return self.int("SIZE")

    @property
    def format(self) -> str:
        """raw, qcow2, ... or `save_as` for a name to reserve (3.4 has it in FSTYPE)."""
        return self.text("FORMAT")

    @property
    def fs(self) -> str:
        """File system to make inside a datablock."""
        return self.text("FS")

    @property
    def fstype(self) -> str:
        """3.4: file system of a datablock, `raw`, `swap` or `save_as`."""
        return self.text("FSTYPE")

    @property
    def regtime(self) -> int | None:
        return self.int("REGTIME")

    def attribute(self, name: str) -> str:
        return self.text("TEMPLATE/" + name)


class Datastore(Element):
    """The DATASTORE of a dump."""

    TYPES = ("IMAGE_DS", "SYSTEM_DS", "FILE_DS", "BACKUP_DS")

    @property
    def id(self) -> int | None:
        return self.int("ID")

    @property
    def base_path(self) -> str:
        return self.text("BASE_PATH")

    @property
    def type(self) -> str:
        """IMAGE_DS, SYSTEM_DS, FILE_DS or BACKUP_DS; 3.4 knows image datastores only."""
        number = self.int("TYPE") or 0
        return self.TYPES[number] if 0 <= number < len(self.TYPES) else str(number)

    @property
    def tm_mad(self) -> str:
        return self.text("TM_MAD")

    def attribute(self, name: str) -> str:
        return self.text("TEMPLATE/" + name)


class Dump:
    """A decoded `DS_DRIVER_ACTION_DATA`."""

    def __init__(self, encoded: bytes) -> None:
        root = Element(_parse(decode(encoded), "DS_DRIVER_ACTION_DATA", "the dump"))
        self.image = Image(root.one("IMAGE")._element)
        self.datastore = Datastore(root.one("DATASTORE")._element)
        self.root = root


class Disk(Element):
    """A DISK of a VM.  Sizes in MiB."""

    @property
    def id(self) -> int | None:
        return self.int("DISK_ID")

    @property
    def size(self) -> int | None:
        return self.int("SIZE")

    @property
    def original_size(self) -> int | None:
        """The size of the image the disk was made from."""
        return self.int("ORIGINAL_SIZE")

    @property
    def format(self) -> str:
        """raw or qcow2; never guessed from the disk, which a guest can write."""
        return self.text("FORMAT") or self.text("DRIVER") or "raw"

    @property
    def fs(self) -> str:
        return self.text("FS")


class VM(Element):
    """A VM document."""

    def __init__(self, document: bytes) -> None:
        super().__init__(_parse(document, "VM", "the VM's description"))

    @property
    def id(self) -> int | None:
        return self.int("ID")

    @property
    def lcm_state(self) -> int | None:
        return self.int("LCM_STATE")

    def disk(self, disk_id: int) -> Disk | None:
        for disk in self.all("TEMPLATE/DISK"):
            if disk.int("DISK_ID") == disk_id:
                return Disk(disk._element)
        return None
