"""VMs when something fails: where a script stops, what a retry runs, what is left, and who may act meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from embedded_fakes import LIB, Tree

from madrigal.embedded import ActionFailed, DiskRequest, FrontEnd
from madrigal.embedded.records import VM
from madrigal.embedded.state import State
from madrigal.errors import Busy, ConfigError, InUse, MadrigalError, NotFound, UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


def open_(tree: Tree, contract: str = "current") -> FrontEnd:
    front_end = FrontEnd(str(tree.path.parent / "state"), contract=contract, tree=str(tree.path), hostname="fe")
    front_end.hosts.create("host01")
    front_end.hosts.create("host02")
    front_end.datastores.update("system", tm_mad="sys")
    front_end.datastores.create("default", tm_mad="shared")
    front_end.images.create("image", "default", path="/srv/a.img")
    front_end.images.create("pers", "default", path="/srv/b.img", persistent=True)
    tree.calls()
    return front_end


def created(front_end: FrontEnd) -> VM:
    disks = [DiskRequest(image="image"), DiskRequest(image="pers"), DiskRequest(type="swap", size=1)]
    return front_end.vms.create("vm", disks, {"A": "b"})


# (contract, operations before, the operation, the action that fails, the state then, what ran)
FAILURES = [
    ("3.4", [], "deploy host01", "shared.ln", "prolog_failure", ["shared/clone", "shared/ln"]),
    (
        "3.4",
        [],
        "deploy host01",
        "sys.context",
        "prolog_failure",
        [*("shared/clone", "shared/ln", "sys/mkswap"), "sys/context"],
    ),
    ("3.4", ["deploy host01"], "stop", "sys.mv", "epilog_stop_failure", ["shared/mv", "shared/mv", "sys/mv"]),
    ("3.4", ["deploy host01", "stop"], "resume", "shared.mv", "prolog_resume_failure", ["shared/mv"]),
    ("3.4", ["deploy host01"], "migrate host02", "shared.mv", "prolog_migrate_failure", ["shared/mv"]),
    ("3.4", ["deploy host01"], "shutdown", "shared.mvds", "epilog_failure", ["shared/delete", "shared/mvds"]),
    ("current", [], "deploy host01", "sys.mkswap", "prolog_failure", ["shared/clone", "shared/ln", "sys/mkswap"]),
    ("current", ["deploy host01"], "stop", "shared.mv", "epilog_stop_failure", ["shared/mv"]),
    (
        "current",
        ["deploy host01"],
        "migrate host02",
        "sys.mv",
        "prolog_migrate_failure",
        [*["shared/mv"] * 2, "sys/mv"],
    ),
    ("current", ["deploy host01"], "shutdown", "shared.mvds", "epilog_failure", ["shared/delete", "shared/mvds"]),
    ("current", ["deploy host01"], "terminate", "shared.delete", "epilog_failure", ["shared/delete"]),
]


def perform(front_end: FrontEnd, vm: VM, operation: str) -> VM:
    name, *arguments = operation.split()
    result: VM = getattr(front_end.vms, name)(vm.id, *arguments)
    return result


def names(tree: Tree) -> list[str]:
    return [line.split()[0] for line in tree.lines()]


@pytest.mark.parametrize(("contract", "before", "operation", "failing", "status", "lines"), FAILURES)
def test_first_failure_ends_the_script_and_retry_runs_it_whole(
    tree: Tree, contract: str, before: list[str], operation: str, failing: str, status: str, lines: list[str]
) -> None:
    front_end = open_(tree, contract)
    vm = created(front_end)
    for step in before:
        perform(front_end, vm, step)
    tree.calls()
    stderr = "ERROR MESSAGE --8<------\nno space\nERROR MESSAGE ------>8--\n" if contract == "3.4" else "no space\n"
    tree.say(f"tm.{failing}", status=12, stderr=stderr)
    with pytest.raises(ActionFailed, match=f"no space; VM 0 is {status}: 'madrigal vm recover 0 --retry'") as raised:
        perform(front_end, vm, operation)
    assert raised.value.status == 1
    assert names(tree) == lines
    failed = front_end.vms.get("vm")
    assert (failed.status, failed.error[:40]) == (
        status,
        "Error executing image transfer script: " + failing.split(".")[1][:1],
    )
    for refused in ("stop", "migrate host02", "deploy host01", "resume", "shutdown"):
        with pytest.raises(InUse):
            perform(front_end, vm, refused)
    # A retry fails again as long as the reason is there, and runs everything from the first line when it is gone.
    with pytest.raises(ActionFailed):
        front_end.vms.recover("vm")
    assert names(tree) == lines
    tree.say(f"tm.{failing}")
    recovered = front_end.vms.recover("vm")
    assert names(tree)[: len(lines)] == lines
    assert (recovered.operation, recovered.error) == (None, "")
    clean = {"stop": "stopped", "shutdown": "done", "terminate": "done"}
    assert recovered.status == clean.get(operation, "running")
    with pytest.raises(InUse, match="nothing to recover"):
        front_end.vms.recover("vm")


@pytest.mark.parametrize(
    ("before", "operation", "status"),
    [
        ([], "deploy host01", "boot_failure"),
        (["deploy host01"], "migrate host02", "boot_migrate_failure"),
        (["deploy host01", "stop"], "resume", "boot_stopped_failure"),
    ],
)
def test_a_failed_boot_is_retried_without_the_prolog(
    tree: Tree, before: list[str], operation: str, status: str
) -> None:
    front_end = open_(tree)
    vm = created(front_end)
    for step in before:
        perform(front_end, vm, step)
    tree.say("tm.sys.context", status=1)
    with pytest.raises(ActionFailed):
        perform(front_end, vm, operation)
    assert front_end.vms.get("vm").status == status
    tree.say("tm.sys.context")
    tree.calls()
    assert front_end.vms.recover("vm").status == "running"
    assert names(tree) == ["sys/context"]


# LCM_STATE as oned has it while these run, asked over XML-RPC by the driver itself
STATES = [
    ("3.4", [], "deploy host01", "shared.clone", "1"),
    ("current", [], "deploy host01", "shared.clone", "1"),
    ("current", [], "deploy host01", "sys.context", "2"),
    ("current", ["deploy host01"], "stop", "shared.mv", "10"),
    ("current", ["deploy host01", "stop"], "resume", "shared.mv", "9"),
    ("current", ["deploy host01", "stop"], "resume", "sys.context", "22"),
    ("current", ["deploy host01"], "migrate host02", "shared.mv", "8"),
    ("current", ["deploy host01"], "migrate host02", "sys.context", "35"),
    ("current", ["deploy host01"], "shutdown", "shared.mvds", "11"),
    ("current", ["deploy host01", "stop"], "terminate", "shared.mvds", "11"),
    ("current", ["deploy host01"], "attach", "sys.mkswap", "17"),
    ("current", ["deploy host01"], "detach", "shared.delete", "17"),
    ("current", ["deploy host01"], "disk_saveas", "shared.cpds", "27"),
    ("current", ["deploy host01", "stop"], "disk_saveas", "shared.cpds", "68"),
    ("current", ["deploy host01"], "delete", "shared.delete", "23"),
]

ASK = """
import xmlrpc.client, re
auth = open(os.environ["ONE_AUTH"]).read().strip()
answer = xmlrpc.client.ServerProxy(os.environ["ONE_XMLRPC"]).one.vm.info(auth, 0)
found = re.search("<LCM_STATE>(.*?)</LCM_STATE>.*<HOSTNAME>([^<]*)</HOSTNAME>(?!.*HOSTNAME)", answer[1])
open(tree + "/asked", "w").write(found[1] + " " + found[2])
"""


@pytest.mark.parametrize(("contract", "before", "operation", "asking", "state"), STATES)
def test_lcm_state_while_it_runs(
    tree: Tree, contract: str, before: list[str], operation: str, asking: str, state: str
) -> None:
    front_end = open_(tree, contract)
    vm = created(front_end)
    for step in before:
        perform(front_end, vm, step)
    tree.say(f"tm.{asking}", run=ASK)
    arguments: dict[str, list[Any]] = {"attach": [DiskRequest(type="swap", size=1)], "detach": [0]}
    arguments["disk_saveas"] = [0, "copy"]
    if operation in arguments:
        getattr(front_end.vms, operation)(vm.id, *arguments[operation])
    else:
        perform(front_end, vm, operation)
    asked, host = (tree.path / "asked").read_text().split()
    assert (asked, host) == (state, "host02" if "host02" in operation else "host01")


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        ("tm.sys.mkswap", lambda fe: fe.vms.attach("vm", DiskRequest(type="swap", size=1))),
        ("tm.shared.mvds", lambda fe: fe.vms.detach("vm", 1)),
        ("tm.shared.cpds", lambda fe: fe.vms.disk_saveas("vm", 0, "copy")),
        ("datastore.fs.mkfs", lambda fe: fe.vms.disk_saveas("vm", 0, "copy")),
    ],
)
def test_a_failed_operation_on_a_disk_leaves_the_vm_as_it_was(
    tree: Tree, action: str, operation: Callable[[FrontEnd], VM]
) -> None:
    front_end = open_(tree)
    created(front_end)
    before = front_end.vms.deploy("vm", "host01")
    tree.say(action, status=1, stderr="no\n", stdout="")
    with pytest.raises(ActionFailed, match="VM 0 is as before"):
        operation(front_end)
    after = front_end.vms.get("vm")
    assert (after.status, after.disks) == ("running", before.disks)
    assert [image.state for image in front_end.images.all()][2:] in ([], ["ERROR"])
    tree.say(action)
    assert front_end.vms.shutdown("vm").status == "done"


@pytest.mark.parametrize(
    ("before", "failing", "operation", "places", "script"),
    [
        (["deploy host01"], "", "", ["host01"], None),
        ([], "shared.ln", "deploy host01", ["host01"], "transfer.0.delete"),
        (["deploy host01"], "shared.mv", "migrate host02", ["host02", "host01"], "transfer.1.delete_both"),
        (["deploy host01"], "shared.mv", "stop", ["host01", "fe"], "transfer.0.delete_both"),
        (["deploy host01", "stop"], "shared.mv", "resume", ["host01", "fe"], "transfer.1.delete_both"),
        (["deploy host01", "stop"], "", "", ["fe"], "transfer.0.delete"),
        (["deploy host01"], "shared.mvds", "shutdown", ["host01"], "transfer.0.delete"),
    ],
)
def test_delete(
    tree: Tree, before: list[str], failing: str, operation: str, places: list[str], script: str | None
) -> None:
    front_end = open_(tree)
    vm = created(front_end)
    for step in before:
        perform(front_end, vm, step)
    if failing:
        tree.say(f"tm.{failing}", status=1)
        with pytest.raises(ActionFailed):
            perform(front_end, vm, operation)
        tree.say(f"tm.{failing}")
    tree.calls()
    assert front_end.vms.delete("vm").status == "done"
    directory = f"{front_end.directory}/var//datastores/0/0"
    expected = []
    for place in places:
        expected += [f"shared/delete {place}:{directory}/disk.{n} 0 1" for n in (0, 1)]
        expected += [f"sys/delete {place}:{directory}/disk.2 0 0", f"sys/delete {place}:{directory} 0 0"]
    assert tree.lines() == expected
    files = Path(f"{front_end.directory}/var/vms/0")
    assert [file.name for file in files.glob("transfer.*.delete*")] == ([script] if script else [])
    assert [front_end.images.users(image) for image in front_end.images.all()] == [[], []]
    with pytest.raises(NotFound, match="done already"):
        front_end.vms.delete(vm.id)
    front_end.vms.create("vm")  # the name is free again


def test_delete_goes_on_after_a_failure_and_says_so(tree: Tree) -> None:
    front_end = open_(tree)
    created(front_end)
    front_end.vms.deploy("vm", "host01")
    tree.calls()
    tree.say("tm.shared.delete", status=10, stderr="host01 does not answer\n")
    with pytest.raises(ActionFailed, match=r"VM 0 is deleted, but .*host01 does not answer"):
        front_end.vms.delete("vm")
    assert names(tree) == ["shared/delete", "shared/delete", "sys/delete", "sys/delete"]
    assert front_end.vms.get("vm").status == "done"


def test_delete_of_a_pending_vm_runs_nothing(tree: Tree) -> None:
    front_end = open_(tree)
    created(front_end)
    front_end.vms.delete("vm")
    assert tree.calls() == []


def test_an_enlarged_persistent_disk_makes_its_image_larger(tree: Tree) -> None:
    front_end = open_(tree)
    front_end.vms.create("vm", [DiskRequest(image="pers", size=30)])
    front_end.vms.deploy("vm", "host01")
    assert front_end.images.get("pers").size == 10
    front_end.vms.shutdown("vm")
    assert front_end.images.get("pers").size == 30


def test_states_refuse_what_does_not_fit(tree: Tree) -> None:
    front_end = open_(tree)
    vm = created(front_end)
    for operation in ("stop", "resume host01", "migrate host02", "shutdown"):
        with pytest.raises(InUse, match="pending"):
            perform(front_end, vm, operation)
    front_end.vms.deploy("vm", "host01")
    with pytest.raises(UsageError, match="already"):
        front_end.vms.migrate("vm", "host01")
    with pytest.raises(NotFound):
        front_end.vms.migrate("vm", "host03")
    with pytest.raises(UsageError, match="no disk 9"):
        front_end.vms.detach("vm", 9)
    with pytest.raises(UsageError, match="volatile"):
        front_end.vms.disk_saveas("vm", 2, "copy")
    with pytest.raises(InUse, match="already"):
        front_end.vms.disk_saveas("vm", 0, "pers")
    assert front_end.vms.get("vm").status == "running"
    with pytest.raises(InUse, match="VM 0"):
        front_end.hosts.delete("host01")
    front_end.hosts.delete("host02")


def test_missing_drivers_are_named(tree: Tree) -> None:
    front_end = open_(tree)
    front_end.datastores.update("system", tm_mad="none")
    created(front_end)
    with pytest.raises(ActionFailed, match="Transfer Driver 'none' not available"):
        front_end.vms.deploy("vm", "host01")
    (tree.path / "tm/shared/clone").unlink()
    with pytest.raises(ActionFailed, match="tm/shared/clone does not exist"):
        front_end.vms.recover("vm")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"vm": "7"}, "read as an id"),
        ({"context": {"A B": "x"}}, "context variable"),
        ({"context": {"A": "\0"}}, "control character"),
        ({"context_files": ["/etc/no such"]}, "blanks"),
        ({"context_files": ["/etc/nosuch"]}, "does not exist"),
        ({"context_files": ["etc/passwd"]}, "absolute"),
        ({"system_datastore": "default"}, "system datastore"),
    ],
)
def test_vms_that_cannot_be(tree: Tree, arguments: dict[str, Any], error: str) -> None:
    front_end = open_(tree)
    with pytest.raises(MadrigalError, match=error):
        front_end.vms.create(**{"vm": "vm", **arguments})
    assert front_end.vms.all() == []


@pytest.mark.parametrize("host", ["-oProxyCommand=id", "a b", "a:b", "5", "", "a;b"])
def test_hosts_that_cannot_be(tree: Tree, host: str) -> None:
    front_end = open_(tree)
    with pytest.raises(UsageError):
        front_end.hosts.create(host)


def test_hosts_have_their_datastores_at_one_place_today(tree: Tree) -> None:
    front_end = open_(tree)
    with pytest.raises(UsageError, match=r"3\.4"):
        front_end.hosts.create("host03", "/elsewhere")


# Two commands at once


def command(tree: Tree, *words: str) -> subprocess.Popen[str]:
    argv = [
        sys.executable,
        "-m",
        "madrigal",
        "--state",
        str(tree.path.parent / "state"),
        "--tree",
        str(tree.path),
        *words,
    ]
    return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(LIB)}, stderr=subprocess.PIPE, text=True)


def wait_for_call(tree: Tree, action: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if calls := tree.calls(action):
            return calls[0]
        time.sleep(0.02)
    raise AssertionError(f"{action} was not called")


def test_a_vm_that_is_acted_on_is_locked(tree: Tree) -> None:
    front_end = open_(tree)
    created(front_end)
    tree.say("tm.shared.ln", sleep=3)
    process = command(tree, "vm", "deploy", "vm", "host01")
    wait_for_call(tree, "ln")
    for operation in ("delete", "recover", "stop"):
        with pytest.raises(Busy, match=f"VM 0 is being acted on .vm deploy, process {process.pid}."):
            getattr(front_end.vms, operation)("vm")
    assert front_end.vms.get("vm").status == "prolog"
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert front_end.vms.get("vm").status == "running"


def test_a_killed_command_locks_nothing(tree: Tree) -> None:
    """Its driver goes on, as under oned; the VM can be recovered, or deleted, at once."""
    front_end = open_(tree)
    created(front_end)
    tree.say("tm.shared.ln", sleep=60)
    process = command(tree, "vm", "deploy", "vm", "host01")
    call = wait_for_call(tree, "ln")
    process.kill()
    process.communicate(timeout=60)
    os.kill(call["pid"], 0)  # still there
    os.kill(call["pid"], signal.SIGKILL)
    assert front_end.vms.get("vm").status == "prolog"
    tree.say("tm.shared.ln")
    tree.calls()
    assert front_end.vms.recover("vm").status == "running"
    assert names(tree) == ["shared/clone", "shared/ln", "sys/mkswap", "sys/context"]


def test_a_killed_delete_of_a_stopped_vm_goes_on_where_the_vm_is(tree: Tree) -> None:
    front_end = open_(tree)
    created(front_end)
    front_end.vms.deploy("vm", "host01")
    front_end.vms.stop("vm")
    tree.say("tm.shared.delete", sleep=60)
    process = command(tree, "vm", "delete", "vm")
    call = wait_for_call(tree, "delete")
    process.kill()
    process.communicate(timeout=60)
    os.kill(call["pid"], signal.SIGKILL)
    tree.say("tm.shared.delete")
    with pytest.raises(InUse, match="vm delete 0"):
        front_end.vms.recover("vm")
    front_end.vms.delete("vm")
    assert tree.lines()[-1] == f"sys/delete fe:{front_end.directory}/var//datastores/0/0 0 0"


def test_an_image_that_is_acted_on_is_locked_until_its_command_ends(tree: Tree) -> None:
    front_end = open_(tree)
    tree.say("datastore.fs.cp", sleep=60)
    process = command(tree, "image", "create", "new", "--datastore", "default", "--path", "/srv/c")
    call = wait_for_call(tree, "cp")
    with pytest.raises(Busy, match="image 'new'"):
        front_end.images.delete("new")
    with pytest.raises(InUse, match="LOCKED"):
        front_end.vms.create("vm", [DiskRequest(image="new")])
    process.kill()
    process.communicate(timeout=60)
    os.kill(call["pid"], signal.SIGKILL)
    front_end.images.delete("new")


def test_many_commands_at_once(tree: Tree) -> None:
    """Ids are given once, a persistent image to one VM, and nothing fails because the state is busy."""
    front_end = open_(tree)
    processes = [command(tree, "vm", "create", f"vm{n}", "--disk", "image=pers") for n in range(5)]
    processes += [command(tree, "host", "create", f"h{n}") for n in range(5)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0] * 6 + [31] * 4, errors
    assert len(front_end.vms.all()) == 1
    hosts = front_end.hosts.all()
    assert sorted(host.id for host in hosts) == list(range(7))


# The state


def test_a_transaction_waits_for_another(tmp_path: Path) -> None:
    """Also for one that has only read so far: else both would read the same number."""
    mine = State(str(tmp_path))
    numbers: list[int] = []

    def other() -> None:
        state = State(str(tmp_path))
        with state.transaction():
            numbers.append(state.number("vm"))

    thread = threading.Thread(target=other)
    with mine.transaction():
        assert mine.setting("next vm") == ""
        thread.start()
        time.sleep(0.3)
        numbers.append(mine.number("vm"))
    thread.join(20)
    assert numbers == [0, 1]


def test_what_is_fixed(tree: Tree, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with FrontEnd(state, tree=str(tree.path)) as front_end:
        assert front_end.layout.contract == "current"
    with FrontEnd(state, contract="3.4", tree=str(tree.path), datastores="/srv/ds/") as front_end:  # nothing there yet
        assert (front_end.layout.contract, front_end.layout.datastores) == ("3.4", "/srv/ds")
        front_end.hosts.create("host01")
    for contract, datastores in (("current", ""), ("", "/elsewhere")):
        with pytest.raises(InUse, match="another --state"):
            FrontEnd(state, tree=str(tree.path), contract=contract, datastores=datastores)
    with FrontEnd(state, contract="3.4", tree=str(tree.path), datastores="/srv/ds") as front_end:
        assert front_end.hosts.get("host01").datastores == "/srv/ds"


def test_state_directories_that_cannot_be(tree: Tree, tmp_path: Path) -> None:
    for bad in (str(tmp_path / "a b"), str(tmp_path / "a:b")):
        with pytest.raises(UsageError):
            FrontEnd(bad, tree=str(tree.path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        FrontEnd(str(tmp_path / "full"), tree=str(tree.path))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/madrigal.db").write_text("this is not a database, but long enough to be looked at" * 20)
    with pytest.raises(ConfigError, match=r"cannot use .*madrigal.db"):
        FrontEnd(str(tmp_path / "damaged"), tree=str(tree.path))
    with pytest.raises(ConfigError, match="has no datastore/"):
        FrontEnd(str(tmp_path / "state"), tree=str(tmp_path))


def test_state_of_another_version(tmp_path: Path) -> None:
    import sqlite3

    State(str(tmp_path)).close()
    with sqlite3.connect(tmp_path / "madrigal.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="another version"):
        State(str(tmp_path))


def test_secrets_are_the_owners(tree: Tree) -> None:
    front_end = open_(tree)
    for name in ("madrigal.db", "one_auth"):
        assert os.stat(f"{front_end.directory}/{name}").st_mode & 0o077 == 0
