"""A VM goes to another host while it runs: what its directory needs before and after, and the drivers of its disks.

The hypervisor itself brings the disks there.  A directory is removed only when a probe file has shown that it is
not the one the VM has on the other host: two hosts may see one storage, by whatever paths.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

from madrigal import command, deadline
from madrigal.errors import BadImage, ConfigError, MadrigalError, NotSupported
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log, log_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

_TAGGED = re.compile(r"(ERROR|INFO|WARN|DEBUG):\s+(.*)\Z")


def check(origin: str, guest: dict[str, Any] | None) -> None:
    """Raise NotSupported if the GUEST on the host ORIGIN has snapshots that another host could not open.

    Where libvirt does not tell, that is logged: the hypervisor will find out.
    """
    if guest is None:
        return
    with Host(origin).session() as session:
        try:
            session.call("check_names", guest=guest)
        except (NotSupported, BadImage):
            raise
        except MadrigalError as error:
            log(f"not known whether the disks can be opened by their names elsewhere: {error}", "WARN")


def make_room(target: Location, source: Location, monitor: str) -> None:
    """See to it that the VM directory TARGET is not there, so that the hypervisor can bring the VM's from SOURCE.

    Raises ConfigError if both are one place: the hypervisor would copy disks onto themselves.  MONITOR: how the host is
    to monitor the datastore.
    """
    if not remove(target, source, monitor):
        raise ConfigError(
            f"{target} and {source} are one directory on storage that both hosts share: "
            "the system datastore needs a driver for shared storage"
        )


def remove(place: Location, kept: Location, monitor: str | None = None) -> bool:
    """Remove the VM directory PLACE, which may be gone already, but not if it is the directory KEPT; whether it is not.

    With MONITOR, as for make_room(), its datastore is made too.  Raises NotFound if KEPT does not exist, and InUse if
    a VM uses files in PLACE.
    """
    if place == kept:
        return False
    probe = os.urandom(8).hex()
    with Host(place.host).session() as session:
        if monitor is not None:
            session.tell("hold", path=place.path, make="parents")
        there = session.call("offer", path=place.path, probe=probe) is not None
        if there:
            with Host(kept.host).session() as other:
                other.tell("need", path=kept.path, message=f"{kept} does not exist, so {place} stays")
                is_kept = other.call("see", paths=[kept.path], probe=probe)
            session.tell("hide", path=place.path, probe=probe)
            if is_kept:
                log(f"{place} and {kept} are one place, which stays")
                return False
            session.tell("refuse_used", path=place.path)
            session.tell("drop", path=place.path)
        else:
            session.tell("tidy", path=place.path)
        if monitor is not None:
            session.tell("mark", path=f"{place.dir}/.monitor", text=monitor)
    log(f"removed {place}" if there else f"{place} is not there")
    return True


# The front-end runs the system datastore's driver alone.  That runs the same action of the other drivers among MADS,
# with the same arguments and TOLD as stdin; who is called is told who calls (CALLER), and passes nothing on.


def pass_on(mads: Sequence[str], told: bytes, caller: str) -> None:
    """Prepare the disks of other drivers too; raises MadrigalError if one cannot, with the others taken back."""
    done: list[str] = []
    for driver in _others(mads, caller):
        try:
            _call(driver, told)
        except BaseException:
            _take_back(done, told)
            raise
        done.append(driver)


@contextlib.contextmanager
def passed_on(mads: Sequence[str], told: bytes, caller: str) -> Iterator[None]:
    """Tidy up the disks of other drivers before what is done within; raises MadrigalError at the end if one cannot."""
    failed: MadrigalError | None = None
    for driver in _others(mads, caller):
        try:
            _call(driver, told)
        except MadrigalError as error:
            log_error(str(error))
            failed = failed or error
    yield
    if failed:
        raise failed


def _others(mads: Sequence[str], caller: str) -> list[str]:
    """The directories of the drivers that are to be called: those beside ours that have this action."""
    directory, action = os.path.split(os.path.abspath(sys.argv[0]))
    drivers = [os.path.join(os.path.dirname(directory), mad) for mad in mads if not caller]
    return [driver for driver in drivers if driver != directory and os.access(f"{driver}/{action}", os.X_OK)]


def _take_back(drivers: Sequence[str], told: bytes) -> None:
    for driver in reversed(drivers):
        try:
            if os.access(f"{driver}/failmigrate", os.X_OK):
                _call(driver, told, "failmigrate")
        except MadrigalError as error:
            log_error(f"not taken back: {error}")


def _call(driver: str, told: bytes, action: str = "") -> None:
    """Run ACTION (default: the running one) of DRIVER with our arguments, our name behind them, and our stdin."""
    path, called = os.path.split(os.path.abspath(sys.argv[0]))
    own, action = os.path.basename(path), action or called
    name = f"{os.path.basename(driver)}/{action}"
    longest = deadline.control() + deadline.lock() + deadline.stall()  # what one of ours may wait, all together
    result = command.run([f"{driver}/{action}", *sys.argv[1:6], own], longest, input=told, check=False, what=name)
    untagged = []
    for line in result.stderr.decode("utf-8", "replace").splitlines():
        tagged = _TAGGED.match(line)
        if tagged:
            log(f"{os.path.basename(driver)}: {tagged[2]}", tagged[1])
        elif line.strip():
            untagged.append(line.strip())
    if result.status:
        raise MadrigalError(f"{name} failed ({result.status}): {' '.join(untagged) or 'it gave no reason'}")
    log(f"{name} has done its part")
