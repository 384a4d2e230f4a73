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
    if whole:
        with Host(disk.host).session() as session:
            session.call("refuse_overlay", path=disk.path)
    _copy(disk, image.checked(), {"path": image.path}, None, None)


def _copy(
    source: Location, target: Location, hold: dict[str, Any], grow: list[Any] | None, monitor: str | None
) -> None:
    began = time.monotonic()
    host = Host(target.host)
    if _same(host, Host(source.host)):
        with host.session() as session:
            session.call("hold", **hold)
            way = session.call("copy", source=source.path, path=target.path, grow=grow)["way"]
            _mark(session, target.dir, monitor)
    else:

        def look(given: AnySession, session: AnySession) -> int:
            return int(given.call("measure", path=source.path)["allocated"])

        def work(given: AnySession, session: AnySession) -> str:
            session.call("hold", **hold)
            result = session.receive(given.send(source.path), path=target.path, grow=grow)
            _mark(session, target.dir, monitor)
            return _streamed(result)

        way = _between(Host(source.host), host, look, work)
    log(f"copied {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


def copy_open(fd: int, disk: Location, size: Size | None = None, second_name: str = "") -> None:
    """Make the VM's DISK a copy of the open file FD, with a link SECOND_NAME to it in the same directory."""
    from madrigal.onhost import stream

    allocated = os.fstat(fd).st_blocks * 512
    about = {"path": "", "type": "file", "mode": 0o600, "allocated": allocated, "owner": [0, 0]}
    with Host(disk.host).session(allocated >= BULK) as session:
        session.call("hold", path=disk.dir, make="all")
        session.receive(stream.give_open(fd, about), path=disk.path, grow=list(size) if size else None)
        if second_name:
            session.call("link", target=disk.name, path=f"{disk.dir}/{second_name}")
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
            if not _is_there(session, session, source, target):
                return
            session.call("hold", path=source.path)
            session.call("hold", path=target.path, make="parents")
            way: str | None = session.call("move", source=source.path, path=target.path)["way"]
            _mark(session, target.path, monitor)
    else:

        def look(given: AnySession, session: AnySession) -> int | None:
            if not _is_there(given, session, source, target):
                return None
            given.call("hold", path=source.path)
            seen = _seen(given, session, source, [target.path, source.path])
            if seen == target.path:
                log(f"{source} and {target} are one place, nothing to move")
                return None
            if seen == source.path:
                session.call("hold", path=target.path, make="parents")
                way = session.call("move", source=source.path, path=target.path)["way"]
                log(f"moved {source} to {target} ({way}, on storage that both machines share)")
                return None
            return int(given.call("measure", path=source.path)["allocated"])

        def work(given: AnySession, session: AnySession) -> str:
            given.call("hold", path=source.path)
            session.call("hold", path=target.path, make="parents")
            way = _streamed(session.receive(given.send(source.path), path=target.path, keep_mode=True))
            _mark(session, target.path, monitor)
            session.done()  # before the source goes: from here on TARGET is what counts, whatever happens to us
            given.call("drop", path=source.path)
            return way

        way = _between(origin, host, look, work)
    if way:
        log(f"moved {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


def _seen(given: AnySession, session: AnySession, source: Location, paths: list[str]) -> str:
    """The first of PATHS where the machine of SESSION has the directory SOURCE of the other one, "" if none."""
    probe = os.urandom(8).hex()
    given.call("show_probe", path=source.path, probe=probe)
    seen = next((path for path in paths if session.call("see_probe", path=path, probe=probe)), "")
    given.call("hide_probe", path=source.path, probe=probe)
    return seen


def _is_there(given: AnySession, session: AnySession, source: Location, target: Location) -> bool:
    if given.call("exists", path=source.path):
        return True
    if not session.call("exists", path=target.path):
        raise NotFound(f"{source} does not exist, and neither does {target}")
    log(f"{source} has been moved to {target} before")
    return False


def bring_back(disk: Location, image: Location) -> None:
    """Move a VM's DISK into its datastore as IMAGE, replacing what is there.

    The disk becomes a link that names where it went: so a second run knows that it was brought back and not lost.
    A disk that is a link to its image already needs nothing.
    """
    began = time.monotonic()
    host = Host(image.checked().host)
    if _same(host, Host(disk.host)):
        with host.session() as session:
            if _is_back(session, session, disk, image):
                return
            session.call("hold", path=image.path)
            way: str | None = session.call("place", source=disk.path, path=image.path)["way"]
            session.call("link", target=image.path, path=disk.path)
    else:

        def look(given: AnySession, session: AnySession) -> int | None:
            if _is_back(given, session, disk, image):
                return None
            return int(given.call("measure", path=disk.path)["allocated"])

        def work(given: AnySession, session: AnySession) -> str:
            given.call("hold", path=disk.dir)
            session.call("hold", path=image.path)
            way = _streamed(session.receive(given.send(disk.path), path=image.path))
            session.done()  # the image is safe before the disk goes
            given.call("link", target=image.path, path=disk.path)
            return way

        way = _between(Host(disk.host), host, look, work)
    if way:
        log(f"moved {disk} to {image} ({way}, {time.monotonic() - began:.1f} s)")


def _is_back(given: AnySession, session: AnySession, disk: Location, image: Location) -> bool:
    if not given.call("exists", path=disk.dir) and session.call("exists", path=image.path):
        # The last line of a shutdown removes the VM directory; then the whole script may be run again.
        log(f"{disk.dir} is gone; {disk} must have been moved to {image} before", "WARN")
        return True
    given.call("hold", path=disk.dir)
    if given.call("leads_to", path=disk.path, target=image.path):
        return True
    if not given.call("exists", path=disk.path):
        raise NotFound(f"{disk} does not exist, and nothing says that it was moved to {image}")
    return False


def _mark(session: AnySession, vm_dir: str, monitor: str | None) -> None:
    if monitor is not None:
        session.call("mark", path=f"{os.path.dirname(vm_dir)}/.monitor", text=monitor)


def _streamed(result: dict[str, int]) -> str:
    return f"{result['bytes']} bytes streamed"


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
