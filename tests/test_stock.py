"""What stock transfer and datastore drivers get wrong, by the executables: what is the subject of no other test.

The names say where it is known from: `trap_tm` and `trap_ds` from the contracts, `seen` from drivers under a running
front-end, each with its number there, and `weak` from their code.  Sources are in test_source_stock, running VMs in
test_guest, and most of the rest is in the tests of the actions themselves, whose docstrings say so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREE, Done, Hosts, check_stderr, run_action, start_action
from dumps import REGTIME, dump, vm_document
from test_chain import Image
from test_datastore import Store
from test_tm import MIB, VM, Cloud, alone, disks, isofile

from madrigal import drivers
from madrigal.embedded import DiskRequest, FrontEnd
from madrigal.host import Host

HOSTILE = "a b;$(touch canary)'\"*`touch canary`"
"""A name that a shell would do something with."""


@pytest.fixture
def cloud(hosts: Hosts, tmp_path: Path) -> Iterator[Cloud]:
    yield from alone(hosts, tmp_path)


@pytest.fixture
def old(cloud: Cloud) -> Cloud:
    """The same under a 3.4 front-end."""
    cloud.form = "3.4"
    return cloud


# -- what front-ends do --------------------------------------------------------------------------------------------


def test_trap_tm_1_a_suffix_stays_for_disks_that_it_is_not_for(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of shared storage, then one of the system datastore's own driver and a volatile one, which get it too."""
    for name, value in cloud.env.items():
        if name not in ("PATH", "ONE_LOCATION"):
            monkeypatch.setenv(name, value)
    shutil.rmtree(cloud.images)
    with FrontEnd(str(tmp_path / "state"), "current", str(TREE), cloud.hosts.datastores, hostname="fe") as fe:
        for host in cloud.hosts.names:
            fe.hosts.create(host)
        fe.datastores.update("system", tm_mad="ssh")
        for tm_mad in ("shared", "ssh"):
            fe.datastores.create(f"images {tm_mad}", tm_mad=tm_mad)
            (tmp_path / tm_mad).write_bytes(tm_mad.encode() * 1000)
            fe.images.create(tm_mad, f"images {tm_mad}", path=str(tmp_path / tm_mad), persistent=True)
        requests = [DiskRequest(image="shared"), DiskRequest(image="ssh"), DiskRequest(type="swap", size=1)]
        vm = fe.vms.create("vm", requests)
        fe.vms.deploy(vm.id, "host01")
        fe.vms.migrate(vm.id, "host02")
        host, _, directory = fe.vms.place(fe.vms.get(vm.id)).partition(":")
        assert host == "host02"
        for number, tm_mad in enumerate(("shared", "ssh")):
            path = cloud.hosts.on("host02", f"{directory}/disk.{number}")
            assert path.read_bytes().rstrip(b"\0") == tm_mad.encode() * 1000
            with path.open("r+b") as file:
                file.write(b"written by the VM")
        fe.vms.shutdown(vm.id)
        verbs = [
            [line.split()[:2] for line in path.read_text().splitlines() if line.startswith("MV")]
            for path in sorted((tmp_path / "state").rglob("transfer.*.migrate"))
        ]
        assert verbs == [[["MV.ssh", "shared"], ["MV.ssh", "ssh"], ["MV.ssh", "ssh"], ["MV", "ssh"]]]
        for tm_mad in ("shared", "ssh"):
            record = fe.images.get(tm_mad)
            assert Path(record.source).read_bytes().startswith(b"written by the VM")
            fe.images.delete(record.id)
    left = [p for host in ("fe", *cloud.hosts.names) for p in cloud.at(host).parent.parent.rglob("*") if p.is_file()]
    assert not [path for path in left if path.name != ".monitor"]


@pytest.mark.parametrize("driver", drivers.load(str(TREE)), ids=lambda driver: driver.path)
def test_trap_tm_1_variants_are_only_for_suffixes_that_a_front_end_was_told_of(driver: drivers.Driver) -> None:
    """One that applies to its own driver, or to none, would run where the plain action should."""
    for name in driver.actions:
        suffix = name.partition(".")[2]
        assert not suffix or (suffix in driver.tm_mad_system and suffix != driver.name)


OF_DATASTORES = ["cp", "mkfs", "rm", "clone", "stat", "monitor", "snap_delete", "snap_revert", "snap_flatten", "export"]
OF_DISKS = ["clone", "ln", "mv", "mvds", "cpds", "delete", "resize", "snap_create", "snap_create_live", "snap_delete"]
OF_DISKS += ["snap_revert", "premigrate", "postmigrate", "failmigrate"]
OF_VOLATILE = ["mkimage", "mkswap", "context"]
OF_BACKUPS = ["prebackup", "prebackup_live", "postbackup", "postbackup_live", "restore"]


def test_trap_ds_6_an_executable_that_is_not_there_is_only_a_status_of_the_shell() -> None:
    """So each is there, if only to say in a sentence that the driver cannot do it."""
    for name in ("fs", "dev", "dummy"):
        have = os.listdir(TREE / "datastore" / name)
        assert not [action for action in OF_DATASTORES if action not in have], name
    for name in ("ssh", "local", "shared", "qcow2", "dev", "dummy"):
        needed = (
            OF_DISKS + (OF_VOLATILE if name != "dev" else []) + (OF_BACKUPS if name not in ("dev", "dummy") else [])
        )
        needed += ["monitor"] if name in ("shared", "qcow2", "dummy") else []
        needed += ["monitor_ds"] if name in ("ssh", "local") else []
        have = os.listdir(TREE / "tm" / name)
        assert not [action for action in needed if action not in have], name


# -- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["tm/shared/clone", "tm/qcow2/clone"])
def test_trap_tm_7_a_raw_copy_that_breaks_off_is_not_taken_for_one_that_was_resized(cloud: Cloud, action: str) -> None:
    """There is room for half of it, and for the holes behind it."""
    cloud.hosts.add("host08", size="12m")
    there = cloud.hosts.on("host08")
    (there / "1").mkdir()
    (there / "1/abc").write_bytes(os.urandom(8 * MIB))
    cloud.documents = [disks(SIZE=100, ORIGINAL_SIZE=8)]
    cloud.fails(12, "", action, f"fe:{cloud.images}/abc", f"host08:{cloud.vm}/disk.0")
    assert [path.name for path in there.rglob("*") if path.is_file()] == ["abc"]
    cloud.hosts.end("host08")


def test_trap_tm_9_a_swap_disk_that_was_not_made_is_not_reported_as_one(old: Cloud) -> None:
    old.hosts.run("host01", ["touch", f"{old.hosts.datastores}/0"])
    old.fails(31, "is not a directory", "tm/ssh/mkswap", "16", f"host01:{old.vm}/disk.1")
    old.hosts.add("host09")
    old.hosts.end("host09")
    old.fails(10, "host09", "tm/ssh/mkswap", "16", f"host09:{old.vm}/disk.1")


@pytest.mark.parametrize("driver", ["ssh", "local"])
def test_seen_5_a_move_keeps_what_is_at_its_target_when_there_is_no_source(cloud: Cloud, driver: str) -> None:
    """And marks the system datastore as one that hosts measure, where their probe looks for it: not a level above."""
    cloud.documents = [disks()]
    cloud.at("host01").mkdir(parents=True)
    cloud.at("host01", "disk.0").write_bytes(b"disk")
    for _ in range(2):  # the second time there is none
        cloud.ok(f"tm/{driver}/mv", f"host01:{cloud.vm}", f"host02:{cloud.vm}")
        assert cloud.at("host02", "disk.0").read_bytes() == b"disk"
        assert cloud.hosts.on("host02", f"{cloud.system}/.monitor").read_text() == "ssh\n"
        assert not cloud.hosts.on("host02", f"{cloud.hosts.datastores}/.monitor").exists()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("driver", ["ssh", "local", "shared"])
def test_weak_a_path_is_a_path_whatever_is_in_it(cloud: Cloud, driver: str, format: str) -> None:
    """Every action of a disk, below a directory with a hostile name, beside files with such names."""
    where = "host01" if driver != "shared" else "fe"
    root = f"{cloud.hosts.datastores}/{HOSTILE}"
    there = cloud.hosts.on("host01") if where == "host01" else Path(cloud.hosts.datastores)
    image, vm = Path(root, "1", HOSTILE), f"{root}/0/{VM}"
    image.parent.mkdir(parents=True)
    persistent = {"FORMAT": format, "CLONE": "NO", "SOURCE": image}
    clone = {"FORMAT": format, "SIZE": 2, "ORIGINAL_SIZE": 1}
    cloud.documents = [vm_document(VM, {0: clone, 1: {}, 2: {"FS": "ext4"}, 4: persistent})]
    subprocess.run(["qemu-img", "create", "-q", "-f", format, image, "1M"], check=True, cwd="/")
    context = cloud.work / HOSTILE.replace(":", "")
    context.write_text("context")
    disk = f"{where}:{vm}/disk.0"
    cloud.ok(f"tm/{driver}/clone", f"fe:{image}", disk)
    cloud.ok(f"tm/{driver}/ln", f"fe:{image}", f"{where}:{vm}/disk.4")
    cloud.ok(f"tm/{driver}/mkswap", "1", f"{where}:{vm}/disk.1")
    cloud.ok(f"tm/{driver}/mkimage", "16", "raw", f"{where}:{vm}/disk.2")
    cloud.ok(f"tm/{driver}/context", str(context), f"{where}:{vm}/disk.3")
    cloud.ok(f"tm/{driver}/snap_create", disk, "0")
    # stock snap_delete makes a command of the names that it finds there
    (there / f"{HOSTILE}/0/{VM}/disk.0.snap/{HOSTILE}").write_bytes(b"x")
    (there / f"{HOSTILE}/0/{VM}/disk.0.snap/1;touch canary").write_bytes(b"x")
    cloud.ok(f"tm/{driver}/snap_create", disk, "1")
    cloud.ok(f"tm/{driver}/snap_revert", disk, "0")
    cloud.ok(f"tm/{driver}/snap_delete", disk, "1")
    cloud.ok(f"tm/{driver}/snap_delete", disk, "0")
    cloud.ok(f"tm/{driver}/resize", disk, "3")
    cloud.ok(f"tm/{driver}/cpds", disk, f"{image.parent}/saved", "-1")
    if where == "host01":
        cloud.ok(f"tm/{driver}/mv", f"host01:{vm}", f"host02:{vm}")
        where = "host02"
    cloud.ok(f"tm/{driver}/mvds", f"{where}:{vm}/disk.4", str(image))
    for name in ("disk.0", "disk.1", "disk.2", "disk.4", ""):
        cloud.ok(f"tm/{driver}/delete", f"{where}:{vm}/{name}".rstrip("/"))
    places = [Path(cloud.hosts.work), *(cloud.hosts.on(name) for name in cloud.hosts.names)]
    assert not [path for place in places for path in place.rglob("canary*")]
    assert not [path for place in places[1:] for path in (place / HOSTILE / "0").glob(f"{VM}*")]


def test_weak_two_contexts_of_one_vm_do_not_meet(cloud: Cloud) -> None:
    """Stock drivers build both in one directory, which others can read; the disk is one of them, whole."""
    texts = {name: os.urandom(300 << 10) for name in ("one", "two", "three", "four")}
    begun = []
    for name, text in texts.items():
        (cloud.work / name).mkdir()
        (cloud.work / name / "context.sh").write_bytes(text)
        (cloud.work / name / f"{name}.txt").write_text(name)
        files = [str(cloud.work / name / file) for file in ("context.sh", f"{name}.txt")]
        argv = cloud.argv(*files, f"host01:{cloud.vm}/disk.3")
        begun.append(start_action("tm/ssh/context", *argv, env=cloud.env))
    for process in begun:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    disk = cloud.at("host01", "disk.3")
    found = [name for name, text in texts.items() if isofile(disk, "context.sh") == text]
    assert len(found) == 1 and isofile(disk, f"{found[0]}.txt").decode() == found[0]
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.3"]
    assert not list(Path(cloud.hosts.datastores).rglob("*.isofiles*")) and not os.listdir(cloud.env["TMPDIR"])


@pytest.mark.parametrize("form", ["3.4", "current"])
def test_weak_what_a_disk_is_made_of_is_a_path_or_on_the_web(cloud: Cloud, form: str) -> None:
    """Nobody says which files of hosts a context may have, or a clone: the datastore's directories are not asked."""
    cloud.form = form
    cloud.documents = [disks()]
    cloud.hosts.on("host02", f"{cloud.hosts.datastores}/secret").write_text("hush")
    disk = f"{cloud.vm}/disk.3"
    for url in ("ssh://host02:", "SSH://host02:", "ssh://localhost:", "file://", "s3://bucket", "rbd://host"):
        source = f"{url}{cloud.hosts.datastores}/secret"
        said = "expected a path of the front-end, http://"
        cloud.fails(21, said, "tm/ssh/context", source, f"host01:{disk}")
        done = cloud.run("tm/ssh/clone", source, f"host01:{disk}")  # or it is a path of a machine called SSH
        assert done.status in (2, 21, 30) and check_stderr(done, "clone", marks=form == "3.4"), done
    assert cloud.left() == []


def test_weak_another_front_end_waits_for_the_same_lock(cloud: Cloud) -> None:
    """Stock locks are files of one front-end; a second one, or an action on the host, does not see them."""
    other = {"MADRIGAL_RUN_DIR": tempfile.mkdtemp(prefix="run", dir=cloud.hosts.work), "MADRIGAL_LOCK_TIMEOUT": "1"}
    cloud.documents = [disks()]
    cloud.at("host01").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.env.items():
            if name not in ("PATH", "TMPDIR"):
                patch.setenv(name, value)
        with Host("host01").session() as session:
            session.call("hold", path=cloud.vm)
            cloud.fails(11, "", "tm/ssh/mkswap", "1", f"host01:{cloud.vm}/disk.1", **other)
    cloud.ok("tm/ssh/mkswap", "1", f"host01:{cloud.vm}/disk.1", **other)
    assert cloud.left() == [f"host01:{VM}", f"host01:{VM}/disk.1"]


NFS = """
import os, sys, time
directory, end, number = os.open(sys.argv[1], os.O_RDONLY), time.monotonic() + float(sys.argv[2]), 0
print("open", flush=True)
while time.monotonic() < end:
    number += 1
    try:
        os.close(os.open(f".nfs{number:04}", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    except FileNotFoundError:
        sys.exit("it was removed")
"""


@pytest.mark.parametrize("path", ["", "/disk.0"])
def test_seen_a_delete_waits_for_files_that_are_still_open_on_nfs(cloud: Cloud, path: str) -> None:
    """They stay in their directory, under another name, until a hypervisor that is on its way out closes them."""
    directory = cloud.at("host01", *(["disk.0.snap"] if path else []))
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"x")
    argv = ["/usr/bin/python3", "-c", NFS, str(directory), "1.5"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"open\n"
        cloud.ok("tm/ssh/delete", f"host01:{cloud.vm}{path}")
        assert process.wait() == 0, "it was removed too early to show anything"
    assert cloud.left() == ([f"host01:{VM}"] if path else [])


@pytest.mark.parametrize("form", ["3.4", "current"])
def test_weak_what_fails_on_a_host_is_told_without_the_program_that_ran_there(cloud: Cloud, form: str) -> None:
    """Stock drivers write whole scripts, with all that was put into them, to the VM's log."""
    cloud.form = form
    cloud.documents = [vm_document(VM, {0: {"FS": "ext4", "SECRET": "hush"}})]
    cloud.hosts.run("host01", ["touch", f"{cloud.hosts.datastores}/0"])
    done = cloud.run("tm/ssh/mkimage", "16", "ext4" if form == "3.4" else "raw", f"host01:{cloud.vm}/disk.0")
    check_stderr(done, "mkimage", marks=form == "3.4")
    assert done.status and len(done.stderr) < 800 and "hush" not in done.stderr
    assert not any(word in done.stderr for word in ("import ", "def ", "set -e", "ExitCode"))


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("driver", ["ssh", "local", "shared", "qcow2"])
def test_trap_ds_2_slashes_are_doubled_here_and_there(cloud: Cloud, driver: str, format: str) -> None:
    """In arguments, and in what the front-end says of the same image and of the VM; not in all places alike."""
    image, where = cloud.images / "abc", "fe" if driver in ("shared", "qcow2") else "host01"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, image, "1M"], check=True)
    doubled = str(image).replace("/datastores/1/", "//datastores//1///")
    vm = cloud.vm.replace("/datastores/", "//datastores//")
    about = {"FORMAT": format, "SIZE": 1, "ORIGINAL_SIZE": 1}
    disk = cloud.at(where, "disk.0")
    for number, (told, given) in enumerate(((doubled, doubled), (str(image), doubled), (doubled, str(image)))):
        cloud.documents = [vm_document(VM, {0: {**about, "CLONE": "NO", "SOURCE": told}, 1: {**about, "SOURCE": told}})]
        cloud.ok(f"tm/{driver}/ln", f"fe:{given}", f"{where}:{vm}/disk.0")
        cloud.ok(f"tm/{driver}/clone", f"fe:{given}", f"{where}:{vm}//disk.1")
        for action in ("snap_create", "snap_revert", "snap_delete"):
            cloud.ok(f"tm/{driver}/{action}", f"{where}:{vm}/disk.0", "0")
        write = ["qemu-io", "-f", format, "-c", f"write -P {65 + number} 0 512", str(led(disk))]
        subprocess.run(write, check=True, capture_output=True)
        for _ in range(2):
            cloud.ok(f"tm/{driver}/mvds", f"{where}:{vm}/disk.0", given)
        raw = cloud.work / "raw"
        subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", newest(image).resolve(), raw], check=True)
        assert raw.read_bytes()[:512] == bytes([65 + number]) * 512
        assert "//" not in os.readlink(disk)
        cloud.ok(f"tm/{driver}/delete", f"{where}:{vm}")


def led(path: Path) -> Path:
    """What a disk of a host leads to, seen from here."""
    while path.is_symlink():
        path = path.parent / os.readlink(path)
    return path


def newest(image: Path) -> Path:
    """What the next VM gets of IMAGE."""
    numbers = (
        [int(name) for name in os.listdir(f"{image}.snap") if name.isdigit()] if os.path.isdir(f"{image}.snap") else []
    )
    return Path(f"{image}.snap/{max(numbers)}") if numbers and not image.is_symlink() else image


@pytest.mark.parametrize("way", ["clone", "ln"])
def test_a_directory_is_an_image_on_shared_storage_too(old: Cloud, way: str) -> None:
    """In 3.4, where a hypervisor's images may be several files."""
    old.hosts._rig("add", "node1")
    image = old.images / "abc"
    image.mkdir()
    (image / "disk.vmdk").write_bytes(b"content")
    disk = old.at("fe", "disk.0")
    for _ in range(2):
        old.ok(f"tm/shared/{way}", f"fe:{image}", f"node1:{old.vm}/disk.0")
        assert (disk / "disk.vmdk").read_bytes() == b"content" and disk.is_symlink() == (way == "ln")
    (disk / "disk.vmdk").write_bytes(b"changed")
    for _ in range(2):
        old.ok("tm/shared/mvds", f"node1:{old.vm}/disk.0", str(image))
        assert (image / "disk.vmdk").read_bytes() == b"changed" and not image.is_symlink()
    old.ok("tm/shared/delete", f"node1:{old.vm}")
    assert (image / "disk.vmdk").read_bytes() == b"changed" and old.left() == []
    old.hosts.end("node1")


# -- images --------------------------------------------------------------------------------------------------------


def test_trap_ds_4_a_request_number_names_nothing(tmp_path: Path) -> None:
    """What `stat` gets is the number of a request, which may be an image's id, and of the image a PATH and no more."""
    store = Store(tmp_path, "current")
    path = store.file("image", bytes(3 * MIB))
    store.ok("datastore/fs/cp", {"PATH": path})
    before = store.source.read_bytes(), store.left()
    nothing = dict.fromkeys(("ID", "NAME", "TYPE", "REGTIME", "SOURCE", "SIZE"))
    for _ in range(2):
        assert store.ok("datastore/fs/stat", {**nothing, "PATH": path}) == "3"
        assert (store.source.read_bytes(), store.left()) == before


@pytest.mark.parametrize("kind", ["shared", "local", "copies", "raw"])
@pytest.mark.parametrize("snapshot", [0, 1])
@pytest.mark.parametrize("action", ["snap_delete", "snap_revert", "snap_flatten"])
def test_weak_a_digest_goes_with_the_content_it_is_of(tmp_path: Path, kind: str, snapshot: int, action: str) -> None:
    """The stock driver looks for the digest beside a variable that is empty."""
    image = Image(tmp_path, kind)
    digest = Path(f"{image.path}.md5sum")
    before = image.path.read_bytes()
    digest.write_text(hashlib.md5(before).hexdigest())
    assert not image.run(action, snapshot)
    assert not digest.exists() or digest.read_text() == hashlib.md5(image.path.read_bytes()).hexdigest()


# -- files that stock front-ends have --------------------------------------------------------------------------------

FILES = {
    "var/remotes/etc/datastore/datastore.conf": 'SUPPORTED_FS="ext2,ext4"\nFS_OPTS_ext4="-L \'two words\' -m 7"\n'
    "# BACKUP_BASE_PATH=/var/tmp\nBACKUP_BASE_PATH=\n",
    "var/remotes/etc/datastore/fs/fs.conf": "DD_BLOCK_SIZE=64k\n",
    "var/remotes/etc/tm/ssh/sshrc": 'REPLICA_SSH_OPTS="-c x -m y"\nREPLICA_MAX_SIZE_MB=\n',
    "var/remotes/etc/vmm/kvm/kvmrc": "export LANG=C\nexport LIBVIRT_URI=qemu:///system\nexport VIRSH_TIMEOUT=60\n",
    "var/config": "DATASTORE_LOCATION=/var/lib/one//datastores/\nSCRIPTS_REMOTE_DIR=/var/tmp/one\n",
    "etc/tmrc": '# This file is sourced\nQCOW2_OPTIONS="-o compat=0.10"\n',
    "etc/defaultrc": "ONE_MAD_DEBUG=\nPRIORITY=19\n",
}


def label(path: Path) -> str:
    argv = ["/usr/sbin/blkid", "-p", "-s", "LABEL", "-o", "value", str(path)]
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip()


def test_configuration_files_of_a_stock_front_end_count(cloud: Cloud) -> None:
    """With the keys that they have there, those of what is not in this version too."""
    one = cloud.work / "one"
    for name, text in FILES.items():
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(text)
    cloud.env = {**cloud.env, "ONE_LOCATION": str(one)}
    source = hashlib.md5(f"{REGTIME}:42".encode()).hexdigest()

    def mkfs(fs: str) -> Done:
        text = dump(cloud.images, {"FORMAT": "raw", "FS": fs, "SIZE": 24})
        return run_action("datastore/fs/mkfs", "42", env=cloud.env, input=text)

    assert mkfs("ext4").status == 0 and label(cloud.images / source) == "two words"
    refused = mkfs("xfs")
    assert (refused.status, "SUPPORTED_FS" in check_stderr(refused, "mkfs")) == (20, True)
    cloud.documents = [vm_document(VM, {0: {"FS": "ext4"}, 1: {"FS": "xfs"}, 2: {}})]
    cloud.ok("tm/ssh/mkimage", "24", "raw", f"host01:{cloud.vm}/disk.0")
    assert label(cloud.at("host01", "disk.0")) == "two words"
    cloud.fails(20, "SUPPORTED_FS", "tm/ssh/mkimage", "24", "raw", f"host01:{cloud.vm}/disk.1")
    cloud.ok("tm/ssh/mkimage", "24", "qcow2", f"host01:{cloud.vm}/disk.2")
    assert cloud.at("host01", "disk.2").read_bytes()[4:8] == (2).to_bytes(4, "big"), "compat=0.10"
