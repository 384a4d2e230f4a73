"""The datastore drivers, in both contract forms, on real images."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import PATH, Done, check_stderr, run_action, start_action
from dumps import REGTIME, dump

MIB = 1 << 20


class Store:
    """A datastore in a directory of its own, and actions on it in one form."""

    def __init__(self, work: Path, form: str) -> None:
        self.work, self.form = work, form
        self.base = work / "var" / "datastores" / "1"
        self.files = work / "files"
        self.files.mkdir()
        (work / "var").mkdir()
        home = work / "home"
        home.mkdir()
        self.env = {"PATH": PATH, "HOME": str(home), "ONE_LOCATION": str(work), "TMPDIR": str(work)}

    def file(self, name: str, content: bytes) -> Path:
        path = self.files / name
        path.write_bytes(content)
        return path

    def run(
        self,
        action: str,
        image: Mapping[str, object],
        attributes: Mapping[str, object] | None = None,
        template: Mapping[str, object] | None = None,
        type: int = 0,
    ) -> Done:
        # Front-ends write a doubled slash into BASE_PATH.
        text = dump(f"{self.work}/var//datastores/1", image, attributes, template, type)
        if self.form == "3.4":
            return run_action(action, text.decode(), "42", env=self.env)
        return run_action(action, "42", env=self.env, input=text)

    def ok(self, action: str, image: Mapping[str, object], **more: Mapping[str, object] | int) -> str:
        done = self.run(action, image, **more)  # type: ignore[arg-type]
        assert done.status == 0, done.stderr
        check_stderr(done, action)
        assert done.stdout == "" or done.stdout.endswith("\n")
        return done.stdout.removesuffix("\n")

    def fails(self, status: int, text: str, action: str, image: Mapping[str, object], **more: object) -> None:
        before = self.left()
        done = self.run(action, image, **more)  # type: ignore[arg-type]
        message = check_stderr(done, action, marks=self.form == "3.4")
        assert (done.status, text in message) == (status, True), done
        assert self.left() == before

    def left(self) -> list[str]:
        return sorted(os.listdir(self.base)) if self.base.exists() else []

    @property
    def source(self) -> Path:
        """Where image 42 goes."""
        return self.base / hashlib.md5(f"{REGTIME}:42".encode()).hexdigest()


@pytest.fixture(params=["3.4", "current"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path, str(request.param))


@pytest.fixture
def today(tmp_path: Path) -> Store:
    return Store(tmp_path, "current")


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *argv], check=True, capture_output=True)


def test_cp_answers_in_each_form(store: Store) -> None:
    content = os.urandom(3 * MIB + 1)
    path = store.file("image.raw", content)
    for _ in range(2):  # any action can be repeated
        answer = store.ok("datastore/fs/cp", {"PATH": path})
        assert answer == f"{store.source} " + ("4" if store.form == "3.4" else "raw")
        assert store.source.read_bytes() == content
    assert store.left() == [store.source.name]
    assert store.source.stat().st_mode & 0o777 == (0o660 if store.form == "3.4" else 0o644)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_cp_keeps_holes_and_takes_names_as_they_are(store: Store, prefix: str) -> None:
    path = store.file("a b;$(id)'\"*", b"x" * MIB) if not prefix else store.file("image", b"x" * MIB)
    os.truncate(path, 200 * MIB)
    store.ok("datastore/fs/cp", {"PATH": f"{prefix}{path}"})
    assert store.source.stat().st_size == 200 * MIB
    assert store.source.stat().st_blocks * 512 < 2 * MIB


def test_cp_of_qcow2(store: Store) -> None:
    path = store.files / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "10M")
    answer = store.ok("datastore/fs/cp", {"PATH": path})
    assert answer.split()[1] == ("1" if store.form == "3.4" else "qcow2")
    assert store.source.read_bytes() == path.read_bytes()


def pack(kind: str, content: bytes) -> bytes:
    if kind == "zst":
        return subprocess.run(["zstd", "-q"], input=content, capture_output=True, check=True).stdout
    if kind == "gz":
        return gzip.compress(content)
    return bz2.compress(content) if kind == "bz2" else lzma.compress(content)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_cp_unpacks_and_checks_the_packed_bytes(store: Store, kind: str) -> None:
    content = os.urandom(MIB) + bytes(4 * MIB) + b"end"
    packed = pack(kind, content)
    path = store.file("image." + kind, packed)
    digests = {name: hashlib.new(name, packed).hexdigest().upper() for name in ("md5", "sha1", "sha256")}
    store.ok("datastore/fs/cp", {"PATH": path}, attributes={name.upper(): value for name, value in digests.items()})
    assert store.source.read_bytes() == content
    assert store.source.stat().st_blocks * 512 < 2 * MIB
    store.source.unlink()
    for name in digests:
        wrong = {"PATH": path}
        store.fails(40, name.upper(), "datastore/fs/cp", wrong, attributes={name.upper(): "0" * len(digests[name])})
    path.write_bytes(packed[:-20])
    store.fails(41, "cut off", "datastore/fs/cp", {"PATH": path})


def test_what_is_packed_can_stay_packed(today: Store) -> None:
    packed = gzip.compress(b"kernel" * 1000)
    path = today.file("vmlinuz.gz", packed)
    today.ok("datastore/fs/cp", {"PATH": path}, template={"NO_DECOMPRESS": "YES"})
    assert today.source.read_bytes() == packed
    today.source.unlink()
    assert today.ok("datastore/fs/cp", {"PATH": path, "TYPE": 3}, type=2).split()[1] == "raw"
    assert today.source.read_bytes() == packed
    assert today.ok("datastore/fs/stat", {"PATH": path}, type=2) == "1"


def test_cp_converts_to_the_driver_of_the_datastore(today: Store) -> None:
    content = os.urandom(MIB) + bytes(3 * MIB)
    raw = today.file("image.raw", content)
    qcow2, vmdk = today.files / "image.qcow2", today.files / "image.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk)
    for path in (qcow2, vmdk):
        answer = today.ok("datastore/fs/cp", {"PATH": path}, template={"DRIVER": "raw"})
        assert answer == f"{today.source} raw"
        assert today.source.read_bytes() == content
        today.source.unlink()
    assert today.ok("datastore/fs/cp", {"PATH": raw}, template={"DRIVER": "qcow2"}) == f"{today.source} qcow2"
    assert today.source.read_bytes()[:4] == b"QFI\xfb"
    today.source.unlink()
    for image, template in (
        ({"PATH": qcow2}, {"DRIVER": "raw", "CONVERT": "no"}),
        ({"PATH": qcow2, "TYPE": 1}, {"DRIVER": "raw"}),
        ({"PATH": qcow2}, {}),
    ):
        assert today.ok("datastore/fs/cp", image, template=template) == f"{today.source} qcow2"
        today.source.unlink()


def test_an_image_that_names_another_file_is_refused(store: Store) -> None:
    secret = store.file("secret", b"secret" * 1000)
    for name, options in (("backing", ["-b", secret, "-F", "raw"]), ("data", ["-o", f"data_file={secret}"])):
        path = store.files / f"{name}.qcow2"
        qemu_img("create", "-f", "qcow2", *options, path, "1M")
        store.fails(41, str(secret), "datastore/fs/cp", {"PATH": path})
        packed = store.file(f"{name}.gz", gzip.compress(path.read_bytes()))
        store.fails(41, str(secret), "datastore/fs/cp", {"PATH": packed})


def test_only_what_the_datastore_allows_is_read(store: Store) -> None:
    path, action = store.file("image", b"x"), "datastore/fs/cp"
    where = str(store.files)
    (store.files / "safe").mkdir()
    safe = store.file("safe/image", b"x")
    (store.files / "safe" / "link").symlink_to(path)
    for template, source in (
        # in the stock drivers both are patterns, and fit whatever begins with what fits
        ({"RESTRICTED_DIRS": "/", "SAFE_DIRS": f"{where}/sa"}, safe),
        ({"RESTRICTED_DIRS": "/", "SAFE_DIRS": f"{where}/s.fe"}, safe),
        ({"RESTRICTED_DIRS": f"/nothing {where}"}, path),
        ({"RESTRICTED_DIRS": "/", "SAFE_DIRS": f"{where}/safe"}, store.files / "safe" / "link"),
        ({}, store.work / "home" / "image"),
        ({}, store.work / "var" / "image"),
    ):
        store.fails(21, "RESTRICTED_DIRS", action, {"PATH": source}, template=template)
        store.fails(21, "RESTRICTED_DIRS", action, {"PATH": f"file://{source}"}, template=template)
        # a user's own attributes do not count
        store.fails(21, "RESTRICTED_DIRS", action, {"PATH": source}, attributes={"SAFE_DIRS": "/"}, template=template)
    store.ok(action, {"PATH": safe}, template={"RESTRICTED_DIRS": "/", "SAFE_DIRS": f"/nothing {where}/safe/"})
    if store.form == "current":
        store.fails(21, "RESTRICTED_DIRS", "datastore/fs/stat", {"PATH": path}, template={"RESTRICTED_DIRS": "/"})


def test_34_imports_a_directory_and_has_a_umask(tmp_path: Path) -> None:
    store = Store(tmp_path, "3.4")
    directory = store.files / "vm"
    (directory / "sub").mkdir(parents=True)
    (directory / "disk.vmdk").write_bytes(bytes(MIB))
    (directory / "sub" / "more").write_bytes(b"x" * 10)
    for _ in range(2):
        answer = store.ok("datastore/fs/cp", {"PATH": directory}, template={"UMASK": "0027"})
        assert answer == f"{store.source} 2"
        assert (store.source / "sub" / "more").read_bytes() == b"x" * 10
        assert store.source.stat().st_mode & 0o777 == 0o750
    store.ok("datastore/fs/rm", {"SOURCE": store.source})
    assert store.left() == []
    store.fails(20, "UMASK", "datastore/fs/cp", {"PATH": directory}, template={"UMASK": "rwx"})


def test_today_a_directory_is_no_image(today: Store) -> None:
    today.fails(21, "a directory", "datastore/fs/cp", {"PATH": today.files})


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """The URL of a web server with the store's files."""
    argv = ["/usr/bin/python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(store.files), "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            yield "http://127.0.0.1:" + server.stdout.readline().split("port ")[1].split()[0]
        finally:
            server.kill()


def test_cp_from_a_web_server(store: Store) -> None:
    content = os.urandom(2 * MIB)
    store.file("image.xz", lzma.compress(content))
    with serving(store) as url:
        # directories are about local files
        store.ok("datastore/fs/cp", {"PATH": f"{url}/image.xz"}, template={"RESTRICTED_DIRS": "/"})
        assert store.source.read_bytes() == content
        store.source.unlink()
        store.fails(13, "404", "datastore/fs/cp", {"PATH": f"{url}/nothing"})
    store.fails(13, "cannot reach", "datastore/fs/cp", {"PATH": f"{url}/image.xz"})


def test_mkfs_makes_or_reserves(store: Store) -> None:
    def image(format: str, fs: str = "") -> dict[str, object]:
        if store.form == "3.4":
            return {"FSTYPE": fs or format, "SIZE": 24}
        return {"FORMAT": format, "FS": fs, "SIZE": 24}

    answer = f"{store.source} 24" if store.form == "3.4" else str(store.source)
    assert store.ok("datastore/fs/mkfs", image("save_as")) == answer
    assert store.left() == []
    for format, fs, found in (("raw", "", ""), ("raw", "ext4", "ext4"), ("raw", "ext3", "ext3"), ("swap", "", "swap")):
        assert store.ok("datastore/fs/mkfs", image(format, fs)) == answer
        assert store.source.stat().st_size == 24 * MIB
        argv = ["/usr/sbin/blkid", "-p", "-s", "TYPE", "-o", "value", str(store.source)]
        assert subprocess.run(argv, capture_output=True, text=True).stdout.strip() == found
        store.source.unlink()
    if store.form == "current":
        for fs in ("", "ext4"):
            assert store.ok("datastore/fs/mkfs", image("qcow2", fs)) == answer
            assert store.source.read_bytes()[:4] == b"QFI\xfb"
            store.source.unlink()
        store.fails(2, "dmg", "datastore/fs/mkfs", image("dmg"))
    store.fails(20 if store.form == "current" else 2, "ext4; id", "datastore/fs/mkfs", image("raw", "ext4; id"))
    assert store.left() == []


def test_rm_takes_what_is_beside_and_needs_nothing(store: Store) -> None:
    store.base.mkdir(parents=True)
    for name in ("abc", "abc.md5sum", "abcdef", ".abc.import.part"):
        (store.base / name).touch()
    (store.base / "abc.snap").mkdir()
    (store.base / "abc.snap" / "0").touch()
    for _ in range(2):
        assert store.ok("datastore/fs/rm", {"SOURCE": f"{store.work}/var//datastores/1/abc"}) == ""
        assert store.left() == ["abcdef"]
    for source in (store.work / "files", store.base, store.base / "sub" / "abc", f"{store.base}/../1/abcdef", "/"):
        store.fails(21, "IMAGE/SOURCE", "datastore/fs/rm", {"SOURCE": source})


def test_clone_copies_and_converts(today: Store) -> None:
    content = os.urandom(MIB)
    original = today.file("original", content)
    for _ in range(2):
        assert today.ok("datastore/fs/clone", {"PATH": original, "FORMAT": "raw"}) == f"{today.source} raw"
        assert today.source.read_bytes() == content
    today.source.unlink()
    image = {"PATH": original, "FORMAT": "raw"}
    assert today.ok("datastore/fs/clone", image, template={"DRIVER": "qcow2"}) == f"{today.source} qcow2"
    assert today.source.read_bytes()[:4] == b"QFI\xfb"
    today.source.unlink()
    today.fails(30, "missing", "datastore/fs/clone", {"PATH": today.files / "missing", "FORMAT": "raw"})


def test_stat_and_monitor(today: Store) -> None:
    qcow2 = today.files / "image.qcow2"
    qemu_img("create", "-f", "qcow2", qcow2, "5000M")
    assert today.ok("datastore/fs/stat", {"PATH": qcow2}) == "5000"
    packed = today.file("image.qcow2.gz", gzip.compress(qcow2.read_bytes()))
    assert today.ok("datastore/fs/stat", {"PATH": packed}) == "5000"
    assert today.ok("datastore/fs/stat", {"PATH": today.file("raw.xz", lzma.compress(bytes(MIB + 1)))}) == "2"
    assert today.left() == []
    lines = dict(line.split("=") for line in today.ok("datastore/fs/monitor", {}).splitlines())
    found = os.statvfs(today.base)
    assert int(lines["TOTAL_MB"]) == found.f_blocks * found.f_frsize >> 20
    assert abs(int(lines["FREE_MB"]) - (found.f_bavail * found.f_frsize >> 20)) < 500
    assert sorted(lines) == ["FREE_MB", "TOTAL_MB", "USED_MB"]


def test_limit_transfer_bw_holds_for_every_way_an_image_comes(today: Store) -> None:
    """In the stock driver for web servers only.  How fast exactly, test_source counts."""
    content = os.urandom(300 << 10)
    path, packed = today.file("image", content), today.file("image.gz", gzip.compress(content))
    digest = {"MD5": hashlib.md5(content).hexdigest()}
    with serving(today) as url:
        for source, attributes in (
            (path, {}),
            (path, digest),
            (packed, {}),
            (f"{url}/image", {}),
            (f"{url}/image.gz", {}),
        ):
            for limit, least in (("200k", 1.4), ("", 0.0)):
                began = time.monotonic()
                template = {"LIMIT_TRANSFER_BW": limit}
                today.ok("datastore/fs/cp", {"PATH": source}, attributes=attributes, template=template)
                assert time.monotonic() - began > least
                assert today.source.read_bytes() == content
                today.source.unlink()
    for limit in ("x", "10MB", "-1", "0", "1.5M", "1 M", "1M;id", "$(id)", "k", "1" * 20):
        template = {"LIMIT_TRANSFER_BW": limit}
        for action in ("cp", "stat"):
            today.fails(20, "LIMIT_TRANSFER_BW", f"datastore/fs/{action}", {"PATH": path}, template=template)


def test_34_directories_keep_to_the_limit_too(tmp_path: Path) -> None:
    store = Store(tmp_path, "3.4")
    (store.files / "vm").mkdir()
    store.file("vm/disk", os.urandom(300 << 10))
    began = time.monotonic()
    store.ok("datastore/fs/cp", {"PATH": store.files / "vm"}, template={"LIMIT_TRANSFER_BW": "200k"})
    assert time.monotonic() - began > 1.4


def test_sparse_no_takes_all_space_at_once(store: Store) -> None:
    path = store.file("image", b"x")
    os.truncate(path, 20 * MIB)
    for sparse, full in (("no", True), ("yes", False)):
        store.ok("datastore/fs/cp", {"PATH": path}, template={"SPARSE": sparse})
        assert (store.source.stat().st_blocks * 512 >= 20 * MIB) is full
        store.source.unlink()


def test_a_block_device_is_imported_whole(today: Store) -> None:
    """What fstat() says of one is a size of 0."""
    image = today.file("image", os.urandom(MIB))
    losetup = ["losetup", "--find", "--show", "--read-only", str(image)]
    done = subprocess.run(losetup, capture_output=True, text=True, env={"PATH": f"{PATH}:/usr/sbin:/sbin"})
    if done.returncode:
        pytest.skip(f"this machine makes no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        today.ok("datastore/fs/cp", {"PATH": device})
    finally:
        subprocess.run(["losetup", "-d", device], check=True, env={"PATH": f"{PATH}:/usr/sbin:/sbin"})
    assert today.source.read_bytes() == image.read_bytes()


def test_a_kill_in_the_middle_of_an_import_leaves_a_part_that_the_next_run_removes(store: Store) -> None:
    path = store.file("image", os.urandom(64 * MIB))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()  # so that it is read, and not cloned in an instant
    text = dump(store.base, {"PATH": path}, {"SHA256": digest})
    argv, input = ([text.decode(), "42"], b"") if store.form == "3.4" else (["42"], text)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with start_action("datastore/fs/cp", *argv, env=store.env) as process:
            assert process.stdin
            process.stdin.write(input)
            process.stdin.close()
            while not any(name.endswith(".part") for name in store.left()):
                assert process.poll() is None, "too fast to be caught: a larger image is needed"
                time.sleep(0.001)
            process.send_signal(number)
            process.wait()
            assert process.returncode in (143, -9)
            assert process.stdout
            assert process.stdout.read() == b""
        assert not store.source.exists()
        assert (store.left() == []) == (number == signal.SIGTERM)
    store.ok("datastore/fs/cp", {"PATH": path}, attributes={"SHA256": digest})
    assert store.left() == [store.source.name]


def test_rm_ends_an_import_that_its_front_end_has_given_up(store: Store) -> None:
    path = store.file("image", os.urandom(64 * MIB))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = dump(store.base, {"PATH": path}, {"SHA256": digest})
    argv, input = ([text.decode(), "42"], b"") if store.form == "3.4" else (["42"], text)
    with start_action("datastore/fs/cp", *argv, env=store.env) as process:
        assert process.stdin
        process.stdin.write(input)
        process.stdin.close()
        while not any(name.endswith(".part") for name in store.left()):
            assert process.poll() is None, "too fast to be caught: a larger image is needed"
        store.ok("datastore/fs/rm", {"SOURCE": store.source})
        assert store.left() == []
        process.wait()
        assert process.returncode == 143
    assert store.left() == []


def within_tmpfs(store: Store, size: str, image: Path, template: Mapping[str, object], then: str) -> Done:
    """cp of IMAGE into a tmpfs of SIZE, which needs a mount namespace; THEN: what a shell does with that, "$1"."""
    store.base.mkdir(parents=True, exist_ok=True)
    (store.work / "dump").write_bytes(dump(store.base, {"PATH": image}, None, template))
    script = f'mount -t tmpfs -o size={size} tmpfs "$1" || exit 99'
    script += f'; "$2" "$3" 42 <"$4" >"$5"; status=$?; {then}; exit "$status"'
    user = [] if os.getuid() == 0 else ["--map-root-user"]
    tree = Path(__file__).resolve().parent.parent
    argv = ["unshare", *user, "--mount", "sh", "-c", script, "-", str(store.base), "/usr/bin/python3"]
    argv += [str(tree / "datastore/fs/cp"), str(store.work / "dump"), str(store.work / "answer")]
    done = subprocess.run(argv, capture_output=True, text=True, env=store.env)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"this machine forbids a mount namespace: {done.stderr.strip()}")
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, "current")
    path = store.file("image.gz", gzip.compress(os.urandom(8 * MIB)))
    done = within_tmpfs(store, "4m", path, {}, 'ls -A "$1"')
    assert (done.status, done.stdout) == (12, ""), done
    assert "free some space" in check_stderr(Done(done.status, "", done.stderr), "cp")


@pytest.mark.parametrize(("packed", "driver"), [("gz", "qcow2"), ("", "qcow2"), ("qcow2", "raw"), ("vmdk", "raw")])
def test_an_import_that_is_converted_needs_no_room_for_a_second_copy(tmp_path: Path, packed: str, driver: str) -> None:
    """192 MiB of data, where 240 MiB fit; the stock driver needs them twice."""
    store = Store(tmp_path, "current")
    raw = store.file("image", b"")
    with raw.open("wb") as file:
        for _ in range(192):
            file.write(os.urandom(MIB))
            file.seek(MIB // 2, os.SEEK_CUR)
    path = raw.with_suffix(f".{packed}") if packed else raw
    if packed == "gz":
        path.write_bytes(gzip.compress(raw.read_bytes(), 0))
    elif packed:
        qemu_img("convert", "-f", "raw", "-O", packed, raw, path)
    same = f"qemu-img compare -f raw -F {driver} '{raw}' \"$1\"/*"
    done = within_tmpfs(store, "240m", path, {"DRIVER": driver}, same)
    assert (done.status, done.stdout) == (0, "Images are identical.\n"), done
    assert (tmp_path / "answer").read_text().split()[1] == driver


def test_the_dummy_driver_answers_what_front_ends_expect(store: Store) -> None:
    old = store.form == "3.4"
    assert store.ok("datastore/dummy/cp", {"PATH": "/x"}) == ("dummy_path 1024" if old else "dummy_path dummy_format")
    assert store.ok("datastore/dummy/mkfs", {}) == ("dummy_path 1024" if old else "dummy_path")
    assert store.ok("datastore/dummy/rm", {"SOURCE": "dummy_path"}) == ""
    if not old:
        assert store.ok("datastore/dummy/clone", {}) == "dummy_path"
        assert store.ok("datastore/dummy/stat", {}) == "1024"
        assert store.ok("datastore/dummy/monitor", {}) == "USED_MB=9720\nTOTAL_MB=20480\nFREE_MB=20480"
        for action in ("snap_delete", "snap_revert", "snap_flatten"):
            assert store.ok(f"datastore/dummy/{action}", {"SOURCE": "dummy_path", "TARGET_SNAPSHOT": 0}) == ""
        assert store.ok("datastore/dummy/restore", {}) == "0 dummy_image"
        assert "<IMPORT_SOURCE>dummy_path</IMPORT_SOURCE>" in store.ok(
            "datastore/dummy/export", {"SOURCE": "dummy_path"}
        )


def test_the_dev_driver_takes_devices_as_they_are(store: Store) -> None:
    old = store.form == "3.4"
    assert store.ok("datastore/dev/cp", {"PATH": "/dev//vg/a'b"}) == ("/dev/vg/a'b 0" if old else "/dev/vg/a'b raw")
    assert store.ok("datastore/dev/rm", {"SOURCE": "/dev/vg/a"}) == ""
    for path in (
        "",
        "vg/a",
        "/dev/../etc/shadow",
        "/",
        "/dev/a raw",
        "/dev/a\nb",
        "http://x/y",
        "host:sda",
        "/dev/" + "9" * 5000,
    ):
        store.fails(2, "", "datastore/dev/cp", {"PATH": path})
    refused = ["mkfs"] if old else ["mkfs", "clone", "snap_delete", "snap_revert", "snap_flatten", "export"]
    for action in refused:
        store.fails(24, f"no {action}", f"datastore/dev/{action}", {"PATH": "/dev/x", "SOURCE": "/dev/x", "SIZE": 1})
    if not old:
        assert store.ok("datastore/dev/stat", {"PATH": "/dev/x"}) == "0"
        assert store.ok("datastore/dev/monitor", {}) == "USED_MB=0\nTOTAL_MB=1\nFREE_MB=1"
    assert store.left() == []
