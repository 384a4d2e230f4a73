"""The worker that is sent to hosts, by this Python and by 3.6 where one is found, started here without ssh."""

from __future__ import annotations

import ast
import marshal
import os
import shutil
import subprocess
import sys
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import cast

import pytest
from conftest import PATH, TREE

from madrigal.host import program
from madrigal.host.channel import Channel
from madrigal.host.remote import RemoteSession
from madrigal.onhost import stream

MIB = 1 << 20


def python36() -> str:
    found = shutil.which("python3.6", path=f"{PATH}:/usr/local/bin:/opt/python3.6/bin")
    others = [*Path.home().glob(".pyenv/versions/3.6*/bin/python3.6"), *Path("/opt").glob("*/bin/python3.6")]
    return found or next((str(path) for path in others if os.access(path, os.X_OK)), "")


OLD = python36()
PYTHONS = {"/usr/bin/python3": "this Python", **({OLD: "3.6"} if OLD else {})}


class Near:
    """A host whose commands run here, by an interpreter of choice."""

    name = "near"

    def __init__(self, python: str) -> None:
        self._python = python

    def start(self, command: str, bulk: bool) -> Channel:
        words = command.replace("python3", self._python, 1)
        process = subprocess.Popen(
            ["/bin/sh", "-c", words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={"PATH": PATH, "LC_ALL": "C"},
        )
        return Pipes(process)

    def retried(self, error: Exception, attempt: int) -> None:
        raise error


class Pipes(Channel):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self._process = process
        super().__init__("near", os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno()))
        process.stdin.close()
        process.stdout.close()

    def _poll(self) -> int | None:
        return self._process.poll()

    def _end(self) -> None:
        self._process.wait(10)

    def stderr(self) -> bytes:
        assert self._process.stderr
        return self._process.stderr.read()


@pytest.fixture(params=list(PYTHONS), ids=list(PYTHONS.values()))
def session(request: pytest.FixtureRequest) -> RemoteSession:
    return RemoteSession(Near(request.param), bulk=False)  # type: ignore[arg-type]


def test_worker(session: RemoteSession, tmp_path: Path) -> None:
    """Everything that a worker does, once."""
    ds, image = tmp_path / "ds/ä b", tmp_path / "image"
    image.write_bytes(os.urandom(MIB) + bytes(4 * MIB) + b"end")
    vm = ds / "17"
    with session:
        session.tell("hold", path=str(vm), make="all")
        sent = session.receive(stream.give(str(image)), path=str(vm / "disk.0"), grow=["raw", 8 * MIB])
        assert MIB < sent < 4 * MIB
        session.tell("copy", source=str(vm / "disk.0"), path=str(vm / "disk.1"))
        session.tell("make", path=str(vm / "disk.2"), format="raw", size=16 * MIB, fs="ext4")
        session.tell("make", path=str(vm / "disk.3"), format="qcow2", size=16 * MIB)
        session.tell("link", target="disk.0", path=str(vm / "disk.4"))
        session.tell("mark", path=str(ds / ".monitor"), text="ssh")
        assert session.call("measure", path=str(vm / "disk.0"))["type"] == "file"
    assert (
        (vm / "disk.0").read_bytes()[: 5 * MIB + 3] == image.read_bytes() == (vm / "disk.1").read_bytes()[: 5 * MIB + 3]
    )
    assert (vm / "disk.0").stat().st_size == 8 * MIB and (vm / "disk.2").stat().st_size == 16 * MIB
    assert (vm / "disk.3").read_bytes()[:4] == b"QFI\xfb" and os.readlink(vm / "disk.4") == "disk.0"


def test_worker_moves_and_removes(session: RemoteSession, tmp_path: Path) -> None:
    vm, other = tmp_path / "0/17", tmp_path / "1/17"
    vm.mkdir(parents=True)
    (vm / "disk.0").write_bytes(b"disk")
    (tmp_path / "images").mkdir()
    with session:
        assert session.call("offer", path=str(vm), probe="x")["type"] == "dir"
        assert session.call("see", paths=[str(other), str(vm)], probe="x") == str(vm)
        session.tell("hide", path=str(vm), probe="x")
        assert session.call("move", source=str(vm), path=str(other))["way"] == "rename"
        frames = [(kind, at, bytes(data)) for kind, at, data in session.send(str(other)) if kind == b"D"]
        assert frames == [(b"D", 0, b"disk")]
        state = {"format": "raw", "snapshot": -1, "image": ""}
        disk, image = str(other / "disk.0"), str(tmp_path / "images/x")
        assert session.call("give_back", path=disk, target="/x", state=state)["weight"] is not None
        settle = {"chain": "", "fresh": False}
        session.tell("copy_whole", source=disk, path=image, state=state, settle=settle, is_going=True)
        session.tell("tidy", path=str(vm))
    assert (tmp_path / "images/x").read_bytes() == b"disk"
    assert not vm.exists()


def test_worker_keeps_snapshots(session: RemoteSession, tmp_path: Path) -> None:
    vm, image = tmp_path / "0/17", tmp_path / "1/image"
    with session:
        session.tell("hold", path=str(vm), make="all")
        session.tell("hold", path=str(image), make="parents")
        session.tell("make", path=str(image), format="qcow2", size=MIB)
        for number, format in ((0, "qcow2"), (1, "raw")):
            disk, chained = str(vm / f"disk.{number}"), format == "qcow2"
            session.tell("make", path=disk, format=format, size=MIB)
            for method, snapshot in (("create", 9), ("create", 10), ("delete", 9), ("revert", 10)):
                assert session.call(f"snap_{method}", path=disk, snapshot=snapshot, chained=chained)
        session.tell("link", target=str(image), path=str(vm / "disk.2"))
        session.tell("snap_create", path=str(vm / "disk.2"), snapshot=0, chained=True)
        assert session.call("snap_flatten", path=str(image), snapshot=0, format="qcow2")
    assert os.readlink(vm / "disk.0") == "disk.0.snap/11" and not (vm / "disk.1").is_symlink()
    names = {path.name for disk in (0, 1) for path in (vm / f"disk.{disk}.snap").iterdir()}
    assert names == {"10", "11", "disk.0.snap"}
    assert sorted(os.listdir(image.parent)) == ["image"] and not image.is_symlink()


def test_worker_deletes_and_takes_back(session: RemoteSession, tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17/disk.0").write_bytes(b"x")
    assert session.call("delete", path=f"{tmp_path}/17", within=f"{tmp_path}/17")
    session.tell("hold", path=f"{tmp_path}/18", make="all")
    session.call("make", path=f"{tmp_path}/18/disk.0", format="raw", size=MIB, fs="swap")
    session.fail()
    assert not list(tmp_path.iterdir())


def test_nothing_else_is_sent() -> None:
    """The program that a host gets is the host part, whole, and no more."""
    modules = sent_modules()
    assert list(modules) == ["madrigal", "madrigal.onhost", *(f"madrigal.{name}" for name in program.HOST_PART)]


def sent_modules() -> dict[str, tuple[bytes, bytes]]:
    length, _, sent = program.program().partition(b"\n")
    assert int(length) == len(sent)
    magic, modules = marshal.loads(sent.partition(b"\0")[2])
    assert magic == MAGIC_NUMBER
    return cast("dict[str, tuple[bytes, bytes]]", modules)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the host part, which is what is sent."""
    copied = tmp_path / "lib/madrigal"
    shutil.copytree(f"{TREE}/lib/madrigal", copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(program, "__file__", f"{copied}/host/program.py")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return copied


def test_what_is_sent_is_compiled_where_it_can_be_kept(library: Path) -> None:
    assert not any(code for _, code in sent_modules().values()), "there is no directory for it"
    for directory in (library, library / "onhost"):
        (directory / "__pycache__").mkdir()
    for _ in range(2):
        for name, (source, code) in sent_modules().items():
            if source:
                made = marshal.loads(code)
                assert made.co_consts[0] == ast.get_docstring(ast.parse(source), clean=False), name
    assert len(list(library.glob("onhost/__pycache__/*.pyc"))) == sum(".onhost." in name for name in sent_modules())


@pytest.mark.parametrize("how", ["changed", "of another version", "empty"])
def test_what_was_compiled_of_something_else_is_not_sent(library: Path, how: str) -> None:
    module, cache = library / "onhost/pace.py", library / "onhost/__pycache__"
    cache.mkdir()
    assert sent_modules()["madrigal.onhost.pace"][1]
    (compiled,) = cache.glob("pace.*")
    if how == "changed":
        module.write_text("# nothing\n")
    elif how == "of another version":
        compiled.write_bytes(b"\0\0\r\n" + compiled.read_bytes()[4:])
    else:
        compiled.write_bytes(b"")
    code = marshal.loads(sent_modules()["madrigal.onhost.pace"][1])
    assert (code.co_names == ()) is (how == "changed")


def test_compiled_code_that_a_host_cannot_read_is_not_used(library: Path, tmp_path: Path) -> None:
    (library / "onhost/__pycache__").mkdir()
    sent_modules()
    for compiled in library.glob("onhost/__pycache__/*"):
        compiled.write_bytes(compiled.read_bytes()[:40])  # a power failure may have left it so
    with RemoteSession(Near("/usr/bin/python3"), bulk=False) as session:  # type: ignore[arg-type]
        assert session.call("exists", path=str(tmp_path))
