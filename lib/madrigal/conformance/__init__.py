"""The conformance kit: does a driver keep the contract (docs/contract.md), whatever language it is written in?

It runs a driver's executables as processes, from outside, and looks at the disks of real machines; it imports no
recipe.

    Options -> Kit -> for each check (checks/) and each scene (scenes_*): Stage -> Call -> Run -> Result -> Report

- A **machine** (machines) is an sshd in namespaces: the front-end and two hosts, each with a /tmp and datastores of
  its own beside shared ones.  Nothing that a driver does there can hurt the machine that all this runs on.
- A **subject** is a driver in one of the two forms; what it can do is known from driver.toml and the files present.
- A **stage** has one VM and one image on the machines, bystanders that nobody may touch, and a front-end that answers.
- A **scene** is what an action is asked to do there, with what has to hold afterwards, what may change, and what
  must be safe at any moment.  It knows the contract and no driver.
- A **check** plays scenes in its own way: once, ten times, killed, crowded, on a full disk, with hostile values.  It is
  a pytest function, so that `-k NAME` and `--pdb` work.
- **Faults** need no change in a driver: programs first in PATH that fail, KILL at a moment or after some bytes, mounts.

A scene is brought about once by the driver's own actions; its files are then kept and put back, which makes thousands
of kills possible.  Whoever adds an action writes scenes; whoever has a new way to hurt a driver, a check.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from madrigal.conformance.kit import Kit, Options
from madrigal.conformance.report import Report
from madrigal.errors import MissingProgram

__all__ = ["Kit", "Options", "Report", "run"]

NOTHING_RAN = 5
"""pytest's status for that."""


def run(options: Options) -> Report:
    """Check the drivers that OPTIONS name; raises MissingProgram, NotFound, ConfigError, HostUnreachable."""
    try:
        import pytest
    except ImportError:
        raise MissingProgram(
            "the checks are pytest functions: install python3-pytest, or madrigal[check] by pip"
        ) from None
    from madrigal.conformance.plugin import Plugin

    kit, report = Kit(options), Report(options.is_whole)
    if options.hosts:
        kit.reach()
    if options.jobs > 1:
        kit.close()
        _side_by_side(options, report)
        report.sort([str(subject) for subject in kit.subjects], [scene.name for scene in kit.scenes])
    else:
        checks = os.path.join(os.path.dirname(os.path.realpath(__file__)), "checks")
        argv = [
            checks,
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            checks,
            "-q",
            "--no-header",
            "--tb=short",
        ]
        if options.only:
            argv += ["-k", options.only]
        if options.junit:
            argv.append(f"--junitxml={os.path.abspath(options.junit)}")
        # pytest ends well by an interruption alone, which a shell may have had us ignore
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            status = pytest.main([*argv, *options.pytest], plugins=[Plugin(kit, report)])
        finally:
            kit.close()
        report.broken = int(status) not in (0, 1, NOTHING_RAN)
    for path, text in ((options.json, report.json), (options.html, report.html)):
        if path:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text())
    return report


def _side_by_side(options: Options, report: Report) -> None:
    """Several processes, each with machines of its own, which take scene after scene; what they said, together."""
    with tempfile.TemporaryDirectory() as work:
        queue, started = f"{work}/queue", []
        Path(queue).write_text("0")
        for number in range(options.jobs):
            one = dataclasses.replace(options, jobs=1, queue=queue, json=f"{work}/{number}", html="", junit="")
            argv = [sys.executable, "-m", "madrigal.conformance", *one.words()]
            path = os.pathsep.join(
                [os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))), *sys.path]
            )
            started.append(subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr))
        try:
            for number, process in enumerate(started):
                if process.wait() not in (0, 1) or not os.path.exists(f"{work}/{number}"):
                    report.broken = True
                    continue
                report.load(f"{work}/{number}")
        finally:
            for process in started:
                if process.poll() is None:  # an interruption ends them too
                    process.terminate()
                    process.wait()
    if options.junit:
        with open(options.junit, "w", encoding="utf-8") as file:
            file.write(report.junit())
