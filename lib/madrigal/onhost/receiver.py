"""Makes of a stream (onhost/stream.py) what it is of, as a part that is not published yet."""

import json
import os
import time

from madrigal.errors import BY_NAME, BadImage, DigestMismatch, HostUnreachable, MadrigalError, NoSpace
from madrigal.onhost import copy, squeeze, stream
from madrigal.onhost.part import Nameless, Part, left, share, sync

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Union

    from madrigal.onhost.blocks import Known
    from madrigal.onhost.device import Device
    from madrigal.onhost.stream import Payload
    from madrigal.onhost.undo import Undo

    Fill = Callable[[int, int], None]

_ZEROS = bytes(1 << 20)


class Receiver:
    """Writes the frames of one object: `take` gets them, `finish` gives the part.

    SOURCE: what the data are of, if the part is to stay when this is interrupted; BEGUN: the part of the same that is
    gone on with.  STAGING: a file is made without a name in that directory.  BASIS: open files by
    path within the stream; of such a path the frames have only what is not the same in the file, or, of a file that is
    in BEGUN, in what that lacks, of which BROUGHT tells.  DEVICE: a file is written there.
    """

    def __init__(
        self,
        undo: "Undo",
        directory: str,
        name: str,
        source: str = "",
        staging: str = "",
        basis: "Optional[Dict[str, int]]" = None,
        begun: "Optional[Part]" = None,
        device: "Optional[Device]" = None,
        brought: "Optional[Dict[str, Known]]" = None,
    ) -> None:
        self._undo, self._directory, self._name, self._device = undo, directory, name, device
        self._brought = brought or {}
        self._source, self._staging, self._basis, self._begun = source, staging, basis or {}, begun
        self.part: "Optional[Union[Part, Nameless, Device]]" = None
        self.about: "Dict[str, Any]" = {}
        self.bytes = 0
        self._dirs: "Dict[str, Dict[str, Any]]" = {}
        self._files: "List[Dict[str, Any]]" = []
        self._file: "Optional[File]" = None
        self._copying: "Optional[copy.Ahead]" = None

    def take(self, kind: bytes, offset: int, payload: "Payload") -> None:
        if kind == b"O":
            self._open(described(payload))
        elif kind == b"E":
            fail(payload)
        elif self._file is None:
            raise BadImage(
                "the stream has {} where there is no file".format("the end of a file" if kind == b"C" else "data")
            )
        else:
            self.bytes += self._file.take(kind, offset, payload)
            if kind == b"C":
                if self._copying:
                    self._copying.end()
                    self._copying = None
                if self._file.about["path"]:
                    os.close(self._file.fd)
                self._file = None

    def _open(self, about: "Dict[str, Any]") -> None:
        path = about["path"]
        if self._file or (not path and self.part):
            raise BadImage("the stream has '{}' before the file or directory before it was complete".format(path))
        if not path:
            self._begin(about)
            return
        # Only below directories that this run has made: the other side must not lead us anywhere else.
        parent, name = os.path.split(path)
        if self.part is None or parent not in self._dirs or name in ("", ".", ".."):
            raise BadImage("the stream has the unexpected path '{}'".format(path))
        where = "/proc/self/fd/{}/{}".format(self.part.fd, path)
        there = self._begun is not None and os.path.lexists(where)
        if about["type"] == "dir":
            if not there:
                os.mkdir(where, 0o700)
            self._dirs[path] = about
        elif about["type"] == "link":
            if not there:
                os.symlink(about["target"], where)
            own(where, about)
        else:
            if not there:
                check_space(self._directory, about["allocated"])
            flags = os.O_RDWR | os.O_CREAT | (0 if there else os.O_EXCL) | os.O_NOFOLLOW | os.O_CLOEXEC
            self._begin_file(os.open(where, flags, 0o600), about, there)
            self._files.append(about)

    def _begin(self, about: "Dict[str, Any]") -> None:
        self.about = about
        if about["type"] not in ("file", "dir"):
            raise BadImage("{} is neither a file nor a directory".format(self._name))
        if self._device:
            self.part, self._file = self._device, self._device.begin(about)
            return
        is_dir = about["type"] == "dir"
        if self._staging and not is_dir:
            check_space(self._staging, about.get("needs", about["allocated"]))
            self.part = Nameless(self._undo, self._staging)
        elif self._begun:
            check_space(self._directory, about["allocated"] - left(self._begun.path))
            if self._begun.is_dir != is_dir:
                raise BadImage("what an interrupted run has left of {} is not what it is now".format(self._name))
            self.part = self._begun
        else:
            check_space(self._directory, about.get("needs", about["allocated"]))
            tag, stays = "stream" + self._source, bool(self._source)
            self.part = Part(self._undo, self._directory, self._name, tag, is_dir, stays=stays)
        if about["type"] == "dir":
            self._dirs[""] = about
            return
        self._begin_file(self.part.fd, about, self._begun is not None)

    def _begin_file(self, fd: int, about: "Dict[str, Any]", there: bool) -> None:
        fill, zero = None, write_zeros if there else None
        old = self._basis.get(about["path"])
        if old is not None:
            brought = self._brought.get(about["path"])
            if brought is None and copy.clone(old, fd):
                zero = write_zeros
            else:
                self._copying = copy.Ahead(old, fd)
                fill = _filling(brought, self._copying.fill) if brought else self._copying.fill
        self._file = File(fd, about, about["path"] or self._name, fill, zero)

    def close(self) -> None:
        """Use no file any more, whether it is whole or not."""
        if self._copying:
            self._copying.close()

    def finish(self) -> "Union[Part, Nameless, Device]":
        """The whole part, not yet published; a directory has its permissions but for itself."""
        if self.part is None or self._file:
            raise BadImage("the stream ended before the file was complete")
        if not isinstance(self.part, Part) or not self.part.is_dir:
            return self.part
        base = "/proc/self/fd/{}/".format(self.part.fd)
        for about in self._files:
            sync(base + about["path"])
        self.part.end_staying()
        for about in self._files:
            where = base + about["path"]
            own(where, about)
            os.chmod(where, about["mode"])
            os.utime(where, ns=(about["mtime"], about["mtime"]))
            sync(where)
        for path in sorted(self._dirs, reverse=True):
            about = self._dirs[path]
            own(base + path, about)
            if path:
                os.chmod(base + path, about["mode"])
            os.utime(base + path, ns=(about["mtime"], about["mtime"]))
        return self.part


def _filling(brought: "Known", fill: "Fill") -> "Fill":
    """FILL, of what was not BROUGHT alone."""

    def filling(start: int, end: int) -> None:
        for span in brought.lacking(start, end):
            fill(*span)

    return filling


class Lane:
    """Writes its share of the data of files that another process makes as the part WHERE.

    That process publishes them when all lanes are done.  WAITING and SECONDS: for it to have made them.
    """

    def __init__(self, where: str, waiting: "Callable[[], None]", seconds: float) -> None:
        self._where, self._waiting, self._end = where, waiting, time.monotonic() + seconds
        self._held = -1
        self._file: "Optional[File]" = None
        self.bytes = 0

    def take(self, kind: bytes, offset: int, payload: "Payload") -> None:
        if kind == b"E":
            fail(payload)
        elif kind == b"O":
            about = described(payload)
            if self._held < 0:
                self._held = self._opened(self._where, os.O_RDONLY)
                share(self._held)
            if about["type"] == "file":
                path = os.path.join(self._where, about["path"]) if about["path"] else self._where
                self._file = File(self._opened(path, os.O_RDWR), about, about["path"] or self._where, zero=write_zeros)
        elif self._file is None:
            raise BadImage("the stream has data where there is no file")
        else:
            self.bytes += self._file.take(kind, offset, payload)
            if kind == b"C":
                os.close(self._file.fd)
                self._file = None

    def _opened(self, path: str, flags: int) -> int:
        while True:
            try:
                return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if time.monotonic() > self._end:
                    raise HostUnreachable("{} was not begun by the action it belongs to".format(path)) from None
            self._waiting()
            time.sleep(0.02)


class File:
    """A file that gets its data: in order, if it is to FILL (from, to) what the stream leaves out.

    ZERO (fd, from, to) makes zeros where the stream says that there are some; without it there are.
    """

    def __init__(
        self,
        fd: int,
        about: "Dict[str, Any]",
        name: str,
        fill: "Optional[Fill]" = None,
        zero: "Optional[Callable[[int, int, int], None]]" = None,
    ) -> None:
        self.fd, self.about, self._name = fd, about, name
        self._fill, self._zero = fill, zero
        self._checks = stream.Checks(about.get("verify", "crc32"))
        self._reached = 0
        self._behind = copy.Behind(fd, about["allocated"])

    def take(self, kind: bytes, offset: int, payload: "Payload") -> int:
        """Do what the frame says; returns how many bytes of data it had."""
        if kind == b"P":
            kind, payload = b"D", squeeze.unpacked(payload, stream.CHUNK)
        if kind == b"D":
            self._write(offset, payload)
            return len(payload)
        if kind == b"Z":
            if len(payload) != stream.LENGTH.size:
                raise BadImage("the stream does not say how many zeros there are")
            self._checks.add(offset, payload)
            end = offset + stream.LENGTH.unpack(payload)[0]
            self._reach(offset, end)
            if self._zero:
                self._zero(self.fd, offset, end)
        elif kind == b"V":
            self._compare(payload)
        elif kind == b"C":
            self._compare(payload)
            size = offset if self.about["size"] is None else self.about["size"]
            self._reach(size, size)
            self._end(size)
        else:
            raise BadImage("the stream has a frame of the unknown kind {!r}".format(kind))
        return 0

    def _write(self, offset: int, payload: "Payload") -> None:
        self._checks.add(offset, payload)
        start, view = offset, memoryview(payload)
        self._reach(offset, offset + len(view))
        while view:
            written = self._put(view, offset)
            view, offset = view[written:], offset + written
        self._behind.passed(start)

    def _put(self, view: memoryview, offset: int) -> int:
        return os.pwrite(self.fd, view, offset)

    def _end(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def _reach(self, start: int, end: int) -> None:
        if self.about["size"] is not None and end > self.about["size"]:
            raise BadImage("the stream has data outside of a file")
        if self._fill:
            if start < self._reached:
                raise BadImage("the stream goes back in '{}'".format(self._name))
            self._fill(self._reached, start)
            self._reached = end

    def _compare(self, checks: "Payload") -> None:
        if self._checks.take() != checks:
            raise DigestMismatch("the data of '{}' was damaged on its way".format(self._name))


def fail(payload: "Payload") -> None:
    """Raise what an E frame says."""
    try:
        name, text = map(str, json.loads(bytes(payload).decode()))
    except (ValueError, TypeError, RecursionError):
        raise MadrigalError("the other side failed, and what it says of it cannot be understood") from None
    raise BY_NAME.get(name, MadrigalError)(text)


def described(payload: "Payload") -> "Dict[str, Any]":
    """What an O frame says, with all that is needed of it; raises BadImage."""
    try:
        about: "Dict[str, Any]" = json.loads(bytes(payload).decode())
        texts = [about["path"], about["type"], about.get("verify", "none"), about.get("target", "")]
        sizes = [about["allocated"], *(about[name] for name in ("size", "needs") if about.get(name) is not None)]
        numbers = [*sizes, about.get("mtime", 0), about["mode"], *about["owner"][:2]]
        is_good = (
            all(type(number) is int and abs(number) < 1 << 62 for number in numbers)
            and min(sizes) >= 0
            and 0 <= about["mode"] <= 0o7777
            and all(0 <= owner < 1 << 32 for owner in about["owner"])
            and len(about["owner"]) == 2
            and not any(b"\0" in os.fsencode(text) for text in texts)
            and ("target" in about or about["type"] != "link")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_good = False
    if not is_good:
        raise BadImage("the stream describes a file in a way that is not known here")
    return dict({"size": None, "mtime": 0}, **about)


def write_zeros(fd: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(fd, _ZEROS[: end - start], start)


def check_space(where: str, needed: int) -> None:
    """Raise NoSpace if the file system of the directory WHERE has not NEEDED bytes for this user."""
    free = os.statvfs(where)
    if needed > free.f_bavail * free.f_frsize:
        text = "{} has {} MiB free, {} MiB are needed"
        raise NoSpace(text.format(where, free.f_bavail * free.f_frsize >> 20, (needed >> 20) + 1))


def own(where: str, about: "Dict[str, Any]") -> None:
    # A hypervisor may have given a disk to its own user; only root can keep that, and not on every NFS.
    if os.geteuid() != 0:
        return
    try:
        os.chown(where, about["owner"][0], about["owner"][1], follow_symlinks=False)
    except OSError:
        pass
