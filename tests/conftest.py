"""What tests of several modules share: real SSH hosts, the two transports, and running an action as a front-end does.

With MADRIGAL_REQUIRE_ALL=1 in the environment a test that would be skipped fails instead.
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import servers

TREE = Path(__file__).resolve().parent.parent
RIGS = TREE / "tests" / "rigs"
if str(TREE / "lib") not in sys.path:
    sys.path.insert(0, str(TREE / "lib"))

PATH = "/usr/local/bin:/usr/bin:/bin"
"""What a front-end, and `su -` for a plain user, gives."""

# Else `python3` may be one without our packages, which every executable would start first, to leave it for another.
os.environ["PATH"] = f"{PATH}:{os.environ['PATH']}"

_LOG = re.compile(r"(ERROR|WARN|INFO|DEBUG): (?P<name>[\w.-]+): \S")
_numbers = itertools.count(100)
_MARKS = ["ERROR MESSAGE --8<------", "ERROR MESSAGE ------>8--"]


# -- skipping --------------------------------------------------------------------------------------------------


def _is_strict() -> bool:
    return os.environ.get("MADRIGAL_REQUIRE_ALL", "") == "1"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def _no_skip(report: Any) -> None:
    if report.skipped and _is_strict() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"MADRIGAL_REQUIRE_ALL=1 and {_reason(report)}"


def _mend_report() -> Generator[None, Any, None]:
    outcome = yield
    _no_skip(outcome.get_result())


pytest_runtest_makereport = pytest.hookimpl(hookwrapper=True)(_mend_report)
pytest_make_collect_report = pytest.hookimpl(hookwrapper=True)(_mend_report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Every skipped test by its name: pytest's own summary has the line of the skip alone."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("tests that were skipped")
    for report in skipped:
        terminalreporter.line(f"{report.nodeid}: {_reason(report)}")


def _sort_out(items: list[pytest.Item]) -> None:
    """Forms and transports know nothing of one another: what shows each with the usual other is enough each time."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if (params.get("form"), params.get("transport")) == ("3.4", "paramiko"):
            item.add_marker(pytest.mark.long)


pytest_collection_modifyitems = pytest.hookimpl(tryfirst=True)(_sort_out)


# -- hosts -----------------------------------------------------------------------------------------------------


class Hosts:
    """SSH hosts on this machine with file systems of their own, as tests/rigs/hosts-up makes them.

    `names`: host01 and host02.  `env`: the environment that actions need to reach them, and no more than a
    front-end gives.  `datastores`: a directory that the front-end and every host have, each its own.
    With OWN, directories of it, only these are each machine's own, and the rest of it is storage that all share.
    """

    def __init__(self, work: str, count: int = 2, own: Sequence[str] = (), size: str = "512m") -> None:
        self.work = work
        self._state = f"{work}/hosts"
        self.ssh_config = f"{self._state}/ssh_config"
        self.var = f"{work}/one/var"
        self.datastores = f"{self.var}/datastores"
        self.names = [f"host{number:02}" for number in range(1, count + 1)]
        mounts = [f"{self.datastores}/{name}" for name in own] or [self.datastores]
        for directory in (*mounts, f"{work}/home", f"{work}/tmp"):
            os.makedirs(directory)
        self.env = {
            "PATH": PATH,
            "HOME": f"{work}/home",
            "TMPDIR": f"{work}/tmp",
            "ONE_LOCATION": f"{work}/one",
            "MADRIGAL_SSH_CONFIG": self.ssh_config,
            "MADRIGAL_RUN_DIR": f"{work}/run",
            "MADRIGAL_FRONTEND": "fe",
        }
        self._rig("-n", str(count), "-s", size, *mounts)

    def _rig(self, *argv: str, **env: str) -> None:
        rig = subprocess.run([f"{RIGS}/hosts-up", self._state, *argv], capture_output=True, env={**os.environ, **env})
        assert rig.returncode == 0, rig.stderr.decode()

    def add(self, name: str, size: str = "64m", sshd: str = "") -> None:
        """One host more, with a file system of SIZE at `datastores` and the lines SSHD in its sshd's configuration."""
        self._rig("add", name, self.datastores, HOSTS_SIZE=size, HOSTS_SSHD=sshd)

    def link(self, name: str, delay: float = 0, rate: float = 0) -> Link:
        """A path to a host with DELAY ms and RATE bits a second each way, by which it is reached until it is closed.

        Connections that are kept do not take it: a test has `cold`.
        """
        return Link(self, name, delay, rate)

    def port(self, name: str, port: str = "") -> str:
        """Let a host be reached by PORT, or by its own, which is returned."""
        self._rig("port", name, *filter(None, [port]))
        rig = subprocess.run([f"{RIGS}/hosts-up", self._state, "own-port", name], capture_output=True, check=True)
        return rig.stdout.decode().strip()

    def end(self, name: str) -> None:
        """As if its power were cut."""
        self._rig("end", name)

    def pid(self, name: str) -> int:
        """Process 1 of a host, as this machine counts; all that runs on the host descends from it."""
        unshare = Path(self._state, name, "pid").read_text().strip()
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def pids(self, name: str) -> list[int]:
        """All that runs on a host, its sshd first."""
        found, todo = [], [self.pid(name)]
        while todo:
            pid = todo.pop(0)
            try:
                todo += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except OSError:
                continue  # it has just ended
            found.append(pid)
        return found[1:]

    def workers(self, name: str) -> list[int]:
        """The workers of our sessions that run on a host."""
        return [pid for pid in self.pids(name) if _cmdline(pid)[:3] == ["python3", "-I", "-S"]]

    def on(self, name: str, path: str = "") -> Path:
        """PATH (default: `datastores`) of a host as a path of this machine, to look at it without ssh."""
        return Path(f"/proc/{self.pid(name)}/root{path or self.datastores}")

    def run(self, name: str, argv: Sequence[str], input: bytes = b"") -> bytes:
        """The output of a program run on a host, without ssh; it must succeed."""
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", str(self.pid(name)), *user, "--mount", "--pid", "--"]
        done = subprocess.run(enter + list(argv), input=input, capture_output=True)
        assert done.returncode == 0, f"{argv} on {name}: {done.stderr.decode()}"
        return done.stdout

    def close(self) -> list[str]:
        """End everything; returns the command lines of what had to be killed because it did not end by itself."""
        from madrigal.host import openssh

        run_dirs = [str(path) for path in Path(self.work).glob("run*")]
        for run_dir in run_dirs:
            with _environment(MADRIGAL_RUN_DIR=run_dir):
                openssh.disconnect()
        left = [] if _gone(run_dirs) else [" ".join(_cmdline(pid)) for pid in _mentioning(*run_dirs)]
        subprocess.run([f"{RIGS}/hosts-down", self._state], check=True)
        for pid in _mentioning(self.work + "/"):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.work)
        return left


class Link:
    """A running tests/rigs/link in front of a host's sshd; a context manager."""

    def __init__(self, hosts: Hosts, name: str, delay: float, rate: float) -> None:
        self._hosts, self._name = hosts, name
        argv = [f"{RIGS}/link", "--delay", str(delay), "--rate", f"{rate:.0f}", hosts.port(name)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        hosts.port(name, self._stdout.readline().decode().strip())

    def tell(self, line: str) -> dict[str, int]:
        """What has passed since the last time: connections, forth, back, cuts.  LINE as tests/rigs/link says."""
        self._stdin.write(line.encode() + b"\n")
        self._stdin.flush()
        said: dict[str, int] = json.loads(self._stdout.readline())
        return said

    def cut_after(self, count: int) -> None:
        """Cut what is open when COUNT bytes more have passed, once."""
        self.tell(f"cut-after {count}")

    def count(self) -> dict[str, int]:
        return self.tell("count")

    def close(self) -> None:
        self._hosts.port(self._name)
        self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _environment:
    def __init__(self, **values: str) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


def _cmdline(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _mentioning(*texts: str) -> list[int]:
    """The processes with one of TEXTS in their arguments."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    return [pid for pid in pids if any(text in word for word in _cmdline(pid) for text in texts)]


def _gone(texts: Sequence[str]) -> bool:
    return not texts or eventually(lambda: not _mentioning(*texts), 10)


def eventually(condition: Callable[[], object], seconds: float = 20) -> bool:
    """Whether CONDITION() becomes true within SECONDS."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Two SSH hosts, for the whole session; a test leaves `datastores` as it found it."""
    yield from rig()


def need_hosts() -> None:
    """Skip what needs SSH hosts where there can be none."""
    for program in ("sshd", "ssh", "unshare", "nsenter"):
        if not shutil.which(program, path=f"{PATH}:/usr/sbin:/sbin"):
            pytest.skip(f"SSH hosts need {program}, which is not installed")
    if subprocess.run([f"{RIGS}/hosts-up", "/tmp/none", "can"], stdin=subprocess.DEVNULL).returncode:
        pytest.skip("this machine forbids user namespaces, which SSH hosts with file systems of their own need")


def rig(count: int = 2, own: Sequence[str] = (), where: str = "/tmp", size: str = "512m") -> Iterator[Hosts]:
    """COUNT hosts with file systems of SIZE, and the front-end's files in WHERE; skips where there can be none."""
    need_hosts()
    work = tempfile.mkdtemp(prefix="m", dir=where)  # short: names of sockets are limited
    made = Hosts(work, count, own, size)
    yield made
    left = made.close()
    assert not left, f"did not end by itself: {left}"


@pytest.fixture(params=["openssh", "paramiko"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to reach hosts, chosen for this process."""
    name = str(request.param)
    if name == "paramiko":
        pytest.importorskip("paramiko", reason="the Python package paramiko is not installed")
    monkeypatch.setenv("MADRIGAL_TRANSPORT", name)
    return name


@pytest.fixture
def env(hosts: Hosts, transport: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What actions need to reach `hosts` over `transport`; the library in this process has it too."""
    variables = {**hosts.env, "MADRIGAL_TRANSPORT": transport}
    for name, value in variables.items():
        if name not in ("PATH", "TMPDIR"):
            monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def cold(hosts: Hosts, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """As `env`, with no connection to any host yet."""
    from madrigal.host import openssh

    run_dir = tempfile.mkdtemp(prefix="run", dir=hosts.work)
    monkeypatch.setenv("MADRIGAL_RUN_DIR", run_dir)
    yield {**env, "MADRIGAL_RUN_DIR": run_dir}
    with _environment(MADRIGAL_RUN_DIR=run_dir):
        openssh.disconnect()


@pytest.fixture
def datastore(hosts: Hosts) -> Iterator[str]:
    """A directory for this test alone, which does not exist yet on any machine.  No worker may be left at its end."""
    path = f"{hosts.datastores}/{next(_numbers)}"
    yield path
    for name in hosts.names:
        assert eventually(lambda name=name: not hosts.workers(name)), f"workers are left on {name}"  # type: ignore[misc]
        shutil.rmtree(hosts.on(name, path), ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


# -- actions ---------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What an action left."""

    status: int
    stdout: str
    stderr: str


def start_action(action: str, *arguments: str, env: Mapping[str, str], **how: Any) -> subprocess.Popen[bytes]:
    """Start the executable ACTION (`tm/ssh/clone`) with this interpreter, where and as a front-end does."""
    cwd = f"{env['ONE_LOCATION']}/var" if "ONE_LOCATION" in env else "/"
    return subprocess.Popen(
        [sys.executable, f"{TREE}/{action}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(env),
        cwd=cwd,
        umask=0o022,
        start_new_session=True,
        **how,
    )


def run_action(
    action: str, *arguments: str, env: Mapping[str, str], input: bytes = b"", timeout: float = 120, **how: Any
) -> Done:
    """Run the executable ACTION to its end; INPUT is its stdin (a datastore driver's dump)."""
    with start_action(action, *arguments, env=env, **how) as process:
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Done(process.returncode, stdout.decode(), stderr.decode())


def check_stderr(done: Done, action: str, marks: bool = False) -> str:
    """Assert that DONE has said what it may (docs/contract.md, "What a driver says"); returns the message, "" if none.

    On success all lines have the tag of ACTION; on failure exactly one more follows, with MARKS around it in 3.4.
    """
    name = os.path.basename(action)
    assert done.stderr == "" or done.stderr.endswith("\n"), f"no newline at the end: {done.stderr!r}"
    lines = done.stderr.splitlines()
    plain = [line for line in lines if not ((tag := _LOG.match(line)) and tag["name"] == name)]
    if done.status == 0:
        assert not plain, f"untagged lines on success: {plain}"
        return ""
    assert "Traceback" not in done.stderr, done.stderr
    assert not done.stdout, f"an answer on failure: {done.stdout!r}"
    if marks:
        assert (plain[:1], plain[2:]) == (_MARKS[:1], _MARKS[1:]), f"expected one message between marks: {done.stderr}"
        plain = plain[1:2]
        lines = lines[:-1]
    assert len(plain) == 1 and lines[-1] == plain[0], f"expected one untagged line, the last: {done.stderr}"
    return plain[0]


# -- web servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def web() -> Iterator[servers.Web]:
    server = servers.Web()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate for 127.0.0.1 in one file."""
    place = tmp_path_factory.mktemp("tls")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files: list[str | Path] = ["-keyout", place / "key", "-out", place / "certificate"]
    subprocess.run([*argv, *names, *files], check=True, capture_output=True, timeout=60)
    (place / "both").write_bytes((place / "key").read_bytes() + (place / "certificate").read_bytes())
    return place / "both"


@pytest.fixture
def secure(certificate: Path) -> Iterator[servers.Web]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = servers.Web(context)
    yield server
    server.stop()


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), servers.Proxy)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
