"""Broken copies of our drivers, which the conformance kit has to notice: every action, in every way of breakages.py.

With MUTATIONS=DIRECTORY in the environment what noticed each of them is written there, a file for each driver and form;
`tests/mutations.py DIRECTORY/*.json --markdown FILE` makes a table of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from breakages import ALL, does_nothing
from conftest import TREE, need_hosts
from mutations import Copy, Row

from madrigal import drivers
from madrigal.conformance.plugin import known_actions
from madrigal.conformance.subject import FORMS, of

OURS = [driver.path for driver in drivers.load(str(TREE))]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the conformance kit's machines need root so far")


@pytest.fixture(scope="module", autouse=True)
def rig() -> None:
    need_hosts()


def tried(work: Path, driver: str, form: str, *words: str) -> list[Row]:
    """What became of broken copies of DRIVER in FORM, none of which may be left unnoticed."""
    file = Path(os.environ.get("MUTATIONS") or work, f"{driver.replace('/', '-')}-{form}.json").absolute()
    argv = [sys.executable, f"{TREE}/tests/mutations.py", driver, "--form", form, "--json", str(file), *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3600)
    assert file.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    rows = [Row(**row) for row in json.loads(file.read_text())]
    assert not (left := [str(row) for row in rows if row.survives]), "\n".join(left)
    assert done.returncode == 0, done.stderr[-3000:]
    kind = driver.partition("/")[0]
    assert {row.action for row in rows if row.by} == set(known_actions(of(kind, str(TREE / driver), form)))
    return rows


@pytest.mark.long
@pytest.mark.parametrize("driver", OURS)
def test_each_action_broken_in_one_way(driver: str, tmp_path: Path) -> None:
    """It does nothing and says that all is well, or, where that is right, says more than it may."""
    tried(tmp_path, driver, "current", "--one")


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("driver", OURS)
def test_each_action_broken_in_every_way(driver: str, form: str, tmp_path: Path) -> None:
    rows = tried(tmp_path, driver, form)
    assert {row.breakage for row in rows} == set(ALL)


@pytest.mark.long
def test_the_command_says_so_too(tmp_path: Path) -> None:
    """`madrigal check` ends with 1 and names the action, the scene and how to do the same."""
    copy = Copy(tmp_path, "tm/ssh")
    words: list[Any] = [sys.executable, "-m", "madrigal", "check", "--remotes", tmp_path, "--tm", "ssh"]
    words += ["--prepare-with", TREE, "--contract", "current", "-k", "content and resize"]
    env = {**os.environ, "PYTHONPATH": f"{TREE}/lib"}
    with copy.broken("resize", does_nothing(of("tm", str(TREE / "tm/ssh"), "current"), "resize")):
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 1 and "tm/ssh[current] resize raw: content" in done.stdout, done.stdout + done.stderr
    assert f"{tmp_path}/tm/ssh/resize" in done.stdout
