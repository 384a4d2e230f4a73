"""What one action does to the files of one machine: everything under its locks, taken back if it fails."""

import errno
import os

from madrigal.errors import InUse, NotFound, NotSupported
from madrigal.onhost import part
from madrigal.onhost.lock import Lock, lock_path
from madrigal.onhost.part import Part
from madrigal.onhost.undo import Undo

# The other modules are imported where they are needed: an action on the front-end pays for what it uses.

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

    from madrigal.onhost.stream import Frame


class Session:
    """The public methods are what a front-end may ask of a host (host/worker.py); arguments and results are JSON.

    `timeouts` are seconds: `lock` to wait for others, `work` for one program.
    """

    def __init__(self, timeouts: "Dict[str, float]", waiting: "Callable[[], None]" = lambda: None) -> None:
        self._timeouts = timeouts
        self._waiting = waiting
        self._undo = Undo()
        self._locks: "List[Lock]" = []

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

    def done(self) -> None:
        """All is well: what was made stays."""
        self._undo.clear()
        self._release()

    def fail(self) -> "List[str]":
        """Take back what was made; returns what could not be taken back."""
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

    # -- asking ----------------------------------------------------------------------------------------------

    def measure(self, path: str) -> "Dict[str, Any]":
        """Type, size, allocated bytes and so on of what PATH leads to; raises NotFound."""
        from madrigal.onhost import stream

        return stream.measure(path)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def need(self, path: str, message: str) -> None:
        """Raise NotFound(MESSAGE) if PATH does not exist."""
        if not os.path.exists(path):
            raise NotFound(message)

    def offer(self, path: str, probe: str) -> "Optional[Dict[str, Any]]":
        """Hold PATH and show a file named PROBE in it, to find out who else sees it; what measure() says of it.

        None if it is not there.
        """
        if not os.path.lexists(path):
            return None
        self.hold(path)
        name = _probe(path, probe)
        self._undo.push(os.unlink, name)
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return self.measure(path)

    def see(self, paths: "List[str]", probe: str) -> str:
        """The first of PATHS where the PROBE of offer() is seen, "" if it is nowhere."""
        return next((path for path in paths if os.path.exists(_probe(path, probe))), "")

    def hide(self, path: str, probe: str) -> None:
        """Remove the PROBE of offer()."""
        os.unlink(_probe(path, probe))
        self._undo.forget(os.unlink, _probe(path, probe))

    def give_back(self, path: str, target: str) -> "Dict[str, Any]":
        """Hold the directory of the disk PATH, which is to be moved to TARGET, a path that may be another machine's.

        {"there": whether there is the directory, "moved": whether PATH leads to TARGET, "allocated": bytes or None}
        """
        if not os.path.lexists(os.path.dirname(path)):
            return {"there": False, "moved": False, "allocated": None}
        self.hold(os.path.dirname(path))
        moved = os.path.islink(path) and os.path.realpath(path) == os.path.realpath(target)
        there = not moved and os.path.lexists(path)
        return {"there": True, "moved": moved, "allocated": self.measure(path)["allocated"] if there else None}

    def refuse_overlay(self, path: str) -> None:
        """Raise NotSupported if the qcow2 image at PATH is not whole without another file."""
        from madrigal.onhost import image

        if image.is_overlay(path):
            raise NotSupported("{} is the top of a snapshot chain, which this driver cannot flatten yet".format(path))

    # -- for who works on this machine himself ------------------------------------------------------------

    def part(self, path: str, tag: str, beside: "Optional[Part]" = None) -> Part:
        """A file that is to become PATH, which this session holds."""
        directory, name = os.path.split(path)
        return Part(self._undo, directory, name, tag, beside=beside)

    def publish(self, made: Part, grow: "Optional[List[Any]]" = None, mode: "Optional[int]" = None) -> None:
        """Give the part its name, grown to GROW = [format, bytes], with MODE or as the umask has it."""
        if grow and not made.is_dir:
            from madrigal.onhost import image

            image.grow(made.path, grow[0], grow[1], self._waiting, self._timeouts["work"])
        made.publish((0o777 if made.is_dir else 0o666) & ~_umask() if mode is None else mode)

    # -- making ----------------------------------------------------------------------------------------------

    def send(self, path: str) -> "Iterator[Frame]":
        """The frames of what PATH leads to (onhost/stream.py), without the last."""
        from madrigal.onhost import stream

        return stream.give(path)

    def receive(
        self,
        frames: "Iterator[Frame]",
        path: str,
        grow: "Optional[List[Any]]" = None,
        keep_mode: bool = False,
    ) -> int:
        """Make PATH of FRAMES, growing it to GROW = [format, bytes] first; returns how many bytes of data they had.

        It gets the permissions the umask allows, or with KEEP_MODE those of the original.
        """
        from madrigal.onhost import stream

        directory, name = os.path.split(path)
        receiver = stream.Receiver(self._undo, directory, name, "stream")
        for frame in frames:
            receiver.take(*frame)
        made = receiver.finish()
        self.publish(made, grow, receiver.about["mode"] if keep_mode else None)
        return receiver.bytes

    def copy(self, source: str, path: str, grow: "Optional[List[Any]]" = None) -> "Dict[str, Any]":
        """Make PATH a copy of the file or directory SOURCE of this machine; returns {"way": how}."""
        from madrigal.onhost import copy, stream

        if stream.measure(source)["type"] == "dir":
            self.receive(stream.give(source), path)
            return {"way": "files"}
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = self.part(path, "copy")
            way = copy.copy_file(fd, made.fd, self._waiting)
        finally:
            os.close(fd)
        self.publish(made, grow)
        return {"way": way}

    def make(
        self,
        path: str,
        format: str,
        size: int,
        fs: str = "",
        fs_options: "Optional[List[str]]" = None,
        options: str = "",
    ) -> None:
        """Make PATH an empty image of SIZE bytes with the file system FS (`swap` too) in it.

        FS_OPTIONS are further words for mkfs, OPTIONS what qemu-img is to know of the format.
        """
        from madrigal.onhost import filesystem, image

        made = self.part(path, "new")
        timeout = self._timeouts["work"]
        if not fs:
            image.create(made.path, format, size, options, self._waiting, timeout)
        else:
            plain = made if format == "raw" else self.part(path, "plain", beside=made)
            image.create(plain.path, "raw", size, "", self._waiting, timeout)
            filesystem.make(plain.path, fs, fs_options or [], self._waiting, timeout)
            if plain is not made:
                image.convert(plain.path, "raw", made.path, format, self._waiting, timeout)
                plain.discard()
        self.publish(made)

    def link(self, target: str, path: str) -> None:
        """Make PATH a symbolic link to TARGET, in place of what is there."""
        directory, name = os.path.split(path)
        temporary = os.path.join(directory, ".{}.link.part".format(name))
        self._remove(temporary)
        if os.path.isdir(path) and not os.path.islink(path):
            self._remove(path)
        if not os.path.lexists(path):
            self._undo.push(os.unlink, path)
        self._undo.push(os.unlink, temporary)
        os.symlink(target, temporary)
        os.rename(temporary, path)

    def move(self, source: str, path: str) -> "Dict[str, Any]":
        """Make PATH the directory SOURCE of this machine, which is gone then; returns {"way": how}.

        A PATH without a SOURCE is what an earlier run left when it had finished.
        """
        from madrigal.onhost import stream

        if not os.path.lexists(source):
            self.tidy(source)
            if not os.path.lexists(path):
                raise NotFound("{} does not exist, and neither does {}".format(source, path))
            return {"way": "before"}
        self.hold(source)
        self.hold(path, make="parents")
        if os.path.exists(path) and os.path.samefile(source, path):
            return {"way": "two names of one place"}
        if os.path.lexists(path):
            self._remove(path)
        try:
            os.rename(source, path)
            _sync_dir(os.path.dirname(path))
            return {"way": "rename"}
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        self.receive(stream.give(source), path, keep_mode=True)
        self._undo.clear()  # the copy is whole, from here on it is what counts
        self._remove(source)
        return {"way": "files"}

    def place(self, source: str, path: str) -> "Dict[str, Any]":
        """Make PATH the same as the file SOURCE, which stays: a hard link, else a copy; returns {"way": how}."""
        directory, name = os.path.split(path)
        source = os.path.realpath(source)
        if os.path.exists(path) and os.path.samefile(source, path):
            return {"way": "a link of before"}
        temporary = os.path.join(directory, ".{}.place.part".format(name))
        self._remove(temporary)
        self._undo.push(os.unlink, temporary)
        try:
            os.link(source, temporary)
            _sync_file(temporary)
        except OSError:  # a directory, another file system, one without hard links, or a file of another user
            return self.copy(source, path)
        os.chmod(temporary, 0o666 & ~_umask())
        os.rename(temporary, path)
        _sync_dir(directory)
        return {"way": "rename"}

    def mark(self, path: str, text: str) -> None:
        """Say in PATH, a datastore's `.monitor`, how the host is to monitor it; "" is for not at all.

        No failure takes it back: it says what the driver is, and other VMs may be there.
        """
        try:
            with open(path) as file:
                known = file.read().strip()
        except FileNotFoundError:
            known = ""
        if known == text:
            return
        if not text:
            self._remove(path)
            return
        # Two first actions of a datastore may write it at once: names of their own, the same content.
        temporary = "{}.{}.part".format(path, os.getpid())
        self._undo.push(os.unlink, temporary)
        with open(temporary, "w") as file:
            file.write(text + "\n")
        os.rename(temporary, path)

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
        """Remove the parts of PATH, which is not there, that a run has left which was killed in removing it."""
        directory, name = os.path.split(path)
        if os.path.isdir(directory) and any(part.is_part_of(name, entry) for entry in os.listdir(directory)):
            self.hold(path)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                part.remove_parts(fd, name)
            finally:
                os.close(fd)

    def _remove(self, path: str) -> bool:
        directory, name = os.path.split(path)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            part.remove_parts(fd, name)
            return part.remove(fd, name)
        finally:
            os.close(fd)


def _probe(path: str, probe: str) -> str:
    return os.path.join(path, ".probe.{}.part".format(probe))


def _remove_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass  # somebody has put something into it meanwhile


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_dir(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
