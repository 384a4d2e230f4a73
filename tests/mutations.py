#!/usr/bin/env python3
"""Copies of our drivers in which one action is broken on purpose: does a check of the kit notice?

Each action of a driver, in one form, is broken in each way of BREAKAGES; the kit's checks of that action are run, until
one fails.  They are those of `madrigal check`, by the same plug-in, in one process for a driver: its machines are
started once, and what a scene begins with is made once.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "lib"))

import breakages
import pytest

from madrigal import conformance
from madrigal.conformance.kit import Kit, Options
from madrigal.conformance.plugin import Plugin, known_actions
from madrigal.conformance.report import Report
from madrigal.conformance.scenes import load
from madrigal.conformance.subject import FORMS, of

ONCE = "answer or words or content or leftovers or source_untouched or bystanders or refuses"
CHECKS = os.path.join(os.path.dirname(os.path.realpath(conformance.__file__)), "checks")


@dataclasses.dataclass
class Row:
    """What became of one broken copy."""

    driver: str
    form: str
    action: str
    breakage: str
    by: str
    """The check that noticed, and its scene; "" if none did."""
    harmless: str
    """Why it is no breakage of this action; "" if it is one."""
    seconds: float

    @property
    def survives(self) -> bool:
        return not self.by and not self.harmless

    def __str__(self) -> str:
        result = f"no breakage: {self.harmless}" if self.harmless else self.by or "SURVIVES"
        return f"{self.driver} in {self.form}: {self.action}, {self.breakage}: {result}"


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
        path.write_text(breakages.preface(self.driver, action, str(real)) + script + "\n")
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
        self._work = tempfile.TemporaryDirectory(prefix="mutations")
        self.copy = Copy(Path(self._work.name), driver)
        kind, _, name = driver.partition("/")
        datastores, tms = ((name,), ()) if kind == "datastore" else ((), (name,))
        self.kit = Kit(Options(str(self.copy.tree), datastores, tms, forms=(form,), prepare=str(TREE)))
        self.subject = self.kit.subjects[0]

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.kit.close()
        self._work.cleanup()

    def rows(self, actions: Sequence[str], names: Sequence[str], one: bool) -> Iterator[Row]:
        """What becomes of ACTIONS (default: all) with the breakages NAMES; ONE: of the first that is one."""
        for action in actions or known_actions(self.subject):
            for name in names or breakages.ALL:
                row = self.row(action, name)
                yield row
                if one and not row.harmless:
                    break

    def row(self, action: str, name: str) -> Row:
        since = time.monotonic()
        by = harmless = ""
        try:
            script = breakages.ALL[name](self.subject, action)
        except breakages.Harmless as reason:
            harmless = str(reason)
        else:
            with self.copy.broken(action, script):
                by = self._noticed(action, name)
        seconds = round(time.monotonic() - since, 2)
        return Row(self.copy.driver, self.subject.form, action, name, by, harmless, seconds)

    def _noticed(self, action: str, name: str) -> str:
        """The first check of ACTION that fails, and its scene."""
        self.kit.look_anew()
        swallows = name == "swallows failures"
        # what does not do its work is not to be noticed by what it has to refuse alone
        self.kit.scenes = [one for one in load() if one.action == action and (swallows or not one.fails)]
        self.kit.options = dataclasses.replace(self.kit.options, profile="full" if swallows else "quick")
        only = f"({ONCE}{' or wrong_arguments' if swallows else ''}) and {action}"
        modules = ["test_once", "test_hostile"] if swallows else ["test_once"]
        argv = [*(f"{CHECKS}/{module}.py" for module in modules), "-p", "no:cacheprovider", "-c", os.devnull]
        report = Report()
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main([*argv, "--rootdir", CHECKS, "-q", "-x", "-s", "-k", only], plugins=[Plugin(self.kit, report)])
        return next((f"{one.check}: {one.scene}" for one in report.results if one.outcome == "failed"), "")


def markdown(rows: Sequence[Row]) -> str:
    """All of ROWS as a table, their number and what survives first."""
    real = [row for row in rows if not row.harmless]
    left = [row for row in real if row.survives]
    lines = [f"{len(real)} broken copies, {len(left)} not noticed; {len(rows) - len(real)} would be no breakage.", ""]
    lines += [
        *(f"- {row}" for row in left),
        "",
        "| driver | form | action | breakage | noticed by |",
        "|" + " --- |" * 5,
    ]
    for row in rows:
        by = f"({row.harmless})" if row.harmless else row.by or "**nobody**"
        lines.append(f"| {row.driver} | {row.form} | {row.action} | {row.breakage} | {by} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("driver", help="tm/ssh, or a file that --json has written, of which --markdown makes tables")
    parser.add_argument("more", nargs="*", help="more such files")
    parser.add_argument("--form", default="current", choices=FORMS)
    parser.add_argument("--action", action="append", default=[], help="several may be given; default: all")
    parser.add_argument("--breakage", action="append", default=[], choices=list(breakages.ALL), help="the same")
    parser.add_argument("--one", action="store_true", help="one breakage of each action is enough")
    parser.add_argument("--json", help="a file for all rows")
    parser.add_argument("--markdown", help="the same as a table")
    options = parser.parse_args()
    rows = []
    if options.driver.endswith(".json"):
        rows = [Row(**row) for path in (options.driver, *options.more) for row in json.loads(Path(path).read_text())]
    else:
        with Trial(options.driver, options.form) as trial:
            for row in trial.rows(options.action, options.breakage, options.one):
                rows.append(row)
                print(f"{row.seconds:6.2f} s  {row}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if options.markdown:
        Path(options.markdown).write_text(markdown(rows))
    return int(any(row.survives for row in rows))


if __name__ == "__main__":
    sys.exit(main())
