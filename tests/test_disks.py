"""Disks that grow, disks that have all their room from the beginning, and disks that are devices, on real hosts."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hosts, check_stderr, run_action
from dumps import front_end, vm_document
from test_tm import Cloud

MIB = 1 << 20
VM = 17
FORMATS = ["raw", "qcow2"]


@pytest.fixture
def cloud(hosts: Hosts, tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(hosts, dict(hosts.env), "current", tmp_path)
    yield made
    for place in (Path(hosts.datastores), *(hosts.on(name) for name in hosts.names)):
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)


def described(lcm_state: int = 3, **elements: object) -> list[bytes]:
    return [vm_document(VM, {0: elements}, lcm_state)]


def qemu_img(*arguments: object, cwd: Path | None = None) -> str:
    argv = ["qemu-img", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, check=True, text=True, cwd=cwd).stdout


def make(path: Path, format: str, size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    qemu_img("create", "-q", "-f", format, path, f"{size}M")
    return path


def virtual(path: Path, format: str) -> int:
    """MiB that a guest sees."""
    return int(json.loads(qemu_img("info", "-f", format, "--output=json", path))["virtual-size"]) // MIB


def taken(path: Path) -> int:
    """MiB on the disk."""
    return path.stat().st_blocks * 512 // MIB


# -- resize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("driver", ["ssh", "shared"])
def test_a_disk_grows_and_never_shrinks(cloud: Cloud, driver: str, format: str) -> None:
    cloud.documents = described(FORMAT=format)
    disk, argument = make(cloud.at("host01", "disk.0"), format), f"host01:{cloud.vm}/disk.0"
    for size in ("9", "9", "10"):
        cloud.ok(f"tm/{driver}/resize", argument, size)
        assert virtual(disk, format) == int(size) and taken(disk) < 2
    before = disk.read_bytes()
    cloud.fails(24, "has 10 MiB and cannot shrink to 9 MiB", f"tm/{driver}/resize", argument, "9")
    assert disk.read_bytes() == before
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]


def test_content_stays(cloud: Cloud) -> None:
    cloud.documents = described(FORMAT="raw")
    disk = cloud.at("host01", "disk.0")
    disk.parent.mkdir(parents=True)
    # a guest's disk may look like anything, and has the size of nothing in particular
    header = make(cloud.work / "qcow2", "qcow2", 64).read_bytes()
    content = header + os.urandom(3 * MIB + 77)
    disk.write_bytes(content)
    cloud.ok("tm/ssh/resize", f"host01:{cloud.vm}/disk.0", "5")
    assert disk.stat().st_size == 5 * MIB and disk.read_bytes()[: len(content)] == content
    disk.write_bytes(content)
    cloud.fails(24, f"has {len(content) / MIB:g} MiB", "tm/ssh/resize", f"host01:{cloud.vm}/disk.0", "3")


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_is_preallocated_grows_so(cloud: Cloud, format: str) -> None:
    cloud.documents = described(FORMAT=format, SPARSE="NO")
    disk = make(cloud.at("host01", "disk.0"), format)
    for _ in range(2):
        cloud.ok("tm/ssh/resize", f"host01:{cloud.vm}/disk.0", "20")
        assert virtual(disk, format) == 20 and 16 <= taken(disk) < 20


def test_no_room_for_it_leaves_the_disk_as_it_was(cloud: Cloud) -> None:
    cloud.documents = described(FORMAT="raw", SPARSE="NO")
    cloud.hosts.add("host07", size="8m")
    disk = make(cloud.hosts.on("host07", f"{cloud.vm}/disk.0"), "raw")
    cloud.fails(12, "No space left", "tm/ssh/resize", f"host07:{cloud.vm}/disk.0", "20")
    assert disk.stat().st_size == 4 * MIB and taken(disk) == 0
    cloud.hosts.end("host07")


@pytest.mark.parametrize("sparse", ["YES", "NO"])
def test_of_a_chain_the_active_file_alone_grows(cloud: Cloud, sparse: str) -> None:
    cloud.documents = described(FORMAT="qcow2", SPARSE=sparse)
    directory = cloud.at("host01", "disk.0.snap")
    make(directory / "0", "qcow2")
    for number in (1, 2):
        qemu_img("create", "-q", "-f", "qcow2", "-b", str(number - 1), "-F", "qcow2", number, cwd=directory)
    cloud.at("host01", "disk.0").symlink_to("disk.0.snap/2")
    frozen = [(directory / name).read_bytes() for name in ("0", "1")]
    cloud.ok("tm/ssh/resize", f"host01:{cloud.vm}/disk.0", "9")
    assert [(directory / name).read_bytes() for name in ("0", "1")] == frozen
    assert virtual(directory / "2", "qcow2") == 9
    assert os.readlink(cloud.at("host01", "disk.0")) == "disk.0.snap/2"


def test_a_persistent_disk_on_shared_storage_is_its_image(cloud: Cloud) -> None:
    cloud.documents = described(FORMAT="raw")
    cloud.hosts._rig("add", "node1")
    image = cloud.image("abc", b"image", 4 * MIB)
    cloud.at("fe").mkdir(parents=True)
    cloud.at("fe", "disk.0").symlink_to(image)
    cloud.ok("tm/shared/resize", f"node1:{cloud.vm}/disk.0", "6")
    assert image.stat().st_size == 6 * MIB and cloud.at("fe", "disk.0").is_symlink()
    cloud.hosts.end("node1")


def test_the_hypervisor_resizes_the_disk_of_a_running_vm(cloud: Cloud) -> None:
    cloud.documents = described(62, FORMAT="raw")
    cloud.ok("tm/ssh/resize", f"host77:{cloud.vm}/disk.0", "6")  # no host is asked


def test_what_cannot_be_resized(cloud: Cloud) -> None:
    cloud.documents = described(FORMAT="qcow2")
    argument = f"host01:{cloud.vm}/disk.0"
    cloud.fails(30, "does not exist", "tm/ssh/resize", argument, "6")
    disk = cloud.at("host01", "disk.0")
    disk.parent.mkdir(parents=True)
    cloud.fails(30, "disk.0", "tm/ssh/resize", argument, "6")
    disk.write_bytes(bytes(MIB))
    cloud.fails(41, "should be a qcow2 image", "tm/ssh/resize", argument, "6")
    disk.unlink()
    disk.symlink_to("/dev/zero")
    cloud.fails(24, "is not a file", "tm/ssh/resize", argument, "6")
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]


# -- volatile disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", ["YES", "NO", ""])
@pytest.mark.parametrize(
    ("format", "fs"), [("raw", ""), ("raw", "ext4"), ("qcow2", ""), ("qcow2", "ext4"), ("swap", "")]
)
def test_a_disk_with_all_its_room(cloud: Cloud, format: str, fs: str, sparse: str) -> None:
    cloud.documents = described(FS=fs, SPARSE=sparse)
    made = ("mkswap", "32") if format == "swap" else ("mkimage", "32", format)
    cloud.ok(f"tm/ssh/{made[0]}", *made[1:], f"host01:{cloud.vm}/disk.0")
    disk = cloud.at("host01", "disk.0")
    assert virtual(disk, "qcow2" if format == "qcow2" else "raw") == 32
    assert taken(disk) >= 32 if sparse == "NO" else taken(disk) < 24
    if format == "swap":
        assert disk.read_bytes()[1052:1056] == b"swap", "its label"
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]


@pytest.mark.parametrize("fs", ["", "ext4"])
def test_what_an_administrator_wants_of_qcow2(cloud: Cloud, fs: str) -> None:
    """The front-end's tmrc is read, not run; its words are for qcow2 alone."""
    cloud.documents = described(FS=fs, SPARSE="NO")
    argument = f"host01:{cloud.vm}/disk.0"
    tmrc = Path(cloud.env["ONE_LOCATION"], "etc", "tmrc")
    tmrc.parent.mkdir(exist_ok=True)
    try:
        tmrc.write_text('# options\nQCOW2_OPTIONS="-o compat=0.10,cluster_size=128k"\n')
        cloud.ok("tm/ssh/mkimage", "32", "qcow2", argument)
        disk = cloud.at("host01", "disk.0")
        found = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", disk))
        assert (found["cluster-size"], found["format-specific"]["data"]["compat"]) == (128 << 10, "0.10")
        assert taken(disk) >= 32
        cloud.ok("tm/ssh/mkimage", "32", "raw", argument)
        for text in ("-o backing_file=/etc/shadow", "-o data_file=x,data_file_raw=on", "-o compat=1.1 -o x=y", "x;id"):
            tmrc.write_text(f"QCOW2_OPTIONS='{text}'\n")
            cloud.fails(20, "is not an option", "tm/ssh/mkimage", "32", "qcow2", argument)
        tmrc.write_text("QCOW2_OPTIONS=$(touch /tmp/x)\n")
        cloud.fails(20, f"{tmrc}, line 1", "tm/ssh/mkimage", "32", "qcow2", argument)
    finally:
        tmrc.unlink()
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]


# -- devices ---------------------------------------------------------------------------------------------------


def device() -> Path:
    found = [path for path in sorted(Path("/dev").iterdir()) if stat.S_ISBLK(path.stat().st_mode)]
    if not found:
        pytest.skip("this machine has no block device in /dev")
    return found[0]


@pytest.mark.parametrize("action", ["clone", "ln"])
@pytest.mark.parametrize("source", ["fe:{}", "{}", "/{}"])
def test_dev_links_a_device(cloud: Cloud, action: str, source: str) -> None:
    known = device()
    disk, argument = cloud.at("host01", "disk.0"), f"host01:{cloud.vm}/disk.0"
    for _ in range(2):
        cloud.ok(f"tm/dev/{action}", source.format(known), argument)
        assert os.readlink(disk) == str(known)
    for again in (("mv", argument, f"host02:{cloud.vm}/disk.0"), ("mvds", argument, str(known))):
        cloud.ok(f"tm/dev/{again[0]}", *again[1:])
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]
    for _ in range(2):
        cloud.ok("tm/dev/delete", argument)
        assert cloud.left() == [f"host01:{VM}"] and stat.S_ISBLK(known.stat().st_mode)


def test_dev_links_nothing_else(cloud: Cloud) -> None:
    hostile = cloud.work / "a b;$(touch x)'"
    hostile.write_bytes(b"")
    argument = f"host01:{cloud.vm}/disk.0"
    for source, status, text in (
        ("sdb", 2, "'sdb' is not an absolute path"),
        ("fe:dev/sdb", 2, "is not an absolute path"),
        ("/dev/../etc/passwd", 2, "is not an absolute path"),
        ("/dev/no-such-device", 30, "the device /dev/no-such-device does not exist"),
        ("/etc/passwd", 24, "/etc/passwd is not a block device"),
        ("/dev/null", 24, "/dev/null is not a block device"),
        (str(hostile), 24, "is not a block device"),
        ("/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.x:y-lun-1", 30, "the device /dev/disk/by-path/ip-10.0.0.1:3260"),
    ):
        for action in ("clone", "ln"):
            cloud.fails(status, text, f"tm/dev/{action}", source, argument)
    assert cloud.left() == []


@pytest.mark.parametrize(
    ("driver", "actions"),
    [
        ("dev", ["cpds", "resize", "snap_create", "snap_create_live", "snap_delete", "snap_revert"]),
        ("dummy", ["snap_create_live"]),
    ],
)
def test_what_a_driver_cannot_do_it_says(cloud: Cloud, driver: str, actions: list[str]) -> None:
    disk = f"host01:{cloud.vm}/disk.0"
    for action in actions:
        arguments = [disk, "/dev/new", "-1"] if action == "cpds" else [disk, "1"]
        cloud.fails(24, f"{action}: this action is not supported", f"tm/{driver}/{action}", *arguments)
        cloud.fails(2, "usage", f"tm/{driver}/{action}", *arguments, "1", "2", "3")


def test_dummy_and_dev_take_part_in_migrations(cloud: Cloud) -> None:
    from base64 import b64encode

    told = b64encode(vm_document(VM, {0: {"TM_MAD": "dummy"}}))
    with front_end(cloud.work):
        for driver in ("dummy", "dev"):
            for action in ("premigrate", "postmigrate", "failmigrate"):
                for caller in ([], ["shared"]):
                    argv = ["host01", "host02", cloud.vm, str(VM), "0", *caller]
                    done = run_action(f"tm/{driver}/{action}", *argv, env=cloud.env, input=told)
                    assert (done.status, done.stdout, check_stderr(done, action)) == (0, "", "")
    assert cloud.left() == []
