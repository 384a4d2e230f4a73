"""A file, or a directory with all in it, as a stream of frames: holes and zeros are not sent.

A frame is a kind, an offset and a payload:

    O  an object begins: JSON with path ("" for the one that was asked for), type, mode, ...
    D  data of the file that is open, at this offset
    C  the object is complete: the CRC-32 of all its data; its size as the offset if the O frame has none.
       0 for the CRC if `checked` is false in the O frame: within a machine nothing happens on the way
    X  all objects are complete
    E  the sender failed: JSON [class of madrigal.errors, text]
"""

import errno
import json
import os
import stat
import struct
import zlib

from madrigal.errors import BY_NAME, BadImage, DigestMismatch, MadrigalError, NoSpace, NotFound
from madrigal.onhost.part import Nameless, Part, is_part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, Optional, Tuple, Union

    from madrigal.onhost.undo import Undo

    Frame = Tuple[bytes, int, bytes]

HEADER = struct.Struct(">cQI")
CHUNK = 1 << 20
_ZEROS = bytes(CHUNK)


def extents(fd: int, size: int) -> "Iterator[Tuple[int, int]]":
    """(offset, length) of what is allocated in the first SIZE bytes of a file, at most CHUNK each."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
            end = min(os.lseek(fd, offset, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            end = size  # a file system without holes
        while offset < end:
            length = min(CHUNK - offset % CHUNK, end - offset)
            yield offset, length
            offset += length


def data(fd: int, size: int) -> "Iterator[Tuple[int, bytes]]":
    """(offset, bytes) of what is not zero in the first SIZE bytes of a file."""
    for offset, length in extents(fd, size):
        block = os.pread(fd, length, offset)
        if len(block) < length:
            raise BadImage("a file became shorter while it was read; try again when nobody changes it")
        if block != (_ZEROS if length == CHUNK else _ZEROS[:length]):
            yield offset, block


def describe(path: str) -> "Dict[str, Any]":
    """What is at PATH: type (file, dir, link or other), size and allocated bytes, mode, mtime in ns, owner."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("{} does not exist".format(path)) from None
    kind = "file" if stat.S_ISREG(found.st_mode) else "dir" if stat.S_ISDIR(found.st_mode) else "other"
    about: "Dict[str, Any]" = {
        "type": "link" if stat.S_ISLNK(found.st_mode) else kind,
        "size": found.st_size,
        "allocated": found.st_blocks * 512,
        "mode": stat.S_IMODE(found.st_mode),
        "mtime": found.st_mtime_ns,
        "owner": [found.st_uid, found.st_gid],
    }
    if about["type"] == "link":
        about["target"] = os.readlink(path)
    return about


def measure(path: str) -> "Dict[str, Any]":
    """As describe(), of what PATH leads to; of a directory `allocated` is the sum of what is in it."""
    about = describe(os.path.realpath(path))
    if about["type"] == "dir":
        for directory, _, names in os.walk(path):
            about["allocated"] += sum(os.lstat(os.path.join(directory, name)).st_blocks * 512 for name in names)
    return about


def give(path: str, within: str = "") -> "Iterator[Frame]":
    """The frames, without the closing X, of what PATH leads to.  Sockets and the like in a directory stay behind."""
    if within:
        about = describe(path)
    else:
        path = os.path.realpath(path)
        about = measure(path)
    if about["type"] == "other":
        return
    about["path"] = within
    if about["type"] != "file":
        yield b"O", 0, json.dumps(about).encode()
        if about["type"] == "dir":
            for name in sorted(os.listdir(path)):
                if not is_part(name):  # what an interrupted run left
                    for frame in give(os.path.join(path, name), os.path.join(within, name)):
                        yield frame
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for frame in give_open(fd, about):
            yield frame
    finally:
        os.close(fd)


def give_open(fd: int, about: "Dict[str, Any]") -> "Iterator[Frame]":
    """The frames of the open file FD, described by ABOUT (its path within the stream, its mode, ...)."""
    before = os.fstat(fd)
    yield b"O", 0, json.dumps(dict(about, size=before.st_size, mtime=before.st_mtime_ns)).encode()
    crc = 0
    for offset, block in data(fd, before.st_size):
        crc = zlib.crc32(block, crc)
        yield b"D", offset, block
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        name = os.readlink("/proc/self/fd/{}".format(fd))
        raise MadrigalError("{} was changed while it was copied; try again when nobody uses it".format(name))
    yield b"C", 0, struct.pack(">I", crc)


class Receiver:
    """Writes the frames of one object below a part; with STAGING, a file into one without a name there."""

    def __init__(self, undo: "Undo", directory: str, name: str, tag: str, staging: str = "") -> None:
        self._new = undo, directory, name, tag
        self._staging = staging
        self.part: "Optional[Union[Part, Nameless]]" = None
        self.about: "Dict[str, Any]" = {}
        self.bytes = 0
        self._dirs: "Dict[str, Dict[str, Any]]" = {}
        self._fd, self._crc = -1, 0
        self._file: "Dict[str, Any]" = {}

    def take(self, kind: bytes, offset: int, payload: bytes) -> None:
        if kind == b"D":
            if self._fd < 0 or (self._file["size"] is not None and offset + len(payload) > self._file["size"]):
                raise BadImage("the stream has data outside of a file")
            if self._file.get("checked", True):
                self._crc = zlib.crc32(payload, self._crc)
            view = memoryview(payload)
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
            self.bytes += len(payload)
        elif kind == b"O":
            self._open(json.loads(payload.decode()))
        elif kind == b"C":
            self._complete(struct.unpack(">I", payload)[0], offset)
        elif kind == b"E":
            name, text = json.loads(payload.decode())
            raise BY_NAME.get(name, MadrigalError)(text)

    def _open(self, about: "Dict[str, Any]") -> None:
        path = about["path"]
        if self._fd >= 0 or (not path and self.part):
            raise BadImage("the stream has '{}' before the file or directory before it was complete".format(path))
        if not path:
            self.about = about
            self._check_space(about["allocated"])
            if self._staging and about["type"] == "file":
                self.part = Nameless(self._new[0], self._staging)
            else:
                self.part = Part(*self._new, is_dir=about["type"] == "dir")
            if about["type"] == "dir":
                self._dirs[""] = about
            elif about["type"] == "file":
                self._fd, self._file, self._crc = self.part.fd, about, 0
            else:
                raise BadImage("{} is neither a file nor a directory".format(self._new[2]))
            return
        # Only below directories that this run has made: the other side must not lead us anywhere else.
        parent, name = os.path.split(path)
        if self.part is None or parent not in self._dirs or name in ("", ".", ".."):
            raise BadImage("the stream has the unexpected path '{}'".format(path))
        base = "/proc/self/fd/{}/".format(self.part.fd)
        if about["type"] == "dir":
            os.mkdir(base + path, 0o700)
            self._dirs[path] = about
        elif about["type"] == "link":
            os.symlink(about["target"], base + path)
            _own(base + path, about)
        else:
            self._check_space(about["allocated"])
            self._fd = os.open(base + path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file, self._crc = about, 0

    def _check_space(self, needed: int) -> None:
        where = self._staging or self._new[1]
        free = os.statvfs(where)
        if needed > free.f_bavail * free.f_frsize:
            raise NoSpace(
                "{} has {} MiB free, {} MiB are needed".format(
                    where, free.f_bavail * free.f_frsize >> 20, (needed >> 20) + 1
                )
            )

    def _complete(self, crc: int, end: int) -> None:
        if self._fd < 0:
            raise BadImage("the stream has the end of a file where there is none")
        if crc != self._crc:
            raise DigestMismatch("the data of '{}' was damaged on its way".format(self._file["path"] or self._new[2]))
        os.ftruncate(self._fd, end if self._file["size"] is None else self._file["size"])
        if self._file["path"]:
            _own(self._fd, self._file)
            os.fchmod(self._fd, self._file["mode"])
            os.utime(self._fd, ns=(self._file["mtime"], self._file["mtime"]))
            os.fsync(self._fd)
            os.close(self._fd)
        self._fd = -1

    def finish(self) -> "Union[Part, Nameless]":
        """The whole part, not yet published; a directory has its permissions but for itself."""
        if self.part is None or self._fd >= 0:
            raise BadImage("the stream ended before the file was complete")
        if self.part.is_dir:
            base = "/proc/self/fd/{}/".format(self.part.fd)
            for path in sorted(self._dirs, reverse=True):
                about = self._dirs[path]
                _own(base + path, about)
                if path:
                    os.chmod(base + path, about["mode"])
                os.utime(base + path, ns=(about["mtime"], about["mtime"]))
        return self.part


def _own(where: "Any", about: "Dict[str, Any]") -> None:
    # A hypervisor may have given a disk to its own user; only root can keep that, and not on every NFS.
    if os.geteuid() != 0:
        return
    try:
        os.chown(where, about["owner"][0], about["owner"][1], follow_symlinks=isinstance(where, int))
    except OSError:
        pass
