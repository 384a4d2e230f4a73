"""Which sessions do a piece of work: one, on the machine that sees both ends, or two with a stream between them.

This is the part of the plan (transfer/plan.py) that is taken before anything is planned: what is on one machine never
leaves it, and its worker takes the cheapest way there.
"""

from __future__ import annotations

import contextlib
import os
import time

from madrigal.errors import DigestMismatch
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log
from madrigal.transfer import carry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession
    from madrigal.transfer.progress import Transfer

    AnySession = LocalSession | RemoteSession
    Weight = dict[str, Any]  # Session.weigh
    Work = Callable[[AnySession], str | None]
    WorkOfTwo = Callable[[AnySession, AnySession, Weight], str]
    Look = Callable[[AnySession, AnySession], Weight | None]

_ATTEMPTS = 3


def carried(
    verb: str, source: Location, target: Location, weight: Look, here: Work, there: WorkOfTwo, near: Location | None
) -> None:
    """Do THERE, with sessions on the machines of SOURCE and TARGET, or HERE, on the one that sees both.

    NEAR: the image among the two, if its directory may be seen by the other's machine too.
    """
    began = time.monotonic()
    origin, host = Host(source.host), Host(target.host)
    way: str | None = None
    if is_same(origin, host):
        with carry.session(host) as session, watched(session, target.path):
            way = here(session)
    else:

        def look(given: AnySession, session: AnySession) -> Weight | None:
            nonlocal way
            if near is not None:
                owner, other = (given, session) if near == source else (session, given)
                if sees(other, owner, near.dir):
                    owner.done()  # what it has may be what the other one locks
                    with watched(other, target.path):
                        way = here(other)
                    return None
            return weight(given, session)

        way = between(origin, host, look, there) or way
    if way:
        log(f"{verb} {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


@contextlib.contextmanager
def watched(session: AnySession, path: str, total: int = 0) -> Iterator[None]:
    """Report on what SESSION makes as PATH on its machine, when it has become much; TOTAL: as for progress.of()."""
    begun: list[Transfer] = []

    def heard(count: int) -> None:
        if count >= carry.BULK and not begun:
            from madrigal.transfer import progress

            begun.append(progress.Transfer(path, total, progress.sinks()))
        for shown in begun:
            shown.reached(count)

    session.heard = heard
    try:
        yield
        for shown in begun:
            shown.report(is_done=True)
    finally:
        session.heard = lambda count: None
        for shown in begun:
            shown.close()


def sees(session: AnySession, owner: AnySession, directory: str) -> bool:
    """Whether the machine of SESSION sees the DIRECTORY of OWNER's: by a file that is made there, not by names."""
    probe = os.urandom(8).hex()
    owner.call("show", path=directory, probe=probe)
    seen = session.call("see", paths=[directory], probe=probe)
    owner.call("hide", path=directory, probe=probe)
    return bool(seen)


def is_same(one: Host, other: Host) -> bool:
    return one.name == other.name or (one.local and other.local)


def between(origin: Host, host: Host, look: Look, work: WorkOfTwo) -> str | None:
    """WORK(session on ORIGIN, session on HOST, weight) if LOOK, given the same, finds a weight to move and not None.

    Much weight gets connections of its own.  What was damaged on its way is sent again.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with carry.session(origin) as given, carry.session(host) as session:
                weight = look(given, session)
                if weight is None:
                    return None
                if weight["allocated"] < carry.BULK:
                    return work(given, session, weight)
            return _planned(origin, host, work, weight)
        except DigestMismatch as error:
            if attempt == _ATTEMPTS - 1:
                raise
            log(f"{error}; trying again", "WARN")
    raise AssertionError("not reached")


def _directly(origin: Host, host: Host, work: WorkOfTwo, weight: Weight) -> str:
    """WORK with sessions of which the first gives the other one its data itself.

    Raises plan.Unfit if that cannot be; why has been said then.
    """
    from madrigal.host.direct import DirectSession, is_wanted
    from madrigal.host.remote import RemoteSession
    from madrigal.transfer import plan

    if not is_wanted(origin, host):
        raise plan.Unfit
    with RemoteSession(origin, bulk=False) as given, DirectSession(host, given) as session:
        carry.limit(given)
        if session.connects():
            return work(given, session, weight) + ", directly"
    raise plan.Unfit


def _planned(origin: Host, host: Host, work: WorkOfTwo, weight: Weight) -> str:
    """WORK in the cheapest way between two machines, over connections of its own."""
    from madrigal.transfer import plan

    def through() -> str:
        with carry.session(origin, bulk=True) as given, carry.session(host, bulk=True) as session:
            return work(given, session, weight)

    from_, to = ("" if machine.local else machine.name for machine in (origin, host))
    workers = {plan.STREAM: through, plan.DIRECT: lambda: _directly(origin, host, work, weight)}
    return plan.take(plan.between(from_, to, weight, {}), workers)
