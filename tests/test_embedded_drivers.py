"""The embedded front-end with the real drivers of this tree, where no other machine is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from embedded_fakes import LIB

from madrigal.embedded import DiskRequest, FrontEnd

CONTENT = bytes(range(256)) * 4096


@pytest.mark.parametrize("contract", ["3.4", "current"])
@pytest.mark.parametrize("tm_mad", ["dummy", "ssh", "shared", "local", "qcow2"])
def test_a_life_on_this_machine(tmp_path: Path, contract: str, tm_mad: str) -> None:
    """The front-end is the host too: disks come, keep their content, and go; a persistent one is back in its image."""
    source = tmp_path / "source.img"
    source.write_bytes(CONTENT)
    with FrontEnd(str(tmp_path / "state"), contract=contract, tree=str(LIB.parent)) as front_end:
        front_end.hosts.create(front_end.layout.front_end)
        front_end.datastores.update("system", tm_mad=tm_mad)
        front_end.datastores.create("default", tm_mad=tm_mad, attrs={"CONVERT": "no"})
        digest = {"SHA256": hashlib.sha256(CONTENT).hexdigest()}
        image = front_end.images.create("image", "default", path=str(source), attrs=digest)
        pers = front_end.images.create("pers", "default", path=str(source), persistent=True)
        empty = front_end.images.create("empty", "default", size=1, fs="ext4")
        assert (image.size, pers.size, empty.size) == (1, 1, 1)
        disks = [DiskRequest(image=n) for n in ("image", "pers")] + [DiskRequest(type="swap", size=1)]
        vm = front_end.vms.create("vm", disks, {"A": "b"})
        front_end.vms.deploy("vm", 0)
        directory = Path(front_end.vms.place(vm := front_end.vms.get(vm.id)).partition(":")[2])
        if tm_mad != "dummy":
            assert [(directory / f"disk.{n}").read_bytes() for n in (0, 1)] == [CONTENT] * 2
            assert (directory / "disk.2").stat().st_size == 1 << 20
            assert b"CD001" in (directory / "disk.3").read_bytes()
            with (directory / "disk.1").open("r+b") as file:
                file.write(b"written by the VM")
        front_end.vms.stop("vm")
        front_end.vms.resume("vm")
        front_end.vms.shutdown("vm")
        assert not directory.exists()
        begins = Path(pers.source).read_bytes()[:17]
        assert begins == (b"written by the VM" if tm_mad != "dummy" else CONTENT[:17])
        assert Path(image.source).read_bytes() == CONTENT
        for name in ("image", "pers", "empty"):
            front_end.images.delete(name)
        assert list(Path(image.source).parent.iterdir()) == []
