"""Changing files here and on hosts: what arrives is whole, what fails leaves nothing, and others are kept off."""

from __future__ import annotations

import binascii
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Hosts, check_stderr, eventually, run_action, start_action

from madrigal.errors import (
    BadImage,
    Busy,
    Deleted,
    DigestMismatch,
    Forbidden,
    HostUnreachable,
    MadrigalError,
    NoSpace,
    NotFound,
)
from madrigal.host import Host
from madrigal.host.local import LocalSession
from madrigal.onhost import blocks, copy, stream

MIB = 1 << 20
Frame = tuple[bytes, int, bytes | memoryview]


class Machine:
    """A machine that a session changes, and its files as the test sees them."""

    def __init__(self, host: Host, files: Callable[[str], Path]) -> None:
        self.host, self.files = host, files

    def left(self, directory: str) -> list[str]:
        """All that is in a directory, hidden or not."""
        top = self.files(directory)
        return sorted(str(path.relative_to(top)) for path in top.rglob("*")) if top.exists() else []


@pytest.fixture(params=["here", "openssh", "paramiko"])
def machine(request: pytest.FixtureRequest, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine, and host01 over each transport."""
    for name in ("ONE_LOCATION", "MADRIGAL_SSH_CONFIG", "MADRIGAL_RUN_DIR"):
        monkeypatch.setenv(name, hosts.env[name])
    if request.param == "here":
        return Machine(Host(""), Path)
    if request.param == "paramiko":
        pytest.importorskip("paramiko", reason="the Python package paramiko is not installed")
    monkeypatch.setenv("MADRIGAL_TRANSPORT", request.param)
    return Machine(Host("host01"), lambda path: hosts.on("host01", path))


@pytest.fixture
def far(env: dict[str, str], hosts: Hosts) -> Machine:
    """host01 over each transport."""
    return Machine(Host("host01"), lambda path: hosts.on("host01", path))


# -- what arrives ----------------------------------------------------------------------------------------------


def holes(path: Path) -> None:
    """64 MiB of which 3 pieces are data, one of them zeros."""
    with open(path, "wb") as file:
        for offset, data in ((5, b"begin"), (20 * MIB - 3, os.urandom(2 * MIB)), (40 * MIB, bytes(4 * MIB))):
            file.seek(offset)
            file.write(data)
        file.truncate(64 * MIB)


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """What is in a directory, as far as a copy has to keep it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *top.rglob("*")]:
        about = path.lstat()
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("dir", stat.S_IMODE(about.st_mode))
        elif path.is_file():
            content = zlib.crc32(path.read_bytes())
            found[name] = ("file", stat.S_IMODE(about.st_mode), about.st_size, content, about.st_mtime_ns, about.st_uid)
        else:
            found[name] = ("other",)
    return found


@pytest.fixture
def vm_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory with everything a VM directory may have, and more."""
    top = tmp_path / "17"
    (top / "disk.1.snap" / "empty").mkdir(parents=True)
    holes(top / "disk.0")
    (top / "none").write_bytes(b"")
    with open(top / "nothing but a hole", "wb") as file:
        file.truncate(8 * MIB + 1)
    (top / os.fsdecode(b"\xff caf\xe9\nnew line")).write_text("odd name")
    (top / "-rf").write_text("dash")
    (top / "disk.1.snap" / "0").write_text("base")
    (top / "disk.1").symlink_to("disk.1.snap/0")
    (top / "nowhere").symlink_to("/no/such/place")
    (top / "round").symlink_to("round")
    os.mkfifo(top / "pipe")
    with socket.socket(socket.AF_UNIX) as monitor:
        os.chdir(top)  # a socket's name is short
        monitor.bind("monitor.sock")
        os.chdir("/")
    (top / ".disk.0.stream.part").write_text("left by a run that was killed")
    (top / "disk.0").chmod(0o640)
    (top / "disk.1.snap").chmod(0o750)
    os.utime(top / "disk.0", ns=(10**18, 10**18 + 123456789))
    if os.getuid() == 0:
        os.chown(top / "none", 12345, 12345)
    yield top


def test_directory_arrives_whole_and_comes_back(machine: Machine, datastore: str, vm_dir: Path) -> None:
    expected = tree(vm_dir)
    for name in ("pipe", "monitor.sock", ".disk.0.stream.part"):
        assert expected.pop(name)
    target = f"{datastore}/17"
    with machine.host.session() as session:
        session.call("hold", path=target, make="parents")
        assert session.receive(stream.give(str(vm_dir)), path=target, keep_mode=True) < 8 * MIB
    assert tree(machine.files(target)) == expected
    assert machine.files(f"{target}/disk.0").stat().st_blocks * 512 < 8 * MIB, "holes were filled"
    assert machine.left(datastore) == sorted(["17", *(f"17/{name}" for name in expected if name != ".")])

    back = vm_dir.parent / "back"
    with machine.host.session() as given, LocalSession() as session:
        session.call("hold", path=str(back), make="parents")
        session.receive(given.send(target), path=str(back), keep_mode=True)
    assert tree(back) == expected
    assert (back / "disk.0").stat().st_blocks * 512 < 8 * MIB, "holes were filled"


@pytest.mark.parametrize("known", ["", "local", "ssh"])
def test_a_marker_that_a_kill_left_half_made_goes(machine: Machine, datastore: str, known: str) -> None:
    files = machine.files(datastore)
    files.mkdir()
    (files / ".monitor.ssh.part").write_text("s")
    if known:
        (files / ".monitor").write_text(f"{known}\n")
    with machine.host.session() as session:
        session.tell("mark", path=f"{datastore}/.monitor", text="ssh")
    assert machine.left(datastore) == [".monitor"] and (files / ".monitor").read_text() == "ssh\n"


def test_the_lock_of_what_a_kill_has_let_removed_goes(machine: Machine, datastore: str) -> None:
    machine.files(datastore).mkdir()
    (machine.files(datastore) / ".17.lock").write_text("work pid 1\n")
    (machine.files(datastore) / ".170.lock").write_text("work pid 1\n")
    with machine.host.session() as session:
        session.tell("tidy", path=f"{datastore}/17")
    assert machine.left(datastore) == [".170.lock"]


def test_the_probe_of_a_killed_action_goes(machine: Machine, datastore: str) -> None:
    machine.files(datastore).mkdir()
    (machine.files(datastore) / ".probe.left.part").touch()
    with machine.host.session() as session:
        session.call("show", path=datastore, probe="x")
        assert machine.left(datastore) == [".probe.x.part"]
        session.call("hide", path=datastore, probe="x")
    assert machine.left(datastore) == []


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB + 7])
def test_file_of_any_size(machine: Machine, datastore: str, tmp_path: Path, size: int) -> None:
    # without zeros: a last block that has nothing else would not be sent
    (tmp_path / "image").write_bytes(os.urandom(size).replace(b"\0", b"\1"))
    with machine.host.session() as session:
        session.call("hold", path=datastore, make="all")
        session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/disk.0")
        assert (
            b"".join(bytes(data) for kind, _, data in session.send(f"{datastore}/disk.0") if kind == b"D")
            == (tmp_path / "image").read_bytes()
        )
    assert machine.files(f"{datastore}/disk.0").read_bytes() == (tmp_path / "image").read_bytes()
    assert machine.left(datastore) == ["disk.0"]


def test_bulk_data_over_a_connection_of_its_own(far: Machine, datastore: str, tmp_path: Path) -> None:
    data = os.urandom(32 * MIB)
    (tmp_path / "image").write_bytes(data)
    with far.host.session(bulk=True) as session:
        session.call("hold", path=datastore, make="all")
        session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/disk.0")
    assert far.files(f"{datastore}/disk.0").read_bytes() == data


def test_target_is_replaced_in_one_step(machine: Machine, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"new" * 1000)
    with machine.host.session() as session:
        session.call("hold", path=datastore, make="all")
    disk = machine.files(f"{datastore}/disk.0")
    disk.write_bytes(b"old")

    def frames() -> Iterator[Frame]:
        for frame in stream.give(str(tmp_path / "image")):
            assert disk.read_bytes() == b"old"
            yield frame

    with machine.host.session() as session:
        session.call("hold", path=datastore, make="parents")
        session.receive(frames(), path=f"{datastore}/disk.0")
    assert disk.read_bytes() == b"new" * 1000


def test_permissions_are_the_umasks(machine: Machine, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x")
    (tmp_path / "image").chmod(0o777)
    modes: list[int] = []

    def frames() -> Iterator[Frame]:
        for frame in stream.give(str(tmp_path / "image")):
            yield frame
            parts = list(machine.files(datastore).glob(".disk.0.*.part"))
            modes.extend(part.stat().st_mode & 0o777 for part in parts)

    before = os.umask(0o027)
    try:
        with machine.host.session() as session:
            session.call("hold", path=datastore, make="all")
            session.receive(frames(), path=f"{datastore}/disk.0")
    finally:
        os.umask(before)
    assert machine.files(f"{datastore}/disk.0").stat().st_mode & 0o777 == 0o640
    assert machine.files(datastore).stat().st_mode & 0o777 == 0o750
    assert set(modes) <= {0o600}, "a part was open to others"


# -- what is refused -------------------------------------------------------------------------------------------


def an(path: str, type: str = "file", **more: object) -> Frame:
    about = {"path": path, "type": type, "size": 0, "allocated": 0, "mode": 0o644, "mtime": 0, "owner": [0, 0]}
    return b"O", 0, json.dumps({**about, **more}).encode()


def complete(data: bytes = b"") -> Frame:
    return b"C", 0, zlib.crc32(data).to_bytes(4, "big") if data else b""


HOSTILE: dict[str, list[Frame]] = {
    "above": [an("", "dir"), an("../x"), complete()],
    "above from below": [an("", "dir"), an("a", "dir"), an("a/../../x"), complete()],
    "itself": [an("", "dir"), an("."), complete()],
    "parent": [an("", "dir"), an("..", "dir")],
    "absolute": [an("", "dir"), an("/tmp/madrigal-test-x"), complete()],
    "through its own link": [an("", "dir"), an("l", "link", target="/tmp"), an("l/madrigal-test-x"), complete()],
    "over its own link": [an("", "dir"), an("l", "link", target="/tmp/madrigal-test-x"), an("l"), complete()],
    "directory over its own link": [an("", "dir"), an("l", "link", target="/tmp"), an("l", "dir")],
    "into nothing": [an("", "dir"), an("no/x"), complete()],
    "into a file": [an("", "dir"), an("f"), complete(), an("f/x"), complete()],
    "below a file": [an(""), complete(), an("x"), complete()],
    "no beginning": [an("x"), complete()],
    "data before a file": [(b"D", 0, b"x")],
    "data of a directory": [an("", "dir"), (b"D", 0, b"x")],
    "data behind the end": [an("", size=4), (b"D", 4, b"x"), complete(b"x")],
    "data far behind the end": [an("", size=4), (b"D", 1 << 62, b"x"), complete(b"x")],
    "unfinished": [an("", size=4), (b"D", 0, b"data")],
    "unfinished in a directory": [an("", "dir"), an("x", size=4), (b"D", 0, b"data")],
    "one file inside another": [an("", "dir"), an("x", size=4), (b"D", 0, b"data"), an("y"), complete()],
    "end of nothing": [complete()],
    "end of nothing more": [an("", "dir"), an("x"), complete(), complete()],
    "a device": [an("", "other")],
    "a link for a disk": [an("", "link", target="/etc/shadow")],
    "nothing": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_stream_that_lies(machine: Machine, datastore: str, name: str) -> None:
    with pytest.raises(MadrigalError) as caught:
        with machine.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="parents")
            session.receive(iter(HOSTILE[name]), path=f"{datastore}/17")
    assert isinstance(caught.value, BadImage) or "File exists" in str(caught.value), caught.value
    assert not machine.files(datastore).exists()
    assert not os.path.lexists("/tmp/madrigal-test-x")
    assert not os.path.lexists(f"{datastore}/x")


def test_data_that_was_damaged(machine: Machine, datastore: str) -> None:
    with pytest.raises(DigestMismatch) as caught:
        with machine.host.session() as session:
            session.call("hold", path=datastore, make="all")
            frames = [an("", size=4), (b"D", 0, b"data"), complete(b"date")]
            session.receive(iter(frames), path=f"{datastore}/disk.0")
    assert caught.value.status == 40
    assert not machine.files(datastore).exists()


def test_source_that_is_not_there(machine: Machine, datastore: str) -> None:
    with pytest.raises(NotFound, match=r"disk\.0"):
        with machine.host.session() as given:
            list(given.send(f"{datastore}/disk.0"))


def test_source_that_becomes_shorter(machine: Machine, datastore: str, tmp_path: Path) -> None:
    """The sender fails in the middle: the receiver hears of it and takes everything back."""
    source = machine.files(datastore)
    source.mkdir()
    (source / "disk.0").write_bytes(os.urandom(48 * MIB))

    def frames(given: Any) -> Iterator[Frame]:
        for number, frame in enumerate(given.send(f"{datastore}/disk.0")):
            if number == 3:
                os.truncate(source / "disk.0", MIB)
            yield frame

    with pytest.raises(MadrigalError, match=r"shorter|was changed"):
        with machine.host.session() as given, LocalSession() as session:
            session.call("hold", path=str(tmp_path / "to"), make="all")
            session.receive(frames(given), path=str(tmp_path / "to" / "disk.0"))
    assert not (tmp_path / "to").exists()
    (source / "disk.0").unlink()


def test_source_that_may_not_be_read(machine: Machine, datastore: str) -> None:
    top = Path(tempfile.mkdtemp(dir="/tmp"))
    (top / "a").write_text("readable")
    (top / "b").write_text("not readable")
    (top / "b").chmod(0)
    top.chmod(0o755)
    try:
        with pytest.raises((PermissionError, Forbidden)):
            with machine.host.session() as session:
                session.call("hold", path=f"{datastore}/17", make="parents")
                before = os.geteuid()
                frames = stream.give(str(top))
                try:

                    def unprivileged() -> Iterator[Frame]:
                        for _ in range(100):
                            if before == 0:  # root may read everything
                                os.seteuid(65534)
                            try:
                                frame = next(frames, None)
                            finally:
                                os.seteuid(before)
                            if frame is None:
                                return
                            yield frame

                    session.receive(unprivileged(), path=f"{datastore}/17")
                finally:
                    os.seteuid(before)
        assert not machine.files(datastore).exists()
    finally:
        shutil.rmtree(top)


# -- a full disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(hosts: Hosts) -> Iterator[str]:
    """A host with 8 MiB of disk."""
    hosts.add("small", size="8m")
    yield "small"
    hosts.end("small")


@pytest.mark.parametrize("honest", [True, False], ids=["seen before", "met on the way"])
def test_disk_that_is_too_small(
    hosts: Hosts, env: dict[str, str], small: str, datastore: str, tmp_path: Path, honest: bool
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(12 * MIB))
    with open(tmp_path / "image", "rb") as file:
        about = {"path": "", "type": "file", "mode": 0o600, "owner": [0, 0], "allocated": 12 * MIB if honest else 0}
        with pytest.raises(NoSpace) as caught:
            with Host(small).session() as session:
                session.call("hold", path=f"{datastore}/17", make="all")
                session.receive(stream.give_open(file.fileno(), about), path=f"{datastore}/17/disk.0")
    assert caught.value.status == 12
    assert not list(hosts.on(small).iterdir())
    assert not hosts.workers(small)


def test_disk_that_is_too_small_for_an_action(
    hosts: Hosts, env: dict[str, str], small: str, datastore: str, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(12 * MIB))
    done = run_action("tm/ssh/clone", f"fe:{tmp_path}/image", f"{small}:{datastore}/17/disk.0", env=env)
    assert done.status == 12
    assert "MiB free" in check_stderr(done, "clone", marks=True)
    assert not list(hosts.on(small).iterdir())


def test_disk_that_is_too_small_for_a_new_image(hosts: Hosts, env: dict[str, str], small: str, datastore: str) -> None:
    with pytest.raises(NoSpace):
        with Host(small).session() as session:
            session.call("hold", path=f"{datastore}/17", make="all")
            options = "preallocation=full"
            session.call("make", path=f"{datastore}/17/disk.1", format="raw", size=16 * MIB, options=options)
    assert not list(hosts.on(small).iterdir())


# -- connections that break, processes that are killed ---------------------------------------------------------


def cut_ours(session: Any, hosts: Hosts) -> None:
    channel = session._channel
    if hasattr(channel, "_pid"):
        os.kill(channel._pid, signal.SIGKILL)
    else:
        channel._session.transport.close()


def cut_theirs(session: Any, hosts: Hosts) -> None:
    serving = [pid for pid in hosts.pids("host01")[1:] if pid not in hosts.workers("host01")]
    for pid in serving:
        os.kill(pid, signal.SIGKILL)


def kill_worker(session: Any, hosts: Hosts) -> None:
    for pid in hosts.workers("host01"):
        os.kill(pid, signal.SIGKILL)


def broken_in_the_middle(session: Any, break_it: Callable[[], None]) -> Iterator[Frame]:
    """A file of 64 MiB, which is sent on until the break is noticed."""
    yield an("", size=64 * MIB)
    for number in range(64):
        if number == 2:
            break_it()
        yield b"D", number * MIB, os.urandom(MIB)
    yield complete(b"?")


@pytest.mark.parametrize("cut", [cut_ours, cut_theirs], ids=["our side", "their side"])
def test_connection_that_is_cut(far: Machine, hosts: Hosts, datastore: str, cut: Callable[[Any, Hosts], None]) -> None:
    with pytest.raises(HostUnreachable, match="host01"):
        with far.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="all")
            frames = broken_in_the_middle(session, lambda: cut(session, hosts))
            session.receive(frames, path=f"{datastore}/17/disk.0")
    assert eventually(lambda: not far.files(datastore).exists()), far.left(datastore)


def test_connection_that_is_cut_while_the_host_works(far: Machine, hosts: Hosts, datastore: str) -> None:
    """Nobody reads the answer any more: what was made meanwhile goes too."""
    holder = far.host.session()
    holder.call("hold", path=f"{datastore}/17", make="all")
    waiter = far.host.session()

    def wait() -> None:
        with pytest.raises(MadrigalError), waiter:
            waiter.call("hold", path=f"{datastore}/17", make="parents")

    thread = threading.Thread(target=wait)
    thread.start()
    assert eventually(lambda: len(hosts.workers("host01")) == 2)
    time.sleep(0.3)
    cut_ours(waiter, hosts)
    thread.join(30)
    assert not thread.is_alive()
    holder.fail() if os.environ["MADRIGAL_TRANSPORT"] == "openssh" else None  # paramiko's connection was both's
    assert eventually(lambda: not far.files(datastore).exists()), far.left(datastore)


def test_worker_that_is_killed_leaves_a_part_which_the_next_run_removes(
    far: Machine, hosts: Hosts, datastore: str, tmp_path: Path
) -> None:
    with pytest.raises(HostUnreachable, match="host01"):
        with far.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="all")

            def kill() -> None:
                assert eventually(lambda: "17/.disk.0.stream.part" in far.left(datastore))
                kill_worker(session, hosts)

            frames = broken_in_the_middle(session, kill)
            session.receive(frames, path=f"{datastore}/17/disk.0")
    assert far.left(datastore) == [".17.lock", "17", "17/.disk.0.stream.part"]
    (tmp_path / "image").write_text("image")
    with far.host.session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")
        session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/17/disk.0")
    assert far.left(datastore) == ["17", "17/disk.0"]
    assert far.files(f"{datastore}/17/disk.0").read_text() == "image"


def under_way(hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A clone in the middle of its data, the worker of which is stopped."""
    if not (tmp_path / "image").exists():
        (tmp_path / "image").write_bytes(os.urandom(96 * MIB))
    process = start_action("tm/ssh/clone", f"fe:{tmp_path}/image", f"host01:{datastore}/17/disk.0", env=env)
    directory = hosts.on("host01", f"{datastore}/17")
    assert eventually(lambda: list(directory.glob(".disk.0.*.part")))
    for pid in hosts.workers("host01"):
        os.kill(pid, signal.SIGSTOP)
    assert process.poll() is None and not (directory / "disk.0").exists()
    return process


def go_on(hosts: Hosts) -> None:
    for pid in hosts.workers("host01"):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_action_that_is_ended_takes_everything_back(
    hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = under_way(hosts, env, datastore, tmp_path)
    process.send_signal(number)
    go_on(hosts)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    from conftest import Done

    assert "signal" in check_stderr(Done(process.returncode, stdout.decode(), stderr.decode()), "clone", marks=True)
    assert not hosts.on("host01", datastore).exists()


def test_delete_after_a_killed_clone(hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path) -> None:
    """The front-end that ran the clone is dead and the worker still writes: the disk is gone and stays gone."""
    process = under_way(hosts, env, datastore, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    go_on(hosts)
    done = run_action("tm/ssh/delete", f"host01:{datastore}/17", env=env)
    check_stderr(done, "delete")
    assert done.status == 0
    assert not hosts.on("host01", f"{datastore}/17").exists()
    assert eventually(lambda: not hosts.workers("host01"))
    assert not list(hosts.on("host01", datastore).glob("*")), "something came back"
    assert not list(hosts.on("host01", datastore).glob(".*")), "a lock or a part is left"


def test_delete_of_what_a_stopped_worker_makes(
    hosts: Hosts, env: dict[str, str], datastore: str, tmp_path: Path
) -> None:
    """It does not hear TERM: it is ended all the same, and the disk does not come back."""
    process = under_way(hosts, env, datastore, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_action("tm/ssh/delete", f"host01:{datastore}/17", env=env)
    check_stderr(done, "delete")
    assert done.status == 0
    assert eventually(lambda: not hosts.workers("host01"))
    assert not list(hosts.on("host01", datastore).iterdir())


# -- several at one object -------------------------------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """WORK in a thread; what it returns or raises is put into the list."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except MadrigalError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_two_sessions_wait_for_each_other(machine: Machine, datastore: str) -> None:
    def second() -> bool:
        with machine.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="parents")
            return bool(session.call("exists", path=f"{datastore}/17/disk.0"))

    with machine.host.session() as first:
        first.call("hold", path=f"{datastore}/17", make="all")
        thread, result = in_thread(second)
        time.sleep(0.5)
        assert not result, "it did not wait"
        first.call("link", target="x", path=f"{datastore}/17/disk.0")
    thread.join(30)
    assert result == [True]
    assert machine.left(datastore) == ["17", "17/disk.0"]


def test_session_waits_no_longer_than_it_may(machine: Machine, datastore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_LOCK_TIMEOUT", "0.3")
    with machine.host.session() as first:
        first.call("hold", path=f"{datastore}/17", make="all")
        with pytest.raises(Busy, match=r"17 is being changed by .*try again") as caught:
            with machine.host.session() as second:
                second.call("hold", path=f"{datastore}/17", make="parents")
        assert caught.value.status == 11
    assert machine.left(datastore) == ["17"]


def test_delete_ends_holder_and_waiter(far: Machine, hosts: Hosts, datastore: str) -> None:
    def wait() -> object:
        with far.host.session() as session:
            return session.call("hold", path=f"{datastore}/17", make="parents")

    holder = far.host.session()
    holder.call("hold", path=f"{datastore}/17", make="all")
    thread, result = in_thread(wait)
    assert eventually(lambda: len(hosts.workers("host01")) == 2)
    time.sleep(0.3)  # until it waits
    with far.host.session() as session:
        session.call("delete", path=f"{datastore}/17", within=f"{datastore}/17")
    thread.join(30)
    assert isinstance(result[0], Deleted), result
    with pytest.raises(Deleted, match="host01"):
        holder.call("exists", path="/")
    holder.fail()
    assert not far.left(datastore)


def test_deletes_at_once_do_not_end_each_other(far: Machine, datastore: str) -> None:
    def delete() -> object:
        with far.host.session() as session:
            return session.call("delete", path=f"{datastore}/17", within=f"{datastore}/17")

    with far.host.session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")
    work = [in_thread(delete) for _ in range(6)]
    for thread, _ in work:
        thread.join(60)
    assert sorted(str(result[0]) for _, result in work) == ["False"] * 5 + ["True"]
    assert not far.left(datastore)


def test_deletes_that_wait_for_a_holder_do_not_end_each_other(far: Machine, datastore: str) -> None:
    def delete() -> object:
        with far.host.session() as session:
            return session.call("delete", path=f"{datastore}/17", within=f"{datastore}/17")

    slow_to_end = """if True:
        import fcntl, signal, sys, time
        file = open(sys.argv[1], "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        signal.signal(signal.SIGTERM, lambda *told: sys.exit(time.sleep(1)))
        file.write("held")
        file.flush()
        time.sleep(60)"""
    with far.host.session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")
    lock = f"{datastore}/.17.lock"
    holder, _ = in_thread(lambda: far.host.run(["python3", "-c", slow_to_end, lock], 60))
    assert eventually(lambda: far.files(lock).exists() and far.files(lock).read_text() == "held")
    work = [in_thread(delete) for _ in range(4)]
    for thread in (*(thread for thread, _ in work), holder):
        thread.join(60)
    assert sorted(str(result[0]) for _, result in work) == ["False"] * 3 + ["True"]
    assert not far.left(datastore)


def test_object_is_held_under_whatever_name(machine: Machine, datastore: str) -> None:
    """A datastore that is a link to another place: one lock."""
    with machine.host.session() as session:
        session.call("hold", path=f"{datastore}/real/17", make="all")
    machine.files(f"{datastore}/other").symlink_to("real")
    with machine.host.session() as session:
        session.call("hold", path=f"{datastore}/real/17", make="parents")
        session.call("hold", path=f"{datastore}/other/17", make="parents")
    assert machine.left(datastore) == ["other", "real", "real/17"]


# -- taking back -----------------------------------------------------------------------------------------------


def test_failure_takes_back_all_of_a_session(machine: Machine, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 100)
    with pytest.raises(RuntimeError, match="later"):
        with machine.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="all")
            session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/17/disk.0")
            session.call("copy", source=f"{datastore}/17/disk.0", path=f"{datastore}/17/disk.1")
            session.call("make", path=f"{datastore}/17/disk.2", format="raw", size=MIB, fs="swap")
            session.call("link", target="disk.0", path=f"{datastore}/17/disk.3")
            raise RuntimeError("later")
    assert machine.left(datastore) == []


def test_failure_removes_nothing_that_was_there(machine: Machine, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 100)
    with machine.host.session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")
    machine.files(f"{datastore}/17/mine").write_text("mine")
    with pytest.raises(RuntimeError):
        with machine.host.session() as session:
            session.call("hold", path=f"{datastore}/17", make="all")
            session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/17/disk.0")
            raise RuntimeError("later")
    assert machine.left(datastore) == ["17", "17/mine"]


def test_copy_on_one_machine(machine: Machine, datastore: str, tmp_path: Path) -> None:
    holes(tmp_path / "image")
    with machine.host.session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")
        session.receive(stream.give(str(tmp_path / "image")), path=f"{datastore}/17/disk.0")
        way = session.call("copy", source=f"{datastore}/17/disk.0", path=f"{datastore}/17/disk.1")["way"]
    assert way in ("reflink", "copy_file_range", "read")
    copied = machine.files(f"{datastore}/17/disk.1")
    assert copied.read_bytes() == (tmp_path / "image").read_bytes()
    assert copied.stat().st_blocks * 512 < 8 * MIB, "holes were filled"


def test_error_of_the_host_is_one_of_ours(machine: Machine, datastore: str) -> None:
    with pytest.raises(MadrigalError) as caught:
        with machine.host.session() as session:
            session.call("hold", path="/proc/version/17", make="parents")
    assert caught.value.status in (30, 31), caught.value
    assert errno.errorcode  # the name of a class crossed, not a number


# -- what nobody goes on with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["mark", "begin"])
def test_parts_that_nobody_goes_on_with_go_after_a_week(machine: Machine, datastore: str, by: str) -> None:
    """Of actions that were interrupted and not done again; whoever works in a datastore sees to it."""
    top = machine.files(datastore)
    top.mkdir(parents=True)
    names = (".17.stream12345678.part", ".disk.0.copy.part", ".18.gone.part", ".19.stream1.part", ".20.stream1.part")
    kept = (".19.stream1.part", ".20.stream1.part", ".disk.part", "disk.0.copy.part", ".21.lock", "17")
    for name in {*names, *kept}:
        (top / name).mkdir(parents=True) if name[1:3] in ("17", "18") else (top / name).write_bytes(b"x")
        if (top / name).is_dir():
            (top / name / "disk.0").write_bytes(b"x")
        if name != ".19.stream1.part":
            os.utime(top / name, (time.time() - 8 * 24 * 3600,) * 2)
    holder = machine.host.session()
    with holder, machine.host.session() as session:
        holder.call("hold", path=f"{datastore}/20")
        if by == "mark":
            session.call("mark", path=f"{datastore}/.monitor", text="ssh")
        else:
            session.call("image", do="begin", path=f"{datastore}/image")
        found = set(os.listdir(top)) - {".monitor", ".image.lock", ".20.lock"}
    assert found == set(kept)


def test_copying_ahead(tmp_path: Path) -> None:
    """What was begun is there at the end, or raised; nobody uses the files after that."""
    content, before = os.urandom(5 * MIB + 1000), threading.active_count()
    (tmp_path / "old").write_bytes(content)
    (tmp_path / "new").touch()
    with open(tmp_path / "old", "rb") as old, open(tmp_path / "new", "r+b") as new:
        ahead = copy.Ahead(old.fileno(), new.fileno())
        for start in range(0, 8 * MIB, 700_000):
            ahead.fill(start, start + 700_000)
        ahead.end()
        assert (tmp_path / "new").read_bytes() == content
        into_what_is_read = copy.Ahead(new.fileno(), old.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            into_what_is_read.fill(0, 5 * MIB)
            into_what_is_read.end()
        into_what_is_read.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["sha256", "gmac:" + "00" * 16])
@pytest.mark.parametrize("block", [64 << 10, MIB, 4 * MIB])
def test_digests_of_blocks_of_any_size(tmp_path: Path, kind: str, block: int) -> None:
    content = os.urandom(9 * MIB + 777)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        found = binascii.a2b_base64(blocks.describe(file.fileno(), lambda: None, block, kind)["digests"])
    for number, start in enumerate(range(0, len(content), block)):
        made = blocks._maker(kind)()
        made.update(bytearray(content[start : start + block]))
        assert found[number * blocks.SIZE : (number + 1) * blocks.SIZE] == made.digest()[: blocks.SIZE]
    assert len(found) == (number + 1) * blocks.SIZE
