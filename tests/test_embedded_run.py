"""How one driver executable is started, and what is read from it, in the manner of both front-ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embedded_fakes import LIB, Tree

from madrigal.embedded import ActionFailed, Call, FrontEnd, Observer, Outcome
from madrigal.embedded.run import run


def execute(tmp_path: Path, script: str, contract: str = "current", stdin: bytes = b"", shell: str = "bash") -> Outcome:
    file = tmp_path / "action"
    file.write_text(f"#!/bin/{shell}\n{script}\n")
    file.chmod(0o755)
    return run(Call(str(file), ("a",), "action", stdin=stdin), contract, str(tmp_path), os.environ, Observer())


# (script, status, message)
NOW = [
    ("echo no space >&2; exit 3", 3, "no space"),
    ("printf 'one \\n two\\n' >&2; exit 1", 1, "onetwo"),  # glued without a blank
    ("echo 'ERROR: clone: x' >&2; echo 'INFO: y' >&2; echo 'DEBUG: z' >&2; echo why >&2; exit 1", 1, "why"),
    ("echo 'WARNING: x' >&2; exit 1", 1, "WARNING: x"),
    ("echo 'WARN: x' >&2; exit 1", 1, ""),
    ("echo ERROR:x >&2; exit 1", 1, "ERROR:x"),
    ("echo 'ERROR MESSAGE --8<------' >&2; exit 1", 1, "ERROR MESSAGE --8<------"),
    ("echo '-n' >&2; exit 1", 1, ""),
    ("exit 1", 1, ""),
    ("echo useless >&2", 0, ""),
    ("kill -TERM $$", 255, ""),
    ("echo 'ExitCode: 0' >&2; exit 2", 2, "ExitCode: 0"),
]
OLD = [
    ("printf 'ERROR MESSAGE --8<------\\nno\\nspace\\nERROR MESSAGE ------>8--\\n' >&2; exit 3", 3, "no\nspace"),
    ("echo no space >&2; exit 3", 3, ""),
    ("printf 'ERROR MESSAGE --8<------\\nx\\nERROR MESSAGE ------>8--\\n' >&2", 0, ""),
    ("kill -TERM $$", 143, ""),
    ("echo 'ExitCode: 0' >&2; exit 2", 0, ""),  # believed
    ("printf 'no end of line' >&2", 255, ""),  # swallows the front-end's own line
    ("printf x; exit 0", 0, ""),
]


@pytest.mark.parametrize(("script", "status", "message"), NOW)
def test_outcome_now(tmp_path: Path, script: str, status: int, message: str) -> None:
    outcome = execute(tmp_path, script)
    assert (outcome.status, outcome.message) == (status, message)


@pytest.mark.parametrize(("script", "status", "message"), OLD)
def test_outcome_3_4(tmp_path: Path, script: str, status: int, message: str) -> None:
    outcome = execute(tmp_path, script, "3.4")
    assert (outcome.status, outcome.message) == (status, message)


def test_streams_of_any_size(tmp_path: Path) -> None:
    outcome = execute(tmp_path, "cat; head -c 3000000 /dev/zero >&2; cat >&2", stdin=b"x" * 3_000_000)
    assert (len(outcome.stdout), len(outcome.stderr)) == (3_000_000, 3_000_000)


def test_input_that_is_not_read(tmp_path: Path) -> None:
    outcome = execute(tmp_path, "exec <&-; echo done", stdin=b"x" * 3_000_000)
    assert (outcome.status, outcome.stdout) == (0, "done\n")


def test_a_stream_that_something_in_the_background_holds_is_lost(tmp_path: Path) -> None:
    """As it is for oned; what is not held arrives, and nobody waits for the background."""
    start = time.monotonic()
    outcome = execute(tmp_path, "echo answer; echo text >&2; sleep 20 >/dev/null & echo $! > pid; exit 0")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert time.monotonic() - start < 5
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "answer\n", "")


def test_only_the_first_line_answers(tmp_path: Path) -> None:
    outcome = execute(tmp_path, "printf '/ds/a raw\\nnoise\\n'")
    assert (outcome.answer, outcome.stdout) == ("/ds/a raw", "/ds/a raw\nnoise\n")


def test_not_executable(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    os.unlink(tree.path / "datastore/fs/stat")
    (tree.path / "datastore/fs/stat").write_text("")
    with FrontEnd(str(tmp_path / "state"), tree=str(tree.path)) as front_end:
        front_end.datastores.create("default", tm_mad="ssh")
        with pytest.raises(ActionFailed, match="stat"):
            front_end.images.create("a", "default", path="/srv/a")


class Seen(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, Call | Outcome | str]] = []

    def started(self, call: Call) -> None:
        self.events.append(("started", call))

    def finished(self, outcome: Outcome) -> None:
        self.events.append(("finished", outcome))

    def warn(self, text: str) -> None:
        self.events.append(("warn", text))


@pytest.mark.parametrize("contract", ["3.4", "current"])
def test_what_a_driver_is_given(tmp_path: Path, contract: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_CONTRACT", "3.4" if contract == "current" else "current")
    monkeypatch.setenv("SOMETHING", "else")
    before = os.umask(0o077)
    try:
        _check_what_a_driver_is_given(tmp_path, contract)
    finally:
        os.umask(before)


def _check_what_a_driver_is_given(tmp_path: Path, contract: str) -> None:
    tree = Tree(tmp_path / "tree")
    state = str(tmp_path / "state")
    seen = Seen()
    with FrontEnd(state, contract=contract, tree=str(tree.path), observer=seen) as front_end:
        front_end.hosts.create("host01")
        front_end.datastores.create("default", tm_mad="ssh")
        front_end.images.create("a", "default", path="/etc/passwd")
        vm = front_end.vms.create("vm", [])
        tree.calls()
        seen.events.clear()
        front_end.images.delete("a")
        front_end.vms.deploy(vm.id, "host01")
        front_end.vms.shutdown(vm.id)
    calls = tree.calls("rm", "delete")
    assert len(calls) == 2
    for call in calls:
        env = call["env"]
        assert (call["cwd"], call["umask"], call["nice"], call["leader"]) == (f"{state}/var", 0o022, 19, True)
        assert (env["ONE_LOCATION"], env["PRIORITY"], env["ONE_MAD_DEBUG"]) == (state, "19", "")
        assert env["ONE_XMLRPC"].startswith("http://127.0.0.1:")
        assert env["SOMETHING"] == "else"
        assert "MADRIGAL_CONTRACT" not in env
        assert f"{state}/bin" not in env["PATH"].split(":")
    remove, delete = calls
    assert delete["stdin"] == ""
    assert delete["path"] == f"{tree.path}/tm/ssh/delete"
    if contract == "3.4":
        assert (len(remove["argv"]), remove["argv"][1], remove["stdin"]) == (2, "0", "")
    else:
        assert remove["argv"] == ["0"]
        assert remove["stdin"] and not remove["stdin"].endswith("\n")
    outcome = next(event for name, event in seen.events if name == "finished")
    assert isinstance(outcome, Outcome)
    shown = ["<dump>", "0"] if contract == "3.4" else ["0"]
    assert outcome.call.command == [f"{tree.path}/datastore/fs/rm", *shown]
    assert [name for name, _ in seen.events][:2] == ["started", "finished"]


def test_names_and_shim(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    with FrontEnd(str(tmp_path / "state"), tree=str(tree.path), hostname="fe.example", with_shim=True) as front_end:
        front_end.datastores.create("default", tm_mad="ssh")
    (call,) = tree.calls("monitor")
    assert call["env"]["PATH"].split(":")[0] == f"{tmp_path}/state/bin"
    assert call["env"]["MADRIGAL_FRONTEND"].split()[-1] == "fe.example"
    with FrontEnd(str(tmp_path / "state"), tree=str(tree.path)) as front_end:
        assert front_end.layout.front_end == "fe.example"
    with FrontEnd(str(tmp_path / "other"), tree=str(tree.path)) as front_end:
        assert front_end.layout.front_end == socket.gethostname()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_driver(tmp_path: Path, number: int) -> None:
    """The driver is asked to end, has time to undo, and the VM is in its failure state."""
    tree = Tree(tmp_path / "tree")
    undo = "import signal\ndef end(*_):\n time.sleep(0.3); open(tree + '/undone', 'w'); sys.exit(1)\n"
    tree.say("tm.ssh.delete", run=f"{undo}signal.signal(signal.SIGTERM, end)", sleep=60)
    state = str(tmp_path / "state")
    with FrontEnd(state, tree=str(tree.path)) as front_end:
        front_end.hosts.create("host01")
        front_end.vms.create("vm", [])
        front_end.vms.deploy("vm", "host01")
    command = [sys.executable, "-m", "madrigal", "--state", state, "--tree", str(tree.path), "vm", "shutdown", "vm"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(LIB)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    deadline = time.monotonic() + 20
    while not tree.calls("delete"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert (tree.path / "undone").exists()
    with FrontEnd(state, tree=str(tree.path)) as front_end:
        assert front_end.vms.get("vm").status == "epilog_failure"
        tree.say("tm.ssh.delete")
        assert front_end.vms.recover("vm").status == "done"
