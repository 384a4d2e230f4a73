"""How a disk lies on a host together with its snapshots, and how both go from one place to another.

A raw disk is a file `disk.0`, and snapshot 3 of it the copy `disk.0.snap/3`.  A qcow2 disk is a chain, and `disk.0` a
link to its top:

    disk.0 -> disk.0.snap/1
    disk.0.snap/0              whole, or on top of an image elsewhere
    disk.0.snap/1              on top of `disk.0.snap/0`, or `0`
    disk.0.snap/disk.0.snap -> .   so that the first of these names leads there from within the directory too
    disk.0.snap/0.current      the path of the file that has become snapshot 0, of which the last part counts

Which of the names stands in the files is the NAMES of a chain: "path", or "number", and then there is no such link, for
the stock tm/local does not bring it along, and files that need it are lost then.

An image with snapshots is the same under its own name; or it is a file, `.snap/0` a link to it, and the highest number
the top.  docs/contract.md, "Disks and their images" and "Snapshots of disks".
"""

import json
import os
import re

from madrigal.errors import BadImage, NotFound, NotSupported
from madrigal.onhost import chain, copy, image, part, stream
from madrigal.onhost.part import Part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

    from madrigal.onhost.stream import Frame
    from madrigal.onhost.undo import Undo

_NUMBER = re.compile(r"(0|[1-9][0-9]*)\Z")
_CURRENT = re.compile(r"[0-9]+\.current\Z")
_HERE = "snap/snap"


class Place:
    """A disk or image with its snapshots.  FORMAT is what the front-end says it has: a guest can write anything.

    `top`: the file with the current state; `snap`: the directory of the snapshots, if there are any; `files`: the
    numbers in it; `chain`: of qcow2, what lies on what; `is_chain`: whether `top` is one of `files`.
    """

    def __init__(self, path: str, format: str) -> None:
        self.path = path
        self.chain = chain.Disk(path) if format == "qcow2" else None
        self.is_chain = False
        if self.chain:
            self.is_chain = self.chain.chain.active is not None and not self.chain.copies()
            self.top = os.path.realpath(self.chain.active_path if self.is_chain else self.chain.home)
            self.snap, self.files = self.chain.dir, sorted(self.chain.files)
        else:
            self.top = os.path.realpath(path)
            if os.path.islink(path) and os.path.dirname(self.top).endswith(".snap"):
                text = "{} is a link to {}, though the front-end has it as raw: it seems to have recovery snapshots"
                raise NotSupported(text.format(path, self.top))
            self.snap = self.top + ".snap"
            entries = os.listdir(self.snap) if os.path.isdir(self.snap) else []
            numbers = [entry for entry in entries if _NUMBER.match(entry)]
            self.files = sorted(int(entry) for entry in numbers if not os.path.isdir(os.path.join(self.snap, entry)))

    def real(self, number: int) -> str:
        """The file with this number."""
        return os.path.realpath(os.path.join(self.snap, str(number)))

    def snapshot(self, number: int) -> int:
        """The number of the file that has snapshot NUMBER; raises NotFound."""
        if self.chain and self.is_chain:
            return self.chain.chain.needs(number)
        if number not in self.files:
            raise NotFound("there is no snapshot {}".format(number))
        return number

    def weight(self) -> "Dict[str, Any]":
        """The bytes `allocated` with its snapshots, and `source` as in stream.measure(); raises NotFound, BadImage."""
        if os.path.islink(self.path) and os.path.isdir(self.top):  # which may be all that a machine has
            raise BadImage("{} leads to {}, a directory, which is no disk".format(self.path, self.top))
        paths = sorted({self.top, *map(self.real, self.files)})
        allocated = sum(int(stream.measure(path)["allocated"]) for path in paths)
        return {"allocated": allocated, "source": stream.identity(paths)}

    def contents(self) -> "List[Tuple[str, str, str]]":
        """(type, name, path or target) of what makes it up: `disk`, or a link to `snap/N`; `snap` and what is in it.

        In `snap` a link `snap` to itself if the names in its files are paths.

        Raises BadImage if a file of it lies on one elsewhere.
        """
        found = []
        if os.path.isdir(self.snap):
            found.append(("dir", "snap", self.snap))
            found += [("file", "snap/{}".format(number), self.real(number)) for number in self.files]
        if not self.chain or not self.is_chain:
            if self.chain and os.path.isfile(self.top) and image.is_overlay(self.top):
                raise BadImage("{} lies on another file, which does not go with it".format(self.top))
            return found + [("file", "disk", self.top)]
        if self.chain.traversal:
            found.append(("link", _HERE, "."))
        for number, file in self.chain.files.items():
            if file.problem:
                raise BadImage(file.problem)
            if file.backing and self.chain.chain.parents.get(number) is None:
                raise BadImage("{} lies on {}, which is no snapshot of this disk".format(file.path, file.backing))
        for number, now in self.chain.chain.current.items():
            found.append(("link", "snap/{}.current".format(number), str(now)))
        return found + [("link", "disk", "snap/{}".format(self.chain.chain.active))]


def state(path: str, wanted: "Dict[str, Any]") -> "Tuple[str, bool]":
    """The file that has a state of the disk or image PATH, and whether it lies on others.

    WANTED: its `format`, the `snapshot` (-1: the current state), and the `image` that has the snapshots of a persistent
    disk ("": it has its own).  Raises NotFound; BadImage if it lies on what is in no datastore.
    """
    place = Place(path, wanted["format"])
    if wanted["snapshot"] < 0:
        number = place.chain.chain.active if place.chain and place.is_chain else None
    else:
        if not place.files and wanted["image"]:
            # a raw disk that was reverted is a file of the VM; its snapshots are the image's
            place = Place(wanted["image"], wanted["format"])
        number = place.snapshot(wanted["snapshot"])
    top = place.top if number is None else place.real(number)
    stream.measure(top)
    if not place.chain:
        return top, False
    place.chain.check(number)
    return top, image.is_overlay(top)


def give(path: str, format: str, terms: "Optional[Dict[str, Any]]" = None) -> "Iterator[Frame]":
    """The frames of a directory with a disk or image and its snapshots, which `Layout.settle` takes."""
    place = Place(path, format)
    about = {"path": "", "type": "dir", "mode": 0o700, "mtime": 0, "owner": [0, 0]}
    about["allocated"] = place.weight()["allocated"]
    yield b"O", 0, json.dumps(about).encode()
    for kind, name, what in place.contents():
        if kind == "file":
            for frame in stream.give(what, name, terms):
                yield frame
        else:
            yield b"O", 0, json.dumps(dict(about, path=name, type=kind, target=what)).encode()


class Layout:
    """Makes disks that lie like this.  WAITING and TIMEOUT as for onhost/image.py, UMASK for what is made."""

    def __init__(self, undo: "Undo", waiting: "Callable[[], None]", timeout: float, umask: int) -> None:
        self._undo, self._patience = undo, (waiting, timeout)
        self._file, self._dir = 0o666 & ~umask, 0o777 & ~umask

    def sized(self, made: Part, grow: "Optional[List[Any]]", preallocate: str) -> Part:
        """MADE, grown to GROW = [format, bytes]; PREALLOCATE: its format if it is to have room for all of it."""
        waiting, timeout = self._patience
        if grow:
            image.grow(made.path, grow[0], grow[1], waiting, timeout)
        if preallocate == "raw":
            image.fill(made.path, 0, os.stat(made.path).st_size, waiting)
        elif preallocate:
            full = Part(self._undo, made.directory, made.name, "full", beside=made)
            image.convert(made.path, "qcow2", full.path, "qcow2", waiting, timeout, image.preallocated(""))
            made.discard()
            made = full
        return made

    def flatten(self, top: str, made: Part) -> None:
        """Write the disk of the qcow2 image TOP, and of what it lies on, into MADE."""
        image.convert(top, "qcow2", made.path, "qcow2", *self._patience)

    def put_in_chain(self, made: Part, names: str) -> None:
        """Give the disk that is made its name, as the first of a chain with such NAMES."""
        snap = Part(self._undo, made.directory, made.name + ".snap", "new", is_dir=True)
        made.publish_in(snap, "0", self._file)
        if names == "path":
            os.symlink(".", made.name + ".snap", dir_fd=snap.fd)
        snap.publish(self._dir)
        part.link(self._undo, "{}.snap/0".format(made.name), os.path.join(made.directory, made.name))

    def overlay(self, source: str, made: Part, size: int, options: str) -> None:
        """Make of MADE a disk of SIZE bytes, or as many as the image SOURCE has, on top of SOURCE; both are qcow2."""
        top, _ = state(source, {"format": "qcow2", "snapshot": -1, "image": ""})
        size = max(size, image.virtual_size(top))
        # an image without snapshots by the name that it is known by
        below = source if top == os.path.realpath(source) and not os.path.islink(source) else top
        image.overlay(made.path, size, below, "qcow2", options, *self._patience)
        self.put_in_chain(made, "path")

    def link_image(self, source: str, path: str) -> str:
        """Make PATH a link to the newest file of the qcow2 image SOURCE; returns where it leads.

        An image without snapshots gets what its first one needs.
        """
        place = Place(source, "qcow2")
        assert place.chain is not None
        if place.is_chain or not place.files:
            self._make(os.mkdir, place.snap, os.rmdir)
            self._make(lambda name: os.symlink(".", name), os.path.join(place.snap, os.path.basename(place.snap)))
            if not place.files:
                self._make(lambda name: os.symlink(source, name), os.path.join(place.snap, "0"))
            source = os.path.join(place.snap, str(place.chain.chain.active or 0))
        part.link(self._undo, source, path)
        return source

    def _make(self, how: "Callable[[str], None]", path: str, back: "Callable[[str], None]" = os.unlink) -> None:
        if not os.path.lexists(path):
            self._undo.push(back, path)
            how(path)

    def gather(self, source: str, format: str, made: Part, is_going: bool, rate: int) -> str:
        """Put into the directory MADE what `give` sends; returns how.  IS_GOING: the source is not needed any more.

        RATE: as for copy_file().

        What is written to later is a file of its own: names in headers are.
        """
        way = "link"
        for kind, name, what in Place(source, format).contents():
            target = os.path.join(made.path, name)
            if kind == "dir":
                os.mkdir(target, 0o700)
            elif kind == "link":
                os.symlink(what, target)
            elif not (is_going and (format != "qcow2" or not image.backing(what)) and _linked(what, target)):
                way = self._copy(what, target, rate)
        return way

    def _copy(self, source: str, target: str, rate: int) -> str:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                return copy.copy_file(fd, new, self._patience[0], rate)
            finally:
                os.close(new)
        finally:
            os.close(fd)

    def settle(self, made: Part, grow: "Optional[List[Any]]", wanted: "Dict[str, Any]") -> None:
        """Make the directory MADE, which has what `give` sends, the disk or image of its name, and its snapshots.

        WANTED: the names of the `chain` that a disk is to be ("": it stays what it is), and whether it is `fresh`, so
        that all snapshots which are there are of another.  GROW = [format, bytes].  What is there is replaced when the
        new is whole, the disk last.
        """
        disk, snap = os.path.join(made.path, "disk"), os.path.join(made.path, "snap")
        path = os.path.join(made.directory, made.name)
        if wanted["chain"] and not os.path.islink(disk):
            self._begin_chain(disk, snap)
        if os.path.islink(disk):
            self._name_after(made.name, snap, path, wanted["chain"])
        if grow:
            image.grow(os.path.realpath(disk), grow[0], grow[1], *self._patience)
        for base, _, entries in os.walk(made.path, topdown=False):
            for entry in entries:
                name = os.path.join(base, entry)
                if not os.path.islink(name):
                    if base == snap or name == disk:
                        os.chmod(name, self._file)
                    part.sync(name)
            if base in (snap, disk):
                os.chmod(base, self._dir)
            part.sync(base)
        self._publish(made, disk, snap, path, wanted["fresh"])

    def _publish(self, made: Part, disk: str, snap: str, path: str, is_fresh: bool) -> None:
        old, new = os.path.join(made.directory, ".{}.snap.old.part".format(made.name)), path + ".snap"
        part.remove(None, old)
        has_snap = os.path.isdir(snap)
        was_there = os.path.lexists(new)
        if was_there and (has_snap or is_fresh):
            self._undo.push(os.rename, old, new)
            os.rename(new, old)
        if has_snap and os.listdir(snap):
            self._undo.push(part.remove, None, new)
            os.rename(snap, new)
        if os.path.islink(disk):
            part.link(self._undo, os.path.join(made.name + ".snap", os.path.basename(os.readlink(disk))), path)
        else:
            if not os.path.lexists(path):
                self._undo.push(part.remove, None, path)
            elif os.path.isdir(path) and not os.path.islink(path):
                part.remove(None, path)
            os.rename(disk, path)
        if was_there:  # from here on it is the new ones that belong to the disk
            self._undo.forget(os.rename, old, new)
            self._undo.forget(part.remove, None, new)
            self._undo.push(part.remove, None, old)
        os.fsync(made.dir_fd)
        part.remove(None, old)
        for directory in (snap, made.path):  # by hand: the module that removes trees costs more than most actions
            try:
                os.rmdir(directory)
            except OSError:
                pass  # it is not empty, or was not there
        made.discard()

    def _begin_chain(self, disk: str, snap: str) -> None:
        """The file DISK, of which SNAP has copies if it is there, becomes the one with the highest number."""
        if not os.path.isdir(snap):
            os.mkdir(snap, 0o700)
        number = max([int(name) + 1 for name in os.listdir(snap) if _NUMBER.match(name)] or [0])
        os.rename(disk, os.path.join(snap, str(number)))
        os.symlink("snap/{}".format(number), disk)

    def _name_after(self, name: str, snap: str, path: str, names: str) -> None:
        """Let the files in SNAP, which is to be NAME.snap, find one another there by such NAMES, or as they did."""
        here = os.path.join(snap, os.path.basename(_HERE))
        if os.path.lexists(here):
            os.unlink(here)
            names = names or "path"
        if names == "path":
            os.symlink(".", os.path.join(snap, name + ".snap"))
        for entry in os.listdir(snap):
            file = os.path.join(snap, entry)
            if _CURRENT.match(entry):
                now = os.readlink(file)
                os.unlink(file)
                with open(file, "w", encoding="utf-8", errors="surrogateescape") as current:
                    current.write("{}.snap/{}\n".format(path, now))
            elif _NUMBER.match(entry):
                found = image.backing(file)
                if found:
                    # a backing file with another name is the image itself, the first of its chain
                    below = os.path.basename(found[0])
                    below = below if _NUMBER.match(below) else "0"
                    if names == "path":
                        below = "{}.snap/{}".format(name, below)
                    if below != found[0]:
                        image.rename_backing(file, below, found[1], *self._patience)


def _linked(source: str, target: str) -> bool:
    try:
        os.link(source, target)
        return True
    except OSError:  # another file system, one without hard links, or a file of another user
        return False
