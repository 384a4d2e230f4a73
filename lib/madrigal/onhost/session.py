"""What one action does to the files of one machine: everything under its locks, taken back if it fails."""

import errno
import fcntl
import os
import stat

from madrigal.errors import InUse, NotFound, NotSupported
from madrigal.onhost import part
from madrigal.onhost.lock import locked_in
from madrigal.onhost.part import Part
from madrigal.onhost.passing import Passing

# The other modules are imported where they are needed: an action on the front-end pays for what it uses.


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Union

    from madrigal.onhost.snapshots import Copies, Links


class Session(Passing):
    """The public methods are what a front-end may ask of a host (host/worker.py); arguments and results are JSON."""

    # -- asking ----------------------------------------------------------------------------------------------

    def measure(self, path: str) -> "Dict[str, Any]":
        """Type, size, allocated bytes and so on of what PATH leads to; raises NotFound."""
        from madrigal.onhost import stream

        return stream.measure(path)

    def weigh(self, path: str, state: "Dict[str, Any]", whole: bool = False) -> "Dict[str, Any]":
        """{"allocated": bytes of the disk or image PATH with its snapshots, "source": as measure() has it, "is_plain"
        (whether it can be sent as it lies there), "files": which lie like what is sent, by path within the stream}.

        Raises NotFound or BadImage if it has no such STATE (onhost/layout.py); WHOLE: all of it is wanted.
        """
        from madrigal.onhost import layout

        place, files = layout.Place(path, state["format"]), {}
        weight = place.weight()
        if whole:
            files = {name: what for kind, name, what in place.contents() if kind == "file"}
            return dict(weight, is_plain=not state.get("guest"), files=files)
        top, lies_on_others = layout.state(path, state)
        is_plain = not lies_on_others and not state.get("guest")
        if is_plain or state["format"] == "raw":  # qemu has an order of its own in what else it makes
            files[""] = top
        return dict(weight, is_plain=is_plain, files=files)

    def survey(self, path: str, beside: str = "") -> "Dict[str, Any]":
        """What is known of PATH (onhost/survey.py), and `reflinks`, whether it and BESIDE can share blocks."""
        from madrigal.onhost import survey

        found = survey.survey(path)
        return dict(found, reflinks=survey.reflinks(path, beside) if beside and found["kind"] == "file" else None)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def need(self, path: str, message: str) -> None:
        """Raise NotFound(MESSAGE) if PATH does not exist."""
        if not os.path.exists(path):
            raise NotFound(message)

    def sizes(self, path: str) -> "List[str]":
        """A line for each VM in the system datastore PATH (onhost/monitor_ds.py)."""
        from madrigal.onhost import monitor_ds

        return list(monitor_ds.lines(path))

    def need_device(self, path: str) -> None:
        """Raise NotFound if there is no PATH, NotSupported if it is not a block device."""
        if not os.path.exists(path):
            raise NotFound("the device {} does not exist: is it attached there?".format(path))
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise NotSupported("{} is not a block device, and this driver links nothing else".format(path))

    def refuse_used(self, path: str) -> None:
        """Raise InUse if a process has locked a file in the directory PATH, as a running VM does with its disks."""
        used = locked_in(path)
        if used:
            raise InUse("{} is in use: a process has locked {}".format(path, used))

    def check_names(self, guest: "Dict[str, Any]") -> None:
        """Raise NotSupported if the GUEST cannot go to another host while it runs (onhost/guest.py)."""
        self._guest(guest).check_names()

    def offer(self, path: str, probe: str) -> "Optional[Dict[str, Any]]":
        """Hold PATH and show a file named PROBE in it, to find out who else sees it; what measure() says of it.

        None if it is not there.
        """
        if not os.path.lexists(path):
            return None
        self.hold(path)
        self.show(path, probe)
        return self.measure(path)

    def show(self, path: str, probe: str) -> None:
        """Make a file named PROBE in the directory PATH; raises NotFound if there is none."""
        if not os.path.isdir(path):
            raise NotFound("{} does not exist".format(path))
        name = _probe(path, probe)
        self._undo.push(os.unlink, name)
        while not os.path.exists(name):  # who removes what is left may have been faster than our lock
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            part.share(fd, waiting=True)
            self._probes[name] = fd
        _remove_probes(path)

    def see(self, paths: "List[str]", probe: str) -> str:
        """The first of PATHS where the PROBE of show() is seen, "" if it is nowhere."""
        return next((path for path in paths if os.path.exists(_probe(path, probe))), "")

    def hide(self, path: str, probe: str) -> None:
        """Remove the PROBE of show()."""
        os.unlink(_probe(path, probe))
        os.close(self._probes.pop(_probe(path, probe)))
        self._undo.forget(os.unlink, _probe(path, probe))

    def give_back(self, path: str, target: str, state: "Dict[str, Any]") -> "Dict[str, Any]":
        """Hold the directory of the disk PATH, which is to be moved to TARGET, a path that may be another machine's.

        {"there": whether there is the directory, "moved": whether PATH leads to TARGET or a snapshot of it,
        "weight": as weigh(), or None}
        """
        if not os.path.lexists(os.path.dirname(path)):
            return {"there": False, "moved": False, "weight": None}
        self.hold(os.path.dirname(path))
        leads, goal = os.path.realpath(path), os.path.realpath(target)
        moved = os.path.islink(path) and (leads == goal or os.path.dirname(leads) == os.path.realpath(target + ".snap"))
        there = not moved and os.path.lexists(path)
        return {"there": True, "moved": moved, "weight": self.weigh(path, state, True) if there else None}

    # -- making ----------------------------------------------------------------------------------------------

    def copy(
        self,
        source: str,
        path: str,
        state: "Optional[Dict[str, Any]]" = None,
        grow: "Optional[List[Any]]" = None,
        chain: str = "",
        preallocate: str = "",
        device: "Optional[Dict[str, Any]]" = None,
    ) -> "Dict[str, Any]":
        """Make PATH a copy of the file, directory or block device SOURCE of this machine; returns {"way": how}.

        With STATE, of this state of the disk or image SOURCE (onhost/layout.py).  The rest is as for receive().
        """
        from madrigal.onhost import copy, stream

        if device is not None:
            self.receive(self._within(self.send(source, state, terms=stream.WITHIN)), path, device=device)
            return {"way": "read"}
        if state is not None and state.get("guest"):
            made = self.part(path, "copy")
            way = self._guest(state["guest"]).save(source, state["format"], made)
            self.publish(made)
            return {"way": way}
        lies_on_others = False
        if state is not None:
            from madrigal.onhost import layout

            source, lies_on_others = layout.state(source, state)
        kind = stream.measure(source)["type"]
        if kind == "dir":
            self.receive(self._within(self.send(source, terms=stream.WITHIN)), path)
            return {"way": "files"}
        if kind == "device":
            frames = self._within(self.send(source, terms=stream.WITHIN))
            self.receive(frames, path, grow, False, chain, preallocate)
            return {"way": "read"}
        made = self.part(path, "copy")
        if lies_on_others:
            self._layout().flatten(source, made)
            way = "convert"
        else:
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                way = copy.copy_file(fd, made.fd, self._waiting, self._rate)
            finally:
                os.close(fd)
        self.publish(made, grow, None, chain, preallocate)
        return {"way": way}

    def copy_whole(
        self,
        source: str,
        path: str,
        state: "Dict[str, Any]",
        settle: "Dict[str, Any]",
        grow: "Optional[List[Any]]" = None,
        is_going: bool = False,
    ) -> "Dict[str, Any]":
        """Make PATH a copy of the disk or image SOURCE and its snapshots; returns {"way": how}.

        SETTLE and IS_GOING: onhost/layout.py.
        """
        from madrigal.onhost import stream

        if os.path.isdir(source):  # an image of 3.4
            self.receive(self._within(self.send(source, state, True, stream.WITHIN)), path, grow, settle=settle)
            return {"way": "files"}
        directory, name = os.path.split(path)
        made = Part(self._undo, directory, name, "copy", is_dir=True)
        way = self._layout().gather(source, state["format"], made, is_going, self._rate)
        self._layout().settle(made, grow, settle)
        return {"way": way}

    def overlay(self, source: str, path: str, size: int, options: str) -> None:
        """Make PATH a qcow2 disk of SIZE bytes, or as many as the qcow2 image SOURCE has, on top of that.

        OPTIONS: what qemu-img is to know of the format.
        """
        self._layout().overlay(source, self.part(path, "new"), size, options)

    def link_image(self, source: str, path: str) -> str:
        """Make the disk PATH a link to the newest file of the qcow2 image SOURCE; returns where it leads."""
        return self._layout().link_image(source, path)

    def make(
        self,
        path: str,
        format: str,
        size: int,
        fs: str = "",
        fs_options: "Optional[List[str]]" = None,
        options: str = "",
        preallocate: bool = False,
    ) -> None:
        """Make PATH an empty image of SIZE bytes with the file system FS (`swap` too) in it.

        FS_OPTIONS are further words for mkfs, OPTIONS what qemu-img is to know of the format.  PREALLOCATE: with room
        on the disk for all of it.
        """
        from madrigal.onhost import filesystem, image

        if preallocate and format == "qcow2":
            options = image.preallocated(options)
        made = self.part(path, "new")
        timeout = self._timeouts["work"]
        if not fs:
            image.create(made.path, format, size, options, self._waiting, timeout)
        else:
            plain = made if format == "raw" else self.part(path, "plain", beside=made)
            image.create(plain.path, "raw", size, "", self._waiting, timeout)
            filesystem.make(plain.path, fs, fs_options or [], self._waiting, timeout)
            if plain is not made:
                image.convert(plain.path, "raw", made.path, format, self._waiting, timeout, options)
                plain.discard()
        if preallocate and format == "raw":
            image.fill(made.path, 0, size, self._waiting)  # last: mkfs gives back what it does not use
        self.publish(made)

    def resize(self, path: str, format: str, size: int, preallocate: bool) -> None:
        """Let the disk in the file that PATH leads to have SIZE bytes, no fewer than now (onhost/image.py)."""
        from madrigal.onhost import image

        image.resize(os.path.realpath(path), format, size, preallocate, self._waiting, self._timeouts["work"])

    def link(self, target: str, path: str) -> None:
        """Make PATH a symbolic link to TARGET, in place of what is there."""
        part.link(self._undo, target, path)

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
            part.sync(os.path.dirname(path))
            return {"way": "rename"}
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        self.receive(self._within(self.send(source, terms=stream.WITHIN)), path, keep_mode=True)
        self._undo.clear()  # the copy is whole, from here on it is what counts
        self._remove(source)
        return {"way": "files"}

    # -- snapshots (onhost/snapshots.py) -----------------------------------------------------------------------
    #
    # Of the disk or image at PATH; what holds it is held, and the image a disk leads to is held then.  CHAINED:
    # whether they are overlays on one another.  GUEST: the VM, if it runs.  Each returns whether there was work to do.

    def snap_create(self, path: str, snapshot: int, chained: bool, guest: "Optional[Dict[str, Any]]" = None) -> bool:
        """Make SNAPSHOT of what the disk holds now."""
        return self._snapshots(path, chained, guest).create(snapshot)

    def snap_revert(self, path: str, snapshot: int, chained: bool) -> bool:
        """Let the disk hold what SNAPSHOT does."""
        return self._snapshots(path, chained).revert(snapshot)

    def snap_delete(self, path: str, snapshot: int, chained: bool, guest: "Optional[Dict[str, Any]]" = None) -> bool:
        """Remove SNAPSHOT; the disk and the other snapshots hold what they held."""
        return self._snapshots(path, chained, guest).delete(snapshot)

    def snap_flatten(self, path: str, snapshot: int, format: str) -> bool:
        """Make the image at PATH what SNAPSHOT holds (-1: what it holds now), and remove all snapshots."""
        return self._snapshots(path, format == "qcow2").flatten(snapshot)

    def _snapshots(self, path: str, chained: bool, guest: "Optional[Dict[str, Any]]" = None) -> "Union[Copies, Links]":
        from madrigal.onhost import snapshots

        runs = self._guest(guest) if guest else None
        work = snapshots.Work(self, self._make_dirs, self._undo, self._waiting, self._timeouts["work"], runs)
        return work.open(path, chained)

    def mark(self, path: str, text: str) -> None:
        """Say in PATH, a datastore's `.monitor`, how the host is to monitor it; "" is for not at all.

        No failure takes it back: it says what the driver is, and other VMs may be there.  Parts that are old go.
        """
        self.sweep(os.path.dirname(path))
        try:
            with open(path) as file:
                known = file.read().strip()
        except FileNotFoundError:
            known = ""
        if not text:
            if known:
                self._remove(path)
            return
        # Two first actions of a datastore may write it at once, without a lock: the same bytes into the same file, and
        # whoever finds it gone knows that the other was there first.
        temporary = "{}.{}.part".format(path, text)
        self._undo.push(os.unlink, temporary)
        try:
            if known == text:
                os.unlink(temporary)  # of one that was killed
            else:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "w") as file:
                    file.write(text + "\n")
                os.rename(temporary, path)
        except FileNotFoundError:
            pass
        self._undo.forget(os.unlink, temporary)

    # -- an image datastore ----------------------------------------------------------------------------------

    def image(self, do: str, **arguments: "Any") -> "Any":
        """What Images.DO (onhost/images.py) returns."""
        from madrigal.onhost.images import Images

        return getattr(Images(self, self._make_dirs, self._waiting, self._timeouts), do)(**arguments)


def _probe(path: str, probe: str) -> str:
    return os.path.join(path, ".probe.{}.part".format(probe))


def _remove_probes(path: str) -> None:
    """Remove those that killed actions have left in the directory PATH: nobody has them locked."""
    for entry in os.listdir(path):
        if not part.is_part_of("probe", entry):
            continue
        try:
            fd = os.open(os.path.join(path, entry), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(path, entry))
            finally:
                os.close(fd)
        except OSError:
            pass  # it is in use, or gone
