"""Who may change an object of this machine: its locks, what is taken back on failure, and removing."""

import os
import time

from madrigal.errors import InUse, MadrigalError, NotFound
from madrigal.onhost import part
from madrigal.onhost.lock import Lock, lock_path
from madrigal.onhost.undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Sequence


_ABANDONED = 7 * 24 * 3600
"""Seconds after which nobody goes on with a part any more."""


class Holding:
    """The part of a session (onhost/session.py) that everything else is done under.

    `timeouts` are seconds: `lock` to wait for others, `work` for one program.  `waiting` is called while
    something takes time, may be told how many `bytes` have been copied, and may raise.
    """

    def __init__(self, timeouts: "Dict[str, float]", waiting: "Callable[..., None]" = lambda **_: None) -> None:
        self._timeouts = timeouts
        self._waiting = waiting
        self._undo = Undo()
        self._locks: "List[Lock]" = []
        self._probes: "Dict[str, int]" = {}

    # -- who may change what ---------------------------------------------------------------------------------

    def hold(self, path: str, make: str = "") -> None:
        """Lock the VM directory or image at PATH, which need not exist.  Held already is fine.

        MAKE: "parents" creates the directories above it that are missing, "all" the directory PATH too;
        otherwise NotFound is raised if there are none above.
        """
        if any(os.path.realpath(lock.file) == os.path.realpath(lock_path(path)) for lock in self._locks):
            return
        parent, lock = os.path.dirname(path), Lock(path)
        while True:
            if make:
                self._make_dirs(parent)
            elif not os.path.isdir(parent):
                raise NotFound("{} does not exist".format(parent))
            try:
                lock.acquire(self._timeouts["lock"], waiting=self._waiting)
                break
            except FileNotFoundError:
                continue  # whoever made the directory has just failed and taken it back
        self._locks.append(lock)
        self._undo.push(lock.release)  # after what is made under it, before the directory it lies in
        if make == "all":
            self._make_dirs(path)

    def keep(self) -> None:
        """What was made stays, whatever comes."""
        self._undo.clear()

    def done(self) -> None:
        """All is well: what was made stays, and others may change it."""
        self.keep()
        self._release()

    def fail(self, error: "Optional[BaseException]" = None) -> "List[str]":
        """Take back what was made, as far as ERROR is not one to go on after; returns what could not be taken back."""
        self._undo.is_interrupted = getattr(error, "is_interruption", False)
        failures = self._undo.unwind()
        self._release()
        return failures

    def _release(self) -> None:
        while self._locks:
            self._locks.pop().release()

    def _make_dirs(self, path: str) -> None:
        if os.path.isdir(path):
            return
        self._make_dirs(os.path.dirname(path))
        self._undo.push(_remove_empty, path)
        try:
            os.mkdir(path)
        except FileExistsError:
            # another action was first, or it is something else; either way not ours
            self._undo.forget(_remove_empty, path)
            if not os.path.isdir(path):
                raise InUse("{} is not a directory".format(path)) from None

    # -- removing --------------------------------------------------------------------------------------------

    def delete(self, path: str, within: str, beside: "Sequence[str]" = ()) -> bool:
        """Remove PATH, and PATH + each of BESIDE; who still works on WITHIN, PATH or the directory it is in, is ended.

        Returns whether it was there.  Its parts go too, and nobody who waits for WITHIN makes it again.
        """
        lock = Lock(within)
        try:
            lock.acquire(self._timeouts["lock"], taking_over=True, waiting=self._waiting)
        except FileNotFoundError:
            return False  # there is no directory to lock it in, or whoever made that took it back when we ended him
        there = False
        try:
            if os.path.isdir(os.path.dirname(path)):
                there = self._remove(path)
                for suffix in beside:
                    self._remove(path + suffix)
        finally:
            lock.release(deleted=path == within)
        return there

    def drop(self, path: str) -> None:
        """Remove PATH, whose lock this session holds: it lies somewhere else now."""
        self._remove(path)

    def tidy(self, path: str) -> None:
        """Remove the parts and the lock of PATH, which is gone, that a run left which was killed in removing it."""
        directory, name = os.path.split(path)
        lock = os.path.basename(lock_path(path))
        entries = os.listdir(directory) if os.path.isdir(directory) else []
        if any(entry == lock or part.is_part_of(name, entry) for entry in entries):
            self.hold(path)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                part.remove_parts(fd, name)
            finally:
                os.close(fd)

    def sweep(self, directory: str) -> None:
        """Remove the parts in DIRECTORY that nobody has touched for a week: of actions that were not done again."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for entry in filter(part.is_part, os.listdir(fd)):
                try:
                    if os.lstat(entry, dir_fd=fd).st_mtime < time.time() - _ABANDONED:
                        self._sweep(fd, os.path.join(directory, entry[1:].rsplit(".", 2)[0]), entry)
                except (OSError, MadrigalError):
                    pass  # somebody works on it, or it is another user's: the action has its own work
        finally:
            os.close(fd)

    def _sweep(self, fd: int, path: str, entry: str) -> None:
        lock = Lock(path)
        lock.acquire(0, self._waiting)
        try:
            part.remove(fd, entry)
        finally:
            lock.release()

    def _remove(self, path: str) -> bool:
        directory, name = os.path.split(path)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            part.remove_parts(fd, name)
            return part.remove(fd, name)
        finally:
            os.close(fd)


def _remove_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass  # somebody has put something into it meanwhile
