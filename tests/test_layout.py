"""Disks with their snapshots on real hosts: how they lie there, beside what stock drivers make, and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hosts, check_stderr, run_action, start_action
from dumps import front_end, vm_document
from test_tm import MIB, VM, Cloud, alone, disks

SHARED = ["shared", "qcow2"]


@pytest.fixture
def cloud(hosts: Hosts, tmp_path: Path) -> Iterator[Cloud]:
    yield from alone(hosts, tmp_path)


@pytest.fixture
def node(hosts: Hosts) -> Iterator[str]:
    """A host that sees the front-end's datastores."""
    hosts._rig("add", "node1")
    yield "node1"
    hosts.end("node1")


class Machine:
    """The front-end or a host, where qemu-img makes and reads disks."""

    def __init__(self, hosts: Hosts, name: str) -> None:
        self.hosts, self.name = hosts, name

    def run(self, *argv: object) -> str:
        words = [str(word) for word in argv]
        if self.name == "fe":
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout
        return self.hosts.run(self.name, words).decode()

    def path(self, path: str | Path) -> Path:
        """PATH there, to look at it from here."""
        return Path(path) if self.name == "fe" else self.hosts.on(self.name, str(path))

    def tree(self, directory: str | Path, prefix: str) -> dict[str, object]:
        """What lies in DIRECTORY under PREFIX: where a link leads, and on what an image lies."""
        top = self.path(directory)
        found: dict[str, object] = {}
        for path in sorted(top.rglob("*")):
            name = str(path.relative_to(top))
            if not name.startswith(prefix):
                continue
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            elif path.is_dir():
                found[name] = "directory"
            else:
                found[name] = self.backing(f"{directory}/{name}")
        return found

    def backing(self, path: str | Path) -> object:
        if self.path(path).open("rb").read(4) != b"QFI\xfb":
            return "file"
        about = json.loads(self.run("qemu-img", "info", "--output=json", path))
        if "backing-filename" not in about:
            return "whole"
        return f"on {about['backing-filename']} ({about['backing-filename-format']})"

    def content(self, path: str | Path, format: str = "qcow2") -> dict[int, int]:
        """The byte that each MiB of a disk begins with, where that is not 0."""
        out = Path(self.hosts.work, "content")
        self.run("qemu-img", "convert", "-f", format, "-O", "raw", path, out)
        with out.open("rb") as file:
            found = {at: file.seek(at * MIB) * 0 + file.read(1)[0] for at in range(out.stat().st_size // MIB)}
        out.unlink()
        return {at: byte for at, byte in found.items() if byte}

    def top(self, path: str | Path) -> str:
        """What a disk or image leads to, as hypervisors open it: names that are numbers lead on only from there."""
        return self.run("readlink", "-f", path).strip()

    def virtual(self, path: str | Path, format: str = "qcow2") -> int:
        return int(json.loads(self.run("qemu-img", "info", "-f", format, "--output=json", path))["virtual-size"])

    def write(self, path: str | Path, at: int, byte: int, format: str = "qcow2") -> None:
        """As a guest: MiB AT of the disk gets BYTE."""
        self.run("qemu-io", "-f", format, "-c", f"write -P {byte} {at}M 64k", path)

    def image(self, path: str | Path, format: str = "qcow2", size: int = 8) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.run("qemu-img", "create", "-q", "-f", format, path, f"{size}M")
        self.write(path, 0, 1, format)

    # -- what the stock scripts do, one by one ------------------------------------------------------------

    def stock_shared_clone(self, image: str | Path, disk: str) -> None:
        os.makedirs(f"{self.path(disk)}.snap")
        self.run("qemu-img", "create", "-q", "-o", "backing_fmt=qcow2", "-b", image, "-f", "qcow2", f"{disk}.snap/0")
        self.run("ln", "-sf", ".", f"{disk}.snap/{os.path.basename(disk)}.snap")
        self.run("ln", "-sf", f"{os.path.basename(disk)}.snap/0", disk)

    def stock_shared_ln(self, image: str | Path, disk: str) -> None:
        os.makedirs(self.path(disk).parent, exist_ok=True)
        os.makedirs(f"{self.path(image)}.snap", exist_ok=True)
        own = f"{image}.snap/{os.path.basename(image)}.snap"
        if not self.path(own).is_symlink():
            self.run("ln", "-s", ".", own)
        numbers = sorted(int(name) for name in os.listdir(f"{self.path(image)}.snap") if name.isdigit())
        if not numbers:
            self.run("ln", "-sf", image, f"{image}.snap/0")
        self.run("ln", "-sf", f"{image}.snap/{numbers[-1] if numbers else 0}", disk)

    def stock_snap_create(self, disk: str, snapshot: int, home: str | Path = "") -> None:
        """Of tm/qcow2; HOME is the image of a persistent disk."""
        before = os.readlink(self.path(disk))
        short = f"{home or os.path.basename(disk)}.snap/{snapshot + 1}"
        directory, new = f"{home or disk}.snap", f"{home or disk}.snap/{snapshot + 1}"
        self.in_directory(directory, "qemu-img", "create", "-q", "-f", "qcow2", *self.on(before), new)
        self.run("ln", "-sf", short, disk)

    def stock_local_clone(self, image: str | Path, disk: str) -> None:
        os.makedirs(f"{self.path(disk)}.snap")
        shutil.copyfile(image, self.path(f"{disk}.snap/0"))
        self.run("ln", "-s", f"{os.path.basename(disk)}.snap/0", disk)

    def stock_local_snap_create(self, disk: str, snapshot: int) -> None:
        before = os.path.basename(os.readlink(self.path(disk)))
        new = f"{disk}.snap/{snapshot + 1}"
        self.in_directory(f"{disk}.snap", "qemu-img", "create", "-q", "-f", "qcow2", *self.on(before), new)
        self.run("ln", "-sf", f"{os.path.basename(disk)}.snap/{snapshot + 1}", disk)

    def stock_raw_snap_create(self, disk: str | Path, snapshot: int) -> None:
        os.makedirs(f"{self.path(disk)}.snap", exist_ok=True)
        shutil.copyfile(self.path(disk), self.path(f"{disk}.snap/{snapshot}"))

    def in_directory(self, directory: str | Path, *argv: object) -> None:
        self.run("env", "-C", directory, *argv)

    @staticmethod
    def on(name: str) -> list[str]:
        return ["-o", "backing_fmt=qcow2", "-b", name]


def vm(**elements: object) -> bytes:
    """The VM with a disk 0 that has these elements."""
    return disks(**{"SIZE": 8, "ORIGINAL_SIZE": 8, "FORMAT": "qcow2", "CLONE": "YES", **elements})


def parts(*tops: Path) -> list[str]:
    """What killed or failed runs left."""
    return [str(path) for top in tops for path in top.rglob(".*.part")]


# -- clone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", SHARED)
def test_shared_clone_of_a_qcow2_image_lies_on_it(cloud: Cloud, node: str, driver: str) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image)
    fe.stock_shared_clone(image, f"{cloud.vm}/disk.9")
    expected = {name.replace("disk.9", "disk.0"): what for name, what in fe.tree(cloud.vm, "disk.9").items()}
    expected["disk.0"] = "-> disk.0.snap/0"
    expected["disk.0.snap/disk.0.snap"] = "-> ."
    cloud.documents = [vm()]
    for _ in range(2):
        cloud.ok(f"tm/{driver}/clone", f"fe:{image}", f"{node}:{disk}")
        assert fe.tree(cloud.vm, "disk.0") == expected
        assert expected["disk.0.snap/0"] == f"on {image} (qcow2)"
        assert fe.content(disk) == {0: 1}
        fe.write(disk, 3, 3)
    cloud.documents = [vm(SIZE=20)]
    cloud.ok(f"tm/{driver}/clone", f"fe:{image}", f"{node}:{disk}")
    assert fe.virtual(disk) == 20 * MIB
    assert fe.content(disk) == fe.content(image) == {0: 1}
    assert not parts(Path(cloud.vm), cloud.images)
    cloud.ok(f"tm/{driver}/delete", f"{node}:{disk}")
    assert fe.tree(cloud.vm, "disk.0") == {}


def test_options_of_overlays_are_the_administrators(cloud: Cloud, node: str) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image)
    cloud.documents = [vm()]
    tmrc = Path(cloud.env["ONE_LOCATION"], "etc", "tmrc")
    tmrc.parent.mkdir(exist_ok=True)
    try:
        tmrc.write_text('# comment\nQCOW2_OPTIONS="-o cluster_size=128k"\n')
        cloud.ok("tm/qcow2/clone", f"fe:{image}", f"{node}:{disk}")
        assert json.loads(fe.run("qemu-img", "info", "--output=json", disk))["cluster-size"] == 128 << 10
        shutil.rmtree(cloud.vm)
        tmrc.write_text('QCOW2_OPTIONS="-o data_file=/etc/passwd"\n')
        cloud.fails(20, "data_file", "tm/qcow2/clone", f"fe:{image}", f"{node}:{disk}")
        assert cloud.left() == []
    finally:
        tmrc.unlink()


def test_shared_clone_that_is_to_stand_alone(cloud: Cloud, node: str) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image)
    cloud.documents = [vm(QCOW2_STANDALONE="YES", SIZE=20)]
    for _ in range(2):
        cloud.ok("tm/shared/clone", f"fe:{image}", f"{node}:{disk}")
        assert fe.tree(cloud.vm, "disk.0")["disk.0.snap/0"] == "whole"
        assert (fe.content(disk), fe.virtual(disk)) == ({0: 1}, 20 * MIB)
        assert Path(disk).stat().st_blocks * 512 < 2 * MIB
    cloud.documents = [vm(QCOW2_STANDALONE="yes", SPARSE="NO", SIZE=20)]
    cloud.ok("tm/shared/clone", f"fe:{image}", f"{node}:{disk}")
    assert (fe.content(disk), fe.virtual(disk)) == ({0: 1}, 20 * MIB)
    assert Path(disk).stat().st_blocks * 512 >= 20 * MIB
    assert not parts(Path(cloud.vm))


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("action", ["tm/ssh/clone", "tm/local/clone", "tm/shared/clone.ssh"])
def test_a_clone_has_all_its_room_only_where_that_is_asked(cloud: Cloud, action: str, format: str) -> None:
    """Stock tm/local does the opposite."""
    host, image, disk = Machine(cloud.hosts, "host01"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    Machine(cloud.hosts, "fe").image(image, format)
    for sparse, least, most in (("", 0, 2), ("YES", 0, 2), ("NO", 16, 20)):
        cloud.documents = [vm(FORMAT=format, SPARSE=sparse, SIZE=16)]
        cloud.ok(action, f"fe:{image}", f"host01:{disk}")
        assert least * MIB <= host.path(disk).stat().st_blocks * 512 <= most * MIB, sparse
        assert (host.content(disk, format), host.virtual(disk, format)) == ({0: 1}, 16 * MIB)
    assert not parts(cloud.at("host01"), cloud.images)


@pytest.mark.parametrize("action", ["tm/local/clone", "tm/qcow2/clone.ssh"])
def test_clone_to_local_storage_is_the_first_of_a_chain(cloud: Cloud, env: dict[str, str], action: str) -> None:
    cloud.env = env
    host, image, disk = Machine(cloud.hosts, "host01"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    Machine(cloud.hosts, "fe").image(image)
    cloud.documents = [vm(SIZE=20)]
    for _ in range(2):
        cloud.ok(action, f"fe:{image}", f"host01:{disk}")
        assert host.tree(cloud.vm, "") == {
            "disk.0": "-> disk.0.snap/0",
            "disk.0.snap": "directory",
            "disk.0.snap/0": "whole",
            **({"disk.0.snap/disk.0.snap": "-> ."} if action.endswith(".ssh") else {}),
        }
        assert (host.content(disk), host.virtual(disk)) == ({0: 1}, 20 * MIB)
    assert cloud.hosts.on("host01", f"{cloud.system}/.monitor").read_text() == "ssh\n"
    assert (host.path(f"{disk}.snap").stat().st_mode & 0o777) == 0o755
    assert (host.path(f"{disk}.snap/0").stat().st_mode & 0o777) == 0o644
    cloud.documents = [vm(FORMAT="raw", SIZE=1, ORIGINAL_SIZE=1)]
    (cloud.images / "raw").write_bytes(b"raw")
    cloud.ok(action, f"fe:{cloud.images}/raw", f"host01:{disk}")
    assert host.tree(cloud.vm, "") == {"disk.0": "file"}, "what a chain had is gone with it"
    for name in ("kernel", "initrd"):
        cloud.ok(action, f"fe:{cloud.images}/raw", f"host01:{cloud.vm}/{name}")
        assert cloud.at("host01", name).read_bytes() == b"raw"


@pytest.mark.parametrize("action", ["tm/ssh/clone", "tm/local/clone", "tm/shared/clone", "tm/shared/clone.ssh"])
@pytest.mark.parametrize("names", ["bare", "of the image"])
def test_clone_of_an_image_that_is_a_chain(cloud: Cloud, node: str, action: str, names: str) -> None:
    """As stock tm/local and tm/qcow2 bring back disks with snapshots."""
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(f"{image}.snap/0")
    below = "0" if names == "bare" else "abc.snap/0"
    if names != "bare":
        fe.run("ln", "-s", ".", f"{image}.snap/abc.snap")
    fe.in_directory(f"{image}.snap", "qemu-img", "create", "-q", "-f", "qcow2", *fe.on(below), "2")
    fe.run("ln", "-s", "abc.snap/2", image)
    fe.write(f"{image}.snap/2", 5, 5)
    where = node if action == "tm/shared/clone" else "host01"
    host = Machine(cloud.hosts, where)
    for standalone in ("YES", "NO"):
        cloud.documents = [vm(QCOW2_STANDALONE=standalone, SIZE=10)]
        cloud.ok(action, f"fe:{image}", f"{where}:{disk}")
        assert host.content(disk) == {0: 1, 5: 5}
        assert host.virtual(disk) == 10 * MIB
        if standalone == "YES":
            assert "on" not in str(host.backing(host.run("readlink", "-f", disk).strip()))
    assert fe.content(f"{image}.snap/2") == {0: 1, 5: 5}
    assert not parts(cloud.images, Path(cloud.system), cloud.hosts.on("host01"))


def test_a_failed_clone_leaves_nothing_and_is_told(cloud: Cloud, node: str) -> None:
    """Stock tm/shared resizes after a copy that failed, and takes the success of that for its own."""
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image, "raw")
    for format in ("raw", "qcow2"):
        cloud.documents = [vm(FORMAT=format, SIZE=100)]
        for action in ("tm/shared/clone", "tm/shared/ln", "tm/qcow2/clone"):
            cloud.fails(30, "missing", action, f"fe:{cloud.images}/missing", f"{node}:{disk}")
            assert cloud.left() == []
        cloud.hosts.add("host08", size="2m")
        big = cloud.images / "big"
        big.write_bytes(os.urandom(8 * MIB))
        for action in ("tm/local/clone", "tm/local/ln", "tm/shared/clone.ssh", "tm/shared/ln.ssh"):
            cloud.documents = [vm(FORMAT="raw", SIZE=100)]
            cloud.fails(12, "MiB", action, f"fe:{big}", f"host08:{disk}")
            assert [path for path in cloud.hosts.on("host08").rglob("*") if path.is_file()] == []
        cloud.hosts.end("host08")
    cloud.documents = [vm()]
    for action in ("tm/shared/clone", "tm/local/clone", "tm/shared/clone.ssh"):
        cloud.fails(41, "FORMAT", action, f"fe:{image}", f"{node}:{disk}")
        assert cloud.left() == []


def test_a_raw_disk_is_not_read_as_what_its_guest_made_of_it(cloud: Cloud) -> None:
    """The header of a qcow2 image that lies on a file of the host, in a raw disk."""
    host, disk, new = Machine(cloud.hosts, "host01"), f"{cloud.vm}/disk.0", cloud.images / "new"
    cloud.at("host01").mkdir(parents=True)
    secret = cloud.work / "secret"
    secret.write_bytes(b"secret" * 20000)
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", disk)
    written = cloud.at("host01", "disk.0").read_bytes()
    cloud.documents = [vm(FORMAT="raw", SIZE=8)]
    cloud.ok("tm/local/cpds", f"host01:{disk}", str(new), "-1")
    assert new.read_bytes() == written
    cloud.ok("tm/local/mvds", f"host01:{disk}", str(new))
    assert new.read_bytes() == written
    # and where the front-end says qcow2, it may not lead out of the datastores
    host.path(disk).unlink()
    host.path(disk).write_bytes(written)
    cloud.documents = [vm()]
    cloud.fails(41, "none of the datastores", "tm/local/cpds", f"host01:{disk}", str(new), "-1")


# -- persistent images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", SHARED)
def test_shared_ln_leads_to_the_newest_file(cloud: Cloud, node: str, driver: str) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    ln = (f"tm/{driver}/ln", f"fe:{image}", f"{node}:{disk}")
    fe.image(image)
    for _ in range(2):
        cloud.ok(*ln)
        assert os.readlink(disk) == f"{image}.snap/0"
        first = fe.tree(cloud.images, "abc")
        assert first == {
            "abc": "whole",
            "abc.snap": "directory",
            "abc.snap/0": f"-> {image}",
            "abc.snap/abc.snap": "-> .",
        }
    fe.stock_snap_create(disk, 0, image)
    fe.stock_snap_create(disk, 9, image)
    fe.write(disk, 2, 2)
    os.mkdir(f"{disk}.snap")
    for _ in range(2):
        cloud.ok(*ln)
        assert fe.tree(cloud.vm, "disk.0") == {"disk.0": f"-> {image}.snap/10"}
        assert fe.content(disk) == {0: 1, 2: 2}
    # the same image after the stock scripts for local storage brought it back
    os.rename(image, f"{image}.snap/0")
    os.symlink("abc.snap/10", image)
    cloud.ok(*ln)
    assert os.readlink(disk) == f"{image}.snap/10"
    # an image that is whole, beside copies that tm/ssh has made of it
    shutil.rmtree(f"{image}.snap")
    image.unlink()
    fe.image(image)
    fe.stock_raw_snap_create(image, 0)
    fe.stock_raw_snap_create(image, 1)
    cloud.ok(*ln)
    assert os.path.realpath(disk) == str(image)
    cloud.documents = [vm(CLONE="NO", SOURCE=image, FORMAT="raw")]
    cloud.ok(*ln)
    assert os.readlink(disk) == str(image)
    assert not parts(Path(cloud.vm), cloud.images)


def chain_of_shared(fe: Machine, image: Path) -> dict[int, int]:
    """An image that tm/qcow2 has had in use: a file, and overlays that name it by its path."""
    fe.image(image)
    disk = f"{image.parent}/stock/disk.0"
    fe.stock_shared_ln(image, disk)
    fe.stock_snap_create(disk, 0, image)
    fe.write(disk, 1, 11)
    fe.stock_snap_create(disk, 4, image)
    fe.write(disk, 2, 12)
    fe.run("rm", "-r", f"{image.parent}/stock")
    Path(f"{image}.snap/4.current").write_text(f"{image}.snap/1\n")
    return {0: 1, 1: 11, 2: 12}


def chain_of_local(fe: Machine, image: Path) -> dict[int, int]:
    """An image that tm/local has brought back: names without a directory, no link to the directory itself."""
    content = chain_of_ssh_variant(fe, image)
    for number in (1, 5):
        below = {1: "0", 5: "1"}[number]
        fe.in_directory(
            f"{image}.snap", "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, str(number)
        )
    os.unlink(f"{image}.snap/abc.snap")
    return content


def chain_of_ssh_variant(fe: Machine, image: Path) -> dict[int, int]:
    """An image that tm/qcow2/mvds.ssh has brought back."""
    os.makedirs(f"{image}.snap")
    os.symlink(".", f"{image}.snap/abc.snap")
    fe.image(f"{image}.snap/0")
    for number, below in ((1, 0), (5, 1)):
        arguments = ["-q", "-f", "qcow2", *fe.on(f"abc.snap/{below}"), str(number)]
        fe.in_directory(f"{image}.snap", "qemu-img", "create", *arguments)
        fe.write(f"{image}.snap/{number}", {1: 1, 5: 2}[number], {1: 11, 5: 12}[number])
    os.symlink("abc.snap/5", image)
    Path(f"{image}.snap/4.current").write_text(f"{image}.snap/1\n")
    return {0: 1, 1: 11, 2: 12}


CHAINS = [chain_of_shared, chain_of_local, chain_of_ssh_variant]


def chain_tree(name: str, names: str) -> dict[str, object]:
    """What a disk or image NAME is that came of one of these; NAMES: as in onhost/layout.py."""
    within = f"{name}.snap/" if names == "path" else ""
    tree: dict[str, object] = {
        name: f"-> {name}.snap/5",
        f"{name}.snap": "directory",
        f"{name}.snap/0": "whole",
        f"{name}.snap/1": f"on {within}0 (qcow2)",
        f"{name}.snap/5": f"on {within}1 (qcow2)",
        f"{name}.snap/4.current": "file",
    }
    if names == "path":
        tree[f"{name}.snap/{name}.snap"] = "-> ."
    return tree


@pytest.mark.parametrize("driver", ["tm/local/{}", "tm/ssh/{}", "tm/shared/{}.ssh"])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.__name__)
def test_a_chain_goes_to_a_host_and_comes_back_with_all_snapshots(cloud: Cloud, driver: str, chain: object) -> None:
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    content = chain(fe, image)  # type: ignore[operator]
    Path(f"{image}.md5sum").write_text("x")
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    before = fe.tree(cloud.images, "abc")
    is_number = "local" in driver or ("tm/ssh" in driver and chain is chain_of_local)
    names = "number" if is_number else "path"
    for _ in range(2):
        cloud.ok(driver.format("ln"), f"fe:{image}", f"host01:{disk}")
        assert host.tree(cloud.vm, "") == chain_tree("disk.0", names)
        assert host.path(f"{disk}.snap/4.current").read_text() == f"{disk}.snap/1\n"
        assert host.content(f"{disk}.snap/5") == content
        assert host.content(f"{disk}.snap/1") == {0: 1, 1: 11}
        if names == "path":
            assert host.content(disk) == content
    assert fe.tree(cloud.images, "abc") == before
    host.write(host.top(disk), 6, 66)
    for _ in range(2):
        cloud.ok(driver.format("mvds"), f"host01:{disk}", str(image))
        assert fe.tree(cloud.images, "abc") == chain_tree("abc", names)
        assert fe.content(f"{image}.snap/5") == {**content, 6: 66}
        if names == "path":
            assert fe.content(image) == {**content, 6: 66}
        assert fe.content(f"{image}.snap/1") == {0: 1, 1: 11}
        assert host.tree(cloud.vm, "") == {"disk.0": f"-> {image}"}
    assert not parts(cloud.images, cloud.at("host01"))
    # and once more from there
    cloud.ok(driver.format("delete").replace(".ssh", ""), f"host01:{cloud.vm}")
    cloud.ok(driver.format("ln"), f"fe:{image}", f"host02:{disk}")
    assert Machine(cloud.hosts, "host02").content(f"{disk}.snap/5") == {**content, 6: 66}


@pytest.mark.parametrize("driver", ["tm/local/{}", "tm/ssh/{}", "tm/qcow2/{}.ssh"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_copies_of_a_disk_go_to_a_host_and_come_back(cloud: Cloud, driver: str, format: str) -> None:
    """Stock tm/local leaves the snapshots of a raw disk behind."""
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image, format)
    fe.stock_raw_snap_create(image, 0)
    fe.write(image, 1, 11, format)
    fe.stock_raw_snap_create(image, 3)
    fe.write(image, 2, 12, format)
    cloud.documents = [vm(FORMAT=format, CLONE="NO", SOURCE=image)]
    is_chain = format == "qcow2" and "tm/ssh" not in driver
    for _ in range(2):
        cloud.ok(driver.format("ln"), f"fe:{image}", f"host01:{disk}")
        kind = "file" if format == "raw" else "whole"
        expected = {"disk.0": kind, "disk.0.snap": "directory", "disk.0.snap/0": kind, "disk.0.snap/3": kind}
        if is_chain:
            expected.update({"disk.0": "-> disk.0.snap/4", "disk.0.snap/4": kind})
            expected.update({"disk.0.snap/disk.0.snap": "-> ."} if ".ssh" in driver else {})
        assert host.tree(cloud.vm, "") == expected
        assert host.content(disk, format) == {0: 1, 1: 11, 2: 12}
        assert host.content(f"{disk}.snap/0", format) == {0: 1}
    host.write(disk, 7, 77, format)
    host.path(f"{disk}.snap/0").unlink()  # a snapshot that was deleted
    for _ in range(2):
        cloud.ok(driver.format("mvds"), f"host01:{disk}", str(image))
        assert fe.content(image, format) == {0: 1, 1: 11, 2: 12, 7: 77}
        assert fe.content(f"{image}.snap/3", format) == {0: 1, 1: 11}
        assert not os.path.lexists(f"{image}.snap/0")
    assert not parts(cloud.images, cloud.at("host01"))


@pytest.mark.parametrize("driver", ["tm/local/{}", "tm/ssh/{}"])
def test_a_persistent_disk_of_a_stopped_vm_comes_back(cloud: Cloud, driver: str) -> None:
    """The host is the front-end: nothing is sent."""
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    content = chain_of_ssh_variant(fe, image)
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    cloud.ok(driver.format("ln"), f"fe:{image}", f"host01:{disk}")
    cloud.ok(driver.format("mv"), f"host01:{cloud.vm}", f"fe:{cloud.vm}")
    fe.write(fe.top(disk), 6, 66)
    whole = os.stat(f"{disk}.snap/0").st_ino
    names = "number" if "local" in driver else "path"
    for _ in range(2):
        cloud.ok(driver.format("mvds"), f"fe:{disk}", str(image))
        assert fe.tree(cloud.vm, "") == {"disk.0": f"-> {image}"}
        assert fe.content(fe.top(image)) == {**content, 6: 66}
        assert fe.tree(cloud.images, "abc") == chain_tree("abc", names)
        assert os.stat(f"{image}.snap/0").st_ino == whole, "what nobody changes is not copied"
    assert not parts(cloud.images, Path(cloud.vm))


@pytest.mark.parametrize("driver", SHARED)
def test_what_was_written_after_a_stock_revert_comes_back(cloud: Cloud, node: str, driver: str) -> None:
    """Stock tm/shared replaces the link to a raw image by a private file, and mvds, which does nothing, loses it."""
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image, "raw")
    cloud.documents = [vm(FORMAT="raw", CLONE="NO", SOURCE=image)]
    cloud.ok(f"tm/{driver}/ln", f"fe:{image}", f"{node}:{disk}")
    fe.stock_raw_snap_create(image, 0)
    fe.run("rm", disk)
    fe.run("cp", f"{image}.snap/0", disk)
    fe.write(disk, 4, 44, "raw")
    new = cloud.images / "new"
    cloud.ok(f"tm/{driver}/cpds", f"{node}:{disk}", str(new), "0")
    assert fe.content(new, "raw") == {0: 1}, "the snapshots are where the image is"
    for _ in range(2):
        cloud.ok(f"tm/{driver}/mvds", f"{node}:{disk}", str(image))
        assert fe.content(image, "raw") == {0: 1, 4: 44}
        assert fe.tree(cloud.images, "abc") == {"abc": "file", "abc.snap": "directory", "abc.snap/0": "file"}
        assert os.readlink(disk) == str(image)
    cloud.ok(f"tm/{driver}/delete", f"{node}:{disk}")
    assert fe.content(image, "raw") == {0: 1, 4: 44}


def test_a_raw_disk_that_is_an_overlay_is_not_taken_for_raw(cloud: Cloud) -> None:
    """What stock tm/ssh makes of a disk with recovery snapshots."""
    host, image, disk = Machine(cloud.hosts, "host01"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    host.image(f"{disk}.snap/base", "raw")
    host.in_directory(f"{disk}.snap", "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "base.1")
    host.run("ln", "-s", "disk.0.snap/base.1", disk)
    image.write_bytes(b"image")
    cloud.documents = [vm(FORMAT="raw", CLONE="NO", SOURCE=image)]
    cloud.fails(24, "recovery snapshots", "tm/ssh/mvds", f"host01:{disk}", str(image))
    cloud.fails(24, "recovery snapshots", "tm/ssh/cpds", f"host01:{disk}", str(image), "-1")
    assert image.read_bytes() == b"image"


@pytest.mark.parametrize("driver", SHARED)
def test_a_shared_disk_that_leads_to_its_image_is_there_already(cloud: Cloud, node: str, driver: str) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    content = chain_of_shared(fe, image)
    Path(f"{image}.md5sum").write_text("x")
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    cloud.ok(f"tm/{driver}/ln", f"fe:{image}", f"{node}:{disk}")
    before = fe.tree(cloud.images, "abc")
    for _ in range(2):
        cloud.ok(f"tm/{driver}/mvds", f"{node}:{disk}", str(image))
        assert fe.tree(cloud.images, "abc") == before
        assert fe.content(f"{image}.snap/5") == content


@pytest.mark.parametrize("driver", SHARED)
def test_a_private_file_that_stock_has_left_is_the_image_again_at_the_next_snapshot(
    cloud: Cloud, node: str, driver: str
) -> None:
    """Its snapshots are the image's: they can be used, and none is lost."""
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image, "raw")
    fe.stock_raw_snap_create(image, 1)
    cloud.documents = [vm(CLONE="NO", SOURCE=image, FORMAT="raw")]
    cloud.ok(f"tm/{driver}/ln", f"fe:{image}", f"{node}:{disk}")
    before = image.read_bytes()
    os.unlink(disk)
    Path(disk).write_bytes(b"private" + before[7:])  # as its revert does, and the guest then writes
    cloud.fails(31, "power the VM off", f"tm/{driver}/snap_create_live", f"{node}:{disk}", "2")
    cloud.ok(f"tm/{driver}/snap_create", f"{node}:{disk}", "2")
    assert os.readlink(disk) == str(image)
    assert image.read_bytes() == Path(f"{image}.snap/2").read_bytes() == b"private" + before[7:]
    cloud.ok(f"tm/{driver}/snap_revert", f"{node}:{disk}", "1")
    assert image.read_bytes() == before and os.readlink(disk) == str(image)
    cloud.ok(f"tm/{driver}/snap_delete", f"{node}:{disk}", "1")
    assert sorted(os.listdir(f"{image}.snap")) == ["2"]


KILLER = """
import errno, os, signal
left = int(os.environ.get("KILL_BEFORE") or os.environ["FAIL_AT"])
def deadly(call):
    def counted(*arguments, **more):
        global left
        if any("/datastores/" in str(argument) or ".part" in str(argument) for argument in arguments[:2]):
            left -= 1
            if not left and "FAIL_AT" in os.environ:
                raise OSError(errno.ENOSPC, "No space left on device")
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **more)
    return counted
for name in "rename link symlink unlink mkdir rmdir truncate chmod".split():
    setattr(os, name, deadly(getattr(os, name)))
"""


@pytest.mark.long
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "copies"])
@pytest.mark.parametrize("where", ["host01", "fe"])
def test_mvds_can_be_killed_anywhere_and_run_again(cloud: Cloud, where: str, chain: bool) -> None:
    """Killed before each change that it makes on the front-end, and run again every time."""
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, where)
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    format = "qcow2" if chain else "raw"
    if chain:
        content = chain_of_shared(fe, image)
    else:
        fe.image(image, "raw")
        fe.stock_raw_snap_create(image, 1)
        content = {0: 1}
    cloud.documents = [vm(CLONE="NO", SOURCE=image, FORMAT=format)]
    (cloud.work / "sitecustomize.py").write_text(KILLER)
    steps = 0
    while True:
        cloud.ok("tm/local/ln", f"fe:{image}", f"{where}:{disk}")
        steps += 1
        host.write(host.top(disk), 6, steps, format)
        content[6] = steps
        with front_end(cloud.work, *cloud.documents) as asked:
            env = {**cloud.env, **asked, "PYTHONPATH": str(cloud.work), "KILL_BEFORE": str(steps)}
            done = run_action("tm/local/mvds", *cloud.argv(f"{where}:{disk}", str(image)), env=env)
        if not done.status:
            break
        assert done.status == -signal.SIGKILL, done
        if not host.path(disk).is_symlink() or os.readlink(host.path(disk)) != str(image):
            assert host.content(host.top(disk), format) == content, "the disk is as it was"
        cloud.ok("tm/local/mvds", f"{where}:{disk}", str(image))
        assert fe.content(fe.top(image), format) == content, steps
        assert len(os.listdir(f"{image}.snap")) == (4 if chain else 1)
        assert os.readlink(host.path(disk)) == str(image)
        assert not parts(cloud.images, host.path(cloud.vm)), steps
    assert steps > 8


def test_mvds_that_fails_anywhere_leaves_image_and_disk_whole(cloud: Cloud) -> None:
    """The image is as it was, or new with all its snapshots."""
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    content = chain_of_ssh_variant(fe, image)
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    (cloud.work / "sitecustomize.py").write_text(KILLER)
    cloud.ok("tm/local/ln", f"fe:{image}", f"host01:{disk}")
    host.write(host.top(disk), 6, 66)
    for step in range(1, 50):
        with front_end(cloud.work, *cloud.documents) as asked:
            env = {**cloud.env, **asked, "PYTHONPATH": str(cloud.work), "FAIL_AT": str(step)}
            done = run_action("tm/local/mvds", *cloud.argv(f"host01:{disk}", str(image)), env=env)
        if not done.status:
            break
        assert (done.status, check_stderr(done, "mvds").count("No space")) == (12, 1), done
        assert fe.content(fe.top(image)) in (content, {**content, 6: 66}), step
        assert fe.content(f"{image}.snap/1") == {0: 1, 1: 11}, step
        assert host.content(host.top(disk)) == {**content, 6: 66}, step
        assert not parts(cloud.images, cloud.at("host01")), step
    assert step > 8
    assert fe.content(fe.top(image)) == {**content, 6: 66}


def test_ln_that_is_killed_leaves_the_disk_as_it_was(cloud: Cloud) -> None:
    """The worker is killed in the middle of the data, and the next run removes what is left."""
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    content = chain_of_ssh_variant(fe, image)
    fe.run("qemu-io", "-f", "qcow2", "-c", "write -P 99 0 7M", f"{image}.snap/5")
    os.truncate(f"{image}.snap/1", 200 * MIB)
    with open(f"{image}.snap/1", "r+b") as file:
        file.seek(40 * MIB)
        file.write(os.urandom(140 * MIB))
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    with front_end(cloud.work, *cloud.documents) as asked:
        action = start_action("tm/local/ln", *cloud.argv(f"fe:{image}", f"host01:{disk}"), env={**cloud.env, **asked})
        while not parts(cloud.at("host01")):
            assert action.poll() is None, "too fast to be caught"
        for pid in cloud.hosts.workers("host01"):
            os.kill(pid, signal.SIGKILL)
        _, stderr = action.communicate(timeout=60)
    assert action.returncode == 10, stderr
    assert not os.path.lexists(host.path(disk))
    cloud.ok("tm/local/ln", f"fe:{image}", f"host01:{disk}")
    assert host.content(host.top(disk)) == dict.fromkeys(range(7), 99), content
    assert not parts(cloud.at("host01"))


# -- saving ----------------------------------------------------------------------------------------------------


def no_errors(cloud: Cloud, action: str, *arguments: str) -> None:
    """Stock tm/ssh logs an error whenever it has exported a chain well."""
    done = cloud.run(action, *arguments)
    assert (done.status, "ERROR" in done.stderr) == (0, False), done


@pytest.mark.parametrize("driver", SHARED)
@pytest.mark.parametrize("persistent", [False, True], ids=["clone", "persistent"])
def test_cpds_of_a_shared_disk_and_its_snapshots(cloud: Cloud, node: str, driver: str, persistent: bool) -> None:
    fe, image, disk = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image)
    home = image if persistent else ""
    if persistent:
        fe.stock_shared_ln(image, disk)
    else:
        fe.stock_shared_clone(image, disk)
    fe.write(disk, 1, 11)
    fe.stock_snap_create(disk, 0, home)
    fe.write(disk, 2, 12)
    fe.stock_snap_create(disk, 1, home)
    fe.write(disk, 3, 13)
    Path(f"{home or disk}.snap/7.current").write_text(f"{home or disk}.snap/1")
    new = cloud.images / "new"
    cloud.documents = [vm(CLONE="NO" if persistent else "YES", SOURCE=image)]
    states = {"-1": {0: 1, 1: 11, 2: 12, 3: 13}, "0": {0: 1, 1: 11}, "7": {0: 1, 1: 11, 2: 12}}
    for snapshot, expected in states.items():
        for _ in range(2):
            no_errors(cloud, f"tm/{driver}/cpds", f"{node}:{disk}", str(new), snapshot)
            assert fe.content(new) == expected
            assert fe.backing(new) == "whole"
    cloud.fails(30, "no snapshot 5", f"tm/{driver}/cpds", f"{node}:{disk}", str(new), "5")
    assert fe.content(new) == states["7"], "what was there stays"
    assert not parts(cloud.images, Path(cloud.vm))


@pytest.mark.parametrize("driver", ["tm/local/{}", "tm/ssh/{}", "tm/shared/{}.ssh"])
@pytest.mark.parametrize("state", [3, 26, 67])
def test_cpds_of_a_disk_on_local_storage(cloud: Cloud, driver: str, state: int) -> None:
    """67: undeployed, the disks are on the front-end.  Running, only a snapshot is saved."""
    where = "fe" if state == 67 else "host01"
    host, fe = Machine(cloud.hosts, where), Machine(cloud.hosts, "fe")
    image, disk, new = cloud.images / "abc", f"{cloud.vm}/disk.0", cloud.images / "new"
    fe.image(image)
    host.stock_local_clone(image, disk)
    host.write(disk, 1, 11)
    host.stock_local_snap_create(disk, 0)
    host.write(host.run("readlink", "-f", disk).strip(), 2, 12)
    cloud.documents = [vm_document(VM, {0: {"FORMAT": "qcow2", "CLONE": "YES", "SOURCE": image}}, lcm_state=state)]
    before = host.tree(cloud.vm, "")
    for snapshot, expected in (("-1", {0: 1, 1: 11, 2: 12}), ("0", {0: 1, 1: 11})):
        for _ in range(2):
            if (state, snapshot) == (26, "-1"):
                cloud.fails(24, "running", driver.format("cpds"), f"{where}:{disk}", str(new), snapshot)
                assert not new.exists()
                continue
            no_errors(cloud, driver.format("cpds"), f"{where}:{disk}", str(new), snapshot)
            assert fe.content(new) == expected
            assert fe.backing(new) == "whole"
    assert host.tree(cloud.vm, "") == before
    assert not parts(cloud.images, host.path(cloud.vm))


@pytest.mark.parametrize("driver", ["tm/local/{}", "tm/ssh/{}", "tm/shared/{}", "tm/shared/{}.ssh"])
def test_a_chain_that_leaves_the_datastores_is_refused(cloud: Cloud, node: str, driver: str) -> None:
    fe, image, disk, new = Machine(cloud.hosts, "fe"), cloud.images / "abc", f"{cloud.vm}/disk.0", cloud.images / "new"
    outside = cloud.work / "outside"
    fe.image(outside)
    fe.image(image)
    fe.stock_shared_clone(outside, disk)
    cloud.documents = [vm(SOURCE=image)]
    cloud.fails(41, "none of the datastores", driver.format("cpds"), f"{node}:{disk}", str(new), "-1")
    # a disk that lies on an image of the datastores cannot come back as one
    shutil.rmtree(cloud.vm)
    fe.stock_shared_clone(image, disk)
    cloud.fails(41, "no snapshot of this disk", driver.format("mvds"), f"{node}:{disk}", str(new))
    assert os.readlink(disk) == "disk.0.snap/0"
    os.unlink(disk)  # the same as a file
    shutil.copyfile(f"{disk}.snap/0", disk)
    cloud.fails(41, "does not go with it", driver.format("mvds"), f"{node}:{disk}", str(new))
    os.unlink(disk)
    os.symlink("disk.0.snap/0", disk)
    # nor one that does not say what it lies on
    fe.run("rm", f"{disk}.snap/0")
    fe.run("qemu-img", "create", "-q", "-f", "qcow2", *fe.on(str(image)), f"{disk}.snap/0")
    header = Path(f"{disk}.snap/0").read_bytes()
    at = header.index(b"\xe2\x79\x2a\xca")  # where it says the format: now something that nobody knows
    Path(f"{disk}.snap/0").write_bytes(header[:at] + b"none" + header[at + 4 :])
    cloud.fails(41, "does not say its format", driver.format("cpds"), f"{node}:{disk}", str(new), "-1")
    assert not new.exists() and not parts(cloud.images, Path(cloud.vm))


# -- a shared image datastore, and system datastores on the hosts -------------------------------------------------


def test_variants_for_local_storage_copy_where_the_image_is_seen(cloud: Cloud, tmp_path: Path) -> None:
    """host01 does not see the image datastore, which stock drivers need there; host05 does."""
    hosts, fe = cloud.hosts, Machine(cloud.hosts, "fe")
    fe.image(cloud.images / "abc", "raw")
    image, disk, new = cloud.images / "abc", f"{cloud.vm}/disk.0", cloud.images / "new"
    cloud.documents = [vm(FORMAT="raw", CLONE="NO", SOURCE=image)]
    os.makedirs(cloud.system, exist_ok=True)
    hosts._rig("add", "host05", cloud.system)
    for where, is_streamed in (("host01", True), ("host05", False)):
        host = Machine(hosts, where)
        for action, arguments in (
            ("clone.ssh", (f"fe:{image}", f"{where}:{disk}")),
            ("ln.ssh", (f"fe:{image}", f"{where}:{disk}")),
            ("cpds.ssh", (f"{where}:{disk}", str(new), "-1")),
            ("mvds.ssh", (f"{where}:{disk}", str(new))),
        ):
            done = cloud.run(f"tm/shared/{action}", *arguments)
            check_stderr(done, action)
            assert (done.status, "streamed" in done.stderr) == (0, is_streamed), (where, action, done)
            if action == "clone.ssh":
                host.write(disk, 2, 2, "raw")
            if action == "ln.ssh":
                assert host.content(disk, "raw") == {0: 1}
                host.write(disk, 3, 3, "raw")
        assert fe.content(new, "raw") == {0: 1, 3: 3}
        assert os.readlink(host.path(disk)) == str(new)
        assert hosts.on(where, f"{cloud.system}/.monitor").read_text() == "ssh\n"
        assert not parts(cloud.images, host.path(cloud.vm))
    hosts.end("host05")


def test_a_suffix_shows_in_help_and_messages(cloud: Cloud) -> None:
    for action in ("clone.ssh", "ln.ssh", "mvds.ssh", "cpds.ssh", "mv.ssh"):
        for driver in SHARED:
            done = run_action(f"tm/{driver}/{action}", "--help", env=cloud.env)
            assert f"usage: {action} " in done.stdout and "(3.4)" not in done.stdout
            done = run_action(f"tm/{driver}/{action}", env=cloud.env)
            assert done.status == 2 and f"ERROR: {action}: " in done.stderr


# -- taking over from the stock drivers, and giving back -----------------------------------------------------------


@pytest.mark.parametrize("driver", SHARED)
def test_a_vm_of_the_stock_driver_for_shared_storage(cloud: Cloud, node: str, driver: str) -> None:
    fe, image, pers = Machine(cloud.hosts, "fe"), cloud.images / "abc", cloud.images / "pers"
    fe.image(image)
    fe.image(pers)
    fe.stock_shared_clone(image, f"{cloud.vm}/disk.0")
    fe.stock_shared_ln(pers, f"{cloud.vm}/disk.1")
    for disk, home in ((f"{cloud.vm}/disk.0", ""), (f"{cloud.vm}/disk.1", pers)):
        fe.stock_snap_create(disk, 0, home)
        fe.write(disk, 1, 11)
    both = {"SIZE": 8, "ORIGINAL_SIZE": 8, "FORMAT": "qcow2"}
    cloud.documents = [
        vm_document(VM, {0: {**both, "CLONE": "YES", "SOURCE": image}, 1: {**both, "CLONE": "NO", "SOURCE": pers}})
    ]
    other = f"{cloud.hosts.datastores}/100/{VM}"
    for number in (0, 1):
        cloud.ok(f"tm/{driver}/mv", f"{node}:{cloud.vm}/disk.{number}", f"{node}:{other}/disk.{number}")
    cloud.ok(f"tm/{driver}/mv", f"{node}:{cloud.vm}", f"{node}:{other}")
    cloud.ok(f"tm/{driver}/mv", f"{node}:{other}", f"{node}:{cloud.vm}")
    assert fe.content(f"{cloud.vm}/disk.0") == fe.content(f"{cloud.vm}/disk.1") == {0: 1, 1: 11}
    for number in (0, 1):
        for snapshot, expected in (("-1", {0: 1, 1: 11}), ("0", {0: 1})):
            no_errors(cloud, f"tm/{driver}/cpds", f"{node}:{cloud.vm}/disk.{number}", f"{cloud.images}/new", snapshot)
            assert fe.content(cloud.images / "new") == expected
    cloud.ok(f"tm/{driver}/delete", f"{node}:{cloud.vm}/disk.0")
    cloud.ok(f"tm/{driver}/mvds", f"{node}:{cloud.vm}/disk.1", str(pers))
    cloud.ok(f"tm/{driver}/delete", f"{node}:{cloud.vm}")
    assert cloud.left() == []
    assert fe.content(f"{pers}.snap/1") == {0: 1, 1: 11}
    assert fe.tree(cloud.images, "pers")["pers.snap/1"] == f"on {pers}.snap/0 (qcow2)"
    # and back: the next VM's link is the one that the stock script makes
    cloud.ok(f"tm/{driver}/ln", f"fe:{pers}", f"{node}:{cloud.vm}/disk.1")
    ours = fe.tree(cloud.vm, "disk.1"), fe.tree(cloud.images, "pers")
    os.unlink(f"{cloud.vm}/disk.1")
    fe.stock_shared_ln(pers, f"{cloud.vm}/disk.1")
    assert ours == (fe.tree(cloud.vm, "disk.1"), fe.tree(cloud.images, "pers"))


@pytest.mark.parametrize("driver", ["local", "ssh"])
def test_a_vm_of_the_stock_driver_for_local_storage(cloud: Cloud, driver: str) -> None:
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, pers, raw = (cloud.images / name for name in ("abc", "pers", "raw"))
    fe.image(image)
    fe.image(pers)
    fe.image(raw, "raw")
    disks_of_vm: dict[int, dict[str, object]] = {}
    for number, (source, format) in enumerate(((image, "qcow2"), (pers, "qcow2"), (raw, "raw"))):
        disk = f"{cloud.vm}/disk.{number}"
        if format == "qcow2" and driver == "local":
            host.stock_local_clone(source, disk)
            host.stock_local_snap_create(disk, 0)
            # a hypervisor opens what the link leads to
            host.write(host.run("readlink", "-f", disk).strip(), 1, 11, format)
        else:
            os.makedirs(cloud.at("host01"), exist_ok=True)
            shutil.copyfile(source, host.path(disk))
            host.stock_raw_snap_create(disk, 0)
            host.write(disk, 1, 11, format)
        keeps = {"CLONE": "YES" if source == image else "NO", "SOURCE": source}
        disks_of_vm[number] = {"SIZE": 8, "ORIGINAL_SIZE": 8, "FORMAT": format, **keeps}
    cloud.documents = [vm_document(VM, disks_of_vm)]
    cloud.ok(f"tm/{driver}/mv", f"host01:{cloud.vm}", f"host02:{cloud.vm}")
    there = Machine(cloud.hosts, "host02")
    for number, format in enumerate(("qcow2", "qcow2", "raw")):
        for snapshot, expected in (("-1", {0: 1, 1: 11}), ("0", {0: 1})):
            no_errors(cloud, f"tm/{driver}/cpds", f"host02:{cloud.vm}/disk.{number}", f"{cloud.images}/new", snapshot)
            assert fe.content(cloud.images / "new", format) == expected
    cloud.ok(f"tm/{driver}/delete", f"host02:{cloud.vm}/disk.0")
    for number, source in ((1, pers), (2, raw)):
        cloud.ok(f"tm/{driver}/mvds", f"host02:{cloud.vm}/disk.{number}", str(source))
        assert fe.content(fe.top(source), ("qcow2", "qcow2", "raw")[number]) == {0: 1, 1: 11}
        assert fe.content(f"{source}.snap/0", ("qcow2", "qcow2", "raw")[number]) == {0: 1}
    if driver == "local":
        # as the stock script leaves it
        tree = fe.tree(cloud.images, "pers")
        assert tree.pop("pers.snap/1") == "on 0 (qcow2)"
        assert tree == {"pers": "-> pers.snap/1", "pers.snap": "directory", "pers.snap/0": "whole"}
    else:
        assert fe.tree(cloud.images, "pers") == {"pers": "whole", "pers.snap": "directory", "pers.snap/0": "whole"}
    cloud.ok(f"tm/{driver}/delete", f"host02:{cloud.vm}")
    assert [path for path in cloud.left() if "host02" in path] == []
    assert there.tree(cloud.system, "17") == {}


def test_the_stock_driver_can_go_on_with_our_local_disk(cloud: Cloud) -> None:
    """It names the file below without a directory, and takes the whole directory with it to another host.

    Into the image datastore it brings no links (`rsync -r`): files that need the one to the directory are lost there.
    """
    fe, host = Machine(cloud.hosts, "fe"), Machine(cloud.hosts, "host01")
    image, disk = cloud.images / "abc", f"{cloud.vm}/disk.0"
    fe.image(image)
    cloud.documents = [vm(CLONE="NO", SOURCE=image)]
    cloud.ok("tm/local/ln", f"fe:{image}", f"host01:{disk}")
    host.stock_local_snap_create(disk, 0)
    host.write(host.top(disk), 1, 11)
    cloud.ok("tm/local/snap_create", f"host01:{disk}", "1")
    host.write(host.top(disk), 2, 12)
    host.stock_local_snap_create(disk, 2)
    host.write(host.top(disk), 3, 13)
    content = {0: 1, 1: 11, 2: 12, 3: 13}
    assert host.content(host.top(disk)) == content
    os.mkdir(f"{image}.snap")
    for file in host.path(f"{disk}.snap").iterdir():
        if not file.is_symlink():
            shutil.copyfile(file, f"{image}.snap/{file.name}")
    image.unlink()
    fe.run("ln", "-sf", "abc.snap/3", image)
    assert fe.content(fe.top(image)) == content
    cloud.ok("tm/local/ln", f"fe:{image}", f"host02:{disk}")
    there = Machine(cloud.hosts, "host02")
    tree = there.tree(cloud.vm, "disk.0.snap/")
    assert list(tree.values()) == ["whole", "on 0 (qcow2)", "on 1 (qcow2)", "on 2 (qcow2)"]
    assert there.content(there.top(disk)) == content
