"""What is sent to hosts is for Python 3.6: read as such, and run by one where there is one; by the newest found, too.

MADRIGAL_REQUIRE_ALL=1 does not ask for an interpreter that few machines have: without one a warning says so.
"""

from __future__ import annotations

import ast
import glob
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TREE, Hosts, check_stderr, eventually, run_action

from madrigal import transfer
from madrigal.errors import MadrigalError
from madrigal.host import Host, openssh, program, remote
from madrigal.host.local import LocalSession
from madrigal.location import Location
from madrigal.transfer import carry, plan

MIB = 1 << 20
LIB = TREE / "lib" / "madrigal"
FILES = [LIB / f"{name.replace('.', '/')}.py" for name in (*program.HOST_PART, "onhost.relay", "onhost.__init__")]
READ_BY_ANY = [LIB / "__init__.py", LIB / "interpreter.py", TREE / "packaging" / "madrigal.py"]
"""What an old Python on the front-end has to read to be told that it is too old."""


# -- read ------------------------------------------------------------------------------------------------------

NEWER = {
    "contextlib": "AsyncExitStack aclosing asynccontextmanager chdir nullcontext",
    "datetime": "UTC",
    "errno": "ENOTCAPABLE EQFULL",
    "functools": "cache cached_property singledispatchmethod",
    "io": "text_encoding",
    "itertools": "batched pairwise",
    "json": "JSONDecodeError.colno",
    "math": "cbrt comb dist exp2 isqrt lcm nextafter perm prod remainder sumprod ulp",
    "os": """
        EFD_CLOEXEC POSIX_SPAWN_OPEN add_dll_directory copy_file_range eventfd memfd_create pidfd_open posix_spawn
        posix_spawnp preadv process_cpu_count pwritev register_at_fork splice unshare waitstatus_to_exitcode
    """,
    "select": "EPOLLWAKEUP",
    "shlex": "join",
    "signal": "pidfd_send_signal raise_signal strsignal valid_signals",
    "socket": "create_server has_dualstack_ipv6 recv_fds send_fds",
    "sys": "orig_argv stdlib_module_names unraisablehook",
    "time": "clock_gettime_ns clock_settime_ns monotonic_ns perf_counter_ns process_time_ns thread_time time_ns",
    "types": "GenericAlias NoneType UnionType",
    "typing": "Final Literal Protocol Self TypedDict runtime_checkable",
}
"""What came to modules of the standard library after 3.6."""

NEWER_MODULES = {
    "contextvars",
    "dataclasses",
    "graphlib",
    "importlib.metadata",
    "importlib.resources",
    "tomllib",
    "zoneinfo",
}
NEWER_METHODS = {"removeprefix", "removesuffix", "isascii", "fromisoformat", "is_relative_to", "readlink", "bit_count"}
_RUN = {"capture_output", "text", "umask", "user", "group", "pipesize", "process_group"}
NEWER_KEYWORDS = {
    "run": _RUN,
    "Popen": _RUN,
    "check_output": _RUN,
    "check_call": _RUN,
    "call": _RUN,
    "copytree": {"dirs_exist_ok"},
    "rmtree": {"dir_fd", "onexc"},
    "unlink": {"missing_ok"},
}


def too_new(source: str) -> list[str]:
    """What of SOURCE a Python 3.6 has not, as far as can be read."""
    try:
        tree = ast.parse(source, feature_version=(3, 6))
    except SyntaxError as error:
        return [str(error)]
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names})
    return [f"line {node.lineno}: {text}" for node in ast.walk(tree) if (text := _of(node, names))]  # type: ignore[attr-defined]


def _of(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.NamedExpr | ast.Match):
        return "syntax"
    if isinstance(node, ast.FunctionDef | ast.Lambda) and node.args.posonlyargs:
        return "positional-only parameters"
    if isinstance(node, ast.JoinedStr):
        for text, value in zip(node.values, node.values[1:], strict=False):
            if (
                isinstance(text, ast.Constant)
                and isinstance(value, ast.FormattedValue)
                and value.conversion == ord("r")
                and str(text.value).rstrip().endswith(f"{ast.unparse(value.value)}=")
            ):
                return "= in an f-string"
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.BitOr):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
        if any(isinstance(side, ast.Dict | ast.DictComp) for side in sides):
            return "a union of dicts"
    if isinstance(node, ast.ImportFrom):
        if node.module == "__future__" and node.names[0].name == "annotations":
            return "from __future__ import annotations"
        new = [alias.name for alias in node.names if alias.name in NEWER.get(node.module or "", "").split()]
        if new or node.module in NEWER_MODULES:
            return f"from {node.module} import {' '.join(new)}"
    if isinstance(node, ast.Import):
        return " ".join(alias.name for alias in node.names if alias.name in NEWER_MODULES)
    if isinstance(node, ast.Attribute):
        module = names.get(node.value.id, "") if isinstance(node.value, ast.Name) else ""
        if node.attr in NEWER.get(module, "").split() or (not module and node.attr in NEWER_METHODS):
            return f"{module}.{node.attr}"
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return " ".join(f"{word.arg}=" for word in node.keywords if word.arg in NEWER_KEYWORDS.get(called, ()))
    return ""


@pytest.mark.parametrize("path", [*FILES, *READ_BY_ANY], ids=lambda path: str(path.relative_to(TREE)))
def test_it_reads_as_36(path: Path) -> None:
    source = path.read_text()
    # what is for type checkers alone is not run
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            lines = source.splitlines()
            end = node.orelse[0].lineno - 2 if node.orelse else node.end_lineno
            lines[node.lineno : end] = ["    pass"] + [""] * ((end or 0) - node.lineno - 1)
            source = "\n".join(lines)
    assert not too_new(source)


@pytest.mark.parametrize(
    "source",
    [
        "if (x := 1): pass",
        "def f(a, /): pass",
        "f'{x.y=}'",
        "match x:\n    case 1: pass",
        "x = {} | y",
        "x |= {'a': 1}",
        "from __future__ import annotations",
        "import functools as f\n@f.cache\ndef g(): pass",
        "from functools import cached_property",
        "import dataclasses",
        "'x'.removeprefix('y')",
        "import subprocess\nsubprocess.run([], capture_output=True)",
        "from subprocess import Popen\nPopen([], text=True)",
        "import shlex\nshlex.join([])",
        "import math\nmath.prod([])",
        "import os\nos.memfd_create('x')",
        "import time\ndef f():\n    return time.time_ns()",
        "def f():\n    return 1_000\nasync def g():\n    await h(*[await x async for x in y]) if (z := 1) else 0",
    ],
)
def test_what_is_too_new_is_seen(source: str) -> None:
    assert too_new(source)


def test_what_is_old_enough_is_not() -> None:
    source = (
        "import os, subprocess\nf'{x}={y!r}'\nx = a | b\ngetattr(os, 'memfd_create')\nsubprocess.run([], check=True)\n"
    )
    assert not too_new(source)


# -- run -------------------------------------------------------------------------------------------------------


def interpreters() -> dict[str, str]:
    """The oldest Python that hosts may have and the newest that is found: path by version."""
    found = {}
    for directory in [*os.environ["PATH"].split(":"), *glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin"))]:
        for path in glob.glob(f"{directory}/python3.[0-9]*"):
            version = re.fullmatch(r"python3\.([0-9]+)", os.path.basename(path))
            if version and os.access(path, os.X_OK) and _runs(path, int(version[1])):
                found[int(version[1])] = os.path.realpath(path)
    return {f"3.{minor}": found[minor] for minor in sorted(found) if minor == 6 or minor == max(found)}


def _runs(path: str, minor: int) -> bool:
    """Whether it is what it is called: pyenv has scripts of these names that run nothing."""
    done = subprocess.run([path, "-I", "-c", "import sys; print(sys.version_info[1])"], capture_output=True)
    return done.stdout.decode().strip() == str(minor)


FOUND = interpreters()


def _parsed_only() -> None:
    text = "parsed as 3.6 only: no python3.6 is in PATH or ~/.pyenv to run the host part"
    if os.environ.get("MADRIGAL_REQUIRE_ALL", "") != "1":
        pytest.skip(text)
    print(text)
    warnings.warn(text, stacklevel=2)


def test_there_is_a_36_to_run_it(record_property: Callable[[str, object], None]) -> None:
    """Says what the result of this module is worth."""
    record_property("host part", "run by 3.6" if "3.6" in FOUND else "parsed as 3.6 only")
    if "3.6" not in FOUND:
        _parsed_only()


@pytest.fixture(params=FOUND or ["none"])
def python(request: pytest.FixtureRequest) -> str:
    if request.param not in FOUND:
        pytest.skip("no Python that could be a host's is found")
    return FOUND[str(request.param)]


@pytest.fixture
def old(hosts: Hosts, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """One host more, `old`, whose python3 is PYTHON; tmp_path/started has a line for each start of it."""
    bin, home = tmp_path / "bin", tmp_path / "home"  # a home without a .bashrc that may set PATH
    bin.mkdir()
    home.mkdir()
    tmp_path.chmod(0o755)
    (bin / "python3").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/started\nexec {python} "$@"\n')
    (bin / "python3").chmod(0o755)
    hosts.add("old", sshd=f"SetEnv HOME={home} PATH={bin}:/usr/bin:/bin:/usr/sbin:/sbin")
    for name, value in hosts.env.items():
        if name not in ("PATH", "TMPDIR"):
            monkeypatch.setenv(name, value)
    # the connections of its own: a host of this name may have been another a moment ago
    monkeypatch.setenv("MADRIGAL_RUN_DIR", tempfile.mkdtemp(prefix="run", dir=hosts.work))
    yield hosts
    openssh.disconnect()
    hosts.end("old")


def starts(tmp_path: Path) -> int:
    """How often the host has started its Python, as remote.py wants it."""
    lines = (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []
    assert all(line.startswith("-I -S -X utf8 -c ") for line in lines)
    return len(lines)


def test_requests(old: Hosts, datastore: str, tmp_path: Path) -> None:
    """A part, a copy, a move, file systems and the end of it, asked of a worker one by one."""
    (tmp_path / "image").write_bytes(b"begin" + bytes(MIB) + os.urandom(3 * MIB) + b"end")
    os.truncate(tmp_path / "image", 8 * MIB)
    content = (tmp_path / "image").read_bytes()
    odd = "é '$(id)'"
    one, two, seen = f"{datastore}/17", f"{datastore}/18/{odd}", old.on("old", datastore)
    with Host("old").session() as session:
        session.call("hold", path=one, make="all")
        frames = LocalSession().send(str(tmp_path / "image"))
        session.receive(frames, path=f"{one}/disk.0", grow=["raw", 9 * MIB])
        assert session.call("copy", source=f"{one}/disk.0", path=f"{one}/disk.1")["way"]
        session.call("make", path=f"{one}/disk.2", format="raw", size=MIB, fs="swap")
        session.call("make", path=f"{one}/disk.3", format="qcow2", size=8 * MIB, fs="ext4")
        session.call("link", target="disk.0", path=f"{one}/{odd}")
        measured = session.call("measure", path=f"{one}/{odd}")
        assert measured["size"] == 9 * MIB and measured["allocated"] < 5 * MIB
    for name in ("disk.0", "disk.1", odd):
        assert (seen / "17" / name).read_bytes() == content + bytes(MIB)
    assert b"SWAPSPACE2" in (seen / "17/disk.2").read_bytes()
    assert (seen / "17/disk.3").read_bytes()[:4] == b"QFI\xfb"
    with Host("old").session() as session:
        assert session.call("move", source=one, path=two)["way"] == "rename"
    assert not (seen / "17").exists() and len(list((seen / "18" / odd).iterdir())) == 5
    with Host("old").session(bulk=True) as session, LocalSession() as here:
        here.call("hold", path=str(tmp_path / "brought"), make="all")
        here.receive(session.send(two), path=str(tmp_path / "brought" / "vm"))
    assert (tmp_path / "brought/vm/disk.1").read_bytes() == content + bytes(MIB)
    assert starts(tmp_path) == 3


def test_what_fails_is_taken_back(old: Hosts, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    path = f"{datastore}/17/disk.0"
    parts: list[str] = []
    with pytest.raises(ZeroDivisionError), Host("old").session() as session:
        session.call("hold", path=f"{datastore}/17", make="all")

        def frames() -> Iterator[tuple[bytes, int, bytes | memoryview]]:
            for frame in LocalSession().send(str(tmp_path / "image")):
                yield frame
                if frame[0] == b"D":
                    parts.extend(found.name for found in _soon(old.on("old", f"{datastore}/17")))
                    raise ZeroDivisionError

        session.receive(frames(), path=path)
    assert [name for name in parts if name.endswith(".part")]
    assert not old.on("old", datastore).exists()
    with pytest.raises(MadrigalError, match=r"old: .*does not exist"), Host("old").session() as session:
        session.call("measure", path=path)


def _soon(directory: Path) -> list[Path]:
    eventually(lambda: list(directory.glob(".*.part")), 5)
    return list(directory.glob(".*.part"))


def test_actions(old: Hosts, datastore: str, tmp_path: Path) -> None:
    """3.4's, because there is nobody to ask; mv has the host as its target and as its source."""
    env = {**old.env, "MADRIGAL_RUN_DIR": os.environ["MADRIGAL_RUN_DIR"]}
    image, vm = tmp_path / "image", f"{datastore}/17"
    image.write_bytes(os.urandom(2 * MIB))
    seen = old.on("old", vm)

    def act(action: str, *arguments: str) -> None:
        before = starts(tmp_path)
        done = run_action(action, *arguments, env=env)
        assert done.status == 0, done.stderr
        check_stderr(done, action)
        assert starts(tmp_path) > before, "it was not the worker of this Python"

    act("tm/ssh/clone", f"fe:{image}", f"old:{vm}/disk.0")
    act("tm/ssh/mkswap", "1", f"old:{vm}/disk.1")
    act("tm/ssh/mkimage", "8", "ext4", f"old:{vm}/disk.2")
    act("tm/ssh/context", str(image), f"old:{vm}/disk.3")
    (old.on("old") / "1").mkdir()
    (old.on("old") / "1" / "x").touch()
    act("tm/shared/ln", f"fe:{old.datastores}/1/x", f"old:{vm}/disk.4")
    assert (seen / "disk.0").read_bytes() == image.read_bytes()
    assert (seen / "disk.2").read_bytes()[1080:1082] == b"\x53\xef"
    digest = (seen / "disk.2").read_bytes()
    act("tm/ssh/mv", f"old:{vm}", f"host01:{vm}")
    assert not seen.exists() and old.on("host01", f"{vm}/disk.2").read_bytes() == digest
    act("tm/ssh/mv", f"host01:{vm}", f"old:{vm}")
    assert (seen / "disk.2").read_bytes() == digest and os.readlink(seen / "disk.4")
    os.unlink(seen / "disk.4")
    image.write_bytes(b"")
    act("tm/ssh/mvds", f"old:{vm}/disk.2", f"fe:{image}")
    assert image.read_bytes() == digest
    act("tm/ssh/delete", f"old:{vm}")
    assert not seen.exists()


def test_data_go_from_host_to_host(
    old: Hosts, datastore: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Past the front-end, to this Python and from it."""
    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "connection", (0, ""))
    vm, content = f"{datastore}/17", os.urandom(5 * MIB)
    old.on("host01", vm).mkdir(parents=True)
    old.on("host01", f"{vm}/disk.0").write_bytes(content)
    for source, target in (("host01", "old"), ("old", "host01")):
        transfer.move(Location(source, vm), Location(target, vm))
        assert ", directly," in capfd.readouterr().err
        assert old.on(target, f"{vm}/disk.0").read_bytes() == content


def test_a_program_that_is_too_new_for_it_is_seen(
    old: Hosts, python: str, datastore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = b"match 1:\n    case 1: pass\n" if "3.6" in python else b"a program of the future\n"
    text = program.program().partition(b"\n")[2]
    monkeypatch.setattr(remote, "program", lambda: b"%d\n%s" % (len(text + plant), plant + text))
    with pytest.raises(MadrigalError, match="old"):
        Host("old").session().call("exists", path="/")


def test_an_action_leaves_an_old_python_for_a_fit_one(tmp_path: Path) -> None:
    python = FOUND.get("3.6", "")
    if not python:
        return _parsed_only()
    env = {"PATH": f"{os.path.dirname(python)}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    for action in ("tm/ssh/clone", "datastore/fs/cp"):
        done = subprocess.run([python, f"{TREE}/{action}", "--help"], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    env = {"PYTHONPATH": f"{TREE}/lib", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", "import madrigal"], capture_output=True, text=True, env=env)
    assert "ImportError: madrigal needs Python 3.11 or newer" in done.stderr
