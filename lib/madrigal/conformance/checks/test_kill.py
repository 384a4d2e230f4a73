"""Kills at any moment: nothing is lost, nothing half-made has a final name, and the next run ends as a clean one."""

from __future__ import annotations

import random
import signal

from madrigal.conformance import world
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import SOME, Case, clean, each, works
from madrigal.conformance.scenes import Scene, Wrong
from madrigal.conformance.stage import MIB

KILLS = {"quick": 3, "full": 20}
"""For the first scene of an action; a fifth of it for others."""
IN_STREAM = {"quick": 3, "full": 24}
HOWS = ("group", "action", "programs", "hosts", "TERM")
"""Who gets KILL: the action's process group, its first process alone, the programs it started on the front-end,
all that works on the hosts.  With TERM the group is asked."""


def _kill(case: Case, how: str, big: bool, seconds: float = 0, moved: int = 0) -> str:
    """One kill and what follows; returns a line of the log."""
    stage, play = case.ready(big)
    before = case.kit.look()
    run, arrived = case.kill(play, lambda case, process: case.end(process, how), seconds, moved)
    at = f"when {arrived / MIB:.1f} MiB had arrived" if arrived > 0 else "before bytes had arrived"
    if arrived < 0:
        at = "too late, it had ended"
    line = f"{how}, after {run.seconds:.3f} s, {at}: status {run.status}"
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
    return line


def can_be_killed(scene: Scene) -> bool:
    return not scene.fails and "persistent" not in scene.name


@each(can_be_killed, quick=SOME)
def test_kill(case: Case) -> None:
    """KILL at random times through the action, of different processes; then it is run again."""
    stage, play = case.ready()
    random_ = random.Random(f"{case.label}{case.kit.options.seed}")
    run = stage.run(play.call)
    works(case, run, play)
    count = KILLS[case.kit.options.profile]
    if not case.is_first:
        count //= 5
    for number in range(count):
        seconds = run.seconds * random_.uniform(0.02, 1.0)
        case.log.append(_kill(case, HOWS[number % len(HOWS)], False, seconds))


@each(lambda scene: scene.streams)
def test_kill_in_stream(case: Case) -> None:
    """KILL while the bytes of a big image are on their way."""
    stage, play = case.ready(big=True)
    before = case.kit.moved(play)
    run = stage.run(play.call)
    works(case, run, play)
    total = case.kit.moved(play) - before
    if total < 16 * MIB:
        case.log.append("no bytes move: the storage has them already")
        return
    random_ = random.Random(f"{case.label}{case.kit.options.seed}")
    for number in range(IN_STREAM[case.kit.options.profile]):
        moved = int(total * random_.uniform(0.01, 0.9))
        case.log.append("stream: " + _kill(case, HOWS[number % len(HOWS)], True, moved=moved))


@each(lambda scene: scene.streams and scene.kind == "tm")
def test_cut_connection(case: Case) -> None:
    """The connection breaks in the middle: it fails within a minute, and can be run again."""
    stage, play = case.ready(big=True)
    before = case.kit.look()

    def cut(case: Case, process: object) -> None:
        case.signal_hosts(signal.SIGKILL, lambda words: words[0].startswith("sshd:"))

    run, arrived = case.kill(play, cut, moved=16 * MIB)
    case.log.append(f"status {run.status}, {run.seconds:.1f} s after its start; {arrived / MIB:.1f} MiB had arrived")
    if run.seconds > 60:
        raise Wrong(f"it notices only after {run.seconds:.0f} s that the connection is gone")
    play.safe()
    if run.status == 0:
        play.verify(run)
    again = stage.run(play.call)
    works(case, again, play)
    clean(case, play, before, again)
