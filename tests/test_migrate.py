"""A VM that goes to another host while it runs: premigrate, postmigrate and failmigrate, on real hosts."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import TREE, Done, Hosts, check_stderr, eventually, run_action, start_action
from dumps import front_end, vm_document

VM = 17
ACTIONS = ("premigrate", "postmigrate", "failmigrate")


class Cloud:
    """Hosts with system datastores 0 and 100; `history` is what the front-end knows, `told` what stdin tells."""

    def __init__(self, hosts: Hosts, work: Path) -> None:
        self.hosts, self.work, self.root = hosts, work, hosts.datastores
        self.mads: list[str] = ["ssh"]
        self.history: Sequence[int] = (0, 0)
        self.told: Sequence[int] = (0, 0)

    def document(self, history: Sequence[int]) -> bytes:
        return vm_document(VM, {n: {"TM_MAD": mad} for n, mad in enumerate(self.mads)}, 3, history)

    def run(self, action: str, origin: str, target: str, *caller: str, vm: int = VM) -> Done:
        """ACTION of a VM that comes from the host ORIGIN to TARGET, `HOST:DSID`."""
        host, _, ds = target.partition(":")
        directory = f"{self.root}/{ds}/{vm}" if ds.isdigit() else f"{ds}/{vm}"
        told = base64.b64encode(self.document(self.told))
        with front_end(self.work, self.document(self.history)) as asked:
            argv = [origin, host, directory, str(vm), "0", *caller]
            return run_action(action, *argv, env={**self.hosts.env, **asked}, input=told)

    def ok(self, action: str, origin: str, target: str, *caller: str) -> str:
        done = self.run(action, origin, target, *caller)
        assert (done.status, done.stdout) == (0, ""), done
        check_stderr(done, action)
        return done.stderr

    def fails(self, status: int, text: str, action: str, origin: str, target: str) -> None:
        done = self.run(action, origin, target)
        assert (done.status, text in check_stderr(done, action)) == (status, True), done

    def at(self, host: str, ds: int = 0, name: str = "") -> Path:
        return self.hosts.on(host, f"{self.root}/{ds}/{VM}/{name}")

    def put(self, host: str, content: bytes, ds: int = 0) -> Path:
        """A VM directory on HOST with a disk of CONTENT, and with one more directory beside it."""
        for name in (str(VM), "171"):
            directory = self.at(host, ds).parent / name
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "disk.0").write_bytes(content)
        return self.at(host, ds)


@pytest.fixture
def cloud(hosts: Hosts, tmp_path: Path) -> Iterator[Cloud]:
    yield Cloud(hosts, tmp_path)
    for place in (Path(hosts.datastores), *(hosts.on(name) for name in hosts.names)):
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)


@pytest.fixture
def shared(cloud: Cloud) -> Iterator[Cloud]:
    """With two hosts more, node1 and node2, that see the front-end's datastores."""
    for name in ("node1", "node2"):
        cloud.hosts._rig("add", name)
    yield cloud
    for name in ("node1", "node2"):
        cloud.hosts.end(name)


def others_are_there(cloud: Cloud, *places: tuple[str, int]) -> None:
    for host, ds in places:
        assert (cloud.at(host, ds).parent / "171" / "disk.0").exists(), "the directory of another VM"


def test_ssh_makes_room_and_tidies_up(cloud: Cloud) -> None:
    source, stale = cloud.put("host01", b"running"), cloud.put("host02", b"of long ago")
    for _ in range(2):
        cloud.ok("tm/ssh/premigrate", "host01", "host02:0")
        assert not stale.exists() and (source / "disk.0").read_bytes() == b"running"
        assert (stale.parent / ".monitor").read_text() == "ssh\n"
    target = cloud.put("host02", b"brought by the hypervisor")
    for _ in range(2):
        cloud.ok("tm/ssh/postmigrate", "host01", "host02:0")
        assert not source.exists() and (target / "disk.0").exists()
    others_are_there(cloud, ("host01", 0), ("host02", 0))
    left = [name for host in ("host01", "host02") for name in os.listdir(cloud.at(host).parent)]
    assert sorted(left) == [".monitor", "17", "171", "171"], "no probe, lock or part"


def test_premigrate_makes_the_datastore_on_a_new_host(cloud: Cloud) -> None:
    cloud.put("host01", b"running")
    cloud.ok("tm/ssh/premigrate", "host01", "host02:0")
    assert os.listdir(cloud.at("host02").parent) == [".monitor"]


def test_failmigrate_removes_what_came_and_keeps_what_runs(cloud: Cloud) -> None:
    source, half = cloud.put("host01", b"running"), cloud.put("host02", b"half")
    for _ in range(2):
        cloud.ok("tm/ssh/failmigrate", "host01", "host02:0")
        assert not half.exists() and (source / "disk.0").read_bytes() == b"running"
    others_are_there(cloud, ("host01", 0), ("host02", 0))


@pytest.mark.parametrize("told", [(100, 0), (0,), ()], ids=["stdin", "front-end", "front-end, no record"])
@pytest.mark.parametrize("driver", ["ssh", "local", "shared"])
def test_another_system_datastore_is_left_behind_empty(cloud: Cloud, driver: str, told: Sequence[int]) -> None:
    """The source host has no directory of the new datastore, by way of which the path would not resolve there."""
    cloud.history, cloud.told = (0, 100, 0), told
    source, target = cloud.put("host01", b"left", ds=100), cloud.put("host02", b"here")
    assert not cloud.at("host01").parent.exists()
    cloud.ok(f"tm/{driver}/postmigrate", "host01", "host02:0")
    assert not source.exists() and (target / "disk.0").exists()
    others_are_there(cloud, ("host01", 100), ("host02", 0))


def test_a_change_of_datastore_on_one_host(cloud: Cloud) -> None:
    cloud.history = cloud.told = (100, 0)
    source, stale = cloud.put("host01", b"running", ds=100), cloud.put("host01", b"stale")
    cloud.ok("tm/ssh/premigrate", "host01", "host01:0")
    assert not stale.exists() and source.exists()
    cloud.put("host01", b"brought")
    cloud.ok("tm/ssh/postmigrate", "host01", "host01:0")
    assert not source.exists() and stale.exists()


def test_a_vm_that_goes_nowhere_keeps_its_directory(cloud: Cloud) -> None:
    source = cloud.put("host01", b"running")
    cloud.ok("tm/ssh/postmigrate", "host01", "host01:0")
    cloud.ok("tm/ssh/failmigrate", "host01", "host01:0")
    cloud.fails(20, "storage that both hosts share", "tm/ssh/premigrate", "host01", "host01:0")
    assert (source / "disk.0").read_bytes() == b"running"


def test_a_directory_that_two_hosts_see_is_kept(shared: Cloud) -> None:
    """A stock premigrate removes it, and the running VM has no disks any more; a probe shows it, by whatever path."""
    directory = Path(shared.root, "0", str(VM))
    directory.mkdir(parents=True)
    (directory / "disk.0").write_bytes(b"running")
    other = shared.work / "mounted"
    other.symlink_to(shared.root)
    for target in ("node2:0", f"node2:{other}/0"):
        shared.fails(20, "one directory on storage that both hosts share", "tm/ssh/premigrate", "node1", target)
        for action in ("ssh/postmigrate", "ssh/failmigrate", *(f"shared/{action}" for action in ACTIONS)):
            shared.ok(f"tm/{action}", "node1", target)
        assert os.listdir(directory) == ["disk.0"]
    assert not (directory.parent / ".monitor").exists()


def test_two_names_of_one_datastore(shared: Cloud) -> None:
    """The history says that the VM came from another system datastore, whose directory is a link to this one."""
    shared.history = shared.told = (100, 0)
    directory = Path(shared.root, "0", str(VM))
    directory.mkdir(parents=True)
    (directory / "disk.0").write_bytes(b"running")
    Path(shared.root, "100").symlink_to("0")
    for driver in ("ssh", "shared"):
        shared.ok(f"tm/{driver}/postmigrate", "node1", "node2:0")
        assert os.listdir(directory) == ["disk.0"]


def test_a_shared_datastore_that_is_left_by_a_third_host(shared: Cloud) -> None:
    """From storage that node1 and node2 share, seen by the target too, to host01's own: what is left is removed."""
    shared.history = shared.told = (100, 0)
    old, target = Path(shared.root, "100", str(VM)), shared.put("host01", b"here")
    old.mkdir(parents=True)
    (old / "disk.0").write_bytes(b"left")
    shared.ok("tm/ssh/postmigrate", "node1", "host01:0")
    assert not old.exists() and target.exists()
    new = Path(shared.root, "0", str(VM))
    for directory in (old, new):
        directory.mkdir(parents=True)
        (directory / "disk.0").write_bytes(b"disk")
    shared.ok("tm/shared/postmigrate", "node1", "node2:0")  # node2 sees both
    assert not old.exists() and (new / "disk.0").exists()


def test_nothing_goes_before_its_successor_is_seen(cloud: Cloud) -> None:
    source = cloud.put("host01", b"the only one")
    cloud.fails(30, "does not exist, so host01:", "tm/ssh/postmigrate", "host01", "host02:0")
    assert (source / "disk.0").exists()
    cloud.fails(30, "does not exist, so host01:", "tm/ssh/failmigrate", "host02", "host01:0")
    assert (source / "disk.0").exists()
    assert os.listdir(source) == ["disk.0"], "no probe"


def test_what_a_kill_left_is_removed_by_the_next_run(cloud: Cloud) -> None:
    """The worker was killed in the middle of removing."""
    cloud.put("host01", b"running")
    cloud.put("host02", b"here")
    for host, action, origin in (("host02", "premigrate", "host01"), ("host01", "postmigrate", "host01")):
        directory = cloud.at(host)
        os.rename(directory, gone := directory.parent / f".{VM}.gone.part")
        cloud.ok(f"tm/ssh/{action}", origin, "host02:0")
        assert not gone.exists()
        directory.mkdir()
    others_are_there(cloud, ("host01", 0), ("host02", 0))


def test_a_disk_that_a_process_uses_is_not_removed(cloud: Cloud) -> None:
    """A migration that failed when it was over already: the VM runs on the target, and qemu has locked its disks."""
    cloud.put("host01", b"paused")
    target = cloud.put("host02", b"running")
    holder = (
        "import fcntl, struct, sys; file = open(sys.argv[1], 'r+'); F_OFD_SETLK = 37; "
        "fcntl.fcntl(file, F_OFD_SETLK, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 100, 1, 0)); print(1, flush=True)"
    )
    argv = ["/usr/bin/python3", "-c", f"{holder}; sys.stdin.read()", str(target / "disk.0")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        for action in ("failmigrate", "premigrate"):
            cloud.fails(31, "is in use: a process has locked", f"tm/ssh/{action}", "host01", "host02:0")
        assert os.listdir(target) == ["disk.0"]
        process.communicate()
    cloud.ok("tm/ssh/failmigrate", "host01", "host02:0")
    assert not target.exists()


# -- the drivers of the other disks ----------------------------------------------------------------------------


class Others:
    """A tree with our drivers ssh, local and shared, and others that write down how they are called."""

    def __init__(self, work: Path) -> None:
        self.tree, self.written = work / "tree", work / "written"
        (self.tree / "tm").mkdir(parents=True)
        self.written.touch()
        for name in ("ssh", "local", "shared"):
            (self.tree / "tm" / name).symlink_to(TREE / "tm" / name)

    def driver(self, name: str, *actions: str, then: str = "") -> None:
        (self.tree / "tm" / name).mkdir()
        for action in actions:
            path = self.tree / "tm" / name / action
            note = f'echo "{name}/{action} $* $(cat | md5sum | cut -c1-32)" >>{shlex.quote(str(self.written))}'
            path.write_text(f"#!/bin/sh\n{note}\n{then}\n")
            path.chmod(0o755)

    def action(self, name: str) -> str:
        return os.path.relpath(self.tree / "tm" / name, TREE)

    def calls(self) -> list[str]:
        """`DRIVER/ACTION CALLER` of each call since the last time."""
        lines = self.written.read_text().splitlines()
        self.written.write_text("")
        return [" ".join((line.split()[0], *line.split()[6:-1])) for line in lines]


@pytest.fixture
def others(tmp_path: Path) -> Others:
    return Others(tmp_path)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("driver", ["ssh", "local", "shared"])
def test_every_other_driver_is_called_once(cloud: Cloud, others: Others, action: str, driver: str) -> None:
    """Each one, not only the first disk's, with the same arguments and stdin; and none where we are called."""
    cloud.mads = [driver, "ceph", "lvm", "ceph", "absent", "lame"]
    others.driver("ceph", *ACTIONS, then="echo 'INFO: premigrate: mapped' >&2; echo noise >&2")
    others.driver("lvm", *ACTIONS)
    others.driver("lame")
    cloud.put("host01", b"running")
    if action == "postmigrate":
        cloud.put("host02", b"here")
    said = cloud.ok(others.action(f"{driver}/{action}"), "host01", "host02:0")
    assert f"INFO: {action}: ceph: premigrate: mapped\n" in said and "noise" not in said
    told = base64.b64encode(cloud.document(cloud.told))
    digest = subprocess.run(["md5sum"], input=told, capture_output=True).stdout.decode().split()[0]
    expected = f"host01 host02 {cloud.root}/0/{VM} {VM} 0 {driver} {digest}"
    assert others.written.read_text() == f"ceph/{action} {expected}\nlvm/{action} {expected}\n"
    others.calls()
    before = sorted(str(path) for name in cloud.hosts.names for path in cloud.hosts.on(name).rglob("*"))
    cloud.ok(others.action(f"{driver}/{action}"), "host01", "host02:0", "lvm")
    assert others.calls() == []
    assert before == sorted(str(path) for name in cloud.hosts.names for path in cloud.hosts.on(name).rglob("*"))


def test_a_vm_without_disks(cloud: Cloud, others: Others) -> None:
    cloud.mads = []
    for driver in ("shared", "local", "ssh"):
        cloud.ok(others.action(f"{driver}/premigrate"), "host01", "host02:0")


def test_what_was_prepared_is_taken_back_when_the_next_fails(cloud: Cloud, others: Others) -> None:
    cloud.mads = ["one", "two", "bad", "never"]
    others.driver("one", *ACTIONS)
    others.driver("two", *ACTIONS)
    others.driver("bad", *ACTIONS, then="echo 'ERROR: x: no lock' >&2; echo 'Cannot activate lv-one' >&2; exit 7")
    others.driver("never", *ACTIONS)
    reason = "failed (7): Cannot activate lv-one"
    cloud.fails(1, f"bad/premigrate {reason}", others.action("shared/premigrate"), "host01", "host02:0")
    called = ["one/premigrate", "two/premigrate", "bad/premigrate", "two/failmigrate", "one/failmigrate"]
    assert others.calls() == [f"{call} shared" for call in called]
    for action in ("postmigrate", "failmigrate"):  # there it goes on, and fails at the end
        cloud.fails(1, f"bad/{action} {reason}", others.action(f"shared/{action}"), "host01", "host02:0")
        assert others.calls() == [f"{name}/{action} shared" for name in cloud.mads]


@pytest.mark.parametrize("action", ["postmigrate", "failmigrate"])
def test_the_directory_goes_although_another_driver_fails(cloud: Cloud, others: Others, action: str) -> None:
    cloud.mads = ["bad"]
    others.driver("bad", *ACTIONS, then="exit 1")
    places = {host: cloud.put(host, b"disk") for host in ("host01", "host02")}
    cloud.fails(1, f"bad/{action} failed (1): it gave no reason", others.action(f"ssh/{action}"), "host01", "host02:0")
    assert {host for host, path in places.items() if path.exists()} == (
        {"host02"} if action == "postmigrate" else {"host01"}
    )


def test_a_driver_that_hangs_is_ended(cloud: Cloud, others: Others) -> None:
    cloud.mads = ["one", "slow"]
    others.driver("one", *ACTIONS)
    others.driver("slow", *ACTIONS, then="exec sleep 77")
    short = dict.fromkeys(("MADRIGAL_CONTROL_TIMEOUT", "MADRIGAL_LOCK_TIMEOUT", "MADRIGAL_STALL_TIMEOUT"), "0.5")
    cloud.hosts.env, before = {**cloud.hosts.env, **short}, cloud.hosts.env
    try:
        reason = "slow/premigrate took longer than 1.5 s"
        cloud.fails(124, reason, others.action("shared/premigrate"), "host01", "host02:0")
    finally:
        cloud.hosts.env = before
    assert others.calls() == [f"{call} shared" for call in ("one/premigrate", "slow/premigrate", "one/failmigrate")]
    assert not running("sleep 77")


def test_a_signal_takes_back_what_was_prepared(cloud: Cloud, others: Others) -> None:
    cloud.mads = ["one", "slow"]
    others.driver("one", *ACTIONS)
    others.driver("slow", *ACTIONS, then="exec sleep 78")
    told = base64.b64encode(cloud.document(cloud.told))
    argv = ["host01", "host02", f"{cloud.root}/0/{VM}", str(VM), "0"]
    process = start_action(others.action("shared/premigrate"), *argv, env=cloud.hosts.env)
    assert process.stdin
    process.stdin.write(told)
    process.stdin.close()
    assert eventually(lambda: running("sleep 78"))
    process.terminate()
    assert process.wait(20) == 143
    assert others.calls() == [f"{call} shared" for call in ("one/premigrate", "slow/premigrate", "one/failmigrate")]
    assert not running("sleep 78")
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def running(command: str) -> bool:
    """Whether a process has this command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_bytes())
    return command.replace(" ", "\0").encode() + b"\0" in found


def test_names_of_drivers_lead_nowhere_else(cloud: Cloud, others: Others) -> None:
    for name in ("../tm/one", "..", ".", "a b", "-x", "x;id"):
        cloud.mads = ["one", name]
        cloud.fails(2, "not the name of a driver", others.action("shared/premigrate"), "host01", "host02:0")
    assert others.calls() == []
