"""The tests of scripts_common.sh, which are written in shell: every file of tests/bats."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

LONG = {"shellfs.bats": pytest.mark.long}
FILES = sorted((Path(__file__).parent / "bats").glob("*.bats"))


@pytest.mark.parametrize("path", [pytest.param(path, marks=LONG.get(path.name, ()), id=path.name) for path in FILES])
def test_bats(path: Path) -> None:
    if not shutil.which("bats"):
        pytest.skip("bats is not installed")
    done = subprocess.run(["bats", "--tap", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # bats ends well when a file is cut short, so the plan counts
    plan = re.match(r"1\.\.(\d+)$", done.stdout, re.MULTILINE)
    results = re.findall(r"^ok \d+ (.*)$", done.stdout, re.MULTILINE)
    assert plan and len(results) == int(plan[1]) > 0, done.stdout
    skipped = [result for result in results if " # skip" in result]
    if skipped:
        pytest.skip(f"{len(skipped)} of {len(results)}: {skipped[0]}")
