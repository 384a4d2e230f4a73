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
from madrigal.embedded.records import (
    ACTIVE,
    CLEANUP_DELETE,
    DONE,
    PENDING,
    RUNNING,
    STOPPED,
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
from madrigal.errors import InUse, NotFound, NotSupported, UsageError

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd


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
        return layout.at_front_end(vm) if vm.state == STOPPED else layout.at_host(vm, vm.history[-1])

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

    def deploy(self, vm: str | int, host: str | int) -> VM:
        """Provide the disks of a pending VM on HOST."""

        def begin(record: VM) -> Operation:
            return self._move_to(host, record, "deploy", PENDING)

        return self._engine.operate(self.get(vm), "deploy", begin)

    def stop(self, vm: str | int) -> VM:
        """Move the disks of a running VM to the front-end."""

        def begin(record: VM) -> Operation:
            self._check_running(record)
            return Operation("stop")

        return self._engine.operate(self.get(vm), "stop", begin)

    def resume(self, vm: str | int, host: str | int = "") -> VM:
        """Move the disks of a stopped VM to HOST; without one, to where they came from."""

        def begin(record: VM) -> Operation:
            return self._move_to(host, record, "resume", STOPPED)

        return self._engine.operate(self.get(vm), "resume", begin)

    def migrate(self, vm: str | int, host: str | int) -> VM:
        """Move the disks of a running VM to another HOST."""

        def begin(record: VM) -> Operation:
            self._check_running(record)
            if self._state.find(Host, host).id == record.history[-1].host_id:
                raise UsageError(f"VM {record.id} is on host '{record.history[-1].host}' already")
            return self._move_to(host, record, "migrate", ACTIVE)

        return self._engine.operate(self.get(vm), "migrate", begin)

    def shutdown(self, vm: str | int) -> VM:
        """Save what is to be saved of a running VM, and remove the rest."""

        def begin(record: VM) -> Operation:
            self._check_running(record)
            return Operation("shutdown")

        return self._engine.operate(self.get(vm), "shutdown", begin)

    def terminate(self, vm: str | int, hard: bool = False) -> VM:
        """As shutdown, also for a stopped or pending VM; HARD: nothing is saved of one whose operation failed."""
        self._check_current("terminate")
        found = self.get(vm)
        if found.state == PENDING or (hard and found.operation):
            return self._engine.delete(found)

        def begin(record: VM) -> Operation:
            if record.state != STOPPED:
                self._check_running(record)
            return Operation("terminate", at_front_end=record.state == STOPPED)

        return self._engine.operate(found, "terminate", begin)

    def attach(self, vm: str | int, disk: DiskRequest) -> VM:
        """Give a running VM another disk; if the driver fails, the VM is as before."""
        self._check_current("attach")

        def begin(record: VM) -> Operation:
            self._check_running(record)
            taken = [disk.id for disk in record.disks]
            number = max([*taken, -1 if record.context_disk is None else record.context_disk], default=-1) + 1
            added = build(disk, number, record, self._contract, self._state)
            if added.tm_mad:
                # oned marks disks that come later even when both drivers are the same.
                added.tm_mad_system = self._state.get(Datastore, record.system_ds).tm_mad
            record.disks.append(added)
            return Operation("attach", disk_id=added.id)

        return self._engine.operate(self.get(vm), "attach", begin)

    def detach(self, vm: str | int, disk_id: int) -> VM:
        """Take a disk from a running VM, saving it if its image is persistent."""
        self._check_current("detach")

        def begin(record: VM) -> Operation:
            self._check_running(record)
            return Operation("detach", disk_id=record.disk(disk_id).id)

        return self._engine.operate(self.get(vm), "detach", begin)

    def disk_saveas(self, vm: str | int, disk_id: int, image: str) -> VM:
        """Copy a disk of a running or stopped VM into a new image beside the disk's own."""
        self._check_current("disk-saveas")

        def begin(record: VM) -> Operation:
            if record.state != STOPPED:
                self._check_running(record)
            disk = record.disk(disk_id)
            if disk.image_id is None:
                raise UsageError(f"disk {disk_id} of VM {record.id} is volatile: no image datastore could take it")
            original = self._state.get(Image, disk.image_id)
            new = self._front_end.images.reserve(image, original, disk.size, record.id, disk_id)
            stopped = record.state == STOPPED
            operation = "disk-saveas stopped" if stopped else "disk-saveas"
            return Operation(operation, at_front_end=stopped, disk_id=disk_id, image_id=new.id)

        return self._engine.operate(self.get(vm), "disk-saveas", begin)

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
        record.history.append(stay)
        return Operation(operation)
