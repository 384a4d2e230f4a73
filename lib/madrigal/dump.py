"""What the front-end tells about an image, a datastore or a VM, as typed objects.

A datastore action gets the base64 of a `DS_DRIVER_ACTION_DATA` document (docs/contract.md, "The dump"); a VM
is described by the `VM` document that one.vm.info answers.  Whatever is absent reads as "" or None.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

from madrigal.errors import UsageError

_MAD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")

MAX_BYTES = 64 << 20
"""A dump larger than this is refused; the largest seen under a real front-end has 200 kB."""


class _Builder(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity, before any is declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type declaration, which no front-end sends")


def parse(document: bytes, what: str) -> ElementTree.Element:
    """The root of an XML DOCUMENT, which may not declare its type or entities; raises UsageError with WHAT in it.

    By the parser of the standard library: lxml costs 17 ms of CPU to load, a third of a whole action.
    """
    try:
        return ElementTree.fromstring(document, ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UsageError(f"{what} cannot be read as XML: {error}") from None


def _parse(document: bytes, root: str, what: str) -> ElementTree.Element:
    element = parse(document, what)
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


def document(name: str, values: Mapping[str, str]) -> str:
    """The XML element NAME with an element for each of VALUES."""
    root = ElementTree.Element(name)
    for child, text in values.items():
        ElementTree.SubElement(root, child).text = text
    return ElementTree.tostring(root, encoding="unicode")


def is_mad(name: str) -> bool:
    """Whether NAME may be a driver's, a directory beside the others."""
    return _MAD.match(name) is not None


class Element:
    """An XML element; an absent one behaves as an empty one."""

    __slots__ = ("_element",)

    def __init__(self, element: ElementTree.Element | None) -> None:
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

    @classmethod
    def of(cls, document: bytes) -> Datastore:
        """The one that a DATASTORE document describes."""
        return cls(_parse(document, "DATASTORE", "the datastore's description"))

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

    @property
    def preallocated(self) -> bool:
        """Whether the disk is to have all its room from the beginning."""
        return self.text("SPARSE").lower() == "no"

    @property
    def standalone(self) -> bool:
        """Whether a qcow2 disk is to be a copy of its image, and not to lie on it."""
        return self.text("QCOW2_STANDALONE").lower() in ("yes", "true")

    @property
    def persistent_source(self) -> str:
        """The image that the disk itself is, "" if it is a copy of one."""
        return self.text("SOURCE") if self.text("CLONE").lower() == "no" else ""


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

    @property
    def history(self) -> list[int]:
        """The system datastores it was in, the last one now; not every document has more than that."""
        found = (record.int("DS_ID") for record in self.all("HISTORY_RECORDS/HISTORY"))
        return [ds_id for ds_id in found if ds_id is not None]

    @property
    def tm_mads(self) -> list[str]:
        """The transfer drivers of its disks, each once; raises UsageError for what is not a driver's name."""
        found = dict.fromkeys(disk.text("TM_MAD") for disk in self.all("TEMPLATE/DISK"))
        for mad in found:
            if mad and not is_mad(mad):
                raise UsageError(f"DISK/TM_MAD is '{mad[:40]}' in the VM's description, not the name of a driver")
        return [mad for mad in found if mad]

    @property
    def deploy_id(self) -> str:
        """What the hypervisor calls it."""
        return self.text("DEPLOY_ID")

    @property
    def hypervisor(self) -> str:
        """The driver of the hypervisor that has it last: kvm, qemu, lxc, ..."""
        return self.text("HISTORY_RECORDS/HISTORY[last()]/VM_MAD")

    @property
    def disks(self) -> list[Disk]:
        return [Disk(disk._element) for disk in self.all("TEMPLATE/DISK")]

    def disk(self, disk_id: int) -> Disk | None:
        return next((disk for disk in self.disks if disk.id == disk_id), None)
