"""Move the bytes of images and VM directories between places, the cheapest correct way.

On one machine: rename, reflink, copy_file_range.  Between two: a stream of what is not zero, checked at the
end, over the session that holds the locks.  A target is never seen half-written, and a source goes only when
its successor is safely on a disk.
"""

from __future__ import annotations

import os
import time

from madrigal.errors import NotFound
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession

    AnySession = LocalSession | RemoteSession
    Size = tuple[str, int]

BULK = 128 << 20
"""Bytes from which on a connection of its own, which takes 0.3 s, is faster than sharing the kept one."""


def copy(source: Location, disk: Location, size: Size | None = None, monitor: str | None = None) -> None:
    """Make the VM's DISK a copy of the file or directory SOURCE.

    SIZE (format, bytes) is what the disk grows to before it is seen.  MONITOR: how the host is to monitor the
    datastore of the disk ("": not at all).  A URL as SOURCE is fetched here.  Raises NotFound, NoSpace,
    HostUnreachable and what else can go wrong; DISK is as before then.
    """
    if source.is_url:
        from madrigal.source.download import downloaded

        with downloaded(source.path) as fd:
            return copy_open(fd, disk, size)
    _copy(source.checked(), disk, {"path": disk.dir, "make": "all"}, list(size) if size else None, monitor)


def save(disk: Location, image: Location, whole: bool) -> None:
    """Make IMAGE a copy of a VM's DISK; WHOLE refuses a (qcow2) disk that needs another file."""
    _copy(disk, image.checked(), {"path": image.path}, None, None, whole)


def _copy(
    source: Location,
    target: Location,
    hold: dict[str, Any],
    grow: list[Any] | None,
    monitor: str | None,
    whole: bool = False,
) -> None:
    began = time.monotonic()
    host = Host(target.host)
    if _same(host, Host(source.host)):
        with host.session() as session:
            if whole:
                session.call("refuse_overlay", path=source.path)
            session.tell("hold", **hold)
            way = session.call("copy", source=source.path, path=target.path, grow=grow)["way"]
            _mark(session, target.dir, monitor)
    else:

        def look(given: AnySession, session: AnySession) -> int:
            if whole:
                given.tell("refuse_overlay", path=source.path)
            return int(given.call("measure", path=source.path)["allocated"])

        def work(given: AnySession, session: AnySession) -> str:
            session.tell("hold", **hold)
            count = session.receive(given.send(source.path), path=target.path, grow=grow)
            _mark(session, target.dir, monitor)
            return _streamed(count)

        way = _between(Host(source.host), host, look, work) or ""
    log(f"copied {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


def copy_open(fd: int, disk: Location, size: Size | None = None, second_name: str = "") -> None:
    """Make the VM's DISK a copy of the open file FD, with a link SECOND_NAME to it in the same directory."""
    from madrigal.onhost import stream

    allocated = os.fstat(fd).st_blocks * 512
    about = {"path": "", "type": "file", "mode": 0o600, "allocated": allocated, "owner": [0, 0]}
    with Host(disk.host).session(allocated >= BULK) as session:
        session.tell("hold", path=disk.dir, make="all")
        session.receive(stream.give_open(fd, about), path=disk.path, grow=list(size) if size else None)
        if second_name:
            session.tell("link", target=disk.name, path=f"{disk.dir}/{second_name}")
    log(f"made {disk}")


def move(source: Location, target: Location, monitor: str | None = None) -> None:
    """Move the VM directory SOURCE to TARGET.

    Both may be one place that two machines share, which a probe file finds out; nothing is done then.  A
    TARGET without a SOURCE is what an earlier run left when it had finished: fine.  MONITOR as for copy().
    """
    began = time.monotonic()
    host, origin = Host(target.host), Host(source.host)
    if _same(host, origin):
        if source.path == target.path:
            return
        with host.session() as session:
            way: str | None = session.call("move", source=source.path, path=target.path)["way"]
            _mark(session, target.path, monitor)
    else:

        def look(given: AnySession, session: AnySession) -> int | None:
            probe = os.urandom(8).hex()
            offered = given.call("offer", path=source.path, probe=probe)
            if offered is None:
                given.tell("tidy", path=source.path)
                session.tell("need", path=target.path, message=f"{source} does not exist, and neither does {target}")
                session.done()
                log(f"{source} has been moved to {target} before")
                return None
            seen = session.call("see", paths=[target.path, source.path], probe=probe)
            given.tell("hide", path=source.path, probe=probe)
            if not seen:
                return int(offered["allocated"])
            if seen == target.path:
                log(f"{source} and {target} are one place, nothing to move")
                return None
            given.done()  # that machine sees both and holds both
            way = session.call("move", source=source.path, path=target.path)["way"]
            log(f"moved {source} to {target} ({way}, on storage that both machines share)")
            return None

        def work(given: AnySession, session: AnySession) -> str:
            given.tell("hold", path=source.path)
            session.tell("hold", path=target.path, make="parents")
            count = session.receive(given.send(source.path), path=target.path, keep_mode=True)
            _mark(session, target.path, monitor)
            session.done()  # before the source goes: from here on TARGET is what counts, whatever happens to us
            given.tell("drop", path=source.path)
            return _streamed(count)

        way = _between(origin, host, look, work)
    if way:
        log(f"moved {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


def bring_back(disk: Location, image: Location) -> None:
    """Move a VM's DISK into its datastore as IMAGE, replacing what is there.

    The disk becomes a link that names where it went: so a second run knows that it was brought back and not lost.
    A disk that is a link to its image already needs nothing.
    """
    began = time.monotonic()
    host = Host(image.checked().host)
    if _same(host, Host(disk.host)):
        with host.session() as session:
            if _to_move(session, session, disk, image) is None:
                return
            session.tell("hold", path=image.path)
            session.tell("place", source=disk.path, path=image.path)
            session.tell("link", target=image.path, path=disk.path)
            way: str | None = session.done()[1]["way"]
    else:

        def look(given: AnySession, session: AnySession) -> int | None:
            return _to_move(given, session, disk, image)

        def work(given: AnySession, session: AnySession) -> str:
            given.tell("hold", path=disk.dir)
            session.tell("hold", path=image.path)
            count = session.receive(given.send(disk.path), path=image.path)
            session.done()  # the image is safe before the disk goes
            given.tell("link", target=image.path, path=disk.path)
            return _streamed(count)

        way = _between(Host(disk.host), host, look, work)
    if way:
        log(f"moved {disk} to {image} ({way}, {time.monotonic() - began:.1f} s)")


def _to_move(given: AnySession, session: AnySession, disk: Location, image: Location) -> int | None:
    """The bytes of DISK on the machine of GIVEN, None if it is IMAGE on that of SESSION already."""
    found = given.call("give_back", path=disk.path, target=image.path)
    if not found["there"] and session.call("exists", path=image.path):
        # The last line of a shutdown removes the VM directory; then the whole script may be run again.
        log(f"{disk.dir} is gone; {disk} must have been moved to {image} before", "WARN")
        return None
    if found["moved"]:
        return None
    if found["allocated"] is None:
        raise NotFound(f"{disk} does not exist, and nothing says that it was moved to {image}")
    return int(found["allocated"])


def _mark(session: AnySession, vm_dir: str, monitor: str | None) -> None:
    if monitor is not None:
        session.tell("mark", path=f"{os.path.dirname(vm_dir)}/.monitor", text=monitor)


def _streamed(count: int) -> str:
    return f"{count} bytes streamed"


def _same(one: Host, other: Host) -> bool:
    return one.name == other.name or (one.local and other.local)


def _between(
    origin: Host,
    host: Host,
    look: Callable[[AnySession, AnySession], int | None],
    work: Callable[[AnySession, AnySession], str],
) -> str | None:
    """WORK(session on ORIGIN, session on HOST) if LOOK, given the same, finds so many bytes to move and not None.

    Many bytes get connections of their own.
    """
    with origin.session() as given, host.session() as session:
        allocated = look(given, session)
        if allocated is None:
            return None
        if allocated < BULK:
            return work(given, session)
    with origin.session(bulk=True) as given, host.session(bulk=True) as session:
        return work(given, session)
