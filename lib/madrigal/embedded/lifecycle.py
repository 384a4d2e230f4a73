"""Which transfer lines a front-end has executed at which event of a VM's life, in both contract forms.

A line is `VERB tm_mad argument...`, with arguments as in docs/contract.md, "Transfer manager actions"; the lines of an
event are one transfer script, except where today's front-end runs them around an action of the hypervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from madrigal.embedded.records import (
    ACTIVE,
    DONE,
    MIGRATE,
    POWEROFF,
    RUNNING,
    STOPPED,
    UNDEPLOYED,
    VM,
    Datastore,
    Disk,
    History,
)


class Line(NamedTuple):
    """A line of a transfer script; the verb may carry the driver of the system datastore: `CLONE.ssh`."""

    verb: str
    tm_mad: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.verb, self.tm_mad, *self.arguments))


@dataclass(frozen=True)
class Layout:
    """Where a front-end has things.  VAR is `$VAR`; DATASTORES is DATASTORE_LOCATION."""

    contract: str
    var: str
    datastores: str
    front_end: str

    def base_path(self, datastore_id: int) -> str:
        """A datastore's directory on the front-end."""
        root = f"{self.var}/datastores" if self.contract == "3.4" else self.datastores
        return f"{root}/{datastore_id}"

    def vm_files(self, vm_id: int) -> str:
        """Where a VM's transfer scripts and context.sh lie on the front-end."""
        return f"{self.var}/{vm_id}" if self.contract == "3.4" else f"{self.var}/vms/{vm_id}"

    def at_host(self, vm: VM, stay: History) -> str:
        """The VM directory of STAY as `HOST:DIRECTORY`."""
        return f"{stay.host}:{stay.datastores}/{stay.system_ds}/{vm.id}"

    def at_front_end(self, vm: VM) -> str:
        return f"{self.front_end}:{self.base_path(vm.system_ds)}/{vm.id}"


class Plan:
    """The lines of one VM at this moment of its life."""

    def __init__(self, vm: VM, layout: Layout, datastores: Mapping[int, Datastore]) -> None:
        self.vm = vm
        self._layout = layout
        self._old = layout.contract == "3.4"
        self._system_tm = datastores[vm.system_ds].tm_mad

    # Where the VM is

    @property
    def here(self) -> str:
        return self._layout.at_host(self.vm, self.vm.history[-1])

    @property
    def before(self) -> str:
        """The VM directory on the host it comes from."""
        return self._layout.at_host(self.vm, self.vm.history[-2])

    @property
    def front_end(self) -> str:
        return self._layout.at_front_end(self.vm)

    @property
    def place(self) -> str:
        """Where the disks are when an operation starts."""
        operation = self.vm.operation
        return self.front_end if operation and operation.at_front_end else self.here

    # The words of a line

    def _ids(self, disk: Disk | None = None) -> tuple[str, ...]:
        """`vmid dsid`, with the image datastore for an image's disk and the system datastore for the rest."""
        if self._old:
            return ()
        of_image = disk is not None and disk.datastore_id is not None
        return str(self.vm.id), str(disk.datastore_id if disk and of_image else self.vm.system_ds)

    def _tm(self, disk: Disk) -> str:
        return disk.tm_mad or self._system_tm

    @staticmethod
    def _at(place: str, disk_id: int | None) -> str:
        return f"{place}/disk.{disk_id}"

    @staticmethod
    def _suffixed(verb: str, disk: Disk) -> str:
        return f"{verb}.{disk.tm_mad_system}" if disk.tm_mad_system else verb

    def _per_disk(self, verb: str) -> Iterator[tuple[str, Disk]]:
        """VERB for each disk that has a driver of its own; 3.4 gives volatile disks none.

        In these loops oned does not clear the suffix: once one disk has it, all later disks have it too.
        """
        suffix = ""
        for disk in self.vm.disks:
            if disk.tm_mad_system:
                suffix = "." + disk.tm_mad_system
            if disk.tm_mad or not self._old:
                yield verb + suffix, disk

    # The lines of an event

    def _provide(self, disk: Disk) -> Line:
        target = self._at(self.here, disk.id)
        if disk.type == "swap":
            return Line("MKSWAP", self._system_tm, (str(disk.size), target, *self._ids()))
        if disk.type == "fs":
            # 3.4's FORMAT is the name of a file system, today's the format of the file (FS is asked for).
            form = disk.fs or disk.format if self._old else disk.format
            return Line("MKIMAGE", self._system_tm, (str(disk.size), form, target, *self._ids()))
        # A source with a colon (an IQN, a URL) is passed on as it is.
        source = disk.source if ":" in disk.source else f"{self._layout.front_end}:{disk.source}"
        size = (str(disk.asked_size),) if self._old and disk.asked_size else ()
        verb = self._suffixed("CLONE" if disk.clone else "LN", disk)
        return Line(verb, disk.tm_mad, (source, target, *size, *self._ids(disk)))

    def _release(self, disk: Disk) -> Line | None:
        at = self._at(self.place, disk.id)
        if disk.save:
            source = disk.save_as_source or disk.source
            return Line(self._suffixed("MVDS", disk), disk.tm_mad, (at, source, *self._ids(disk)))
        if self._old and not disk.tm_mad:
            return None
        return Line(self._suffixed("DELETE", disk), self._tm(disk), (at, *self._ids(disk)))

    def prolog(self) -> list[Line]:
        lines = [self._provide(disk) for disk in self.vm.disks]
        return lines + self.context() if self._old else lines

    def context(self) -> list[Line]:
        if self.vm.context_disk is None:
            return []
        files = (f"{self._layout.vm_files(self.vm.id)}/context.sh", *self.vm.context_files)
        target = self._at(self.here, self.vm.context_disk)
        return [Line("CONTEXT", self._system_tm, (*files, target, *self._ids()))]

    def _move(self, origin: str, target: str) -> list[Line]:
        lines = [
            Line(verb, self._tm(disk), (self._at(origin, disk.id), self._at(target, disk.id), *self._ids(disk)))
            for verb, disk in self._per_disk("MV")
        ]
        return [*lines, Line("MV", self._system_tm, (origin, target, *self._ids()))]

    def stop(self) -> list[Line]:
        return self._move(self.here, self.front_end)

    def resume(self) -> list[Line]:
        return self._move(self.front_end, self.here)

    def migrate(self) -> list[Line]:
        return self._move(self.before, self.here)

    def epilog(self) -> list[Line]:
        lines = [line for disk in self.vm.disks if (line := self._release(disk))]
        return [*lines, Line("DELETE", self._system_tm, (self.place, *self._ids()))]

    def delete(self, place: str) -> list[Line]:
        """The lines that remove the VM from PLACE without saving anything."""
        lines = [
            Line(verb, self._tm(disk), (self._at(place, disk.id), *self._ids(disk)))
            for verb, disk in self._per_disk("DELETE")
        ]
        return [*lines, Line("DELETE", self._system_tm, (place, *self._ids()))]

    def _disk(self) -> Disk:
        assert self.vm.operation
        return self.vm.disk(self.vm.operation.disk_id)

    def attach(self) -> list[Line]:
        return [self._provide(self._disk())]

    def detach(self) -> list[Line]:
        line = self._release(self._disk())
        return [line] if line else []

    def save_as(self) -> list[Line]:
        assert self.vm.operation
        disk, snapshot = self._disk(), self.vm.operation.snapshot_id
        which = "-1" if snapshot is None else str(snapshot)
        arguments = (self._at(self.place, disk.id), self.vm.operation.source, which, *self._ids(disk))
        return [Line(self._suffixed("CPDS", disk), disk.tm_mad, arguments)]

    def _snapshot(self, verb: str) -> list[Line]:
        assert self.vm.operation
        disk = self._disk()
        arguments = (self._at(self.place, disk.id), str(self.vm.operation.snapshot_id), *self._ids(disk))
        return [Line(self._suffixed(verb, disk), disk.tm_mad, arguments)]

    def snapshot_create(self) -> list[Line]:
        return self._snapshot("SNAP_CREATE")

    def snapshot_create_live(self) -> list[Line]:
        return self._snapshot("SNAP_CREATE_LIVE")

    def snapshot_revert(self) -> list[Line]:
        return self._snapshot("SNAP_REVERT")

    def snapshot_delete(self) -> list[Line]:
        return self._snapshot("SNAP_DELETE")

    def resize(self) -> list[Line]:
        disk = self._disk()
        arguments = (self._at(self.place, disk.id), str(disk.size), *self._ids(disk))
        return [Line(self._suffixed("RESIZE", disk), self._tm(disk), arguments)]

    # A running VM migrates: only the driver of the system datastore is called, with the VM's document on stdin.

    def _around_migration(self, verb: str) -> list[Line]:
        target, directory = self.here.split(":", 1)
        return [Line(verb, self._system_tm, (self.vm.history[-2].host, target, directory, *self._ids()))]

    def premigrate(self) -> list[Line]:
        return self._around_migration("PREMIGRATE")

    def postmigrate(self) -> list[Line]:
        return self._around_migration("POSTMIGRATE")

    def failmigrate(self) -> list[Line]:
        return self._around_migration("FAILMIGRATE")


class Phase(NamedTuple):
    """Part of an operation: the LCM_STATE during it and after its failure, the name of its transfer script."""

    lcm_state: int
    failure: int
    script: str
    """"" where the lines are run around a hypervisor action, without a script."""
    lines: Callable[[Plan], list[Line]]


class Sequence(NamedTuple):
    """The phases of an operation, and STATE and LCM_STATE after the last; without, they are as before the first."""

    phases: tuple[Phase, ...]
    state: int | None = None
    lcm_state: int = 0


def _around(lcm_state: int, lines: Callable[[Plan], list[Line]], script: str = "") -> Sequence:
    """An operation on one disk, after whose end or failure the VM is in the state that it was in."""
    return Sequence((Phase(lcm_state, lcm_state, script, lines),))


# In today's form: what the operation does to a VM that runs, is powered off (" off"), or whose disks are on the
# front-end.  Where no hypervisor runs VMs, one that is deployed is as good as powered off.
_DISKS = {
    "attach": _around(17, Plan.attach),
    "attach off": _around(33, Plan.attach, "prolog_attach"),
    "detach": _around(17, Plan.detach),
    "detach off": _around(34, Plan.detach, "epilog_detach"),
    "disk-saveas": _around(26, Plan.save_as, "disk_saveas"),
    "disk-saveas off": _around(27, Plan.save_as, "disk_saveas"),
    "disk-saveas undeployed": _around(67, Plan.save_as, "disk_saveas"),
    "disk-saveas stopped": _around(68, Plan.save_as, "disk_saveas"),
    "snapshot-create": _around(57, Plan.snapshot_create_live),
    "snapshot-create off": _around(51, Plan.snapshot_create, "disk_snapshot"),
    "snapshot-revert off": _around(52, Plan.snapshot_revert, "disk_snapshot"),
    "snapshot-delete": _around(59, Plan.snapshot_delete, "disk_snapshot"),
    "snapshot-delete off": _around(53, Plan.snapshot_delete, "disk_snapshot"),
    "resize": _around(62, Plan.resize),
    "resize off": _around(63, Plan.resize, "disk_resize"),
    "resize undeployed": _around(64, Plan.resize, "disk_resize"),
}
_EPILOG = Sequence((Phase(11, 40, "epilog", Plan.epilog),), DONE)
_STOP = Sequence((Phase(10, 41, "stop", Plan.stop),), STOPPED)
_UNDEPLOY = Sequence((Phase(30, 42, "stop", Plan.stop),), UNDEPLOYED)
_PROLOG = Phase(1, 39, "prolog", Plan.prolog)
_RESUME = Phase(9, 49, "resume", Plan.resume)
_REDEPLOY = Phase(31, 50, "resume", Plan.resume)
_MIGRATE = Phase(8, 38, "migrate", Plan.migrate)

OPERATIONS: dict[str, dict[str, Sequence]] = {
    "3.4": {
        "deploy": Sequence((_PROLOG,), ACTIVE, RUNNING),
        "stop": _STOP,
        "resume": Sequence((_RESUME,), ACTIVE, RUNNING),
        "migrate": Sequence((_MIGRATE,), ACTIVE, RUNNING),
        "shutdown": _EPILOG,
    },
    "current": {
        # CONTEXT belongs to the boot of the VM, after each of these.
        "deploy": Sequence((_PROLOG, Phase(2, 36, "", Plan.context)), ACTIVE, RUNNING),
        "stop": _STOP,
        "resume": Sequence((_RESUME, Phase(22, 48, "", Plan.context)), ACTIVE, RUNNING),
        "undeploy": _UNDEPLOY,
        "resume undeployed": Sequence((_REDEPLOY, Phase(32, 47, "", Plan.context)), ACTIVE, RUNNING),
        "start": Sequence((Phase(20, 20, "", Plan.context),), ACTIVE, RUNNING),
        "migrate": Sequence((_MIGRATE, Phase(35, 37, "", Plan.context)), ACTIVE, RUNNING),
        "migrate off": Sequence((Phase(43, 44, "migrate", Plan.migrate),), POWEROFF),
        "migrate live": Sequence(
            (Phase(MIGRATE, MIGRATE, "", Plan.premigrate), Phase(MIGRATE, MIGRATE, "", Plan.postmigrate)),
            ACTIVE,
            RUNNING,
        ),
        "shutdown": _EPILOG,
        "terminate": _EPILOG,
        **_DISKS,
    },
}
