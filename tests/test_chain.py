"""Snapshots of disks: plans for random trees, real qcow2 files against a model, kills, what stock drivers left."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import PATH, TREE, Hosts, check_stderr, run_action
from dumps import dump, front_end, vm_document
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from madrigal import snapshots
from madrigal.errors import BadImage, InUse, MadrigalError, NotFound
from madrigal.host import Host
from madrigal.host.local import LocalSession
from madrigal.location import Location
from madrigal.onhost.chain import Chain

CLUSTER = 64 << 10

# -- the planner, without files --------------------------------------------------------------------------------


class Layer:
    """A file of the model: what was written to it, by cluster."""

    def __init__(self, parent: int | None, data: dict[int, int] | None = None) -> None:
        self.parent = parent
        self.data = dict(data or {})


class Model:
    """Carries out steps on layers, with a hypervisor that may be ahead of or behind the link."""

    def __init__(self, plain: bool) -> None:
        first = Layer(None, {0: -1})
        self.plain: Layer | None = first if plain else None
        self.files: dict[int, Layer] = {} if plain else {0: first}
        self.link: int | None = None if plain else 0
        self.guest = first
        self.current: dict[int, int] = {}
        self.snapshots: dict[int, dict[int, int]] = {}
        self.ids = 0
        self.running = self.gave_up = False

    @property
    def active(self) -> Layer:
        if self.link is not None:
            return self.files[self.link]
        assert self.plain
        return self.plain

    def content(self, layer: Layer | None) -> dict[int, int]:
        if layer is None:
            return {}
        below = self.files[layer.parent] if layer.parent is not None else None
        return {**self.content(below), **layer.data}

    def read(self, running: bool) -> Chain:
        """What reading the files finds; of a VM that runs, the file that is active is the hypervisor's."""
        active = self.link
        if running and self.active is not self.guest:
            active = next(number for number, layer in self.files.items() if layer is self.guest)
        parents = {number: layer.parent for number, layer in self.files.items()}
        owners: dict[int, int | None] = {} if active is not None else {id(self.active): None}
        twins: dict[int, int | None] = {}
        for number in sorted(parents, key=lambda n: (n != active, n not in parents.values(), n)):
            owner = owners.setdefault(id(self.files[number]), number)
            if owner != number:
                twins[number] = owner
        for number, other in twins.items():
            del parents[number]
            parents.update({c: other for c in parents if parents[c] == number and other is not None})
        return Chain(parents, active, dict(self.current), twins)

    def do(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])
        if not self.running:
            self.guest = self.active

    def layout(self) -> None:
        pass

    def vacant(self, number: int) -> None:
        if self.files[number].data:
            raise InUse("data")

    def freeze(self, number: int) -> None:
        assert number not in self.files
        self.files[number] = self.active

    def overlay(self, number: int, on: int) -> None:
        assert on in self.files and number != on
        assert self.files.get(number) is not self.guest or not self.running
        self.files[number] = Layer(on)

    def switch(self, number: int) -> None:
        self.link, self.plain = number, None

    def rebase(self, number: int, was_on: int) -> None:
        assert self.files[number] is not self.guest or not self.running
        shown, parent = self.content(self.files[number]), self.files[was_on].parent
        below = self.content(self.files[parent]) if parent is not None else {}
        layer = self.files[number]
        layer.data.update({c: v for c, v in shown.items() if below.get(c, 0) != v})
        layer.data.update({c: 0 for c in below if c not in shown})
        layer.parent = parent

    def remove(self, number: int) -> None:
        layer = self.files[number]
        assert self.link != number
        assert layer is not self.guest or [*self.files.values(), self.plain].count(layer) > 1
        assert not any(other.parent == number for other in self.files.values())
        del self.files[number]

    def hold(self, snapshot: int, number: int | None) -> None:
        if number is None:
            del self.current[snapshot]
        else:
            self.current[snapshot] = number

    def snapshot(self, number: int) -> None:
        assert not self.files[number].data and self.files[self.files[number].parent or 0] is self.guest
        self.guest = self.files[number]
        self.switch(number)

    def commit(self, number: int, into: int) -> None:
        above = next(layer for layer in self.lineage() if layer.parent == number)
        assert self.files[number].parent == into
        self.files[into].data.update(self.files[number].data)
        above.parent = into

    def pull(self, number: int) -> None:
        assert self.guest.parent == number
        self.guest.data = {**self.files[number].data, **self.guest.data}
        self.guest.parent = self.files[number].parent

    def lineage(self) -> list[Layer]:
        found, layer = [], self.guest
        while True:
            found.append(layer)
            if layer.parent is None:
                return found
            layer = self.files[layer.parent]

    def run(self, data: st.DataObject, kind: str, target: int, whole: bool) -> None:
        """Plan and carry out, all of it or as far as it comes before it is killed."""
        steps = getattr(self.read(self.running), kind)(target, *(() if kind == "revert" else (self.running,)))
        end = len(steps) if whole else data.draw(st.integers(0, len(steps)))
        note(f"{kind} {target}{' of a running VM' if self.running else ''}: {steps[:end]} {steps[end:]}")
        for step in steps[:end]:
            self.do(step)
        if self.running and kind == "delete" and end < len(steps):
            self.gave_up = True  # what was committed into another may stay behind as a file of no snapshot

    def check(self) -> None:
        chain = self.read(self.running)
        for snapshot, content in self.snapshots.items():
            holder = chain.holder(snapshot)
            assert holder is not None, f"snapshot {snapshot} is gone"
            assert _shown(self.content(self.files[holder])) == _shown(content), f"snapshot {snapshot} has changed"
        others = [other for other in range(self.ids + 3) if other not in self.snapshots]
        assert self.gave_up or all(chain.holder(other) is None for other in others)


def _shown(content: dict[int, int]) -> dict[int, int]:
    return {cluster: value for cluster, value in content.items() if value}


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(st.data(), st.booleans())
def test_plans_keep_every_content(data: st.DataObject, plain: bool) -> None:
    """Random operations, of running VMs too, each killed now and then and run again: every content stays right."""
    model, value = Model(plain), 0
    for _ in range(data.draw(st.integers(1, 14))):
        value += 1
        running = model.running = data.draw(st.booleans())
        if not running:
            model.guest = model.active  # it will be started with what the link leads to
        model.guest.data[data.draw(st.integers(0, 3))] = value
        before = model.content(model.guest)
        snapshots = sorted(model.snapshots)
        kind = data.draw(st.sampled_from(["create", "create", *(["delete", "revert"] if snapshots else [])]))
        if kind == "revert" and running:
            continue
        if kind == "create":
            if not snapshots and not running and not model.gave_up and data.draw(st.booleans()):
                model.ids = 0  # an id is not given twice as long as there are others
            target = model.ids + (data.draw(st.integers(0, 9)) == 0) * data.draw(st.integers(0, 12))
            model.ids = target + 1
        else:
            target = data.draw(st.sampled_from(snapshots))
        failed = kind == "create" and data.draw(st.integers(0, 7)) == 0
        expected = model.content(model.guest)
        if kind == "revert":
            expected = model.snapshots[target]
        killed = data.draw(st.integers(0, 2))
        for last in [False] * killed + [True]:
            model.run(data, kind, target, last and not failed)
        if failed:
            model.gave_up = True  # the front-end has forgotten this snapshot
        else:
            if kind == "create":
                model.snapshots[target] = before
            elif kind == "delete":
                del model.snapshots[target]
            if kind != "revert":
                assert getattr(model.read(running), kind)(target, running) == [], "it is done"
        assert _shown(model.content(model.guest)) == _shown(expected)
        model.check()


@settings(max_examples=150, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(st.data())
def test_nothing_but_the_snapshots_is_left(data: st.DataObject) -> None:
    """As many files as snapshots, and the active one: however often a run was killed before it was repeated."""
    model = Model(plain=True)
    for number in range(data.draw(st.integers(1, 10))):
        snapshots = sorted(model.snapshots)
        kind = data.draw(st.sampled_from(["create", *(["delete", "revert"] if snapshots else [])]))
        target = number * 3 if kind == "create" else data.draw(st.sampled_from(snapshots))
        killed = data.draw(st.integers(0, 2))
        for last in [False] * killed + [True]:
            model.run(data, kind, target, last)
        if kind == "create":
            model.snapshots[target] = {}
        elif kind == "delete":
            del model.snapshots[target]
        assert len(model.files) == len(model.snapshots) + (model.link is not None)


# -- real files ------------------------------------------------------------------------------------------------

CLUSTERS = 12


def qemu_img(*argv: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(["qemu-img", *argv], check=True, capture_output=True, cwd=cwd)


def led(path: Path) -> Path:
    """Where links lead, on another machine too."""
    while path.is_symlink():
        path = path.parent / os.readlink(path)
    return path


def write(path: Path, cluster: int, value: int, format: str = "qcow2") -> None:
    command = f"write -q -P {value} {cluster * CLUSTER} {CLUSTER}"
    subprocess.run(["qemu-io", "-f", format, "-c", command, led(path)], check=True, capture_output=True)


def content(path: Path, format: str = "qcow2") -> list[int]:
    """The value of each cluster, read by qemu; each has one."""
    with tempfile.TemporaryDirectory() as work:
        qemu_img("convert", "-f", format, "-O", "raw", path, f"{work}/raw")
        data = Path(work, "raw").read_bytes()
    clusters = [data[offset : offset + CLUSTER] for offset in range(0, len(data), CLUSTER)]
    assert all(cluster == cluster[:1] * CLUSTER for cluster in clusters)
    return [cluster[0] for cluster in clusters]


class Storage:
    """Datastores 0 and 1 in a directory, with the disk 0 of VM 17, laid out as some driver does.

    `local`, `shared`, `persistent`: as today's stock drivers do for qcow2 disks of their own, on an image, and that are
    the image.  `plain`: a file, as an earlier version of ours made them.  `linked`: a link to the image, as it linked
    persistent ones.  `copies`, `raw`: raw disks, and such a persistent one.
    """

    def __init__(self, work: Path, kind: str) -> None:
        self.kind = kind
        self.vm, self.image = work / "ds/0/17", work / "ds/1/abc"
        self.vm.mkdir(parents=True)
        self.image.parent.mkdir()
        self.disk = self.vm / "disk.0"
        self.chained = kind not in ("copies", "raw")
        self.format = "qcow2" if self.chained else "raw"
        self.expected = [0] * CLUSTERS
        self.home = self.image if kind in ("persistent", "linked", "raw") else self.disk
        self.snap = Path(f"{self.home}.snap")
        first = self.disk if self.home == self.disk and kind != "shared" else self.image
        format = "raw" if kind == "shared" else self.format
        qemu_img("create", "-f", format, first, str(CLUSTERS * CLUSTER))
        for cluster in (1, 2, 3):
            write(first, cluster, 250 + cluster, format)
            self.expected[cluster] = 250 + cluster
        if kind in ("linked", "raw"):
            self.disk.symlink_to(self.image)
        elif kind in ("local", "shared", "persistent"):
            self.snap.mkdir()
            if kind == "local":
                self.disk.rename(self.snap / "0")
            else:
                (self.snap / self.snap.name).symlink_to(".")
            if kind == "shared":
                options = ["-o", "backing_fmt=raw", "-b", str(self.image), "-f", "qcow2"]
                qemu_img("create", *options, self.snap / "0")
            if kind == "persistent":
                (self.snap / "0").symlink_to(self.image)
                self.disk.symlink_to(self.snap / "0")
            else:
                self.disk.symlink_to("disk.0.snap/0")

    def act(self, method: str, snapshot: int) -> bool:
        with LocalSession() as session:
            session.call("hold", path=str(self.vm))
            arguments = {"path": str(self.disk), "snapshot": snapshot, "chained": self.chained}
            return bool(session.call(f"snap_{method}", **arguments))

    def write(self, cluster: int, value: int) -> None:
        write(self.disk, cluster, value, self.format)
        self.expected[cluster] = value

    def grow(self) -> None:
        self.expected.append(0)
        qemu_img("resize", "-f", self.format, led(self.disk), str(len(self.expected) * CLUSTER))

    def of(self, snapshot: int) -> Path:
        """The file in which a stock driver finds a snapshot."""
        current = self.snap / f"{snapshot}.current"
        return Path(current.read_text().strip()) if current.exists() else self.snap / str(snapshot)

    def check(self, snapshots: dict[int, list[int]]) -> None:
        assert content(led(self.disk), self.format) == self.expected
        if self.kind in ("shared", "plain", "persistent", "linked"):
            assert content(self.disk, self.format) == self.expected, "it can be opened by the link, too"
        for snapshot, expected in snapshots.items():
            assert content(self.of(snapshot), self.format) == expected
        assert not self.left()
        if self.chained:
            for name in self.numbers():
                subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", self.snap / name], check=True)

    def numbers(self) -> list[str]:
        entries = os.listdir(self.snap) if self.snap.exists() else []
        return sorted((entry for entry in entries if entry.isdigit()), key=int)

    def left(self) -> list[str]:
        """Parts and locks."""
        places = [self.vm, self.vm.parent, self.image.parent, self.snap]
        return [name for place in places if place.exists() for name in os.listdir(place) if name.startswith(".")]


KINDS = ["local", "shared", "persistent", "plain", "linked", "copies", "raw"]


@settings(max_examples=18, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(st.data())
def test_random_snapshots_of_real_disks(data: st.DataObject) -> None:
    """Whatever the order, the disk and every snapshot hold what they should, as qemu reads them."""
    kind = data.draw(st.sampled_from(KINDS))
    with tempfile.TemporaryDirectory() as work:
        storage, ids = Storage(Path(work), kind), 0
        snapshots: dict[int, list[int]] = {}
        for value in range(1, data.draw(st.integers(4, 10))):
            for _ in range(data.draw(st.integers(0, 2))):
                storage.write(data.draw(st.integers(0, CLUSTERS - 1)), value)
            if data.draw(st.integers(0, 5)) == 5:
                storage.grow()
            action = data.draw(st.sampled_from(["create", "create", *(["delete", "revert"] if snapshots else [])]))
            if action == "create":
                ids = ids if snapshots else data.draw(st.sampled_from([0, ids]))
                snapshot = ids + data.draw(st.sampled_from([0, 0, 0, 9]))
                ids = snapshot + 1
                snapshots[snapshot] = list(storage.expected)
            else:
                snapshot = data.draw(st.sampled_from(sorted(snapshots)))
            note(f"{kind}: {action} {snapshot}")
            assert storage.act(action, snapshot)
            if action == "delete":
                del snapshots[snapshot]
                assert not storage.act(action, snapshot), "gone already is fine"
            elif action == "revert":
                storage.expected = list(snapshots[snapshot])
            elif storage.chained:
                assert not storage.act(action, snapshot), "done already is fine"
        storage.check(snapshots)
        if snapshots:
            assert len(storage.numbers()) == len(snapshots) + storage.chained
        if kind in ("persistent", "linked", "raw"):
            assert os.readlink(storage.disk).startswith("/") and storage.image.exists()


def test_an_id_that_is_given_again_while_a_vm_writes_is_refused() -> None:
    """The file that it writes to has the name that the next one would need, and a hypervisor goes by names."""
    for parents in ({1: None}, {1: 5, 5: None}):
        with pytest.raises(InUse, match="power the VM off"):
            Chain(dict(parents), 1).create(0, running=True)
        assert ("remove", 1) not in Chain(dict(parents), 1).create(0)


@pytest.mark.parametrize("snapshot", [1, 2])
def test_what_an_interrupted_snapshot_has_left_is_not_taken_for_the_next(snapshot: int) -> None:
    """A run that was killed in making snapshot 0 of a plain file; then another one is made of the running VM.

    What was left goes before the hypervisor writes to anything new: afterwards it would look like a snapshot.
    """
    steps = Chain({1: 0}, None, {}, {0: None}).create(snapshot, running=True)
    left = [step for step in steps if step in (("remove", 1), ("remove", 0))]
    assert left == [("remove", 1), ("remove", 0)]
    assert max(map(steps.index, left)) < steps.index(("freeze", snapshot))


@pytest.mark.long
@pytest.mark.parametrize(
    ("test", "strategies", "examples"),
    [
        (test_plans_keep_every_content, (st.data(), st.booleans()), 6000),
        (test_nothing_but_the_snapshots_is_left, (st.data(),), 6000),
        (test_random_snapshots_of_real_disks, (st.data(),), 200),
    ],
    ids=["plans", "left", "real disks"],
)
def test_many_more_of_them(test: Any, strategies: tuple[st.SearchStrategy[object], ...], examples: int) -> None:
    how = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    how(given(*strategies)(test.hypothesis.inner_test))()


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Each layout, in a directory whose name a shell would run."""
    work = tmp_path / "a b;$(touch x)'\"*"
    work.mkdir()
    return Storage(work, request.param)


def test_an_id_that_is_given_again_makes_a_snapshot(storage: Storage) -> None:
    """When the last snapshot is gone a front-end may begin with 0 again, whatever the active file is called by then."""
    for _ in range(3):
        for snapshot in (0, 1):
            before = list(storage.expected)
            assert storage.act("create", snapshot)
            storage.write(3, storage.expected[3] % 200 + 1)
            storage.check({snapshot: before})
            assert not storage.act("create", snapshot) or storage.kind in ("copies", "raw"), "done already is fine"
            storage.check({snapshot: before} if storage.chained else {})
            assert storage.act("delete", snapshot)
            storage.check({})
            assert len(storage.numbers()) == storage.chained


CHAINS = pytest.mark.parametrize("storage", ["local", "shared", "persistent", "plain", "linked"], indirect=True)


def backing(path: Path) -> str:
    with open(path, "rb") as file:
        header = file.read(4096)
    offset, length = int.from_bytes(header[8:16], "big"), int.from_bytes(header[16:20], "big")
    return header[offset : offset + length].decode()


@CHAINS
def test_links_and_names_are_those_that_stock_drivers_make(storage: Storage) -> None:
    """A stock driver that goes on with the disk finds every file under the name it expects."""
    for snapshot in range(11):
        storage.act("create", snapshot)
    names = {"local": "{}", "shared": "disk.0.snap/{}", "plain": "disk.0.snap/{}"}
    name = names.get(storage.kind, f"{storage.snap}/{{}}")
    assert [backing(storage.snap / str(number)) for number in (1, 10, 11)] == [name.format(n) for n in (0, 9, 10)]
    assert os.readlink(storage.disk) == ("disk.0.snap/11" if name[0] != "/" else f"{storage.snap}/11")
    assert storage.numbers() == [str(number) for number in range(12)]
    links = {path.name: os.readlink(path) for path in storage.snap.iterdir() if path.is_symlink()}
    own = {} if storage.kind == "local" else {storage.snap.name: "."}
    assert links == (own if name[0] != "/" else {**own, "0": str(storage.image)})
    storage.act("revert", 3)
    storage.act("delete", 4)
    assert (backing(storage.snap / "11"), backing(storage.snap / "5")) == (name.format(3), name.format(3))


@CHAINS
def test_what_a_failed_try_has_left_is_replaced_unless_it_has_data(storage: Storage) -> None:
    storage.act("create", 0)
    storage.write(5, 5)
    before = list(storage.expected)
    left = storage.snap / "2"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", storage.snap / "1", left)
    storage.act("create", 1)
    storage.write(6, 6)
    storage.check({0: content(storage.of(0)), 1: before})
    left = storage.snap / "3"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", storage.snap / "2", left)
    write(left, 1, 1)
    for action, snapshot in (("create", 2), ("revert", 0)):
        with pytest.raises(InUse, match="has data"):
            storage.act(action, snapshot)
    assert content(left)[1] == 1
    left.unlink()
    storage.check({0: content(storage.of(0)), 1: before})


def test_no_such_snapshot(storage: Storage) -> None:
    active = 1 if storage.chained else 7
    for _ in range(2):
        for snapshot in (active, 7):
            with pytest.raises(NotFound, match=rf"disk\.0 has no snapshot {snapshot}"):
                storage.act("revert", snapshot)
            assert not storage.act("delete", snapshot), "gone already"
        storage.check({})
        storage.act("create", 0)
    if storage.chained:
        with pytest.raises(InUse, match="has a snapshot 0 already"):
            storage.act("create", 1) and storage.act("revert", 0) and storage.act("create", 0)


def test_no_disk(storage: Storage) -> None:
    storage.disk.unlink()
    for action in ("create", "revert"):
        with pytest.raises((NotFound, BadImage)):
            storage.act(action, 0)
    if storage.kind in ("local", "shared"):
        with pytest.raises(BadImage, match="should lead to one of the files"):
            storage.act("delete", 0)
    else:
        assert not storage.act("delete", 0)
    assert not storage.left() and not storage.disk.exists()


@CHAINS
def test_a_disk_that_leads_to_nothing(storage: Storage) -> None:
    """Any of the files may be what the VM has written, so that none is removed."""
    storage.act("create", 0)
    storage.act("create", 1)
    (storage.snap / "2").unlink()
    for action in ("create", "revert", "delete"):
        with pytest.raises(BadImage, match="should lead to one of the files"):
            storage.act(action, 1)
    assert storage.numbers() == ["0", "1"]


def test_a_persistent_raw_disk_stays_the_link_to_its_image(tmp_path: Path) -> None:
    """Reverting replaces what the link leads to: a private file in its place would be lost at the end."""
    storage = Storage(tmp_path, "raw")
    storage.image.chmod(0o640)
    digest = Path(f"{storage.image}.md5sum")
    storage.act("create", 12)
    digest.write_text("old")
    before = list(storage.expected)
    storage.write(4, 4)
    storage.act("revert", 12)
    assert os.readlink(storage.disk) == str(storage.image)
    assert content(storage.image, "raw") == before and not digest.exists()
    assert storage.image.stat().st_mode & 0o777 == 0o640
    assert os.listdir(storage.vm) == ["disk.0"] and storage.numbers() == ["12"]


def test_a_revert_that_has_no_space_leaves_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed before what replaces it is whole."""
    for kind in ("copies", "raw"):
        storage = Storage(tmp_path / kind, kind)
        storage.act("create", 0)
        storage.write(4, 4)

        def full(*_: object) -> str:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr("madrigal.onhost.copy.copy_file", full)
            for action, snapshot in (("revert", 0), ("create", 1)):
                with pytest.raises(MadrigalError, match="No space left"):
                    storage.act(action, snapshot)
        storage.check({})
        assert storage.numbers() == ["0"]


def test_a_copy_of_every_format_if_the_driver_keeps_copies(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "plain")
    storage.chained = False
    snapshots = {}
    for snapshot in (0, 1, 12):
        snapshots[snapshot] = list(storage.expected)
        storage.act("create", snapshot)
        storage.write(snapshot % 12, 77)
    assert not storage.disk.is_symlink() and storage.numbers() == ["0", "1", "12"]
    storage.chained = True  # a driver that keeps chains goes on with copies where there are some
    storage.act("revert", 1)
    storage.expected = snapshots[1]
    storage.act("delete", 0)
    del snapshots[0]
    for snapshot, expected in snapshots.items():
        assert content(storage.of(snapshot)) == expected and not backing(storage.of(snapshot))
    assert content(storage.disk) == storage.expected and not storage.disk.is_symlink()


@pytest.mark.parametrize("kind", ["local", "shared", "persistent"])
def test_a_chain_stays_one_if_the_driver_keeps_copies(tmp_path: Path, kind: str) -> None:
    """A copy of its top alone would lie on files that the chain changes."""
    storage = Storage(tmp_path, kind)
    storage.act("create", 0)
    first = list(storage.expected)
    storage.write(3, 3)
    storage.chained = False
    storage.act("create", 1)
    second = list(storage.expected)
    storage.act("delete", 0)
    storage.act("revert", 1)
    assert first != second
    storage.check({1: second})
    assert storage.numbers() == ["1", "2"]


# -- chains that cannot be used --------------------------------------------------------------------------------


def break_chain(storage: Storage, how: str) -> str:
    """Make file 0 of a chain bad; returns what has to be said."""
    first, elsewhere = storage.snap / "0", storage.vm.parents[2] / "elsewhere"
    if how == "missing":
        storage.image.unlink()
        return "which does not exist"
    if how == "cyclic":
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "disk.0.snap/1", first)
        return "in a circle"
    if how == "no format":
        first.write_bytes(first.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\1\2\3\4"))  # an unknown extension
        return "does not say its format"
    if how == "not qcow2":
        first.write_bytes(b"\0" * 4096)
        return "should be a qcow2 image"
    if how == "data file":
        first.unlink()
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={elsewhere}", first, "1M")
        return "data in another file"
    elsewhere.write_bytes(b"")
    names = {"outside": str(elsewhere), "outside by a link": f"{storage.image}.link", "protocol": "nbd:localhost:1"}
    Path(f"{storage.image}.link").symlink_to(elsewhere)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", names[how], first)
    return "is not a file" if how == "protocol" else "in none of the datastores"


@pytest.mark.parametrize(
    "how",
    ["missing", "cyclic", "no format", "not qcow2", "data file", "outside", "outside by a link", "protocol"],
)
def test_a_chain_that_cannot_be_used_is_left_alone(tmp_path: Path, how: str) -> None:
    storage = Storage(tmp_path, "shared")
    for snapshot in range(3):
        storage.act("create", snapshot)
    shutil.copy(storage.snap / "2", storage.snap / "20")  # a leaf
    text = break_chain(storage, how)
    before = {path: path.read_bytes() for path in storage.snap.iterdir() if path.is_file()}
    for action, snapshot in (("create", 3), ("revert", 1), ("delete", 0), ("delete", 1)):
        with pytest.raises(BadImage, match=text):
            storage.act(action, snapshot)
    assert before == {path: path.read_bytes() for path in storage.snap.iterdir() if path.is_file()}
    assert storage.act("delete", 20), "what needs no other file can be removed"
    assert not storage.left()


def test_a_datastore_may_be_a_link(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "shared")
    storage.image.parent.rename(tmp_path / "mounted")
    storage.image.parent.symlink_to(tmp_path / "mounted")
    storage.act("create", 0)
    storage.act("delete", 0)
    storage.check({})


def test_links_that_lead_astray(tmp_path: Path) -> None:
    for target in ("disk.0", "disk.0.snap/base"):
        storage = Storage(tmp_path / target, "plain")
        storage.disk.unlink()
        storage.disk.symlink_to(target)
        with pytest.raises(BadImage):
            storage.act("create", 0)


# -- what a stock driver has left ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "shared", "persistent"])
def test_a_snapshot_that_a_live_commit_has_put_elsewhere(tmp_path: Path, kind: str) -> None:
    """`1.current` leads to the file that holds snapshot 1 since snapshot 0, on which it lay, was deleted live."""
    for action, snapshot in (("revert", 1), ("delete", 1), ("delete", 0), ("delete", 2), ("create", 3)):
        storage = Storage(tmp_path / f"{kind}{action}{snapshot}", kind)
        snapshots = {}
        for made in range(3):
            storage.write(made, made + 10)
            snapshots[made] = list(storage.expected)
            storage.act("create", made)
        qemu_img("commit", "-q", "-d", "-f", "qcow2", storage.snap / "1")
        (storage.snap / "1").unlink()
        name = backing(storage.snap / "2").rpartition("/")
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", f"{name[0]}{name[1]}0", storage.snap / "2")
        (storage.snap / "1.current").write_text("/an/earlier/place/disk.0.snap/0\n")
        del snapshots[0]
        done = storage.act(action, snapshot)
        assert done == (snapshot != 0), "snapshot 0 is gone already"
        if action == "revert":
            storage.expected = list(snapshots[1])
        elif action == "delete":
            snapshots.pop(snapshot, None)
        else:
            snapshots[3] = list(storage.expected)
        (storage.snap / "1.current").exists() and (storage.snap / "1.current").write_text(f"{storage.snap}/0\n")
        storage.check(snapshots)
        assert (storage.snap / "1.current").exists() == (snapshot != 1 or action == "revert")


def test_deleting_0_does_not_take_the_image_for_qcow2(tmp_path: Path) -> None:
    """What lies on a raw image says so after file 0 is gone: a guest may have written a qcow2 header into the image."""
    storage = Storage(tmp_path, "shared")
    with open(storage.image, "r+b") as file:
        file.write((b"QFI\xfb" + bytes(3) + b"\3").ljust(CLUSTER, b"\0"))
    storage.act("create", 0)
    storage.act("delete", 0)
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", storage.snap / "1"], capture_output=True, check=True
    )
    assert b'"backing-filename-format": "raw"' in info.stdout and backing(storage.snap / "1") == str(storage.image)


# -- killed ----------------------------------------------------------------------------------------------------

_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from madrigal.host.local import LocalSession
with LocalSession() as session:
    session.call("hold", path=sys.argv[2])
    print("begun", flush=True)
    session.call("snap_" + sys.argv[4], path=sys.argv[3], snapshot=int(sys.argv[5]), chained=sys.argv[6] == "True")
"""


def kill(storage: Storage, action: str, snapshot: int, after: float) -> bool:
    """Start an action and end it by SIGKILL; what it has started goes on alone.  Returns whether it was still there."""
    words = [str(storage.vm), str(storage.disk), action, str(snapshot), str(storage.chained)]
    program = [sys.executable, "-c", _KILLED, f"{TREE}/lib", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, env={"PATH": PATH}) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(after)
        process.kill()
        return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["shared", "persistent", "plain", "copies", "raw"])
def test_a_run_after_a_kill_ends_as_one_clean_run(tmp_path: Path, kind: str) -> None:
    storage, choose, killed = Storage(tmp_path, kind), random.Random(4), 0
    snapshots: dict[int, list[int]] = {}
    other, began = Storage(tmp_path / "other", kind), time.monotonic()
    other.act("create", 0)
    longest = (time.monotonic() - began) * 1.5
    storage.write(1, 1)
    plan = ["create", "create", "delete", "create", "create", "revert", "create", "delete", "revert", "delete"]
    for number, action in enumerate(plan):
        storage.write(number % CLUSTERS, number + 100)
        snapshot = number if action == "create" else choose.choice(sorted(snapshots))
        for _ in range(2):
            killed += kill(storage, action, snapshot, choose.random() * longest)
        if action == "create":
            snapshots[snapshot] = list(storage.expected)
        elif action == "revert":
            storage.expected = list(snapshots[snapshot])
        else:
            del snapshots[snapshot]
        storage.act(action, snapshot)
        storage.check(snapshots)
        assert len(storage.numbers()) == len(snapshots) + storage.chained
    assert killed > 2


def test_a_delete_that_is_killed_in_the_middle_of_much_data(tmp_path: Path) -> None:
    """Not even while qemu-img works do the files hold anything else; what it still does alone, the next run awaits."""
    storage = Storage(tmp_path, "plain")
    size = 96 << 20
    qemu_img("resize", "-f", "qcow2", storage.disk, str(size))
    fill = f"write -q -P 7 0 {size}"
    storage.act("create", 0)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", fill, led(storage.disk)], check=True)
    storage.act("create", 1)
    storage.write(3, 9)
    storage.act("create", 2)

    def shown(number: int) -> bytes:
        qemu_img("convert", "-f", "qcow2", "-O", "raw", storage.snap / str(number), tmp_path / "raw")
        return hashlib.md5((tmp_path / "raw").read_bytes(), usedforsecurity=False).digest()

    expected = {number: shown(number) for number in (2, 3)}
    for after in (0.03, 0.06, 0.1):
        if kill(storage, "delete", 1, after):
            with LocalSession() as session:
                session.call("hold", path=str(storage.vm))  # qemu-img has ended
            assert {number: shown(number) for number in (2, 3)} == expected
    storage.act("delete", 1)
    assert {number: shown(number) for number in (2, 3)} == expected
    assert storage.numbers() == ["0", "2", "3"] and not storage.left()


# -- images that no VM uses ------------------------------------------------------------------------------------


class Image:
    """An image of datastore 1 with snapshots 0 and 1 and something newer, as VMs of some driver have left it.

    `shared`: a file, and a chain on it.  `local`: a link to the top of a chain.  `copies`: a qcow2 file, and copies
    that are whole (tm/ssh).  `raw`: the same in raw.
    """

    def __init__(self, work: Path, kind: str) -> None:
        self.work, self.kind = work, kind
        self.format = "raw" if kind == "raw" else "qcow2"
        layouts = {"shared": "persistent", "local": "local", "copies": "plain", "raw": "copies"}
        storage = Storage(work, layouts[kind])
        storage.chained = kind in ("shared", "local")
        self.snapshots = {}
        for snapshot in (0, 1):
            storage.write(snapshot, 20 + snapshot)
            self.snapshots[snapshot] = list(storage.expected)
            storage.act("create", snapshot)
        storage.write(5, 55)
        self.newest = list(storage.expected)
        self.path = storage.image
        self.snap = Path(f"{self.path}.snap")
        if kind != "shared":
            storage.disk.rename(self.path)
            storage.snap.rename(self.snap)
            if kind == "local":
                self.path.unlink()
                self.path.symlink_to(f"{self.snap.name}/2")
        shutil.rmtree(storage.vm)
        (work / "var").mkdir()
        Path(f"{self.path}.md5sum").write_text("old")

    def run(self, action: str, snapshot: int) -> str:
        """The message of a datastore action, "" on success; TM_MAD says what it says for tm/shared."""
        values = {"SOURCE": f"{self.work}//ds/1/abc", "FORMAT": self.format, "TARGET_SNAPSHOT": snapshot}
        text = dump(f"{self.work}//ds/1", values).replace(b"<TM_MAD>ssh", b"<TM_MAD>shared")
        env = {"PATH": PATH, "HOME": str(self.work), "ONE_LOCATION": str(self.work)}
        done = run_action(f"datastore/fs/{action}", "42", input=text, env=env)
        assert done.stdout == ""
        return check_stderr(done, action)

    def now(self) -> list[int]:
        """What the next VM gets: what stock drivers take, the highest number if there are any in a shared datastore."""
        if self.kind == "shared" and self.snap.exists():
            return content(max(self.snap.glob("[0-9]*"), key=lambda path: int(path.name)))
        return content(led(self.path), self.format)


@pytest.fixture(params=["shared", "local", "copies", "raw"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    return Image(tmp_path, request.param)


def test_an_image_is_reverted(stored: Image) -> None:
    """IMAGE/FORMAT and what is there decide how, and not the name of the transfer driver."""
    for snapshot in (0, 1, 0):
        assert not stored.run("snap_revert", snapshot)
        assert stored.now() == stored.snapshots[snapshot]
        for other, expected in stored.snapshots.items():
            assert content(stored.snap / str(other), stored.format) == expected
        assert not Path(f"{stored.path}.md5sum").exists()
        Path(f"{stored.path}.md5sum").write_text("old")
    assert "has no snapshot 7" in stored.run("snap_revert", 7)
    assert stored.now() == stored.snapshots[0]


def test_a_snapshot_of_an_image_is_deleted(stored: Image) -> None:
    for _ in range(2):
        assert not stored.run("snap_delete", 1)
        assert stored.now() == stored.newest
        assert content(stored.snap / "0", stored.format) == stored.snapshots[0]
    assert not (stored.snap / "1").exists()


@pytest.mark.parametrize("snapshot", [0, 1, -1])
def test_an_image_is_flattened(stored: Image, snapshot: int) -> None:
    assert "has no snapshot 7" in stored.run("snap_flatten", 7)
    for _ in range(2):
        assert not stored.run("snap_flatten", snapshot)
        assert stored.now() == (stored.newest if snapshot < 0 else stored.snapshots[snapshot])
        assert os.listdir(stored.path.parent) == ["abc"] or snapshot == -1
        assert not stored.snap.exists() and stored.path.is_file() and not stored.path.is_symlink()
        assert stored.format == "raw" or not backing(stored.path)


def test_flattening_that_was_interrupted_can_still_be_another(stored: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the snapshots are gone they hold what they did: the image is replaced beside what they lie on."""
    from madrigal.onhost.session import Session

    def cut(*_: object) -> None:
        raise OSError("cut")

    for snapshot in (1, 0):
        with monkeypatch.context() as context, LocalSession() as session:
            context.setattr(Session, "drop", cut)
            session.call("hold", path=str(stored.path))
            with pytest.raises(MadrigalError, match="cut"):
                session.call("snap_flatten", path=str(stored.path), snapshot=snapshot, format=stored.format)
        for other, expected in stored.snapshots.items():
            assert content(stored.snap / str(other), stored.format) == expected
    assert not stored.run("snap_flatten", 1)
    assert stored.now() == stored.snapshots[1] and os.listdir(stored.path.parent) == ["abc"]


def test_what_a_dump_must_say(tmp_path: Path) -> None:
    image = Image(tmp_path, "raw")
    for action, text in (("snap_revert", -1), ("snap_delete", -2), ("snap_flatten", -2), ("snap_delete", "")):
        assert "TARGET_SNAPSHOT" in image.run(action, text)  # type: ignore[arg-type]
    image.format = ""
    assert "IMAGE/FORMAT is missing" in image.run("snap_revert", 0)
    assert content(image.path, "raw") == image.newest


# -- whole actions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["shared", "ssh"])
def test_actions_on_a_host(hosts: Hosts, tmp_path: Path, driver: str) -> None:
    """Each disk by its own state: the front-end's list of snapshots, where another disk's come first, is not asked."""
    vm = f"{hosts.datastores}/0/17"
    qcow2 = {"FORMAT": "qcow2", "SIZE": 1, "ORIGINAL_SIZE": 1}
    disks = {0: qcow2, 1: qcow2, 2: {**qcow2, "FORMAT": "raw"}}
    document = vm_document(17, disks).replace(
        b"</TEMPLATE>",
        b"</TEMPLATE><SNAPSHOTS><DISK_ID>0</DISK_ID><SNAPSHOT><ID>0</ID><ACTIVE>YES</ACTIVE></SNAPSHOT></SNAPSHOTS>",
    )
    on = hosts.on("host01", vm)
    try:
        on.mkdir(parents=True)
        for number, about in disks.items():
            qemu_img("create", "-f", str(about["FORMAT"]), on / f"disk.{number}", "1M")
            write(on / f"disk.{number}", 0, 1, str(about["FORMAT"]))
        with front_end(tmp_path, document) as asked:

            def act(action: str, disk: int, snapshot: int) -> str:
                arguments = f"host01:{vm}//disk.{disk}", str(snapshot), "17", "0"
                done = run_action(f"tm/{driver}/snap_{action}", *arguments, env={**hosts.env, **asked})
                assert done.stdout == ""
                return check_stderr(done, f"snap_{action}")

            for disk in disks:
                format = str(disks[disk]["FORMAT"])
                chained = driver == "shared" and format == "qcow2"
                snap = on / f"disk.{disk}.snap"
                for snapshot in (0, 1):
                    assert not act("create", disk, snapshot)
                    write(on / f"disk.{disk}", 0, snapshot + 2, format)
                names = {entry for entry in os.listdir(snap) if entry.isdigit()}
                assert names == ({"0", "1", "2"} if chained else {"0", "1"})
                assert not act("delete", disk, 0) and not act("delete", disk, 0)
                assert content(on / f"disk.{disk}", format)[0] == 3
                assert not act("revert", disk, 1)
                assert content(on / f"disk.{disk}", format)[0] == 2
                assert "has no snapshot 0" in act("revert", disk, 0)
                assert (on / f"disk.{disk}").is_symlink() == chained
        assert not [name for name in os.listdir(on) + os.listdir(on.parent) if name.startswith(".")]
    finally:
        shutil.rmtree(on.parent)


def test_a_worker_that_is_killed_on_its_host(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    vm = f"{hosts.datastores}/0/17"
    on = hosts.on("host01", vm)
    session = Host("host01").session()
    try:
        on.mkdir(parents=True)
        qemu_img("create", "-f", "qcow2", on / "disk.0", "1M")
        session.call("hold", path=vm)
        (pid,) = hosts.workers("host01")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(MadrigalError):
            session.call("snap_create", path=f"{vm}/disk.0", snapshot=0, chained=True)
        snapshots.create(Location("host01", f"{vm}/disk.0"), 0, chained=True)
        assert os.readlink(on / "disk.0") == "disk.0.snap/1"
    finally:
        session.fail()
        shutil.rmtree(on.parent)


def test_round_trips(hosts: Hosts, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from test_round_trips import Meter

    vm = f"{hosts.datastores}/0/17"
    on = hosts.on("host01", vm)
    try:
        on.mkdir(parents=True)
        qemu_img("create", "-f", "qcow2", on / "disk.0", "1M")
        of = Meter(monkeypatch).of
        for function in (snapshots.create, snapshots.revert, snapshots.delete):
            assert of(function, Location("host01", f"{vm}/disk.0"), 0, chained=True) == {"host01": 2}
    finally:
        shutil.rmtree(on.parent)
