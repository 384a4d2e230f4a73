"""What a datastore that is a directory asks of the machine that has it, besides what every session can do."""

import binascii
import os
import zlib

from madrigal.errors import BadImage, Forbidden, InUse, MadrigalError, NotFound
from madrigal.onhost import image
from madrigal.onhost.lock import Lock
from madrigal.onhost.part import Part
from madrigal.onhost.survey import unescaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from madrigal.onhost.session import Session

HEAD, TAIL = 8 << 20, 64 << 10
"""The bytes of an image's beginning and end that say what it is (madrigal/inspector.py)."""

MARKER = ".automounted"
"""By this file in it the stock drivers know a datastore that they, or we, have mounted."""

EXPORTED = ".export"
"""What is made for a marketplace has the image's name with this behind it."""

_MOUNT = 30.0  # seconds; a server that is away must not hold up everything
_BLOCK = 1 << 20


class Images:
    """The requests `image(do=...)` of SESSION, and what it has for them."""

    def __init__(
        self,
        session: "Session",
        make_dirs: "Callable[[str], None]",
        waiting: "Callable[[], None]",
        timeouts: "Dict[str, float]",
    ) -> None:
        self._session, self._make_dirs, self._waiting, self._timeouts = session, make_dirs, waiting, timeouts

    def mount(self, path: str, server: str, options: str) -> None:
        """Have the NFS share SERVER (`host:/path`) mounted at PATH, by sudo, and mark it; /etc/fstab stays as it is.

        A mount is not taken back: others may use it by then.
        """
        self._make_dirs(path)
        if _mounted(path) == server:
            return
        lock = Lock(path)  # outside of it: PATH is a name in two file systems
        lock.acquire(self._timeouts["lock"], waiting=self._waiting)
        try:
            mounted = _mounted(path)
            if mounted == server:
                return
            if mounted:
                raise InUse("{} is mounted at {}, not {}: unmount it".format(mounted, path, server))
            self._mount(["sudo", "-n", "mount", "-t", "nfs", "-o", options, server, path], server, path)
            os.close(os.open(os.path.join(path, MARKER), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        finally:
            lock.release()

    def _mount(self, argv: "List[str]", server: str, path: str) -> None:
        from madrigal.command import run

        result = run(argv, _MOUNT, what="mounting {}".format(server), waiting=self._waiting, check=False)
        if not result.status:
            return
        text = "cannot mount {} at {}: {}".format(server, path, result.complaint() or "mount gave no reason")
        if b"sudo:" in result.stderr:
            raise Forbidden(text + "; allow it in sudoers (madrigal driver sudoers)")
        raise MadrigalError(text)

    def begin(self, path: str) -> "Optional[Dict[str, Any]]":
        """Hold the image PATH, which is to be made; None, or if it is there already what peek() says.

        Parts of others that are old go.
        """
        self._session.hold(path, make="parents")
        self._session.sweep(os.path.dirname(path))
        return self.peek(path) if os.path.lexists(path) else None

    def peek(self, path: str) -> "Dict[str, Any]":
        """{"type": dir or file, "size": bytes, of a directory those of its files} and a file's "head" and "tail"."""
        if os.path.isdir(path):
            names = ((top, name) for top, _, found in os.walk(path) for name in found)
            return {"type": "dir", "size": sum(os.lstat(os.path.join(top, name)).st_size for top, name in names)}
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD)
            file.seek(max(0, size - TAIL))
            return {"type": "file", "size": size, "head": _packed(head), "tail": _packed(file.read(TAIL))}

    def take(self, source: str, path: str) -> str:
        """Copy the file SOURCE to what adopt() is to make PATH; returns where it lies until then."""
        from madrigal.onhost import copy

        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = self._session.part(path, "import")
            copy.copy_file(fd, made.fd, self._waiting)
        finally:
            os.close(fd)
        self._session.arrived = made
        return made.path

    def adopt(self, path: str, format: str, driver: str, allocate: bool) -> int:
        """Make PATH, an image of DRIVER, of what take() or receive() brought, which is of FORMAT; returns its bytes.

        ALLOCATE: without holes.
        """
        arrived, self._session.arrived = self._session.arrived, None
        if arrived is None:
            raise AssertionError("nothing has arrived")
        if isinstance(arrived, Part) and format == driver:
            made = arrived
        else:
            made = self._session.part(path, "converted", beside=arrived if isinstance(arrived, Part) else None)
            from madrigal.onhost import consume

            if format != driver:
                consume.convert(arrived, format, made.path, driver, self._waiting, self._timeouts["work"])
            else:
                consume.move(arrived, made, self._waiting)
            arrived.discard()
        self._session.publish(made, preallocate=_preallocated(driver, allocate))
        return os.stat(path).st_size

    def make(self, path: str, **about: "Any") -> None:
        """Make PATH an empty image, as Session.make does; there already is fine."""
        self._session.hold(path, make="parents")
        if not os.path.lexists(path):
            self._session.make(path, **about)

    def clone(self, source: str, path: str, format: str, driver: str, allocate: bool) -> int:
        """Make PATH a copy of the image SOURCE of this machine, converted from FORMAT to DRIVER; returns its bytes.

        There already is fine.
        """
        self._session.hold(path, make="parents")
        if os.path.lexists(path):
            return os.stat(path).st_size
        if not os.path.exists(source):
            raise NotFound("the image to clone, {}, does not exist".format(source))
        source, is_chain = _current(source, format)
        if format != driver or is_chain:
            before = os.stat(source)
            made = self._session.part(path, "converted")
            image.convert(source, format, made.path, driver, self._waiting, self._timeouts["work"])
            after = os.stat(source)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise MadrigalError("{} was changed while it was cloned; try again when nobody uses it".format(source))
            self._session.publish(made, preallocate=_preallocated(driver, allocate))
            return os.stat(path).st_size
        self.take(source, path)
        return self.adopt(path, format, format, allocate)

    def export(self, path: str, format: str) -> "Dict[str, Any]":
        """{"path": a file with what the image PATH of FORMAT has now, "md5": of its bytes, "made": whether for this}.

        Of a chain of snapshots it is a copy of all that is in it.
        """
        import hashlib

        if not os.path.exists(path):
            raise NotFound("the image to export, {}, does not exist".format(path))
        self._session.hold(path)
        whole, made = _current(path, format)
        if made:
            part = self._session.part(path + EXPORTED, "whole")
            image.convert(whole, format, part.path, format, self._waiting, self._timeouts["work"])
            self._session.publish(part)
            whole = path + EXPORTED
        digest = hashlib.md5()
        with open(whole, "rb") as file:
            for block in iter(lambda: file.read(_BLOCK), b""):
                self._waiting()
                digest.update(block)
        return {"path": whole, "md5": digest.hexdigest(), "made": made}

    def capacity(self, path: str) -> "List[int]":
        """Bytes used, in all, and free for this user, of the file system of PATH (as df counts them)."""
        os.makedirs(path, exist_ok=True)
        found = os.statvfs(path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        return [used, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize]


def _current(path: str, format: str) -> "Tuple[str, bool]":
    """The file that has the current state of the image at PATH, and whether it lies on others, which are its own.

    Raises BadImage if it lies on another image: whoever may read this one may not read that.
    """
    from madrigal.onhost import layout

    top, lies_on_others = layout.state(path, {"format": format, "snapshot": -1, "image": ""})
    if lies_on_others:
        place = layout.Place(path, format)
        if not place.is_chain:
            raise BadImage("{} lies on another file, which is not one of its snapshots".format(path))
        place.contents()
    return top, lies_on_others


def _preallocated(format: str, allocate: bool) -> str:
    """FORMAT if an image of it is to take all its space at once, as far as that can be had for it."""
    return format if allocate and format in ("raw", "qcow2") else ""


def _mounted(path: str) -> str:
    """The source of the file system that is mounted at PATH, "" if none is."""
    real, found = os.path.realpath(path), ""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, rest = line.partition(b" - ")
            if unescaped(fields.split()[4]) == real:
                found = unescaped(rest.split()[1])  # the last one is on top
    return found


def _packed(data: bytes) -> str:
    return binascii.b2a_base64(zlib.compress(data, 1), newline=False).decode()
