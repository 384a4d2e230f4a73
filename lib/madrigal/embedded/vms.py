"""VMs and what can be done with them: when it is allowed, and how it begins.  The rest is the engine's."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from madrigal.embedded.disks import DiskRequest, build
from madrigal.embedded.engine import Engine
from madrigal.embedded.lifecycle import OPERATIONS
from madrigal.embedded.records import (
    ACTIVE,
    AT_FRONT_END,
    CLEANUP_DELETE,
    DONE,
    PENDING,
    POWEROFF,
    RUNNING,
    STOPPED,
    UNDEPLOYED,
    VM,
    Datastore,
    Disk,
    History,
    Host,
    Image,
    Operation,
    name,
    text,
    word,
)
from madrigal.embedded.snapshots import LIVE_DISK_SNAPSHOTS, Snapshots
from madrigal.errors import InUse, NotFound, NotSupported, UsageError

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd

_SUFFIXES = {POWEROFF: " off", UNDEPLOYED: " undeployed", STOPPED: " stopped"}


class VMs:
    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._state = front_end.state
        self._contract = front_end.layout.contract
        self._engine = Engine(front_end)

    def all(self) -> list[VM]:
        return self._state.all(VM)

    def get(self, vm: str | int) -> VM:
        """By name or id; raises NotFound."""
        return self._state.find(VM, vm)

    def place(self, vm: VM) -> str:
        """`HOST:DIRECTORY` of the VM's disks as far as the front-end knows, "" if it has none anywhere."""
        layout = self._front_end.layout
        if vm.state in (PENDING, DONE):
            return ""
        return layout.at_front_end(vm) if vm.state in AT_FRONT_END else layout.at_host(vm, vm.history[-1])

    def create(
        self,
        vm: str,
        disks: Sequence[DiskRequest] = (),
        context: Mapping[str, str] | None = None,
        context_files: Sequence[str] = (),
        system_datastore: str | int = 0,
    ) -> VM:
        """A VM that waits to be deployed.  DISKS in the order of their ids; CONTEXT makes one more, the last.

        CONTEXT_FILES are absolute paths on the front-end (today's form: `PATH:NAME` too) or http:// URLs.
        """
        name(vm, "VM")
        for key, value in (context or {}).items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise UsageError(f"{key[:60]!a} cannot be a context variable: letters, digits and '_'")
            text(value, f"the context variable {key}")
        for file in context_files:
            self._check_file(file)
        record = VM(-1, vm, 0, context=dict(context or {}), context_files=list(context_files))
        reserved = []
        with contextlib.ExitStack() as stack:
            with self._state.transaction():
                self._state.check_free(VM, vm)
                record.system_ds = self._system(system_datastore)
                record.id = self._state.number("vm")
                record.stime = int(time.time())
                for number, request in enumerate(disks):
                    disk = build(request, number, record, self._contract, self._state)
                    record.disks.append(disk)
                    if request.save_as:
                        reserved.append(self._reserve(request.save_as, disk, record))
                if context or context_files:
                    record.context_disk = len(record.disks)
                self._state.save(record)
                stack.enter_context(self._state.lock(record, "vm create"))
            try:
                for image in reserved:
                    source = self._front_end.images.make_reserved(image).source
                    next(disk for disk in record.disks if disk.save_as == image.id).save_as_source = source
            except BaseException:
                for image in reserved:
                    self._front_end.images.finish(image.id, f"VM '{vm}', whose disk it was to be, was not created")
                self._state.remove(record)
                raise
            self._state.save(record)
        return record

    def _check_file(self, file: str) -> None:
        word(file, "a context file")
        if re.match(r"https?://", file):
            return
        path = file.partition(":")[0]
        if not path.startswith("/") or (":" in file and self._contract == "3.4"):
            raise UsageError(f"the context file is {file!a}: give an absolute path or a URL")
        if not os.path.isfile(path):
            raise NotFound(f"the context file {path} does not exist")

    def _system(self, given: str | int) -> int:
        store = self._state.find(Datastore, given)
        if store.type != "system" or (store.id != 0 and self._contract == "3.4"):
            raise UsageError(f"datastore '{store.name}' cannot be the VM's system datastore")
        return store.id

    def _reserve(self, image: str, disk: Disk, vm: VM) -> Image:
        original = self._state.get(Image, disk.image_id or 0)
        reserved = self._front_end.images.reserve(image, original, disk.size, vm.id, disk.id)
        disk.save, disk.save_as = True, reserved.id
        return reserved

    def deploy(self, vm: str | int, host: str | int, deploy_id: str = "") -> VM:
        """Provide the disks of a pending VM on HOST.  DEPLOY_ID: the name that a hypervisor there knows it by."""

        def begin(record: VM) -> Operation:
            record.deploy_id = word(deploy_id, "the deploy id") if deploy_id else ""
            return self._move_to(host, record, "deploy", PENDING)

        return self._engine.operate(self.get(vm), "deploy", begin)

    def stop(self, vm: str | int) -> VM:
        """Move the disks of a running VM to the front-end."""

        def begin(record: VM) -> Operation:
            self._check_running(record)
            return Operation("stop")

        return self._engine.operate(self.get(vm), "stop", begin)

    def undeploy(self, vm: str | int) -> VM:
        """Move the disks of a running or powered-off VM to the front-end, for longer."""
        self._check_current("undeploy")

        def begin(record: VM) -> Operation:
            self._check_deployed(record)
            return Operation("undeploy")

        return self._engine.operate(self.get(vm), "undeploy", begin)

    def resume(self, vm: str | int, host: str | int = "") -> VM:
        """Move the disks of a stopped or undeployed VM to HOST; without one, to where they came from."""

        def begin(record: VM) -> Operation:
            if record.state == UNDEPLOYED:
                return self._move_to(host, record, "resume undeployed", UNDEPLOYED)
            return self._move_to(host, record, "resume", STOPPED)

        return self._engine.operate(self.get(vm), "resume", begin)

    def poweroff(self, vm: str | int) -> VM:
        """A running VM does not run any more; its disks stay where they are, and no driver is called."""
        self._check_current("poweroff")
        found = self.get(vm)
        with self._state.lock(found, "vm poweroff"), self._state.transaction():
            record = self._state.get(VM, found.id)
            self._check_running(record)
            record.state, record.lcm_state = POWEROFF, 0
            self._state.save(record)
        return record

    def start(self, vm: str | int) -> VM:
        """A powered-off VM runs again, with a new context disk."""
        self._check_current("start")

        def begin(record: VM) -> Operation:
            if record.state != POWEROFF:
                raise InUse(f"VM {record.id} is {record.status}: only one that is powered off can start")
            return Operation("start")

        return self._engine.operate(self.get(vm), "start", begin)

    def migrate(
        self,
        vm: str | int,
        host: str | int,
        live: bool = False,
        system_datastore: str | int = "",
        hypervisor: str = "",
    ) -> VM:
        """Move a running or powered-off VM to another HOST, or to another system datastore, or both.

        LIVE: while it runs.  The drivers are told before and after; between, HYPERVISOR is run as
        `HYPERVISOR migrate SOURCE_HOST TARGET_HOST TARGET_DIRECTORY VM_ID` with the VM's document on stdin, and
        brings the disks.  Without one they have to be on shared storage.
        """
        if live or system_datastore != "":
            self._check_current("live migration and no other system datastores")

        def begin(record: VM) -> Operation:
            self._check_running(record) if live else self._check_deployed(record)
            stay = record.history[-1]
            system = self._state.get(Datastore, stay.system_ds)
            if system_datastore != "":
                target = self._state.get(Datastore, self._system(system_datastore))
                self._front_end.datastores.check_migration(record, system, target, live)
                system = target
            if self._state.find(Host, host).id == stay.host_id and system.id == stay.system_ds:
                raise UsageError(f"VM {record.id} is on host '{stay.host}' already")
            if live and not hypervisor and system.template.get("SHARED", "YES").upper() == "NO":
                raise UsageError(f"hosts do not share '{system.name}': say with --hypervisor what brings the disks")
            off = " off" if record.state == POWEROFF else ""
            record.system_ds = system.id
            operation = self._move_to(host, record, "migrate live" if live else f"migrate{off}", record.state)
            operation.hypervisor = os.path.abspath(hypervisor) if "/" in hypervisor else hypervisor
            return operation

        return self._engine.operate(self.get(vm), "migrate", begin)

    def shutdown(self, vm: str | int) -> VM:
        """Save what is to be saved of a running or powered-off VM, and remove the rest."""

        def begin(record: VM) -> Operation:
            self._check_deployed(record)
            return Operation("shutdown")

        return self._engine.operate(self.get(vm), "shutdown", begin)

    def terminate(self, vm: str | int, hard: bool = False) -> VM:
        """As shutdown, also for a stopped, undeployed or pending VM; HARD: of a failed one, where nothing is saved."""
        self._check_current("terminate")
        found = self.get(vm)
        if found.state == PENDING or (hard and found.operation):
            return self._engine.delete(found)

        def begin(record: VM) -> Operation:
            if record.state not in AT_FRONT_END:
                self._check_deployed(record)
            return Operation("terminate", at_front_end=record.state in AT_FRONT_END)

        return self._engine.operate(found, "terminate", begin)

    # One disk

    def attach(self, vm: str | int, disk: DiskRequest) -> VM:
        """Give a running or powered-off VM another disk; if the driver fails, the VM is as before."""
        self._check_current("attach")

        def begin(record: VM) -> Operation:
            operation = self._on_disk("attach", record)
            taken = [disk.id for disk in record.disks]
            number = max([*taken, -1 if record.context_disk is None else record.context_disk], default=-1) + 1
            added = build(disk, number, record, self._contract, self._state)
            if added.tm_mad:
                # oned marks disks that come later even when both drivers are the same.
                added.tm_mad_system = self._state.get(Datastore, record.system_ds).tm_mad
            record.disks.append(added)
            operation.disk_id = added.id
            return operation

        return self._engine.operate(self.get(vm), "attach", begin)

    def detach(self, vm: str | int, disk_id: int) -> VM:
        """Take a disk from a running or powered-off VM, saving it if its image is persistent."""
        self._check_current("detach")

        def begin(record: VM) -> Operation:
            return self._on_disk("detach", record, disk_id)

        return self._engine.operate(self.get(vm), "detach", begin)

    def disk_saveas(self, vm: str | int, disk_id: int, image: str, snapshot: int | str = "") -> VM:
        """Copy a disk of a VM, or a SNAPSHOT of it, into a new image beside the disk's own."""
        self._check_current("disk-saveas")

        def begin(record: VM) -> Operation:
            operation = self._on_disk("disk-saveas", record, disk_id)
            disk = record.disk(disk_id)
            if disk.image_id is None:
                raise UsageError(f"disk {disk_id} of VM {record.id} is volatile: no image datastore could take it")
            size = disk.size
            if snapshot != "":
                taken = (disk.snapshots or Snapshots()).get(snapshot)
                operation.snapshot_id, size = taken.id, taken.size
            original = self._state.get(Image, disk.image_id)
            operation.image_id = self._front_end.images.reserve(image, original, size, record.id, disk_id).id
            return operation

        return self._engine.operate(self.get(vm), "disk-saveas", begin)

    def snapshot_create(self, vm: str | int, disk_id: int, name: str = "") -> VM:
        """Take a snapshot of a disk; its id is the highest of the disk's snapshots."""
        self._check_current("disk snapshots")

        def begin(record: VM) -> Operation:
            operation, disk = self._on_disk("snapshot-create", record, disk_id), record.disk(disk_id)
            if disk.image_id is None or disk.type == "CDROM":
                kind = "volatile" if disk.image_id is None else "read-only"
                raise UsageError(f"disk {disk_id} of VM {record.id} is {kind}: it can have no snapshots")
            vmm = record.history[-1].vm_mad
            if record.is_live and f"{vmm}-{disk.tm_mad}" not in LIVE_DISK_SNAPSHOTS:
                raise NotSupported(f"{vmm} and {disk.tm_mad} take no snapshot of a running VM: power it off first")
            disk.snapshots = disk.snapshots or Snapshots.of(disk.attributes.get("ALLOW_ORPHANS", "NO"), disk.format)
            text(name, "the name of the snapshot")
            if name.isdecimal():
                raise UsageError(f"'{name}' cannot name a snapshot: a number is read as an id")
            operation.snapshot_id = disk.snapshots.add(name, disk.size).id
            return operation

        return self._engine.operate(self.get(vm), "snapshot-create", begin)

    def snapshot_revert(self, vm: str | int, disk_id: int, snapshot: int | str) -> VM:
        """Bring a disk of a VM that does not run back to a snapshot (id or name)."""
        return self._with_snapshot("snapshot-revert", vm, disk_id, snapshot)

    def snapshot_delete(self, vm: str | int, disk_id: int, snapshot: int | str, force: bool = False) -> VM:
        """Delete a snapshot (id or name).  FORCE: also one that a front-end would not let go; the driver decides."""
        return self._with_snapshot("snapshot-delete", vm, disk_id, snapshot, check=not force)

    def _with_snapshot(self, name: str, vm: str | int, disk_id: int, snapshot: int | str, check: bool = False) -> VM:
        self._check_current("disk snapshots")

        def begin(record: VM) -> Operation:
            operation, disk = self._on_disk(name, record, disk_id), record.disk(disk_id)
            snapshots = disk.snapshots or Snapshots()
            operation.snapshot_id = snapshots.get(snapshot).id
            if check:
                snapshots.check_deletable(operation.snapshot_id, disk.save)
            return operation

        return self._engine.operate(self.get(vm), name, begin)

    def resize(self, vm: str | int, disk_id: int, size: int) -> VM:
        """Let a disk have SIZE MiB; of a running VM the hypervisor does it, and the driver is only told."""
        self._check_current("disk resize")

        def begin(record: VM) -> Operation:
            operation, disk = self._on_disk("resize", record, disk_id), record.disk(disk_id)
            if size <= disk.size:
                raise UsageError(f"disk {disk_id} of VM {record.id} has {disk.size} MiB: the new size must be more")
            disk.previous_size, disk.size = disk.size, size
            return operation

        return self._engine.operate(self.get(vm), "resize", begin)

    def _on_disk(self, operation: str, record: VM, disk_id: int | None = None) -> Operation:
        """What OPERATION on a disk is in the state that the VM is in; raises InUse if it is not possible then."""
        suffix = _SUFFIXES.get(record.state, "")
        if not suffix:
            self._check_running(record)
            # Nobody writes to the disks of a VM without a hypervisor.
            suffix = "" if record.is_live or operation in ("attach", "detach") else " off"
        name = operation + suffix
        if name not in OPERATIONS["current"]:
            raise InUse(f"VM {record.id} is {record.status}: {operation} is not possible then, power it off")
        if disk_id is not None:
            record.disk(disk_id)
        return Operation(name, at_front_end=record.state in AT_FRONT_END, disk_id=disk_id)

    def recover(self, vm: str | int) -> VM:
        """Do again what failed or was cut off, from the start of its phase: the whole transfer script is run."""

        def begin(record: VM) -> Operation:
            if not record.operation:
                raise InUse(f"VM {record.id} is {record.status}: there is nothing to recover")
            if record.lcm_state == CLEANUP_DELETE:
                raise InUse(f"VM {record.id} was being deleted: 'madrigal vm delete {record.id}' goes on with that")
            return record.operation

        return self._engine.operate(self.get(vm), "recover", begin)

    def delete(self, vm: str | int) -> VM:
        """Remove a VM in any state without saving anything; raises ActionFailed, the VM gone, if something is left."""
        return self._engine.delete(self.get(vm))

    def _check_current(self, operation: str) -> None:
        if self._contract == "3.4":
            raise NotSupported(f"the 3.4 contract has no {operation}")

    def _check_running(self, record: VM) -> None:
        if record.state != ACTIVE or record.lcm_state != RUNNING:
            hint = f": 'madrigal vm recover {record.id} --retry' first" if record.operation else ""
            raise InUse(f"VM {record.id} is {record.status}, and would have to be running{hint}")

    def _check_deployed(self, record: VM) -> None:
        if record.state != POWEROFF:
            self._check_running(record)

    def _move_to(self, host: str | int, record: VM, operation: str, state: int) -> Operation:
        """Begin a stay on HOST ("": where it was last) of a VM that is in STATE."""
        if record.state != state:
            raise InUse(f"VM {record.id} is {record.status}: it cannot {operation} now")
        target = self._state.find(Host, record.history[-1].host_id if host == "" and record.history else host)
        now = int(time.time())
        if record.history:
            record.history[-1].etime = record.history[-1].etime or now
        system = self._state.get(Datastore, record.system_ds)
        stay = History(len(record.history), target.id, target.name, target.datastores, system.id, system.tm_mad, now)
        stay.vm_mad = target.vmm
        record.history.append(stay)
        return Operation(operation)
