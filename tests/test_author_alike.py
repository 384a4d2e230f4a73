"""Where a driver author's call fails, it fails alike in Python and in shell: status, message, what is logged.

Python drivers are recipes under tm.action, in both forms by the number of their arguments.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PATH, TREE, Done, Hosts, check_stderr, eventually

FORMS = ["3.4", "current"]
ARGUMENTS = {
    "3.4": ["fe:/src/image", "host01:/ds/0/17/disk.0"],
    "current": ["fe:/src/image", "host01:/ds/0/17/disk.0", "17", "0"],
}
_HEAD = """\
import sys
sys.path.insert(0, {lib!r})
from madrigal import log, error_message, arg_host, arg_path, exec_and_log, ssh_exec_and_log, timeout_exec_and_log
"""
_RECIPE = """\
from madrigal import tm

@tm.action
def clone(image: tm.Location, disk: tm.Location, vm: tm.VM) -> None:
{body}

clone()
"""


class Author:
    """Writes drivers into a directory of their own and runs them there."""

    def __init__(self, work: Path, env: Mapping[str, str]) -> None:
        self.work = work
        self.env = dict(env)

    def _write(self, kind: str, name: str, text: str) -> Path:
        path = self.work / "tm" / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def recipe(self, *body: str) -> Path:
        """A driver as tm/ has them: a function under tm.action."""
        text = _HEAD.format(lib=str(TREE / "lib")) + _RECIPE.format(body="\n".join(f"    {line}" for line in body))
        return self._write("recipe", "clone", text)

    def plain(self, *body: str, name: str = "clone") -> Path:
        """A driver that uses the functions and nothing else of the library."""
        return self._write("plain", name, _HEAD.format(lib=str(TREE / "lib")) + "\n".join(body) + "\n")

    def shell(self, *body: str) -> Path:
        library = shlex.quote(str(TREE / "scripts_common.sh"))
        return self._write("shell", "clone", "\n".join(["#!/bin/bash", "set -euo pipefail", f". {library}", *body, ""]))

    def start(self, driver: Path, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        argv = [str(driver), *arguments] if "shell" in driver.parts else [sys.executable, str(driver), *arguments]
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.env, **env},
            cwd=self.work,
            start_new_session=True,
        )

    def run(self, driver: Path, *arguments: str, **env: str) -> Done:
        with self.start(driver, *arguments, **env) as process:
            try:
                stdout, stderr = process.communicate(timeout=60)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return Done(process.returncode, stdout.decode(), stderr.decode())

    def ok(self, driver: Path, **env: str) -> None:
        """It succeeds and says nothing."""
        done = self.run(driver, *ARGUMENTS["current"], **env)
        assert (done.status, done.stdout, done.stderr) == (0, "", "")

    def fails(self, driver: Path, form: str, **env: str) -> tuple[int, str, str]:
        """(status, the message, log lines) of a driver called in FORM."""
        done = self.run(driver, *ARGUMENTS[form], **env)
        message = check_stderr(done, "clone", marks=form == "3.4")
        logged = [line for line in done.stderr.splitlines() if line.startswith("ERROR: clone: ")]
        return done.status, message, "\n".join(line.removeprefix("ERROR: clone: ") for line in logged)


@pytest.fixture
def here(tmp_path: Path) -> Author:
    """A place to work on this machine; no host can be reached from it."""
    for name in ("work", "home", "run", "tmp"):
        (tmp_path / name).mkdir(0o700)
    env = {"PATH": PATH, "HOME": f"{tmp_path}/home", "TMPDIR": f"{tmp_path}/tmp", "MADRIGAL_RUN_DIR": f"{tmp_path}/run"}
    return Author(tmp_path / "work", env)


@pytest.fixture
def there(env: dict[str, str], datastore: str, hosts: Hosts, tmp_path: Path) -> Iterator[Author]:
    """The same with host01, which has the directory `datastore`; over both transports."""
    hosts.on("host01", datastore).mkdir()
    (tmp_path / "work").mkdir()
    yield Author(tmp_path / "work", env)


def call(function: str, *arguments: str | float | list[str] | None) -> str:
    return f"{function}({', '.join(map(repr, arguments))})"


def shell_call(function: str, *arguments: str | float) -> str:
    return " ".join([function, *(shlex.quote(str(argument)) for argument in arguments)])


def alive(text: str) -> list[int]:
    """The processes with TEXT as a word of their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            pass  # it has just ended
    return found


def end(text: str) -> None:
    for pid in alive(text):
        os.kill(pid, signal.SIGKILL)


# -- the same in both languages --------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call, and how it fails in both languages"""

    function: str
    arguments: tuple[str | float, ...]
    status: int
    message: str
    logged: str = ""


_E = "exec_and_log"
_T = "timeout_exec_and_log"
_S = "ssh_exec_and_log"

CASES = {
    "status": Case(_E, ("sh -c", "No", "echo out; echo why >&2; exit 17"), 17, "No", "why"),
    "status, value": Case(_E, ("ls -d", "No", "/no/such*"), 2, "No", "cannot access '/no/such*'"),
    "default message": Case(_E, ("ls -d", "", "/no/such"), 2, "Error executing ls -d", "/no/such"),
    "255": Case(_E, ("sh -c", "No", "exit 255"), 255, "No"),
    "missing": Case(_E, ("no-such-program",), 127, "Error executing no-such-program", "no-such-program"),
    "missing, told": Case(_E, ("no-such-program -x", "Install it"), 127, "Install it"),
    "missing, timed": Case(_T, (9, "no-such-program"), 127, "Error executing no-such-program"),
    "a directory": Case(_E, ("/", "No"), 126, "No"),
    "not executable": Case(_E, ("./plain",), 126, "Error executing ./plain", "Permission denied"),
    "a value too long": Case(_E, ("/bin/true", "No", "x" * 200_000), 126, "No"),
    "SEGV": Case(_E, ("sh -c", "No", "kill -SEGV $$"), 139, "No"),
    "KILL": Case(_E, ("sh -c", "No", "kill -KILL $$"), 137, "No"),
    "own 143": Case(_T, (9, "sh -c", "", "exit 143"), 143, "Error executing sh -c"),
    "too late": Case(_T, (0.4, "sleep 30"), 143, "Timeout executing sleep 30", "0.4 s"),
    "too late, told": Case(_T, (0.4, "sleep", "Slow", "30"), 143, "Slow"),
    "in time": Case(_T, (9, "sh -c", "No", "echo why >&2; exit 9"), 9, "No", "why"),
    "no time": Case(_T, (0, "touch made"), 2, f"{_T} was given '0' as a number of seconds"),
    "time past": Case(_T, (-1, "touch made"), 2, f"{_T} was given '-1' as a number of seconds"),
    "a word as time": Case(_T, ("x", "touch made"), 2, f"{_T} was given 'x' as a number of seconds"),
    "no command": Case(_E, ("",), 2, "exec_and_log was given no command"),
    "no command but values": Case(_E, (" ", "No", "touch", "made"), 2, "exec_and_log was given no command"),
    "lines in a message": Case(_E, ("false", "Cannot\ndo it\n"), 1, "Cannot do it"),
    "blanks in a message": Case(_E, ("false", "Cannot  do\t'a  b'"), 1, "Cannot  do\t'a  b'"),
    "a message that is misread": Case(_E, ("false", "ERROR: x"), 1, "clone: ERROR: x"),
    "a message with a dash": Case(_E, ("false", "--help"), 1, "clone: --help"),
    "a message of blanks": Case(_E, ("false", " \n "), 1, "failed without a reason"),
    "script": Case(_S, ("localhost", "echo why >&2; exit 3", "No"), 3, "No", "why"),
    "script, untold": Case(
        _S, ("localhost", "exit 3"), 3, "Error executing a script on localhost", "Script on localhost"
    ),
    "missing in a script": Case(_S, ("localhost", "no-such-program", "No"), 127, "No"),
    "last command": Case(_S, ("localhost", "true; false\n(exit 5)", "No"), 5, "No"),
    "set -e": Case(_S, ("localhost", "set -e\n(exit 4)\ntouch made", "No"), 4, "No"),
    "values of a script": Case(
        _S, ("localhost", 'ls -- "$1" "$2"; exit $#', "No", "/no such", "-x*"), 2, "No", "'/no such'"
    ),
    "half a script": Case(_S, ("localhost", "touch made\nif", "No"), 2, "No"),
    "stdin of a script": Case(_S, ("localhost", "cat >/dev/null\nexit 6", "No"), 6, "No"),
    "no host": Case(_S, ("", "touch made", "No"), 2, "'' is not the name of a host"),
    "an option for a host": Case(
        _S, ("-oProxyCommand=x", "true", "No"), 2, "'-oProxyCommand=x' is not the name of a host"
    ),
    "two words for a host": Case(_S, ("a b", "true", "No"), 2, "'a b' is not the name of a host"),
}


def _check(author: Author, driver: Path, case: Case, form: str) -> None:
    (author.work / "plain").touch()
    status, message, logged = author.fails(driver, form)
    assert (status, message) == (case.status, case.message)
    assert case.logged in logged
    assert not (author.work / "made").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_python(here: Author, case: Case, form: str) -> None:
    _check(here, here.recipe(call(case.function, *case.arguments), 'log("not reached")'), case, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_shell(here: Author, case: Case, form: str) -> None:
    _check(here, here.shell(shell_call(case.function, *case.arguments), "log 'not reached'"), case, form)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["h:/ds/0/7"], id="3.4"),
        pytest.param(["h:/ds/0/7", "7", "0"], id="current"),
    ],
)
def test_a_plain_driver_marks_its_message_in_3_4(here: Author, arguments: list[str]) -> None:
    """As a shell driver does (scripts_common.sh, _madrigal_contract)."""
    done = here.run(here.plain('error_message("No")', "sys.exit(3)", name="delete"), *arguments)
    assert done.status == 3
    assert check_stderr(done, "delete", marks=len(arguments) == 1) == "No"


# -- words -----------------------------------------------------------------------------------------------------

TEXTS = ["", "one", "one\ntwo\n", "-n", "%s", "\\n", "a\r\nb", "ERROR: x", " lead", "é"]


@pytest.mark.parametrize("function", ["log", "log_info", "log_error", "log_debug"])
def test_log_lines_are_those_of_the_shell(here: Author, function: str) -> None:
    python = here.run(here.plain(f"from madrigal import {function}", *(call(function, text) for text in TEXTS)))
    shell = here.run(here.shell(*(shell_call(function, text) for text in TEXTS)))
    assert python == shell
    tag = {"log_error": "ERROR", "log_debug": "DEBUG"}.get(function, "INFO")
    lines = python.stderr.splitlines()
    assert len(lines) == len(TEXTS) + 2 and all(line.startswith(f"{tag}: clone: ") for line in lines)


@pytest.mark.parametrize("text", ["one\n\n", "form\ffeed", "next\x85line"])
def test_ends_of_lines_in_a_log_are_those_of_the_shell(here: Author, text: str) -> None:
    python = here.run(here.plain(call("log", text)))
    assert python == here.run(here.shell(shell_call("log", text)))


def test_parts_of_arguments_are_those_of_the_shell(here: Author) -> None:
    arguments = ["host01:/var/lib//one/", "h:/a b/$(id)/'x';*", "/no/colon", "h:", "-n:/x", "h:/two\nlines/", ":/x"]
    python = here.run(here.plain(f"for a in {arguments!r}: print(arg_host(a), arg_path(a), sep='\\n')"))
    shell = here.run(here.shell(*(f"arg_host {shlex.quote(a)}; arg_path {shlex.quote(a)}" for a in arguments)))
    assert python == shell and python.stdout.startswith("host01\n/var/lib/one\n")


# -- what Python's alone can do, and how it ends ---------------------------------------------------------------


def test_a_list_is_not_split(here: Author) -> None:
    here.ok(here.recipe(call("exec_and_log", ["touch", "a b", "*", " x "], None, "c d")))
    assert {path.name for path in here.work.iterdir()} == {"tm", "a b", "*", " x ", "c d"}
    status, message, _ = here.fails(here.recipe(call("exec_and_log", ["ls", "no such"])), "current")
    assert (status, message) == (2, "Error executing ls no such")


@pytest.mark.parametrize("form", FORMS)
def test_lines_of_stderr_are_tagged_whatever_they_are(here: Author, form: str) -> None:
    script = "printf 'two\\n-3\\nERROR: x\\nERROR MESSAGE --8<------\\nlast' >&2; exit 17"
    status, message, logged = here.fails(here.recipe(call("exec_and_log", "sh -c", "Cannot do it", script)), form)
    assert (status, message) == (17, "Cannot do it")
    for line in ("two", "-3", "ERROR: x", "ERROR MESSAGE --8<------", "last"):
        assert line in logged


def test_programs_of_administrators_are_found(here: Author) -> None:
    (here.work / "image").write_bytes(bytes(1 << 20))
    here.ok(here.recipe(call("exec_and_log", "mkswap", "No", str(here.work / "image"))))
    assert b"SWAPSPACE2" in (here.work / "image").read_bytes()


def test_what_was_made_before_is_taken_back(here: Author) -> None:
    link = str(here.work / "link")
    driver = here.recipe(
        "from madrigal.action import here",
        f"here().call('link', target='x', path={link!r})",
        call("exec_and_log", "test -L", "It is not there", link),
        call("exec_and_log", "false", "Cannot go on"),
    )
    assert here.fails(driver, "current")[:2] == (1, "Cannot go on")
    assert not os.path.lexists(link)


def test_what_runs_too_long_is_ended_with_its_children(here: Author) -> None:
    script = "trap '' TERM; sleep 131.1234 & sleep 131.1234; sleep 131.1234"
    began = time.monotonic()
    driver = here.recipe(call("timeout_exec_and_log", 0.5, "bash -c", "Too long", script))
    assert here.fails(driver, "3.4")[:2] == (143, "Too long")
    assert time.monotonic() - began < 20
    assert eventually(lambda: not alive("131.1234"), 2)
    # the program itself ends at once, its child does not
    script = "(trap '' TERM; exec sleep 132.1234) & sleep 132.1234"
    driver = here.recipe(call("timeout_exec_and_log", 0.5, "bash -c", "", script))
    assert here.fails(driver, "current")[:2] == (143, "Timeout executing bash -c")
    assert eventually(lambda: not alive("132.1234"), 2)


@pytest.mark.parametrize(
    "kind",
    ["recipe", "plain"],
)
def test_a_driver_that_is_ended_does_not_leave_the_program_behind(here: Author, kind: str) -> None:
    word = f"133.{os.getpid()}"
    do = here.recipe if kind == "recipe" else here.plain
    with here.start(do(call("timeout_exec_and_log", 60, "sleep", "No", word)), *ARGUMENTS["current"]) as process:
        try:
            assert eventually(lambda: alive(word))
            process.terminate()
            process.wait(20)
            gone = eventually(lambda: not alive(word), 3)
        finally:
            end(word)
    assert process.returncode in (143, -signal.SIGTERM)
    assert gone


def test_exec_and_log_has_no_limit_of_its_own(here: Author) -> None:
    driver = here.recipe(call("exec_and_log", "sleep 1.5"))
    here.ok(driver, MADRIGAL_STALL_TIMEOUT="0.3", MADRIGAL_CONTROL_TIMEOUT="0.3")


def test_ssh_exec_and_log_has_no_limit_of_its_own(there: Author) -> None:
    driver = there.recipe(call("ssh_exec_and_log", "host01", "sleep 1.5", "No"))
    there.ok(driver, MADRIGAL_STALL_TIMEOUT="0.3", MADRIGAL_CONTROL_TIMEOUT="0.3")


def test_what_a_program_leaves_running_does_not_hold_up_the_driver(here: Author) -> None:
    here.ok(here.recipe(call("exec_and_log", "sh -c", "No", "sleep 61.1234 & echo >&2")))
    assert alive("61.1234")
    end("61.1234")


def test_much_stderr_is_no_obstacle(here: Author) -> None:
    script = "yes 0123456789abcde | head -c 1048576 >&2; echo the end >&2; exit $0"
    here.ok(here.recipe(call("exec_and_log", "sh -c", "Much", script, "0")))
    status, message, logged = here.fails(here.recipe(call("exec_and_log", "sh -c", "Much", script, "3")), "current")
    assert (status, message, logged.splitlines()[-1]) == (3, "Much", "the end")


def test_much_stderr_is_not_logged_whole(here: Author) -> None:
    script = "yes 0123456789abcde | head -c 1048576 >&2; echo the end >&2; exit 3"
    assert len(here.fails(here.recipe(call("exec_and_log", "sh -c", "Much", script)), "current")[2]) < 200_000


# -- on a host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_statuses_of_scripts_on_hosts(there: Author, form: str) -> None:
    script = "echo out; echo why >&2; printf more >&2; exit 17"
    driver = there.recipe(call("ssh_exec_and_log", "host01", script, "Cannot\ndo it"), 'log("not reached")')
    status, message, logged = there.fails(driver, form)
    assert (status, message) == (17, "Cannot do it")
    assert (
        logged.splitlines()[-2:] == ["Script on host01 failed (exit status 17): why", "more"]
        and "not reached" not in logged
    )
    assert there.fails(there.recipe(call("ssh_exec_and_log", "host01", "exit 255", "No")), form)[:2] == (255, "No")


@pytest.mark.parametrize("message", ["", "Cannot reach it"])
def test_ssh_itself_fails_with_255(there: Author, tmp_path: Path, message: str) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host lost\n  HostName 127.0.0.1\n  Port 1\nMatch all\nInclude {there.env['MADRIGAL_SSH_CONFIG']}\n"
    )
    driver = there.recipe(call("ssh_exec_and_log", "lost", "touch made", message))
    status, told, logged = there.fails(driver, "current", MADRIGAL_SSH_CONFIG=str(config))
    assert (status, told) == (255, message or "Error executing a script on lost")
    assert "lost" in logged


@pytest.mark.parametrize("size", [100_000, 1 << 20])
def test_a_large_value_of_a_script(there: Author, hosts: Hosts, datastore: str, size: int) -> None:
    script = f'printf %s "$1" | wc -c >{datastore}/count'
    there.ok(there.recipe(f"ssh_exec_and_log('host01', {script!r}, 'No', 'x' * {size})"))
    assert hosts.on("host01", f"{datastore}/count").read_text() == f"{size}\n"


def test_what_a_script_reads_from_stdin_is_not_the_rest_of_it(there: Author, hosts: Hosts, datastore: str) -> None:
    script = f"cat >{datastore}/stdin\ntouch {datastore}/after"
    there.ok(there.recipe(call("ssh_exec_and_log", "host01", script, "No")))
    assert {path.name for path in hosts.on("host01", datastore).iterdir()} == {"stdin", "after"}
