"""Again and again: docs/contract.md, "What holds for every action"."""

from __future__ import annotations

import dataclasses
import functools
import random
import signal
from collections.abc import Mapping

import pytest

from madrigal.conformance import world
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import FIRST, SOME, Case, Popen, clean, each, scene_of, works
from madrigal.conformance.scenes import Scene, Wrong
from madrigal.conformance.stage import SOON

TIMES = {"quick": 2, "full": 10}
"""How often in a row the first scene of an action is played; others twice."""
FAULTS = {"quick": {"fail": 2}, "full": {"fail": 8, "lie": 8, "hang": 4}}
"""How often, and how many faults in the first scene of an action; a quarter of it in others."""
WRONG = {"fail": "fails", "lie": "does nothing and says that all is well", "hang": "does not end"}
LONGEST = 60.0
"""Seconds in which an action has to notice that a program hangs."""

ONCE = ("snap_revert raw of a persistent disk", "snap_revert qcow2 of a persistent disk")
"""Scenes that go on with other actions after the one."""


def can_be_repeated(scene: Scene) -> bool:
    return scene.name not in ONCE


@each(can_be_repeated, quick=FIRST)
def test_repeat(case: Case) -> None:
    """Ten times in a row (twice in the quick profile) end as one does."""
    stage, play = case.ready()
    run = stage.run(play.call)
    before = case.kit.look()
    for number in range(2, TIMES[case.kit.options.profile if case.is_first else "quick"] + 1):
        run = stage.run(play.call)
        if scene_of(case).fails:
            if not run.status:
                raise Wrong(f"time {number}: it has to fail\n  expected: another status than 0\n  seen:     status 0")
        else:
            try:
                works(case, run, play)
            except Wrong as error:
                raise Wrong(f"time {number}: {error}") from None
        if changes := before.changes(case.kit.look()):
            again = [one for one in changes if not one.startswith("changed")]
            if again:
                raise Wrong(
                    f"time {number} changes something\n  expected: as after the first\n  seen:\n{describe(again)}"
                )


def _works_at_all(scene: Scene) -> bool:
    return can_be_repeated(scene) and not scene.fails


@each(_works_at_all, quick=SOME)
def test_failing_programs(case: Case) -> None:
    """Each program that it starts fails once: it fails and leaves nothing, or copes; after that it can be run again."""
    _each_program(case, "fail")


def _has_no_guest(scene: Scene) -> bool:
    """A hypervisor that lies cannot be found out, and one that hangs is waited for as long as kvmrc says."""
    return _works_at_all(scene) and "of a guest" not in scene.name


@each(_has_no_guest)
def test_lying_programs(case: Case) -> None:
    """Each program that it starts does nothing once, and says that all is well: the action does not believe it."""
    _each_program(case, "lie")


@each(_has_no_guest)
def test_hanging_programs(case: Case) -> None:
    """Each program that it starts hangs once: the action ends by its deadlines, and leaves nothing, nor the program."""
    _each_program(case, "hang", SOON)


def _each_program(case: Case, how: str, env: Mapping[str, str] | None = None) -> None:
    """Let the programs of an action do HOW, one call after the other, with ENV."""
    if not case.kit.fakes:
        pytest.skip("fake programs need machines of the check's own")
    stage, play = case.ready()
    for fakes in case.kit.fakes.values():
        fakes.plan()
    stage.run(play.call)
    points = [
        (machine, program, number)
        for machine, fakes in case.kit.fakes.items()
        for program, count in sorted(fakes.calls.items())
        for number in range(1, min(count, 4) + 1)
        # an interpreter on a host that hangs is a host that hangs, and one that lies does not run what is started there
        if machine == "fe" or program not in (("ssh",) if how == "fail" else ("ssh", "python3"))
    ]
    case.kit.settle()
    random.Random(case.label).shuffle(points)
    count = FAULTS[case.kit.options.profile][how]
    for machine, program, number in points[: count if case.is_first else count // 4]:
        what = f"{program}, call {number} on {machine}: {WRONG[how]}"
        stage, play = case.ready()
        before = case.kit.look()
        case.kit.fakes[machine].plan(how, program, number)
        run = stage.run(dataclasses.replace(play.call, env=env or {}), limit=LONGEST)
        reached = case.kit.fakes[machine].reached
        left = world.still_running(case.kit.machines, case.kit.baseline) if how == "hang" and not run.hung else []
        case.kit.settle()
        case.log.append(f"{what}, status {run.status}{'' if reached else ' (it was not called)'}")
        case.counts["faults of programs"] += reached
        try:
            if run.hung:
                raise Wrong(
                    f"it is not ended by a deadline\n  expected: an end within {LONGEST:.0f} s\n  seen:     none"
                )
            if left:
                raise Wrong(f"still running after its end\n  expected: nothing\n  seen:\n{describe(left)}")
            if run.status == 0:
                works(case, run, play)
            else:
                _one_message(run.message)
            clean(case, play, before, run)
            again = stage.run(play.call)
            works(case, again, play)
            clean(case, play, before, again)
        except Wrong as error:
            told = f"(a program of that name, first in PATH, that {WRONG[how]})"
            raise Wrong(f"{what}: status {run.status}\n{error}\n{told}") from None


def _one_message(message: str) -> None:
    if "Traceback" in message:
        raise Wrong(f"a traceback is shown: {message[-500:]}")
    if not message.strip():
        raise Wrong("it fails without a message\n  expected: one line that says why\n  seen:     none")


@each(lambda scene: can_be_repeated(scene) and not scene.fails, quick=SOME)
def test_noisy_programs(case: Case) -> None:
    """Each program writes 1 MiB to its stderr before it does its work: nothing blocks, and nothing else changes."""
    if not case.kit.fakes:
        pytest.skip("fake programs need machines of the check's own")
    stage, play = case.ready()
    before = case.kit.look()
    for fakes in case.kit.fakes.values():
        fakes.plan("noise", "*", "all")
    run = stage.run(play.call)
    case.kit.settle()
    works(case, run, play)
    clean(case, play, before, run)
    if len(run.stderr) > 16 << 20:
        raise Wrong(f"it says {len(run.stderr) >> 20} MiB")


def _ask(name: str, case: Case, process: Popen) -> None:
    case.signal(process, signal.Signals[f"SIG{name}"])


@each(lambda scene: scene.name in ("clone raw", "cp raw", "mv raw of the directory", "delete of the directory"))
def test_interrupted(case: Case) -> None:
    """TERM and INT in the middle: it undoes what it did, within 30 seconds, and can be run again."""
    for name in ("TERM", "INT", "HUP"):
        stage, play = case.ready(big=case.scene is not None and case.scene.streams)
        before = case.kit.look()
        run, _ = case.kill(play, functools.partial(_ask, name), 0.25)
        left = world.still_running(case.kit.machines, case.kit.baseline)
        if left:
            raise Wrong(f"after {name}\n  expected: nothing runs\n  seen:\n{describe(left)}")
        try:
            if run.status == 0:
                play.verify(run)
            clean(case, play, before, run)
        except Wrong:
            # a host may have got as far as to keep its work, and nobody heard of it: then all of it has to be there
            play.verify(run)
            clean(case, play, before, dataclasses.replace(run, status=0))
        works(case, stage.run(play.call), play)
