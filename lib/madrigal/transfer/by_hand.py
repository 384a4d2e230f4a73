"""What an administrator copies: an image, a directory or a block device, from anywhere to anywhere, as it is."""

from __future__ import annotations

import os

from madrigal.errors import BadImage, InUse, MadrigalError, NotFound, NotSupported, UsageError
from madrigal.host import Host
from madrigal.location import Location
from madrigal.transfer import carry, plan, route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from madrigal.transfer.route import AnySession, Weight

    Found = dict[str, Any]  # onhost/survey.py


def copy(source: Location, target: Location, replace: bool = False, reads_zeros: bool = False) -> str:
    """Make TARGET a copy of SOURCE, which nobody may use meanwhile; returns the way it was done.

    What is at TARGET already stays unless it is to be REPLACEd; a block device is written in place, unless it begins
    with something that is to stay.  READS_ZEROS: such a device is known to read as zeros everywhere.  TARGET is as
    before if this fails, and a block device has no beginning then.  Run again it goes on with what was interrupted.
    """
    origin, host = Host(source.checked().host), Host(target.checked().host)

    def ready(given: AnySession, session: AnySession) -> tuple[Found, Found]:
        """Both ends, held, and found to be fit."""
        found = given.call("survey", path=source.path)
        there = session.call("survey", path=target.path)
        _refuse(source, target, found, there, given is session, replace or reads_zeros)
        if found["kind"] != "device" and found["is_writable"]:  # where nothing can be written, no action works
            given.tell("hold", path=_object(found["path"]))
        if there["kind"] != "device":
            session.tell("hold", path=_object(there["path"]))
            there = session.call("survey", path=target.path)
            _refuse(source, target, found, there, given is session, replace or reads_zeros)
        return found, there

    fresh = [reads_zeros]

    def receive(there: Found) -> dict[str, Any]:
        if there["kind"] != "device":
            return {"path": there["path"]}
        return {
            "path": there["path"],
            "device": {"reads_zeros": bool(fresh) and fresh.pop()},
        }  # once: it may be retried

    def here(session: AnySession) -> str:
        found, there = ready(session, session)
        with route.watched(session, there["path"], found["allocated"]):
            session.tell("copy", source=found["path"], **receive(there))
            return str(session.done()[-1]["way"])

    way = ""

    def look(given: AnySession, session: AnySession) -> Weight | None:
        nonlocal way
        if _sees(session, given, given.call("survey", path=source.path)):
            given.done()  # that machine sees both, and holds both
            way = here(session)
            return None
        return dict(given.call("measure", path=source.path))

    def there(given: AnySession, session: AnySession, weight: Weight) -> str:
        found, goal = ready(given, session)
        to, old = receive(goal), None
        if (found["kind"], goal["kind"]) == ("file", "file"):
            known = plan.between(given.name, session.name, weight, to, old=goal["allocated"])
            if plan.is_best(plan.DELTA, known):
                old = {"files": {"": [goal["path"]]}}
        return carry.stream(given, session, {"path": found["path"]}, to, weight, old)

    if route.is_same(origin, host):
        with carry.session(host) as session:
            return here(session)
    return route.between(origin, host, look, there) or way


def _object(path: str) -> str:
    """What is to be held for PATH: of a VM's disk its directory."""
    where = Location("", path)
    return where.dir if where.disk_id is not None else path


def _sees(session: AnySession, owner: AnySession, found: Found) -> bool:
    """Whether the machine of SESSION sees what OWNER has FOUND (onhost/survey.py)."""
    if found["kind"] == "nothing" or not found["is_writable"]:
        return False  # nothing can be shown there
    return route.sees(session, owner, os.path.dirname(found["path"]))


def _refuse(source: Location, target: Location, found: Found, there: Found, is_one: bool, replace: bool) -> None:
    """Raise what is against it."""
    kinds = found["kind"], there["kind"]
    if found["kind"] == "nothing":
        raise NotFound(f"{source} does not exist")
    if "other" in kinds:
        raise NotSupported(f"{source if found['kind'] == 'other' else target} is no file, directory or block device")
    if is_one and found["path"] == there["path"]:
        raise UsageError(f"{source} and {target} are one {'device' if found['kind'] == 'device' else 'file'}")
    for one, other in ((found, there), (there, found)):
        if is_one and (other["path"] + "/").startswith(one["path"] + "/"):
            raise UsageError(f"{other['path']} is within {one['path']}")
    for where, about in ((source, found), (target, there)):
        if about["used"]:
            raise InUse(f"{where} is in use ({about['used']}); try again when it is not")
    if "dir" in kinds and there["kind"] != "nothing" and kinds != ("dir", "dir"):
        raise BadImage(f"one of {source} and {target} is a directory, and the other is not")
    if there["kind"] == "device" and not there["is_blank"] and not replace:
        raise InUse(f"the device {target} has something on it; --replace overwrites it")
    if there["kind"] in ("file", "dir") and not replace:
        raise InUse(f"{target} exists; --replace replaces it when the copy is there")


def facts(source: Location, target: Location) -> plan.Facts:
    """What a plan is made of; both machines are asked, and SOURCE's directory gets a file for a moment."""
    origin, host = Host(source.checked().host), Host(target.checked().host)
    is_one = route.is_same(origin, host)
    with origin.session() as given, host.session() as session:
        found = given.call("survey", path=source.path, beside=target.path if is_one else "")
        there = session.call("survey", path=target.path)
        if found["kind"] == "nothing":
            raise NotFound(f"{source} does not exist")
        sees = ""
        if not is_one and _sees(session, given, found):
            sees = host.name or "this machine"
            found = session.call("survey", path=source.path, beside=target.path)
        rtt = 0 if is_one else max(given.rtt(), session.rtt())
        allocated = int(given.call("measure", path=source.path)["allocated"])
    return plan.Facts(
        _place(origin, found, allocated),
        _place(host, there, there["allocated"]),
        one_machine=is_one,
        sees=sees,
        reflinks=found["reflinks"],
        rtt=rtt,
        no_direct="" if is_one or origin.local or host.local else _no_direct(origin, host),
        limit=carry.rate(),
    )


def _no_direct(origin: Host, host: Host) -> str:
    """Why ORIGIN cannot send straight to HOST, both other machines: found out by trying."""
    from madrigal.host.direct import DirectSession, is_wanted
    from madrigal.host.remote import RemoteSession

    if not is_wanted(origin, host):
        return f"it is not wanted, or {origin.name} did not reach {host.name} a moment ago"
    with RemoteSession(origin, bulk=False) as given, DirectSession(host, given) as session:
        try:
            session.connect()
        except MadrigalError as error:
            return str(error)
    return ""


def _place(host: Host, found: Found, allocated: int) -> plan.Place:
    names = "path", "kind", "size", "file_system", "fs_type", "left"
    known = {name: found[name] for name in names}
    old = found["allocated"] if found["kind"] == "file" else 0
    return plan.Place("" if host.local else host.name, allocated=allocated, old=old, **known)
