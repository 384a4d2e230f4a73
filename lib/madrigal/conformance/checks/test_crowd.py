"""Many at a time: on the same object, and on different ones.  docs/contract.md, "How a driver is started"."""

from __future__ import annotations

import time

from madrigal.conformance import world
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import SOME, Case, clean, each, works
from madrigal.conformance.scenes import Scene, Wrong

CROWD = {"quick": 4, "full": 8}
"""At a time, in the first scene of an action; in others as in the quick profile."""


def _crowd(case: Case) -> int:
    return CROWD[case.kit.options.profile if case.is_first else "quick"]


def _is_fit(scene: Scene) -> bool:
    return not scene.fails and "persistent" not in scene.name and scene.action != "monitor_ds"


@each(_is_fit, quick=SOME)
def test_same_object(case: Case) -> None:
    """The same call several times at once: all do it or say that somebody else does, and the result is that of one."""
    stage, play = case.ready()
    before, since = case.kit.look(), time.monotonic()
    processes = [stage.start(play.call) for _ in range(_crowd(case))]
    for process in processes:
        stage.feed(play.call, process)
    runs = [stage.finish(play.call, process, since) for process in processes]
    case.log.append(f"statuses {[run.status for run in runs]}")
    done = [run for run in runs if run.status == 0]
    if not done or any(run.hung for run in runs):
        seen = [(run.status, run.message[:100]) for run in runs]
        raise Wrong(f"of {len(runs)} at once\n  expected: one that works\n  seen:     {seen}")
    for run in done:
        works(case, run, play)
    play.safe()
    clean(case, play, before, done[0])


@each(lambda scene: _is_fit(scene) and not scene.name.startswith("restore"), quick=SOME)
def test_different_objects(case: Case) -> None:
    """Calls for different VMs or images at once: each does its own."""
    crowd = case.crowd(_crowd(case))
    before, since = case.kit.look(), time.monotonic()
    processes = [stage.start(play.call) for stage, play in crowd]
    for (stage, play), process in zip(crowd, processes, strict=True):
        stage.feed(play.call, process)
    allowed = []
    for (stage, play), process in zip(crowd, processes, strict=True):
        run = stage.finish(play.call, process, since)
        case.stage, case.runs = stage, stage.runs
        works(case, run, play)
        allowed += case.kit.allowed(play, run)
    if changes := world.unexpected(before.changes(case.kit.look()), allowed):
        raise Wrong(f"left over\n  expected: nothing but the results\n  seen:\n{describe(changes)}")
