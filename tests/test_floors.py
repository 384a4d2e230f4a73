"""An import never points up, and what runs on hosts or in a hurry imports only what it may."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TREE

from madrigal import backup, tm
from madrigal.host.program import HOST_PART
from madrigal.source.scheme.ssh import PARTS as SSH_PART

LIB = TREE / "lib" / "madrigal"

# Floor of a module or package: docs/architecture.md.  The longest name that fits counts.
FLOORS = {
    "__init__": 0,
    **dict.fromkeys(("errors", "messages", "location", "dump", "config", "defaults", "deadline", "scratch"), 0),
    **dict.fromkeys(("interpreter", "command", "onhost"), 0),
    **dict.fromkeys(("host", "frontend", "author", "running", "leftovers"), 1),
    **dict.fromkeys(("transfer", "disks", "snapshots", "iso", "inspector", "source", "storage"), 2),
    **dict.fromkeys(("migration", "monitoring"), 2),
    **dict.fromkeys(("action", "tm", "datastore", "backup", "nfs"), 3),
    **dict.fromkeys(("cli", "conformance", "embedded", "drivers", "__main__"), 4),
}
STANDARD = sys.stdlib_module_names
OTHERS = {
    "lxml": {"embedded", "conformance"},
    "click": {"cli"},
    "paramiko": {"host.paramiko_connection"},
}
OTHERS["pytest"] = {"conformance"}
OTHERS["cryptography"] = {"monitoring"}
"""Packages that are not Python's, and where they may be imported."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(LIB).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(LIB.rglob("*.py"))
    }


MODULES = modules()


def floor(module: str) -> int:
    while module not in FLOORS:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} has no floor: say in this test and in docs/architecture.md where it belongs"
    return FLOORS[module]


def imports(source: str) -> Iterator[str]:
    """Full names of what SOURCE imports anywhere, but not for type checkers alone."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def ours(name: str) -> str:
    """The module of ours that the import of NAME loads."""
    parts = name.removeprefix("madrigal").removeprefix(".").split(".")
    for length in range(len(parts), 0, -1):
        if (found := ".".join(parts[:length])) in MODULES:
            return found
    return "__init__"


def faults(module: str, source: str) -> list[str]:
    found = []
    for name in imports(source):
        top = name.partition(".")[0]
        if top == "madrigal":
            if floor(ours(name)) > floor(module):
                found.append(f"{module} (floor {floor(module)}) imports {ours(name)} (floor {floor(ours(name))})")
        elif top in OTHERS:
            if not any(f"{module}.".startswith(f"{part}.") for part in OTHERS[top]):
                found.append(f"{module} imports {top}")
        elif top not in STANDARD:
            found.append(f"{module} imports {top}, which is not declared")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_do_not_point_up(module: str) -> None:
    assert not faults(module, MODULES[module].read_text())


def test_an_import_that_points_up_is_seen() -> None:
    assert faults("location", "def f():\n    from madrigal.host import Host\n")
    assert faults("host", "import madrigal.transfer.copy") and faults("tm", "from madrigal import cli")
    assert (
        faults("transfer", "import paramiko") and faults("tm", "from click import echo") and faults("tm", "import yaml")
    )
    assert not faults("tm", "if TYPE_CHECKING:\n    from madrigal.cli import main\nfrom madrigal import transfer\n")


RECIPES = [
    path
    for kind in ("tm", "datastore")
    for path in sorted((TREE / kind).rglob("*"))
    if path.is_file() and not path.is_symlink() and path.suffix != ".toml"
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(TREE)))
def test_recipe(path: Path) -> None:
    """A docstring, imports, one function, its call: no more than that, and nothing that the library is for."""
    text = path.read_text()
    tree = ast.parse(text)
    assert text.startswith("#!/usr/bin/env python3\n") and path.stat().st_mode & 0o111 == 0o111
    assert 5 <= text.count("\n") <= 40
    assert ast.get_docstring(tree)
    for name in imports(text):
        assert name == "sys" or name.startswith("madrigal."), f"it imports {name}"
    forbidden = {ast.Try: "catches exceptions", ast.While: "waits"}
    for node in ast.walk(tree):
        assert type(node) not in forbidden, forbidden.get(type(node))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in (("sys", "argv"), ("sys", "exit"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == 1 and len(functions[0].decorator_list) == 1
    last = tree.body[-1]
    assert isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and not last.value.args


def test_every_driver_has_the_actions_of_both_forms() -> None:
    """Of a driver that is for images alone, those that a system datastore needs are missing."""
    for driver in ("ssh", "local", "shared", "qcow2", "dummy", "dev"):
        of_system = {"context", "mkimage", "mkswap"} if driver == "dev" else set()
        found = {path.name for path in (TREE / "tm" / driver).iterdir()}
        monitoring = {"ssh": {"monitor_ds"}, "local": {"monitor_ds"}, "dev": set()}.get(driver, {"monitor"})
        on_ssh = {f"{action}.ssh" for action in ("clone", "ln", "mv", "mvds", "cpds") if driver in ("shared", "qcow2")}
        backups = {"dummy": {"restore"}, "dev": set()}.get(driver, set(backup.ACTIONS))
        wanted = on_ssh | set(tm.ACTIONS) - of_system | monitoring | backups | {"driver.toml"}
        assert found == wanted, driver
    datastore = {"cp", "mkfs", "rm", "clone", "stat", "monitor", "export"}
    datastore |= {"snap_delete", "snap_revert", "snap_flatten"}
    for driver in ("fs", "dev", "dummy"):
        found = {path.name for path in (TREE / "datastore" / driver).iterdir()}
        assert found - {"restore"} == datastore | {"driver.toml"}


# -- what runs on hosts ----------------------------------------------------------------------------------------

ALONE = ("onhost.monitor_ds",)
"""What a front-end's probe starts on hosts, where nothing else of ours is."""

NEWER = {
    **dict.fromkeys(("removeprefix", "removesuffix"), "str, 3.9"),
    **dict.fromkeys(("fromisoformat", "isascii"), "3.7"),
    **dict.fromkeys(
        ("cached_property", "nullcontext", "copy_file_range", "pidfd_open", "waitstatus_to_exitcode"), "3.7"
    ),
}
NEWER_KEYWORDS = {
    "capture_output": "3.7",
    "text": "3.7",
    "missing_ok": "3.8",
    "dirs_exist_ok": "3.8",
    "unlink_ok": "3.8",
}


def too_new(source: str) -> list[str]:
    """What of SOURCE a Python 3.6 does not know."""
    try:
        tree = ast.parse(source, feature_version=(3, 6))
    except SyntaxError as error:
        return [str(error)]
    found = []
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            guarded.update(id(child) for child in ast.walk(node))
        if isinstance(node, ast.NamedExpr | ast.Match):
            found.append(f"line {node.lineno}: syntax")
        if isinstance(node, ast.arguments) and node.posonlyargs:
            found.append("positional-only parameters")
        if isinstance(node, ast.ImportFrom) and (node.module, node.names[0].name) == ("__future__", "annotations"):
            found.append("from __future__ import annotations")
        if isinstance(node, ast.Attribute) and node.attr in NEWER and id(node) not in guarded:
            found.append(f"line {node.lineno}: {node.attr}, {NEWER[node.attr]}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            value = node.func.value
            if isinstance(value, ast.Name) and value.id in ("subprocess", "shutil", "os"):
                found += [f"line {node.lineno}: {k.arg}" for k in node.keywords if k.arg in NEWER_KEYWORDS]
    return found


@pytest.mark.parametrize("name", [*HOST_PART, *SSH_PART, "__init__", "interpreter", "onhost"])
def test_host_part_is_python_36(name: str) -> None:
    """Parsed as 3.6; tests/test_hostpart.py runs it by one where there is one."""
    path = MODULES[name]
    assert not too_new(path.read_text())
    if name in ALONE:
        assert {imported.partition(".")[0] for imported in imports(path.read_text())} <= set(STANDARD)
        assert path.read_text().startswith("#!/usr/bin/env python3\n") and path.stat().st_mode & 0o111 == 0o111
    if name in (*HOST_PART, *SSH_PART):
        for imported in imports(path.read_text()):
            top = imported.partition(".")[0]
            assert top in STANDARD or ours(imported) in (*HOST_PART, *SSH_PART, "onhost"), f"{name} imports {imported}"


def test_what_is_too_new_is_seen() -> None:
    for source in (
        "if (x := 1): pass",
        "def f(a, /): pass",
        "from __future__ import annotations",
        "'x'.removeprefix('y')",
        "import subprocess\nsubprocess.run([], capture_output=True)",
        "match x:\n    case 1: pass",
        "x: list[int] = f'{x=}'\nasync def f():\n    return [x async for x in y if (await z)]\ndef g(*, a, /): pass",
    ):
        assert too_new(source), source


def test_the_package_s_first_lines_can_be_read_by_any_python() -> None:
    """They send an old one away, so it has to read them; so does the locator of the wheel."""
    assert not too_new((TREE / "packaging/madrigal.py").read_text())
