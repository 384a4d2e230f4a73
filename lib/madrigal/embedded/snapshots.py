"""The snapshots of a disk or an image as a front-end keeps them: which there are, and which of them may go.

ALLOW_ORPHANS of the datastore decides what a snapshot means: NO, a tree in which each knows its parent (overlays in
qcow2); YES, copies that know nothing of one another; MIXED, children of the snapshot that was last reverted to.
FORMAT is YES for raw disks and NO for others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from madrigal.errors import InUse, NotFound

# What a stock vmm_execrc says: with which hypervisor and driver a snapshot of a running VM's disk can be taken.
LIVE_DISK_SNAPSHOTS = frozenset(
    f"{vmm}-{tm}"
    for vmm, drivers in (
        ("kvm", "qcow2 shared ceph ssh local lvm_thin lvm netapp purefa"),
        ("qemu", "qcow2 shared ceph ssh local netapp"),
        ("lxc", "qcow2 shared ceph ssh local lvm_thin lvm"),
    )
    for tm in drivers.split()
)


@dataclass
class Snapshot:
    id: int
    parent: int
    """-1 for one without."""
    date: int
    size: int
    """MiB of the disk when it was taken."""
    name: str = ""
    children: list[int] = field(default_factory=list)


@dataclass
class Snapshots:
    orphans: str = "NO"
    """NO, YES or MIXED."""
    next: int = 0
    """The id of the next one; ids are never used again."""
    active: int = -1
    """The one that the disk was last equal to."""
    base: int = -1
    """MIXED: the one that was last reverted to."""
    all: list[Snapshot] = field(default_factory=list)

    @classmethod
    def load(cls, body: Mapping[str, Any] | None) -> Snapshots | None:
        return cls(**{**body, "all": [Snapshot(**one) for one in body["all"]]}) if body else None

    @classmethod
    def of(cls, allow_orphans: str, format: str) -> Snapshots:
        """None yet, of a disk with this ALLOW_ORPHANS and this FORMAT."""
        mode = allow_orphans.upper()
        if mode == "FORMAT":
            mode = "YES" if format.lower() == "raw" else "NO"
        return cls(mode if mode in ("YES", "MIXED") else "NO")

    def get(self, snapshot: int | str) -> Snapshot:
        """By id or name; raises NotFound."""
        for one in reversed(self.all):
            if str(snapshot) in (str(one.id), one.name):
                return one
        known = ", ".join(str(one.id) for one in self.all) or "none"
        raise NotFound(f"there is no snapshot '{snapshot}'; there are: {known}")

    def add(self, name: str, size: int) -> Snapshot:
        """A new one, which `activate` makes the active one when it is taken."""
        parent = {"NO": self.active, "YES": -1, "MIXED": self.base}[self.orphans]
        new = Snapshot(self.next, parent, int(time.time()), size, name)
        self.next += 1
        if found := self._parent(new):
            found.children.append(new.id)
        self.all.append(new)
        return new

    def activate(self, ident: int, revert: bool) -> None:
        """The disk is equal to this one now: it was taken, or the disk was REVERTed to it."""
        if self.orphans == "MIXED":
            if not revert:
                return
            self.base = ident
        self.active = ident

    def check_deletable(self, ident: int, persistent: bool) -> None:
        """Raise InUse where a front-end would not let a VM's disk, of a PERSISTENT image, lose this one."""
        one = self.get(ident)
        if self.orphans == "YES":
            return
        if self.orphans == "MIXED":
            self.check_deletable_of_image(ident)
            return
        if persistent and ident == 0:
            raise InUse("snapshot 0 of a persistent disk cannot be deleted: it is the image")
        if len(one.children) > 1:
            raise InUse(f"snapshot {ident} has more than one child: it cannot be deleted")
        if not one.children:
            return
        child = self.get(one.children[0])
        if ident == self.active:
            raise InUse(f"snapshot {ident} is the active one and has a child: it cannot be deleted")
        if len(child.children) > 1 or (child.children and child.id == self.active):
            raise InUse(f"the child of snapshot {ident}, {child.id}, has children: it cannot be deleted")
        parent = self._parent(one)
        if parent and len(parent.children) > 1:
            raise InUse(f"the parent of snapshot {ident}, {one.parent}, has other children: it cannot be deleted")

    def check_deletable_of_image(self, ident: int) -> None:
        """The same for an image that no VM uses."""
        one = self.get(ident)
        if self.orphans != "YES" and ident == self.active:
            raise InUse(f"snapshot {ident} is the active one: it cannot be deleted")
        if self.orphans != "YES" and one.children:
            raise InUse(f"snapshot {ident} has children: it cannot be deleted")

    def remove(self, ident: int) -> None:
        """It is deleted, or was never taken.  An only child gets its parent, but a root's child keeps what it has."""
        one = self.get(ident)
        self.all.remove(one)
        parent = self._parent(one) if self.orphans != "YES" else None
        if parent:
            parent.children.remove(ident)
            if len(one.children) == 1:
                parent.children = sorted({*parent.children, *one.children})
                self.get(one.children[0]).parent = parent.id
        if self.active == ident:
            self.active = parent.id if parent else -1

    def _parent(self, one: Snapshot) -> Snapshot | None:
        return next((other for other in self.all if other.id == one.parent), None)
