"""Who else is changing this VM directory or image: a lock file beside it, held by the process that works.

The lock of `/ds/0/17` is `/ds/0/.17.lock`.  It is a file and not the directory itself because NFS locks need a
file open for writing, and beside the object because the object comes and goes.  The kernel drops a dead
holder's lock; a holder that ends well removes the file, and whoever got a lock on a removed file tries again.
A program that a holder starts to write a disk inherits the lock (see `inherited`): when the holder is killed,
the orphan still keeps others off until it has ended.
"""

import errno
import fcntl
import os
import signal
import time

from madrigal.errors import Busy, Deleted, Forbidden

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Set

GRACE = 5.0  # seconds between asking a holder to end and ending it

# The name of a process that deletes, by which other deletes know it from the first moment on.  What it notes in
# the lock file comes too late for that: it waits before it has the lock.
_DELETES = "madrigal-delete"

_held: "List[Lock]" = []


def inherited() -> "List[int]":
    """The descriptors a program that writes a disk must inherit."""
    return [lock.fd for lock in _held if lock.fd is not None]


def lock_path(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, ".{}.lock".format(name))


class Lock:
    """The right to change the object at `path`; FILE (by default beside it) is in a directory that exists."""

    def __init__(self, path: str, file: str = "") -> None:
        self.path = path
        self.file = file or lock_path(path)
        self.fd: "Optional[int]" = None

    def acquire(self, seconds: float, waiting: "Callable[[], None]", taking_over: bool = False) -> None:
        """Wait up to SECONDS; raises Busy after that, and Deleted if a delete finished meanwhile.

        WAITING is called between tries and may raise.  TAKING_OVER is for delete: whoever works on the object or
        waits for it is ended, unless it is a delete itself.
        """
        if taking_over:
            with open("/proc/self/comm", "w") as comm:
                comm.write(_DELETES)
        end = time.monotonic() + seconds
        pause = 0.01
        asked: "Dict[int, float]" = {}
        while True:
            fd = self._open()
            try:
                while not self._try(fd):
                    now = time.monotonic()
                    if now >= end:
                        raise Busy(
                            "{} is being changed by {} and did not become free in {:g} s; try again".format(
                                self.path, _who(fd), seconds
                            )
                        )
                    if taking_over:
                        for pid in _openers(fd):
                            if _deletes(pid):
                                continue
                            if pid not in asked:
                                asked[pid] = now
                                _signal(pid, signal.SIGTERM)
                            elif now - asked[pid] > GRACE:
                                _signal(pid, signal.SIGKILL)
                    waiting()
                    time.sleep(min(pause, end - now))
                    pause = min(pause * 2, 0.25)
                if is_current(fd, self.file):
                    self.fd, fd = fd, -1
                    _held.append(self)
                    self._note("delete" if taking_over else "work")
                    return
                if _content(fd).startswith(b"deleted") and not taking_over:
                    raise Deleted("{} was deleted while this action waited for it".format(self.path))
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self, deleted: bool = False) -> None:
        """Let others in.  DELETED tells those who wait that there is nothing left to change."""
        if self.fd is None:
            return
        fd, self.fd = self.fd, None
        _held.remove(self)
        try:
            if deleted:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"deleted\n", 0)
            os.unlink(self.file)  # while it is locked: nobody else can have it under this name
        except OSError:
            pass  # gone with its directory, or a file system that became read-only
        finally:
            os.close(fd)

    def _open(self) -> int:
        try:
            # O_NOFOLLOW: a link planted in a datastore must not make us write elsewhere
            return os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except PermissionError:
            raise Forbidden("cannot write in {}: permission denied".format(os.path.dirname(self.file))) from None

    def _try(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno == errno.ESTALE:  # NFS: the file was removed by another client
                return True  # is_current() will say no
            raise

    def _note(self, what: str) -> None:
        assert self.fd is not None
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, "{} pid {}\n".format(what, os.getpid()).encode(), 0)


def is_current(fd: int, file: str) -> bool:
    """Whether the open file is still the one with this name, and not one that was removed."""
    try:
        there, ours = os.stat(file, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def locked_in(directory: str) -> str:
    """A file below DIRECTORY, or itself if it is one, that a process of this machine has locked, "" if there is none.

    The kernel's list shows locks of all users; a file system whose files have other device numbers there (btrfs) is
    not seen.
    """
    with open("/proc/locks") as file:
        devices = [word.split(":") for line in file for word in line.split() if word.count(":") == 2]
    locks = {(int(major, 16), int(minor, 16), int(inode)) for major, minor, inode in devices}
    below = [os.path.join(base, name) for base, _, names in os.walk(directory) for name in names]
    for path in below or [directory]:
        try:
            found = os.lstat(path)
        except OSError:
            continue  # gone meanwhile
        if (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino) in locks:
            return path
    return ""


def _content(fd: int) -> bytes:
    try:
        return os.pread(fd, 64, 0)
    except OSError:
        return b""


def _who(fd: int) -> str:
    openers = sorted(_openers(fd))
    if openers:
        return "process " + ", ".join(map(str, openers))
    return "another machine (it noted: {})".format(_content(fd).decode("ascii", "replace").strip() or "nothing")


def _openers(fd: int) -> "Set[int]":
    """The other processes of this user on this machine that have the file open: holders and those who wait."""
    ours, found = os.fstat(fd), set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            for number in os.listdir("/proc/{}/fd".format(name)):
                other = os.stat("/proc/{}/fd/{}".format(name, number))
                if (other.st_dev, other.st_ino) == (ours.st_dev, ours.st_ino):
                    found.add(int(name))
                    break
        except OSError:
            continue  # ended, or not ours
    return found


def _deletes(pid: int) -> bool:
    try:
        with open("/proc/{}/comm".format(pid)) as comm:
            return comm.read().strip() == _DELETES
    except OSError:
        return False  # ended


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass
