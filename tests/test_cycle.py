"""The life of VMs on three real hosts, gesture by gesture, for every pair of image and system datastore drivers.

What a disk holds is compared with a model after each gesture: read as a guest would, and written so too.  Gestures
whose actions a driver does not have are left out; a pair is there as soon as its drivers are in the tree.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PATH, TREE, Hosts, rig

from madrigal import drivers
from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd
from madrigal.embedded.records import VM, Disk
from madrigal.errors import InUse

pytestmark = pytest.mark.long

MIB = 1 << 20
SIZE = 3  # MiB of an image

# Image driver, driver of the system datastore, formats of images.  With `dev` the persistent disk is a block device,
# and the other one has an image of the system datastore's driver.
PAIRS = [
    ("ssh", "ssh", ("raw", "qcow2")),
    ("local", "local", ("raw", "qcow2")),
    ("shared", "shared", ("raw", "qcow2")),
    ("qcow2", "qcow2", ("qcow2",)),
    ("shared", "ssh", ("raw", "qcow2")),
    ("qcow2", "ssh", ("qcow2",)),
    ("dev", "ssh", ("raw",)),
    ("dev", "local", ("qcow2",)),
    ("dev", "shared", ("qcow2",)),
    ("dev", "qcow2", ("qcow2",)),
]
NAMES = sorted({name for pair in PAIRS for name in pair[:2]})
FOUND = {name: driver for name in NAMES if (driver := drivers.read(str(TREE), "tm", name))}
MONITOR = FOUND["ssh"].actions
"""Of the driver that `.monitor` names on hosts that share nothing."""
FILES = drivers.read(str(TREE), "datastore", "fs")


def _is_there(image: str, system: str) -> bool:
    return {image, system} <= set(FOUND) and (image in (system, "dev") or f"clone.{system}" in FOUND[image].actions)


# Reads each disk as its hypervisor would: the file that disk.N leads to, in the format that the front-end knows.
# $1: a file for its content; then PATH FORMAT, twice for each disk.
READ = """set -eu
copy=$1; shift
while [ $# -gt 0 ]; do
  rm -f "$copy"; qemu-img convert -U -f "$2" -O raw -- "$(realpath "$1")" "$copy"
  sha256sum <"$copy"; shift 2
done
rm -f "$copy"
"""
HYPERVISOR = """#!/bin/sh
# Brings a VM's files as a hypervisor that copies storage would: migrate SOURCE TARGET DIRECTORY VMID
set -eu
test "$1" = migrate
cat >/dev/null
directory=$4
ssh="ssh -F $MADRIGAL_SSH_CONFIG"
$ssh "$3" "test ! -e '$directory' && mkdir -p '$directory'" </dev/null
$ssh "$2" "tar -C '$directory' -cSf - ." </dev/null | $ssh "$3" "tar -C '$directory' -xSf -"
"""


AT_ONCE = 3
"""Lives that go on at the same time: they wait for hosts most of the time."""


class Store(NamedTuple):
    """A datastore: its name, its transfer driver, and whether it is for images or VMs."""

    name: str
    driver: str
    type: str

    @property
    def shared(self) -> bool:
        return FOUND[self.driver].shared

    @property
    def ds_mad(self) -> str:
        return "dev" if self.driver == "dev" else "fs"


class Case(NamedTuple):
    """Drivers and image format of a life, which has image datastores and two system datastores of its own."""

    image: str
    system: str
    form: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def on_device(self) -> bool:
        """Whether the persistent disk is a block device."""
        return self.image == "dev"

    def stores(self) -> list[Store]:
        """In the order of their ids, which name their directories; the last is the persistent image's."""
        system = [Store(f"{self} {name}", self.system, "system") for name in ("first", "second")]
        files = [Store(f"{self} files", self.system, "image")] if self.on_device else []
        return [*system, *files, Store(f"{self} images", self.image, "image")]


CASES = [Case(*pair[:2], form) for pair in PAIRS if _is_there(*pair[:2]) for form in pair[2]]
STORES = [store for case in CASES for store in case.stores()]


class Place:
    """The datastores of one case on all machines."""

    def __init__(self, hosts: Hosts, work: Path, ids: list[int]) -> None:
        self.hosts, self.work, self.ids = hosts, work, ids

    def digests(self, place: str, files: list[tuple[str, str]]) -> list[str]:
        """SHA-256 of what the disks (PATH, FORMAT) hold on the machine PLACE."""
        words = [word for file in files for word in file]
        argv = ["sh", "-c", READ, "read", f"{self.work}/read.{self.ids[0]}", *words]
        if place in self.hosts.names:
            out = self.hosts.run(place, argv)
        else:
            done = subprocess.run(argv, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
            out = done.stdout
        return [line.split()[0] for line in out.decode().splitlines()]

    def left(self) -> list[str]:
        """All that is in the datastores on all machines, but the markers that they are monitored."""
        found = []
        for host in ("fe", *self.hosts.names):
            root = Path(self.hosts.datastores) if host == "fe" else self.hosts.on(host)
            paths = [path for ident in self.ids for path in Path(root, str(ident)).glob("**/*")]
            found += [f"{host}:{path.relative_to(root)}" for path in paths if path.name != ".monitor"]
        return found


def machines_with(stores: list[Store], count: int) -> Iterator[Hosts]:
    """COUNT hosts with the directories of STORES, which are each machine's own where they are not shared."""
    own = [str(number) for number, store in enumerate(stores, 1) if not store.shared]
    for made in rig(count, ["0", *own]):
        for number, store in enumerate(stores, 1):
            if store.shared:
                os.makedirs(f"{made.datastores}/{number}")
        yield made


def create(stores: list[Store], front_end: FrontEnd) -> None:
    for store in stores:
        front_end.datastores.create(store.name, store.driver, store.type, store.ds_mad)


@contextlib.contextmanager
def reaching(hosts: Hosts) -> Iterator[None]:
    """What drivers need to reach HOSTS, in the environment of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.env.items():
            if name not in ("PATH", "ONE_LOCATION"):
                patch.setenv(name, value)
        yield


@contextlib.contextmanager
def at_once(
    request: pytest.FixtureRequest, live: Callable[[Case], None], cases: list[Case]
) -> Iterator[dict[Case, Future[None]]]:
    """LIVE of those of CASES that tests are asked for, some at the same time."""
    asked = [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "case" in item.callspec.params and item.path == request.path
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(live, case) for case in asked if case in cases}


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    yield from machines_with(STORES, 3)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, str]]:
    """A block device for each case that needs one, the same on all machines; or why there is none."""
    made: dict[Case, str] = {}
    losetup, env = ["losetup", "--find", "--show"], {"PATH": f"{PATH}:/usr/sbin:/sbin"}
    for case in CASES:
        if case.on_device:
            file = tmp_path_factory.mktemp("device") / "content"
            with open(file, "wb") as opened:
                opened.truncate(SIZE * MIB)
            done = subprocess.run([*losetup, file], capture_output=True, text=True, env=env)
            made[case] = done.stdout.strip() or f"this machine makes no loop device: {done.stderr.strip()}"
    yield made
    for device in made.values():
        if device.startswith("/"):
            subprocess.run(["losetup", "-d", device], check=True, env=env)


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest,
    machines: Hosts,
    devices: dict[Case, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[Case, Future[None]]]:
    """The lives of the cases that are asked for, on their way."""
    work = tmp_path_factory.mktemp("cycle")
    (work / "hypervisor").write_text(HYPERVISOR)
    (work / "hypervisor").chmod(0o755)

    def front_end() -> FrontEnd:
        return FrontEnd(str(work / "state"), "current", str(TREE), machines.datastores, hostname="fe")

    def live(case: Case) -> None:
        with front_end() as own:
            Life(case, own, machines, work, devices.get(case, "")).live()

    with reaching(machines):
        with front_end() as first:
            for host in machines.names:
                first.hosts.create(host)
            create(STORES, first)
        with at_once(request, live, [case for case in CASES if devices.get(case, "/").startswith("/")]) as futures:
            yield futures


class Life:
    """One VM, and what its disks and their snapshots should hold."""

    def __init__(self, case: Case, front_end: FrontEnd, hosts: Hosts, work: Path, device: str = "") -> None:
        self.case, self.form, self.device = case, case.form, device
        self.front_end, self.vms, self.images = front_end, front_end.vms, front_end.images
        self.system_driver = FOUND[case.system]
        self.place = Place(hosts, work, [front_end.datastores.get(store.name).id for store in case.stores()])
        self.first, self.second, *self.image_stores = self.place.ids
        self.content: dict[int, bytearray] = {}
        self.taken: dict[tuple[int, int], bytes] = {}
        self.writes = 0
        self.id = -1

    @property
    def vm(self) -> VM:
        return self.vms.get(self.id)

    def driver(self, store: int | None) -> drivers.Driver:
        return FOUND[self.front_end.datastores.get(store or 0).tm_mad]

    def can(self, *actions: str) -> list[int]:
        """The first two disks, or the one of them whose driver has all of ACTIONS."""
        return [disk.id for disk in self.vm.disks[:2] if {*actions} <= {*self.driver(disk.datastore_id).actions}]

    # Images

    def new_image(self, name: str, persistent: bool = False) -> bytearray:
        content = bytearray(os.urandom(MIB) + bytes(MIB) + os.urandom(MIB // 2) + bytes(MIB // 2))
        raw, file = self.place.work / f"{name}.raw", self.place.work / f"{name}.{self.form}"
        raw.write_bytes(content)
        store, expected = self.image_stores[0], (self.form, SIZE)
        if persistent and self.device:
            Path(self.device).write_bytes(content)
            store, file, expected = self.image_stores[1], Path(self.device), ("raw", 0)  # whose size nobody knows
        elif self.form != "raw":
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", self.form, raw, file], check=True)
        record = self.images.create(name, store, path=str(file), persistent=persistent)
        assert (record.format, record.size) == expected
        return content

    def check_image(self, name: str, content: bytes | bytearray) -> None:
        record = self.images.get(name)
        path = record.source
        if record.snapshots and record.format == "qcow2" and self.driver(record.datastore_id).ln_target == "NONE":
            # SOURCE is its first snapshot, and what a VM would get the file with the highest number.
            path = f"{path}.snap/{max(map(int, filter(str.isdigit, os.listdir(path + '.snap'))))}"
        (found,) = self.place.digests("", [(path, record.format)])
        assert found == hashlib.sha256(content).hexdigest(), f"image {name} does not hold what it should"

    # The guest

    def disks(self) -> list[Disk]:
        return [disk for disk in self.vm.disks if disk.id in self.content]

    def check(self, doing: str) -> None:
        """Compare all disks with the model."""
        place, _, directory = self.vms.place(self.vm).partition(":")
        disks = self.disks()
        digests = self.place.digests(place, [(f"{directory}/disk.{disk.id}", disk.format) for disk in disks])
        wrong = [
            disk.id
            for disk, digest in zip(disks, digests, strict=True)
            if digest != hashlib.sha256(self.content[disk.id]).hexdigest()
        ]
        assert not wrong, f"after {doing}, disk {wrong} on {place} does not hold what it should"
        left = self.place.left()
        assert not [name for name in left if name.endswith((".part", ".lock"))], f"after {doing}"

    def write(self, *disk_ids: int) -> None:
        """What a guest writes: 64 KiB that were never there before, at a place of its own, and one that moves."""
        place, _, directory = self.vms.place(self.vm).partition(":")
        for disk in self.disks():
            if disk.id not in disk_ids:
                continue
            self.writes += 1
            pattern, content = self.writes % 255 + 1, self.content[disk.id]
            # The last 64 KiB, which a resize has added, and one that is different each time.
            commands = []
            for offset in (len(content) - (1 << 16), (self.writes * 5 << 16) % len(content)):
                content[offset : offset + (1 << 16)] = bytes([pattern]) * (1 << 16)
                commands.append(f"write -P {pattern} {offset} {1 << 16}")
            self.qemu_io(disk, place, directory, commands)

    def qemu_io(self, disk: Disk, place: str, directory: str, commands: list[str]) -> None:
        """Have the guest do COMMANDS, in the words of qemu-io, to a disk."""
        path = f'exec qemu-io -f {disk.format} "$@" "$(realpath {directory}/disk.{disk.id})"'
        words = [word for command in commands for word in ("-c", command)]
        self.place.hosts.run(place, ["sh", "-c", path, "write", *words])

    # Snapshots

    def snapshot(self, *disk_ids: int) -> None:
        for disk_id in disk_ids:
            self.vms.snapshot_create(self.id, disk_id)
            snapshots = self.vm.disk(disk_id).snapshots
            assert snapshots
            self.taken[disk_id, snapshots.all[-1].id] = bytes(self.content[disk_id])
        self.check(f"snapshot create of {disk_ids}")

    def revert(self, disk_id: int, snapshot: int) -> None:
        self.vms.snapshot_revert(self.id, disk_id, snapshot)
        self.content[disk_id] = bytearray(self.taken[disk_id, snapshot])
        self.check(f"snapshot revert of disk {disk_id} to {snapshot}")

    def delete_snapshots(self, disk_id: int, order: tuple[int, ...]) -> None:
        """Those that the front-end lets go; the others have to stay as they were."""
        for snapshot in order:
            try:
                self.vms.snapshot_delete(self.id, disk_id, snapshot)
            except InUse:
                continue
            del self.taken[disk_id, snapshot]
            self.check(f"snapshot delete of disk {disk_id}, {snapshot}")

    def revert_to(self, which: slice, *disk_ids: int) -> None:
        """Revert to each of some of the snapshots, and write after it: none may change with the disk."""
        for disk_id in disk_ids:
            for snapshot in sorted(ident for disk, ident in self.taken if disk == disk_id)[which]:
                self.revert(disk_id, snapshot)
                self.write(disk_id)
        self.check("writes after reverts")

    def nothing_on(self, *hosts: str) -> None:
        """No host but where the VM is has something of it, where hosts share nothing."""
        if self.system_driver.shared:
            return
        places = {f"{host}:{store}" for host in hosts for store in (self.first, self.second)}
        assert not [name for name in self.place.left() if name.partition("/")[0] in places]

    def check_refusals(self, disk_id: int) -> None:
        """Nobody can do these to a block device, and a try changes nothing."""
        name = f"no {self.case}"
        refused: list[tuple[Callable[[], object], str]] = [
            (lambda: self.vms.snapshot_create(self.id, disk_id), "snap_create: this action is not supported"),
            (lambda: self.vms.resize(self.id, disk_id, SIZE + 1), "resize: this action is not supported"),
            (lambda: self.vms.disk_saveas(self.id, disk_id, name), "datastores of the driver dev have no mkfs"),
        ]
        for act, said in refused:
            with pytest.raises(ActionFailed, match=said):
                act()
            snapshots = self.vm.disk(disk_id).snapshots
            assert self.vm.status == "poweroff" and not (snapshots and snapshots.all)
            self.check("a refusal")
        self.images.delete(name)

    def live(self) -> None:
        vms, images = self.vms, self.images
        base_name, pers_name = f"base {self.case}", f"pers {self.case}"
        base, pers = self.new_image(base_name), self.new_image(pers_name, persistent=True)
        disks = [DiskRequest(image=base_name, size=SIZE + 1), DiskRequest(image=pers_name)]
        self.id = vms.create(f"vm {self.case}", disks, {"A": "b"}, system_datastore=self.first).id

        vms.deploy(self.id, "host01")
        self.content = {0: base + bytes(MIB), 1: bytearray(pers)}
        self.check("deploy")
        self.write(0, 1)
        vms.poweroff(self.id)
        self.check("writes")

        if snapped := self.can("snap_create", "snap_revert", "snap_delete"):
            for _ in range(3):
                self.snapshot(*snapped)
                self.write(0, 1)
            self.check("writes after snapshots")
            for disk_id in snapped:
                self.revert(disk_id, 1)
                self.write(disk_id)
            self.snapshot(*snapped)  # 3, a child of 1 where there are children
            self.write(0, 1)
            for disk_id, order in {0: (1, 3, 0, 2), 1: (2, 0)}.items():
                if disk_id in snapped:
                    self.delete_snapshots(disk_id, order)
            self.revert_to(slice(None), *snapped)

        vms.attach(self.id, DiskRequest(image=base_name))
        vms.attach(self.id, DiskRequest(type="fs", size=1))
        added = [disk.id for disk in self.vm.disks[-2:]]
        self.content.update({added[0]: bytearray(base), added[1]: bytearray(MIB)})
        self.check("attach")
        self.write(*added)
        self.check("writes to what was attached")
        for disk_id in added:
            vms.detach(self.id, disk_id)
            del self.content[disk_id]
        self.check("detach")

        if "monitor" in self.system_driver.actions or (not self.system_driver.shared and "monitor_ds" in MONITOR):
            self.front_end.datastores.ask(self.first)
            for disk in self.disks():
                assert str(disk.id) in disk.taken, f"nobody told what disk {disk.id} takes"

        if resized := self.can("resize"):
            for disk_id in resized:
                size = self.vm.disk(disk_id).size + 1
                vms.resize(self.id, disk_id, size)
                self.content[disk_id].extend(bytes(size * MIB - len(self.content[disk_id])))
            self.check("resize")
            self.write(0, 1)
            self.check("writes after resize")

        if self.device:
            self.check_refusals(1)

        vms.disk_saveas(self.id, 0, f"saved {self.case}")
        self.check("disk-saveas")
        self.check_image(f"saved {self.case}", self.content[0])
        if kept := [snapshot for disk_id, snapshot in self.taken if disk_id == 1]:
            vms.disk_saveas(self.id, 1, f"past {self.case}", snapshot=kept[0])
            self.check_image(f"past {self.case}", self.taken[1, kept[0]])

        vms.migrate(self.id, "host03", system_datastore=self.second)
        self.check("cold migration to another datastore")
        self.nothing_on("fe", "host01", "host02")
        self.write(0, 1)
        vms.undeploy(self.id)
        self.check("undeploy")
        self.nothing_on("host01", "host02", "host03")
        vms.disk_saveas(self.id, 0, f"undeployed {self.case}")
        self.check_image(f"undeployed {self.case}", self.content[0])
        vms.resume(self.id, "host01")
        self.check("resume")
        self.nothing_on("fe", "host02", "host03")

        if "premigrate" in self.system_driver.actions:
            hypervisor = "" if self.system_driver.shared else f"{self.place.work}/hypervisor"
            vms.migrate(self.id, "host02", live=True, hypervisor=hypervisor)
            self.check("live migration")
            self.nothing_on("fe", "host01", "host03")
            self.write(0, 1)
        vms.poweroff(self.id)
        self.revert_to(slice(1), 0, 1)

        vms.terminate(self.id)
        expected, taken = (
            self.content[1],
            {ident: data for (disk_id, ident), data in self.taken.items() if disk_id == 1},
        )
        self.check_image(pers_name, expected)
        self.check_image(base_name, base)
        image = images.get(pers_name)
        assert {one.id for one in (image.snapshots.all if image.snapshots else [])} == set(taken)

        # The snapshots of the image come back with it, and can be used without a VM
        self.id = vms.create(f"next {self.case}", [DiskRequest(image=pers_name)], system_datastore=self.first).id
        vms.deploy(self.id, "host03")
        self.content, self.taken = {0: bytearray(expected)}, {(0, ident): data for ident, data in taken.items()}
        self.check("deploy of a saved image")
        vms.poweroff(self.id)
        if self.device:
            vms.detach(self.id, 0)
            vms.attach(self.id, DiskRequest(image=pers_name))
            self.check("detach and attach of a device")
            self.write(0)
        vms.migrate(self.id, "host01")
        self.check("cold migration")
        self.nothing_on("fe", "host02", "host03")
        self.revert_to(slice(1), 0)
        if taken:
            self.snapshot(0)
            self.write(0)
        vms.terminate(self.id)
        self.check_image(pers_name, self.content[0])
        snapshots = {ident: data for (_, ident), data in self.taken.items()}
        if snapshots and FILES and "snap_revert" in FILES.actions:
            for ident, data in sorted(snapshots.items()):
                found = images.get(pers_name).snapshots
                if found and found.active != ident:
                    images.snapshot_revert(pers_name, ident)
                    self.check_image(pers_name, data)
            for ident in sorted(snapshots, reverse=True):
                try:
                    images.snapshot_delete(pers_name, ident)
                except InUse:
                    continue
                del snapshots[ident]
            flat = min(snapshots, default=None)
            if flat is not None:
                images.snapshot_flatten(pers_name, flat)
                self.check_image(pers_name, snapshots[flat])

        # Ended without a shutdown, while it runs: nothing comes back, and nothing stays
        disks = [DiskRequest(image=base_name), DiskRequest(type="swap", size=1), DiskRequest(type="fs", size=1)]
        self.id = vms.create(f"last {self.case}", disks, {"A": "b"}, system_datastore=self.second).id
        vms.deploy(self.id, "host02")
        vms.poweroff(self.id)
        if self.can("snap_create"):
            vms.snapshot_create(self.id, 0)
        vms.start(self.id)
        vms.terminate(self.id, hard=True)
        self.check_image(base_name, base)
        for record in images.all():
            if record.datastore_id in self.image_stores:
                images.delete(record.id)
        assert self.place.left() == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_life_cycle(case: Case, lives: dict[Case, Future[None]], devices: dict[Case, str]) -> None:
    if case not in lives:
        pytest.skip(devices[case])
    lives[case].result()
