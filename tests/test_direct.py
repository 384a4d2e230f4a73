"""Data that go from host to host past the front-end: what arrives, what goes the other way, and what a cut leaves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Hosts, check_stderr, eventually, start_action

from madrigal import transfer
from madrigal.errors import HostUnreachable, MadrigalError, NoSpace
from madrigal.host import Host
from madrigal.host.direct import DirectSession
from madrigal.host.remote import RemoteSession
from madrigal.location import Location
from madrigal.transfer import carry, plan

pytestmark = pytest.mark.long

MIB = 1 << 20


class Wire:
    """The two hosts' ssh, which a test can change, and what is to go over it."""

    def __init__(self, hosts: Hosts, env: dict[str, str], vm: str, work: Path) -> None:
        self.hosts, self.env, self.vm, self.work = hosts, env, vm, work
        self._mounted: list[tuple[str, str]] = []
        work.chmod(0o755)

    def put(self, text: str, path: str, host: str = "host01", mode: int = 0o755) -> None:
        """Have HOST find TEXT, or this machine's file of that name, at PATH."""
        if not text.startswith("/"):
            file = self.work / f"put{len(self._mounted)}"
            file.write_text(text)
            file.chmod(mode)
            text = str(file)
        self.hosts.run(host, ["mount", "--bind", text, path])
        self._mounted.append((host, path))

    def configure(self, text: str) -> None:
        """Let TEXT come before what host01's ssh is told."""
        self.put(text + "\n" + Path(self.hosts.ssh_config).read_text(), "/etc/ssh/ssh_config", mode=0o644)

    def close(self) -> None:
        for host, path in reversed(self._mounted):
            self.hosts.run(host, ["umount", "--lazy", path])

    def fill(self, pieces: int, name: str = "disk.0") -> None:
        """A disk of as many MiB of data, with holes between them, in the VM directory on host01."""
        directory = self.hosts.on("host01", self.vm)
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / name, "wb") as file:
            for number in range(pieces):
                file.seek(number * 3 * MIB // 2)
                file.write(os.urandom(MIB))

    def tree(self, host: str) -> dict[str, tuple[int, bytes]]:
        top = self.hosts.on(host, self.vm)
        return {
            str(path.relative_to(top)): (path.lstat().st_mode, b"" if path.is_dir() else digest(path))
            for path in sorted(top.rglob("*"))
        }

    def move(self) -> None:
        transfer.move(Location("host01", self.vm), Location("host02", self.vm))

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        return start_action("tm/ssh/mv", f"host01:{self.vm}", f"host02:{self.vm}", env={**self.env, **env})

    def done(self, action: subprocess.Popen[bytes]) -> Done:
        stdout, stderr = action.communicate(timeout=120)
        return Done(action.returncode, stdout.decode(), stderr.decode())

    def links(self) -> list[int]:
        """The ssh that bring data from host01 to host02."""
        found = []
        for pid in self.hosts.pids("host01"):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"host02" in words and words[0] == b"ssh":
                found.append(pid)
        return found

    def parts(self) -> list[Path]:
        return list(self.hosts.on("host02", os.path.dirname(self.vm)).glob(".17.*.part"))

    def stopped_midway(self) -> list[int]:
        """The links, which are stopped when 32 MiB are on the other side."""
        assert eventually(lambda: sum(size(part) for part in self.parts()) > 32 * MIB, 60)
        links = self.links()
        for pid in links:
            os.kill(pid, signal.SIGSTOP)
        assert links
        return links

    def nothing_runs(self) -> bool:
        workers = self.hosts.workers
        return eventually(lambda: not (workers("host01") or workers("host02") or self.links()), 30)


def digest(path: Path) -> bytes:
    import hashlib

    return hashlib.sha256(path.read_bytes()).digest() if not path.is_symlink() else os.readlink(path).encode()


def size(path: Path) -> int:
    try:
        return sum(found.stat().st_blocks * 512 for found in (path, *path.rglob("*")))
    except FileNotFoundError:
        return 0


@pytest.fixture
def wire(hosts: Hosts, cold: dict[str, str], datastore: str, tmp_path: Path) -> Iterator[Wire]:
    made = Wire(hosts, cold, f"{datastore}/17", tmp_path)
    yield made
    made.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is much."""
    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "connection", (0, ""))
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "10")


# -- what arrives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["", "no"])
def test_a_vm_directory_spares_the_front_end(wire: Wire, chosen: str) -> None:
    """Or not, if somebody says so: then all of it is read and written here."""
    wire.fill(140)
    wire.fill(3, "disk.1")
    (wire.hosts.on("host01", wire.vm) / "disk.2").symlink_to("disk.1")
    expected, known = wire.tree("host01"), Path(wire.hosts.work, "hosts/known_hosts").read_bytes()
    action = wire.start(MADRIGAL_DIRECT=chosen)
    os.waitid(os.P_PID, action.pid, os.WEXITED | os.WNOWAIT)
    counted = dict(re.findall(rb"(\w+): (\d+)", Path(f"/proc/{action.pid}/io").read_bytes()))
    done = wire.done(action)
    assert done.status == 0 and check_stderr(done, "tm/ssh/mv") == "", done.stderr
    assert ("bytes streamed, directly," in done.stderr) == (not chosen), done.stderr
    carried = int(counted[b"wchar"])
    assert carried < 4 * MIB if not chosen else carried > 143 * MIB
    assert wire.tree("host02") == expected and not wire.hosts.on("host01", wire.vm).exists()
    assert size(wire.hosts.on("host02", f"{wire.vm}/disk.0")) < 145 * MIB
    assert Path(wire.hosts.work, "hosts/known_hosts").read_bytes() == known
    assert wire.nothing_runs()


def test_disks_go_directly_with_what_is_to_become_of_them(wire: Wire, small: None) -> None:
    """A copy that grows, an image that is brought back where an older one lies."""
    wire.fill(8)
    source, there = Location("host01", f"{wire.vm}/disk.0"), wire.hosts.on("host02", wire.vm)
    content = wire.hosts.on("host01", source.path).read_bytes()
    transfer.copy(source, Location("host02", f"{wire.vm}/disk.0"), ("raw", 32 * MIB))
    assert (there / "disk.0").read_bytes() == content + bytes(32 * MIB - len(content))
    (there / "image").write_bytes(content[: 4 * MIB] + os.urandom(MIB) + content[5 * MIB :])
    transfer.bring_back(source, Location("host02", f"{wire.vm}/image"))
    assert (there / "image").read_bytes() == content
    assert os.readlink(wire.hosts.on("host01", source.path)) == f"{wire.vm}/image"


def test_several_connections_where_the_way_is_long(
    wire: Wire, small: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plan.COSTS, "window", (1, ""))
    started: list[DirectSession] = []
    connect = DirectSession.connect

    def count(session: DirectSession) -> None:
        started.append(session)
        connect(session)

    monkeypatch.setattr(DirectSession, "connect", count)
    wire.fill(60)
    expected = wire.tree("host01")
    wire.move()
    assert len(started) == carry.LANES
    assert f"({60 * MIB} bytes streamed, directly," in capfd.readouterr().err
    assert wire.tree("host02") == expected


# -- what goes the other way -----------------------------------------------------------------------------------

ANOTHER = """\
Host host02
  ProxyCommand unshare {user} --net /usr/sbin/sshd -i -f {state}/host02/sshd_config
"""
REFUSED = {
    "no key": ("Host *\n  PubkeyAuthentication no\n", "host02 does not let us in"),
    "unknown host key": (
        "Host *\n  UserKnownHostsFile {work}/known_hosts\n  StrictHostKeyChecking accept-new\n",
        "host02 shows a host key that is not the known one, or is not known yet",
    ),
    "unknown name": ("Host host02\n  HostName no-such-host.invalid\n", "host02 cannot be reached: ssh: Could not"),
    "closed port": ("Host host02\n  Port 1\n", "host02 cannot be reached: ssh: connect to host"),
    "silence": ("Host host02\n  ProxyCommand sleep 1000\n", "host02 cannot be reached: Connection timed out"),
    "another machine": (ANOTHER, "that name is another machine's here"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_hosts_that_cannot_reach_each_other(
    wire: Wire, small: None, why: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line says why, and for some time nobody tries again."""
    if why == "silence":
        monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "3")
    user = "" if os.geteuid() == 0 else f"--user --map-user={os.geteuid()}"
    text, reason = REFUSED[why]
    wire.configure(text.format(work=wire.work, user=user, state=f"{wire.hosts.work}/hosts"))
    for number in range(2):
        wire.fill(4)
        expected = wire.tree("host01")
        wire.move()
        assert wire.tree("host02") == expected
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2 and "INFO" in said[0] and "bytes streamed, " in said[1], said
        assert "cannot go from host01 to host02 directly: " in said[0] and reason in said[0]
        assert ("(0 minutes ago)" in said[0]) == bool(number) and "directly" not in said[1]
    assert not (wire.work / "known_hosts").exists()
    assert wire.nothing_runs()


def test_a_host_without_ssh(wire: Wire, small: None, capfd: pytest.CaptureFixture[str]) -> None:
    wire.put("/dev/null", shutil.which("ssh", path=wire.env["PATH"]) or "")
    wire.fill(4)
    expected = wire.tree("host01")
    wire.move()
    assert wire.tree("host02") == expected
    assert "host01 cannot run ssh" in capfd.readouterr().err


def test_a_memory_that_is_old_does_not_count(wire: Wire, small: None, capfd: pytest.CaptureFixture[str]) -> None:
    memory = Path(os.environ["MADRIGAL_RUN_DIR"], "host01-host02.relay")
    memory.write_text("it was so")
    os.utime(memory, (time.time() - 3600, time.time() - 3600))
    wire.fill(4)
    wire.move()
    assert ", directly," in capfd.readouterr().err


@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_what_ssh_is_told_on_a_host(wire: Wire, small: None) -> None:
    """No agent, no forwarding, no learning of keys, and not the user's own shared connection."""
    wire.configure(
        f"Host *\n  ForwardAgent yes\n  ForwardX11 yes\n  UpdateHostKeys yes\n  CheckHostIP yes\n"
        f"  StrictHostKeyChecking no\n  ControlMaster auto\n  ControlPath {wire.work}/control\n  RemoteForward 1 x:1\n"
    )
    real = wire.work / "real-ssh"
    shutil.copy("/usr/bin/ssh", real)
    wire.put(f'#!/bin/sh\n{real} -G "$@" >{wire.work}/told\nexec {real} "$@"\n', "/usr/bin/ssh")
    wire.fill(4)
    wire.move()
    told = (wire.work / "told").read_text().lower()
    for line in (
        "forwardagent no",
        "forwardx11 no",
        "updatehostkeys false",
        "checkhostip no",
        "stricthostkeychecking true",
        "controlmaster false",
        "clearallforwardings yes",
        "batchmode yes",
    ):
        assert f"\n{line}\n" in told, line
    assert not (wire.work / "control").exists()


def test_nonsense_in_the_variable_is_named(wire: Wire, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_DIRECT", "perhaps")
    wire.fill(4)
    with pytest.raises(MadrigalError, match="MADRIGAL_DIRECT is 'perhaps'"):
        wire.move()


# -- what fails ------------------------------------------------------------------------------------------------


def go_on(wire: Wire, expected: dict[str, tuple[int, bytes]]) -> None:
    """Another run brings what is missing, and no more."""
    done = wire.done(wire.start())
    assert done.status == 0, done.stderr
    assert "going on with what an interrupted copy has left" in done.stderr
    streamed = re.search(r"\((\d+) bytes streamed, directly", done.stderr)
    assert streamed and int(streamed[1]) < 230 * MIB, done.stderr
    assert wire.tree("host02") == expected and not wire.hosts.on("host01", wire.vm).exists()
    assert not wire.parts()


def test_a_cut_between_the_hosts(wire: Wire) -> None:
    wire.fill(240)
    expected = wire.tree("host01")
    action = wire.start()
    for pid in wire.stopped_midway():
        os.kill(pid, signal.SIGKILL)
    done = wire.done(action)
    assert done.status == 10
    assert "host01: the connection to host02 broke" in check_stderr(done, "tm/ssh/mv", marks=True)
    assert wire.nothing_runs()
    assert wire.tree("host01") == expected
    left = [path.name for path in wire.hosts.on("host02", os.path.dirname(wire.vm)).iterdir()]
    assert left == [part.name for part in wire.parts()] and len(left) == 1
    go_on(wire, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_action_that_is_killed(wire: Wire, number: int) -> None:
    wire.fill(240)
    expected = wire.tree("host01")
    action = wire.start()
    links = wire.stopped_midway()
    action.send_signal(number)
    time.sleep(0.5)
    for pid in links:
        with contextlib.suppress(ProcessLookupError):  # what ACT has ended may have ended others
            os.kill(pid, signal.SIGCONT)
    assert wire.done(action).status == (128 + number if number == signal.SIGTERM else -number)
    assert wire.nothing_runs()
    assert wire.tree("host01") == expected
    left = [path.name for path in wire.hosts.on("host02", os.path.dirname(wire.vm)).iterdir()]
    assert left == [part.name for part in wire.parts()] and len(left) == 1
    go_on(wire, expected)


DAMAGE = """\
#!{python}
# ssh, which changes a byte of the data the first time
import os, subprocess, sys
ssh = subprocess.Popen([{real!r}, *sys.argv[1:]], stdin=subprocess.PIPE)
sent = 0
while data := os.read(0, 1 << 16):
    if sent < {at} <= sent + len(data) and not os.path.exists({once!r}):
        open({once!r}, "w").close()
        place = {at} - sent - 1
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    sent += len(data)
    ssh.stdin.write(data)
    ssh.stdin.flush()
ssh.stdin.close()
sys.exit(ssh.wait())
"""


def test_data_that_are_damaged_are_sent_again(wire: Wire, small: None, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy("/usr/bin/ssh", wire.work / "real-ssh")
    once, real = str(wire.work / "once"), str(wire.work / "real-ssh")
    wire.put(DAMAGE.format(python=sys.executable, real=real, at=9 * MIB, once=once), "/usr/bin/ssh")
    wire.fill(20)
    expected = wire.tree("host01")
    wire.move()
    assert os.path.exists(once) and wire.tree("host02") == expected
    said = capfd.readouterr().err
    assert "host02: the data of 'disk.0' was damaged on its way; trying again" in said and ", directly," in said


def test_a_disk_that_is_too_small_there(wire: Wire, small: None) -> None:
    wire.hosts.add("tiny", "16m")
    wire.fill(24)
    expected = wire.tree("host01")
    with pytest.raises(NoSpace, match="tiny: "):
        transfer.move(Location("host01", wire.vm), Location("tiny", wire.vm))
    assert wire.tree("host01") == expected
    assert eventually(lambda: not wire.hosts.on("tiny", os.path.dirname(wire.vm)).exists())
    wire.hosts.end("tiny")


def meanwhile(wire: Wire, act: Callable[[list[int]], object]) -> BaseException | None:
    """What a move raises while whose links are stopped ACT is done."""
    raised: list[BaseException] = []

    def move() -> None:
        try:
            wire.move()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    links = wire.stopped_midway()
    act(links)
    for pid in links:
        with contextlib.suppress(ProcessLookupError):  # what ACT has ended may have ended others
            os.kill(pid, signal.SIGCONT)
    thread.join(60)
    return raised[0] if raised else None


def test_a_source_that_changes(wire: Wire) -> None:
    """There is nothing to go on with, and it is said where that was."""
    wire.fill(240)
    disk = wire.hosts.on("host01", f"{wire.vm}/disk.0")

    def change(_: list[int]) -> None:
        with open(disk, "ab") as file:
            file.write(b"more")

    error = meanwhile(wire, change)
    assert isinstance(error, MadrigalError) and re.match("host01: .*was changed while it was copied", str(error)), error
    assert eventually(lambda: not wire.hosts.on("host02", os.path.dirname(wire.vm)).exists())
    assert disk.exists()


def test_one_of_several_connections_is_cut(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.COSTS, "window", (1, ""))
    wire.fill(240)
    error = meanwhile(wire, lambda links: os.kill(links[-1], signal.SIGKILL))
    assert isinstance(error, HostUnreachable), error
    assert wire.nothing_runs() and len(wire.parts()) == 1 and wire.hosts.on("host01", wire.vm).exists()
    monkeypatch.undo()


def test_the_front_end_hears_how_far_it_is(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    line = RemoteSession._line

    def listen(session: RemoteSession, begun: bytes = b"") -> dict[str, Any]:
        answer = line(session, begun)
        heard.append(answer.get("bytes", 0))
        return answer

    monkeypatch.setattr(RemoteSession, "_line", listen)
    wire.fill(240)
    assert meanwhile(wire, lambda _: time.sleep(7)) is None
    assert 32 * MIB < max(heard) < 240 * MIB


def test_nobody_else_can_bring_data(wire: Wire) -> None:
    """What connects to the worker and passes nothing is not waited for, nor taken for the other host."""
    with RemoteSession(Host("host01"), False) as given, DirectSession(Host("host02"), given) as session:
        name = session.call("direct", do="listen")
        text = f"import socket;s=socket.socket(socket.AF_UNIX);s.connect('\\0{name}');s.send(b'x')"
        wire.hosts.run("host02", ["python3", "-c", text])
        session.tell("receive", directly=True, path=f"{wire.vm}/disk.0")
        with pytest.raises(HostUnreachable, match="host02: the other host did not begin"):
            session.done()
