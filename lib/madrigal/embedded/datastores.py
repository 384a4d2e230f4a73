"""The datastores of the embedded front-end, with the attributes a front-end gives them at their creation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from madrigal import drivers
from madrigal.drivers import generate
from madrigal.embedded import monitoring
from madrigal.embedded.records import DATASTORE_TYPES, VM, Datastore, Host, Image, name, text
from madrigal.embedded.run import ActionFailed, Outcome
from madrigal.errors import InUse, MadrigalError, NotSupported, UsageError

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd

_SSH_SYSTEM = {"TM_MAD_SYSTEM": "ssh", "LN_TARGET_SSH": "SYSTEM", "CLONE_TARGET_SSH": "SYSTEM"}

# For drivers without a driver.toml, which are stock ones: what TM_MAD_CONF of a stock oned.conf says.
# LN_TARGET, CLONE_TARGET, ALLOW_ORPHANS, and the rest.
_TM_CONF: dict[str, tuple[str, str, str, Mapping[str, str]]] = {
    "dummy": ("NONE", "SYSTEM", "NO", {}),
    "dev": ("NONE", "NONE", "NO", {"DRIVER": "raw"}),
    "shared": ("NONE", "SYSTEM", "FORMAT", _SSH_SYSTEM),
    "qcow2": ("NONE", "SYSTEM", "FORMAT", {**_SSH_SYSTEM, "DRIVER": "qcow2"}),
    "ssh": ("SYSTEM", "SYSTEM", "YES", {}),
    "local": ("SYSTEM", "SYSTEM", "FORMAT", {}),
    "lvm": ("NONE", "SELF", "YES", {"DRIVER": "raw"}),
    "fs_lvm": ("SYSTEM", "SYSTEM", "NO", {"DRIVER": "raw"}),
    "fs_lvm_ssh": ("SYSTEM", "SYSTEM", "YES", {"DRIVER": "raw"}),
    "ceph": ("NONE", "SELF", "MIXED", {**_SSH_SYSTEM, "DRIVER": "raw"}),
}
_NOT_SHARED = ("ssh", "local")
_MAD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")
_ATTRIBUTE = re.compile(r"[A-Z][A-Z0-9_]*\Z")


def attributes(given: Mapping[str, str]) -> dict[str, str]:
    """Template attributes as given, names in upper case; raises UsageError for one that XML could not carry."""
    result = {}
    for key, value in given.items():
        if not _ATTRIBUTE.match(key.upper()):
            raise UsageError(f"{key[:60]!a} is not the name of an attribute: letters, digits and '_'")
        result[key.upper()] = text(value, f"the attribute {key.upper()}")
    return result


def _yes(value: bool) -> str:
    return "YES" if value else "NO"


class Datastores:
    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._state = front_end.state
        self._old = front_end.layout.contract == "3.4"

    def create(
        self,
        datastore: str,
        tm_mad: str,
        type: str = "image",
        ds_mad: str = "fs",
        attrs: Mapping[str, str] | None = None,
    ) -> Datastore:
        """Add a datastore (TYPE: image, system or file) of the drivers datastore/DS_MAD and tm/TM_MAD.

        As oned does, it stores RESTRICTED_DIRS and SAFE_DIRS if neither is given; SAFE_DIRS is `/` then, not
        `/var/tmp`, because here whoever registers an image owns the files.
        """
        name(datastore, "datastore")
        if type not in DATASTORE_TYPES:
            raise UsageError(f"the type is '{type}', expected {', '.join(DATASTORE_TYPES)}")
        if self._old and type != "image":
            raise UsageError("the 3.4 contract has one system datastore, 'system', and no file datastores")
        given = self._checked(tm_mad, ds_mad if type != "system" else "", attributes(attrs or {}))
        defaults = {} if self._old else self._defaults(type, tm_mad)
        if type != "system" and not given.get("SAFE_DIRS") and not given.get("RESTRICTED_DIRS"):
            defaults.update(RESTRICTED_DIRS="/", SAFE_DIRS="/")
        with self._state.transaction():
            self._state.check_free(Datastore, datastore)
            record = Datastore(
                self._state.number("datastore"), datastore, type, "-" if type == "system" else ds_mad, tm_mad
            )
            record.template = {**defaults, **given}
            self._state.save(record)
        return self.monitor(record)

    def _checked(self, tm_mad: str, ds_mad: str, given: dict[str, str]) -> dict[str, str]:
        tree = self._front_end.tree
        for kind, mad in (("tm", tm_mad), ("datastore", ds_mad)):
            if mad and not _MAD.match(mad):
                raise UsageError(f"{mad!a} is not the name of a driver: one word, a directory of {tree}/{kind}")
        for key in ("TM_MAD", "DS_MAD", "TYPE"):
            if key in given:
                raise UsageError(f"{key} is not set as an attribute but with --{key.lower().replace('_', '-')}")
        return given

    def _defaults(self, type: str, tm_mad: str) -> dict[str, str]:
        link, clone, orphans, rest = _TM_CONF.get(tm_mad, ("NONE", "SYSTEM", "NO", {}))
        is_shared, moves = tm_mad not in _NOT_SHARED, ("YES", "YES", "YES")
        driver = drivers.read(self._front_end.tree, "tm", tm_mad)
        if driver:
            orphans, is_shared = driver.allow_orphans, driver.shared
            moves = (_yes(driver.ds_migrate), _yes(driver.ds_live_migrate), _yes(driver.ds_migrate_snap))
        if type == "system":
            migrate = dict(zip(("DS_MIGRATE", "DS_LIVE_MIGRATE", "DS_MIGRATE_SNAP"), moves, strict=True))
            return {"ALLOW_ORPHANS": orphans, "DISK_TYPE": "FILE", "SHARED": _yes(is_shared), **migrate}
        if driver:
            return {"DISK_TYPE": "FILE", **generate.tm_attributes(driver)}
        return {"CLONE_TARGET": clone, "DISK_TYPE": "FILE", "LN_TARGET": link, "ALLOW_ORPHANS": orphans, **rest}

    def complete(self) -> None:
        """Give the first system datastore, which was there before any driver was known, what its driver says."""
        with self._state.transaction():
            record = self._state.get(Datastore, 0)
            if not self._old and "SHARED" not in record.template:
                record.template = {**self._defaults(record.type, record.tm_mad), **record.template}
                self._state.save(record)

    def update(self, datastore: str | int, tm_mad: str = "", attrs: Mapping[str, str] | None = None) -> Datastore:
        """Change the transfer driver, or set attributes (an empty value removes one); raises InUse while VMs use it."""
        given = self._checked(tm_mad, "", attributes(attrs or {}))
        with self._state.transaction():
            record = self.get(datastore)
            if tm_mad and tm_mad != record.tm_mad:
                self._check_unused(record, "its transfer driver cannot change")
                record.tm_mad = tm_mad
                if not self._old:
                    record.template.update(self._defaults(record.type, tm_mad))
            record.template.update(given)
            record.template = {key: value for key, value in record.template.items() if value}
            self._state.save(record)
        return record

    def all(self) -> list[Datastore]:
        return self._state.all(Datastore)

    def get(self, datastore: str | int) -> Datastore:
        """By name or id; raises NotFound."""
        return self._state.find(Datastore, datastore)

    def _check_unused(self, record: Datastore, consequence: str) -> None:
        for vm in self._state.all(VM):
            if not vm.etime and (vm.system_ds == record.id or any(disk.datastore_id == record.id for disk in vm.disks)):
                raise InUse(f"VM {vm.id} uses datastore '{record.name}': {consequence}")

    def delete(self, datastore: str | int) -> Datastore:
        """Forget a datastore; its directory stays.  Raises InUse while it has images or VMs."""
        with self._state.transaction():
            record = self.get(datastore)
            if record.id == 0:
                raise InUse("the datastore 'system' cannot be deleted: VMs need one")
            for image in self._state.all(Image):
                if image.datastore_id == record.id:
                    raise InUse(f"image '{image.name}' is in datastore '{record.name}': delete it first")
            self._check_unused(record, "it cannot be deleted")
            self._state.remove(record)
        return record

    def check_migration(self, vm: VM, old: Datastore, new: Datastore, live: bool) -> None:
        """Raise UsageError or NotSupported unless VM can go from the system datastore OLD to NEW."""
        if old.id == new.id:
            return
        if new.tm_mad != old.tm_mad:
            raise UsageError(f"'{new.name}' has the driver {new.tm_mad}, and '{old.name}', where it is, {old.tm_mad}")
        snapshots = any(disk.snapshots and disk.snapshots.all for disk in vm.disks)
        for key, wanted in (("DS_MIGRATE", True), ("DS_LIVE_MIGRATE", live), ("DS_MIGRATE_SNAP", snapshots)):
            if wanted and new.template.get(key, "NO").upper() != "YES":
                raise NotSupported(f"VM {vm.id} cannot move to the datastore '{new.name}', where {key} is not YES")

    def monitor(self, record: Datastore) -> Datastore:
        """Ask the driver for the capacity, as today's front-end does after every action; failing is only a warning."""
        if self._old or record.type == "system":
            return record
        front_end = self._front_end
        dump = front_end.documents.dump(None, front_end.datastore_document(record, self._state))
        try:
            outcome = front_end.datastore_action("monitor", record.id, dump, record, "")
            return self._keep(record, self._capacity(outcome), {})
        except MadrigalError as error:
            front_end.observer.warn(f"datastore '{record.name}' cannot be monitored: {error}")
            return record

    def ask(self, datastore: str | int) -> Datastore:
        """Monitor a datastore now; of a system datastore, the sizes of its VMs' disks too.  Raises MadrigalError."""
        record, front_end = self.get(datastore), self._front_end
        if self._old:
            raise NotSupported("the 3.4 contract has no monitoring of datastores")
        if record.type != "system":
            return self.monitor(record)
        if record.template.get("SHARED", "YES").upper() == "NO":
            return self._probe(record)
        more = {"DATASTORE_LOCATION": front_end.layout.datastores, "MONITOR_VM_DISKS": 1}
        dump = front_end.documents.dump(None, front_end.datastore_document(record, self._state), more)
        with monitoring.Listener(front_end.directory) as listener:
            room = self._capacity(front_end.monitor_system(record, dump))
            return self._keep(record, room, listener.heard())

    def _probe(self, record: Datastore) -> Datastore:
        """What the hosts say together: each has a datastore of its own under this name."""
        rooms, found = [(0, 0, 0)], {}
        for host in self._state.all(Host):
            answer = monitoring.probe(host.name, f"{host.datastores}/{record.id}", self._front_end.tree)
            if answer:
                rooms.append(answer[0])
                found.update(answer[1])
        total, free, used = (sum(numbers) for numbers in zip(*rooms, strict=True))
        return self._keep(record, (total, free, used), found)

    def _capacity(self, outcome: Outcome) -> tuple[int, int, int]:
        room = monitoring.capacity(outcome.stdout) if outcome.ok else None
        if room is None:
            raise ActionFailed(outcome.reason if not outcome.ok else f"it answered {outcome.stdout[:80]!a}")
        return room

    def _keep(self, record: Datastore, room: tuple[int, int, int], sizes: monitoring.Sizes) -> Datastore:
        with self._state.transaction():
            record = self._state.get(Datastore, record.id)
            record.total_mb, record.free_mb, record.used_mb = room
            self._state.save(record)
            for vm in self._state.all(VM):
                if not vm.etime and vm.system_ds == record.id and vm.id in sizes:
                    for disk in vm.disks:
                        known = sizes[vm.id]
                        disk.taken = {name: known[name] for name in known if name.partition("/")[0] == str(disk.id)}
                    self._state.save(vm)
        return record
