"""The life of VMs on three real hosts, gesture by gesture, for every pair of image and system datastore drivers.

What a disk holds is compared with a model after each gesture: read as a guest would, and written so too.  Gestures
whose actions a driver does not have are left out; a pair is there as soon as its drivers are in the tree.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TREE, Hosts, rig

from madrigal import drivers
from madrigal.embedded import DiskRequest, FrontEnd
from madrigal.embedded.records import VM, Disk
from madrigal.errors import InUse

pytestmark = pytest.mark.long

MIB = 1 << 20
SIZE = 3  # MiB of an image

# Image driver, driver of the system datastore, formats of images
PAIRS = [
    ("ssh", "ssh", ("raw", "qcow2")),
    ("local", "local", ("raw", "qcow2")),
    ("shared", "shared", ("raw", "qcow2")),
    ("qcow2", "qcow2", ("qcow2",)),
    ("shared", "ssh", ("raw", "qcow2")),
    ("qcow2", "ssh", ("qcow2",)),
]
NAMES = sorted({name for pair in PAIRS for name in pair[:2]})
FOUND = {name: driver for name in NAMES if (driver := drivers.read(str(TREE), "tm", name))}
MONITOR = FOUND["ssh"].actions
"""Of the driver that `.monitor` names on hosts that share nothing."""
FILES = drivers.read(str(TREE), "datastore", "fs")


def _is_there(image: str, system: str) -> bool:
    return {image, system} <= set(FOUND) and (image == system or f"clone.{system}" in FOUND[image].actions)


# Reads each disk as its hypervisor would: the file that disk.N leads to, in the format that the front-end knows.
# $1: a file for its content; then PATH FORMAT, twice for each disk.
READ = """set -eu
copy=$1; shift
while [ $# -gt 0 ]; do
  rm -f "$copy"; qemu-img convert -f "$2" -O raw -- "$(realpath "$1")" "$copy"
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


class Case(NamedTuple):
    """Drivers and image format of a life, which has an image datastore and two system datastores of its own."""

    image: str
    system: str
    form: str

    def __str__(self) -> str:
        return "-".join(self)

    def stores(self) -> list[tuple[str, str, bool]]:
        """(name, driver, whether machines share it) in the order of their ids, which name their directories."""
        system, shared = self.system, FOUND[self.system].shared
        return [
            (f"{self} images", self.image, FOUND[self.image].shared),
            (f"{self} first", system, shared),
            (f"{self} second", system, shared),
        ]


CASES = [Case(*pair[:2], form) for pair in PAIRS if _is_there(*pair[:2]) for form in pair[2]]
STORES = [store for case in CASES for store in case.stores()]


class Place:
    """The datastores of one case on all machines."""

    def __init__(self, hosts: Hosts, work: Path, case: Case) -> None:
        self.hosts, self.work = hosts, work
        self.ids = [1 + STORES.index(store) for store in case.stores()]

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


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    own = [str(number) for number, (_, _, shared) in enumerate(STORES, 1) if not shared]
    for made in rig(3, ["0", *own]):
        for number, (_, _, shared) in enumerate(STORES, 1):
            if shared:
                os.makedirs(f"{made.datastores}/{number}")
        yield made


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, machines: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[None]]]:
    """The lives of the cases that are asked for, on their way."""
    work = tmp_path_factory.mktemp("cycle")
    (work / "hypervisor").write_text(HYPERVISOR)
    (work / "hypervisor").chmod(0o755)

    def front_end() -> FrontEnd:
        return FrontEnd(str(work / "state"), "current", str(TREE), machines.datastores, hostname="fe")

    def live(case: Case) -> None:
        with front_end() as own:
            Life(case, own, Place(machines, work, case)).live()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_ONCE) as pool:
        for name, value in machines.env.items():
            if name not in ("PATH", "ONE_LOCATION"):
                patch.setenv(name, value)
        with front_end() as first:
            for host in machines.names:
                first.hosts.create(host)
            for number, (name, driver, _) in enumerate(STORES):
                first.datastores.create(name, driver, "image" if number % 3 == 0 else "system")
        asked = [
            item.callspec.params["case"]
            for item in request.session.items
            if hasattr(item, "callspec") and "case" in item.callspec.params and item.path == request.path
        ]
        yield {case: pool.submit(live, case) for case in asked}


class Life:
    """One VM, and what its disks and their snapshots should hold."""

    def __init__(self, case: Case, front_end: FrontEnd, place: Place) -> None:
        self.case, self.form, self.place = case, case.form, place
        self.front_end, self.vms, self.images = front_end, front_end.vms, front_end.images
        self.image_driver, self.system_driver = FOUND[case.image], FOUND[case.system]
        self.image_store, self.first, self.second = place.ids
        self.content: dict[int, bytearray] = {}
        self.taken: dict[tuple[int, int], bytes] = {}
        self.writes = 0
        self.id = -1

    @property
    def vm(self) -> VM:
        return self.vms.get(self.id)

    def can(self, *actions: str) -> bool:
        known = self.image_driver.actions
        return all(action in known for action in actions)

    # Images

    def new_image(self, name: str, persistent: bool = False) -> bytearray:
        content = bytearray(os.urandom(MIB) + bytes(MIB) + os.urandom(MIB // 2) + bytes(MIB // 2))
        raw, file = self.place.work / f"{name}.raw", self.place.work / f"{name}.{self.form}"
        raw.write_bytes(content)
        if self.form != "raw":
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", self.form, raw, file], check=True)
        record = self.images.create(name, self.image_store, path=str(file), persistent=persistent)
        assert (record.format, record.size) == (self.form, SIZE)
        return content

    def check_image(self, name: str, content: bytes | bytearray) -> None:
        record = self.images.get(name)
        path = record.source
        if record.snapshots and record.format == "qcow2" and self.image_driver.ln_target == "NONE":
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
                commands += ["-c", f"write -P {pattern} {offset} {1 << 16}"]
            path = f'exec qemu-io -f {disk.format} "$@" "$(realpath {directory}/disk.{disk.id})"'
            self.place.hosts.run(place, ["sh", "-c", path, "write", *commands])

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

        if self.can("snap_create", "snap_revert", "snap_delete"):
            for _ in range(3):
                self.snapshot(0, 1)
                self.write(0, 1)
            self.check("writes after snapshots")
            for disk_id in (0, 1):
                self.revert(disk_id, 1)
                self.write(disk_id)
            self.snapshot(0, 1)  # 3, a child of 1 where there are children
            self.write(0, 1)
            self.delete_snapshots(0, (1, 3, 0, 2))
            self.delete_snapshots(1, (2, 0))
            self.revert_to(slice(None), 0, 1)

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

        if self.can("resize"):
            for disk_id in (0, 1):
                size = self.vm.disk(disk_id).size + 1
                vms.resize(self.id, disk_id, size)
                self.content[disk_id].extend(bytes(size * MIB - len(self.content[disk_id])))
            self.check("resize")
            self.write(0, 1)
            self.check("writes after resize")

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
        for record in images.all():
            if record.datastore_id == self.image_store:
                images.delete(record.id)
        assert self.place.left() == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_life_cycle(case: Case, lives: dict[Case, Future[None]]) -> None:
    lives[case].result()
