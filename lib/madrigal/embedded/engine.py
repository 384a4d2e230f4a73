"""The running of operations on VMs: phase by phase, each of which can fail, be cut off, be repeated, be given up."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from madrigal.embedded.lifecycle import OPERATIONS, Line, Phase, Plan
from madrigal.embedded.records import (
    ACTIVE,
    AT_FRONT_END,
    CLEANUP_DELETE,
    DONE,
    PENDING,
    RUNNING,
    VM,
    Datastore,
    Disk,
    Image,
    Operation,
    printable,
)
from madrigal.embedded.run import ActionFailed
from madrigal.embedded.snapshots import Snapshots
from madrigal.errors import MadrigalError, NotFound

if TYPE_CHECKING:
    from madrigal.embedded.front_end import FrontEnd

# HISTORY/ACTION, by which a driver can tell why it is called.  What is done to a powered-off VM is the same action.
_ACTIONS = {"migrate": 1, "migrate live": 2, "shutdown": 3, "undeploy": 5, "stop": 9, "resume": 11, "start": 11}
_ACTIONS.update({"delete": 13, "attach": 21, "detach": 22, "snapshot-create": 25, "snapshot-delete": 26})
_ACTIONS.update({"terminate": 27, "resize": 29, "disk-saveas": 40, "snapshot-revert": 41})


class Engine:
    """A VM is locked while something is done to it, and its record says what, so that it can be done again."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._state = front_end.state
        self._sequences = OPERATIONS[front_end.layout.contract]

    def operate(self, vm: VM, operation: str, begin: Callable[[VM], Operation]) -> VM:
        """Run the phases of what BEGIN returns after it has checked and changed the VM."""
        with self._state.lock(vm, f"vm {operation}"):
            with self._state.transaction():
                vm = self._state.get(VM, vm.id)
                before, interrupted = [vm.state, vm.lcm_state], vm.operation
                started = vm.operation = begin(vm)
                started.before = started.before or before
                phases = self._sequences[started.name].phases
                if vm.history:
                    name = started.name
                    vm.history[-1].action = _ACTIONS.get(name, _ACTIONS.get(name.partition(" ")[0], 0))
                vm.state, vm.lcm_state = ACTIVE, phases[started.phase].lcm_state
                self._state.save(vm)
            if interrupted and started.name == "migrate live" and not started.phase:
                # Premigrate again could remove what the hypervisor has moved: it counts as failed, as an oned's
                # operator would have it.
                self._give_up(vm, started)
                self._state.save(vm)
                return vm
            for index in range(started.phase, len(phases)):
                started.phase = index
                self._phase(vm, started, phases[index])
            self._finish(vm, started)
            return vm

    def _phase(self, vm: VM, operation: Operation, phase: Phase) -> None:
        vm.lcm_state, operation.failed, vm.error = phase.lcm_state, False, ""
        self._state.save(vm)
        try:
            self._prepare(vm, operation, phase)
            failures = self._script(vm, phase.script, phase.lines(self._plan(vm)), phase.lines is Plan.postmigrate)
            if phase.lines is Plan.premigrate:
                self._move_running(vm, operation)
            for failure in failures:  # the VM is at its new place, whatever is left at the old one
                self._front_end.observer.warn(failure)
        except BaseException as error:
            vm.lcm_state, operation.failed = phase.failure, True
            what = "Error executing image transfer script: " if phase.script else ""
            vm.error = what + (printable(str(error)) or "interrupted")
            self._give_up(vm, operation)
            self._state.save(vm)
            if not isinstance(error, ActionFailed):
                raise
            hint = f"{vm.status}: 'madrigal vm recover {vm.id} --retry' tries again" if vm.operation else "as before"
            raise ActionFailed(f"{error}; VM {vm.id} is {hint}") from None

    def _move_running(self, vm: VM, operation: Operation) -> None:
        """Have the hypervisor move a running VM; without one there is shared storage and nothing to do."""
        if not operation.hypervisor:
            return
        stay, host = vm.history[-1], vm.history[-2].host
        directory = self._plan(vm).here.split(":", 1)[1]
        arguments = ("migrate", host, stay.host, directory, str(vm.id))
        self._front_end.hypervisor(operation.hypervisor, arguments, self._front_end.vm_document(vm))

    def _prepare(self, vm: VM, operation: Operation, phase: Phase) -> None:
        """Make what has to be there before the lines of PHASE are known."""
        os.makedirs(self._front_end.layout.vm_files(vm.id), exist_ok=True)
        if phase.lines in (Plan.prolog, Plan.context):
            self._write_context(vm)
        if phase.lines is Plan.save_as and not operation.source and operation.image_id is not None:
            image = self._state.get(Image, operation.image_id)
            operation.source = self._front_end.images.make_reserved(image).source
            self._state.save(vm)

    def _plan(self, vm: VM) -> Plan:
        datastores = {datastore.id: datastore for datastore in self._state.all(Datastore)}
        return Plan(vm, self._front_end.layout, datastores)

    def _script(self, vm: VM, step: str, lines: list[Line], goes_on: bool = False) -> list[str]:
        """Run LINES, kept as transfer.SEQ.STEP if STEP is not ""; stops at the first failure unless it GOES_ON.

        Returns the failures it went on after.
        """
        failures = []
        if step:
            file = f"{self._front_end.layout.vm_files(vm.id)}/transfer.{vm.history[-1].seq}.{step}"
            with open(file, "w", encoding="utf-8") as script:
                script.writelines(f"{line}\n" for line in lines)
        for line in lines:
            # PREMIGRATE, POSTMIGRATE, FAILMIGRATE
            stdin = base64.b64encode(self._front_end.vm_document(vm)) if line.verb.endswith("MIGRATE") else b""
            try:
                self._front_end.transfer(line, stdin)
            except MadrigalError as error:
                if not goes_on:
                    raise
                failures.append(printable(str(error)))
        return failures

    def _write_context(self, vm: VM) -> None:
        if vm.context_disk is None:
            return
        lines = ["# Context variables, written by the front-end"]
        for key, value in sorted(vm.context.items()):
            if self._front_end.layout.contract == "3.4":  # it escapes nothing
                lines.append(f'{key}="{value}"')
            else:
                escaped = value.replace("'", "'\\''")
                lines.append(f"{key}='{escaped}'")
        with open(f"{self._front_end.layout.vm_files(vm.id)}/context.sh", "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def _give_up(self, vm: VM, operation: Operation) -> None:
        """Operations on a disk are not kept for another try: their VM is as before."""
        name = operation.name.partition(" ")[0]
        if operation.name == "migrate live":
            for failure in self._script(vm, "", self._plan(vm).failmigrate(), goes_on=True):
                self._front_end.observer.warn(failure)
            vm.history.pop()
            vm.history[-1].etime, vm.system_ds = 0, vm.history[-1].system_ds
        elif name == "attach":
            vm.disks = [disk for disk in vm.disks if disk.id != operation.disk_id]
        elif operation.image_id is not None:
            self._front_end.images.finish(operation.image_id, vm.error)
        elif name == "resize":
            disk = vm.disk(operation.disk_id)
            disk.size, disk.previous_size = disk.previous_size or disk.size, None
        elif name == "snapshot-create":
            _snapshots(vm, operation).remove(operation.snapshot_id or 0)
        elif name not in ("detach", "snapshot-revert", "snapshot-delete", "start"):
            return
        self._arrive_at(vm, operation)

    def _finish(self, vm: VM, operation: Operation) -> None:
        name = operation.name.partition(" ")[0]
        if name == "detach":
            self._saved(vm.disk(operation.disk_id))
            vm.disks = [disk for disk in vm.disks if disk.id != operation.disk_id]
        elif operation.image_id is not None:
            self._front_end.images.finish(operation.image_id)
        elif name.startswith("snapshot-"):
            self._changed_snapshots(vm, operation, name)
        elif name == "resize":
            vm.disk(operation.disk_id).previous_size = None
        self._arrive_at(vm, operation)
        if vm.state == DONE:
            for disk in vm.disks:
                self._saved(disk)
            self._end(vm)
        self._state.save(vm)

    def _changed_snapshots(self, vm: VM, operation: Operation, name: str) -> None:
        disk, snapshots, ident = vm.disk(operation.disk_id), _snapshots(vm, operation), operation.snapshot_id or 0
        if name == "snapshot-delete":
            snapshots.remove(ident)
        else:
            snapshots.activate(ident, revert=name == "snapshot-revert")
            if name == "snapshot-revert":
                disk.size = snapshots.get(ident).size
        if disk.image_id is None or disk.datastore_id is None or not disk.save or disk.tm_mad_system:
            return
        if self._state.get(Datastore, disk.datastore_id).template.get("LN_TARGET") == "NONE":
            self._keep_in_image(disk)  # the disk is the image

    def _arrive_at(self, vm: VM, operation: Operation) -> None:
        sequence = self._sequences[operation.name]
        vm.state, vm.lcm_state, vm.operation = sequence.state or 0, sequence.lcm_state, None
        if sequence.state is None or (operation.name == "start" and vm.error):
            vm.state, vm.lcm_state = operation.before

    def _saved(self, disk: Disk) -> None:
        """The content of DISK is in its image now."""
        if disk.save_as is not None:
            self._front_end.images.finish(disk.save_as)
        elif disk.save and disk.image_id is not None:
            self._keep_in_image(disk)

    def _keep_in_image(self, disk: Disk) -> None:
        """The image of a persistent disk gets its size and its snapshots."""
        with self._state.transaction():
            image = self._state.get(Image, disk.image_id or 0)
            image.size = disk.size
            kept = disk.attributes.get("PERSISTENT_SNAPSHOTS", "YES").upper() != "NO"
            image.snapshots = disk.snapshots if kept and disk.snapshots and disk.snapshots.all else None
            self._state.save(image)

    def _end(self, vm: VM) -> None:
        vm.state, vm.lcm_state, vm.operation = DONE, 0, None
        vm.etime = int(time.time())
        if vm.history:
            vm.history[-1].etime = vm.etime

    def delete(self, vm: VM) -> VM:
        """Remove a VM in any state without saving anything; raises ActionFailed, the VM gone, if something is left."""
        with self._state.lock(vm, "vm delete"):
            vm = self._state.get(VM, vm.id)
            if vm.state == DONE:
                raise NotFound(f"VM {vm.id} is done already")
            step, places = self._remains(vm)
            if vm.state == ACTIVE and vm.lcm_state == RUNNING and self._front_end.layout.contract != "3.4":
                step = ""  # today a VM that may be running is cleaned up around the hypervisor action
            if vm.state != PENDING:
                vm.operation = vm.operation or Operation("delete", at_front_end=vm.state in AT_FRONT_END)
                vm.state, vm.lcm_state = ACTIVE, CLEANUP_DELETE
                vm.history[-1].action = _ACTIONS["delete"]
                self._state.save(vm)
            lines = [line for place in places for line in self._plan(vm).delete(place)]
            failures = self._script(vm, step, lines, goes_on=True)
            abandoned = f"VM {vm.id} was deleted before its disk was saved"
            for disk in vm.disks:
                if disk.save_as is not None:
                    self._front_end.images.finish(disk.save_as, abandoned)
            if vm.operation and vm.operation.image_id is not None:
                self._front_end.images.finish(vm.operation.image_id, abandoned)
            self._end(vm)
            vm.error = "; ".join(failures)
            self._state.save(vm)
        if failures:
            raise ActionFailed(f"VM {vm.id} is deleted, but something of it may be left: {vm.error}")
        return vm

    def _remains(self, vm: VM) -> tuple[str, list[str]]:
        """The name of the transfer script, and the places where something of the VM may be."""
        if vm.state == PENDING:
            return "", []
        plan, operation = self._plan(vm), vm.operation
        if vm.state in AT_FRONT_END or (operation and operation.at_front_end):
            return "delete", [plan.front_end]
        name = operation.name.partition(" ")[0] if operation else ""
        if name == "migrate":
            return "delete_both", [plan.here, plan.before]
        if name in ("stop", "undeploy", "resume"):
            return "delete_both", [plan.here, plan.front_end]
        return "delete", [plan.here]


def _snapshots(vm: VM, operation: Operation) -> Snapshots:
    snapshots = vm.disk(operation.disk_id).snapshots
    assert snapshots is not None, "an operation on a snapshot begins with one"
    return snapshots
