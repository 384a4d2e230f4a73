#!/usr/bin/env python3
"""Copies of our drivers with one action that is broken on purpose, and whether a check of the kit notices.

Of a driver in one form, each action is broken in each way that BREAKAGES has, and the kit's checks of that action are
run, on machines that are started once, until one fails.  Run as a program: `tests/mutations.py tm/ssh --json FILE`.
What broken copies do instead is written in shell, so that a breakage is a few lines; the checks are those of
`madrigal check`, by the same plug-in.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "lib"))

import pytest  # noqa: E402

from madrigal import conformance  # noqa: E402
from madrigal.conformance.kit import Kit, Options  # noqa: E402
from madrigal.conformance.plugin import Plugin, known_actions  # noqa: E402
from madrigal.conformance.report import Report  # noqa: E402
from madrigal.conformance.scenes import load  # noqa: E402
from madrigal.conformance.subject import Subject, of  # noqa: E402

ONCE = "answer or words or content or leftovers or source_untouched or bystanders or refuses"
CHECKS = os.path.join(os.path.dirname(os.path.realpath(conformance.__file__)), "checks")


class Harmless(Exception):
    """Why a breakage is none for an action."""


# -- where things are, in the words of a call ----------------------------------------------------------------------

# `$disk`: HOST:PATH of the disk that an action is about.  `$file`: what it makes on the front-end.
_LAST = 'old=${MADRIGAL_CONTRACT:-}; n=$#; [ "$old" = 3.4 ] || n=$((n - 2)); disk=${!n}'
_DIRECTORY = "case $2 in */disk.*) disk=$2 ;; *) disk=${2%/}/disk.0 ;; esac"
DISK = {
    **dict.fromkeys(("clone", "ln"), "disk=$2"),
    "mv": _DIRECTORY,
    **dict.fromkeys(("mvds", "cpds", "resize"), "disk=$1"),
    **dict.fromkeys(("snap_create", "snap_create_live", "snap_revert", "snap_delete"), "disk=$1"),
    "delete": "case $1 in */disk.*) disk=$1 ;; *) disk=${1%/}/disk.0 ;; esac",
    "mkimage": "disk=$3",
    "mkswap": "disk=$2",
    "context": _LAST,
    **dict.fromkeys(("premigrate", "failmigrate"), "disk=$1:${3%/}/disk.0"),
    "postmigrate": "disk=$2:${3%/}/disk.0",
    **dict.fromkeys(("prebackup", "prebackup_live", "postbackup", "postbackup_live"), "disk=${1%/}/disk.0"),
    "restore": "disk=${1%/}/disk.0",
}
_PREFACE = """#!/bin/bash
action=%(action)s real=%(real)s; %(find)s
datastores=$ONE_LOCATION/var/datastores
# on HOST:PATH 'a script about $f'
on() { ssh "${1%%%%:*}" "f=${1#*:}; $2" </dev/null >/dev/null 2>&1; }
# element NAME: what the dump in $dump has as that
element() { base64 -d <<<"$dump" | sed -nE "s/.*<$1>(<!\\[CDATA\\[)?([^]<]*).*/\\2/p" | head -1; }
"""
_READ = """dump=
if [ ! -t 0 ]; then dump=$(cat); fi
given=$dump; [ -n "$dump" ] || dump=$1
"""
_REAL = 'answer=$("$real" "$@" <<<"${given:-}" ; echo "x$?"); status=${answer##*x}; answer=${answer%%x*}'


def _base(action: str) -> str:
    return action.partition(".")[0]


def _is_idle(subject: Subject, action: str) -> bool:
    """Whether it has nothing to do."""
    return subject.is_idle(action) or (subject.name, action) == ("dummy", "restore")


def _after(then: str) -> str:
    """What is right, and THEN something more, before the answer is given."""
    return f"""{_READ}"$real" "$@" <<<"$given" >"/tmp/answer.$$"; status=$?
answer=$(cat "/tmp/answer.$$"); rm "/tmp/answer.$$"
{then}
[ -z "$answer" ] || printf '%s\\n' "$answer"
exit $status"""


def _works(subject: Subject, action: str, why: str) -> None:
    if subject.refuses(action):
        raise Harmless(f"it refuses, so {why}")


# -- breakages -----------------------------------------------------------------------------------------------------


def does_nothing(subject: Subject, action: str) -> str:
    if _is_idle(subject, action):
        raise Harmless("it has nothing to do")
    if subject.is_shared and action in ("premigrate", "failmigrate"):
        raise Harmless("on shared storage it only runs what other drivers have for it, and here are none")
    return "cat >/dev/null; exit 0"


def answers_and_makes_nothing(subject: Subject, action: str) -> str:
    if subject.kind == "tm" or action not in ("cp", "clone", "mkfs") or not subject.is_files:
        raise Harmless("it has no answer that names what it made")
    return _after('rm -rf "${answer%% *}"')


CUT = '[ -f "$f" ] && f=$(readlink -f "$f") && truncate -s -65536 "$f"'


def truncates(subject: Subject, action: str) -> str:
    """Cut off what it makes, or leaves; of an answer, the end."""
    base = _base(action)
    _works(subject, action, "it makes nothing")
    if action in ("stat", "monitor", "monitor_ds", "export") or (subject.kind == "datastore" and not subject.is_files):
        if _is_idle(subject, action):
            raise Harmless("it makes nothing and has no answer")
        return _after('answer=${answer:0:$((${#answer} / 2))}')
    if _is_idle(subject, action) or not subject.is_files:
        raise Harmless("it makes nothing with bytes of its own")
    if base in ("delete", "rm"):
        raise Harmless("it makes nothing")
    if subject.kind == "datastore":
        if action.startswith("snap_"):
            return _after(f'f=$(element SOURCE); {CUT}')
        return _after(f'f=${{answer%% *}}; {CUT}')
    if base in ("mvds", "cpds"):
        return _after(f'f=$2; {CUT}')
    if base == "snap_create":
        return _after(f"on $disk '[ ! -f \"$f.snap/0\" ] || f=$f.snap/0; {CUT}'")
    return _after(f"on $disk '{CUT}'")


def says_too_much(subject: Subject, action: str) -> str:
    return _after("answer=$answer${answer:+$'\\n'}surprise")


def answers_another_format(subject: Subject, action: str) -> str:
    """raw for qcow2 and the other way round, and each number one more."""
    if subject.kind == "tm" and not action.startswith("monitor"):
        raise Harmless("it answers nothing")
    if subject.refuses(action) or _is_idle(subject, action) or (subject.kind == "datastore" and action == "rm"):
        raise Harmless("it answers nothing")
    if action.startswith("snap_"):
        raise Harmless("it answers nothing")
    if not subject.is_files and action in ("cp", "clone"):
        return _after('answer="$answer of three words"')
    if not subject.is_files and action != "mkfs":
        # the numbers are made up
        return _after("answer=$(sed 's/IMPORT_INFO/INFO/; s/[0-9]/x/g' <<<\"$answer\")")
    if action == "mkfs" and not subject.is_old:
        return _after("answer=\"$answer raw\"")
    if action in ("cp", "clone", "mkfs"):
        swap = r"s/raw$/Q/; s/qcow2$/raw/; s/Q$/qcow2/"
        add = r"""awk '{ if ($NF ~ /^[0-9]+$/) $NF += 1; print }'"""
        return _after(f"answer=$(sed '{swap}' <<<\"$answer\" | {add})")
    return _after("answer=$(sed -E 's/[0-9]+/1&/g' <<<\"$answer\")")


def makes_another_format(subject: Subject, action: str) -> str:
    """What is made is a qcow2 image where a raw one is due, and the other way round."""
    base = _base(action)
    convert = (
        'if [ -f "$f" ]; then f=$(readlink -f "$f"); t=$f.t; o=qcow2; '
        '[ "$(head -c 3 "$f")" != QFI ] || o=raw; qemu-img convert -U -O $o "$f" "$t" && cat "$t" >"$f"; rm -f "$t"; fi'
    )
    if subject.refuses(action) or _is_idle(subject, action) or not subject.is_files:
        raise Harmless("it makes no image")
    if subject.kind == "datastore":
        if action in ("cp", "clone", "mkfs"):
            return _after(f"f=${{answer%% *}}; {convert}")
        if action in ("snap_revert", "snap_flatten"):
            return _after(f"f=$(element SOURCE); {convert}")
    elif base in ("mvds", "cpds"):
        return _after(f"f=$2; {convert}")
    elif base in ("clone", "ln", "mv", "mkimage", "snap_revert", "resize"):
        return _after(f"on $disk '{convert}'")
    raise Harmless("it makes no image")


def leaves_a_file(subject: Subject, action: str) -> str:
    return _after("echo x >/tmp/left-over")


def leaves_a_file_beside(subject: Subject, action: str) -> str:
    """Beside what it makes or removes, under a name that begins as that does."""
    if subject.kind == "datastore":
        if not subject.is_files:
            return _after('echo x >"$datastores/1/left-over"')
        if action in ("cp", "clone", "mkfs"):
            return _after('[ -z "$answer" ] || echo x >"${answer%% *}.tmp"')
        return _after('f=$(element SOURCE); [ -n "$f" ] || f=$datastores/1/image; echo x >"$f.tmp"')
    if action == "monitor":
        return _after('echo x >"$datastores/100/left-over"')
    if action == "monitor_ds":
        return _after('echo x >"$1/17/disk.0.tmp"')
    if _base(action) in ("mvds", "cpds"):
        return _after('f=$2; mkdir -p "${f%/*}"; echo x >"$f.tmp"')
    return _after("on \"$disk\" 'mkdir -p \"${f%/*}\"; echo x >\"$f.tmp\"'")


def removes_too_much(subject: Subject, action: str) -> str:
    """What is another's: an image, the disk of another VM."""
    if subject.kind == "datastore" or action == "monitor":
        return _after('find "$datastores" -name "bystander*" -delete')
    if action == "monitor_ds":
        return _after('rm -rf "$1/18"')
    return _after("on \"$disk\" 'rm -rf \"${f%/*/*}/18\"'")


def removes_what_is_beside(subject: Subject, action: str) -> str:
    """Other disks of the VM, other snapshots."""
    if subject.kind == "datastore":
        if action == "snap_delete" and subject.is_files:
            return _after('f=$(element SOURCE); rm -f "$f.snap/1"')
        raise Harmless("it is the same as to remove what is another's")
    if action.startswith("monitor"):
        raise Harmless("it is the same as to remove what is another's")
    if subject.refuses(action) or not subject.is_files:
        raise Harmless("there is nothing beside")
    if _base(action) in ("delete", "mv", "premigrate", "postmigrate", "failmigrate"):
        if action != "delete":
            raise Harmless("all that is beside goes with it")
        return _after("case $1 in */disk.*) on \"$disk\" 'rm -rf \"${f%/*}\"' ;; esac")
    if action == "snap_delete":
        return _after("on \"$disk\" 'g=$(readlink -f \"$f\"); for s in \"$f.snap/1\" \"$g.snap/1\"; do [ \"$s\" -ef \"$f\" ] || rm -f \"$s\"; done'")
    return _after("on \"$disk\" 'find \"${f%/*}\" -mindepth 1 -maxdepth 1 ! -name \"${f##*/}*\" -exec rm -rf {} +'")


def removes_its_source(subject: Subject, action: str) -> str:
    base = _base(action)
    _works(subject, action, "it has no source")
    if not subject.is_files:
        raise Harmless("it has no source")
    if subject.kind == "datastore" and action in ("cp", "clone", "stat"):
        return _after('f=$(element PATH); rm -f "$f"')
    if subject.kind == "datastore" and action == "export":
        return _after('f=$(element SOURCE); rm -f "$f"')
    if base in ("clone", "ln"):
        return _after('rm -f "${1#*:}"')
    if base == "cpds":
        return _after("on \"$disk\" 'rm -f \"$(readlink -f \"$f\")\"'")
    if base == "context":
        return _after('for f; do case $f in /*) rm -f "$f" ;; esac; done')
    if base == "snap_revert":
        return _after("on \"$disk\" 'g=$(readlink -f \"$f\"); for s in \"$f.snap/0\" \"$g.snap/0\"; do [ \"$s\" -ef \"$f\" ] || rm -f \"$s\"; done'")
    raise Harmless("it has no source")


def swallows_failures(subject: Subject, action: str) -> str:
    return '"$real" "$@" 2>/dev/null; exit 0'


def fails(subject: Subject, action: str) -> str:
    """Although there is nothing wrong."""
    if subject.refuses(action):
        raise Harmless("it has to fail")
    return 'cat >/dev/null; echo "it does not work" >&2; exit 1'


def says_untagged_words(subject: Subject, action: str) -> str:
    return _after('echo "all is well" >&2')


BREAKAGES: dict[str, Callable[[Subject, str], str]] = {
    one.__name__.replace("_", " "): one
    for one in (
        does_nothing,
        truncates,
        says_too_much,
        answers_another_format,
        makes_another_format,
        leaves_a_file,
        leaves_a_file_beside,
        removes_too_much,
        removes_what_is_beside,
        removes_its_source,
        answers_and_makes_nothing,
        swallows_failures,
        fails,
        says_untagged_words,
    )
}


# -- trying them ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What became of one broken copy."""

    driver: str
    form: str
    action: str
    breakage: str
    by: str
    """The check and its scene that noticed; "" if none did."""
    harmless: str
    """Why it is no breakage of this action; "" if it is."""
    seconds: float


class Copy:
    """A tree like ours in DIRECTORY, in which actions of one driver can be broken, one at a time."""

    def __init__(self, directory: Path, driver: str) -> None:
        kind, _, name = driver.partition("/")
        self.tree, self.driver = directory, driver
        for one in ("lib", "remotes", "scripts_common.sh", "datastore", "tm"):
            (directory / one).symlink_to(TREE / one)
        (directory / kind).unlink()
        (directory / kind).mkdir()
        for other in (TREE / kind).iterdir():
            if other.name != name:
                (directory / kind / other.name).symlink_to(other)
        (directory / driver).mkdir()
        shutil.copy(TREE / driver / "driver.toml", directory / driver)
        (directory / "broken").mkdir()
        for action in of(kind, str(TREE / driver), "current").actions:
            (directory / driver / action).symlink_to(TREE / driver / action)

    @contextlib.contextmanager
    def broken(self, action: str, script: str) -> Iterator[None]:
        """Let ACTION be SCRIPT instead."""
        # what a driver cannot do, and where it has nothing to do, is known by the name of the file
        real, link = TREE / self.driver / action, self.tree / self.driver / action
        same = os.path.basename(os.path.realpath(real))
        known = same in ("unsupported", "unsupported_backup", "nothing")
        path = self.tree / "broken" / (same if known else action)
        find = DISK.get(_base(action), ":") if self.driver.startswith("tm/") else ":"
        path.write_text(_PREFACE % {"action": action, "real": real, "find": find} + script + "\n")
        path.chmod(0o755)
        link.unlink()
        link.symlink_to(path)
        try:
            yield
        finally:
            link.unlink()
            link.symlink_to(real)
            path.unlink()


class Trial:
    """The checks of one driver in one form, on machines of its own."""

    def __init__(self, driver: str, form: str) -> None:
        self._work = tempfile.TemporaryDirectory(prefix="mut")
        self.copy = Copy(Path(self._work.name), driver)
        kind, _, name = driver.partition("/")
        named = {"datastores" if kind == "datastore" else "tms": (name,)}
        options = Options(str(self.copy.tree), forms=(form,), prepare=str(TREE), **named)  # type: ignore[arg-type]
        self.kit = Kit(options)
        self.subject = self.kit.subjects[0]

    def close(self) -> None:
        self.kit.close()
        self._work.cleanup()

    def actions(self) -> list[str]:
        return known_actions(self.subject)

    def rows(self, actions: list[str], breakages: list[str]) -> Iterator[Row]:
        for action in actions:
            for name in breakages:
                yield self.row(action, name)

    def row(self, action: str, name: str) -> Row:
        since = time.monotonic()
        by = harmless = ""
        try:
            script = BREAKAGES[name](self.subject, action)
        except Harmless as reason:
            harmless = str(reason)
        else:
            with self.copy.broken(action, script):
                by = self.noticed(action, name)
        driver, seconds = self.copy.driver, round(time.monotonic() - since, 2)
        return Row(driver, self.subject.form, action, name, by, harmless, seconds)

    def noticed(self, action: str, name: str) -> str:
        """The first check of ACTION that fails, and its scene; "" if all hold."""
        self.kit.forget()
        failing = name == "swallows failures"
        # an action that does nothing is not to be noticed by what it has to refuse alone
        self.kit.scenes = [
            one for one in load() if one.action == action and (failing or not one.fails or action == "snap_create_live")
        ]
        only = f"({ONCE}{' or wrong_arguments' if failing else ''}) and {action}"
        self.kit.options = dataclasses.replace(self.kit.options, profile="full" if failing else "quick")
        report = Report()
        argv = [f"{CHECKS}/test_once.py", *([f"{CHECKS}/test_hostile.py"] if failing else [])]
        argv += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", CHECKS, "-q", "-x", "-s", "-k", only]
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main(argv, plugins=[Plugin(self.kit, report)])
        return next((f"{one.check}: {one.scene}" for one in report.results if one.outcome == "failed"), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("driver", help="tm/ssh")
    parser.add_argument("--form", default="current", choices=("3.4", "current"))
    parser.add_argument("--action", action="append", help="more than one may be given; default: all")
    parser.add_argument("--breakage", action="append", choices=list(BREAKAGES), help="the same")
    parser.add_argument("--json", help="where the table is written")
    options = parser.parse_args()
    trial = Trial(options.driver, options.form)
    rows = []
    try:
        for row in trial.rows(options.action or trial.actions(), options.breakage or list(BREAKAGES)):
            rows.append(row)
            result = f"no breakage: {row.harmless}" if row.harmless else row.by or "SURVIVES"
            print(f"{row.seconds:6.2f} {row.driver} {row.form} {row.action}, {row.breakage}: {result}", flush=True)
    finally:
        trial.close()
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return int(any(not row.by and not row.harmless for row in rows))


if __name__ == "__main__":
    sys.exit(main())
