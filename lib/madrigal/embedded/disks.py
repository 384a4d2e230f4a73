"""What a user asks for as the disk of a VM, and the DISK a front-end makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from madrigal.embedded.records import VM, Datastore, Disk, Image
from madrigal.embedded.state import State
from madrigal.errors import InUse, UsageError

# INHERIT_DATASTORE_ATTR of a stock oned.conf: what a disk gets from the datastore of its image.
INHERITED = (
    *("CEPH_HOST", "CEPH_SECRET", "CEPH_KEY", "CEPH_USER", "CEPH_CONF", "CEPH_TRASH", "POOL_NAME", "RBD_FORMAT"),
    *("DISK_TYPE", "ALLOW_ORPHANS", "QCOW2_STANDALONE", "SPARSE", "LVM_THIN_ENABLE", "PERSISTENT_SNAPSHOTS"),
    *("CLONE_TARGET", "LN_TARGET"),
)
_TYPES = ("swap", "fs")


@dataclass(frozen=True)
class DiskRequest:
    """A disk of an image (IMAGE, perhaps larger: SIZE) or a volatile one (TYPE swap or fs, with SIZE, in MiB)."""

    image: str | int = ""
    size: int = 0
    type: str = ""
    fs: str = ""
    format: str = ""
    save_as: str = ""
    """3.4: name of the image it becomes at shutdown."""

    @classmethod
    def parse(cls, text: str) -> DiskRequest:
        """Read `image=IMAGE[,size=MIB][,save-as=NAME]` or `type=swap|fs,size=MIB[,fs=FS][,format=FORMAT]`."""
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if key not in ("image", "size", "type", "fs", "format", "save-as") or not equals or not value:
                raise UsageError(
                    f"'{part}' in the disk '{text}': expected image=, size=, type=, fs=, format= or save-as="
                )
            if key in values:
                raise UsageError(f"{key} is given twice in the disk '{text}'")
            values[key] = value
        size = values.pop("size", "0")
        if not size.isdecimal() or ("size" in text.replace("=", ",").split(",") and int(size) < 1):
            raise UsageError(f"the size in the disk '{text}' is '{size}', expected a number of MiB")
        return cls(size=int(size), **{key.replace("-", "_"): value for key, value in values.items()})

    def check(self, contract: str) -> None:
        """Raise UsageError unless this makes sense in CONTRACT."""
        if bool(self.image or self.image == 0) == bool(self.type):
            raise UsageError("a disk has either image=IMAGE or type=swap or type=fs")
        if self.save_as and (contract != "3.4" or self.type):
            why = "of an image in the 3.4 contract; today's has 'madrigal vm disk-saveas'"
            raise UsageError(f"save-as is for disks {why}")
        if not self.type:
            if self.fs or self.format:
                raise UsageError("fs and format are for volatile disks: the disk of an image is as the image")
            return
        if self.type not in _TYPES:
            raise UsageError(f"the type of a volatile disk is '{self.type}', expected swap or fs")
        if not self.size:
            raise UsageError(f"a volatile disk needs a size in MiB: type={self.type},size=64")
        if self.type == "swap" and (self.fs or self.format):
            raise UsageError("a swap disk has neither fs nor format")
        if not re.fullmatch(r"[a-z0-9_]*", self.fs) or not re.fullmatch(r"[a-z0-9_]*", self.format):
            raise UsageError(f"fs is {self.fs!a} and format {self.format!a}: expected one word as ext4 or raw")


def build(request: DiskRequest, disk_id: int, vm: VM, contract: str, state: State) -> Disk:
    """The disk of VM that REQUEST asks for.  Inside a transaction, which makes the image the VM's.

    Raises InUse if the image cannot be used now, NotFound if there is none.
    """
    request.check(contract)
    system = state.get(Datastore, vm.system_ds)
    if request.type:
        disk = Disk(disk_id, request.type, size=request.size, asked_size=request.size, fs=request.fs)
        disk.target = _target("sd" if contract != "3.4" else "hd", vm)
        if request.type == "fs":
            # A datastore whose driver knows one format only has the last word.
            disk.format = (system.template.get("DRIVER") if contract != "3.4" else "") or request.format or "raw"
        return disk
    image = state.find(Image, request.image)
    store = state.get(Datastore, image.datastore_id)
    _check_usable(image, store, request, vm, state)
    is_cdrom = image.type == "CDROM"
    disk = Disk(
        disk_id,
        "CDROM" if is_cdrom else "FILE",
        target=_target(image.template.get("DEV_PREFIX", "sd"), vm),
        size=request.size or image.size,
        asked_size=request.size or None,
        original_size=image.size,
        format=image.format,
        image_id=image.id,
        datastore_id=store.id,
        tm_mad=store.tm_mad,
        source=image.source,
        clone=not image.persistent and not is_cdrom,
        save=image.persistent and not is_cdrom,
    )
    if contract != "3.4":
        declared = store.template.get("TM_MAD_SYSTEM", "").replace(",", " ").split()
        if system.tm_mad != store.tm_mad and system.tm_mad in declared:
            disk.tm_mad_system = system.tm_mad
        inherited = {**store.template, **image.template}
        disk.snapshots = image.snapshots if image.persistent else None
        disk.attributes = {key: inherited[key] for key in INHERITED if inherited.get(key)}
    return disk


def _check_usable(image: Image, store: Datastore, request: DiskRequest, vm: VM, state: State) -> None:
    if store.type != "image":
        raise UsageError(f"image '{image.name}' is in the {store.type} datastore '{store.name}': it cannot be a disk")
    if image.state != "READY":
        reason = f": {image.error}" if image.error else ""
        raise InUse(f"image '{image.name}' is in the state {image.state}{reason}")
    if image.persistent and (vm.uses(image.id) or any(other.uses(image.id) for other in state.all(VM))):
        raise InUse(f"the persistent image '{image.name}' is the disk of a VM already, and can be of one only")
    if request.save_as and image.persistent:
        raise UsageError(f"image '{image.name}' is persistent: what the VM writes is saved in it, not as another")
    if request.size and request.size < image.size:
        raise UsageError(f"image '{image.name}' has {image.size} MiB, so its disk cannot have {request.size}")


def _target(prefix: str, vm: VM) -> str:
    taken = {disk.target for disk in vm.disks}
    names = (prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz")
    free = (name for name in names if name not in taken and name != "hda")  # hda is the context's
    return next(free, "")
