"""The snapshots of a disk as a graph of files, read from their headers, and the steps that change it.

    disk.0               -> disk.0.snap/2, the active file: the one that is written
    disk.0.snap/0        the first; it lies on an image of a datastore, or on nothing
    disk.0.snap/1        lies on 0; what it holds is snapshot 1 since 2 was made on it
    disk.0.snap/7.current    the path of the file that holds snapshot 7, where that is not `7`
    disk.0.snap/disk.0.snap -> .    with it the backing name disk.0.snap/1 leads there from both directories

The snapshots of a persistent disk on shared storage are the image's: disk.0 -> /ds/1/IMAGE.snap/2, and IMAGE.snap/0
is a link to IMAGE.  docs/contract.md, "Snapshots of disks".
"""

import os
import re

from madrigal.errors import BadImage, InUse, NotFound
from madrigal.onhost import image, part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

    Step = Tuple[Any, ...]

NUMBER = re.compile(r"(?:0|[1-9][0-9]*)\Z")
"""The name of a file in a directory of snapshots."""
_DISK = re.compile(r"disk\.[0-9]+\Z")
_PATH = 4096  # bytes; no path is longer
_LINKS = 8  # more links one after the other than these are a circle


# -- the graph, and what changes it ----------------------------------------------------------------------------


class Chain:
    """Which numbered file lies on which, and which steps lead where; it knows nothing of real files.

    PARENTS: what each file lies on, None for none of these.  ACTIVE: the file that is written, None for one without
    a number.  CURRENT: snapshots and the files that hold them, where a live commit has put them elsewhere.  TWINS:
    further numbers that a killed run has left, and the file of each (None: the one without a number).

    A step is a tuple, of a word and numbers:

        layout              make the directory
        vacant FILE         raise InUse unless nothing was ever written to it
        freeze FILE         give the active file this number as another name
        overlay FILE ON     make an empty file, in place of the one with this number if there is one
        switch FILE         let the disk lead to it
        rebase FILE FROM    let it lie on what FROM lies on; its content stays
        remove FILE
        hold SNAPSHOT FILE  note that FILE holds SNAPSHOT; None: that nothing does
        keep FILE           let the link to the image be the image itself, which is about to change
        image FILE          make the image what this file shows
        clear               remove the directory

    and of a VM that runs, what its hypervisor does:

        snapshot FILE       write to FILE from now on, which lies on what it has written to; the disk leads to it then
        commit FILE INTO    write into INTO what FILE has more, and leave FILE
        pull FILE           take into the active file what FILE, on which it lies, has
    """

    def __init__(
        self,
        parents: "Dict[int, Optional[int]]",
        active: "Optional[int]",
        current: "Optional[Dict[int, int]]" = None,
        twins: "Optional[Dict[int, Optional[int]]]" = None,
        name: str = "the disk",
    ) -> None:
        self.name = name
        self.parents = parents
        self.active = active
        self.current = current or {}
        self.twins = twins or {}

    def holder(self, snapshot: int) -> "Optional[int]":
        """The file that holds a snapshot; None if there is no such snapshot."""
        file = self.current.get(snapshot, snapshot)
        if file not in self.parents or file == self.active or file in self.leftovers():
            return None
        if snapshot not in self.current and file in self.current.values():
            return None  # what was in it is gone, another snapshot is in it now
        return file

    def needs(self, snapshot: int) -> int:
        """The file that holds a snapshot; raises NotFound."""
        file = self.holder(snapshot)
        if file is None:
            raise NotFound("{} has no snapshot {}".format(self.name, snapshot))
        return file

    def children(self, file: int) -> "List[int]":
        return sorted(number for number, parent in self.parents.items() if parent == file)

    def leftovers(self) -> "List[int]":
        """What lies on the active file, the topmost first: no snapshot can, so they are of tries that failed."""
        found: "List[int]" = []
        todo = [self.active] if self.active is not None else self._twins(None)
        while todo:
            children = [child for child in self.children(todo.pop()) if child != self.active and child not in found]
            found += children
            todo += children
        return found[::-1]

    def path(self, file: "Optional[int]") -> "List[int]":
        """FILE and what is below it, down to the first; raises BadImage for a circle."""
        found: "List[int]" = []
        while file is not None:
            if file in found:
                text = "the files {} of {} lie on one another in a circle"
                raise BadImage(text.format(", ".join(map(str, found)), self.name))
            found.append(file)
            file = self.parents[file]
        return found

    def create(self, snapshot: int, running: bool = False) -> "List[Step]":
        """The steps that make SNAPSHOT of what the active file holds now; none if that was done before."""
        frozen, new, active, leftovers = snapshot, snapshot + 1, self.active, self.leftovers()
        if active == new and self.parents[new] is not None and self.parents[new] == self.holder(snapshot):
            return _removed(self._twins(self.parents[new]))
        for number in (frozen, new):
            if number != active and number in self.parents and number not in leftovers:
                text = "{} has a snapshot {} already, whose place snapshot {} needs"
                raise InUse(text.format(self.name, number, snapshot))
        steps: "List[Step]" = [("layout",)] + [("vacant", file) for file in leftovers] + _removed(leftovers)
        twins = [twin for twin in self._twins(active) if twin != frozen]
        steps += _removed(twins)
        if running and active == new:
            text = "the VM writes to file {} of {}, whose name snapshot {} needs: power the VM off for it"
            raise InUse(text.format(new, self.name, snapshot))
        if running:
            # A hypervisor knows its files by their names, and may open them anew by these: what it writes keeps its
            # name, and the disk leads to it, until it writes to the new one.
            if active is None:
                steps += [("freeze", frozen)] if frozen not in self.twins else []
                active = frozen
            elif active != frozen:
                steps.append(("hold", snapshot, active))
            return [*steps, ("overlay", new, active), ("snapshot", new)]
        if frozen != active and frozen not in self.twins:
            steps.append(("freeze", frozen))
        steps += [("overlay", new, frozen), ("switch", new)]
        return steps + ([("remove", active)] if active not in (None, frozen, new) else [])

    def revert(self, snapshot: int) -> "List[Step]":
        """The steps that make the active file show SNAPSHOT; what was written since is lost.  Raises NotFound."""
        holder, leftovers = self.needs(snapshot), self.leftovers()
        if self.active is None:
            raise BadImage("{} should be a link to one of its files, and is none".format(self.name))
        steps: "List[Step]" = [("layout",)] + [("vacant", file) for file in leftovers]
        steps += _removed(leftovers) + _removed(self._twins(self.active))
        return steps + [("overlay", self.active, holder)]

    def delete(self, snapshot: int, running: bool = False) -> "List[Step]":
        """The steps that remove SNAPSHOT and no other; none if that was done before."""
        holder = self.holder(snapshot)
        forget: "List[Step]" = [("hold", snapshot, None)] if snapshot in self.current else []
        stale = _removed(self._stale())
        if holder is None or any(file == holder for other, file in self.current.items() if other != snapshot):
            return stale + forget
        in_use = self.path(self.active) if running else []
        above = next((child for child in self.children(holder) if child in in_use), None)
        children = [child for child in self.children(holder) if child != above and ("remove", child) not in stale]
        steps = stale + [("rebase", child, holder) for child in children]
        removed = _removed(self._twins(holder) + [holder])
        if above is None:
            return steps + removed + forget
        if above == self.active:
            return steps + [("pull", holder)] + removed + forget
        steps.append(("commit", above, holder))
        steps += [("rebase", child, above) for child in self.children(above) if child not in in_use]
        snapshots = [other for other, file in self.current.items() if file == above] or [above]
        return steps + [("hold", other, holder) for other in snapshots] + forget + [("remove", above)]

    def flatten(self, snapshot: int) -> "List[Step]":
        """The steps that make the image what SNAPSHOT (-1: the active file) shows, and leave no snapshot."""
        file = self.active if snapshot < 0 else self.needs(snapshot)
        steps: "List[Step]" = [("keep", number) for number in sorted(self.parents)]
        return (steps + [("image", file)] if file is not None else []) + [("clear",)]

    def _stale(self) -> "List[int]":
        """Files whose snapshot is in another one since a live commit, which a killed run has left."""
        held, active = self.current.values(), self.active
        stale = [number for number in self.current if number in self.parents and number not in held]
        return sorted(number for number in stale if number != active and not self.children(number))

    def _twins(self, file: "Optional[int]") -> "List[int]":
        return sorted(twin for twin, other in self.twins.items() if other == file)


def _removed(files: "Iterable[int]") -> "List[Step]":
    return [("remove", file) for file in files]


# -- reading it ------------------------------------------------------------------------------------------------


class File:
    """What the header of a numbered file says: the file it lies on, as it is written there, and that one's format."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.backing, self.format, self.problem = "", "", ""
        try:
            self.backing, self.format = image.backing(path) or ("", "")
        except (BadImage, OSError) as error:
            self.problem = str(error)

    @property
    def below(self) -> str:
        """The path of what it lies on, as qemu finds it."""
        return os.path.join(os.path.dirname(self.path), self.backing)


class Disk:
    """The disk (or image) at PATH as it is on the disks of this machine, for qcow2 disks with snapshots.

    `home` is what the snapshots belong to: the disk, or the image it leads to.  `dir` has the files.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_image = _DISK.match(os.path.basename(path)) is None
        self.home, active = lead(path)
        self.dir = self.home + ".snap"
        self.files: "Dict[int, File]" = {}
        entries = os.listdir(self.dir) if os.path.isdir(self.dir) else []
        current: "Dict[int, int]" = {}
        for entry in entries:
            name, dot, kind = entry.partition(".")
            path = os.path.join(self.dir, entry)
            if not NUMBER.match(name):
                continue
            if kind == "current":
                # only its last part: the whole may have been moved
                with part.opened(path) as text:
                    file = os.path.basename(os.fsdecode(text.read(_PATH).strip()))
                if NUMBER.match(file):
                    current[int(name)] = int(file)
            elif not dot and not os.path.isdir(path):
                self.files[int(name)] = File(path)
        if active is None and self.is_image and self.files:
            active = max(self.files)  # of an image that lies idle
        parents = {number: self._parent(number) for number in self.files}
        twins = self._twins(active, parents)
        for number, other in twins.items():
            del parents[number]
            parents.update({child: other for child in parents if parents[child] == number and other is not None})
        self.chain = Chain(parents, active, current, twins, self.path)

    @property
    def active_path(self) -> str:
        active = self.chain.active
        return self.home if active is None else os.path.join(self.dir, str(active))

    def check_active(self) -> None:
        """Raise NotFound or BadImage if the active file is not there: any of the others may be what it should be."""
        if os.path.exists(self.active_path):
            return
        if self.files:
            raise BadImage("{} should lead to one of the files in {}, and does not".format(self.path, self.dir))
        raise NotFound("{} does not exist".format(self.path))

    def check(self, number: "Optional[int]") -> None:
        """Raise BadImage if what FILE number lies on, down to the first, is not all there and in the datastores."""
        number = None if number is None else self.chain.twins.get(number, number)
        if number is None:
            self._check_below(self.home)
            return
        for file in self.chain.path(number):
            if self.files[file].problem:
                raise BadImage(self.files[file].problem)
        self._check_below(self.files[file].path)

    def copies(self) -> bool:
        """Whether what is in the directory are copies of the disk, each whole, as tm/ssh makes them of every format."""
        return bool(self.files) and not (
            not os.path.isfile(self.path)
            or os.path.islink(self.path)
            or self.traversal
            or self.chain.twins
            or any(file.backing or os.path.islink(file.path) for file in self.files.values())
        )

    @property
    def traversal(self) -> bool:
        return os.path.islink(os.path.join(self.dir, os.path.basename(self.dir)))

    def name(self, number: int) -> str:
        """How a file of the directory names file NUMBER as the one it lies on, in the way that it has begun with."""
        if self.home != self.path or (self.is_image and not os.path.islink(self.path)):
            return os.path.join(self.dir, str(number))
        if self.traversal or not self.files:
            return os.path.join(os.path.basename(self.dir), str(number))
        return str(number)

    def _twins(self, active: "Optional[int]", parents: "Dict[int, Optional[int]]") -> "Dict[int, Optional[int]]":
        """Numbers that are further names of a file, each with its own number: of these the active, or one lain on."""
        owners: "Dict[Tuple[int, int], Optional[int]]" = {}
        twins: "Dict[int, Optional[int]]" = {}
        if active is None and os.path.exists(self.home):
            owners[_inode(self.home)] = None
        for number in sorted(parents, key=lambda number: (number != active, number not in parents.values(), number)):
            if os.path.exists(self.files[number].path):
                owner = owners.setdefault(_inode(self.files[number].path), number)
                if owner != number:
                    twins[number] = owner
        return twins

    def _parent(self, number: int) -> "Optional[int]":
        file = self.files[number]
        if not file.backing:
            return None
        directory, name = os.path.split(file.below)
        if os.path.realpath(directory) == os.path.realpath(self.dir) and NUMBER.match(name):
            return int(name) if int(name) in self.files else None
        real = os.path.realpath(file.below)
        return next((other for other in self.files if os.path.realpath(self.files[other].path) == real), None)

    def _check_below(self, path: str) -> None:
        """Raise BadImage if PATH or what is below it, none of them a file of the chain, cannot be used."""
        seen: "Set[str]" = set()
        format = "qcow2"
        while True:
            real = os.path.realpath(path)
            if not self._allowed(real):
                raise BadImage("{} lies on {}, which is in none of the datastores".format(self.path, path))
            if not os.path.exists(real):
                raise BadImage("{} lies on {}, which does not exist".format(self.path, path))
            if real in seen:
                raise BadImage("{} lies on {}, which lies on itself".format(self.path, path))
            seen.add(real)
            if format not in image.FORMATS:
                text = "{} lies on {} and does not say its format: set it by qemu-img rebase -u -F"
                raise BadImage(text.format(self.path, path))
            file = File(path) if format == "qcow2" else None
            if file and file.problem:
                raise BadImage(file.problem)
            if not file or not file.backing:
                return
            if ":" in file.backing.partition("/")[0]:
                raise BadImage("{} lies on '{}', which is not a file".format(self.path, file.backing))
            path, format = file.below, file.format

    def _allowed(self, real: str) -> bool:
        """Whether a path, without links in it, is in one of the datastores; one of them may be a link itself."""
        root = os.path.dirname(os.path.dirname(self.path if self.is_image else os.path.dirname(self.path)))
        tops = [root] + [os.path.join(root, name) for name in os.listdir(root) if name.isdigit()]
        return any(real.startswith(os.path.realpath(top).rstrip("/") + "/") for top in tops)


def _inode(path: str) -> "Tuple[int, int]":
    found = os.stat(path)
    return found.st_dev, found.st_ino


def lead(path: str) -> "Tuple[str, Optional[int]]":
    """What the snapshots of the disk (or image) at PATH belong to, and its active file; None if it has no number.

    Raises BadImage for links that lead in a circle, or to something else in a directory of snapshots.
    """
    for _ in range(_LINKS):
        if not os.path.islink(path):
            return path, None
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        directory, name = os.path.split(path)
        if directory.endswith(".snap"):
            if not NUMBER.match(name):
                raise BadImage("the disk leads to {}, which is none of the numbered files of snapshots".format(path))
            return directory[: -len(".snap")], int(name)
    raise BadImage("{} is a link in a circle".format(path))
