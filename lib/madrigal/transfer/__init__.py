"""Move the bytes of images and VM directories between places, the cheapest correct way.

On one machine: rename, reflink, copy_file_range.  Between two: a stream of what is not zero, checked at the
end, over the session that holds the locks.  A target is never seen half-written, and a source goes only when
its successor is safely on a disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from madrigal.errors import NotFound
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log
from madrigal.transfer import carry, route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from madrigal.transfer.route import AnySession, Look, Weight

    Size = tuple[str, int]
    State = dict[str, Any]  # onhost/layout.py

_AS_IT_IS = {"format": "raw", "snapshot": -1, "image": ""}


def copy(
    source: Location,
    disk: Location,
    size: Size | None = None,
    monitor: str | None = None,
    state: State | None = None,
    chain: str = "",
    preallocate: bool = False,
    near: bool = False,
) -> None:
    """Make the VM's DISK a copy of the file or directory SOURCE.

    SIZE (format, bytes) is what the disk grows to before it is seen.  MONITOR: how the host is to monitor the
    datastore of the disk ("": not at all).  STATE: of which state, where SOURCE has snapshots.  CHAIN: a qcow2 disk
    is to be the first of a chain with such names (onhost/layout.py).  PREALLOCATE: with room on the disk for all of
    it.  NEAR: the host may see SOURCE itself.  A URL as SOURCE is fetched here.  Raises NotFound, NoSpace,
    HostUnreachable and what else can go wrong; DISK is as before then.
    """
    if source.is_url:
        from madrigal.source.download import downloaded

        with downloaded(source.path) as fd:
            return copy_open(fd, disk, size)
    path = source.checked().path
    given = dict(state, hold=path) if state else None
    wanted = {
        "grow": list(size) if size else None,
        "chain": chain,
        "preallocate": (state or _AS_IT_IS)["format"] if preallocate else "",
    }

    def begin(session: AnySession) -> None:
        session.tell("hold", path=disk.dir, make="all")

    def end(session: AnySession) -> None:
        if not chain and disk.disk_id is not None:
            session.tell("drop", path=disk.path + ".snap")  # of a disk that was there before
        _mark(session, disk.dir, monitor)

    def here(session: AnySession) -> str:
        begin(session)
        session.tell("copy", source=path, path=disk.path, state=given, **wanted)
        end(session)
        return _way(session)

    def there(origin: AnySession, session: AnySession, weight: Weight) -> str:
        begin(session)
        send = {"path": path, "state": given}
        old = {"files": {"": [disk.path]}}  # of an action that was done and is done again
        way = carry.stream(origin, session, send, {"path": disk.path, **wanted}, weight, old)
        end(session)
        return way

    route.carried("copied", source, disk, _weight(path, given), here, there, source if near else None)


def copy_whole(
    image: Location,
    disk: Location,
    state: State | None,
    size: Size | None = None,
    monitor: str | None = None,
    chain: str = "",
    near: bool = False,
) -> None:
    """Make the VM's DISK a copy of the persistent IMAGE, with all snapshots that it has; the rest as for copy()."""
    path = image.checked().path
    given = state or _AS_IT_IS
    wanted = {"grow": list(size) if size else None, "settle": {"chain": chain, "fresh": True}}

    def begin(session: AnySession) -> None:
        session.tell("hold", path=disk.dir, make="all")

    def here(session: AnySession) -> str:
        begin(session)
        session.tell("copy_whole", source=path, path=disk.path, state=given, **wanted)
        _mark(session, disk.dir, monitor)
        return _way(session)

    def there(origin: AnySession, session: AnySession, weight: Weight) -> str:
        begin(session)
        send = {"path": path, "state": given, "whole": True}
        note = {"disk": carry.notes(origin, path)}  # bring_back() will ask
        old = {"files": _older(disk.path, weight)}  # of an action that was done and is done again
        way = carry.stream(origin, session, send, {"path": disk.path, **wanted}, weight, old, note)
        _mark(session, disk.dir, monitor)
        return way

    route.carried("copied", image, disk, _weight(path, given, whole=True), here, there, image if near else None)


def save(disk: Location, image: Location, state: State, near: bool = False, made_of: str = "") -> None:
    """Make IMAGE, one file, a copy of a STATE of a VM's DISK.

    MADE_OF: where the machine of IMAGE may have what the disk was made of, so that the same need not be sent.
    """
    path = image.checked().path
    given = dict(state, hold=disk.dir)

    def here(session: AnySession) -> str:
        session.tell("hold", path=disk.dir)
        session.tell("hold", path=path)
        session.tell("copy", source=disk.path, path=path, state=given)
        return _way(session)

    def there(origin: AnySession, session: AnySession, weight: Weight) -> str:
        origin.tell("hold", path=disk.dir)
        session.tell("hold", path=path)
        old = {"files": {"": [made_of]}} if made_of else None
        return carry.stream(origin, session, {"path": disk.path, "state": given}, {"path": path}, weight, old)

    route.carried("copied", disk, image, _weight(disk.path, given), here, there, image if near else None)


def _weight(path: str, state: State | None, whole: bool = False) -> Look:
    """Asks where the source is for its bytes."""
    if state is None:
        return lambda origin, _: _dict(origin.call("measure", path=path))
    return lambda origin, _: _dict(origin.call("weigh", path=path, state=state, whole=whole))


def copy_open(fd: int, disk: Location, size: Size | None = None, second_name: str = "") -> None:
    """Make the VM's DISK a copy of the open file FD, with a link SECOND_NAME to it in the same directory."""
    from madrigal.onhost import stream

    allocated = os.fstat(fd).st_blocks * 512
    about = {"path": "", "type": "file", "mode": 0o600, "allocated": allocated, "owner": [0, 0]}
    with Host(disk.host).session(allocated >= carry.BULK) as session:
        session.tell("hold", path=disk.dir, make="all")
        with carry.followed(stream.give_open(fd, about), disk.path, max(allocated, 1)) as frames:
            session.receive(frames, path=disk.path, grow=list(size) if size else None)
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
    if route.is_same(host, origin):
        if source.path == target.path:
            return
        with host.session() as session:
            way: str | None = session.call("move", source=source.path, path=target.path)["way"]
            _mark(session, target.path, monitor)
    else:

        def look(given: AnySession, session: AnySession) -> Weight | None:
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
                return dict(offered)
            if seen == target.path:
                log(f"{source} and {target} are one place, nothing to move")
                return None
            given.done()  # that machine sees both and holds both
            way = session.call("move", source=source.path, path=target.path)["way"]
            log(f"moved {source} to {target} ({way}, on storage that both machines share)")
            return None

        def work(given: AnySession, session: AnySession, weight: Weight) -> str:
            given.tell("hold", path=source.path)
            session.tell("hold", path=target.path, make="parents")
            receive = {"path": target.path, "keep_mode": True}
            way = carry.stream(given, session, {"path": source.path}, receive, weight)
            _mark(session, target.path, monitor)
            with _unbroken():
                session.done()  # before the source goes: from here on TARGET is what counts, whatever happens to us
                given.tell("drop", path=source.path)
                given.done()
            return way

        way = route.between(origin, host, look, work)
    if way:
        log(f"moved {source} to {target} ({way}, {time.monotonic() - began:.1f} s)")


def bring_back(disk: Location, image: Location, state: State | None = None, near: bool = False) -> None:
    """Move a VM's DISK with its snapshots into its datastore as IMAGE, replacing what is there.

    STATE as for copy(), of which the format counts.  The disk becomes a link that names where it went: so a second run
    knows that it was brought back and not lost.  A disk that is a link to its image already needs nothing.  NEAR: the
    host of the disk may see the datastore itself.
    """
    path, given = image.checked().path, state or _AS_IT_IS
    settle = {"chain": "", "fresh": False}

    def look(origin: AnySession, session: AnySession) -> Weight | None:
        return _to_move(origin, session, disk, image, given)

    def leave(session: AnySession) -> None:
        session.tell("link", target=path, path=disk.path)
        session.tell("drop", path=disk.path + ".snap")

    def here(session: AnySession) -> str | None:
        if look(session, session) is None:
            return None
        session.tell("hold", path=path)
        arguments = {"source": disk.path, "path": path, "state": given, "settle": settle, "is_going": True}
        session.tell("copy_whole", **arguments)
        session.tell("drop", path=path + ".md5sum")
        session.tell("keep")  # the image is safe before the disk goes
        leave(session)
        return _way(session)

    def there(origin: AnySession, session: AnySession, weight: Weight) -> str:
        origin.tell("hold", path=disk.dir)
        session.tell("hold", path=path)
        send = {"path": disk.path, "state": given, "whole": True}
        old = {"files": _older(path, weight), "noted": {path: carry.notes(session, path)}}
        way = carry.stream(origin, session, send, {"path": path, "settle": settle}, weight, old)
        session.tell("drop", path=path + ".md5sum")
        with _unbroken():
            session.done()  # the image is safe before the disk goes
            leave(origin)
            origin.done()
        return way

    route.carried("moved", disk, image, look, here, there, image if near else None)


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """Let a signal that ends the action wait meanwhile: what is in its new place must not stay in the old one too."""
    came: list[int] = []
    try:
        handlers = {
            number: signal.signal(number, lambda number, _: came.append(number))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
    except ValueError:  # signals are the main thread's, and this is another one's work
        handlers = {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _older(path: str, weight: Weight) -> dict[str, list[str]]:
    """Where the disk or image PATH and its snapshots, if it is there, are older copies of what has such a WEIGHT."""
    names = [name for name in weight["files"] if name != "disk"]
    found = {name: [f"{path}.{name}"] for name in names}
    # the first file of a chain is what an image without snapshots was
    first = "disk" if "disk" in weight["files"] else min(names, key=lambda name: int(os.path.basename(name)))
    return {**found, first: [*found.get(first, []), path]}


def _to_move(given: AnySession, session: AnySession, disk: Location, image: Location, state: State) -> Weight | None:
    """The weight of DISK on the machine of GIVEN, None if it is IMAGE on that of SESSION already."""
    found = given.call("give_back", path=disk.path, target=image.path, state=state)
    if not found["there"] and session.call("exists", path=image.path):
        # The last line of a shutdown removes the VM directory; then the whole script may be run again.
        log(f"{disk.dir} is gone; {disk} must have been moved to {image} before", "WARN")
        return None
    if found["moved"]:
        given.tell("drop", path=disk.path + ".snap")  # which a run was killed in removing
        return None
    if found["weight"] is None:
        raise NotFound(f"{disk} does not exist, and nothing says that it was moved to {image}")
    return dict(found["weight"])


def _mark(session: AnySession, vm_dir: str, monitor: str | None) -> None:
    if monitor is not None:
        session.tell("mark", path=f"{os.path.dirname(vm_dir)}/.monitor", text=monitor)


def _way(session: AnySession) -> str:
    """How the work went that SESSION was told of; the session is over then."""
    return str(next(result["way"] for result in session.done() if isinstance(result, dict) and "way" in result))


def _dict(weight: Any) -> Weight:
    return dict(weight)
