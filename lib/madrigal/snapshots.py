"""The snapshots of a VM's disk on the machine that has it."""

from __future__ import annotations

from madrigal import transfer
from madrigal.errors import InUse
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Guest = dict[str, Any]


def mend(disk: Location, image: Location | None, running: bool = False) -> None:
    """Let DISK be the link to IMAGE again that it should be, if it should, and the image hold what the disk does.

    The stock drivers put a file in place of the link when they revert; snapshots are the image's.  Of a VM that is
    RUNNING the disk stays: raises InUse.
    """
    if image is None:
        return
    state = {"format": "raw", "snapshot": -1, "image": image.path}
    if not running:
        transfer.bring_back(disk, image, state)
        return
    with Host(disk.host).session() as session:
        if not session.call("give_back", path=disk.path, target=image.path, state=state)["moved"]:
            raise InUse(f"{disk} is not a link to {image}, which has its snapshots: power the VM off, then try again")


def create(disk: Location, snapshot: int, chained: bool, guest: Guest | None = None) -> None:
    """Make SNAPSHOT of what DISK holds now.

    CHAINED: whether the driver keeps the snapshots of such disks as overlays on one another, and not as copies.
    GUEST: the VM, if it runs.
    """
    done = _act("snap_create", disk, snapshot, chained, guest=guest)
    log(f"made snapshot {snapshot} of {disk}" if done else f"snapshot {snapshot} of {disk} was made before")


def revert(disk: Location, snapshot: int, chained: bool) -> None:
    """Let DISK hold what SNAPSHOT does; raises NotFound if there is none."""
    _act("snap_revert", disk, snapshot, chained)
    log(f"reverted {disk} to snapshot {snapshot}")


def delete(disk: Location, snapshot: int, chained: bool, guest: Guest | None = None) -> None:
    """Remove SNAPSHOT, which may be gone already; DISK and its other snapshots hold what they held."""
    done = _act("snap_delete", disk, snapshot, chained, guest=guest)
    log(f"removed snapshot {snapshot} of {disk}" if done else f"snapshot {snapshot} of {disk} was gone already")


def _act(method: str, disk: Location, snapshot: int, chained: bool, **more: Guest | None) -> bool:
    with Host(disk.host).session() as session:
        session.tell("hold", path=disk.dir)
        session.tell(method, path=disk.path, snapshot=snapshot, chained=chained, **more)
        return bool(session.done()[1])
