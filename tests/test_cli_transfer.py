"""`madrigal transfer` and `madrigal ps` on real hosts: what is explained, what is copied, what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TREE, Hosts, eventually

from madrigal import cli, transfer
from madrigal.errors import ConfigError, HostUnreachable
from madrigal.host import Host, program, remote
from madrigal.host.local import LocalSession
from madrigal.host.remote import RemoteSession
from madrigal.location import Location
from madrigal.onhost.part import WORTH
from madrigal.transfer import by_hand, carry, plan, progress

MIB = 1 << 20


class Command:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str, status: int = 0) -> str:
        """stdout of the command; `err` has the rest."""
        self._capfd.readouterr()
        found = cli.main(list(words))
        out, self.err = self._capfd.readouterr()
        assert "Traceback" not in self.err
        assert found == status, self.err
        return out

    def fails(self, status: int, *words: str) -> str:
        assert self(*words, status=status) == ""
        return self.err.splitlines()[-1]

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def madrigal(hosts: Hosts, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("ONE_LOCATION", "MADRIGAL_SSH_CONFIG", "MADRIGAL_RUN_DIR"):
        monkeypatch.setenv(name, hosts.env[name])
    monkeypatch.delenv("MADRIGAL_TRACE", raising=False)
    return Command(capfd)


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(os.urandom(3 * MIB))
        file.truncate(40 * MIB)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One that hosts see too: they have all that this machine has but the datastores."""
    return written(tmp_path / "image")


@pytest.fixture
def own(datastore: str) -> Path:
    """One that no host sees."""
    return written(Path(datastore, "image"))


def ways(document: list[dict[str, Any]]) -> dict[str, str]:
    """The reason for each way that is impossible."""
    return {way["way"]: way["why"] for way in document if way["seconds"] is None}


# -- explain -----------------------------------------------------------------------------------------------------


def test_explained_on_one_machine(madrigal: Command, image: Path, tmp_path: Path) -> None:
    document = madrigal.json("transfer", "explain", str(image), str(tmp_path / "copy"))
    assert sorted(way["way"] for way in document) == sorted(
        ["rename", "reflink", "copy_file_range", "read", "direct", "several connections", "stream", "delta"]
    )
    assert ways(document)["stream"] == "both are on one machine"
    way = madrigal.json("transfer", "copy", str(image), str(tmp_path / "copy"))["way"]
    assert way == document[0]["way"] and not (tmp_path / ".copy.lock").exists()
    table = madrigal("transfer", "explain", str(image), str(tmp_path / "copy")).splitlines()
    assert table[0].split() == ["WAY", "TAKES", "WHY"] and len(table) == 9
    assert table[1].startswith(document[0]["way"]) and re.search(r" \d+\.\d\d s ", table[1])


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_explained_where_blocks_can_be_shared(madrigal: Command, tmp_path: Path) -> None:
    (tmp_path / "xfs").mkdir()
    with open(tmp_path / "device", "wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", tmp_path / "device"], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "device", tmp_path / "xfs"], check=True)
    try:
        (tmp_path / "xfs/image").write_bytes(os.urandom(MIB))
        words = str(tmp_path / "xfs/image"), str(tmp_path / "xfs/copy")
        document = madrigal.json("transfer", "explain", *words)
        assert document[0]["way"] == madrigal.json("transfer", "copy", *words)["way"] == "reflink"
        document = madrigal.json("transfer", "explain", words[0], str(tmp_path / "copy"))
        assert document[0]["way"] == "read"
        assert ways(document)["copy_file_range"] == "source and destination are on different file systems"
        assert madrigal.json("transfer", "copy", words[0], str(tmp_path / "copy"))["way"] == "read"
    finally:
        subprocess.run(["umount", tmp_path / "xfs"], check=True)


def test_explained_between_machines(madrigal: Command, hosts: Hosts, datastore: str, own: Path) -> None:
    document = madrigal.json("transfer", "explain", str(own), f"host01:{datastore}/image")
    assert document[0]["way"] == "stream" and "one of the ends is this machine" in document[0]["why"]
    assert "no shorter way" in ways(document)["direct"]
    there = hosts.on("host01", datastore)
    there.mkdir(parents=True)
    (there / "image").write_bytes(os.urandom(4 * MIB))
    hosts.on("host02", datastore).mkdir(parents=True)
    document = madrigal.json("transfer", "explain", f"host01:{datastore}/image", f"host02:{datastore}/image")
    names = [way["way"] for way in document if way["seconds"] is not None]
    assert "stream" in names
    way = madrigal.json("transfer", "copy", f"host01:{datastore}/image", f"host02:{datastore}/image")["way"]
    assert ("directly" in way) == (names[0] == "direct")
    assert ways(document)["read"] == "host02 does not see the storage of host01"
    assert os.listdir(there) == ["image"]  # what was asked has left nothing


def test_explained_on_storage_that_hosts_share(
    madrigal: Command, hosts: Hosts, datastore: str, image: Path, tmp_path: Path
) -> None:
    for number, machine in enumerate(("host01:", "")):
        words = f"{machine}{image}", f"host02:{tmp_path}/copy{number}"
        document = madrigal.json("transfer", "explain", *words)
        assert ways(document)["stream"] == "host02 sees both on shared storage"
        assert madrigal.json("transfer", "copy", *words)["way"] == document[0]["way"] == "copy_file_range"
        assert (tmp_path / f"copy{number}").read_bytes() == image.read_bytes()


def test_explained_with_what_is_there(madrigal: Command, hosts: Hosts, datastore: str, own: Path) -> None:
    there = hosts.on("host01", datastore)
    there.mkdir(parents=True)
    (there / "copy").write_bytes(os.urandom(3 * MIB))
    (there / ".copy.stream0.part").write_bytes(os.urandom(2 * MIB))
    document = madrigal.json("transfer", "explain", str(own), f"host01:{datastore}/copy")
    reasons = {way["way"]: way["why"] for way in document}
    assert "an interrupted run has left 2 MiB" in reasons["stream"]
    assert next(way["seconds"] for way in document if way["way"] == "delta") is not None


# -- copy --------------------------------------------------------------------------------------------------------


def test_copy_to_a_host_and_between(madrigal: Command, hosts: Hosts, datastore: str, own: Path) -> None:
    for name in hosts.names:
        hosts.on(name, datastore).mkdir(parents=True)
    out = madrigal("transfer", "copy", str(own), f"host01:{datastore}/image")
    assert re.fullmatch(rf"copied {own} to host01:{datastore}/image \(3145728 bytes streamed, [0-9.]+ s\)\n", out)
    document = madrigal.json("transfer", "copy", f"host01:{datastore}/image", f"host02:{datastore}/image")
    assert document["way"] == "3145728 bytes streamed"
    for name in hosts.names:
        made = hosts.on(name, f"{datastore}/image")
        assert made.read_bytes() == own.read_bytes() and made.stat().st_blocks * 512 < 4 * MIB
        assert os.listdir(hosts.on(name, datastore)) == ["image"]


def test_copy_of_a_directory(madrigal: Command, hosts: Hosts, datastore: str, image: Path, tmp_path: Path) -> None:
    (tmp_path / "vm/disk.0.snap").mkdir(parents=True)
    os.rename(image, tmp_path / "vm/disk.0.snap/0")
    (tmp_path / "vm/disk.0").symlink_to("disk.0.snap/0")
    hosts.on("host01", datastore).mkdir(parents=True)
    madrigal("transfer", "copy", f"{tmp_path}/vm/", f"host01:{datastore}/vm")
    made = hosts.on("host01", f"{datastore}/vm")
    assert os.readlink(made / "disk.0") == "disk.0.snap/0"
    assert (made / "disk.0").read_bytes() == (tmp_path / "vm/disk.0").read_bytes()


@pytest.mark.parametrize("machine", ["", "host01"])
def test_what_is_there_is_replaced_if_that_is_wanted(
    madrigal: Command, hosts: Hosts, datastore: str, image: Path, machine: str
) -> None:
    there = hosts.on(machine, datastore) if machine else Path(datastore)
    there.mkdir(parents=True)
    (there / "copy").write_bytes(b"old")
    target = f"{machine}:{datastore}/copy".lstrip(":")
    assert "copy exists; --replace replaces it" in madrigal.fails(31, "transfer", "copy", str(image), target)
    assert (there / "copy").read_bytes() == b"old"
    madrigal("transfer", "copy", "--replace", str(image), target)
    assert (there / "copy").read_bytes() == image.read_bytes() and os.listdir(there) == ["copy"]


def test_what_is_replaced_spares_sending(
    madrigal: Command, hosts: Hosts, datastore: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "BULK", MIB)
    content = bytearray(os.urandom(24 * MIB))
    there = hosts.on("host01", datastore)
    there.mkdir(parents=True)
    (there / "image").write_bytes(content)
    content[5 * MIB : 5 * MIB + 3] = b"new"
    own.write_bytes(content)
    words = str(own), f"host01:{datastore}/image"
    assert madrigal.json("transfer", "explain", *words)[0]["way"] == "delta"
    document = madrigal.json("transfer", "copy", "--replace", *words)
    assert int(document["way"].split()[0]) <= MIB
    assert (there / "image").read_bytes() == content and os.listdir(there) == ["image"]


REFUSED: dict[str, tuple[int, str, list[str]]] = {
    "a relative path": (2, r"'image' is not \[HOST:\]PATH with an absolute path", ["image", "{tmp}/copy"]),
    "one on a host": (2, "'copy' is not an absolute path", ["{tmp}/image", "host01:copy"]),
    "a host that is an option": (2, "is not a host name", ["-oProxyCommand=x:/a", "{tmp}/copy"]),
    "a path that goes up": (2, "without '..'", ["{tmp}/../image", "{tmp}/copy"]),
    "all there is": (2, "'/' is not", ["/", "{tmp}/copy"]),
    "one file": (2, "are one file", ["{tmp}/image", "{tmp}/image"]),
    "one file under two names": (2, "are one file", ["{tmp}/image", "{tmp}/link"]),
    "one place that two machines see": (
        2,
        "are one file",
        ["{tmp}/image", "host01:{tmp}/image"],
    ),
    "a copy within its source": (2, "is within {tmp}/directory", ["{tmp}/directory", "{tmp}/directory/below"]),
    "a source that the copy would replace": (2, "is within", ["{tmp}/directory/file", "{tmp}/directory"]),
    "nothing": (30, "{tmp}/none does not exist", ["{tmp}/none", "{tmp}/copy"]),
    "no directory for it": (30, "{tmp}/no does not exist", ["{tmp}/image", "{tmp}/no/copy"]),
    "no directory on a host": (30, "does not exist", ["{tmp}/image", "host01:{ds}/copy"]),
    "a file in place of a directory": (41, "is a directory, and the other is not", ["{tmp}/image", "{tmp}/directory"]),
    "a directory in place of a file": (41, "is a directory, and the other is not", ["{tmp}/directory", "{tmp}/image"]),
    "what is no file": (24, "is no file, directory or block device", ["/dev/null", "{tmp}/copy"]),
    "no place for it": (24, "is no file, directory or block device", ["{tmp}/image", "/dev/null"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(madrigal: Command, hosts: Hosts, datastore: str, image: Path, tmp_path: Path, name: str) -> None:
    status, message, words = REFUSED[name]
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/file").write_bytes(b"file")
    (tmp_path / "link").symlink_to(image)
    before = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    filled = [word.format(tmp=tmp_path, ds=datastore) for word in words]
    line = madrigal.fails(status, "transfer", "copy", "--replace", "--", *filled)
    assert re.search(message.replace("{tmp}", str(tmp_path)), line), line
    assert madrigal.err.count("\n") == 1
    after = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path: after[path] for path in after if not os.path.isdir(path)} == {
        path: before[path] for path in before if not os.path.isdir(path)
    }


def test_what_is_locked_is_not_copied(madrigal: Command, image: Path, tmp_path: Path) -> None:
    """As a hypervisor has the disk of a VM that runs."""
    with open(image, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        line = subprocess.run(
            [sys.executable, "-m", "madrigal", "transfer", "copy", image, tmp_path / "copy"],
            env={**os.environ, "PYTHONPATH": str(TREE / "lib")},
            capture_output=True,
            text=True,
        )
    assert line.returncode == 31 and f"{image} is in use (a process has locked {image})" in line.stderr
    assert not (tmp_path / "copy").exists()


def test_who_else_works_on_it_is_waited_for(
    madrigal: Command, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MADRIGAL_LOCK_TIMEOUT", "0.3")
    (tmp_path / "17").mkdir()
    os.rename(image, tmp_path / "17/disk.0")
    with LocalSession() as session:
        session.tell("hold", path=str(tmp_path / "17"))
        line = madrigal.fails(11, "transfer", "copy", str(tmp_path / "17/disk.0"), str(tmp_path / "copy"))
        assert f"{tmp_path}/17 is being changed by" in line
    with LocalSession() as session:
        session.tell("hold", path=str(tmp_path / "copy"))
        line = madrigal.fails(11, "transfer", "copy", str(tmp_path / "17/disk.0"), str(tmp_path / "copy"))
        assert f"{tmp_path}/copy is being changed by" in line


def test_interrupted_and_gone_on_with(
    madrigal: Command, hosts: Hosts, datastore: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "BULK", MIB)
    content = os.urandom(2 * WORTH)
    own.write_bytes(content)
    there = hosts.on("host01", datastore)
    there.mkdir(parents=True)
    send = LocalSession.send

    def cut(session: LocalSession, path: str, **state: Any) -> Iterator[Any]:
        for frame in send(session, path, **state):
            if frame[1] == WORTH + 4 * MIB:
                for pid in hosts.workers("host01"):
                    os.kill(pid, signal.SIGKILL)
            yield frame

    words = "transfer", "copy", str(own), f"host01:{datastore}/image"
    with monkeypatch.context() as patch:
        patch.setattr(LocalSession, "send", cut)
        madrigal.fails(10, *words)
    assert eventually(lambda: not hosts.workers("host01"))
    assert [name.endswith(".part") for name in os.listdir(there) if not name.endswith(".lock")] == [True]
    document = madrigal.json(*words)
    assert "going on with what an interrupted copy has left" in madrigal.err
    assert int(document["way"].split()[0]) < len(content) - WORTH // 2
    assert (there / "image").read_bytes() == content and os.listdir(there) == ["image"]


def test_source_that_cannot_be_locked_is_copied(
    madrigal: Command, hosts: Hosts, datastore: str, image: Path, tmp_path: Path
) -> None:
    """No action of ours can change what lies where nothing can be written."""
    (tmp_path / "ro").mkdir()
    os.rename(image, tmp_path / "ro/image")
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user" if os.getuid() else "--mount", "sh", "-c", _READ_ONLY, "sh"]
        + [str(tmp_path / "ro"), sys.executable, str(tmp_path / "ro/image"), str(tmp_path / "copy")],
        env={**os.environ, "PYTHONPATH": str(TREE / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "ro/image").read_bytes()


_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -m madrigal transfer copy "$3" "$4"'


# -- falling to the next way ---------------------------------------------------------------------------------------


def test_the_worker_takes_the_next_way_as_the_plan_has_them(tmp_path: Path, image: Path) -> None:
    """On one machine the order is that of the plan: what is impossible there is what the worker cannot do."""
    facts = by_hand.facts(Location("", str(image)), Location("", str(tmp_path / "copy")))
    possible = [way.name for way in plan.ways(facts) if way.is_possible]
    assert by_hand.copy(Location("", str(image)), Location("", str(tmp_path / "copy"))) == possible[0]


@pytest.mark.parametrize("which", [RemoteSession, LocalSession])
def test_connections_that_cannot_be_had(
    madrigal: Command, hosts: Hosts, datastore: str, own: Path, monkeypatch: pytest.MonkeyPatch, which: type
) -> None:
    """Nothing has moved yet: one connection does it then."""

    def refused(*_: object) -> None:
        raise HostUnreachable("host01 has enough connections")

    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "window", (1, ""))
    monkeypatch.setattr(which, "another", refused)
    hosts.on("host01", datastore).mkdir(parents=True)
    madrigal("transfer", "copy", str(own), f"host01:{datastore}/image")
    assert "the way 'several connections' to" in madrigal.err
    assert "does not work: host01 has enough connections; taking the next" in madrigal.err
    assert hosts.on("host01", f"{datastore}/image").read_bytes() == own.read_bytes()
    assert os.listdir(hosts.on("host01", datastore)) == ["image"]


# -- progress ------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much is not much, and takes its time."""
    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "window", (1 << 60, ""))
    monkeypatch.setattr(progress, "_SELDOM", 0.05)
    send = LocalSession.send

    def slowly(session: LocalSession, path: str, **state: Any) -> Iterator[Any]:
        for frame in send(session, path, **state):
            time.sleep(0.02)
            yield frame

    monkeypatch.setattr(LocalSession, "send", slowly)


def test_lines_of_progress(
    madrigal: Command, hosts: Hosts, datastore: str, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(16 * MIB))
    log = tmp_path / "progress"
    monkeypatch.setenv("MADRIGAL_PROGRESS", str(log))
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) > 3 and stat.S_IMODE(log.stat().st_mode) == 0o600
    assert [line["is_done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    counts = [line["bytes"] for line in lines]
    assert counts == sorted(counts) and counts[-1] == 16 * MIB and counts[0] < 16 * MIB
    assert {line["path"] for line in lines} == {f"{datastore}/17/disk.0"}
    assert all(line["total"] >= 16 * MIB and line["pid"] == os.getpid() for line in lines)
    assert lines[-2]["rate"] > MIB


def test_progress_on_a_descriptor(
    madrigal: Command, hosts: Hosts, datastore: str, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    read, write = os.pipe()
    monkeypatch.setenv("MADRIGAL_PROGRESS", f"fd:{write}")
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert json.loads(os.read(read, 1 << 16).splitlines()[-1])["is_done"]
    os.close(read)  # nobody reads any more
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.1"))
    os.close(write)
    for wrong, message in (
        ("fd:999", "no such descriptor"),
        ("bar", "expected fd:NUMBER"),
        ("/no/x", "cannot write"),
    ):
        monkeypatch.setenv("MADRIGAL_PROGRESS", wrong)
        with pytest.raises(ConfigError, match=message):
            transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.2"))


def test_a_reader_that_is_slow_holds_nothing_up(
    madrigal: Command, hosts: Hosts, datastore: str, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    monkeypatch.setenv("MADRIGAL_PROGRESS", f"fd:{write}")
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("machine", ["", "host01:"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_progress_within_a_machine(
    madrigal: Command, hosts: Hosts, tmp_path: Path, kind: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "BULK", 2 * MIB)
    monkeypatch.setattr(progress, "_SELDOM", 0)
    monkeypatch.setenv("MADRIGAL_PROGRESS", str(tmp_path / "progress"))
    source = tmp_path / "source"
    if kind == "directory":
        source.mkdir()
    with open(source / "x" if kind == "directory" else source, "wb") as file:
        file.write(os.urandom(16 * MIB))
    monkeypatch.setattr(program, "_compiled", lambda *_: b"")
    sent = program.program()  # of which the worker says something every few seconds only
    assert b"HEARTBEAT = 5.0" in sent
    monkeypatch.setattr(remote, "program", lambda: sent.replace(b"HEARTBEAT = 5.0", b"HEARTBEAT = -1."))
    madrigal("transfer", "copy", f"{machine}{source}", f"{machine}{tmp_path}/copy")
    lines = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    counts = [line["bytes"] for line in lines]
    assert len(counts) > 5 and counts == sorted(counts) and 8 * MIB < counts[-1] <= 16 * MIB
    assert lines[0]["total"] >= 16 * MIB


def test_ps(madrigal: Command, hosts: Hosts, datastore: str, tmp_path: Path, slow: None) -> None:
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    run_dir = Path(hosts.env["MADRIGAL_RUN_DIR"])
    seen: list[Any] = []
    follow = progress.Transfer.follow

    def looking(shown: progress.Transfer, frames: Iterator[Any]) -> Iterator[Any]:
        for frame in follow(shown, frames):
            yield frame
            seen.append((progress.running(), [path.stat().st_mode for path in run_dir.glob("*.progress")]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Transfer, "follow", looking)
        patch.setattr(sys, "argv", ["tm/ssh/clone", "fe:/a b", "http://user:secret@fe/x?token=1", "x" * 400, "17"])
        transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    reports = [reports[0] for reports, _ in seen if reports]
    assert reports and reports[-1]["path"] == f"{datastore}/17/disk.0" and reports[-1]["pid"] == os.getpid()
    assert reports[-1]["action"] == "clone"
    assert reports[-1]["arguments"] == ["fe:/a b", "http://fe/x", "...", "17"]
    assert progress.running() == [] and not list(run_dir.glob("*.progress*"))
    assert madrigal("ps").split()[:3] == ["PID", "ACTION", "MAKES"] and madrigal.json("ps") == []


def test_ps_removes_what_nobody_needs(madrigal: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_RUN_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    old = {"a-b.relay": 2, "%ds%x.blocks": 800, "%ds%0%17.running": 30, "import-00ff": 30, "import-00ff.others": 30}
    kept = {
        "c-d.relay": 0.5,
        "y.blocks": 600,
        "z.running": 1,
        "import-1": 1,
        "h-1.lock": 9999,
        "h-1.s": 9999,
        "u": 9999,
    }
    for name, hours in {**old, **kept, "busy.running": 30}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - hours * 3600,) * 2)
    with open(tmp_path / "busy.running") as action:
        fcntl.flock(action, fcntl.LOCK_SH)
        madrigal("ps")
        assert set(os.listdir(tmp_path)) == {*kept, "busy.running"}


def test_ps_from_another_process(
    madrigal: Command, hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An action that a front-end has started; killed, it is not shown any more."""
    with open(tmp_path / "image", "wb") as file:
        for _ in range(160):
            file.write(os.urandom(MIB))
    tmrc = Path(hosts.env["ONE_LOCATION"], "etc/tmrc")
    tmrc.parent.mkdir(exist_ok=True)
    tmrc.write_text("LIMIT_TRANSFER_BW=10M\n")
    argv = [sys.executable, f"{TREE}/tm/ssh/clone", f"fe:{tmp_path}/image", f"host01:{datastore}/17/disk.0"]
    action = subprocess.Popen(argv, env=hosts.env, stderr=subprocess.PIPE)
    try:
        assert eventually(lambda: madrigal.json("ps"))
        (report,) = madrigal.json("ps")
        assert report["pid"] == action.pid and report["action"] == "clone" and report["total"] >= 160 * MIB
        assert eventually(lambda: madrigal.json("ps")[0]["bytes"] > 5 * MIB)
        assert re.search(rf"^ *{action.pid}  clone +{datastore}/17/disk.0 .* MiB/s", madrigal("ps"), re.MULTILINE)
    finally:
        action.kill()
        action.communicate()
        tmrc.unlink()
    files = Path(hosts.env["MADRIGAL_RUN_DIR"])
    assert list(files.glob("*.progress"))
    assert madrigal.json("ps") == []
    assert not list(files.glob("*.progress*"))
    assert eventually(lambda: not hosts.workers("host01"))
    Host("host01").run(["rm", "-rf", f"{datastore}/17"], 10)


def test_a_process_with_the_same_number_is_another(madrigal: Command, hosts: Hosts) -> None:
    run_dir = Path(hosts.env["MADRIGAL_RUN_DIR"])
    (run_dir / f"{os.getpid()}.progress").write_text(json.dumps({"pid": os.getpid(), "clock": "1"}))
    (run_dir / "4194305.progress.new").write_text("{")
    (run_dir / f"{os.getpid() + 1}.other").write_text("")
    assert madrigal.json("ps") == []
    assert not list(run_dir.glob("*.progress*"))
    os.unlink(run_dir / f"{os.getpid() + 1}.other")


def test_bar_on_a_terminal(madrigal: Command, hosts: Hosts, datastore: str, own: Path) -> None:
    with open(own, "wb") as file:
        for _ in range(160):
            file.write(os.urandom(MIB))
    hosts.on("host01", datastore).mkdir(parents=True)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    words = ["transfer", "copy", f"{own}", f"host01:{datastore}/image"]
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib"), "TERM": "xterm"}
    env.pop("COLUMNS", None)
    argv = [sys.executable, "-m", "madrigal", *words]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=slave, stdin=slave)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 4096):
            seen += data
    out = process.communicate()[0].decode()
    os.close(master)
    assert process.returncode == 0 and out.startswith(f"copied {own} to"), seen
    pictures = seen.decode().split("\r")
    bars = [picture for picture in pictures if picture.startswith("[")]
    assert len(bars) > 2 and all(len(picture) < 60 for picture in pictures)
    assert re.match(r"\[-+\] +0 %|\[#*-*\] +\d+ %  [0-9.]+ [KM]?i?B, [0-9.]+ [KM]?i?B/s, \d+:\d\d left", bars[2])
    assert bars[-1].startswith("[" + "#" * bars[-1].count("#") + "] 100 %")
    assert pictures[-2].strip() == "" and pictures[-1] == ""
