"""The conformance kit on our drivers, and its parts; test_mutations has it on broken ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TREE, need_hosts

from madrigal import drivers, errors
from madrigal.conformance import broken, scan, watch
from madrigal.conformance.report import Report, Result
from madrigal.conformance.subject import of
from madrigal.conformance.world import World, unexpected

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the conformance kit's machines need root so far")

OURS = [driver.path for driver in drivers.load(str(TREE))]


@pytest.fixture(scope="module", autouse=True)
def rig() -> None:
    need_hosts()


def check(work: Path, *words: str, **env: str) -> tuple[int, list[dict[str, Any]], str]:
    """Status, results and the words of `madrigal check`."""
    found = work / "found.json"
    argv = [sys.executable, "-m", "madrigal", "check", "--json", str(found), *words]
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib"), **env}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=1800)
    results = json.loads(found.read_text())["results"] if found.exists() else []
    return done.returncode, results, done.stdout + done.stderr


# -- ours --------------------------------------------------------------------------------------------------------


@needs_root
def test_ours_hold(tmp_path: Path) -> None:
    """In both forms, in the quick profile; the full one is `make check-full`."""
    page, junit = tmp_path / "check.html", tmp_path / "check.xml"
    status, results, said = check(tmp_path, "-j", "2", "--html", str(page), "--junit", str(junit))
    assert status == 0, said
    assert {one["driver"].partition("[")[0] for one in results} == set(OURS)
    for driver in OURS:
        for form in ("3.4", "current"):
            held = {
                one["check"] for one in results if one["driver"] == f"{driver}[{form}]" and one["outcome"] == "passed"
            }
            assert {"answer", "words", "content", "leftovers", "bystanders", "secrets", "repeat"} <= held, (
                driver,
                form,
            )
    files = {one["check"] for one in results if one["driver"] == "tm/ssh[current]" and one["outcome"] == "passed"}
    assert {"kill", "failing_programs", "full_disk", "host_down", "same_object", "wrong_arguments"} <= files
    assert "tm/ssh[current]" in page.read_text() and "FAILED" not in page.read_text()
    assert junit.read_text().count("<testcase") == len(results)


# -- the page for authors ------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.long
def test_the_page_leads_to_a_driver_that_holds(tmp_path: Path) -> None:
    """docs/writing-a-driver.md, followed to the letter; only the last check is made shorter."""
    page = (TREE / "docs/writing-a-driver.md").read_text()
    section = page.partition("## From nothing to a driver that holds\n")[2].partition("\n### ")[0]
    recipes = re.findall(r"^`(tm/shelf/\w+)`:\n\n```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len(recipes) == 4 and len(commands) == 2
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/madrigal"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m madrigal "$@"\n')
    command.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(TREE / "lib"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def shell(script: str) -> subprocess.CompletedProcess[str]:
        argv = ["bash", "-eu", "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path)

    begun = shell(commands[0])
    assert begun.returncode == 1 and "clone is not written yet" in begun.stdout, begun.stdout + begun.stderr
    for name, text in recipes:
        (tmp_path / "drivers" / name).write_text(text)
    ended = shell(commands[1].rstrip() + ' -k "answer or content or leftovers or refuses"')
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_scaffold_is_a_driver(tmp_path: Path) -> None:
    def new(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "madrigal", "new", "driver", *words, "--in", str(tmp_path)]
        return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TREE / "lib")})

    assert new("mine", "--tm", "--datastore").returncode == 0
    for kind in ("tm", "datastore"):
        made = drivers.read(str(tmp_path), kind, "mine")
        assert made and set(made.actions) | {"unsupported"} > {"clone"}
        for action in of(kind, f"{tmp_path}/{kind}/mine", "current").actions:
            done = subprocess.run([f"{tmp_path}/{kind}/mine/{action}", "--help"], capture_output=True, text=True)
            assert done.returncode == 0, (action, done.stderr)
    again, wrong, neither = new("mine", "--tm"), new("../mine", "--tm"), new("other")
    assert (again.returncode, wrong.returncode, neither.returncode) == (31, 2, 2), (again, wrong, neither)


def test_every_status_is_in_the_contract() -> None:
    text = (TREE / "docs/contract.md").read_text()
    table = text.partition("## Exit statuses\n")[2].partition("\n## ")[0]
    for kind in errors.BY_NAME.values():
        assert f"| {kind.status} |" in table, kind


# -- its parts ---------------------------------------------------------------------------------------------------


@needs_root
def test_one_check_can_be_run_alone(tmp_path: Path) -> None:
    status, results, said = check(tmp_path, "--tm", "ssh", "--contract", "current", "-k", "answer and clone and kernel")
    assert status == 0, said
    assert [(one["check"], one["scene"]) for one in results] == [("answer", "clone of a kernel")]


@needs_root
def test_a_driver_that_is_not_there_is_named(tmp_path: Path) -> None:
    status, results, said = check(tmp_path, "--tm", "nosuch")
    assert (status, results) == (30, []) and "tm/nosuch" in said
    status, _, said = check(tmp_path, "--tm", "ssh", "-k", "nosuchcheck")
    assert status == 1, said  # nothing that holds is no success


def test_changes_between_two_worlds() -> None:
    before = World({"fe:/a": ["file", 0, 1, "x"], "fe:/b": ["file", 0, 1, "x"]}, {"fe:/": ""})
    after = World({"fe:/b": ["file", 0, 1, "y"], "host01:/c": ["link", 0, 0, "b"]}, {"fe:/": "", "fe:/m": ""})
    changes = before.changes(after)
    assert changes == ["removed fe:/a", "changed fe:/b", "made host01:/c", "mounted fe:/m"]
    assert unexpected(changes, ["fe:/b", "host01:*"]) == ["removed fe:/a", "mounted fe:/m"]
    assert not before.changes(before)


def test_files_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_text("x")
    (tmp_path / "l").symlink_to("d")
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped/f").write_text("x")
    first = scan.scan([str(tmp_path)], [f"{tmp_path}/skipped"])
    assert sorted(path.removeprefix(f"{tmp_path}/") for path in first) == ["d", "d/f", "l"]
    (tmp_path / "d/f").write_text("y")
    second = scan.scan([str(tmp_path)], [f"{tmp_path}/skipped"])
    assert {path for path in first if first[path] != second[path]} == {f"{tmp_path}/d/f"}


def test_links_lead_as_on_the_machine(tmp_path: Path) -> None:
    """A machine's files are seen below its root, where an absolute link of its does not lead to ours."""
    root = tmp_path / "root"
    (root / "ds/17").mkdir(parents=True)
    (root / "ds/image").write_text("there")
    (root / "ds/17/absolute").symlink_to("/ds/image")
    (root / "ds/17/relative").symlink_to("../image")
    (root / "ds/17/above").symlink_to("../../../../ds/image")
    (root / "ds/17/twice").symlink_to("absolute")
    (root / "ds/17/loop").symlink_to("loop")
    (root / "ds/17/ours").symlink_to(tmp_path / "ours")
    (tmp_path / "ours").write_text("ours")
    there = hashlib.sha256(b"there").hexdigest()
    for name in ("absolute", "relative", "above", "twice", "../image", "/absolute"):
        assert scan.content(f"/ds/17/{name}", str(root)) == there, name
    for name in ("loop", "ours", "none", "..", "absolute/x"):
        assert scan.content(f"/ds/17/{name}", str(root)) == "", name


def test_what_is_emptied_keeps_what_links_lead_to(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "ds/17/snap").mkdir(parents=True)
    (root / "ds/kept").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/file").touch()
    (root / "ds/link").symlink_to(tmp_path / "ours")
    (root / "ds/17/link").symlink_to(tmp_path / "ours")
    (root / "ds/file").touch()
    scan.empty(["/ds", "/none"], ["kept"], str(root))
    assert [path.name for path in (root / "ds").iterdir()] == ["kept"]
    assert (tmp_path / "ours/file").exists()


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
def test_a_secret_is_known_within_base64(before: str) -> None:
    import base64

    packed = base64.b64encode(f"{before}my-secret-word and more".encode()).decode()
    assert any(form in packed for form in watch.forms("my-secret-word"))
    assert not any(
        form in base64.b64encode(b"my-other-word and more").decode() for form in watch.forms("my-secret-word")
    )


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        (["python3", "/r/mkfs", "a secret-1 dump", "42"], False),
        (["nice", "-n", "19", "/r/mkfs", "a secret-1"], False),  # read while it was becoming another program
        (["nice", "-n", "19", "/r/mkfs", "secret-1"], True),
        (["sh", "-c", "a secret-1 dump"], True),
        (["sh", "a secret-1 dump", "42"], True),
    ],
)
def test_a_secret_may_only_be_where_the_front_end_has_put_it(
    monkeypatch: pytest.MonkeyPatch, words: list[str], is_told: bool
) -> None:
    here = SimpleNamespace(space=os.readlink("/proc/self/ns/pid"))
    machines = SimpleNamespace(machines={"fe": here}, is_own=True)
    monkeypatch.setattr(watch, "command_line", lambda pid: words)
    watching = watch.Watch(machines, ["secret-1"], ["/r/mkfs", "a secret-1 dump", "42"])  # type: ignore[arg-type]
    watching._examine(str(os.getpid()))
    assert bool(watching.found) == is_told


def test_broken_dumps_are_the_same_each_time() -> None:
    import base64

    right = base64.b64encode(b"<DS_DRIVER_ACTION_DATA><IMAGE><ID>1</ID><PATH>/x</PATH></IMAGE></DS_DRIVER_ACTION_DATA>")
    first, second = list(broken.dumps(right, 100, "seed")), list(broken.dumps(right, 100, "seed"))
    assert first == second and len({dump for _, dump in first}) > 50
    changed = broken.of_attribute(right, "IMAGE/TEMPLATE/MD5", "a'b")
    assert b"<TEMPLATE><MD5><![CDATA[a'b]]></MD5></TEMPLATE>" in base64.b64decode(changed)


def test_report() -> None:
    report = Report()
    assert not report.holds
    report.add(Result("tm/x[current]", "answer", "clone", "clone raw", "passed", "", "", 1.0, []))
    report.add(Result("tm/x[current]", "answer", "ln", "ln", "skipped", "cannot ln", "", 0.0, []))
    assert report.holds and "1 ok" in report.table() and "cannot ln" in report.table()
    report.add(Result("tm/x[current]", "answer", "mv", "mv", "failed", "<wrong>", "run 'it'", 1.0, []))
    assert not report.holds and "1/2 FAILED" in report.table()
    assert "&lt;wrong&gt;" in report.html() and 'failures="1"' in report.junit()
