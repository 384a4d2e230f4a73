"""Linters and types over everything that is executable or imported, found by what it is and not by its ending.

A planted error in a recipe makes them fail, which is shown too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TREE

SKIPPED = (".git", ".venv", "build", "dist", "__pycache__")
_BATS = "SC2016,SC2030,SC2031,SC2034,SC2154,SC2164,SC1003,SC2011,SC2116"
"""What shellcheck sees in bats files because tests are functions in subshells, and drivers texts in single quotes."""


def sources(tree: Path) -> tuple[list[str], list[str]]:
    """(Python files, shell files) of TREE by ending or shebang, links left out."""
    python, shell = [], []
    for base, names, files in os.walk(tree):
        names[:] = [n for n in names if n not in SKIPPED and not n.endswith((".egg-info", "_cache"))]
        for path in (f"{base}/{name}" for name in sorted(files)):
            if os.path.islink(path):
                continue
            with open(path, "rb") as file:
                shebang = file.readline(80) if not path.endswith((".py", ".sh", ".bats", ".bash")) else b""
            if path.endswith(".py") or re.match(rb"#!.*\bpython3?\b", shebang):
                python.append(path)
            elif path.endswith((".sh", ".bats", ".bash")) or re.match(rb"#!.*\b(ba)?sh\b", shebang):
                shell.append(path)
    return python, shell


PYTHON, SHELL = sources(TREE)


def run(*argv: str, cwd: Path = TREE) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MYPYPATH": f"{cwd}/lib:{TREE}/tests:{TREE}/benchmarks", "NO_COLOR": "1"}
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env)


def tool(name: str) -> str:
    """The path of a linter, beside this interpreter or in PATH."""
    path = shutil.which(name, path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if not path:
        pytest.skip(f"{name} is not installed: make test brings it if pip can")
    return path


def recipes(python: list[str]) -> list[str]:
    return [path for path in python if not path.endswith(".py")]


def mypy(paths: list[str], cwd: Path = TREE) -> subprocess.CompletedProcess[str]:
    if not importlib.util.find_spec("lxml-stubs"):
        pytest.skip("lxml-stubs is not installed: make test brings it if pip can")
    return run(tool("mypy"), *paths, cwd=cwd)


def test_every_executable_is_looked_at() -> None:
    found = {os.path.relpath(path, TREE) for path in PYTHON}
    for action in ("tm/ssh/clone", "tm/common/delete", "datastore/fs/cp", "tests/demo", "benchmarks/run"):
        assert action in found
    executables = {
        str(path.relative_to(TREE))
        for part in ("tm", "datastore")
        for path in (TREE / part).rglob("*")
        if path.is_file() and not path.is_symlink() and os.access(path, os.X_OK)
    }
    assert executables <= found
    assert {"scripts_common.sh", ".ci/run", "lib/madrigal/conformance/rig/hosts-up"} <= {
        os.path.relpath(path, TREE) for path in SHELL
    }


def test_ruff() -> None:
    done = run(tool("ruff"), "check", "--quiet", *PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format() -> None:
    done = run(tool("ruff"), "format", "--check", *PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy() -> None:
    # Executables of one name would be one module to mypy.
    modules = [path for path in PYTHON if path.endswith(".py") and "/packaging/" not in path]
    done = mypy(modules)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_of_executables(tmp_path: Path) -> None:
    done = mypy(renamed(recipes(PYTHON), tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def renamed(paths: list[str], work: Path) -> list[str]:
    """Copies of executables under names that are modules, all different."""
    names = []
    for path in paths:
        name = work / (re.sub(r"\W", "_", os.path.relpath(path, TREE)) + ".py")
        shutil.copyfile(path, name)
        names.append(str(name))
    return names


def test_shellcheck() -> None:
    drivers = [path for path in SHELL if "/tests/bats/" not in path]
    done = run(tool("shellcheck"), "--external-sources", *drivers)
    assert done.returncode == 0, done.stdout
    done = run(tool("shellcheck"), "--external-sources", f"--exclude={_BATS}", *(set(SHELL) - set(drivers)))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("planted", "by"),
    [("    unknown_name\n", "ruff"), ("    transfer.copy(disk)\n", "mypy")],
    ids=["a name that is not there", "an argument that is missing"],
)
def test_planted_error_is_seen(planted: str, by: str, tmp_path: Path) -> None:
    """In a recipe, which has no ending that tools know."""
    recipe = tmp_path / "tree" / "tm" / "ssh" / "clone"
    recipe.parent.mkdir(parents=True)
    text = (TREE / "tm" / "ssh" / "clone").read_text()
    recipe.write_text(text.replace("    transfer.copy(", planted + "    transfer.copy(", 1))
    assert recipe.read_text() != text
    shutil.copy(TREE / "pyproject.toml", tmp_path / "tree")
    python, _ = sources(tmp_path / "tree")
    assert python == [str(recipe)]
    if by == "ruff":
        done = run(tool("ruff"), "check", *python, cwd=recipe.parents[2])
        assert "F821" in done.stdout
    else:
        done = mypy(renamed(python, tmp_path))
        assert "[call-arg]" in done.stdout
    assert done.returncode == 1


def test_planted_error_in_shell_is_seen(tmp_path: Path) -> None:
    driver = tmp_path / "clone"
    driver.write_text("#!/bin/bash\nrm -rf $1\n")
    _, shell = sources(tmp_path)
    assert run(tool("shellcheck"), *shell).returncode == 1
