"""A file or directory in the making: beside its final place under a name of its own, then renamed.

The part of `disk.0` is `.disk.0.<tag>.part`, the tag naming what it is made from.  Everything is done
relative to the open directory: if somebody removes the directory and another run makes it anew, a late
rename lands in the removed one.
"""

import errno
import fcntl
import os
import stat
import time

from madrigal.errors import InUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Optional

    from madrigal.onhost.undo import Undo


WORTH = 16 << 20
"""Bytes from which on a part is worth to be gone on with."""

_PATIENCE = 5.0  # seconds for the writers of an interrupted run to end
_STILL_OPEN = 10.0  # seconds for a hypervisor on its way out: on NFS a file that it has open stays, by another name


class Part:
    """What will be NAME in DIRECTORY (which must exist).  Its `fd` is open until `publish`; UNDO takes it back.

    The caller holds the lock of the object, so parts of it are of runs that were killed, and go; but not BESIDE.
    STAYS: if the action is interrupted and much of it is there.  RESUME: one with the same TAG that stayed is gone on
    with (`is_resumed`), unless somebody still writes to it.
    """

    def __init__(
        self,
        undo: "Undo",
        directory: str,
        name: str,
        tag: str,
        is_dir: bool = False,
        beside: "Optional[Part]" = None,
        stays: bool = False,
        resume: bool = False,
    ) -> None:
        self._undo, self._stays = undo, stays
        self.directory, self.name = directory, name
        self.part = part_name(name, tag)
        self.is_dir = is_dir
        self.dir_fd, self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), -1
        if beside is None:
            remove_parts(self.dir_fd, name, but=self.part if resume else "")
        undo.push(self._take_back)
        self.is_resumed = resume and self._resume()
        if not self.is_resumed:
            # Readable by nobody else until it is published with its final mode.
            if is_dir:
                os.mkdir(self.part, 0o700, dir_fd=self.dir_fd)
            self.fd = self._open(0 if is_dir else os.O_CREAT | os.O_EXCL)
        if stays:
            share(self.fd)

    def _open(self, flags: int) -> int:
        flags |= os.O_RDONLY | os.O_DIRECTORY if self.is_dir else os.O_RDWR
        return os.open(self.part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.dir_fd)

    def _resume(self) -> bool:
        """Open what an interrupted run has left; it goes if that cannot be done."""
        end = time.monotonic() + _PATIENCE
        try:
            self.fd = self._open(0)
            while True:
                try:
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                time.sleep(0.05)
        except OSError:
            self._close()
            remove(self.dir_fd, self.part)
            return False

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def path(self) -> str:
        """For programs that want a name."""
        return os.path.join(self.directory, self.part)

    def end_staying(self) -> None:
        """Have nobody go on with it: from here on it is not what was sent any more."""
        if self._stays:
            self._stays = False
            remove(self.dir_fd, part_name(self.name, "whole"))
            os.rename(self.part, part_name(self.name, "whole"), src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
            self.part = part_name(self.name, "whole")

    def publish(self, mode: int) -> None:
        """Give it its name, replacing what has it.  MODE is its permissions.  On return it is on the disk.

        Until the action ends well it is removed again on failure, if nothing was replaced.
        """
        os.fchmod(self.fd, mode)
        os.fsync(self.fd)
        if exists(self.dir_fd, self.name):
            if self.is_dir:  # rename() replaces an empty directory only
                remove(self.dir_fd, self.name)
        else:
            self._undo.push(remove, None, os.path.join(self.directory, self.name))
        os.rename(self.part, self.name, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
        os.fsync(self.dir_fd)
        self._close()
        os.close(self.dir_fd)
        self._undo.forget(self._take_back)

    def publish_in(self, directory: "Part", name: str, mode: int) -> None:
        """Give it NAME within DIRECTORY, a part too, with MODE as its permissions.  It is on the disk then."""
        os.fchmod(self.fd, mode)
        os.fsync(self.fd)
        os.rename(self.part, name, src_dir_fd=self.dir_fd, dst_dir_fd=directory.fd)
        self._close()
        os.close(self.dir_fd)
        self._undo.forget(self._take_back)

    def discard(self) -> None:
        """Take it back."""
        self._undo.forget(self._take_back)
        self._close()
        try:
            remove(self.dir_fd, self.part)
        finally:
            os.close(self.dir_fd)

    def _take_back(self) -> None:
        if self._stays and self._undo.is_interrupted and left(self.path) >= WORTH:
            self._close()
            os.close(self.dir_fd)
        else:
            self.discard()


class Nameless:
    """A file without a name in DIRECTORY, which no kill leaves behind: for what is to be copied to its place."""

    is_dir = False

    def __init__(self, undo: "Undo", directory: str) -> None:
        self._undo = undo
        self.fd = nameless(directory)
        undo.push(self.discard)

    @property
    def path(self) -> str:
        """For programs that want a name, as long as this process lives."""
        return "/proc/{}/fd/{}".format(os.getpid(), self.fd)

    def discard(self) -> None:
        self._undo.forget(self.discard)
        os.close(self.fd)


def nameless(directory: str) -> int:
    """A new file without a name in DIRECTORY, open."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # NFS for one has no files without a name
            raise
    name = os.path.join(directory, ".madrigal.{}.part".format(os.urandom(8).hex()))
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(name)
    return fd


def left(path: str) -> int:
    """The bytes on the disk of what is at PATH, with all in it; 0 if it is not there."""
    try:
        found = os.lstat(path).st_blocks
    except FileNotFoundError:
        return 0
    for base, _, names in os.walk(path):
        found += sum(os.lstat(os.path.join(base, name)).st_blocks for name in names)
    return found * 512


def share(fd: int, waiting: bool = False) -> None:
    """Say, until FD is closed, that this process uses the part; WAITING for who looks at it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | (0 if waiting else fcntl.LOCK_NB))
    except OSError:
        pass  # a file system that cannot; who wants it alone finds that out too


def part_name(name: str, tag: str) -> str:
    return ".{}.{}.part".format(name, tag)


def is_part(name: str) -> bool:
    """Whether NAME is one that only a Part has."""
    return name.startswith(".") and name.endswith(".part") and name.count(".") >= 3


def is_part_of(name: str, entry: str) -> bool:
    """Whether ENTRY is the name of a part of NAME."""
    return entry.startswith(".{}.".format(name)) and entry.endswith(".part")


def exists(dir_fd: int, name: str) -> bool:
    """Whether NAME is in the open directory, if only as a link to nowhere."""
    try:
        os.lstat(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True


def remove(dir_fd: "Optional[int]", name: str) -> bool:
    """Remove NAME, file, link or directory, of the directory open as DIR_FD; returns whether it was there.

    A directory gets a part's name first: nobody takes what is half removed for the whole.
    """
    if dir_fd is None:
        dir_fd = os.open(os.path.dirname(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return remove(dir_fd, os.path.basename(name))
        finally:
            os.close(dir_fd)
    try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=dir_fd).st_mode):
            os.unlink(name, dir_fd=dir_fd)
            return True
        import shutil  # here, because it costs a third of a worker's start

        if not name.endswith(".part"):
            gone = ".{}.gone.part".format(name)
            remove(dir_fd, gone)
            os.rename(name, gone, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            name = gone
        end = time.monotonic() + _STILL_OPEN
        while True:
            try:
                # rmtree has no dir_fd before Python 3.11; this is the same
                shutil.rmtree("/proc/self/fd/{}/{}".format(dir_fd, name))
                return True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                    raise
                if time.monotonic() > end:
                    text = "{} cannot be removed: files in it are still open, or are made by somebody"
                    raise InUse(
                        text.format(os.path.join(os.readlink("/proc/self/fd/{}".format(dir_fd)), name))
                    ) from None
            time.sleep(0.2)
    except FileNotFoundError:
        return False
    return True


def link(undo: "Undo", target: str, path: str) -> None:
    """Make PATH a symbolic link to TARGET, in place of what is there."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, ".{}.link.part".format(name))
    remove(None, temporary)
    if os.path.isdir(path) and not os.path.islink(path):
        remove(None, path)
    if not os.path.lexists(path):
        undo.push(os.unlink, path)
    undo.push(os.unlink, temporary)
    os.symlink(target, temporary)
    os.rename(temporary, path)


def remove_parts(dir_fd: int, name: str, but: str = "") -> None:
    """Remove what interrupted runs left of NAME, BUT one.  The caller holds the lock, so nobody is writing them."""
    for entry in os.listdir(dir_fd):
        if is_part_of(name, entry) and entry != but:
            remove(dir_fd, entry)


def opened(path: str) -> "BinaryIO":
    """PATH to be read; if it is a pipe, nobody waits for who writes to it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def sync(path: str) -> None:
    """Flush the file or directory at PATH to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
