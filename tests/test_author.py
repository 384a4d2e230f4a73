"""What driver authors know, in both languages: the same call does the same and ends with the same status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import TREE, Done, Hosts, _mentioning, check_stderr

NASTY = "a b/$(id)/'x';*"
VALUES = [NASTY, "", "-rf", "--", "*", "~", '"', "\\", "two\nlines", "`id`", "{a,b}", "!x", "\t", "½"]


class Author:
    """Runs one line of a driver, in Python or in shell; FUNCTION's arguments are the process's."""

    def __init__(self, language: str, work: Path, env: dict[str, str]) -> None:
        self.language, self.work, self.env = language, work, env
        (work / "tm/mine").mkdir(parents=True)
        (work / "lib").symlink_to(TREE / "lib")

    def run(self, function: str, *arguments: str, form: str = "current") -> Done:
        if self.language == "python":
            seconds = "float(a.pop(0)), " if function == "timeout_exec_and_log" else ""
            text = (
                "#!/usr/bin/python3\nimport sys\nsys.path[0] += '/../../lib'\n"
                f"from madrigal import *\nfrom madrigal import messages\na = sys.argv[1:]\n"
                f"messages.marks = {form == '3.4'}\n{function}({seconds}*a)\n"
            )
        else:
            text = f'#!/bin/bash\nset -eu\n. "{TREE}/scripts_common.sh"\n{function} "$@"\n'
        driver = self.work / "tm/mine/action"
        driver.write_text(text)
        driver.chmod(0o755)
        env = {**self.env, "MADRIGAL_CONTRACT": form}
        done = subprocess.run(
            [driver, *arguments], capture_output=True, cwd=self.work, env=env, stdin=subprocess.DEVNULL
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(params=["python-openssh", "python-paramiko", "shell"])
def author(request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path) -> Author:
    language, _, transport = request.param.partition("-")
    if transport == "paramiko":
        pytest.importorskip("paramiko", reason="the Python package paramiko is not installed")
    return Author(language, tmp_path, {**hosts.env, "MADRIGAL_TRANSPORT": transport or "openssh"})


def failed(done: Done, status: int, message: str, form: str = "current") -> None:
    assert done.status == status, done
    assert check_stderr(done, "action", marks=form == "3.4") == message


@pytest.mark.parametrize("form", ["3.4", "current"])
def test_exec_and_log_does_it_to_that_very_path(author: Author, form: str) -> None:
    path = author.work / NASTY
    path.parent.mkdir(parents=True)
    path.write_text("x")
    before = sorted(str(p) for p in author.work.rglob("*") if "tm/mine" not in str(p))
    done = author.run("exec_and_log", "chmod g+w,o-r", f"Cannot chmod {path}", str(path), form=form)
    assert (done.status, done.stdout, check_stderr(done, "action")) == (0, "", "")
    assert path.stat().st_mode & 0o024 == 0o020
    assert sorted(str(p) for p in author.work.rglob("*") if "tm/mine" not in str(p)) == before
    path.unlink()
    done = author.run("exec_and_log", "chmod g+w", f"Cannot chmod {path}", str(path), form=form)
    failed(done, 1, f"Cannot chmod {path}", form)
    assert "No such file" in done.stderr


def test_exec_and_log_gives_words_as_they_are(author: Author) -> None:
    show = author.work / "show"
    show.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >shown\n')
    show.chmod(0o755)
    done = author.run("exec_and_log", f"{show}  one *  $HOME", "No", *VALUES)
    assert done.status == 0, done
    # split at blanks, and nothing else is done to it
    assert (author.work / "shown").read_text().split("\0")[:-1] == ["one", "*", "$HOME", *VALUES]


def test_exec_and_log_fails(author: Author) -> None:
    done = author.run("exec_and_log", "sh -c", "My message", "echo out; echo why >&2; exit 7")
    failed(done, 7, "My message")
    assert "why" in done.stderr
    failed(author.run("exec_and_log", "false"), 1, "Error executing false")
    failed(author.run("exec_and_log", "no-such-program x"), 127, "Error executing no-such-program x")


def test_timeout_exec_and_log(author: Author) -> None:
    assert author.run("timeout_exec_and_log", "20", "touch", "No", NASTY.replace("/", "_")).status == 0
    assert (author.work / NASTY.replace("/", "_")).exists()
    failed(author.run("timeout_exec_and_log", "20", "sh -c", "No", "exit 9"), 9, "No")
    long = f"61.{os.getpid()}"  # another test process may be here too
    done = author.run("timeout_exec_and_log", "0.5", "sh -c", "Too slow", f"sleep {long} & sleep {long}")
    failed(done, 143, "Too slow")
    assert not _mentioning(long), "its process group has not been ended"
    failed(author.run("timeout_exec_and_log", "0.2", "sleep 5"), 143, "Timeout executing sleep 5")


@pytest.mark.parametrize("form", ["3.4", "current"])
def test_ssh_exec_and_log(author: Author, hosts: Hosts, datastore: str, form: str) -> None:
    path = f"{datastore}/{NASTY}"
    script = 'mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1"; echo noise'
    done = author.run("ssh_exec_and_log", "host01", script, "No", path, NASTY, form=form)
    assert (done.status, done.stdout, check_stderr(done, "action")) == (0, "", "")
    assert hosts.on("host01", path).read_text() == NASTY
    assert not Path(datastore).exists()
    done = author.run("ssh_exec_and_log", "host01", 'rm -r -- "$1/none"', f"Cannot remove {path}", path, form=form)
    failed(done, 1, f"Cannot remove {path}", form)
    assert "Not a directory" in done.stderr or "No such file" in done.stderr


def test_ssh_exec_and_log_gives_words_as_they_are(author: Author, hosts: Hosts, datastore: str) -> None:
    script = 'place=$1; shift; mkdir "$place"; for word; do printf "%s\\0" "$word"; done >"$place/shown"'
    assert author.run("ssh_exec_and_log", "host01", script, "No", datastore, *VALUES).status == 0
    assert hosts.on("host01", f"{datastore}/shown").read_text().split("\0")[:-1] == VALUES


def test_ssh_exec_and_log_fails(author: Author) -> None:
    failed(author.run("ssh_exec_and_log", "host01", "echo why >&2; exit 17", "My message"), 17, "My message")
    failed(author.run("ssh_exec_and_log", "host01", "exit 3"), 3, "Error executing a script on host01")
    failed(author.run("ssh_exec_and_log", "nowhere", "true", "Not there"), 255, "Not there")


def test_here_is_a_host_too(author: Author) -> None:
    done = author.run("ssh_exec_and_log", "localhost", 'printf %s "$1" >"$2"', "No", NASTY, str(author.work / "here"))
    assert (done.status, done.stderr) == (0, "")
    assert (author.work / "here").read_text() == NASTY
