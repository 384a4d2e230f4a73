"""The contract of transfer manager actions: their arguments in both forms, and what a recipe is given of them.

A recipe is a function named as the action, with parameters named as in `ACTIONS`:

    @tm.action
    def clone(image: tm.Location, disk: tm.Location, vm: tm.VM) -> None: ...

docs/contract.md, "Transfer manager actions".
"""

from __future__ import annotations

import contextlib
import os
import sys

from madrigal import action as action_layer
from madrigal import messages, running
from madrigal.errors import ConfigError, NotFound, NotSupported, UsageError
from madrigal.location import Location
from madrigal.onhost import filesystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from madrigal import dump
    from madrigal.transfer import Size

__all__ = ["VM", "Location", "action"]

MIB = 1 << 20
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
}

_SHOWN = {
    "image": "[FE:]SOURCE",
    "disk": "HOST:DISK",
    "source": "HOST:PATH",
    "target": "HOST:PATH",
    "size": "SIZE_MB",
    "format": "FORMAT",
    "snapshot": "SNAPSHOT_ID",
    "files": "FILE...",
}


class VM:
    """The VM an action is for; what its id alone does not tell is asked of the front-end, once, when needed.

    In the 3.4 form `id` and `ds_id` are None and there is nobody to ask.
    """

    def __init__(self, vm_id: int | None, ds_id: int | None) -> None:
        self.id = vm_id
        self.ds_id = ds_id
        self._known: dump.VM | None = None

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
        if self.is_current or not datastore.isdigit():
            return Location(disk.host, image.path)
        return Location(disk.host, f"{os.path.dirname(os.path.dirname(disk.dir))}/{datastore}/{name}")

    @property
    def source_is_dead(self) -> bool:
        """Whether the VM migrates away from a host that is not there any more (PROLOG_MIGRATE_UNKNOWN)."""
        return self.is_current and self.info().lcm_state in (60, 61)

    def check_saved(self, snapshot: int) -> None:
        """Raise NotSupported unless the current state of a disk that nobody writes is to be saved."""
        if snapshot >= 0:
            raise NotSupported("saving a snapshot is not supported by this driver yet: save the disk's current state")
        if self.info().lcm_state == 26:
            raise NotSupported("saving a disk of a running VM is not supported by this driver yet: power it off first")

    def empty_disk(self, format: str, disk: Location) -> tuple[str, str]:
        """(format of the image, file system or `swap` to make in it) of a volatile disk that is asked for as FORMAT."""
        known = ("raw", "qcow2", "swap") if self.is_current else ("raw", *filesystem.KNOWN)
        if format not in known:
            raise UsageError(f"'{format}' is not a format for an empty disk; known are {', '.join(known)}")
        if format == "swap" or not self.is_current:
            return "raw", "" if format == "raw" else format
        described = self.disk(disk)
        return format, described.fs if described else ""

    def is_qcow2(self, disk: Location) -> bool:
        """Whether the front-end says that the disk is qcow2 (nobody asks the disk: a guest writes it)."""
        known = self.disk(disk)
        return known is not None and known.format == "qcow2"

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
    if is_current:
        vm = VM(*(_number(text, what) for text, what in zip(argv[-2:], ("VMID", "DSID"), strict=True)))
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
            given[word] = _number(text, word, 1 if word == "size" else -1 if name == "cpds" else 0)
        elif word == "format":
            given[word] = text
        else:
            given[word] = Location.of_image(text) if word == "image" else Location.parse(text)
            _check(word, given[word], vm)
    return given


def _form(name: str, argv: list[str]) -> str:
    words, (fewest, most) = ACTIONS[name][0].split(), ACTIONS[name][1]
    current = len(words) + 2
    if name == "context":
        # The disk comes last in 3.4, before two numbers today.
        is_current = len(argv) >= current and argv[-1].isdigit() and argv[-2].isdigit()
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


def _number(text: str, what: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= MOST or not text.lstrip("-").isdigit():
        raise UsageError(f"{what} is '{text[:40]}', expected a whole number from {least} to {MOST}")
    return number


def _check(word: str, place: Location, vm: VM) -> None:
    """What a place may be, so that a slip in a front-end does not remove or overwrite something else."""
    if word == "image":
        return
    if word == "disk":
        if (place.disk_id is None and place.name not in ("kernel", "initrd")) or place.path.count("/") < 3:
            raise UsageError(f"'{place}' is not a disk, expected HOST:DATASTORE/VM/disk.N")
    elif place.disk_id is None and (not place.name.isdigit() or (vm.id is not None and int(place.name) != vm.id)):
        of = f" of VM {vm.id}" if vm.id is not None else ""
        raise UsageError(f"'{place}' is neither a disk nor a VM directory{of}, whose last part is the VM's id")


def _synopses(name: str) -> list[str]:
    words, (fewest, most) = ACTIONS[name]
    plain = " ".join(_SHOWN[word] for word in words.split())
    old = [f"{name} {plain}{' [SIZE]' if most == fewest + 1 else ''}"] if most > 0 else []
    return [f"{name} {plain} VMID DSID", *old]


def _usage(name: str) -> str:
    about = (sys.modules["__main__"].__doc__ or "").strip()
    lines = [about, "", f"usage: {_synopses(name)[0]}"]
    lines += [f"       {old}   (3.4)" for old in _synopses(name)[1:]]
    return "\n".join([*lines, "", *action_layer.NOTES])
