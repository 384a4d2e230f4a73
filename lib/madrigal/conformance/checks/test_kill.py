"""Kills at any moment: nothing is lost, nothing half-made has a final name, and the next run ends as a clean one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest

from madrigal.conformance import tracing, world
from madrigal.conformance.calls import Run
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import SOME, Case, clean, each, scene_of, works
from madrigal.conformance.proxy import Proxies
from madrigal.conformance.scenes import Play, Scene, Wrong
from madrigal.conformance.stage import MIB, Stage
from madrigal.conformance.world import World

KILLS = {"quick": 3, "full": 24}
"""For all drivers that have an action together, in its first scene; but few where there are many in a stream."""
FEW = 1
IN_STREAM = {"quick": 3, "full": 15}
"""For the first scene of an action, half of it for others."""
AT_CALLS = {"quick": (4, 0), "full": (14, 2)}
"""Before calls that give or take a name, and before others."""
HOWS = ("group", "action", "programs", "hosts", "TERM")
"""Who gets KILL: the action's process group, its first process alone, the programs it started on the front-end,
all that works on the hosts.  With TERM the group is asked."""
CUTS = (0.5, 0.02, 0.97)
"""Which part of the bytes passes before connections are cut."""
ENOUGH = 8 * MIB
"""Bytes that have to move if a kill is to be in their middle."""


def survived(case: Case, stage: Stage, play: Play, before: World, run: Run, line: str) -> None:
    """That after the kill that LINE tells of nothing is lost, nothing runs, and the next run is as a clean one."""
    left = world.still_running(case.kit.machines, case.kit.baseline)
    try:
        if left:
            raise Wrong(
                f"still running {world.SETTLED:.0f} s after the kill\n  expected: nothing\n  seen:\n{describe(left)}"
            )
        play.safe()
        if run.status == 0:
            play.verify(run)
        again = stage.run(play.call)
        works(case, again, play)
        clean(case, play, before, again)
    except Wrong as error:
        raise Wrong(f"killed: {line}\n{error}") from None
    case.log.append(line)


def _kill(case: Case, how: str, seconds: float = 0, moved: int = 0, total: int = 0) -> bool:
    """One kill after SECONDS, or when MOVED of TOTAL bytes have arrived, and what follows; whether it was in time."""
    stage, play = case.ready(big=bool(total))
    before = case.kit.look()
    run, arrived = case.kill(play, lambda case, process: case.end(process, how), seconds, moved)
    in_time = 0 < arrived < total if total else arrived >= 0
    at = f"when {arrived / MIB:.1f} MiB had arrived" if arrived > 0 else "before bytes had arrived"
    line = f"{how}, after {run.seconds:.3f} s, {at if arrived >= 0 else 'too late, it had ended'}: status {run.status}"
    survived(case, stage, play, before, run, f"{'stream: ' if total else ''}{line}")
    case.counts["kills"] += in_time
    if total:
        case.counts["kills in a stream"] += in_time
    return in_time


def _often(count: int, once: Callable[[str], bool]) -> None:
    """COUNT kills that are in time, as far as twice as many tries allow it, each of another kind."""
    for number in range(2 * count):
        count -= once(HOWS[number % len(HOWS)])
        if not count:
            return


def _at_random(case: Case, random_: random.Random, count: int, seconds: float) -> None:
    """COUNT kills in the SECONDS that a run takes."""

    def once(how: str) -> bool:
        nonlocal seconds
        in_time = _kill(case, how, seconds * random_.uniform(0.02, 0.95))
        seconds *= 1 if in_time else 0.9  # the run that told them may have been a slow one
        return in_time

    _often(count, once)


def can_be_killed(scene: Scene) -> bool:
    # KILL of all on a host is the end of a guest there too, but of a played one
    return not scene.fails and "persistent" not in scene.name and "of a guest" not in scene.name


@each(can_be_killed, quick=SOME)
def test_kill(case: Case) -> None:
    """KILL at random times through the action, of different processes; then it is run again."""
    stage, play = case.ready()
    random_ = random.Random(f"{case.label}{case.kit.options.seed}")
    run = stage.run(play.call)
    works(case, run, play)
    count = FEW
    if case.is_first and not (case.kit.is_full and scene_of(case).streams):
        count = max(FEW, -(-KILLS[case.kit.options.profile] // case.kit.with_action(case.subject, play.call.action)))
    _at_random(case, random_, count, run.seconds)


@each(lambda scene: can_be_killed(scene) and scene.action not in ("monitor", "monitor_ds"), quick=SOME)
def test_kill_at_call(case: Case) -> None:
    """KILL, or TERM, before each system call that gives or takes a name, and before many that change something else."""
    if why := tracing.missing() or ("" if case.kit.machines.is_own else "only hosts of the check's own are traced"):
        pytest.skip(why)
    if not case.is_first or case.kit.shown_by(case.subject, scene_of(case).action):
        pytest.skip(f"another scene, or driver with the same executable, shows it for {scene_of(case).action}")
    stage, play = case.ready()
    works(case, stage.run(play.call), play)  # connections are there from now on
    stage, play = case.ready()
    with _traced(stage, tracing.Tracing(case.kit.machines)) as traced:
        run = stage.run(play.call)
    works(case, run, play)
    points = traced.points()
    random.Random(f"{case.label}{case.kit.options.seed}").shuffle(points)
    names, others = AT_CALLS[case.kit.options.profile]
    chosen = [point for point in points if point.call in tracing.NAMES][:names]
    chosen += [point for point in points if point.call not in tracing.NAMES][:others]
    for number, point in enumerate(chosen):
        name = "TERM" if number % 4 == 3 else "KILL"
        stage, play = case.ready()
        before = case.kit.look()
        with _traced(stage, tracing.Tracing(case.kit.machines, point, name)) as traced:
            run = stage.run(play.call)
        reached = traced.reached()
        line = f"{name} {point}: {reached or 'not reached this time'}: status {run.status}"
        survived(case, stage, play, before, run, line)
        case.counts["kills"] += bool(reached)
        case.counts["kills at a system call"] += bool(reached)


@contextlib.contextmanager
def _traced(stage: Stage, traced: tracing.Tracing) -> Iterator[tracing.Tracing]:
    stage.under = traced.under
    try:
        with traced:
            yield traced
    finally:
        stage.under = []


@each(lambda scene: scene.streams)
def test_kill_in_stream(case: Case) -> None:
    """KILL while the bytes of a big image are on their way."""
    if not case.kit.machines.is_own:
        pytest.skip("bytes that arrive are counted on machines of the check's own alone")
    stage, play = case.ready(big=True)
    before = case.kit.moved(play)
    run = stage.run(play.call)
    works(case, run, play)
    total = case.kit.moved(play) - before
    random_ = random.Random(f"{case.label}{case.kit.options.seed}")
    count = IN_STREAM[case.kit.options.profile] // (1 if case.is_first else 2)
    if total < ENOUGH:
        case.log.append("no bytes move, the storage has them already: killed at random times")
        _at_random(case, random_, count, run.seconds)
        return
    _often(count, lambda how: _kill(case, how, moved=int(total * random_.uniform(0.01, 0.9)), total=total))


@each(lambda scene: scene.streams and scene.kind == "tm")
def test_cut_connection(case: Case) -> None:
    """Connections break after some bytes, and amid the work: it fails within a minute, and can be run again."""
    if not case.kit.machines.is_own:
        pytest.skip("connections are cut on the way to hosts of the check's own alone")
    if not case.is_first:
        pytest.skip(f"another scene shows it for {scene_of(case).action}")
    with Proxies(case.kit.machines) as proxies:
        stage, play = case.ready(big=True)
        proxies.tell("count")
        run = stage.run(play.call)
        proxy, passed = proxies.busiest()  # before anything else asks a host
        works(case, run, play)
        for part in CUTS:
            at = int(passed * part)
            stage, play = case.ready(big=True)
            before = case.kit.look()
            proxy.tell(f"cut-after {at}")
            run = stage.run(play.call)
            case.counts["cuts"] += proxy.tell("cut-after 0")["cuts"]
            _was_cut(case, stage, play, before, run, f"{at} of {passed} bytes to and from {proxy.name} had passed")
        if passed > ENOUGH:
            return
        stage, play = case.ready(big=True)
        before = case.kit.look()
        run, arrived = case.kill(play, lambda case, process: proxies.tell("cut"), moved=ENOUGH)
        _was_cut(case, stage, play, before, run, f"{arrived / MIB:.1f} MiB had arrived")
        case.counts["cuts"] += arrived >= 0


def _was_cut(case: Case, stage: Stage, play: Play, before: World, run: Run, when: str) -> None:
    if run.seconds > 60:
        raise Wrong(f"it notices only after {run.seconds:.0f} s that the connection is gone")
    line = f"connections cut when {when}: status {run.status}, {run.seconds:.1f} s after its start"
    survived(case, stage, play, before, run, line)
