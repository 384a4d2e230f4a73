"""An image datastore that is a directory: every image a file of it, named by the image's id and time.

`<BASE_PATH>/<md5 of "REGTIME:ID">` is the image; `.snap` and `.md5sum` with the same beginning are what other
drivers keep beside it, `.export` what was made for a marketplace, and they are removed with it.
"""

from __future__ import annotations

import contextlib
import os

from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from madrigal.inspector import Found
    from madrigal.source.schemes import Source, Terms
    from madrigal.transfer.route import AnySession

_CONVERTED = ("raw", "qcow2")
_BESIDE = (".snap", ".md5sum", ".export")


def path_of(base_path: str, time: int, image_id: int) -> str:
    """Where the image with this id, registered at TIME, goes: the same whenever the action is repeated."""
    import hashlib

    return f"{base_path}/{hashlib.md5(f'{time}:{image_id}'.encode(), usedforsecurity=False).hexdigest()}"


class Stored:
    """An image of the datastore.  `size`: bytes of the file; of a directory, those of its files.

    `disk`: the bytes that a VM will see, None if that was not looked at.
    """

    def __init__(self, path: str, format: str, size: int, disk: int | None = None) -> None:
        self.path = path
        self.format = format
        self.size = size
        self.disk = disk


class Store:
    """The datastore in the directory BASE_PATH of the machine that SESSION is on, here or another.

    ALLOCATE: its images have no holes.  STAGING: where the machine, if it is another, keeps what is on its way;
    "" is beside its place.
    """

    def __init__(self, session: AnySession, base_path: str, allocate: bool = False, staging: str = "") -> None:
        self._session = session
        self._allocate, self._staging = allocate, staging
        self.base_path = base_path

    def add(
        self,
        path: str,
        url: str,
        terms: Terms,
        digests: Mapping[str, str],
        decompress: bool,
        is_disk: bool,
        driver: str,
        rate: int | None = None,
    ) -> Stored:
        """Make PATH the image that URL (or a local path) leads to, fetched by this machine at RATE bytes a second.

        TERMS: what may be read.  DIGESTS: MD5, SHA1, SHA256 of the bytes as fetched.
        IS_DISK: refuse what a VM must not have as a disk (inspector.check_import).  DRIVER: the format it gets.
        """
        from madrigal.source import schemes, stream

        digests = stream.check_digests(digests)
        known = self._session.call("image", do="begin", path=path)
        if known is not None:
            log(f"{url} was imported as {self._shown(path)} before")
            return Stored(path, *_look(known, is_disk))
        if not schemes.is_far(url):
            return self._fetch(path, url, terms, digests, decompress, is_disk, driver, rate)
        from madrigal.source import flight

        wanted = (url, terms.identity(), sorted(digests.items()), decompress, is_disk, driver, self.base_path)
        with flight.of(*wanted, self._allocate, self._staging) as flown:
            if flown.landed:
                original, format, size = flown.landed
                self.clone(original, format, path, format)
                return Stored(path, format, size)
            stored = self._fetch(path, url, terms, digests, decompress, is_disk, driver, rate)
            flown.land([path, stored.format, stored.size])
        return stored

    def _fetch(
        self,
        path: str,
        url: str,
        terms: Terms,
        digests: Mapping[str, str],
        decompress: bool,
        is_disk: bool,
        driver: str,
        rate: int | None,
    ) -> Stored:
        from madrigal.source import schemes

        with schemes.open(url, terms, rate=rate) as source:
            if source.local_fd is not None and os.path.isdir(f"/proc/self/fd/{source.local_fd}"):
                stored = self._add_directory(path, source.local_fd, rate)
            else:
                stored = self._add_file(path, source, decompress, digests, is_disk, driver, rate)
        log(f"imported {source.name} as {self._shown(path)}")
        return stored

    def _add_directory(self, path: str, fd: int, rate: int | None) -> Stored:
        from madrigal.onhost import stream
        from madrigal.source import pace

        frames = stream.give(f"/proc/self/fd/{fd}")
        self._session.receive(pace.paced(frames, rate) if rate else frames, path=path)
        return Stored(path, *_look(self._session.call("image", do="peek", path=path), is_disk=False))

    def _add_file(
        self,
        path: str,
        source: Source,
        decompress: bool,
        digests: Mapping[str, str],
        is_disk: bool,
        driver: str,
        rate: int | None,
    ) -> Stored:
        from madrigal import inspector
        from madrigal.storage.arrival import Arrival
        from madrigal.transfer import carry

        arrival = Arrival(source, decompress, digests)
        if not self._session.name and arrival.is_plain and not rate:
            # the cheapest way there is within a machine; what is looked at is the copy, which nobody else can change
            part = self._session.call("image", do="take", source=f"/proc/self/fd/{source.local_fd}", path=path)
            fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = inspector.check_import(fd) if is_disk else None
            finally:
                os.close(fd)
        else:
            if source.size is None or source.size >= carry.BULK:
                self._begin_again(path)
            there = bool(self._session.name)
            with carry.followed(arrival.frames(there), path, source.size or 0) as frames:
                self._session.receive(frames, path=path, staging=self._staging if there else "")
            found = arrival.found() if is_disk else None
        format, wanted = _formats(found, driver)
        size = self._last("adopt", path=path, format=format, driver=wanted, allocate=self._allocate)
        return Stored(path, wanted, size, found.virtual_size if found else None)

    def make(self, path: str, format: str, size: int, fs: str, fs_options: list[str]) -> None:
        """Make PATH an empty image of SIZE bytes with the file system FS (or `swap`) in it."""
        about = {"format": format, "size": size, "fs": fs, "fs_options": fs_options, "preallocate": self._allocate}
        self._last("make", path=path, **about)
        log(f"made {self._shown(path)}")

    def clone(self, original: str, format: str, path: str, driver: str, given: AnySession | None = None) -> str:
        """Make PATH a copy of the image ORIGINAL, which is of FORMAT; returns its format, DRIVER if it is converted.

        GIVEN: a session on the machine that has ORIGINAL, if this one does not.
        """
        wanted, way = driver if format in _CONVERTED and driver in _CONVERTED else format, ""
        if given is None:
            about = {"source": original, "format": format, "driver": wanted, "allocate": self._allocate}
            self._last("clone", path=path, **about)
        elif self._session.call("image", do="begin", path=path) is None:
            way = f" ({self._receive(original, format, path, wanted, given)})"
        log(f"cloned {original} to {self._shown(path)}{way}")
        return wanted

    def _receive(self, original: str, format: str, path: str, wanted: str, given: AnySession) -> str:
        """Bring it here from the machine of GIVEN; returns how."""
        from madrigal.transfer import carry

        send = {"path": original, "state": {"format": format, "snapshot": -1, "image": "", "hold": original}}
        weight = given.call("weigh", **send)

        def bring() -> str:
            carry.limit(given)
            receive = {"path": path, "staging": self._staging if self._session.name else ""}
            if receive["staging"]:
                weight["is_plain"] = False  # what has no name can be written by one connection alone
            way = carry.stream(given, self._session, send, receive, weight)
            self._last("adopt", path=path, format=format, driver=wanted, allocate=self._allocate)
            return way

        if weight["allocated"] < carry.BULK:
            return bring()
        from madrigal.transfer import plan

        def through() -> str:
            self._begin_again(path)
            given.reopen()
            return bring()

        def directly() -> str:
            with self._brought_by(given) as session:
                session.tell("hold", path=path, make="parents")
                self._session = session
                return bring() + ", directly"

        workers = {plan.STREAM: through, plan.DIRECT: directly}
        return plan.take(plan.between(given.name, self._session.name, weight, {}), workers)

    @contextlib.contextmanager
    def _brought_by(self, given: AnySession) -> Iterator[AnySession]:
        """A session in place of ours to which the machine of GIVEN brings its data itself; raises plan.Unfit."""
        from madrigal.host.direct import DirectSession, is_wanted
        from madrigal.host.remote import RemoteSession
        from madrigal.transfer import plan

        ours = self._session
        if not (
            isinstance(given, RemoteSession) and isinstance(ours, RemoteSession) and is_wanted(given.host, ours.host)
        ):
            raise plan.Unfit
        with DirectSession(ours.host, given) as session:
            if not session.connects():
                raise plan.Unfit
            ours.fail()  # it holds what this one is to hold
            yield session

    def remove(self, path: str) -> None:
        """Remove the image at PATH and what is beside it; it may be gone already."""
        there = self._session.call("delete", path=path, within=path, beside=_BESIDE)
        log(f"removed {self._shown(path)}" if there else f"{self._shown(path)} was gone already")

    def export(self, path: str, format: str) -> dict[str, Any]:
        """What Images.export() (onhost/images.py) says of the image at PATH, which is of FORMAT."""
        exported: dict[str, Any] = self._last("export", path=path, format=format)
        log(f"exported {self._shown(exported['path'])}")
        return exported

    # The snapshots of images that no VM uses, which were the disks of VMs: of the FORMAT that the front-end knows.

    def delete_snapshot(self, path: str, snapshot: int, format: str) -> None:
        """Remove a snapshot of the image at PATH; it may be gone already."""
        self._session.tell("hold", path=path)
        there = self._session.call("snap_delete", path=path, snapshot=snapshot, chained=format == "qcow2")
        log(
            f"removed snapshot {snapshot} of {self._shown(path)}"
            if there
            else f"snapshot {snapshot} of {self._shown(path)} was gone already"
        )

    def revert(self, path: str, snapshot: int, format: str) -> None:
        """Let the image at PATH hold what SNAPSHOT does."""
        self._session.tell("hold", path=path)
        self._session.call("snap_revert", path=path, snapshot=snapshot, chained=format == "qcow2")
        log(f"reverted {self._shown(path)} to snapshot {snapshot}")

    def flatten(self, path: str, snapshot: int, format: str) -> None:
        """Let the image at PATH hold what SNAPSHOT does (-1: what it holds now), and remove its snapshots."""
        self._session.tell("hold", path=path)
        done = self._session.call("snap_flatten", path=path, snapshot=snapshot, format=format)
        log(f"{self._shown(path)} has no snapshots any more" if done else f"{self._shown(path)} had no snapshots")

    def capacity(self) -> tuple[int, int, int]:
        """Bytes used, in all, and free for this user, of the file system (as df counts them)."""
        used, total, free = self._last("capacity", path=self.base_path)
        return used, total, free

    def _last(self, do: str, **arguments: Any) -> Any:
        """What the last request to the machine returns; another machine keeps then what it has made."""
        if not self._session.name:
            return self._session.call("image", do=do, **arguments)
        self._session.tell("image", do=do, **arguments)
        return self._session.done()[-1]

    def _begin_again(self, path: str) -> None:
        """Over a connection of its own, if there is one at all: much is to come, or nobody knows how much."""
        self._session.reopen()
        self._session.tell("hold", path=path, make="parents")

    def _shown(self, path: str) -> str:
        return f"{self._session.name}:{path}" if self._session.name else path


def _formats(found: Found | None, driver: str) -> tuple[str, str]:
    """The format of what was FOUND, and the one it is to get when DRIVER is asked for."""
    if found is None:
        return "raw", "raw"
    if driver in _CONVERTED and found.format != "luks":
        return found.driver, driver
    return found.driver, found.driver


def _look(known: dict[str, Any], is_disk: bool) -> tuple[str, int]:
    """(format, bytes) of an image that is there already, as Images.peek() describes it."""
    if known["type"] == "dir":
        return "dir", known["size"]
    if not is_disk:
        return "raw", known["size"]
    import binascii
    import zlib

    from madrigal import inspector

    head, tail = (zlib.decompress(binascii.a2b_base64(known[end])) for end in ("head", "tail"))
    return inspector.check_ends(head, tail, known["size"]).driver, known["size"]
