"""The `madrigal` command: what it prints, with which status it exits, and that nobody sees a traceback."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import click
import pytest
from embedded_fakes import LIB, Tree

from madrigal import cli
from madrigal.embedded import front_end


class Command:
    """Runs `madrigal` in this process, as its entry point does."""

    def __init__(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.tree = Tree(tmp_path / "tree")
        self.state = tmp_path / "state"
        self._capfd = capfd

    def __call__(self, *words: str, status: int = 0) -> str:
        """stdout of the command; `err` has the rest."""
        self._capfd.readouterr()
        found = cli.main(["--state", str(self.state), "--tree", str(self.tree.path), *words])
        out, self.err = self._capfd.readouterr()
        assert "Traceback" not in self.err
        assert found == status, self.err
        return out

    def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def madrigal(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.delenv("MADRIGAL_TRACE", raising=False)
    command = Command(tmp_path, capfd)
    command("host", "create", "host01")
    command("host", "create", "host02")
    command("datastore", "create", "default", "--tm-mad", "ssh")
    return command


def test_a_life(madrigal: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "init.sh").write_text("")
    assert madrigal("image", "create", "a", "--datastore", "default", "--path", "x y.img") == "image 0: a, 10 MiB\n"
    assert madrigal.json("image", "show", "a")["path"] == f"{tmp_path}/x y.img"
    disks = ["--disk", "image=a", "--disk", "type=swap,size=64"]
    context = ["--context", "A=b=c", "--context-file", "init.sh"]
    assert madrigal("vm", "create", "vm01", *disks, *context) == "VM 0 (vm01) is pending\n"
    place = f"{madrigal.state}/var//datastores/0/0"
    out = madrigal("vm", "deploy", "vm01", "host01")
    assert out == f"VM 0 (vm01) is running, disks in host01:{place}\n"
    lines = [re.sub(r"[0-9.]+ s$", "N s", line) for line in madrigal.err.splitlines()]
    assert lines == [
        "clone host01 disk.0 ... N s",
        "mkswap host01 disk.1 ... N s",
        "context host01 disk.2 ... N s",
    ]
    assert "stopped, disks in " in madrigal("vm", "stop", "0")
    madrigal("vm", "resume", "vm01")
    assert madrigal("vm", "migrate", "vm01", "host02", "-v").startswith("VM 0 (vm01) is running, disks in host02:")
    assert f"+ {madrigal.tree.path}/tm/ssh/mv host01:{place} host02:{place} 0 0" in madrigal.err
    madrigal("vm", "attach", "vm01", "--disk", "type=fs,size=1")
    assert "no image 9" in _fails(madrigal, 30, "vm", "attach", "vm01", "--disk", "image=9")
    madrigal("vm", "detach", "vm01", "3")
    madrigal("vm", "disk-saveas", "vm01", "0", "copy")
    assert madrigal("vm", "list").splitlines() == [
        "ID  NAME  STATE    HOST    DISKS",
        " 0  vm01  running  host02      2",
    ]
    assert madrigal("vm", "terminate", "vm01") == "VM 0 (vm01) is done\n"
    assert madrigal("vm", "list").splitlines() == ["ID  NAME  STATE  HOST  DISKS"]
    assert madrigal.json("vm", "list", "--all")[0]["status"] == "done"
    madrigal("image", "delete", "copy")
    madrigal("image", "delete", "0")
    madrigal("datastore", "delete", "default")
    madrigal("host", "delete", "host01")


def test_gestures_of_today(madrigal: Command) -> None:
    madrigal("image", "create", "a", "--datastore", "default", "--path", "/srv/a")
    madrigal("host", "create", "kvm01", "--vmm", "kvm")
    madrigal("vm", "create", "vm01", "--disk", "image=a")
    madrigal("vm", "deploy", "vm01", "kvm01", "--deploy-id", "domain")
    document = madrigal.json("vm", "snapshot", "create", "vm01", "0", "first")
    assert (document["deploy_id"], document["steps"][0]["action"]) == ("domain", "snap_create_live kvm01 disk.0")
    assert madrigal("vm", "poweroff", "vm01").startswith("VM 0 (vm01) is poweroff, disks in kvm01:")
    madrigal("vm", "snapshot", "create", "vm01", "0")
    madrigal("vm", "snapshot", "revert", "vm01", "0", "first")
    madrigal("vm", "resize", "vm01", "0", "20")
    assert "there are: 0, 1" in _fails(madrigal, 30, "vm", "snapshot", "delete", "vm01", "0", "7")
    madrigal("vm", "snapshot", "delete", "vm01", "0", "0", "--force")
    madrigal("vm", "disk-saveas", "vm01", "0", "past", "--snapshot", "1")
    assert madrigal("vm", "start", "vm01").startswith("VM 0 (vm01) is running")
    madrigal.tree.calls()
    assert "--hypervisor" in _fails(madrigal, 2, "vm", "migrate", "vm01", "host01", "--live")
    madrigal("vm", "migrate", "vm01", "host01", "--live", "--hypervisor", "true")
    assert [line.split()[0] for line in madrigal.tree.lines()] == ["ssh/premigrate", "ssh/postmigrate"]
    madrigal("datastore", "create", "second", "--type", "system", "--tm-mad", "ssh")
    assert "/datastores/2/0" in madrigal("vm", "migrate", "vm01", "host01", "--system-datastore", "second")
    assert "undeployed" in madrigal("vm", "undeploy", "vm01")
    assert "running" in madrigal("vm", "resume", "vm01")
    assert madrigal("image", "clone", "a", "b") == "image 2: b, 10 MiB\n"
    for action in ("revert", "delete", "flatten"):
        assert "there is no snapshot" in _fails(madrigal, 30, "image", "snapshot", action, "b", "0")
    assert madrigal("datastore", "monitor", "default") == "datastore 1 has 60 of 100 MiB free\n"


def _fails(madrigal: Command, status: int, *words: str) -> str:
    """The one sentence that a command fails with."""
    assert madrigal(*words, status=status) == ""
    lines = madrigal.err.splitlines()
    assert lines[-1].startswith("madrigal: ")
    return lines[-1]


def test_failure_and_recovery(madrigal: Command) -> None:
    madrigal("vm", "create", "vm", "--disk", "type=swap,size=1")
    madrigal.tree.say("tm.ssh.mkswap", status=12, stderr="INFO: mkswap: x\nhost01 is full\n")
    error = _fails(madrigal, 1, "vm", "deploy", "vm", "host01")
    assert error == (
        "madrigal: mkswap host01 disk.0 failed: host01 is full; VM 0 is prolog_failure: "
        "'madrigal vm recover 0 --retry' tries again"
    )
    assert re.match(r"mkswap host01 disk.0 ... [0-9.]+ s, failed \(12\)\n", madrigal.err)
    document = madrigal.json("vm", "recover", "vm", "--retry", status=1)
    assert "host01 is full" in document["error"]
    (step,) = document["steps"]
    assert (step["status"], step["stderr"].splitlines()[-1]) == (12, "host01 is full")
    assert step["command"][0] == f"{madrigal.tree.path}/tm/ssh/mkswap"
    assert madrigal.err.count("\n") == 1
    madrigal.tree.say("tm.ssh.mkswap")
    document = madrigal.json("vm", "recover", "vm", "--retry")
    assert (document["status"], [step["action"] for step in document["steps"]]) == ("running", ["mkswap host01 disk.0"])
    assert madrigal("vm", "recover", "0", "--delete") == "VM 0 (vm) is done\n"


def test_3_4(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    madrigal = Command(tmp_path, capfd)
    old = ["--contract", "3.4"]
    madrigal(*old, "host", "create", "host01", "--datastores", "/srv/one")
    madrigal("datastore", "create", "default", "--tm-mad", "ssh")  # the contract is remembered
    document = madrigal.json("image", "create", "a", "--datastore", "default", "--path", "/srv/a", "-v")
    assert document["steps"][0]["command"][1:] == ["<dump>", "0"]
    assert "<dump>" in madrigal.err and len(madrigal.err) < 1000
    madrigal("vm", "create", "vm", "--disk", "image=a,save-as=b")
    assert "/srv/one/0/0" in madrigal("vm", "deploy", "vm", "host01")
    assert "3.4 contract has no terminate" in _fails(madrigal, 24, "vm", "terminate", "vm")
    assert "use another --state" in _fails(madrigal, 31, "--contract", "current", "vm", "list")
    madrigal("vm", "shutdown", "vm")
    assert madrigal.json("image", "show", "b")["state"] == "READY"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["vm", "show", "nothing"], 30, "no vm named 'nothing'"),
        (["vm", "show", "9999999999999999999999"], 30, "no vm 9999999999999999999999"),
        (["host", "create", "host01"], 31, "already"),
        (["host", "create", "--", "-oProxyCommand=id"], 2, "not a host name"),
        (["datastore", "create", "x", "--tm-mad", "ssh", "--attr", "novalue"], 2, "KEY=VALUE"),
        (["image", "create", "x", "--datastore", "default"], 2, "either a path"),
        (["vm", "create", "x", "--disk", "nonsense"], 2, "nonsense"),
        (["vm", "recover", "0"], 2, "--retry"),
        (["image", "create", "\udcff", "--datastore", "default", "--size", "1"], 2, "UTF-8"),
    ],
)
def test_one_clear_sentence(madrigal: Command, words: list[str], status: int, message: str) -> None:
    assert message in _fails(madrigal, status, *words)
    assert madrigal.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--nonsense"], ["vm", "fly"], ["vm", "deploy"], ["--contract", "5", "vm", "list"]])
def test_usage(madrigal: Command, words: list[str]) -> None:
    madrigal(*words, status=2)
    assert "Usage: madrigal" in madrigal.err


def test_help(madrigal: Command) -> None:
    assert "prefix" not in madrigal("--help")
    others = {"new": {"driver"}, "driver": {"list", "show"}, "transfer": {"copy", "explain"}}
    for group, commands in cli.root.commands.items():
        assert "Usage: madrigal" in madrigal(group, "--help")
        if isinstance(commands, click.Group):
            assert others.get(group, {"create", "list", "show", "delete"}) <= set(commands.commands)
            for name in commands.commands:
                assert "Usage: madrigal" in madrigal(group, name, "--help")
    assert "SAFE_DIRS=/" in madrigal("datastore", "create", "--help")


def test_lists_and_json(madrigal: Command) -> None:
    assert madrigal("datastore", "list").splitlines() == [
        "ID  NAME     TYPE    DS_MAD  TM_MAD  TOTAL  FREE  IMAGES",
        " 0  system   system  -       ssh         0     0       0",
        " 1  default  image   fs      ssh       100    60       0",
    ]
    madrigal("image", "create", "a", "--datastore", "1", "--size", "5", "--persistent")
    madrigal("vm", "create", "vm", "--disk", "image=0")
    assert madrigal("image", "list").splitlines() == [
        "ID  NAME  DATASTORE  TYPE       FORMAT  SIZE  PERSISTENT  STATE  VMS",
        " 0  a     default    datablock  raw        5  yes         used     1",
    ]
    for group in ("host", "datastore", "image", "vm"):
        documents = madrigal.json(group, "list")
        assert madrigal.json(group, "show", str(documents[0]["id"])) == documents[0]
        name = documents[0]["name"]
        assert re.search(rf"^name +{name}$", madrigal(group, "show", name), re.MULTILINE)


def test_secret_attributes_are_not_shown(madrigal: Command) -> None:
    madrigal("datastore", "update", "default", "--attr", "RESTIC_PASSWORD=hunter2", "--attr", "NOTE=seen")
    for words in (["show", "default"], ["show", "default", "--json"], ["list", "--json"]):
        out = madrigal("datastore", *words)
        assert "hunter2" not in out and "seen" in out


def test_a_state_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    madrigal = Command(tmp_path, capfd)
    madrigal.state = Path("/proc/madrigal")
    assert "/proc/madrigal" in _fails(madrigal, 20, "vm", "list")


def test_default_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MADRIGAL_STATE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert front_end.default_state() == f"{tmp_path}/madrigal"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert front_end.default_state() == "/home/somebody/.local/share/madrigal"
    monkeypatch.setenv("MADRIGAL_STATE", "/srv/state")
    assert front_end.default_state() == "/srv/state"


def test_tree_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = "lib/python3.11/site-packages/madrigal/embedded/front_end.py"
    for share, module in (("", "lib/madrigal/embedded/front_end.py"), ("share/madrigal", library)):
        root = tmp_path / ("wheel" if share else "checkout")
        for kind in ("tm", "datastore"):
            (root / share / kind).mkdir(parents=True)
        monkeypatch.setattr(front_end, "__file__", str(root / module))
        assert front_end.default_tree() == str(root / share)
    monkeypatch.setattr(front_end, "__file__", str(tmp_path / "nowhere/lib/madrigal/embedded/front_end.py"))
    with pytest.raises(Exception, match="--tree"):
        front_end.default_tree()


def _run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(LIB)}
    return subprocess.run([sys.executable, "-m", "madrigal", *words], env=env, timeout=60, **options)


def test_as_a_module(tmp_path: Path) -> None:
    result = _run("--state", str(tmp_path / "s"), "vm", "show", "x", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (30, "")
    assert result.stderr == "madrigal: there is no vm named 'x': see 'madrigal vm list'\n"


def test_a_reader_that_leaves(madrigal: Command) -> None:
    read, write = os.pipe()
    os.close(read)
    words = ["--state", str(madrigal.state), "--tree", str(madrigal.tree.path), "datastore", "list"]
    result = _run(*words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_moving_line_on_a_terminal(madrigal: Command) -> None:
    """A line that moves while the driver runs, never wider than the terminal, and leaves the plain line behind."""
    madrigal("vm", "create", "vm", "--disk", "type=swap,size=1")
    madrigal.tree.say("tm.ssh.mkswap", sleep=0.5)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    words = ["--state", str(madrigal.state), "--tree", str(madrigal.tree.path), "vm", "deploy", "vm", "host01"]
    env = {**os.environ, "PYTHONPATH": str(LIB), "TERM": "xterm"}
    env.pop("COLUMNS", None)
    argv = [sys.executable, "-m", "madrigal", *words]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        seen += data
    assert process.wait(20) == 0
    os.close(master)
    frames = seen.decode().split("\r")
    moving = [frame for frame in frames if "mkswap host01" in frame and "..." not in frame]
    assert {frame[0] for frame in moving} >= {"|", "/", "-"}
    last = [line for line in seen.decode().replace("\r\n", "\n").split("\n") if "..." in line]
    assert re.fullmatch(r"mkswap host01 disk.0 \.\.\. [0-9.]+ s", last[0].split("\r")[-1])


def test_bytes_are_told(madrigal: Command, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x" * 3_000_000)
    madrigal.tree.say("datastore.fs.cp", stdout=f"{file} raw\n")
    document = madrigal.json("image", "create", "a", "--datastore", "default", "--path", str(file))
    allocated = os.stat(file).st_blocks * 512
    steps = {step["action"].split()[0]: step["bytes"] for step in document["steps"]}
    assert steps == {"stat": allocated, "cp": allocated, "monitor": None}
    madrigal("vm", "create", "vm", "--disk", "image=a")
    madrigal.tree.say("tm.ssh.mv", stderr="INFO: mv: moved a to b (1048576 bytes streamed, 0.1 s)\n")
    madrigal("vm", "deploy", "vm", "host01")
    deployed = madrigal.err
    madrigal("vm", "migrate", "vm", "host02")
    assert madrigal.err.splitlines()[-1].endswith(" s, 1.0 MiB")
    assert re.fullmatch(r"clone host01 disk.0 \.\.\. [0-9.]+ s, 2\.9 MiB\n", deployed)
