"""The transfer drivers on real hosts, over both transports and in both contract forms."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Done, Hosts, check_stderr, eventually, run_action, start_action
from dumps import datastore_document, front_end, vm_document

MIB = 1 << 20
VM = 17
FORMS = ["3.4", "current"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Cloud:
    """A VM directory on the hosts, an image datastore on the front-end, and actions in one form."""

    def __init__(self, hosts: Hosts, env: dict[str, str], form: str, work: Path) -> None:
        self.hosts, self.env, self.form, self.work = hosts, env, form, work
        self.images = Path(hosts.datastores, "1")
        self.system = f"{hosts.datastores}/0"
        self.vm = f"{self.system}/{VM}"
        self.documents: list[bytes] = []

    def image(self, name: str, content: bytes, size: int = 0) -> Path:
        self.images.mkdir(exist_ok=True)
        path = self.images / name
        path.write_bytes(content)
        if size:
            os.truncate(path, size)
        return path

    def argv(self, *arguments: str) -> list[str]:
        return [*arguments, *([str(VM), "0"] if self.form == "current" else [])]

    def run(self, action: str, *arguments: str, **env: str) -> Done:
        with front_end(self.work, *self.documents) as asked:
            done = run_action(action, *self.argv(*arguments), env={**self.env, **asked, **env})
        assert done.stdout == ""
        return done

    def ok(self, action: str, *arguments: str, **env: str) -> None:
        done = self.run(action, *arguments, **env)
        assert done.status == 0, done.stderr
        check_stderr(done, action)

    def fails(self, status: int, text: str, action: str, *arguments: str, **env: str) -> None:
        done = self.run(action, *arguments, **env)
        message = check_stderr(done, action, marks=self.form == "3.4")
        assert (done.status, text in message) == (status, True), done

    def at(self, host: str, *parts: str) -> Path:
        """A path of the VM directory on HOST ("fe": here), seen from this machine."""
        path = "/".join([self.vm, *parts])
        return Path(path) if host == "fe" else self.hosts.on(host, path)

    def left(self) -> list[str]:
        """Everything below the system datastore on all machines, but the marker that it is monitored there."""
        found = []
        for host in ("fe", *self.hosts.names):
            system = Path(self.system) if host == "fe" else self.hosts.on(host, self.system)
            found += [f"{host}:{path.relative_to(system)}" for path in system.rglob("*") if path.name != ".monitor"]
        return found


@pytest.fixture
def cloud(hosts: Hosts, env: dict[str, str], form: str, tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(hosts, env, form, tmp_path)
    yield made
    for place in (Path(hosts.datastores), *(hosts.on(name) for name in hosts.names)):
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)


def alone(hosts: Hosts, work: Path) -> Iterator[Cloud]:
    """For a fixture: a Cloud of today's form that nobody else uses, and of which no worker may be left."""
    made = Cloud(hosts, dict(hosts.env), "current", work)
    made.images.mkdir()
    yield made
    for name in hosts.names:
        assert eventually(lambda name=name: not hosts.workers(name)), f"workers are left on {name}"  # type: ignore[misc]
    for place in (Path(hosts.datastores), *(hosts.on(name) for name in hosts.names)):
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)


def disks(**elements: object) -> bytes:
    """The VM with a disk 0 that has these elements, and plain disks after it."""
    plain = {"SIZE": 1, "ORIGINAL_SIZE": 1, "FORMAT": "raw"}
    return vm_document(VM, {0: {**plain, **elements}, **dict.fromkeys(range(1, 6), plain)})


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("action", ["clone", "ln"])
def test_ssh_gives_a_vm_its_own_copy(cloud: Cloud, action: str) -> None:
    cloud.documents = [disks()]
    content = os.urandom(3 * MIB + 5) + bytes(2 * MIB) + b"end"
    image = cloud.image("abc", content, 40 * MIB)
    for _ in range(3):  # any action can be repeated
        cloud.ok(f"tm/ssh/{action}", f"fe:{image}", f"host01:{cloud.vm}//disk.0")
        disk = cloud.at("host01", "disk.0")
        assert disk.read_bytes() == image.read_bytes()
        assert disk.stat().st_blocks * 512 < 5 * MIB, "holes stay holes"
    assert mode(disk) == (0o660 if cloud.form == "3.4" else 0o644)
    marker = cloud.hosts.on("host01", f"{cloud.system}/.monitor")
    assert marker.exists() == (cloud.form == "current")
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.0"]


def test_today_a_clone_grows_to_what_the_vm_wants(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    cloud = Cloud(hosts, env, "current", tmp_path)
    raw = cloud.image("raw", os.urandom(MIB))
    qcow2 = cloud.images / "qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M"], check=True)
    for format, image in (("raw", raw), ("qcow2", qcow2)):
        cloud.documents = [disks(SIZE=7, FORMAT=format)]
        cloud.ok("tm/ssh/clone", f"fe:{image}", f"host01:{cloud.vm}/disk.0")
        said = hosts.run("host01", ["qemu-img", "info", "-f", format, f"{cloud.vm}/disk.0"]).decode()
        assert f"virtual size: 7 MiB ({7 * MIB} bytes)" in said
        assert cloud.at("host01", "disk.0").stat().st_blocks * 512 < 2 * MIB
    cloud.documents = [disks(SIZE=7, FORMAT="qcow2")]
    cloud.fails(41, "FORMAT", "tm/ssh/clone", f"fe:{raw}", f"host01:{cloud.vm}/disk.0")
    subprocess.run(["rm", "-rf", cloud.images], check=True)
    cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}")
    assert cloud.left() == []


def test_today_the_front_end_is_asked_and_its_answers_are_told(cloud: Cloud) -> None:
    if cloud.form == "3.4":
        return  # there is nobody to ask, which the other tests show: they set no document
    image, disk = cloud.image("abc", b"x"), f"host01:{cloud.vm}/disk.0"
    cloud.fails(30, "Error getting vm [17]", "tm/ssh/clone", f"fe:{image}", disk)
    cloud.documents = [vm_document(VM, {1: {"SIZE": 1}})]
    cloud.fails(30, f"VM {VM} has no disk 0", "tm/ssh/clone", f"fe:{image}", disk)
    cloud.fails(10, "front-end does not answer", "tm/ssh/clone", f"fe:{image}", disk, ONE_XMLRPC="http://127.0.0.1:1/")
    assert cloud.left() == []


@pytest.mark.parametrize("action", ["clone", "ln"])
def test_a_replica_host_is_told_to_change_nothing(cloud: Cloud, action: str) -> None:
    """It is not refused: VMs of a datastore that was taken over have it."""
    image, disk = cloud.image("abc", b"x"), f"host01:{cloud.vm}/disk.0"
    for attributes in ({}, {"REPLICA_HOST": "host02"}):
        cloud.documents = [disks(), datastore_document(0, attributes), datastore_document(1, {"REPLICA_HOST": "x"})]
        done = cloud.run(f"tm/ssh/{action}", f"fe:{image}", disk)
        assert done.status == 0
        told = done.stderr.count(f"WARN: {action}: REPLICA_HOST is not supported by this driver yet; images are copied")
        assert told == (1 if attributes and cloud.form == "current" else 0), done
        assert cloud.at("host01", "disk.0").read_bytes() == b"x"


@pytest.mark.parametrize(("value", "told"), [("YES", 1), ("NO", 0), ("", 0)])
def test_a_cache_of_images_is_told_to_change_nothing(
    hosts: Hosts, env: dict[str, str], tmp_path: Path, value: str, told: int
) -> None:
    cloud = Cloud(hosts, env, "current", tmp_path)  # in which all disks are of the image datastore 0
    image, disk = cloud.image("abc", b"x"), f"host01:{cloud.vm}/disk.0"
    cloud.documents = [disks(), datastore_document(0, {"CACHE_ENABLE": value})]
    for action, wanted in (("clone", told), ("ln", 0)):  # a persistent image was never kept on hosts
        done = cloud.run(f"tm/local/{action}", f"fe:{image}", disk)
        assert done.status == 0
        assert done.stderr.count(f"WARN: {action}: CACHE_ENABLE is not supported by this driver yet;") == wanted, done
    subprocess.run(["rm", "-rf", cloud.images, cloud.at("host01")], check=True)


def test_kernel_and_initrd_are_copied_as_they_are(cloud: Cloud) -> None:
    image = cloud.image("kernel", os.urandom(1000))
    for name in ("kernel", "initrd"):
        cloud.ok("tm/ssh/clone", f"fe:{image}", f"host01:{cloud.vm}/{name}")
        assert cloud.at("host01", name).read_bytes() == image.read_bytes()


def test_a_missing_image_leaves_nothing(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    missing = f"{cloud.images}/missing"
    cloud.fails(30, missing, "tm/ssh/clone", f"fe:{missing}", f"host01:{cloud.vm}/disk.0")
    assert cloud.left() == []


def test_a_host_that_is_down_is_named(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    image = cloud.image("abc", b"x")
    cloud.hosts.add("host09")
    cloud.hosts.end("host09")
    cloud.fails(10, "host09 cannot be reached", "tm/ssh/clone", f"fe:{image}", f"host09:{cloud.vm}/disk.0")
    cloud.fails(10, "host09", "tm/ssh/delete", f"host09:{cloud.vm}")


def test_a_full_disk_leaves_nothing(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    cloud.hosts.add("host08", size="8m")
    image = cloud.image("abc", os.urandom(20 * MIB))
    cloud.fails(12, "MiB are needed", "tm/ssh/clone", f"fe:{image}", f"host08:{cloud.vm}/disk.0")
    assert list(cloud.hosts.on("host08").rglob("*")) in ([], [cloud.hosts.on("host08", cloud.system)])
    cloud.hosts.end("host08")


def test_volatile_disks(cloud: Cloud) -> None:
    cloud.documents = [vm_document(VM, {0: {}, 1: {"FS": "ext4"}, 2: {"FS": ""}, 3: {"FS": "ext4"}})]
    cloud.ok("tm/ssh/mkswap", "16", f"host01:{cloud.vm}/disk.0")
    if cloud.form == "3.4":
        cloud.ok("tm/ssh/mkimage", "32", "ext4", f"host01:{cloud.vm}/disk.1")
        cloud.ok("tm/ssh/mkimage", "8", "raw", f"host01:{cloud.vm}/disk.2")
    else:
        cloud.ok("tm/ssh/mkimage", "32", "raw", f"host01:{cloud.vm}/disk.1")
        cloud.ok("tm/ssh/mkimage", "8", "raw", f"host01:{cloud.vm}/disk.2")
        cloud.ok("tm/ssh/mkimage", "32", "qcow2", f"host01:{cloud.vm}/disk.3")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir("/")
            raw = cloud.work / "raw"
            source = cloud.at("host01", "disk.3")
            subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, raw], check=True)
        assert filesystem(raw) == "ext4"
    swap, fs, plain = (cloud.at("host01", f"disk.{number}") for number in range(3))
    assert (filesystem(swap), swap.stat().st_size) == ("swap", 16 * MIB)
    assert (filesystem(fs), fs.stat().st_size) == ("ext4", 32 * MIB)
    assert (filesystem(plain), plain.stat().st_size, plain.stat().st_blocks) == ("", 8 * MIB, 0)
    cloud.fails(20 if cloud.form == "current" else 2, "nosuchfs", *volatile(cloud, "nosuchfs; id"))
    assert not [path for path in cloud.left() if ".part" in path or "disk.5" in path]


def volatile(cloud: Cloud, fs: str) -> tuple[str, ...]:
    """A mkimage of disk.5 with the file system FS."""
    cloud.documents = [vm_document(VM, {5: {"FS": fs}})]
    return ("tm/ssh/mkimage", "32", fs if cloud.form == "3.4" else "raw", f"host01:{cloud.vm}/disk.5")


def filesystem(path: Path) -> str:
    argv = ["/usr/sbin/blkid", "-p", "-s", "TYPE", "-o", "value", str(path)]
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip()


def test_context_makes_an_iso_and_replaces_it(cloud: Cloud) -> None:
    script, named = cloud.work / "context.sh", cloud.work / "a b=c\\d"
    named.write_bytes(b"named")
    for text in ("first", "second"):
        script.write_text(text)
        cloud.ok("tm/ssh/context", str(script), f"{named}:init.sh", str(named), f"host01:{cloud.vm}/disk.3")
        disk = cloud.at("host01", "disk.3")
        assert filesystem(disk) == "iso9660"
        assert isofile(disk, "context.sh") == text.encode()
        assert isofile(disk, "init.sh") == b"named"
        assert isofile(disk, "a b=c\\d") == b"named"
    label = subprocess.run(
        ["/usr/sbin/blkid", "-p", "-s", "LABEL", "-o", "value", disk], capture_output=True, text=True
    )
    assert label.stdout.strip() == "CONTEXT"
    second = cloud.at("host01", "disk.3.iso")
    assert second.is_symlink() == (cloud.form == "3.4")
    cloud.fails(30, "/no/such", "tm/ssh/context", "/no/such", f"host01:{cloud.vm}/disk.3")
    cloud.fails(13, "cannot reach", "tm/ssh/context", "http://127.0.0.1:1/x", f"host01:{cloud.vm}/disk.3")
    assert isofile(disk, "context.sh") == b"second"
    assert not [path for path in cloud.left() if ".part" in path]


def isofile(iso: Path, name: str) -> bytes:
    """A file of an ISO image by its Rock Ridge name."""
    argv = ["isoinfo", "-R", "-i", str(iso), "-x", f"/{name}"]
    return subprocess.run(argv, capture_output=True, check=True).stdout


def test_mv_takes_the_directory_from_host_to_host(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    content = os.urandom(5 * MIB)
    source = cloud.at("host01")
    (source / "sub").mkdir(parents=True)
    (source / "disk.0").write_bytes(content)
    os.truncate(source / "disk.0", 30 * MIB)
    (source / "disk.0").chmod(0o640)
    (source / "sub" / "a b;$(id)'\n*").write_bytes(b"hostile name")
    (source / "disk.1").symlink_to("/somewhere/else")
    (source / "empty").touch()
    subprocess.run(["mkfifo", source / "monitor"], check=True)
    disk = ("tm/ssh/mv", f"host01:{cloud.vm}/disk.0", f"host02:{cloud.vm}/disk.0")
    cloud.ok(*disk)
    assert (source / "disk.0").exists(), "the directory takes its disks with it"
    whole = ("tm/ssh/mv", f"host01:{cloud.vm}/", f"host02:{cloud.vm}/")
    for _ in range(2):
        cloud.ok(*whole)
        target = cloud.at("host02")
        assert (target / "disk.0").read_bytes() == content + bytes(25 * MIB)
        assert (target / "disk.0").stat().st_blocks * 512 < 6 * MIB
        assert mode(target / "disk.0") == 0o640
        assert (target / "sub" / "a b;$(id)'\n*").read_bytes() == b"hostile name"
        assert os.readlink(target / "disk.1") == "/somewhere/else"
        assert (target / "empty").stat().st_size == 0
        assert not cloud.at("host01").exists()
    assert all(path.startswith("host02:") for path in cloud.left())


def test_mv_to_the_front_end_and_back(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    content = os.urandom(MIB)
    cloud.at("host01").mkdir(parents=True)
    cloud.at("host01", "disk.0").write_bytes(content)
    for origin, target in (("host01", "fe"), ("fe", "host02")):
        cloud.ok("tm/ssh/mv", f"{origin}:{cloud.vm}", f"{target}:{cloud.vm}")
        assert cloud.at(target, "disk.0").read_bytes() == content
        assert not cloud.at(origin).exists()


def test_mv_replaces_what_an_earlier_try_left(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    cloud.at("host01").mkdir(parents=True)
    cloud.at("host01", "disk.0").write_bytes(b"new")
    cloud.at("host02").mkdir(parents=True)
    cloud.at("host02", "disk.0").write_bytes(b"old")
    cloud.at("host02", "disk.9").write_bytes(b"old")
    cloud.ok("tm/ssh/mv", f"host01:{cloud.vm}", f"host02:{cloud.vm}")
    assert cloud.left() == [f"host02:{VM}", f"host02:{VM}/disk.0"]
    assert cloud.at("host02", "disk.0").read_bytes() == b"new"


def test_mv_again_removes_what_a_kill_left_of_the_source(cloud: Cloud) -> None:
    """The whole is at its target, and the worker was killed in the middle of removing the source."""
    cloud.documents = [disks()]
    for host, name in (("host02", str(VM)), ("host01", f".{VM}.gone.part"), ("host01", ".gone.part"), ("host01", "8")):
        directory = cloud.at(host).parent / name
        directory.mkdir(parents=True)
        (directory / "disk.0").write_bytes(b"disk")
    cloud.ok("tm/ssh/mv", f"host01:{cloud.vm}", f"host02:{cloud.vm}")
    left = sorted(path.name for path in cloud.at("host01").parent.iterdir())
    assert left == [".gone.part", "8"]  # and nothing of anybody else
    assert cloud.at("host02", "disk.0").read_bytes() == b"disk"
    for name in left:
        shutil.rmtree(cloud.at("host01").parent / name)


def test_mv_of_nothing_to_nowhere_is_told(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    cloud.fails(30, "neither does", "tm/ssh/mv", f"host01:{cloud.vm}", f"host02:{cloud.vm}")
    assert cloud.left() == []


def test_mv_between_machines_that_share_the_directory_moves_nothing(cloud: Cloud) -> None:
    """Found out by a probe: the names differ, and in 3.4 the paths may too."""
    cloud.documents = [disks()]
    for name in ("node1", "node2"):
        cloud.hosts._rig("add", name)  # no file systems of their own: they see the front-end's
    cloud.at("fe").mkdir(parents=True)
    cloud.at("fe", "disk.0").write_bytes(b"shared")
    inode = cloud.at("fe", "disk.0").stat().st_ino
    cloud.ok("tm/ssh/mv", f"node1:{cloud.vm}", f"node2:{cloud.vm}")
    cloud.ok("tm/ssh/mv", f"node1:{cloud.vm}", f"fe:{cloud.vm}")
    other = cloud.work / "mounted"
    other.symlink_to(cloud.system)
    cloud.ok("tm/ssh/mv", f"node1:{cloud.vm}", f"node2:{other}/{VM}")
    cloud.ok("tm/ssh/mv", f"fe:{cloud.vm}", f"fe:{other}/{VM}")
    assert cloud.at("fe", "disk.0").stat().st_ino == inode
    assert cloud.left() == [f"fe:{VM}", f"fe:{VM}/disk.0"]
    # Another system datastore on the same storage: a rename, by the machine that sees both.
    new = Path(cloud.hosts.datastores, "100", str(VM))
    cloud.ok("tm/shared/mv", f"node1:{cloud.vm}", f"node2:{new}")
    assert (new / "disk.0").stat().st_ino == inode
    assert cloud.left() == []
    for name in ("node1", "node2"):
        cloud.hosts.end(name)


def test_today_nothing_moves_away_from_a_dead_host(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    cloud = Cloud(hosts, env, "current", tmp_path)
    cloud.documents = [vm_document(VM, {}, lcm_state=60)]
    cloud.ok("tm/ssh/mv", f"host77:{cloud.vm}", f"host02:{cloud.vm}")


def test_mvds_brings_a_disk_back_and_knows_that_it_did(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    image = cloud.image("abc", b"before")
    cloud.at("host01").mkdir(parents=True)
    content = os.urandom(2 * MIB)
    cloud.at("host01", "disk.1").write_bytes(content)
    for _ in range(2):
        cloud.ok("tm/ssh/mvds", f"host01:{cloud.vm}/disk.1", str(image))
        assert image.read_bytes() == content
        assert os.readlink(cloud.at("host01", "disk.1")) == str(image)
    assert os.listdir(cloud.images) == ["abc"]
    cloud.fails(30, "disk.2 does not exist", "tm/ssh/mvds", f"host01:{cloud.vm}/disk.2", str(image))
    cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}")
    cloud.ok("tm/ssh/mvds", f"host01:{cloud.vm}/disk.1", f"fe:{image}")  # the whole script again
    assert image.read_bytes() == content
    assert cloud.left() == []


def test_mvds_of_a_stopped_vm_renames(cloud: Cloud) -> None:
    cloud.documents = [disks()]
    image = cloud.image("abc", b"before")
    cloud.at("fe").mkdir(parents=True)
    cloud.at("fe", "disk.1").write_bytes(b"after")
    inode = cloud.at("fe", "disk.1").stat().st_ino
    for _ in range(2):
        cloud.ok("tm/ssh/mvds", f"fe:{cloud.vm}/disk.1", str(image))
        assert (image.read_bytes(), image.stat().st_ino) == (b"after", inode)
    assert os.listdir(cloud.images) == ["abc"]


def test_delete_of_a_disk_and_of_the_directory(cloud: Cloud) -> None:
    cloud.at("host01").mkdir(parents=True)
    for name in ("disk.1", "disk.10", "disk.1.iso", ".disk.1.stream.part"):
        cloud.at("host01", name).touch()
    cloud.at("host01", "disk.1.snap").mkdir()
    cloud.at("host01", "disk.1.snap", "0").touch()
    for _ in range(2):
        cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}/disk.1")
        assert os.listdir(cloud.at("host01")) == ["disk.10"]
    for _ in range(2):
        cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}/")
        assert cloud.left() == []
    outside = cloud.hosts.on("host01", f"{cloud.hosts.datastores}/keep")
    outside.mkdir()
    (outside / "file").touch()
    cloud.hosts.on("host01", cloud.vm).symlink_to(outside)
    cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}")
    assert (outside / "file").exists(), "a link goes, not what it leads to"


def test_cpds_copies_a_disk_and_keeps_it(hosts: Hosts, env: dict[str, str], tmp_path: Path) -> None:
    cloud = Cloud(hosts, env, "current", tmp_path)
    cloud.documents = [disks(FORMAT="qcow2")]
    cloud.images.mkdir()
    cloud.at("host01").mkdir(parents=True)
    base, disk = cloud.at("host01", "base"), cloud.at("host01", "disk.0")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1M"], check=True)
    disk.write_bytes(base.read_bytes())
    new = cloud.images / "new"
    for _ in range(2):
        cloud.ok("tm/ssh/cpds", f"host01:{cloud.vm}/disk.0", str(new), "-1")
        assert new.read_bytes() == disk.read_bytes() == base.read_bytes()
    cloud.fails(30, "there is no snapshot 0", "tm/ssh/cpds", f"host01:{cloud.vm}/disk.0", str(new), "0")
    cloud.fails(2, "not a disk", "tm/ssh/cpds", f"host01:{cloud.vm}/kernel", str(new), "-1")
    cloud.documents = [vm_document(VM, {0: {"FORMAT": "raw"}}, lcm_state=26)]
    cloud.fails(24, "running", "tm/ssh/cpds", f"host01:{cloud.vm}/disk.0", str(new), "-1")
    assert os.listdir(cloud.images) == ["new"]
    subprocess.run(["rm", "-rf", cloud.images, cloud.at("host01")], check=True)


def test_34_takes_a_directory_as_an_image_and_a_url_as_a_source(
    hosts: Hosts, env: dict[str, str], tmp_path: Path
) -> None:
    cloud = Cloud(hosts, env, "3.4", tmp_path)
    directory = cloud.images / "abc"
    directory.mkdir(parents=True)
    (directory / "disk.vmdk").write_bytes(b"content")
    for _ in range(2):
        cloud.ok("tm/ssh/clone", f"fe:{directory}", f"host01:{cloud.vm}/disk.0")
        assert cloud.at("host01", "disk.0", "disk.vmdk").read_bytes() == b"content"
    cloud.at("host01", "disk.0", "disk.vmdk").write_bytes(b"changed")
    for _ in range(2):
        cloud.ok("tm/ssh/mvds", f"host01:{cloud.vm}/disk.0", str(directory))
        assert (directory / "disk.vmdk").read_bytes() == b"changed"
    (tmp_path / "served").write_bytes(b"from the web")
    argv = ["/usr/bin/python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        port = server.stdout.readline().split("port ")[1].split()[0]
        cloud.ok("tm/ssh/clone", f"http://127.0.0.1:{port}/served", f"host01:{cloud.vm}/disk.1")
        assert cloud.at("host01", "disk.1").read_bytes() == b"from the web"
        cloud.fails(13, "404", "tm/ssh/clone", f"http://127.0.0.1:{port}/no", f"host01:{cloud.vm}/disk.2")
        server.kill()
    assert not cloud.at("host01", "disk.2").exists()
    cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}")
    assert cloud.left() == []
    subprocess.run(["rm", "-rf", cloud.images], check=True)


@pytest.mark.parametrize("way", ["clone", "ln"])
def test_shared_storage(cloud: Cloud, way: str) -> None:
    """node1 sees the front-end's datastores: in 3.4 somewhere else than the front-end does."""
    cloud.documents = [disks()]
    cloud.hosts._rig("add", "node1")
    elsewhere = cloud.work / "elsewhere"
    elsewhere.symlink_to(cloud.hosts.datastores)
    there = f"{elsewhere if cloud.form == '3.4' else cloud.hosts.datastores}/0/{VM}"
    image = cloud.image("abc", b"content")
    disk = cloud.at("fe", "disk.0")
    for _ in range(2):
        cloud.ok(f"tm/shared/{way}", f"fe:{image}", f"node1:{there}/disk.0")
        assert disk.read_bytes() == b"content"
        assert disk.is_symlink() == (way == "ln")
    if way == "ln":
        assert os.readlink(disk) == ("../../1/abc" if cloud.form == "3.4" else str(image))
    disk.write_bytes(b"changed")
    for _ in range(2):
        cloud.ok("tm/shared/mv", f"node1:{there}/disk.0", f"fe:{cloud.vm}/disk.0")
        cloud.ok("tm/shared/mv", f"node1:{there}", f"fe:{cloud.vm}")
    for _ in range(2):
        cloud.ok("tm/shared/mvds", f"node1:{there}/disk.0", str(image))
        assert image.read_bytes() == b"changed"
        assert not image.is_symlink()
    cloud.ok("tm/shared/mkswap", "1", f"node1:{there}/disk.2")
    cloud.ok("tm/shared/delete", f"node1:{there}/disk.0")
    cloud.ok("tm/shared/delete", f"node1:{there}")
    assert image.read_bytes() == b"changed"
    assert cloud.left() == []
    cloud.fails(30, "missing", f"tm/shared/{way}", f"fe:{image.parent}/missing", f"node1:{there}/disk.0")
    assert not [path for path in cloud.left() if path != f"fe:{VM}"]
    cloud.hosts.end("node1")


def test_a_delete_ends_the_clone_that_its_front_end_has_given_up(cloud: Cloud) -> None:
    """The script is still there, or was killed: either way the disk is gone after the delete, and stays gone."""
    cloud.documents = [disks()]
    image = cloud.image("big", os.urandom(160 * MIB))
    vm = cloud.at("host01")
    for killed in (True, False):
        with front_end(cloud.work, *cloud.documents) as asked:
            env = {**cloud.env, **asked}
            clone = start_action("tm/ssh/clone", *cloud.argv(f"fe:{image}", f"host01:{cloud.vm}/disk.0"), env=env)
            while not list(vm.glob(".disk.0.stream*.part")):
                assert clone.poll() is None, "too fast to be caught: a larger image is needed"
            if killed:
                clone.kill()
            cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}")
            assert cloud.left() == []
            clone.communicate(timeout=60)
        assert clone.returncode in ((-9,) if killed else (143, 32, 10)), clone.returncode
        assert cloud.left() == []
        assert not cloud.hosts.workers("host01")
    for name in os.listdir(cloud.env["MADRIGAL_RUN_DIR"]):
        assert not (name.endswith(".running") and cloud.vm.replace("/", "%") in name), name


def test_dummy_does_nothing_but_checks_its_arguments(form: str, hosts: Hosts, tmp_path: Path) -> None:
    cloud = Cloud(hosts, dict(hosts.env), form, tmp_path)
    vm = f"host01:{cloud.vm}"
    for action, arguments in {
        "clone": ["fe:dummy_path", f"{vm}/disk.0"],
        "ln": ["fe:dummy_path", f"{vm}/disk.0"],
        "mv": [vm, f"host02:{cloud.vm}"],
        "mvds": [f"{vm}/disk.0", "dummy_path"],
        "delete": [vm],
        "mkimage": ["1", "raw", f"{vm}/disk.0"],
        "mkswap": ["1", f"{vm}/disk.0"],
        "context": ["/no/such/file", f"{vm}/disk.0"],
        **({"cpds": [f"{vm}/disk.0", "dummy_path", "-1"]} if form == "current" else {}),
    }.items():
        cloud.ok(f"tm/dummy/{action}", *arguments)
        done = run_action(f"tm/dummy/{action}", env=hosts.env)
        assert (done.status, "usage: " + action in check_stderr(done, action)) == (2, True)
    assert cloud.left() == []
