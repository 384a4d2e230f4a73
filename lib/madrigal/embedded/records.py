"""What the embedded front-end knows: hosts, datastores, images and VMs, as the records that state.py keeps.

Sizes are MiB, times seconds since the epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from madrigal.embedded.snapshots import Snapshots
from madrigal.errors import UsageError

CONTRACTS = ("3.4", "current")

IMAGE_TYPES = {"OS": 0, "CDROM": 1, "DATABLOCK": 2, "CONTEXT": 5}
IMAGE_STATES = {"READY": 1, "USED": 2, "LOCKED": 4, "ERROR": 5, "DELETE": 7, "USED_PERS": 8}
DATASTORE_TYPES = {"image": (0, "IMAGE_DS"), "system": (1, "SYSTEM_DS"), "file": (2, "FILE_DS")}

PENDING, ACTIVE, STOPPED, DONE, POWEROFF, UNDEPLOYED = 1, 3, 4, 6, 8, 9  # STATE of a VM
VM_STATES = {PENDING: "pending", STOPPED: "stopped", DONE: "done", POWEROFF: "poweroff", UNDEPLOYED: "undeployed"}
AT_FRONT_END = (STOPPED, UNDEPLOYED)  # states in which the disks are there

RUNNING, MIGRATE = 3, 4  # LCM_STATE of a VM whose STATE is ACTIVE
CLEANUP_DELETE = 23
LCM_STATES = {
    1: "prolog",
    2: "boot",
    RUNNING: "running",
    MIGRATE: "migrate",
    8: "prolog_migrate",
    9: "prolog_resume",
    10: "epilog_stop",
    11: "epilog",
    17: "hotplug",
    20: "boot_poweroff",
    22: "boot_stopped",
    CLEANUP_DELETE: "cleanup_delete",
    26: "hotplug_saveas",
    27: "hotplug_saveas_poweroff",
    30: "epilog_undeploy",
    31: "prolog_undeploy",
    32: "boot_undeploy",
    33: "hotplug_prolog_poweroff",
    34: "hotplug_epilog_poweroff",
    35: "boot_migrate",
    36: "boot_failure",
    37: "boot_migrate_failure",
    38: "prolog_migrate_failure",
    39: "prolog_failure",
    40: "epilog_failure",
    41: "epilog_stop_failure",
    42: "epilog_undeploy_failure",
    43: "prolog_migrate_poweroff",
    44: "prolog_migrate_poweroff_failure",
    47: "boot_undeploy_failure",
    48: "boot_stopped_failure",
    49: "prolog_resume_failure",
    50: "prolog_undeploy_failure",
    51: "disk_snapshot_poweroff",
    52: "disk_snapshot_revert_poweroff",
    53: "disk_snapshot_delete_poweroff",
    57: "disk_snapshot",
    59: "disk_snapshot_delete",
    62: "disk_resize",
    63: "disk_resize_poweroff",
    64: "disk_resize_undeployed",
    67: "hotplug_saveas_undeployed",
    68: "hotplug_saveas_stopped",
}

# What XML cannot carry, what would end a CDATA section, and bytes that are not UTF-8.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]|]]>")


def text(value: str, what: str) -> str:
    """VALUE if it can be written into a dump; raises UsageError, naming WHAT, otherwise."""
    if _UNFIT.search(value):
        raise UsageError(f"{what} contains a control character, ']]>' or bytes that are not UTF-8: {value[:60]!a}")
    return value


def printable(value: str) -> str:
    """VALUE, which a driver wrote, without what a dump cannot carry."""
    return _UNFIT.sub("?", value)


def name(value: str, what: str) -> str:
    """VALUE if it can name a thing of the kind WHAT: not empty, one line, not a number (that is an id)."""
    if not value.strip() or value != value.strip() or "\n" in value or "\t" in value or len(value) > 128:
        raise UsageError(f"{value[:60]!a} cannot name a {what}: give 1 to 128 characters on one line")
    if value.isdecimal():
        raise UsageError(f"'{value}' cannot name a {what}: a number is read as an id")
    return text(value, f"the name of the {what}")


def word(value: str, what: str) -> str:
    """VALUE if it can be a word of a transfer script, which front-ends split at blanks."""
    if not value or re.search(r"\s", value):
        raise UsageError(f"{what} is {value!a}: it may not contain blanks, because transfer scripts are split at them")
    return text(value, what)


def path(value: str, what: str) -> str:
    """VALUE if it can be the path in `HOST:PATH`: absolute, without blanks, colons and `..`."""
    if not value.startswith("/") or ":" in value or ".." in value.split("/"):
        raise UsageError(f"{what} is {value!a}: give an absolute path without ':' and '..'")
    return word(value, what)


@dataclass
class Host:
    id: int
    name: str
    datastores: str
    """DATASTORE_LOCATION as this host has it."""
    vmm: str = ""
    """VM_MAD of the hypervisor that really runs VMs there (kvm); "" if nothing does."""


@dataclass
class Datastore:
    id: int
    name: str
    type: str
    """image, system or file."""
    ds_mad: str
    tm_mad: str
    template: dict[str, str] = field(default_factory=dict)
    total_mb: int = 0
    free_mb: int = 0
    used_mb: int = 0


@dataclass
class Image:
    id: int
    name: str
    type: str
    """OS, CDROM, DATABLOCK, or CONTEXT for what a file datastore has."""
    datastore_id: int
    persistent: bool = False
    path: str = ""
    source: str = ""
    size: int = 0
    format: str = ""
    fs: str = ""
    state: str = "LOCKED"
    """READY, LOCKED, ERROR or DELETE; that VMs use it is known from the VMs."""
    regtime: int = 0
    error: str = ""
    template: dict[str, str] = field(default_factory=dict)
    snapshots: Snapshots | None = None
    cloned: int = -1
    """Id of the image that it is a copy of, whose SOURCE is the path then."""


@dataclass
class Disk:
    id: int
    type: str
    """FILE or CDROM for the disk of an image; swap or fs for a volatile one."""
    target: str = ""
    size: int = 0
    asked_size: int | None = None
    """The SIZE the user gave this disk, which a 3.4 front-end passes on."""
    original_size: int = 0
    format: str = ""
    fs: str = ""
    image_id: int | None = None
    datastore_id: int | None = None
    """Datastore of the image; None for a volatile disk."""
    tm_mad: str = ""
    """Driver of the image's datastore; "" for a volatile disk, which the system datastore's driver makes."""
    tm_mad_system: str = ""
    source: str = ""
    clone: bool = True
    save: bool = False
    save_as: int | None = None
    """3.4: id of the image it becomes at shutdown."""
    save_as_source: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    """What a disk inherits from its datastore (SPARSE, QCOW2_STANDALONE, ...)."""
    previous_size: int | None = None
    """The size before the last resize."""
    snapshots: Snapshots | None = None
    taken: dict[str, int] = field(default_factory=dict)
    """MiB that it takes where it is, as its driver told last: of `0`, disk 0, and of `0/2`, its snapshot 2."""


@dataclass
class History:
    """One stay of a VM on a host."""

    seq: int
    host_id: int
    host: str
    datastores: str
    system_ds: int
    tm_mad: str
    stime: int
    etime: int = 0
    action: int = 0
    vm_mad: str = ""
    """VM_MAD of the host at that time, "" if no hypervisor runs VMs there."""


@dataclass
class Operation:
    """What is being done to a VM, so that it can be done again."""

    name: str
    phase: int = 0
    failed: bool = False
    at_front_end: bool = False
    """The VM is stopped or undeployed, so its disks are on the front-end."""
    before: list[int] = field(default_factory=list)
    """STATE and LCM_STATE when it began."""
    disk_id: int | None = None
    image_id: int | None = None
    source: str = ""
    """Where disk-saveas writes to."""
    snapshot_id: int | None = None
    hypervisor: str = ""
    """The program that moves a running VM."""


@dataclass
class VM:
    id: int
    name: str
    system_ds: int
    disks: list[Disk] = field(default_factory=list)
    context: dict[str, str] = field(default_factory=dict)
    context_files: list[str] = field(default_factory=list)
    context_disk: int | None = None
    state: int = PENDING
    lcm_state: int = 0
    stime: int = 0
    etime: int = 0
    history: list[History] = field(default_factory=list)
    operation: Operation | None = None
    error: str = ""
    deploy_id: str = ""
    """The hypervisor's name of it; "" for the usual one."""

    def disk(self, disk_id: int | None) -> Disk:
        for disk in self.disks:
            if disk.id == disk_id:
                return disk
        raise UsageError(f"VM {self.id} has no disk {disk_id}")

    def uses(self, image_id: int) -> bool:
        """Whether it has a disk of this image and is not done."""
        return not self.etime and any(disk.image_id == image_id for disk in self.disks)

    def saves(self, image_id: int) -> bool:
        """Whether it is to be the origin of this image, which has no content yet."""
        if self.operation and self.operation.image_id == image_id:
            return True
        return not self.etime and any(disk.save_as == image_id for disk in self.disks)

    def on_host(self, host_id: int) -> bool:
        """Whether it is there, or may still have something there."""
        return not self.etime and any(stay.host_id == host_id for stay in self.history[-2:])

    @property
    def is_live(self) -> bool:
        """Whether a hypervisor may be writing to its disks."""
        return self.state == ACTIVE and bool(self.history and self.history[-1].vm_mad)

    @property
    def status(self) -> str:
        """One word for people: pending, running, stopped, done, prolog_failure, ..."""
        return VM_STATES.get(self.state) or LCM_STATES[self.lcm_state]


Record = Host | Datastore | Image | VM


def load(cls: type[Any], body: dict[str, Any]) -> Any:
    """The record of class CLS that was stored as BODY."""
    if cls is VM:
        disks = [{**disk, "snapshots": Snapshots.load(disk.get("snapshots"))} for disk in body["disks"]]
        body["disks"] = [Disk(**disk) for disk in disks]
        body["history"] = [History(**stay) for stay in body["history"]]
        body["operation"] = Operation(**body["operation"]) if body["operation"] else None
    if cls is Image:
        body["snapshots"] = Snapshots.load(body.get("snapshots"))
    return cls(**body)
