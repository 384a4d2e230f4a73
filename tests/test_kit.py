"""What the conformance kit is made of: its proxy, hosts that are given to it, and what a whole check has at least."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATH, RIGS, TREE

from madrigal.cli import main
from madrigal.conformance import report as reports
from madrigal.conformance.kit import Kit, Options
from madrigal.conformance.machines import Machines
from madrigal.conformance.proxy import Proxies
from madrigal.conformance.report import Report, Result

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the conformance kit's machines need root")


def kit_check(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "madrigal", "check", *words]
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib"), **env}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=900)


# -- the link, and a proxy of it ---------------------------------------------------------------------------------


class Linked:
    """A server that says back what it is told, behind a link."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        argv = [f"{RIGS}/link", str(self._server.getsockname()[1])]
        self._link = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._link.stdin and self._link.stdout
        self._in, self._out = self._link.stdin, self._link.stdout
        self.port = int(self._out.readline())

    def _serve(self) -> None:
        while True:
            try:
                connection = self._server.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.close()

    def tell(self, line: str) -> dict[str, int]:
        self._in.write(f"{line}\n")
        self._in.flush()
        said: dict[str, int] = json.loads(self._out.readline())
        return said

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def close(self) -> None:
        self._in.close()
        assert self._link.wait(5) == 0
        self._out.close()
        self._server.close()


@pytest.fixture
def link() -> Iterator[Linked]:
    made = Linked()
    yield made
    made.close()


def passes(client: socket.socket, seconds: float = 20) -> bool:
    """Whether a byte comes back within SECONDS; raises ConnectionError if the connection is cut."""
    client.settimeout(seconds)
    try:
        client.sendall(b"x")
        if not (data := client.recv(1)):
            raise ConnectionError
        return bool(data)
    except TimeoutError:
        return False


def test_a_link_that_hangs_goes_on(link: Linked) -> None:
    with link.connect() as client:
        assert passes(client)
        link.tell("hang")
        with link.connect() as late:
            assert not passes(client, 0.3) and not passes(late, 0.3)
            link.tell("go-on")
            for one in (client, late):
                one.settimeout(20)
                assert one.recv(1) == b"x"


def test_a_link_that_loses_connections_has_new_ones(link: Linked) -> None:
    with link.connect() as client:
        assert passes(client)
        assert link.tell("lose-after 1")["connections"] == 1
        assert not passes(client, 0.3)
        with link.connect() as late:
            assert passes(late)
            assert link.tell("cut")["cuts"] == 1
            with pytest.raises(ConnectionError):
                assert passes(client)
            with pytest.raises(ConnectionError):
                assert passes(late)


@needs_root
def test_a_proxy_is_before_every_host_and_gone_afterwards() -> None:
    machines = Machines((), [])
    try:
        config = Path("/proc", str(getattr(machines.fe, "pid", 0)), "root/etc/ssh/ssh_config")
        before = config.read_text()
        ssh = ["ssh", "-o", "BatchMode=yes", "host02"]
        with Proxies(machines) as proxies:
            assert config.read_text() != before
            said = machines.fe.run(*ssh, "head -c 100000 /dev/zero")
            proxy, passed = proxies.busiest()
            assert (proxy.name, len(said)) == ("host02", 100000) and 100000 < passed < 200000
            proxy.tell("cut-after 50000")
            # sshd tells of a command's end as soon as it has ended, also before the last of its output
            late = "head -c 100000 /dev/zero; sleep 5"
            done = subprocess.run(machines.fe.argv([*ssh, late]), capture_output=True)
            assert done.returncode == 255 and len(done.stdout) < 60000
        assert config.read_text() == before
        assert machines.fe.run(*ssh, "echo again") == b"again\n"
    finally:
        machines.close()


# -- hosts that are given ----------------------------------------------------------------------------------------


@pytest.fixture
def far() -> Iterator[dict[str, str]]:
    """Two hosts that have a /tmp of their own, as machines elsewhere have: what ssh needs to know of them."""
    for program in ("sshd", "ssh", "unshare", "nsenter"):
        if not shutil.which(program, path=f"{PATH}:/usr/sbin:/sbin"):
            pytest.skip(f"SSH hosts need {program}, which is not installed")
    if subprocess.run([RIGS / "hosts-up", "/tmp/none", "can"], stdin=subprocess.DEVNULL).returncode:
        pytest.skip("this machine forbids user namespaces, which SSH hosts with file systems of their own need")
    work = tempfile.mkdtemp(prefix="mg", dir="/tmp")
    env = {**os.environ, "HOSTS_KEEP": work}
    subprocess.run([RIGS / "hosts-up", f"{work}/hosts", "-n", "2", "-s", "256m", "/tmp"], env=env, check=True)
    yield {"MADRIGAL_SSH_CONFIG": f"{work}/hosts/ssh_config"}
    subprocess.run([RIGS / "hosts-down", f"{work}/hosts"], check=True)
    shutil.rmtree(work)


HOSTS = ("--host", "host01", "--host", "host02")


@pytest.mark.long
def test_hosts_that_are_given(far: dict[str, str], tmp_path: Path) -> None:
    """A plain user may do this too.  What the check would have to break is skipped by name."""
    only = "(raw or shared) and (answer or content or leftovers or secrets or kill or full_disk or host_down)"
    words = ("--tm", "ssh", "--tm", "shared", "--datastore", "fs", "--contract", "current", "-k", only)
    done = kit_check(*HOSTS, *words, "-j", "2", "--json", str(tmp_path / "found"), **far)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "found").read_text())["results"]
    held = {(one["driver"], one["check"]) for one in results if one["outcome"] == "passed"}
    for driver in ("tm/ssh[current]", "datastore/fs[current]"):
        assert {(driver, check) for check in ("answer", "content", "leftovers", "secrets")} <= held
    assert not any(driver == "tm/shared[current]" and check == "answer" for driver, check in held)
    said = {one["said"] for one in results if one["outcome"] == "skipped"}
    assert "hosts that are given share no storage, which tm/shared needs" in said
    for host in ("host01", "host02"):
        left = subprocess.check_output(["ssh", "-F", far["MADRIGAL_SSH_CONFIG"], host, "ls /tmp"], text=True).split()
        assert not [name for name in left if not far["MADRIGAL_SSH_CONFIG"].startswith(f"/tmp/{name}/")]


def test_a_host_that_is_none_is_named_at_once(far: dict[str, str]) -> None:
    done = kit_check("--host", "host01", "--host", "host07", "--tm", "ssh", **far)
    assert done.returncode == 10 and len(done.stderr.splitlines()) == 1 and "host07" in done.stderr, done
    one = kit_check("--host", "host01", "--tm", "ssh", **far)
    assert one.returncode == 20 and "two hosts are needed" in one.stderr, one


def test_a_plain_user_is_told_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    status, (line,) = main(["check", "--tm", "ssh"]), capsys.readouterr().err.splitlines()
    assert status == 24 and "need root" in line and "--host" in line


# -- what a whole check has at least -----------------------------------------------------------------------------


def whole(dumps: int, each: dict[str, tuple[int, int]]) -> Report:
    """A report of a whole check: EACH has kills, and kills in a stream (-1: it has none), by action."""
    found = Report(whole=True)
    counts = {"broken dumps": dumps}
    found.add(Result("datastore/x[3.4]", "broken_dumps", "cp", "cp raw", "passed", "", "", 1.0, [], counts))
    for action, (kills, inside) in each.items():
        driver, name = "tm/x[current]", f"{action} raw"
        found.add(Result(driver, "kill", action, name, "passed", "", "", 1.0, [], {"kills": kills - max(inside, 0)}))
        if inside >= 0:
            counts = {"kills": inside, "kills in a stream": inside}
            found.add(Result(driver, "kill_in_stream", action, name, "passed", "", "", 1.0, [], counts))
    return found


def test_a_whole_check_has_to_be_one(tmp_path: Path) -> None:
    enough = whole(10_000, {"clone": (1980, 990), "delete": (20, -1)})
    assert enough.holds and not enough.missed and "TOO LITTLE" not in enough.table()
    assert "2,000 kills" in enough.table() and "tm delete current 20 times" in enough.table()
    totals = json.loads(enough.json())["totals"]
    assert totals["in_stream"] == 0.5 and totals["counts"]["broken dumps"] == 10_000
    for few, named in (
        (whole(9_999, {"clone": (1980, 990), "delete": (20, -1)}), "9,999 broken dumps"),
        (whole(10_000, {"clone": (1979, 990), "delete": (20, -1)}), "1,999 kills"),
        (whole(10_000, {"clone": (1981, 991), "delete": (19, -1)}), "tm delete current was killed 19 times"),
        (whole(10_000, {"clone": (1980, 900), "delete": (20, -1)}), "45%"),
        (whole(10_000, {"clone": (1980, 990), "delete": (20, -1), "mv": (0, -1)}), "tm mv current was killed 0 times"),
    ):
        assert not few.holds and not few.failures
        (missed,) = few.missed
        assert named in missed and f"TOO LITTLE: {missed}" in few.table() and missed in few.html(), missed
    (tmp_path / "one").write_text(few.json())
    loaded = Report(whole=True)
    loaded.load(str(tmp_path / "one"))
    assert loaded.missed == few.missed and not loaded.holds
    part = Report()
    part.load(str(tmp_path / "one"))
    assert part.holds, "of a part nothing of this can be asked"


@pytest.mark.parametrize(
    "more",
    [
        {"profile": "quick"},
        {"only": "kill"},
        {"tms": ("ssh",)},
        {"forms": ("3.4",)},
        {"hosts": ("a", "b")},
        {"tree": "/"},
        {"pytest": ("-x",)},
    ],
)
def test_what_is_no_whole_check(more: dict[str, object]) -> None:
    given: dict[str, object] = {"tree": str(TREE), "profile": "full"}
    assert Options(**given).is_whole  # type: ignore[arg-type]
    assert not Options(**{**given, **more}).is_whole  # type: ignore[arg-type]


def test_the_full_profile_is_planned_to_have_enough() -> None:
    """By what the checks are going to do: that they have done it, only the check itself shows, and fails if not."""
    from madrigal.conformance.checks import test_hostile, test_kill
    from madrigal.conformance.plugin import Case, Plugin

    kit = Kit(Options(tree=str(TREE), profile="full"))
    plugin = Plugin(kit, Report())

    def cases(check: object) -> list[Case]:
        scenes, quick, _ = check.__dict__["asks"]
        found = []
        for subject in kit.subjects:
            ours = [scene for scene in kit.scenes if scenes(scene) and scene.unfit(subject) != "-"]
            found += plugin._thorough([Case(kit, subject, one, "", one.unfit(subject)) for one in ours], quick)
        return [case for case in found if not case.skip]

    first, more = test_hostile.DUMPS["full"], test_hostile.DUMPS["full"] // 5
    dumps = sum(first if case.is_first else more for case in cases(test_hostile.test_broken_dumps))
    assert dumps > reports.DUMPS * 1.02  # those that do not fit into an argument are not counted
    assert test_kill.KILLS["full"] > reports.EACH  # together, whatever the number of drivers
    streams, few = test_kill.IN_STREAM["full"], test_kill.FEW
    inside = sum(streams if case.is_first else streams // 2 for case in cases(test_kill.test_kill_in_stream))
    beside = sum(few for case in cases(test_kill.test_kill) if case.scene and case.scene.streams)
    assert inside > 10 * beside
