"""Datastores that only other machines have (BRIDGE_LIST): the executables of datastore/fs, on real sshd hosts.

What NFS_AUTO_ENABLE needs cannot be had here: a `sudo` that is a fake notes what it is asked for, and instead of an
NFS share mounts a file system in memory, on a host of its own.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import Done, Hosts, check_stderr, eventually, run_action, start_action
from dumps import REGTIME, datastore_document, dump, front_end, vm_document
from lxml import etree

from madrigal.onhost.part import Nameless
from madrigal.onhost.undo import Undo

MIB = 1 << 20
BOTH = "host01 host02"


class Bridged:
    """A datastore on hosts, and actions on it; the front-end has nothing at its path."""

    def __init__(self, hosts: Hosts, env: dict[str, str], base: str, files: Path) -> None:
        self.hosts, self.env, self.base, self.files = hosts, env, base, files
        self.made: list[str] = []

    def file(self, name: str, content: bytes) -> Path:
        (self.files / name).write_bytes(content)
        return self.files / name

    def dump(self, image: Mapping[str, object] | None = None, bridges: str = BOTH, **more: object) -> bytes:
        template = {"BRIDGE_LIST": bridges, **(more.pop("template", None) or {})}  # type: ignore[dict-item]
        # Front-ends write a doubled slash into BASE_PATH.
        base = self.base.replace("/datastores/", "//datastores/")
        return dump(base, image, more.pop("attributes", None), template, extra=more.pop("extra", None))  # type: ignore[arg-type]

    def run(
        self, action: str, image: Mapping[str, object] | None = None, bridges: str = BOTH, id: int = 42, **more: object
    ) -> Done:
        text = self.dump(image, bridges, **more)
        return run_action(f"datastore/fs/{action}", str(id), env=self.env, input=text)

    def ok(self, action: str, image: Mapping[str, object] | None = None, bridges: str = BOTH, **more: object) -> str:
        done = self.run(action, image, bridges, **more)  # type: ignore[arg-type]
        assert done.status == 0, done.stderr
        check_stderr(done, action)
        return done.stdout.removesuffix("\n")

    def fails(
        self, status: int, text: str, action: str, image: Mapping[str, object] | None = None, **more: object
    ) -> str:
        """ACTION fails so, with one sentence, and leaves nothing anywhere."""
        before = self.everything()
        done = self.run(action, image, **more)  # type: ignore[arg-type]
        message = check_stderr(done, action)
        assert (done.status, text in message) == (status, True), done
        assert eventually(lambda: self.everything() == before), (self.everything(), before)
        return message

    def on(self, name: str) -> list[str]:
        """What the datastore's directory has on a host."""
        try:
            return sorted(os.listdir(self.hosts.on(name, self.base)))
        except FileNotFoundError:
            return []

    def everything(self) -> list[str]:
        """All that is in the datastores of the hosts, of the front-end and in its room for files."""
        tops = [self.hosts.on(name) for name in self.hosts.names + self.made]
        tops += [Path(self.hosts.datastores), Path(self.env["TMPDIR"]), self.files]
        return sorted(str(path) for top in tops for path in top.rglob("*"))

    def add(self, name: str, **how: str) -> str:
        self.hosts.add(name, **how)
        self.made.append(name)
        return name

    def source(self, id: int = 42) -> Path:
        """Where image ID goes, on whichever machine."""
        return Path(self.base, hashlib.md5(f"{REGTIME}:{id}".encode()).hexdigest())

    def image(self, name: str = "host01", id: int = 42) -> Path:
        """The image on a host, as a path of this machine."""
        return self.hosts.on(name, str(self.source(id)))


@pytest.fixture
def at(hosts: Hosts, datastore: str, tmp_path: Path) -> Iterator[Bridged]:
    bridged = Bridged(hosts, dict(hosts.env), datastore, tmp_path)
    yield bridged
    for name in bridged.made:
        hosts.end(name)


def qemu_img(*argv: str | Path) -> str:
    return subprocess.run(["qemu-img", *argv], check=True, capture_output=True, text=True).stdout


def digests(path: Path) -> dict[str, str]:
    return {name.upper(): hashlib.new(name, path.read_bytes()).hexdigest() for name in ("md5", "sha1", "sha256")}


# -- cp ------------------------------------------------------------------------------------------------------------


def test_cp_puts_the_image_on_the_host_and_nothing_elsewhere(at: Bridged, env: dict[str, str]) -> None:
    at.env = env
    content = os.urandom(3 * MIB) + bytes(20 * MIB) + b"end"
    path = at.file("a b;$(id)'\"*", content)
    packed = at.file("image.gz", gzip.compress(content))
    for source, attributes in ((path, {}), (path, digests(path)), (packed, {}), (packed, digests(packed))):
        for _ in range(2):  # any action can be repeated
            assert at.ok("cp", {"PATH": source}, attributes=attributes) == f"{at.source()} raw"
        assert at.image().read_bytes() == content
        assert at.image().stat().st_blocks * 512 < 5 * MIB
        assert at.image().stat().st_mode & 0o777 == 0o644
        assert (at.on("host01"), at.on("host02")) == ([at.source().name], [])
        assert not os.path.exists(at.base)
        at.ok("rm", {"SOURCE": at.source()})
        assert at.on("host01") == []


def test_the_host_is_chosen_by_the_image_s_id(at: Bridged) -> None:
    path = at.file("image", b"x" * 512)
    for id, name in ((42, "host01"), (43, "host02")):
        at.ok("cp", {"PATH": path}, id=id)
        assert at.image(name, id).read_bytes() == b"x" * 512
    assert len(at.on("host01") + at.on("host02")) == 2


def test_a_host_that_is_down_makes_the_next_be_tried(at: Bridged, cold: dict[str, str]) -> None:
    at.env = cold
    path = at.file("image", os.urandom(MIB))
    at.add("down1")
    at.hosts.end("down1")
    done = at.run("cp", {"PATH": path}, bridges="down1 host02")
    assert (done.status, done.stdout) == (0, f"{at.source()} raw\n"), done.stderr
    assert "WARN: cp: down1 " in done.stderr and "trying host02" in done.stderr
    assert at.image("host02").read_bytes() == path.read_bytes()
    assert at.ok("export", {"SOURCE": at.source(), "SIZE": 1}, bridges="down1 host02").count("ssh://host02:") == 1
    at.ok("rm", {"SOURCE": at.source()}, bridges="down1 host02")
    assert at.on("host02") == []


def test_when_all_hosts_are_down_one_sentence_names_them(at: Bridged, cold: dict[str, str]) -> None:
    at.env = cold
    image = {"PATH": at.file("image", b"x"), "SOURCE": at.source(), "FORMAT": "raw", "SIZE": 1}
    for name in ("down2", "down3"):
        at.hosts.add(name)
        at.hosts.end(name)
    for action in ("cp", "mkfs", "rm", "clone", "monitor", "export"):
        message = at.fails(10, "BRIDGE_LIST", action, image, bridges="down2 down3")
        assert "down2" in message and "down3" in message


def test_a_host_that_dies_under_the_work_is_not_followed_by_another(at: Bridged) -> None:
    """What the first has begun may be half there: the front-end tries again, and finds out."""
    name = at.add("dying")
    path = at.file("image", os.urandom(8 * MIB))
    text = at.dump({"PATH": path}, f"{name} host02", template={"LIMIT_TRANSFER_BW": "1M"})
    with start_action("datastore/fs/cp", "42", env=at.env) as process:
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
        assert eventually(lambda: any(entry.endswith(".part") for entry in at.on(name)))
        at.made.remove(name)
        at.hosts.end(name)
        assert process.wait() == 10
    assert at.on("host02") == []
    at.ok("cp", {"PATH": path}, bridges=f"{name} host02")
    assert at.image("host02").read_bytes() == path.read_bytes()


def test_a_host_with_another_key_is_not_passed_over(at: Bridged, cold: dict[str, str]) -> None:
    """It is up, and somebody has to find out why."""
    at.env = cold
    config, known = Path(at.hosts.ssh_config).read_text(), at.files / "known_hosts"
    path = next(line.split()[1] for line in config.splitlines() if "UserKnownHostsFile" in line)
    keys = dict(line.split(" ", 1) for line in Path(path).read_text().splitlines())
    known.write_text(f"host01 {keys['host02']}\nhost02 {keys['host02']}\n")
    at.env["MADRIGAL_SSH_CONFIG"] = str(at.file("config", config.replace(path, str(known)).encode()))
    at.fails(22, "host01", "cp", {"PATH": at.file("image", b"x")})


def test_a_front_end_on_the_list_does_the_work_itself(at: Bridged) -> None:
    path = at.file("image", b"x" * 512)
    at.ok("cp", {"PATH": path}, bridges="host01 fe")
    assert at.source().read_bytes() == b"x" * 512
    assert at.on("host01") == []


def test_cp_converts_on_the_host(at: Bridged) -> None:
    content = os.urandom(MIB) + bytes(3 * MIB)
    raw = at.file("image.raw", content)
    qcow2, vmdk = at.files / "image.qcow2", at.files / "image.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk)
    packed = at.file("qcow2.gz", gzip.compress(qcow2.read_bytes()))
    for path, driver in ((qcow2, "raw"), (vmdk, "raw"), (packed, "raw"), (raw, "qcow2"), (vmdk, "qcow2")):
        assert at.ok("cp", {"PATH": path}, template={"DRIVER": driver}) == f"{at.source()} {driver}"
        assert at.ok("cp", {"PATH": path}, template={"DRIVER": driver}) == f"{at.source()} {driver}"
        if driver == "raw":
            assert at.image().read_bytes() == content
        else:
            qemu_img("compare", "-f", "qcow2", "-F", "raw", at.image(), raw)
        assert at.on("host01") == [at.source().name]
        at.ok("rm", {"SOURCE": at.source()})
    assert at.ok("cp", {"PATH": qcow2}, template={"DRIVER": "raw", "CONVERT": "no"}) == f"{at.source()} qcow2"


def test_an_image_that_names_another_file_is_refused(at: Bridged) -> None:
    secret = at.file("secret", b"secret" * 1000)
    backing = at.files / "backing.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", backing, "1M")
    packed = at.file("packed.gz", gzip.compress(backing.read_bytes()))
    for path in (backing, packed):
        at.fails(41, str(secret), "cp", {"PATH": path}, template={"DRIVER": "raw"})


def test_a_wrong_digest_leaves_nothing_on_the_front_end_and_on_the_host(at: Bridged) -> None:
    """The stock downloader leaves the wrong file at the destination or in STAGING_DIR."""
    staging = at.files / "staging"
    staging.mkdir()
    path = at.file("image.gz", gzip.compress(os.urandom(2 * MIB)))
    for template in ({}, {"STAGING_DIR": staging}):
        for name, digits in (("MD5", 32), ("SHA1", 40), ("SHA256", 64)):
            at.fails(40, name, "cp", {"PATH": path}, attributes={name: "0" * digits}, template=template)
    (at.files / "image.gz").write_bytes(path.read_bytes()[:-50])
    at.fails(41, "cut off", "cp", {"PATH": path})


def test_a_size_that_is_none_leaves_nothing_on_the_host(at: Bridged) -> None:
    at.fails(2, "SIZE", "cp", {"PATH": at.file("image", os.urandom(MIB)), "SIZE": "--help"})


def test_staging_dir_is_used_and_left_empty(at: Bridged) -> None:
    staging = at.files / "staging a;b"
    path, qcow2 = at.file("image", os.urandom(2 * MIB)), at.files / "image.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", path, qcow2)
    template = {"STAGING_DIR": staging}
    at.fails(30, str(staging), "cp", {"PATH": path}, template=template)  # it is where the image goes first
    staging.mkdir()
    for source, driver in ((path, ""), (path, "qcow2"), (qcow2, "raw")):
        at.ok("cp", {"PATH": source}, template={**template, "DRIVER": driver})
        kind = driver or "raw"
        qemu_img("compare", "-f", kind, "-F", "raw", at.image(), path)
        assert (at.on("host01"), list(staging.iterdir())) == ([at.source().name], [])
        at.ok("rm", {"SOURCE": at.source()})


def test_staging_dir_spares_the_datastore_what_is_converted(at: Bridged) -> None:
    """2 MiB of compressed qcow2 and the 3 MiB they become are too much for a datastore of 4 MiB at once."""
    name = at.add("tight", size="4m")
    content = os.urandom(2 * MIB) + b"x" * MIB
    raw, qcow2 = at.file("image", content), at.files / "image.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, qcow2)
    at.fails(12, "No space left", "cp", {"PATH": qcow2}, bridges=name, template={"DRIVER": "raw"})
    staging = at.files / "staging"
    staging.mkdir()
    at.ok("cp", {"PATH": qcow2}, bridges=name, template={"DRIVER": "raw", "STAGING_DIR": staging})
    assert at.image(name).read_bytes() == content
    assert at.on(name) == [at.source().name]


def test_a_full_disk_on_the_host_leaves_nothing(at: Bridged) -> None:
    name = at.add("small", size="4m")
    content = os.urandom(8 * MIB)
    for path in (at.file("image", content), at.file("image.gz", gzip.compress(content))):
        at.fails(12, name, "cp", {"PATH": path}, bridges=name)
    image = {"FORMAT": "raw", "SIZE": 8, "PATH": path}
    at.fails(12, name, "mkfs", image, bridges=name, template={"SPARSE": "no"})
    at.ok("mkfs", image, bridges=name)


def begun(at: Bridged, text: bytes) -> subprocess.Popen[bytes]:
    """An import, in the middle of its work."""
    process = start_action("datastore/fs/cp", "42", env=at.env)
    assert process.stdin
    process.stdin.write(text)
    process.stdin.close()
    assert eventually(lambda: any(name.endswith(".part") for name in at.on("host01")))
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_import_leaves_nothing_and_can_be_repeated(number: int, at: Bridged, env: dict[str, str]) -> None:
    at.env = env
    path = at.file("image", os.urandom(6 * MIB))
    before = at.everything()
    with begun(at, at.dump({"PATH": path}, template={"LIMIT_TRANSFER_BW": "1M"})) as process:
        process.send_signal(number)
        assert process.wait() in (143, -9)
        assert process.stdout and process.stdout.read() == b""
    # the worker on the host hears that nobody is there any more
    assert eventually(lambda: at.on("host01") == [])
    shutil.rmtree(at.hosts.on("host01", at.base), ignore_errors=True)
    assert at.everything() == before
    at.ok("cp", {"PATH": path})
    assert at.image().read_bytes() == path.read_bytes()


def test_a_worker_that_is_killed_leaves_a_part_that_the_next_run_removes(at: Bridged) -> None:
    path = at.file("image", os.urandom(6 * MIB))
    with begun(at, at.dump({"PATH": path}, template={"LIMIT_TRANSFER_BW": "1M"})) as process:
        for pid in at.hosts.workers("host01"):
            os.kill(pid, signal.SIGKILL)
        assert process.wait() == 10
    assert any(name.endswith(".part") for name in at.on("host01"))
    at.ok("cp", {"PATH": path})
    assert at.on("host01") == [at.source().name]


def test_what_is_staged_is_gone_with_a_worker_that_is_killed(at: Bridged) -> None:
    """It has no name: nobody has to know where a killed import had its files."""
    staging = at.files / "staging"
    staging.mkdir()
    path = at.file("image", os.urandom(6 * MIB))
    template = {"LIMIT_TRANSFER_BW": "1M", "STAGING_DIR": staging}
    with start_action("datastore/fs/cp", "42", env=at.env) as process:
        assert process.stdin
        process.stdin.write(at.dump({"PATH": path}, template=template))
        process.stdin.close()

        def arriving() -> bool:
            links = (os.readlink(fd) for pid in at.hosts.workers("host01") for fd in Path(f"/proc/{pid}/fd").iterdir())
            return any(str(staging) in link for link in links)

        assert eventually(arriving)
        for pid in at.hosts.workers("host01"):
            os.kill(pid, signal.SIGKILL)
        assert process.wait() == 10
    assert list(staging.iterdir()) == []


def test_rm_ends_an_import_on_the_host(at: Bridged) -> None:
    path = at.file("image", os.urandom(6 * MIB))
    with begun(at, at.dump({"PATH": path}, template={"LIMIT_TRANSFER_BW": "1M"})) as process:
        at.ok("rm", {"SOURCE": at.source()})
        assert process.wait() in (10, 32)
    assert at.on("host01") == []


def test_two_imports_of_one_image_at_once_make_one(at: Bridged) -> None:
    """The stock driver names by the second it is called at, and overwrites what it finds."""
    path = at.file("image", os.urandom(4 * MIB))
    text = at.dump({"PATH": path})
    processes = [start_action("datastore/fs/cp", "42", env=at.env) for _ in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
    for process in processes:
        with process:
            assert process.wait() == 0
            assert process.stdout and process.stdout.read() == f"{at.source()} raw\n".encode()
    assert at.image().read_bytes() == path.read_bytes()
    assert at.on("host01") == [at.source().name]


def test_fifteen_imports_at_once(at: Bridged, cold: dict[str, str]) -> None:
    """Over a connection that nobody has made yet."""
    at.env = cold
    path = at.file("image", os.urandom(MIB))
    processes = [start_action("datastore/fs/cp", str(id), env=at.env) for id in range(15)]
    for process in processes:
        assert process.stdin
        process.stdin.write(at.dump({"PATH": path}))
        process.stdin.close()
    for process in processes:
        with process:
            assert process.wait() == 0
    for id in range(15):
        assert at.image(at.hosts.names[id % 2], id).read_bytes() == path.read_bytes()


def test_a_file_system_without_nameless_files_has_staged_ones_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS: what is made there has a name for a moment."""
    real = os.open

    def refusing(path: str, flags: int, *more: int, **how: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", refusing)
    undo = Undo()
    staged = Nameless(undo, str(tmp_path))
    os.write(staged.fd, b"x")
    assert os.listdir(tmp_path) == [] and Path(staged.path).read_bytes() == b"x"
    assert os.fstat(staged.fd).st_mode & 0o777 == 0o600
    assert undo.unwind() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(staged.fd)


def test_a_large_image_has_a_connection_of_its_own(at: Bridged) -> None:
    path = at.file("image", b"x" * MIB)
    os.truncate(path, 300 * MIB)
    with open(path, "r+b") as file:
        file.seek(299 * MIB)
        file.write(b"end")
    assert at.ok("cp", {"PATH": path}) == f"{at.source()} raw"
    assert at.image().stat().st_size == 300 * MIB
    assert at.image().stat().st_blocks * 512 < 3 * MIB
    with open(at.image(), "rb") as file:
        assert file.read(MIB) == b"x" * MIB
        file.seek(299 * MIB)
        assert file.read(4) == b"end\0"


@pytest.mark.parametrize("driver", ["", "qcow2"])
@pytest.mark.parametrize("staged", [False, True], ids=["", "staged"])
def test_an_import_never_holds_a_second_copy_anywhere(at: Bridged, driver: str, staged: bool) -> None:
    """All that either machine has of it, named or not, while 96 MiB come packed; the stock driver has them twice."""
    data = os.urandom(MIB) * 96
    source = at.file("image.gz", gzip.compress(data, 1))
    staging = at.files / "staging"
    staging.mkdir()
    template = {"DRIVER": driver, **({"STAGING_DIR": staging} if staged else {})}
    tops = [at.hosts.on("host01", at.base), at.hosts.on("host01", "/var/tmp"), staging]
    tops += [Path(at.base), Path(at.env["TMPDIR"]), Path(at.env["HOME"]), Path(at.env["MADRIGAL_RUN_DIR"])]
    before, peak = held(tops, []), 0
    with start_action("datastore/fs/cp", "42", env=at.env) as process:
        assert process.stdin and process.stdout
        process.stdin.write(at.dump({"PATH": source}, template=template))
        process.stdin.close()
        while process.poll() is None:
            found = held(tops, [process.pid, *at.hosts.workers("host01")])
            peak = max(peak, sum(size for file, size in found.items() if file != of(source) and file not in before))
        assert process.stdout.read().decode() == f"{at.source()} {driver or 'raw'}\n"
    # what is converted, or comes from another directory, gives back its room as it is read, a piece at a time
    assert 90 * MIB < peak < (96 + 40) * MIB
    raw = at.file("raw", data)
    qemu_img("compare", "-f", driver or "raw", "-F", "raw", at.image(), raw)


def of(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def held(tops: list[Path], pids: list[int]) -> dict[tuple[int, int], int]:
    """The room that each file takes which lies below TOPS or which PIDS have open, named or not."""
    paths = [path for top in tops if top.exists() for path in top.rglob("*")]
    paths += [path for pid in pids for path in Path(f"/proc/{pid}/fd").glob("*")]
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):  # it has just gone
            about = path.stat()
            if stat.S_ISREG(about.st_mode):
                found[about.st_dev, about.st_ino] = about.st_blocks * 512
    return found


def test_34_imports_a_directory_onto_a_host(at: Bridged) -> None:
    (at.files / "vm" / "sub").mkdir(parents=True)
    at.file("vm/disk.vmdk", bytes(MIB))
    at.file("vm/sub/more", b"x" * 10)
    text = at.dump({"PATH": at.files / "vm"}).decode()
    for _ in range(2):
        done = run_action("datastore/fs/cp", text, "42", env=at.env)
        assert (done.status, done.stdout) == (0, f"{at.source()} 2\n"), done.stderr
        assert (at.image() / "sub" / "more").read_bytes() == b"x" * 10


def test_sparse_no_takes_all_space_at_once(at: Bridged) -> None:
    path = at.file("image", b"x" * MIB)
    os.truncate(path, 20 * MIB)
    for sparse, full in (("no", True), ("NO", True), ("yes", False), ("", False)):
        for action in ("cp", "mkfs", "clone"):
            image = {"PATH": path, "FORMAT": "raw", "SIZE": 20}
            at.ok(action, image, template={"SPARSE": sparse})
            assert (at.image().stat().st_blocks * 512 >= 20 * MIB) is full, (action, sparse)
            at.ok("rm", {"SOURCE": at.source()})
    at.fails(20, "SPARSE", "cp", {"PATH": path}, template={"SPARSE": "maybe"})


# -- the others ----------------------------------------------------------------------------------------------------


def test_mkfs_makes_on_the_host_and_reserves_without_it(at: Bridged) -> None:
    reserved = at.ok("mkfs", {"FORMAT": "save_as", "SIZE": 8}, bridges="nowhere.invalid")
    assert (reserved, at.on("host01")) == (str(at.source()), [])
    for format, fs in (("raw", ""), ("qcow2", ""), ("raw", "ext4"), ("qcow2", "ext4"), ("swap", "")):
        for _ in range(2):
            assert at.ok("mkfs", {"FORMAT": format, "FS": fs, "SIZE": 8}) == str(at.source())
        assert at.on("host01") == [at.source().name]
        assert (at.image().read_bytes()[:4] == b"QFI\xfb") == (format == "qcow2")
        at.ok("rm", {"SOURCE": at.source()})
    at.fails(20, "nosuchfs", "mkfs", {"FORMAT": "raw", "FS": "nosuchfs", "SIZE": 8})


def planted(at: Bridged, name: str, content: bytes = b"x") -> Path:
    """A file in the datastore of host01."""
    at.hosts.run("host01", ["mkdir", "-p", at.base])
    path = at.hosts.on("host01", f"{at.base}/{name}")
    path.write_bytes(content)
    return path


def test_rm_takes_what_is_beside_and_can_be_repeated(at: Bridged) -> None:
    """The stock driver fails where there is nothing to remove, and then no retry can succeed."""
    for name in ("abc", "abc.md5sum", "abc.export", "abcdef", ".abc.import.part"):
        planted(at, name)
    at.hosts.run("host01", ["mkdir", f"{at.base}/abc.snap"])
    planted(at, "abc.snap/0")
    for _ in range(2):
        assert at.ok("rm", {"SOURCE": f"{at.base}//abc"}) == ""
        assert at.on("host01") == ["abcdef"]


def test_rm_on_a_host_is_held_to_the_datastore(at: Bridged) -> None:
    """The stock driver checks that on the front-end only: on a bridge it removes whatever SOURCE names."""
    canary = planted(at, "canary")
    other = f"{at.hosts.datastores}/other"
    at.hosts.run("host01", ["touch", other])
    for source in (other, at.base, f"{at.base}/sub/x", f"{at.base}/../other", "/", f"{at.base} {other}"):
        at.fails(21, "IMAGE/SOURCE", "rm", {"SOURCE": source})
    at.hosts.run("host01", ["rm", other])
    assert canary.exists()


def test_a_failed_rm_says_what_and_where(at: Bridged) -> None:
    """The message of the stock driver has a variable ($REMOTE_RM_CMD) that is set nowhere."""
    name = at.add("frozen")
    at.hosts.run(name, ["mkdir", "-p", at.base])
    at.hosts.run(name, ["touch", str(at.source())])
    if os.getuid():
        at.hosts.run(name, ["chmod", "a-w", at.base])
    else:
        at.hosts.run(name, ["mount", "-o", "remount,ro", at.hosts.datastores])
    message = at.fails(21, name, "rm", {"SOURCE": at.source()}, bridges=name)
    assert at.base in message


CLONES = [
    # SOURCE_BRIDGE_LIST, BRIDGE_LIST, where the original is, where the copy goes ("" is the front-end)
    ("", "", "", ""),
    ("host01", "", "host01", ""),
    ("host01", "host02", "host01", "host02"),
    ("", "host02", "host02", "host02"),
    ("host01 host02", "host02 host03", "host02", "host02"),
    ("host01", "fe", "host01", ""),
    ("fe", "host02", "", "host02"),
]


@pytest.mark.parametrize(("origin", "bridges", "there", "here"), CLONES)
@pytest.mark.parametrize("driver", ["", "raw", "qcow2"])
def test_clone(origin: str, bridges: str, there: str, here: str, driver: str, at: Bridged) -> None:
    content = b"x" * MIB + bytes(5 * MIB)
    original, raw = f"{at.base}/original", at.file("raw", content)
    os.makedirs(at.base)
    for name in at.hosts.names:
        at.hosts.run(name, ["mkdir", "-p", at.base])
    (at.hosts.on(there, original) if there else Path(original)).write_bytes(content)
    copy = at.hosts.on(here, str(at.source())) if here else at.source()
    image = {"PATH": original, "FORMAT": "raw"}
    before = at.everything()
    for _ in range(2):
        template = {"DRIVER": driver, "BRIDGE_LIST": bridges}
        answer = at.ok("clone", image, template=template, extra={"SOURCE_BRIDGE_LIST": origin})
        assert answer == f"{at.source()} {driver or 'raw'}"
        qemu_img("compare", "-f", driver or "raw", "-F", "raw", copy, raw)
        assert sorted({*at.everything()} - {*before}) == [str(copy)]


@pytest.mark.long
@pytest.mark.parametrize("how", ["directly", "with room elsewhere", "converted", "not", "cut"])
def test_a_large_clone_spares_the_front_end(at: Bridged, how: str) -> None:
    """From bridge to bridge; or through the front-end, which writes nothing to its disk then."""
    original = f"{at.base}/original"
    for name in at.hosts.names:
        at.hosts.run(name, ["mkdir", "-p", at.base, f"{at.hosts.datastores}/room"])
    content = os.urandom(140 * MIB) + bytes(9 * MIB)
    at.hosts.on("host01", original).write_bytes(content)
    before = at.everything()
    template = {"STAGING_DIR": f"{at.hosts.datastores}/room"} if how == "with room elsewhere" else {}
    driver = "qcow2" if how == "converted" else "raw"
    extra = {"SOURCE_BRIDGE_LIST": "host01"}
    text = at.dump({"PATH": original, "FORMAT": "raw"}, "host02", template={**template, "DRIVER": driver}, extra=extra)
    env = {**at.env, "MADRIGAL_DIRECT": "no" if how == "not" else ""}
    if how == "cut":
        with start_action("datastore/fs/clone", "42", env=env) as process:
            assert process.stdin
            process.stdin.write(text)
            process.stdin.close()
            part = at.hosts.on("host02", at.base)
            assert eventually(lambda: sum(file.stat().st_blocks for file in part.glob(".*.part")) * 512 > 40 * MIB)
            process.kill()
        assert eventually(lambda: not at.hosts.workers("host02"))
    with start_action("datastore/fs/clone", "42", env=env) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(text)
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        counted = dict(re.findall(rb"(\w+): (\d+)", Path(f"/proc/{process.pid}/io").read_bytes()))
        said = process.stderr.read().decode()
        assert process.stdout.read().decode() == f"{at.source()} {driver}\n", said
    assert (int(counted[b"wchar"]) < 4 * MIB) == (how != "not") == ("streamed, directly)" in said), said
    copy = at.image("host02")
    if driver == "raw":
        assert copy.read_bytes() == content and copy.stat().st_blocks * 512 < 145 * MIB
    else:
        qemu_img("compare", "-f", driver, "-F", "raw", copy, at.hosts.on("host01", original))
    assert sorted({*at.everything()} ^ {*before}) == [str(copy)]
    assert ("going on with" in said) == (how == "cut")


def test_clone_of_what_is_not_there_leaves_nothing(at: Bridged) -> None:
    image = {"PATH": f"{at.base}/missing", "FORMAT": "raw"}
    for bridges, origin in (("host02", "host01"), ("host01", ""), ("", "host01"), ("", "")):
        at.fails(30, "missing", "clone", image, bridges=bridges, extra={"SOURCE_BRIDGE_LIST": origin})


def test_monitor_tells_of_the_host(at: Bridged) -> None:
    lines = dict(line.split("=") for line in at.ok("monitor").splitlines())
    assert (sorted(lines), lines["TOTAL_MB"]) == (["FREE_MB", "TOTAL_MB", "USED_MB"], "512")


def test_monitor_of_a_directory_with_a_shell_s_words_in_its_name(at: Bridged) -> None:
    """The stock driver has BASE_PATH in a script as it is."""
    at.base += f"/a b;touch {at.files}/canary;$(touch {at.files}/canary)'\"*"
    assert "TOTAL_MB=512" in at.ok("monitor")
    assert not (at.files / "canary").exists()
    assert at.hosts.on("host01", at.base).is_dir()


# -- export --------------------------------------------------------------------------------------------------------


def info(answer: str) -> dict[str, str]:
    root = etree.fromstring(answer)
    assert root.tag == "IMPORT_INFO"
    return {child.tag: child.text or "" for child in root}


def test_export_says_where_a_marketplace_can_read(at: Bridged) -> None:
    image = {"SOURCE": f"{at.base}/a&b<c>]]>'\"", "SIZE": 7, "FORMAT": "raw"}
    planted(at, "a&b<c>]]>'\"", b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    expected = {"IMPORT_SOURCE": f"ssh://host01:{image['SOURCE']}", "MD5": md5, "SIZE": "7"}
    assert info(at.ok("export", image)) == {**expected, "FORMAT": "raw", "DISPOSE": "NO"}
    os.makedirs(at.base)
    Path(str(image["SOURCE"])).write_bytes(b"content")
    expected["IMPORT_SOURCE"] = str(image["SOURCE"])
    assert info(at.ok("export", image, bridges="")) == {**expected, "FORMAT": "raw", "DISPOSE": "NO"}


def test_a_checksum_that_fails_is_not_reported_as_success(at: Bridged) -> None:
    """The stock driver reads $? after an assignment, and answers with an empty MD5."""
    image = {"SOURCE": f"{at.base}/gone", "SIZE": 7, "FORMAT": "raw"}
    for bridges in ("host01", ""):
        at.fails(30, "gone", "export", image, bridges=bridges)
    at.hosts.run("host01", ["mkdir", "-p", f"{at.base}/gone"])
    at.fails(1, "gone", "export", image, bridges="host01")
    planted(at, "gone2")
    at.fails(41, "gone2", "export", {**image, "SOURCE": f"{at.base}/gone2", "FORMAT": "qcow2"})


def chain(directory: Path) -> bytes:
    """The image `image` with a snapshot, as qcow2 drivers leave one: a link to the newest of image.snap."""
    snaps = directory / "image.snap"
    snaps.mkdir(parents=True)
    base = b"0" * 65536 + bytes(MIB)
    (directory / "base").write_bytes(base)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", directory / "base", snaps / "0")
    (directory / "base").unlink()
    (snaps / "image.snap").symlink_to(".")
    create = ["qemu-img", "create", "-f", "qcow2", "-b", "image.snap/0", "-F", "qcow2", "image.snap/1"]
    subprocess.run(create, check=True, capture_output=True, cwd=directory)
    (directory / "image").symlink_to("image.snap/1")
    io = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x31 64k 64k", str(directory / "image")]
    subprocess.run(io, check=True, capture_output=True)
    return b"0" * 65536 + b"1" * 65536 + bytes(MIB - 65536)


@pytest.mark.parametrize("bridges", ["host01", ""])
def test_export_of_a_snapshot_chain_has_all_that_is_in_it(bridges: str, at: Bridged) -> None:
    content = chain(at.files / "chain")
    if bridges:
        at.hosts.run("host01", ["mkdir", "-p", at.base])
        at.hosts.run("host01", ["cp", "-a", f"{at.files}/chain/.", at.base])
    else:
        shutil.copytree(at.files / "chain", at.base, symlinks=True)
    image = {"SOURCE": f"{at.base}/image", "SIZE": 2, "FORMAT": "qcow2"}
    for _ in range(2):
        found = info(at.ok("export", image, bridges=bridges))
        whole = at.hosts.on("host01", f"{at.base}/image.export") if bridges else Path(at.base, "image.export")
        assert found["MD5"] == hashlib.md5(whole.read_bytes()).hexdigest()
        qemu_img("convert", "-f", "qcow2", "-O", "raw", whole, at.files / "raw")
        assert (at.files / "raw").read_bytes() == content
        # it is for this alone: who has taken it removes it
        assert found["DISPOSE"] == "YES"
    command = found["DISPOSE_CMD"].replace("ssh ", f"ssh -F {at.hosts.ssh_config} ")
    subprocess.run(["sh", "-c", command], check=True)
    assert not whole.exists()


def layouts(directory: Path) -> dict[str, tuple[bytes, bool]]:
    """Images with snapshots as drivers leave them: what each holds now, and whether that needs more files."""

    def make(name: str, letter: bytes, on: str = "") -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        backing = ["-b", on, "-F", "qcow2"] if on else []
        qemu_img("create", "-u", "-f", "qcow2", *backing, path, "1M")
        write = ["qemu-io", "-f", "qcow2", "-c", f"write -P {letter[0]} 0 64k", str(path)]
        subprocess.run(write, check=True, capture_output=True)

    make("persistent", b"o")  # the disk of a VM was a link to it: it is the oldest, and the newest has no other name
    (directory / "persistent.snap").mkdir()
    (directory / "persistent.snap/0").symlink_to("../persistent")
    make("persistent.snap/9", b"x", "0")
    make("persistent.snap/10", b"n", "9")
    make("copies", b"n")  # each snapshot whole, as of a disk of a host
    make("copies.snap/0", b"o")
    make("none", b"n")
    (directory / "none.snap").mkdir()
    (directory / "flat.snap").mkdir()
    make("flat.snap/3", b"n")
    (directory / "flat").symlink_to("flat.snap/3")
    return {"persistent": (b"n", True), "copies": (b"n", False), "none": (b"n", False), "flat": (b"n", False)}


def test_what_has_snapshots_is_exported_and_cloned_as_it_is_now(at: Bridged) -> None:
    os.makedirs(at.base)
    made = layouts(Path(at.base))
    shutil.copytree(at.base, at.hosts.on("host01", at.base), symlinks=True)
    for name, (letter, is_chain) in made.items():
        image = {"SOURCE": f"{at.base}/{name}", "PATH": f"{at.base}/{name}", "SIZE": 1, "FORMAT": "qcow2"}
        found = info(at.ok("export", image, bridges=""))
        assert found["DISPOSE"] == ("YES" if is_chain else "NO"), name
        at.ok("clone", image, bridges="")
        for path in (Path(found["IMPORT_SOURCE"]), at.source()):
            qemu_img("convert", "-f", "qcow2", "-O", "raw", path, at.files / "raw")
            assert (at.files / "raw").read_bytes() == letter * 65536 + bytes(MIB - 65536), name
        at.ok("rm", {"SOURCE": at.source()}, bridges="")
        at.ok("clone", image, bridges="host02", extra={"SOURCE_BRIDGE_LIST": "host01"})
        qemu_img("convert", "-f", "qcow2", "-O", "raw", at.image("host02"), at.files / "raw")
        assert (at.files / "raw").read_bytes() == letter * 65536 + bytes(MIB - 65536), name
        at.ok("rm", {"SOURCE": at.source()}, bridges="host02")


def test_export_of_a_chain_that_leads_elsewhere_is_refused(at: Bridged) -> None:
    secret = at.file("secret", b"secret" * 1000)
    os.makedirs(f"{at.base}/image.snap")
    for name, back in (("one", str(secret)), ("two", "../../secret"), ("three", "other")):
        (Path(at.base) / "other").write_bytes(b"other" * 1000)
        argv = ["qemu-img", "create", "-u", "-f", "qcow2", "-b", back, "-F", "raw", f"{at.base}/{name}", "1M"]
        subprocess.run(argv, check=True, capture_output=True)
        image = {"SOURCE": f"{at.base}/{name}", "SIZE": 2, "FORMAT": "qcow2"}
        at.fails(41, "lies on", "export", image, bridges="")


# -- snapshots of images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["raw", "chain"])
def test_snapshots_of_an_image_on_a_host(driver: str, at: Bridged) -> None:
    """Reverted, removed and flattened there; the front-end has nothing of it."""
    if driver == "raw":
        for name, letter in (("image", b"n"), ("image.snap/0", b"o"), ("image.snap/9", b"x")):
            at.hosts.run("host01", ["mkdir", "-p", f"{at.base}/image.snap"])
            planted(at, name, letter * MIB)
        name, ids, format = "image", [0, 9], "raw"
    else:
        layouts(at.files / "made")
        at.hosts.run("host01", ["mkdir", "-p", at.base])
        at.hosts.run("host01", ["cp", "-a", f"{at.files}/made/.", at.base])
        name, ids, format = "persistent", [0, 9], "qcow2"
        shutil.rmtree(at.files / "made")
    image = {"SOURCE": f"{at.base}//{name}", "FORMAT": format}

    def now() -> bytes:
        at.ok("clone", {"PATH": f"{at.base}/{name}", "FORMAT": format}, bridges="host01", template={"DRIVER": "raw"})
        held = at.image().read_bytes()
        at.ok("rm", {"SOURCE": at.source()}, bridges="host01")
        return held[:1]

    planted(at, f"{name}.md5sum", b"stale")
    assert now() == b"n"
    for snapshot, letter in ((9, b"x"), (0, b"o"), (9, b"x")):
        assert at.ok("snap_revert", {**image, "TARGET_SNAPSHOT": snapshot}, bridges="host01") == ""
        assert now() == letter
    assert f"{name}.md5sum" not in at.on("host01")
    at.fails(30, "has no snapshot 7", "snap_revert", {**image, "TARGET_SNAPSHOT": 7}, bridges="host01")
    for _ in range(2):
        at.ok("snap_delete", {**image, "TARGET_SNAPSHOT": ids[0]}, bridges="host01")
        assert now() == b"x"
    at.fails(30, "has no snapshot 0", "snap_revert", {**image, "TARGET_SNAPSHOT": 0}, bridges="host01")
    for _ in range(2):
        at.ok("snap_flatten", {**image, "TARGET_SNAPSHOT": ids[1]}, bridges="host01")
        assert now() == b"x" and f"{name}.snap" not in at.on("host01")
    assert not os.path.exists(at.base) and at.on("host02") == []
    for action in ("snap_revert", "snap_delete", "snap_flatten"):
        message = at.fails(21, "IMAGE/SOURCE", action, {"SOURCE": "/etc/passwd", "FORMAT": "raw", "TARGET_SNAPSHOT": 0})
        assert at.base in message


# -- what others may write into a dump -----------------------------------------------------------------------------

ATTRIBUTES: list[tuple[str, str, Callable[[str], dict[str, object]]]] = [
    ("cp", "PATH", lambda text: {"image": {"PATH": f"/{text}"}}),
    ("cp", "PATH", lambda text: {"image": {"PATH": f"http://127.0.0.1:1/{text}"}}),
    ("cp", "MD5", lambda text: {"attributes": {"MD5": text}}),
    ("cp", "SHA1", lambda text: {"attributes": {"SHA1": text}}),
    ("cp", "DRIVER", lambda text: {"template": {"DRIVER": text}}),
    ("cp", "STAGING_DIR", lambda text: {"template": {"STAGING_DIR": f"/{text}"}}),
    ("cp", "BRIDGE_LIST", lambda text: {"template": {"BRIDGE_LIST": f"host01 {text}"}}),
    ("cp", "LIMIT_TRANSFER_BW", lambda text: {"template": {"LIMIT_TRANSFER_BW": f"10M{text}"}}),
    ("cp", "SPARSE", lambda text: {"template": {"SPARSE": text}}),
    ("cp", "NFS_AUTO_ENABLE", lambda text: {"template": {"NFS_AUTO_ENABLE": text}}),
    ("mkfs", "FORMAT", lambda text: {"image": {"FORMAT": f"raw{text}"}}),
    ("mkfs", "FS", lambda text: {"image": {"FORMAT": "raw", "FS": f"ext4{text}"}}),
    ("rm", "SOURCE", lambda text: {"image": {"SOURCE": f"/{text}"}}),
    ("export", "SOURCE", lambda text: {"image": {"SOURCE": f"/{text}"}}),
    ("export", "FORMAT", lambda text: {"image": {"FORMAT": text}}),
    ("clone", "PATH", lambda text: {"image": {"PATH": f"/{text}"}}),
    ("clone", "FORMAT", lambda text: {"image": {"FORMAT": text}}),
    ("clone", "SOURCE_BRIDGE_LIST", lambda text: {"extra": {"SOURCE_BRIDGE_LIST": text}}),
]
TEXTS = ["'; touch {}; '", '"; touch {}; "', "; touch {}", "$(touch {})", "`touch {}`", "\ntouch {}\n", "| touch {} #"]


@pytest.mark.parametrize("row", range(len(ATTRIBUTES)), ids=lambda row: "-".join(ATTRIBUTES[row][:2]) + f"-{row}")
def test_nothing_of_a_dump_is_run(row: int, at: Bridged) -> None:
    """The stock drivers run shell text that has these in it, some in quotes and some not."""
    action, name, place = ATTRIBUTES[row]
    canary = at.files / "canary"
    good = {"PATH": at.file("image", b"x"), "SIZE": 1, "FORMAT": "raw", "SOURCE": at.source()}
    planted(at, at.source().name) if action in ("export", "rm") else None
    for text in TEXTS:
        given = place(text.format(canary))
        image = {**good, **given.pop("image", {})}  # type: ignore[dict-item]
        done = at.run(action, image, **given)  # type: ignore[arg-type]
        check_stderr(done, action)
        # an unknown DRIVER converts nothing, and an unknown FORMAT of an image is what the front-end says it is
        assert done.status in (2, 13, 20, 21, 30, 41) or (done.status == 0 and name in ("DRIVER", "FORMAT")), done
        assert not canary.exists() and not at.hosts.on("host01", f"{canary}").exists()
        at.ok("rm", {"SOURCE": at.source()}) if action in ("cp", "clone") else None


def test_the_dump_is_in_no_command_line(at: Bridged) -> None:
    """The stock drivers give it, with all its secrets, to a program as an argument."""
    path = at.file("image", os.urandom(4 * MIB))
    secret = os.urandom(60).hex()
    text = at.dump({"PATH": path}, template={"LIMIT_TRANSFER_BW": "1M", "SECRET": secret})
    with begun(at, text) as process:
        seen = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                seen.append(entry.read_bytes())
        assert len(seen) > 5
        part = text[-160:-100]  # of the secret, in base64
        assert not any(part in line or secret.encode() in line for line in seen)
        process.terminate()
        process.wait()


# -- NFS_AUTO_ENABLE -----------------------------------------------------------------------------------------------

SUDO = """#!/bin/sh
# not sudo: it notes its arguments, and instead of an NFS share it mounts a file system in memory
printf '%s\\n' "$@" -- >>"{noted}"
{then}
"""
NFS = {"NFS_AUTO_ENABLE": "YES", "NFS_AUTO_HOST": "nas-1.example", "NFS_AUTO_PATH": "/export/a'b;c"}


def fake_sudo(at: Bridged, then: str) -> tuple[str, Callable[[], list[list[str]]]]:
    """A PATH with a `sudo` that does THEN, and what it has been asked for so far."""
    noted, directory = at.files / "noted", at.files / "bin"
    directory.mkdir(exist_ok=True)
    (directory / "sudo").write_text(SUDO.format(noted=noted, then=then))
    (directory / "sudo").chmod(0o755)
    noted.write_text("")
    return f"{directory}:/usr/bin:/bin", lambda: [
        words.split("\n")[:-1] for words in noted.read_text().split("--\n")[:-1]
    ]


def test_the_front_end_mounts_by_an_argument_list(at: Bridged) -> None:
    path, asked = fake_sudo(at, "exit 0")
    at.env["PATH"] = path
    mount = ["-n", "mount", "-t", "nfs", "-o", "defaults", "nas-1.example:/export/a'b;c", at.base]
    image = {"PATH": at.file("image", b"x"), "SOURCE": at.source(), "SIZE": 1, "FORMAT": "raw"}
    for action in ("cp", "export", "rm", "mkfs", "monitor", "rm", "clone"):
        at.ok(action, image, bridges="", template=NFS)
    assert asked() == [mount] * 7  # it mounts nothing, so each finds nothing mounted
    assert sorted(os.listdir(at.base)) == sorted([".automounted", at.source().name])
    at.ok("monitor", bridges="", template={**NFS, "NFS_AUTO_OPTS": "vers=4.2,soft"})
    assert asked()[-1][5] == "vers=4.2,soft"
    at.ok("monitor", bridges="", template={**NFS, "NFS_AUTO_ENABLE": "no"})
    assert len(asked()) == 8


@pytest.mark.skipif(os.getuid() != 0, reason="the fake sudo's mount needs root on the host")
def test_a_host_mounts_once(at: Bridged) -> None:
    path, asked = fake_sudo(at, 'shift 6; exec mount -t tmpfs "$@"')
    name = at.add("nfs", sshd=f"SetEnv HOME=/tmp PATH={path}")
    image = {"PATH": at.file("image", os.urandom(MIB)), "SOURCE": at.source(), "SIZE": 1, "FORMAT": "raw"}
    processes = [start_action("datastore/fs/cp", str(id), env=at.env) for id in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.write(at.dump(image, name, template=NFS))
        process.stdin.close()
    for process in processes:
        with process:
            assert process.wait() == 0
    assert len(asked()) == 1
    assert asked()[0][-2:] == ["nas-1.example:/export/a'b;c", at.base]
    assert len(at.on(name)) == 4 and ".automounted" in at.on(name)
    # the stock driver gives clone's several lines of script to what runs one program
    at.ok("clone", {**image, "PATH": at.source(1)}, bridges=name, template=NFS)
    assert at.image(name).read_bytes() == Path(str(image["PATH"])).read_bytes()
    at.ok("rm", image, bridges=name, template=NFS)
    at.ok("monitor", image, bridges=name, template=NFS)
    assert len(asked()) == 1
    other = {**NFS, "NFS_AUTO_PATH": "/another"}
    message = at.fails(31, "nas-1.example:/another", "monitor", image, bridges=name, template=other)
    assert "nas-1.example:/export/a'b;c" in message


@pytest.mark.skipif(os.getuid() != 0, reason="the fake sudo's mount needs root on the host")
@pytest.mark.parametrize("driver", ["shared", "qcow2"])
def test_a_host_mounts_what_a_disk_needs(driver: str, at: Bridged, tmp_path: Path) -> None:
    """The datastores of the image and of the VM, if they want that; a disk never lies below where one should be."""
    share = 'shift 6; mount -t tmpfs "$1" "$2" && cp -a "${1#*:}/." "$2/"'
    path, asked = fake_sudo(at, share)
    name = at.add("nfs", sshd=f"SetEnv HOME=/tmp PATH={path}:/usr/sbin:/sbin")
    root = at.hosts.datastores
    (at.files / "1").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", at.files / "1/image", "1M")
    (at.files / "0").mkdir()
    stores = [datastore_document(number, {**NFS, "NFS_AUTO_PATH": f"{at.files}/{number}"}) for number in (0, 1)]
    disks = {number: {"FORMAT": "qcow2", "SOURCE": f"{root}/1/image"} for number in range(3)}
    disks[1]["CLONE"] = "NO"

    def run(action: str, disk: int, *documents: bytes) -> Done:
        with front_end(tmp_path, vm_document(17, disks), *documents) as known:
            argv = [f"tm/{driver}/{action}", f"fe:{root}/1/image", f"{name}:{root}/0/17/disk.{disk}", "17", "1"]
            return run_action(*argv, env={**at.env, **known})

    there = at.hosts.on(name, root)
    done = run("clone", 0)  # nobody says that anything is to be mounted
    assert done.status == 30 and asked() == [] and not list(there.rglob("disk*")), done
    for action, disk in (("clone", 0), ("clone", 2), ("ln", 1)):
        done = run(action, disk, *stores)
        assert done.status == 0 and check_stderr(done, action) == "", done
    mount = ["-n", "mount", "-t", "nfs", "-o", "defaults"]
    assert asked() == [[*mount, f"nas-1.example:{at.files}/{n}", f"{root}/{n}"] for n in (1, 0)]
    assert os.path.lexists(there / "0/17/disk.1") and (there / "0/.automounted").exists()
    at.hosts.run(name, ["umount", f"{root}/0"])
    assert os.listdir(there / "0") == [], "a disk lies on the host's own storage"

    other = datastore_document(1, {**NFS, "NFS_AUTO_PATH": "/another"})
    done = run("clone", 0, other)
    assert (done.status, "is mounted at" in check_stderr(done, "clone")) == (31, True), done
    fake_sudo(at, "echo 'mount.nfs: access denied by server' >&2; exit 32")
    done = run("clone", 0, *stores)
    assert (done.status, "access denied by server" in check_stderr(done, "clone")) == (1, True), done
    done = run("clone", 0, datastore_document(0, {**NFS, "NFS_AUTO_HOST": "a;b"}))
    assert (done.status, "NFS_AUTO_HOST" in check_stderr(done, "clone")) == (20, True), done
    assert os.listdir(there / "0") == []
    at.hosts.run(name, ["umount", f"{root}/1"])


@pytest.mark.parametrize("action", ["clone", "ln"])
def test_a_disk_that_needs_no_mount_is_made_though_nobody_says_so(at: Bridged, tmp_path: Path, action: str) -> None:
    """A front-end that tells of VMs and refuses to tell of datastores: a driver that never asked made the disk too."""
    root = at.hosts.datastores
    there = at.hosts.on("host01", root)
    (there / "1").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", there / "1/image", "1M")
    known = vm_document(17, {0: {"FORMAT": "qcow2", "SOURCE": f"{root}/1/image", "CLONE": "NO"}})
    argv = [f"tm/shared/{action}", f"fe:{root}/1/image", f"host01:{root}/0/17/disk.0", "17", "1"]
    try:
        with front_end(tmp_path, known, answers=["vm"]) as asked:
            done = run_action(*argv, env={**at.env, **asked})
        assert (done.status, check_stderr(done, action)) == (0, ""), done
        assert os.path.lexists(there / "0/17/disk.0")
        warned = [line for line in done.stderr.splitlines() if line.startswith(f"WARN: {action}: ")]
        assert len(warned) == 1 and "NFS_AUTO_ENABLE" in warned[0] and "one.datastore.info" in warned[0], done
        # what the front-end does not know is not to be mounted, and that is no news
        with front_end(tmp_path, known) as asked:
            done = run_action(*argv, env={**at.env, **asked})
        assert (done.status, "WARN" in done.stderr) == (0, False), done
        # where a mount would have been needed, nothing is made in its place
        shutil.rmtree(there / "1")
        with front_end(tmp_path, known, answers=["vm"]) as asked:
            done = run_action(*argv, env={**at.env, **asked})
        assert (done.status, "is its datastore mounted" in check_stderr(done, action)) == (30, True), done
    finally:
        for name in ("0", "1"):
            shutil.rmtree(there / name, ignore_errors=True)


def test_a_mount_that_fails_is_said(at: Bridged) -> None:
    path, _ = fake_sudo(at, "echo 'mount.nfs: access denied by server' >&2; exit 32")
    at.env["PATH"] = path
    image = {"PATH": at.file("image", b"x"), "SOURCE": at.source(), "SIZE": 1, "FORMAT": "raw"}
    for action in ("cp", "rm", "mkfs", "monitor", "clone", "export"):
        at.fails(1, "access denied by server", action, image, bridges="", template=NFS)
    fake_sudo(at, "echo 'sudo: a password is required' >&2; exit 1")
    at.fails(21, "sudoers", "monitor", image, bridges="", template=NFS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("NFS_AUTO_HOST", ["", "-h", "a b", "a;id", "$(id)", "a:b", "a/b", "a\nb"]),
        ("NFS_AUTO_PATH", ["", "relative", "/a b", "/a\nb", "-o"]),
        ("NFS_AUTO_OPTS", ["-o", "a b", "a;id", "$(id)", "a'b", "a\nb"]),
        ("NFS_AUTO_ENABLE", ["maybe"]),
    ],
)
def test_what_cannot_be_mounted_is_refused(name: str, values: list[str], at: Bridged) -> None:
    path, asked = fake_sudo(at, "exit 0")
    at.env["PATH"] = path
    for value in values:
        at.fails(20, name, "monitor", bridges="", template={**NFS, name: value})
    assert asked() == []
