"""The contract of a transfer driver's backup actions, whose arguments are unlike those of its others.

A recipe is a function of a request, named as the action, or serving any of them:

    @backup.action
    def restore(request: backup.Request) -> None: ...

docs/contract.md, "Backups".
"""

from __future__ import annotations

import os
import re
import sys

from madrigal import action as action_layer
from madrigal import messages, tm
from madrigal.errors import NotSupported, UsageError
from madrigal.location import Location

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

ACTIONS = {
    **dict.fromkeys(
        ("prebackup", "prebackup_live", "postbackup", "postbackup_live"),
        "HOST:DIR DISK_ID:... DEPLOY_ID JOB_ID|- VMID DSID < VM",
    ),
    "restore": "HOST:DIR VMID IMAGE_ID INCREMENT_ID DISK_ID",
}
"""Action: its arguments, and whether the VM's description, as it is, comes on stdin.  Only today's form has them."""


class Request:
    """One backup action of the VM `vm_id`."""

    def __init__(self, action: str, vm_id: int) -> None:
        self.action = action
        self.vm_id = vm_id

    def unsupported(self) -> NoReturn:
        """Say that the driver has no backups, and what to do without them."""
        driver = os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0])))
        what, instead = "backed up", "save its disks as images (disk-saveas), or back it up from inside"
        if self.action == "restore":
            what, instead = "restored in place", "restore it as images in a datastore whose driver reads backups"
        raise NotSupported(
            f"VM {self.vm_id} cannot be {what}: backups are not supported by the driver {driver} yet; {instead}"
        )


def action(recipe: Callable[[Request], None]) -> Callable[[], NoReturn]:
    """Make the executable's main function of RECIPE."""
    own, called = recipe.__name__, messages.name().partition(".")[0]
    name = own if own in ACTIONS or called not in ACTIONS else called
    return lambda: action_layer.run(lambda: recipe(parse(name, sys.argv[1:])), lambda: _usage(name))


def parse(name: str, argv: list[str]) -> Request:
    """The request of action NAME; raises UsageError."""
    if name not in ACTIONS:
        raise UsageError(f"'{name}' is not a backup action of a transfer driver")
    if name == "restore" and len(argv) == 5:
        directory, vm_id, image, increment, disk = argv
        tm.number(image, "IMAGE_ID")
        tm.number(increment, "INCREMENT_ID", -1)  # -1: the last one
        tm.number(disk, "DISK_ID", -1)  # -1: all
        return Request(name, _vm(directory, vm_id))
    # Where DEPLOY_ID is empty there is one less: the front-end splits its lines at blanks.
    if name == "restore" or len(argv) not in (5, 6):
        raise UsageError(f"{len(argv)} arguments; usage: {name} {ACTIONS[name]}")
    directory, disks, *_, job, vm_id, ds_id = argv
    number = _vm(directory, vm_id)
    tm.number(ds_id, "DSID")
    if job != "-":
        tm.number(job, "JOB_ID")
    if not re.fullmatch("[0-9]+(:[0-9]+)*", disks):
        raise UsageError(f"'{disks[:40]}' is not a list of disks, expected their ids as 0:1:2")
    from madrigal import dump

    known = dump.VM(sys.stdin.buffer.read(dump.MAX_BYTES + 1))
    if known.id != number:
        raise UsageError(f"stdin describes VM {known.id}, not VM {number}")
    return Request(name, number)


def _vm(directory: str, vm_id: str) -> int:
    """The VM's id, with its directory looked at."""
    number = tm.number(vm_id, "VMID")
    if Location.parse(directory).name != str(number):
        raise UsageError(f"'{directory}' is not the directory of VM {number}, whose last part is the VM's id")
    return number


def _usage(name: str) -> str:
    about = (sys.modules["__main__"].__doc__ or "").strip()
    return "\n".join([about, "", f"usage: {messages.name()} {ACTIONS.get(name, '')}", "", *action_layer.NOTES])
