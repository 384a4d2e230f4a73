"""Carry out what is to be done with the snapshots of a disk: whole copies, or a chain as onhost/chain.py plans it."""

import os
import stat

from madrigal.command import CommandFailed
from madrigal.errors import InUse, NotFound, NotSupported
from madrigal.onhost import copy, image, part
from madrigal.onhost.chain import NUMBER, Disk, lead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Optional, Union

    from madrigal.onhost.chain import Step
    from madrigal.onhost.guest import Guest
    from madrigal.onhost.session import Session
    from madrigal.onhost.undo import Undo


class Work:
    """What both layouts need: the session that holds the disk, and what goes with it; GUEST: the VM, if it runs."""

    def __init__(
        self,
        session: "Session",
        make_dirs: "Callable[[str], None]",
        undo: "Undo",
        waiting: "Callable[[], None]",
        timeout: float,
        guest: "Optional[Guest]",
    ) -> None:
        self.guest = guest
        self.session, self.make_dirs, self.undo = session, make_dirs, undo
        self.waiting, self.timeout = waiting, timeout

    def open(self, path: str, chained: bool) -> "Union[Copies, Links]":
        """The snapshots of the disk (or image) at PATH, whose image is held too if it leads to one.

        CHAINED: whether the driver keeps those of this format in a chain; but what is there stays what it is.
        """
        home, number = lead(path)
        if home != path:
            self.session.hold(home)
        if os.path.isdir(home + ".snap"):
            for entry in os.listdir(home + ".snap"):
                if part.is_part(entry):  # of a run that was killed: we hold the lock
                    self.session.drop(os.path.join(home + ".snap", entry))
        if number is not None or (chained and not Disk(path).copies()):
            return Links(self, path)
        return Copies(self, path)

    def replace(self, home: str, tag: str, fill: "Callable[[part.Part], object]") -> None:
        """Let FILL write what is to be the file HOME instead; its digest does not hold any more then."""
        mode = stat.S_IMODE(os.stat(home).st_mode) if os.path.exists(home) else None
        made = self.session.part(home, tag)
        fill(made)
        self.forget_digest(home)
        self.session.publish(made, mode=mode)

    def link_over(self, source: str, home: str) -> None:
        """Make HOME another name of the file SOURCE, in place of what it was."""
        if os.path.exists(home) and not os.path.islink(home) and os.path.samefile(source, home):
            return
        directory, name = os.path.split(home)
        temporary = os.path.join(directory, ".{}.place.part".format(name))
        if os.path.lexists(temporary):
            os.unlink(temporary)
        self.undo.push(os.unlink, temporary)
        os.link(source, temporary)
        self.forget_digest(home)
        os.rename(temporary, home)
        part.sync(directory)

    def forget_digest(self, home: str) -> None:
        if os.path.lexists(home + ".md5sum"):
            os.unlink(home + ".md5sum")


class Copies:
    """A file of its own for each snapshot; the disk, or the image it leads to, stays the file that is written."""

    def __init__(self, work: Work, path: str) -> None:
        self._work, self._path = work, path
        self._home = lead(path)[0]
        self._dir = self._home + ".snap"

    def create(self, snapshot: int) -> bool:
        fd = _open(self._home, "{} does not exist".format(self._path))
        try:
            self._work.make_dirs(self._dir)
            made = self._work.session.part(self._file(snapshot), "copy")
            if self._work.guest:
                with self._work.guest.frozen():
                    copy.copy_file(fd, made.fd, self._work.waiting)
            else:
                copy.copy_file(fd, made.fd, self._work.waiting)
        finally:
            os.close(fd)
        self._work.session.publish(made)
        return True

    def revert(self, snapshot: int) -> bool:
        fd = _open(self._file(snapshot), "{} has no snapshot {}".format(self._path, snapshot))
        try:
            self._work.replace(self._home, "revert", lambda made: copy.copy_file(fd, made.fd, self._work.waiting))
        finally:
            os.close(fd)
        return True

    def delete(self, snapshot: int) -> bool:
        there = os.path.lexists(self._file(snapshot))
        if there:
            self._work.session.drop(self._file(snapshot))
        return there

    def flatten(self, snapshot: int) -> bool:
        if not os.path.isdir(self._dir):
            self._work.session.drop(self._dir)
            return False
        if snapshot >= 0:
            os.close(_open(self._file(snapshot), "{} has no snapshot {}".format(self._path, snapshot)))
            self._work.link_over(self._file(snapshot), self._home)
        self._work.session.drop(self._dir)
        return True

    def _file(self, snapshot: int) -> str:
        return os.path.join(self._dir, str(snapshot))


class Links:
    """A chain of qcow2 files.  The words of its steps (onhost/chain.py) are the methods below."""

    def __init__(self, work: Work, path: str) -> None:
        self._work = work
        self._device = ""
        self._read(path)
        if work.guest:
            self._device = work.guest.device_of(path)
            written = work.guest.files(self._device)[0]
            if written != os.path.realpath(path):
                self._follow(written)
                self._read(path)

    def _read(self, path: str) -> None:
        self._disk = Disk(path)
        self._chain = self._disk.chain
        self._before = lead(path)

    def _follow(self, written: str) -> None:
        """Let the disk lead to what the guest writes: a run was killed when it had given it that."""
        directory, name = os.path.split(written)
        if directory != os.path.realpath(self._disk.dir) or not NUMBER.match(name):
            text = "{} leads to {}, and the VM that runs writes to {}: find out why"
            raise InUse(text.format(self._disk.path, self._disk.active_path, written))
        self._switch(int(name))

    def create(self, snapshot: int) -> bool:
        self._disk.check_active()
        self._disk.check(self._chain.active)
        return self._carry_out(self._chain.create(snapshot, self._work.guest is not None))

    def revert(self, snapshot: int) -> bool:
        self._disk.check_active()
        self._disk.check(self._chain.needs(snapshot))
        self._work.forget_digest(self._disk.home)
        return self._carry_out(self._chain.revert(snapshot))

    def delete(self, snapshot: int) -> bool:
        if self._disk.files:
            self._disk.check_active()
        steps = self._chain.delete(snapshot, self._work.guest is not None)
        for step in steps:
            if step[0] == "rebase":
                self._disk.check(step[1])
        if steps:
            self._work.forget_digest(self._disk.home)  # what lay on the snapshot is written anew
        return self._carry_out(steps)

    def flatten(self, snapshot: int) -> bool:
        if not os.path.isdir(self._disk.dir):
            self._work.session.drop(self._disk.dir)
            return False
        steps = self._chain.flatten(snapshot)
        for step in steps:
            if step[0] == "image":
                self._disk.check(step[1])
        self._work.forget_digest(self._disk.home)
        return self._carry_out(steps)

    def _carry_out(self, steps: "List[Step]") -> bool:
        for step in steps:
            self._work.waiting()
            getattr(self, "_" + step[0])(*step[1:])
        return bool(steps)

    def _file(self, number: int) -> str:
        return os.path.join(self._disk.dir, str(number))

    def _layout(self) -> None:
        self._work.make_dirs(self._disk.dir)
        name = os.path.basename(self._disk.dir)
        if not self._disk.traversal and self._disk.name(0) != "0":
            self._work.undo.push(self._take_back, os.path.join(self._disk.dir, name))
            os.symlink(".", os.path.join(self._disk.dir, name))

    def _vacant(self, number: int) -> None:
        path = self._file(number)
        if not image.is_empty(path):
            text = "{} lies on {}, which {} leads to, and has data: find out which of them is right, and remove {} or"
            text += " let {} lead to it"
            disk = self._disk.path
            raise InUse(text.format(path, self._disk.active_path, disk, path, disk))

    def _freeze(self, number: int) -> None:
        source, target = self._disk.active_path, self._file(number)
        self._work.undo.push(self._take_back, target)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif source != self._disk.home or source == self._disk.path:
            os.link(source, target)
        else:
            os.symlink(source, target)  # the image keeps its name

    def _overlay(self, number: int, on: int) -> None:
        path = self._file(number)
        made = self._work.session.part(path, "overlay")
        size = image.virtual_size(self._file(on))
        name = self._disk.name(on)
        image.overlay(made.path, size, name, "qcow2", "", self._work.waiting, self._work.timeout)
        if not os.path.lexists(path):
            self._work.undo.push(self._take_back, path)
        self._work.session.publish(made)
        self._work.undo.forget(part.remove, None, path)

    def _switch(self, number: int) -> None:
        self._work.session.link(self._target(number), self._disk.path)
        part.sync(os.path.dirname(self._disk.path))

    def _target(self, number: int) -> str:
        """What the disk is a link to when it leads to this file."""
        own = self._disk.home == self._disk.path
        return os.path.join(os.path.basename(self._disk.dir) if own else self._disk.dir, str(number))

    def _snapshot(self, number: int) -> None:
        disk, path, undo = self._disk.path, self._file(number), self._work.undo
        link = os.path.join(os.path.dirname(disk), ".{}.link.part".format(os.path.basename(disk)))
        part.remove(None, link)
        undo.push(os.unlink, link)
        os.symlink(self._target(number), link)
        is_known = False
        try:
            self._guest().snapshot(self._device, path, link, disk)
            is_known = True
        except CommandFailed:
            is_known = True
            raise
        finally:
            if not is_known:
                undo.forget(self._take_back, path)  # the guest may write to it
        part.sync(os.path.dirname(disk))

    def _commit(self, number: int, into: int) -> None:
        self._guest().commit(self._device, self._file(number), self._file(into))

    def _pull(self, number: int) -> None:
        file = self._disk.files[number]
        self._guest().pull(self._device, file.below if file.backing else None)

    def _guest(self) -> "Guest":
        assert self._work.guest is not None
        return self._work.guest

    def _rebase(self, number: int, was_on: int) -> None:
        below, path = self._disk.files[was_on], self._file(number)
        on, format = below.backing, below.format
        if self._chain.parents[was_on] is not None:
            format = "qcow2"
        elif on and os.path.islink(below.path):
            on = below.below
        image.rebase(path, on, format, self._work.waiting, self._work.timeout)
        part.sync(path)  # before what it was on goes

    def _remove(self, number: int) -> None:
        os.unlink(self._file(number))

    def _hold(self, snapshot: int, number: "Optional[int]") -> None:
        path = self._file(snapshot) + ".current"
        if number is None:
            os.unlink(path)
            return
        made = self._work.session.part(path, "new")
        os.write(made.fd, os.fsencode(self._file(number)) + b"\n")
        self._work.session.publish(made)

    def _keep(self, number: int) -> None:
        path = self._file(number)
        if os.path.islink(path):
            self._work.undo.push(self._lead_again, path, os.readlink(path))
            self._work.link_over(os.path.realpath(path), path)

    def _lead_again(self, path: str, target: str) -> None:
        """Make PATH the link that it was, if TARGET still is what it was then."""
        if not os.path.islink(path) and os.path.samefile(path, os.path.join(os.path.dirname(path), target)):
            part.link(self._work.undo, target, path)

    def _image(self, number: int) -> None:
        path, home = self._file(number), self._disk.home
        if not self._disk.files[number].backing:
            self._work.link_over(path, home)
            return
        args = self._work.waiting, self._work.timeout
        self._work.replace(home, "flat", lambda made: image.convert(path, "qcow2", made.path, "qcow2", *args))

    def _clear(self) -> None:
        self._work.session.drop(self._disk.dir)

    def _take_back(self, path: str) -> None:
        """Remove what was made, unless the disk leads to it or to what lies on it by now."""
        if lead(self._disk.path) == self._before:
            os.unlink(path)


def _open(path: str, message: str) -> int:
    """Open a regular file to be copied; raises NotFound(MESSAGE)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(message) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotSupported("{} is not a regular file".format(path))
    return fd
