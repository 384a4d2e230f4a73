"""Images that are converted while they give back their room: what comes of it, and the most room that was taken."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from madrigal.command import CommandFailed
from madrigal.errors import NoSpace
from madrigal.onhost import consume, image
from madrigal.onhost.part import Nameless, Part
from madrigal.onhost.undo import Undo

MIB = 1 << 20
PATIENCE = 60.0
SIZE = 80 * MIB


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consume, "SMALL", 4 * MIB)


@pytest.fixture
def undo() -> Iterator[Undo]:
    undo = Undo()
    yield undo
    assert undo.unwind() == []


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data in pieces of all sizes, and a last sector that is not whole."""
    path, dice = tmp_path_factory.mktemp("raw") / "image", random.Random(5)
    with path.open("wb") as file:
        for _ in range(40):
            file.seek(dice.randrange(20) * MIB * 2)
            file.write(dice.randbytes(dice.randrange(MIB)))
        file.seek(SIZE - 34 * MIB)
        file.write(dice.randbytes(34 * MIB - 100))
    return path


class Watched:
    """The most room that files in DIRECTORY, and the open FD, take while something is done."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.peak, self._over = 0, threading.Event()
        self._directory, self._fd = directory, fd
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            found = {os.fstat(self._fd).st_ino: os.fstat(self._fd).st_blocks}
            for path in self._directory.iterdir():
                found[path.stat().st_ino] = path.stat().st_blocks
            self.peak = max(self.peak, sum(found.values()) * 512)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def arrived(undo: Undo, directory: Path, raw: Path, format: str, *options: str) -> Part:
    """The disk RAW in FORMAT as something that was received."""
    made = Part(undo, str(directory), "image", "stream")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, *options, str(raw), made.path], check=True)
    if format == "raw":
        os.truncate(made.path, raw.stat().st_size)
    return made


def same(path: Path, format: str, raw: Path) -> bool:
    compare = ["qemu-img", "compare", "-q", "-f", format, "-F", "raw", str(path), str(raw)]
    return subprocess.run(compare).returncode == 0


ONE_COPY = [
    ("raw", (), "qcow2"),
    ("qcow2", (), "raw"),
    ("qcow2", ("-o", "cluster_size=2M"), "raw"),
    ("qcow2", ("-o", "cluster_size=4k,extended_l2=off"), "raw"),
    ("vmdk", (), "qcow2"),
    ("vmdk", (), "raw"),
    ("vdi", (), "qcow2"),
    ("vpc", (), "raw"),
]


@pytest.mark.parametrize(("format", "options", "driver"), ONE_COPY)
def test_there_is_one_copy_and_it_is_right(
    tmp_path: Path, undo: Undo, raw: Path, format: str, options: tuple[str, ...], driver: str
) -> None:
    source, target = arrived(undo, tmp_path, raw, format, *options), tmp_path / "target"
    target.touch()
    one = max(os.stat(source.path).st_blocks * 512, raw.stat().st_blocks * 512)
    with Watched(tmp_path, source.fd) as watched:
        consume.convert(source, format, str(target), driver, lambda: None, PATIENCE)
    assert same(target, driver, raw)
    if driver == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
    assert target.stat().st_blocks * 512 < 1.1 * raw.stat().st_blocks * 512
    assert 0.9 * one < watched.peak < 1.25 * one
    assert os.fstat(source.fd).st_blocks * 512 < 0.2 * one


@pytest.mark.parametrize(
    ("format", "options"), [("vhdx", ()), ("qcow2", ("-c",)), ("vmdk", ("-o", "subformat=streamOptimized"))]
)
def test_what_cannot_be_given_back_is_converted_at_once(
    tmp_path: Path, undo: Undo, format: str, options: tuple[str, ...]
) -> None:
    raw, dice = tmp_path / "raw", random.Random(6)
    raw.write_bytes(b"".join(dice.randbytes(700).hex().encode() for _ in range(24000)))
    source, target = arrived(undo, tmp_path, raw, format, *options), tmp_path / "target"
    target.touch()
    before = os.fstat(source.fd).st_blocks
    consume.convert(source, format, str(target), "raw", lambda: None, PATIENCE)
    assert same(target, "raw", raw)
    assert os.fstat(source.fd).st_blocks == before


def test_data_that_a_disk_has_in_two_places_stay_until_the_end(tmp_path: Path, undo: Undo, raw: Path) -> None:
    """Two entries of a qcow2 image lead to one cluster: it would be gone when it is to be read again."""
    source, target = arrived(undo, tmp_path, raw, "qcow2"), tmp_path / "target"
    target.touch()
    with open(source.path, "r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        table = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(table)
        entries = file.read(64 << 10)
        last = SIZE // (64 << 10) - 2
        first = next(at for at in range(last) if any(entries[8 * at : 8 * at + 8]))
        file.seek(table + 8 * last)
        file.write(entries[8 * first : 8 * first + 8])
    expected = tmp_path / "expected"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", source.path, expected], check=True)
    consume.convert(source, "qcow2", str(target), "raw", lambda: None, PATIENCE)
    assert same(target, "raw", expected)
    assert not same(target, "raw", raw)


def test_an_image_in_very_many_pieces_is_not_listed(
    tmp_path: Path, undo: Undo, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "_TEXT", 1000)
    source, target = arrived(undo, tmp_path, raw, "qcow2"), tmp_path / "target"
    target.touch()
    consume.convert(source, "qcow2", str(target), "raw", lambda: None, PATIENCE)
    assert same(target, "raw", raw)
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(source.path), "target"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_old_qemu_img_converts_at_once(
    tmp_path: Path, undo: Undo, raw: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, programs = tmp_path / "work", tmp_path / "bin"
    work.mkdir()
    programs.mkdir()
    fake = programs / "qemu-img"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *target-is-zero*) '
        "echo \"qemu-img: unrecognized option '--target-is-zero'\" >&2; exit 1;; esac\n"
        f'PATH="{os.environ["PATH"]}" exec qemu-img "$@"\n'
    )
    fake.chmod(0o755)
    source, target = arrived(undo, work, raw, format), work / "target"
    target.touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    driver = "raw" if format == "qcow2" else "qcow2"
    consume.convert(source, format, str(target), driver, lambda: None, PATIENCE)
    assert same(target, driver, raw)


def test_a_part_without_a_name_and_names_with_commas(tmp_path: Path, undo: Undo, raw: Path) -> None:
    directory = tmp_path / "a,size=1,b"
    directory.mkdir()
    source, target = Nameless(undo, str(directory)), directory / "target,x"
    target.touch()
    with open(raw, "rb") as file:
        for data in iter(lambda: file.read(MIB), b""):
            os.write(source.fd, data)
    consume.convert(source, "raw", str(target), "qcow2", lambda: None, PATIENCE)
    assert same(target, "qcow2", raw)


def test_a_damaged_image_fails_as_it_would_at_once(tmp_path: Path, undo: Undo, raw: Path) -> None:
    source, target = arrived(undo, tmp_path, raw, "qcow2"), tmp_path / "target"
    target.touch()
    with open(source.path, "r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(b"\xff" * 8)
    with pytest.raises(CommandFailed):
        consume.convert(source, "qcow2", str(target), "raw", lambda: None, PATIENCE)


def test_what_is_moved_is_there_once(undo: Undo, tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another file system, as from STAGING_DIR; without the way that needs no second copy at all."""
    monkeypatch.setattr("madrigal.onhost.copy.clone", lambda *_: False)
    source = arrived(undo, tmp_path, raw, "raw")
    target = Part(undo, str(tmp_path), "moved", "import")
    room = os.stat(source.path).st_blocks * 512
    with Watched(tmp_path, source.fd) as watched:
        consume.move(source, target, lambda **_: None)
    assert Path(target.path).read_bytes() == raw.read_bytes()
    assert os.stat(target.path).st_blocks * 512 < room + MIB, "holes stay holes"
    assert watched.peak < room * 1.07 + 6 * MIB
    assert os.stat(source.path).st_blocks == 0


def test_there_is_not_room_for_what_is_moved(undo: Undo, tmp_path: Path, raw: Path) -> None:
    """Which is known before anything of it has gone."""
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        source, target = arrived(undo, tmp_path, raw, "raw"), Part(undo, directory, "moved", "import")
        real = os.fstatvfs(target.fd)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((*real[:4], 10, *real[5:])))
            with pytest.raises(NoSpace, match="MiB are needed for a copy and 0 MiB are free"):
                consume.move(source, target, lambda **_: None)
        assert Path(source.path).read_bytes() == raw.read_bytes()
        undo.unwind()
