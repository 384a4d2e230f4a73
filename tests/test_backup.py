"""Backups, which this version refuses: each action that a front-end runs for them is there and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import PATH, TREE, Done, check_stderr, run_action
from dumps import vm_document

from madrigal import backup
from madrigal.errors import NotSupported

BACKUPS = [action for action in backup.ACTIONS if action != "restore"]
DRIVERS = ["ssh", "local", "shared", "qcow2"]
VM = 17


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "var").mkdir()
    return {"PATH": PATH, "HOME": str(tmp_path), "ONE_LOCATION": str(tmp_path)}


def arguments(action: str, *, deploy_id: str = "one-17", job: str = "5", slash: str = "") -> list[str]:
    directory = f"host01:/x//datastores/0/{VM}{slash}"  # no such host is asked
    if action == "restore":
        return [directory, str(VM), "8", "-1", "-1"]
    return [directory, "0:2", *([deploy_id] if deploy_id else []), job, str(VM), "100"]


def run(path: str, env: dict[str, str], *argv: str) -> Done:
    # as large as a front-end's can be: who writes it must not find the pipe closed
    told = vm_document(VM, {0: {"FORMAT": "raw"}, 2: {"TITLE": "x" * 500_000}})
    done = run_action(path, *argv, env=env, input=b"" if path.endswith("restore") else told)
    assert done.stdout == ""
    return done


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("action", backup.ACTIONS)
def test_backups_are_refused_in_a_sentence(driver: str, action: str, env: dict[str, str]) -> None:
    """Without them the front-end's user would read that some path does not exist."""
    for more in ({}, {"job": "-"}, {"slash": "/"}):
        done = run(f"tm/{driver}/{action}", env, *arguments(action, **more))
        said = check_stderr(done, action)
        assert done.status == NotSupported.status == 24
        what = "restored in place" if action == "restore" else "backed up"
        assert said.startswith(f"VM {VM} cannot be {what}: backups are not supported by the driver {driver} yet; ")
        assert ("save its disks as images" in said) == (action != "restore")


@pytest.mark.parametrize("action", BACKUPS)
def test_a_vm_without_deploy_id_has_one_argument_less(action: str, env: dict[str, str]) -> None:
    """The front-end splits its lines at blanks; a stock script takes each of the others for its neighbour then."""
    argv = arguments(action, deploy_id="")
    assert len(argv) == 5
    done = run(f"tm/shared/{action}", env, *argv)
    assert (done.status, f"VM {VM} cannot" in check_stderr(done, action)) == (24, True), done


def test_a_driver_by_another_name_says_that(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "remotes/tm").mkdir(parents=True)
    (tmp_path / "remotes/tm/mssh").symlink_to(TREE / "tm/ssh")
    done = run(os.path.relpath(tmp_path / "remotes/tm/mssh/prebackup", TREE), env, *arguments("prebackup"))
    assert "by the driver mssh yet" in check_stderr(done, "prebackup")


def test_dummy_restores_nothing(env: dict[str, str]) -> None:
    done = run("tm/dummy/restore", env, *arguments("restore"))
    assert (done.status, check_stderr(done, "restore")) == (0, "")
    assert run("tm/dummy/restore", env).status == 2
