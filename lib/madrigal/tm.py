"""The contract of transfer manager actions: their arguments in both forms, and what a recipe is given of them.

A recipe is a function named as the action, with parameters named as in `ACTIONS`:

    @tm.action
    def clone(image: tm.Location, disk: tm.Location, vm: tm.VM) -> None: ...

docs/contract.md, "Transfer manager actions".
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

from madrigal import action as action_layer
from madrigal import messages, running
from madrigal.config import configuration
from madrigal.errors import ConfigError, MadrigalError, NotFound, NotSupported, UsageError
from madrigal.location import Location, is_host, is_number
from madrigal.onhost import filesystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from madrigal import dump
    from madrigal.transfer import Size, State

    Guest = dict[str, Any]

__all__ = ["VM", "Location", "action"]

MIB = 1 << 20
RUNNING = (26, 57, 59, 62, 69)
"""LCM_STATE of a VM that runs while an action works on it: disk-saveas, a snapshot made or deleted, resize, backup."""
MOST = (1 << 43) - 1  # MiB: a file has at most 8 EiB

# Action: its arguments, then how many 3.4 gives (with and without the `size` its documentation shows); today's form
# has VMID and DSID after them.  The words are the names of a recipe's parameters, as is `vm`.
ACTIONS: dict[str, tuple[str, tuple[int, int]]] = {
    "clone": ("image disk", (2, 3)),
    "ln": ("image disk", (2, 3)),
    "mv": ("source target", (2, 2)),
    "mvds": ("disk image", (2, 2)),
    "cpds": ("disk image snapshot", (0, -1)),
    "delete": ("target", (1, 1)),
    "resize": ("disk size", (0, -1)),
    "snap_create": ("disk snapshot", (0, -1)),
    "snap_create_live": ("disk snapshot", (0, -1)),
    "snap_revert": ("disk snapshot", (0, -1)),
    "snap_delete": ("disk snapshot", (0, -1)),
    "mkimage": ("size format disk", (3, 4)),
    "mkswap": ("size disk", (2, 3)),
    "context": ("files disk", (2, sys.maxsize)),
    "premigrate": ("origin host dir", (0, -1)),
    "postmigrate": ("origin host dir", (0, -1)),
    "failmigrate": ("origin host dir", (0, -1)),
}

# These have the VM's description on stdin, and behind their arguments the driver that calls them, if it is not the
# front-end.  A recipe gets `target`, which is HOST:DIR.
MIGRATIONS = ("premigrate", "postmigrate", "failmigrate")

_SHOWN = {
    "image": "[FE:]SOURCE",
    "disk": "HOST:DISK",
    "source": "HOST:PATH",
    "target": "HOST:PATH",
    "size": "SIZE_MB",
    "format": "FORMAT",
    "snapshot": "SNAPSHOT_ID",
    "files": "FILE...",
    "origin": "SOURCE_HOST",
    "host": "HOST",
    "dir": "DIR",
}


class VM:
    """The VM an action is for; what its id alone does not tell is asked of the front-end, once, when needed.

    In the 3.4 form `id` and `ds_id` are None and there is nobody to ask.
    """

    def __init__(self, vm_id: int | None, ds_id: int | None, told: dump.VM | None = None) -> None:
        self.id = vm_id
        self.ds_id = ds_id
        self._known = told

    @property
    def is_current(self) -> bool:
        """Whether the action was called in today's form."""
        return self.id is not None

    def info(self) -> dump.VM:
        """What the front-end knows of the VM; raises NotFound, HostUnreachable, ..."""
        if self._known is None:
            if self.id is None:
                raise AssertionError("a 3.4 front-end does not say which VM it is")
            from madrigal import frontend

            self._known = frontend.vm(self.id)
        return self._known

    def on_host(self, image: Location, disk: Location) -> Location:
        """Where the machine of DISK, which shares the datastores with the front-end, sees IMAGE.

        At the same path, but in 3.4, where the datastores may be elsewhere on hosts: two levels above the VM
        directory in any case.
        """
        datastore, name = image.dir.rpartition("/")[2], image.name
        if image.is_url:
            return image
        if self.is_current or not is_number(datastore):
            return Location(disk.host, image.path)
        return Location(disk.host, f"{os.path.dirname(os.path.dirname(disk.dir))}/{datastore}/{name}")

    def mount_datastores(self, disk: Location) -> None:
        """Have the machine of DISK mount the datastores of the disk and of its image, where they want that (nfs.py)."""
        system, root = os.path.basename(os.path.dirname(disk.dir)), os.path.dirname(os.path.dirname(disk.dir))
        if self.ds_id is None:
            return
        from madrigal import nfs
        from madrigal.host import Host

        nfs.mount(Host(disk.host), root, [self.ds_id, *([int(system)] if is_number(system) else [])])

    def before(self, origin: str, target: Location) -> Location:
        """Where on the host ORIGIN the directory of the VM is, or was, that comes to TARGET.

        The datastores are where TARGET's is, and which one it was says the last record of the VM's history but one.
        """
        history = self.info().history
        if len(history) < 2 and self.id is not None:
            from madrigal import frontend

            history = frontend.vm(self.id).history  # what came on stdin may have the last record alone
        ds_id = history[-2] if len(history) > 1 else self.ds_id
        return Location(origin, f"{os.path.dirname(os.path.dirname(target.path))}/{ds_id}/{target.name}")

    @property
    def is_resized_by_hypervisor(self) -> bool:
        """Whether the VM runs while its disk is resized."""
        return self.info().lcm_state == 62

    def warn_of_replica(self, disk: Location) -> None:
        """Say in the log if the system datastore of DISK has REPLICA_HOST, which changes nothing here."""
        ds_id = os.path.basename(os.path.dirname(disk.dir))
        if is_number(ds_id):
            self._warn_of("REPLICA_HOST", int(ds_id), disk)

    def warn_of_cache(self, disk: Location) -> None:
        """Say in the log if the image datastore of DISK has CACHE_ENABLE, which changes nothing here."""
        if self.ds_id is not None:
            self._warn_of("CACHE_ENABLE", self.ds_id, disk)

    def _warn_of(self, attribute: str, ds_id: int, disk: Location) -> None:
        if not self.is_current or disk.disk_id is None:
            return
        from madrigal import frontend

        with contextlib.suppress(MadrigalError):  # without an answer the disk can be had all the same
            if frontend.datastore(ds_id).attribute(attribute).lower() not in ("", "no"):
                text = f"{attribute} is not supported by this driver yet; images are copied directly"
                messages.log(text, "WARN")

    @property
    def source_is_dead(self) -> bool:
        """Whether the VM migrates away from a host that is not there any more (PROLOG_MIGRATE_UNKNOWN)."""
        return self.is_current and self.info().lcm_state in (60, 61)

    def state(self, disk: Location, snapshot: int = -1) -> State | None:
        """Which state of a disk, or of its image, is to be copied (-1: the current); None in 3.4 and for a kernel."""
        known = self.disk(disk)
        if known is None:
            return None
        source = Location.of_image(known.persistent_source)
        image = "" if source.is_url or not source.path else self.on_host(source, disk).path
        return {"format": known.format, "snapshot": snapshot, "image": image}

    def source(self, disk: Location) -> str:
        """Where the image datastore has what DISK was made of, "" if the front-end does not say."""
        known = self.disk(disk)
        source = Location.of_image(known.text("SOURCE")) if known else None
        return "" if source is None or source.is_url else source.path

    def linked_image(self, disk: Location) -> Location | None:
        """The image that DISK should be a link to, on shared storage; None for a copy and for a chain.

        A chain has its own links, and a VM in a system datastore of hosts' own storage has copies.
        """
        known = self.disk(disk)
        if known is None or known.format != "raw" or known.text("TM_MAD_SYSTEM") == "ssh":
            return None
        source = Location.of_image(known.persistent_source)
        return None if source.is_url or not source.path else self.on_host(source, disk)

    def saved(self, disk: Location, snapshot: int) -> State:
        """Which state of a disk is to be saved, and if it is the current one of a VM that runs, by whom."""
        state = self.state(disk, snapshot)
        if state is None:
            raise UsageError(f"'{disk}' is not a disk that can be saved, expected HOST:DATASTORE/VM/disk.N")
        return dict(state, guest=self.guest()) if snapshot < 0 else state

    @property
    def runs(self) -> bool:
        """Whether a hypervisor runs the VM while this action works on it."""
        return self.info().lcm_state in RUNNING

    def guest(self, surely: bool = False) -> Guest | None:
        """Who runs the VM while this action works on it, None if nobody does; SURELY: the action is only for such VMs.

        {"uri": libvirt's, "domain": what the VM is called there, "timeout": seconds for one command of virsh}, from
        kvmrc (docs/contract.md, "Disks of a running VM").  Raises NotSupported for another hypervisor.
        """
        return self._guest() if surely or self.runs else None

    def migrating(self) -> Guest | None:
        """Who runs the VM that is about to go elsewhere, if a disk of it can have files that name one another."""
        known = self.info()
        has_chains = any(disk.format == "qcow2" for disk in known.disks)
        return self._guest() if has_chains and known.hypervisor in ("kvm", "qemu") and known.deploy_id else None

    def _guest(self) -> Guest:
        known = self.info()
        if known.hypervisor not in ("kvm", "qemu"):
            name = known.hypervisor or "no hypervisor that the front-end names"
            raise NotSupported(f"VM {self.id} is run by {name}: disks of a running VM can be worked on under kvm alone")
        if not known.deploy_id:
            raise NotFound(f"the front-end does not say what the hypervisor calls VM {self.id}")
        values = configuration("vmm/kvm/kvmrc")
        seconds = values.get("VIRSH_TIMEOUT") or "60"
        if not re.fullmatch("[1-9][0-9]{0,5}", seconds):
            raise ConfigError(f"VIRSH_TIMEOUT of kvmrc is '{seconds}', expected a number of seconds")
        uri = values.get("LIBVIRT_URI") or "qemu:///system"
        return {"uri": uri, "domain": known.deploy_id, "timeout": int(seconds)}

    def empty_disk(self, format: str, disk: Location) -> tuple[str, str]:
        """(format of the image, file system or `swap` to make in it) of a volatile disk that is asked for as FORMAT."""
        known = ("raw", "qcow2", "swap") if self.is_current else ("raw", *filesystem.KNOWN)
        if format not in known:
            raise UsageError(f"'{format}' is not a format for an empty disk; known are {', '.join(known)}")
        if format == "swap" or not self.is_current:
            return "raw", "" if format == "raw" else format
        described = self.disk(disk)
        return format, described.fs if described else ""

    def format(self, disk: Location) -> str:
        """raw or qcow2, as the front-end says: nobody asks the disk, which a guest writes.  In 3.4 all are as raw."""
        known = self.disk(disk)
        return known.format if known else "raw"

    def is_qcow2(self, disk: Location) -> bool:
        return self.format(disk) == "qcow2"

    def is_overlay(self, disk: Location) -> bool:
        """Whether the disk is to lie on its image: it is qcow2, and nobody wants it to be a copy."""
        known = self.disk(disk)
        return known is not None and known.format == "qcow2" and not known.standalone

    def preallocates(self, disk: Location) -> bool:
        """Whether the disk is to have all its room from the beginning (SPARSE=NO)."""
        known = self.disk(disk)
        return known is not None and known.preallocated

    def disk(self, disk: Location) -> dump.Disk | None:
        """What the front-end knows of a disk; None in 3.4 and for what is not `disk.N`."""
        if not self.is_current or disk.disk_id is None:
            return None
        found = self.info().disk(disk.disk_id)
        if found is None:
            raise NotFound(f"VM {self.id} has no disk {disk.disk_id} in the front-end")
        return found

    def size(self, disk: Location) -> Size | None:
        """(format, bytes) the copy of an image grows to; None: as the image."""
        known = self.disk(disk)
        if known is None or not known.size or known.size <= (known.original_size or 0):
            return None
        return known.format, known.size * MIB


def action(recipe: Callable[..., None]) -> Callable[[], NoReturn]:
    """Make the executable's main function of RECIPE, which is named as its action.

    It may be called by the name of another action that has the same arguments; one that wants none, by any.
    """
    called, own = messages.name().partition(".")[0], recipe.__name__
    fits = called in ACTIONS and (not recipe.__code__.co_argcount or ACTIONS[called] == ACTIONS[own])
    return lambda: run(called if fits else own, recipe)


def run(name: str, recipe: Callable[..., None]) -> NoReturn:
    """Run RECIPE as the action NAME with this process's arguments, and end the process."""

    def body() -> None:
        given = parse(name, sys.argv[1:])
        wanted = recipe.__code__.co_varnames[: recipe.__code__.co_argcount]
        with contextlib.ExitStack() as stack:
            for directory in _directories(given):
                running.end(directory) if name == "delete" else stack.enter_context(running.registered(directory))
            recipe(**{parameter: given[parameter] for parameter in wanted})

    action_layer.run(body, lambda: _usage(name))


def _directories(given: dict[str, Any]) -> set[str]:
    """The VM directories of an action: the places themselves, or where the disks are."""
    places = [given[word] for word in ("source", "target", "disk") if word in given]
    return {place.dir if place.disk_id is not None or "disk" in given else place.path for place in places}


def parse(name: str, argv: list[str]) -> dict[str, Any]:
    """The arguments of action NAME by parameter name, for whichever form they have; raises UsageError.

    In the 3.4 form it also sets what goes with it: the umask and the marks around error messages.
    """
    if name not in ACTIONS:
        raise UsageError(f"'{name}' is not an action of a transfer manager driver")
    words = ACTIONS[name][0].split()
    is_current = _form(name, argv) == "current"
    vm = VM(None, None)
    if name in MIGRATIONS:
        return _migration(argv)
    if is_current:
        vm = VM(*_ids(*argv[-2:]))
        argv = argv[:-2]
    else:
        messages.marks = True
        os.umask(0o007)
    given: dict[str, Any] = {"vm": vm}
    if words[0] == "files":
        given["files"], argv, words = argv[:-1], argv[-1:], words[1:]
    for word, text in zip(words, argv, strict=False):  # behind them only the size of 3.4's documentation
        if word in ("size", "snapshot"):
            # -1 is the current state, which can be saved but is no snapshot
            given[word] = number(text, word, 1 if word == "size" else -1 if name == "cpds" else 0)
        elif word == "format":
            given[word] = text
        else:
            given[word] = Location.of_image(text) if word == "image" else Location.parse(text)
            _check(word, given[word], vm)
    return given


def _migration(argv: list[str]) -> dict[str, Any]:
    origin, host, directory = argv[:3]
    vm_id, ds_id = _ids(*argv[3:5])
    for name in (origin, host):
        if not is_host(name):
            raise UsageError(f"'{name}' is not the name of a host")
    target = Location.parse(f"{host}:{directory}")
    if target.name != str(vm_id) or not is_number(os.path.basename(target.dir)):
        raise UsageError(f"'{directory}' is not the directory of VM {vm_id}, expected DATASTORES/DSID/{vm_id}")
    from madrigal import dump

    caller = argv[5] if len(argv) > 5 else ""
    if len(argv) > 5 and not dump.is_mad(caller):
        raise UsageError(f"'{caller[:40]}' is not the name of a transfer driver")
    told = sys.stdin.buffer.read(dump.MAX_BYTES + 1)
    known = dump.VM(dump.decode(told, "the description of the VM"))
    if known.id != vm_id:
        raise UsageError(f"stdin describes VM {known.id}, not VM {vm_id}")
    return {"origin": origin, "target": target, "vm": VM(vm_id, ds_id, known), "caller": caller, "told": told}


def _form(name: str, argv: list[str]) -> str:
    words, (fewest, most) = ACTIONS[name][0].split(), ACTIONS[name][1]
    current = len(words) + 2
    if name in MIGRATIONS and len(argv) == current + 1:
        argv = argv[:-1]
    if name == "context":
        # The disk comes last in 3.4, before two numbers today.
        is_current = len(argv) >= current and is_number(argv[-1]) and is_number(argv[-2])
        is_old = len(argv) >= fewest and not is_current
    else:
        is_current, is_old = len(argv) == current, fewest <= len(argv) <= most
    wanted = os.environ.get("MADRIGAL_CONTRACT", "")
    if wanted not in ("", "3.4", "current"):
        raise ConfigError(f"MADRIGAL_CONTRACT is '{wanted}', expected 3.4 or current")
    if is_current and wanted != "3.4":
        return "current"
    if is_old and wanted != "current":
        return "3.4"
    raise UsageError(f"{len(argv)} arguments; usage: {' or '.join(_synopses(name))}")


def _ids(vm_id: str, ds_id: str) -> tuple[int, int]:
    return number(vm_id, "VMID"), number(ds_id, "DSID")


def number(text: str, what: str, least: int = 0) -> int:
    """The number that the argument WHAT is; raises UsageError if it is none, or less than LEAST."""
    value = int(text) if is_number(text.removeprefix("-")) else least - 1
    if not least <= value <= MOST:
        raise UsageError(f"{what} is '{text[:40]}', expected a whole number from {least} to {MOST}")
    return value


def _check(word: str, place: Location, vm: VM) -> None:
    """What a place may be, so that a slip in a front-end does not remove or overwrite something else."""
    if word == "image":
        return
    if word == "disk":
        if (place.disk_id is None and place.name not in ("kernel", "initrd")) or place.path.count("/") < 3:
            raise UsageError(f"'{place}' is not a disk, expected HOST:DATASTORE/VM/disk.N")
    elif place.disk_id is None and (not is_number(place.name) or (vm.id is not None and int(place.name) != vm.id)):
        of = f" of VM {vm.id}" if vm.id is not None else ""
        raise UsageError(f"'{place}' is neither a disk nor a VM directory{of}, whose last part is the VM's id")


def _synopses(name: str) -> list[str]:
    words, (fewest, most) = ACTIONS[name]
    plain = " ".join(_SHOWN[word] for word in words.split())
    old = [f"{name} {plain}{' [SIZE]' if most == fewest + 1 else ''}"] if most > 0 else []
    return [f"{name} {plain} VMID DSID{' [CALLER] < VM' if name in MIGRATIONS else ''}", *old]


def _usage(name: str) -> str:
    about = (sys.modules["__main__"].__doc__ or "").strip()
    # with the suffix of a system datastore of another driver, which only today's form has
    called = messages.name() if messages.name().startswith(name + ".") else name
    lines = [about, "", f"usage: {called}{_synopses(name)[0][len(name) :]}"]
    lines += [f"       {old}   (3.4)" for old in _synopses(name)[1:] if called == name]
    return "\n".join([*lines, "", *action_layer.NOTES])
