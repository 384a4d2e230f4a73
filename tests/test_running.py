"""What is done by the embedded front-end to the disks of VMs that a real libvirt runs, for each driver that can do it.

A disk is saved as an image while the guest runs, and what the image holds is compared with what the guest has written;
so are snapshots.  The VM has nothing to boot: qemu writes to its disks when it is told to, as if a guest did.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import RIGS, TREE, Hosts
from test_cycle import SIZE, Case, Life, at_once, create, machines_with, reaching

from madrigal.embedded import DiskRequest, FrontEnd
from madrigal.embedded.records import Disk

pytestmark = pytest.mark.long

MIB = 1 << 20
CASES = [
    Case("ssh", "ssh", "raw"),
    Case("ssh", "ssh", "qcow2"),
    Case("local", "local", "qcow2"),
    Case("shared", "shared", "raw"),
    Case("qcow2", "qcow2", "qcow2"),
]
STORES = [store for case in CASES for store in case.stores()]


# The hypervisor's part of a live migration: files that hosts do not share are brought before, while the guest writes.
MIGRATE = """#!/bin/sh
set -eu
test "$1" = migrate
cat >/dev/null
virsh() {{ command virsh -q -c '{uri}' "$@" </dev/null; }}
{bring}
{writes}
virsh migrate --live --p2p {how} {name} '{target}'
"""
BRING = """ssh="ssh -F $MADRIGAL_SSH_CONFIG"
$ssh "$3" "test ! -e '$4' && mkdir -p '$4'" </dev/null
$ssh "$2" "tar -C '$4' -cSf - ." </dev/null | $ssh "$3" "tar -C '$4' -xSf -"
"""


class Libvirt:
    """A libvirt of its own on a host."""

    def __init__(self, hosts: Hosts, host: str, common: str) -> None:
        """COMMON: a path that each host has its own at, where drivers find its libvirt."""
        self.hosts, self.host, self.state = hosts, host, f"{hosts.work}/lv.{host}"
        self.uri = hosts.run(host, [f"{RIGS}/libvirt-up", self.state]).decode().strip()
        hosts.run(host, ["ln", "-s", self.uri.partition("socket=")[2], common])

    def close(self) -> None:
        self.hosts.run(self.host, [f"{RIGS}/libvirt-down", self.state])

    def virsh(self, *words: str) -> str:
        done = subprocess.run(["virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def start(self, name: str, disks: list[str]) -> None:
        """Start the VM with DISKS, FORMAT=PATH each."""
        self.hosts.run(self.host, [f"{RIGS}/libvirt-up", self.state, "vm", name, *disks])

    def qemu_io(self, name: str, disk: int, command: str) -> None:
        """Have the guest do what COMMAND says in the words of qemu-io."""
        said = self.virsh(*monitor(name, disk, command))
        assert "rror" not in said and "ailed" not in said, said


def monitor(name: str, disk: int, command: str) -> list[str]:
    """The words for virsh that let the guest do what COMMAND says in the words of qemu-io."""
    words = f'qemu-io -d /machine/peripheral/virtio-disk{disk}/virtio-backend "{command}"'
    return ["qemu-monitor-command", "--hmp", name, words]


@pytest.fixture(scope="module")
def machines() -> Iterator[Hosts]:
    can = subprocess.run([f"{RIGS}/libvirt-up", "-", "can"], capture_output=True, text=True)
    if can.returncode:
        pytest.skip(f"a libvirt of its own cannot be had: {can.stdout.strip()}")
    yield from machines_with(STORES, 2)


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, machines: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[None]]]:
    """The lives of the cases that are asked for, on their way."""
    work = tmp_path_factory.mktemp("running")
    for kind in ("tm", "datastore"):
        (work / kind).symlink_to(TREE / kind)
    rc = work / "remotes/etc/vmm/kvm/kvmrc"
    rc.parent.mkdir(parents=True)
    socket = f"{machines.datastores}/0/libvirt"
    libvirts = {host: Libvirt(machines, host, socket) for host in machines.names}
    rc.write_text(f"export LIBVIRT_URI='qemu+unix:///session?socket={socket}'\nexport VIRSH_TIMEOUT=60\n")

    def front_end() -> FrontEnd:
        return FrontEnd(str(work / "state"), "current", str(work), machines.datastores, hostname="fe")

    def live(case: Case) -> None:
        with front_end() as own:
            RunningLife(case, own, machines, work, libvirts).live()

    with reaching(machines):
        with front_end() as first:
            for host in machines.names:
                first.hosts.create(host, vmm="kvm")
            create(STORES, first)
        with at_once(request, live, CASES) as futures:
            yield futures
    for libvirt in libvirts.values():
        libvirt.close()


class RunningLife(Life):
    """One VM of a hypervisor.  What the guest writes may still be in the hypervisor's memory."""

    def __init__(self, case: Case, front_end: FrontEnd, hosts: Hosts, work: Path, libvirts: dict[str, Libvirt]) -> None:
        super().__init__(case, front_end, hosts, work)
        self.libvirts = libvirts
        self.later: list[list[str]] | None = None

    @property
    def name(self) -> str:
        return f"one-{self.id}"

    @property
    def libvirt(self) -> Libvirt:
        return self.libvirts[self.vms.place(self.vm).partition(":")[0]]

    def boot(self) -> None:
        """Start it as today's front-end does, which gives libvirt what the link disk.N leads to, but no further."""
        host, _, directory = self.vms.place(self.vm).partition(":")
        given = []
        for disk in self.disks():
            path = f"{directory}/disk.{disk.id}"
            link = self.place.hosts.on(host, path)
            given.append(f"{disk.format}={os.path.join(directory, os.readlink(link)) if link.is_symlink() else path}")
        self.libvirt.start(self.name, given)

    def halt(self) -> None:
        self.flush()
        self.libvirt.virsh("destroy", self.name)
        self.vms.poweroff(self.id)

    def flush(self) -> None:
        for disk in self.disks():
            self.libvirt.qemu_io(self.name, disk.id, "flush")

    def qemu_io(self, disk: Disk, place: str, directory: str, commands: list[str]) -> None:
        if self.vm.status != "running":
            return super().qemu_io(disk, place, directory, commands)
        for command in commands:
            if self.later is not None:
                self.later.append(monitor(self.name, disk.id, command))
            else:
                self.libvirt.qemu_io(self.name, disk.id, command)

    def check(self, doing: str) -> None:
        if self.vm.status == "running":
            assert self.libvirt.virsh("domstate", self.name) == "running", f"after {doing}"
            for device in ("vda", "vdb"):
                assert not self.libvirt.virsh("blockjob", self.name, device, "--raw"), f"after {doing}"
            self.flush()
        super().check(doing)

    def save(self, name: str, **which: int) -> None:
        """Save both disks as images, whose content has to be right although nothing was flushed before."""
        for disk_id in (0, 1):
            expected = self.taken[disk_id, which["snapshot"]] if which else self.content[disk_id]
            self.vms.disk_saveas(self.id, disk_id, f"{name} {disk_id} {self.case}", **which)
            self.check_image(f"{name} {disk_id} {self.case}", expected)

    def migrate(self, host: str) -> None:
        """Have libvirt bring the VM to another HOST, and the guest write while its files are on their way."""
        self.later = []
        self.write(0, 1)
        writes, self.later = [shlex.join(["virsh", *words]) for words in self.later], None
        shared = self.system_driver.shared
        program = self.place.work / f"migrate.{self.id}"
        program.write_text(
            MIGRATE.format(
                uri=self.libvirt.uri,
                bring="" if shared else BRING,
                writes="\n".join(writes),
                how="--unsafe" if shared else "--copy-storage-all",
                name=self.name,
                target=self.libvirts[host].uri,
            )
        )
        program.chmod(0o755)
        self.vms.migrate(self.id, host, live=True, hypervisor=str(program))
        self.check(f"live migration to {host}")

    def live(self) -> None:
        vms, images = self.vms, self.images
        base_name, pers_name = f"base {self.case}", f"pers {self.case}"
        base, pers = self.new_image(base_name), self.new_image(pers_name, persistent=True)
        disks = [DiskRequest(image=base_name, size=SIZE + 1), DiskRequest(image=pers_name)]
        self.id = vms.create(f"vm {self.case}", disks, {"A": "b"}, system_datastore=self.first).id
        vms.deploy(self.id, "host01", deploy_id=self.name)
        self.content = {0: base + bytes(MIB), 1: bytearray(pers)}
        self.boot()
        self.write(0, 1)
        self.save("first")
        before = {disk_id: bytes(content) for disk_id, content in self.content.items()}
        self.write(0, 1)
        for disk_id, content in before.items():
            self.check_image(f"first {disk_id} {self.case}", content)
        self.check("saving what a running guest has")

        self.migrate("host02")
        self.nothing_on("fe", "host01")
        self.write(0, 1)
        self.save("far")

        for _ in range(3):
            self.snapshot(0, 1)
            self.write(0, 1)
        self.save("past", snapshot=1)
        self.check("snapshots of a running VM")
        for disk_id in (0, 1):
            self.delete_snapshots(disk_id, (1, 2))
        self.write(0, 1)
        self.save("after")

        for disk_id in (0, 1):
            size = self.vm.disk(disk_id).size + 1
            vms.resize(self.id, disk_id, size)
            self.libvirt.virsh("blockresize", self.name, "vda" if disk_id == 0 else "vdb", f"{size}M")
            self.content[disk_id].extend(bytes(size * MIB - len(self.content[disk_id])))
        self.write(0, 1)
        self.check("resizing")

        self.migrate("host01")
        self.nothing_on("fe", "host02")

        self.halt()
        self.check("poweroff")
        self.revert_to(slice(1), 0, 1)
        vms.start(self.id)
        self.boot()
        self.write(0, 1)
        self.migrate("host02")
        self.nothing_on("fe", "host01")
        self.write(0, 1)
        self.save("again")
        self.check("start")
        self.halt()

        vms.terminate(self.id)
        self.check_image(pers_name, self.content[1])
        self.check_image(base_name, base)
        for record in images.all():
            if record.datastore_id in self.image_stores:
                images.delete(record.id)
        assert self.place.left() == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_life_of_a_running_vm(case: Case, lives: dict[Case, Future[None]]) -> None:
    lives[case].result()
