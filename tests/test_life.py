"""A VM's whole life on two real hosts under the embedded front-end, by the ssh driver and by one written in shell."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREE, Hosts

from madrigal.embedded import DiskRequest, FrontEnd

MIB = 1 << 20
SHELL = TREE / "tests" / "drivers" / "shell"


class Cloud:
    def __init__(self, hosts: Hosts, front_end: FrontEnd, work: Path) -> None:
        self.hosts, self.front_end, self.vms, self.work = hosts, front_end, front_end.vms, work
        self.vm = 0

    def image(self, name: str, persistent: bool = False) -> str:
        """Registers an image; returns its digest."""
        path = self.work / name
        path.write_bytes(os.urandom(3 * MIB) + bytes(4 * MIB) + os.urandom(MIB))
        self.front_end.images.create(name, "default", path=str(path), persistent=persistent)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def disks(self) -> list[str]:
        """The digests of disk.0 and disk.1 where the VM is now."""
        host, _, directory = self.vms.place(self.vms.get(self.vm)).partition(":")
        base = self.hosts.on(host, directory) if host in self.hosts.names else Path(directory)
        return [hashlib.sha256((base / name).read_bytes()).hexdigest() for name in ("disk.0", "disk.1")]

    def files(self, *hosts: str) -> list[str]:
        """All files in the datastores of HOSTS ("": here) but the markers that a datastore is monitored."""
        places = [self.hosts.on(host) if host else Path(self.hosts.datastores) for host in hosts]
        found = [path for place in places for path in place.rglob("*")]
        return [str(path) for path in found if not path.is_dir() and path.name != ".monitor"]


@pytest.fixture(params=["3.4", "current"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param((str(TREE), "ssh"), id="ssh"),
        pytest.param((str(SHELL), "shellfs"), id="shellfs", marks=pytest.mark.long),
    ]
)
def cloud(
    request: pytest.FixtureRequest, form: str, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cloud]:
    tree, driver = request.param
    for name, value in hosts.env.items():
        if name not in ("PATH", "ONE_LOCATION"):
            monkeypatch.setenv(name, value)
    state = str(tmp_path / "state")
    with FrontEnd(state, form, tree, hosts.datastores, hostname="fe") as front_end:
        for host in hosts.names:
            front_end.hosts.create(host)
        front_end.datastores.update("system", tm_mad=driver)
        front_end.datastores.create("default", tm_mad=driver)
        made = Cloud(hosts, front_end, tmp_path)
        yield made
    for place in (Path(hosts.datastores), *(hosts.on(host) for host in hosts.names)):
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_life(cloud: Cloud) -> None:
    vms, clonable, persistent = cloud.vms, cloud.image("clonable"), cloud.image("persistent", persistent=True)
    disks = [DiskRequest(image="clonable"), DiskRequest(image="persistent"), DiskRequest(type="swap", size=8)]
    cloud.vm = vms.create("vm", disks, {"A": "b"}, []).id

    vms.deploy(cloud.vm, "host01")
    assert cloud.disks() == [clonable, persistent]
    vms.stop(cloud.vm)
    assert cloud.disks() == [clonable, persistent]
    assert not cloud.files("host01")
    vms.resume(cloud.vm, "host01")
    assert cloud.disks() == [clonable, persistent]
    vms.migrate(cloud.vm, "host02")
    assert cloud.disks() == [clonable, persistent]
    assert not cloud.files("host01")

    directory = cloud.vms.place(cloud.vms.get(cloud.vm)).partition(":")[2]
    guest = cloud.hosts.on("host02", directory) / "disk.1"
    with open(guest, "r+b") as file:
        file.write(b"the guest was here")
    written = cloud.disks()[1]
    vms.shutdown(cloud.vm)
    images = cloud.front_end.images
    assert hashlib.sha256(Path(images.get("persistent").source).read_bytes()).hexdigest() == written != persistent
    assert hashlib.sha256(Path(images.get("clonable").source).read_bytes()).hexdigest() == clonable
    for name in ("clonable", "persistent"):
        images.delete(name)
    assert not cloud.files("", *cloud.hosts.names)
