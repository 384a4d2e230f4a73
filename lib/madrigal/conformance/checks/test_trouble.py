"""Trouble that an administrator has: a full disk, one that cannot be written, hosts that are down or hang."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from madrigal.conformance import world
from madrigal.conformance.calls import Run
from madrigal.conformance.kit import describe
from madrigal.conformance.machines import OwnMachine
from madrigal.conformance.plugin import SOME, Case, clean, each, scene_of, works
from madrigal.conformance.proxy import Proxies
from madrigal.conformance.scenes import Play, Scene, Wrong
from madrigal.conformance.stage import SOON, Stage
from madrigal.conformance.world import World

NOTICE = 60.0
"""Seconds in which a host that is down has to be noticed; one that hangs may take twice as long."""


@contextlib.contextmanager
def _mounted(case: Case, play: Play, how: str) -> Iterator[None]:
    """With the datastore where the play's bytes arrive on a small file system (`full`), or read-only."""
    key, _, place = play.moves.partition(":")
    location = case.kit.machines.location
    directory = f"{location}/{place.removeprefix(location + '/').split('/')[0]}"
    machine = case.kit.machines.machines[key]
    if (
        key == "fe"
        and place.split("/")[-1].isdigit()
        and f"{location}/{place.split('/')[-1]}" in case.kit.machines.shared
    ):
        # what all see is written by the host, where it is not sent to the front-end
        assert case.stage
        is_sent = case.subject.kind == "datastore" or play.call.action.endswith(".ssh")
        machine = machine if is_sent else case.stage.machine(case.stage.host)
    if not machine.own:
        pytest.skip("a full or read-only disk needs machines of the check's own")
    script = {
        "full": 't=$(mktemp -d) && size=$(du -sk "$1" | cut -f1) && '
        'mount -t tmpfs -o "size=$((size + 1536))k" tmpfs "$t" && '
        'cp -a "$1/." "$t" && mount --move "$t" "$1" && rmdir "$t"',
        "read-only": 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"',
    }[how]
    machine.sh(script, directory)
    try:
        yield
    finally:
        machine.sh('umount -l "$1"', directory)


def _moves(scene: Scene) -> bool:
    return scene.streams


def _in_trouble(case: Case, how: str) -> None:
    stage, play = case.ready()
    if not play.moves:
        pytest.skip("no bytes arrive anywhere")
    before = case.kit.look()
    with _mounted(case, play, how):
        inner = case.kit.look()
        run = stage.run(play.call)
        case.log.append(f"status {run.status}: {run.message[:200]}")
        left = world.unexpected(inner.changes(case.kit.look()), [])
        if run.hung:
            raise Wrong(f"{how}: it hangs")
        if run.status == 0:
            try:
                play.verify(run)  # it may not need room at all
            except Wrong as error:
                raise Wrong(f"{how}: status 0, a false success\n{error}") from None
        elif left:
            raise Wrong(f"{how}: status {run.status}, left over\n  expected: as before\n  seen:\n{describe(left)}")
        elif not run.message.strip():
            raise Wrong(f"{how}: it fails without a message")
    play.safe()
    again = stage.run(play.call)
    works(case, again, play)
    clean(case, play, before, again)


@each(_moves, quick=SOME)
def test_full_disk(case: Case) -> None:
    """There is 1.5 MiB of room for more: it fails, says so and leaves nothing; with room it can be run again."""
    _in_trouble(case, "full")


@each(_moves)
def test_read_only(case: Case) -> None:
    """The target cannot be written: it fails, says so and leaves nothing."""
    _in_trouble(case, "read-only")


OWN = ("mv", "postmigrate", "mvds")
"""Actions that may have nothing to ask of the host: it is where a VM does not live any more."""
SHARED = (*OWN, "premigrate", "failmigrate")
"""The same, where nothing moves between hosts."""


def _names_host(scene: Scene) -> bool:
    return scene.kind == "tm" and not scene.fails and scene.action != "monitor_ds"


@each(_names_host, quick=SOME)
def test_host_down(case: Case) -> None:
    """A host is down: it fails within a minute, names the host, and changes nothing elsewhere."""
    if not case.kit.machines.is_own:
        pytest.skip("a host that is down needs hosts of the check's own")
    stage, play = case.ready()
    down = case.kit.down()
    arguments = tuple(_elsewhere(stage, word, down) for word in play.call.arguments)
    if arguments == play.call.arguments:
        pytest.skip(f"{play.call.action} names no host")
    before = case.kit.look()
    call = type(play.call)(play.call.action, arguments, play.call.stdin)
    run = stage.run(call, limit=NOTICE)
    if run.hung:
        raise Wrong(f"it does not notice within {NOTICE:.0f} s that {down} is down")
    if run.status == 0:
        if case.subject.is_files and play.call.action not in (SHARED if stage.is_shared else OWN):
            raise Wrong(f"{down} is down\n  expected: another status than 0\n  seen:     status 0, a false success")
        return
    if down not in run.message:
        raise Wrong(f"the message\n  expected: one that names {down}\n  seen:     {run.message[:300]!r}")
    if changes := before.changes(case.kit.look()):
        raise Wrong(f"it changes something although it fails\n  expected: as before\n  seen:\n{describe(changes)}")


def _elsewhere(stage: Stage, word: str, down: str) -> str:
    if word == stage.host:
        return down
    return f"{down}:{word.partition(':')[2]}" if word.startswith(f"{stage.host}:") else word


@each(lambda scene: scene.kind == "tm" and scene.name in ("clone raw", "mv raw of the directory"))
def test_network_fails(case: Case) -> None:
    """From some byte on nothing passes, and nobody is told: it fails in time, and can be run again when the network is
    back, or over new connections while the host has the old ones, of which nobody has told it that they are lost."""
    if not case.kit.machines.is_own:
        pytest.skip("networks fail on the way to hosts of the check's own alone")
    with Proxies(case.kit.machines) as proxies:
        stage, play = case.ready(big=scene_of(case).streams)
        proxies.tell("count")
        works(case, stage.run(play.call), play)
        proxy, passed = proxies.busiest()
        # until all is done again nobody on the host hears of it that connections are lost
        for how, part, then, finally_ in (("lose", 0.5, "lose-after 0", "cut"), ("hang", 0.1, "go-on", "count")):
            stage, play = case.ready(big=scene_of(case).streams)
            before = case.kit.look()
            proxy.tell(f"{how}-after {int(passed * part)}")
            run = stage.run(dataclasses.replace(play.call, env=SOON), limit=2 * NOTICE)
            proxy.tell(then)
            when = f"{int(passed * part)} of {passed} bytes to and from {proxy.name} had passed"
            case.log.append(f"{how} when {when}: status {run.status} after {run.seconds:.1f} s")
            if run.hung:
                raise Wrong(f"it does not notice within {2 * NOTICE:.0f} s that nothing comes from {proxy.name}")
            _goes_on(case, stage, play, before, run, functools.partial(proxy.tell, finally_))


@each(lambda scene: scene.name in ("clone raw", "mvds raw", "delete of the directory", "mv raw of the directory"))
def test_host_hangs(case: Case) -> None:
    """A host stops answering in the middle: it fails in time; when the host goes on, nothing is broken."""
    if case.subject.kind == "datastore" or not case.kit.machines.is_own:
        pytest.skip("a host that hangs needs hosts of the check's own")
    stage, play = case.ready()
    works(case, stage.run(play.call), play)
    duration = stage.runs[-1].seconds
    for when in (0.1, 0.5):
        stage, play = case.ready()
        before = case.kit.look()
        host = stage.machine(stage.host)
        assert isinstance(host, OwnMachine)
        since = time.monotonic()
        process = stage.start(dataclasses.replace(play.call, env=SOON))
        stage.feed(play.call, process)
        time.sleep(duration * when)
        host.signal(signal.SIGSTOP)
        try:
            run = stage.finish(play.call, process, since, 2 * NOTICE)
        finally:
            host.signal(signal.SIGCONT)
        case.log.append(f"stopped after {duration * when:.2f} s: status {run.status} after {run.seconds:.1f} s")
        if run.hung:
            raise Wrong(f"it does not notice within {2 * NOTICE:.0f} s that {stage.host} hangs")
        _goes_on(case, stage, play, before, run)


def _goes_on(
    case: Case, stage: Stage, play: Play, before: World, run: Run, end: Callable[[], object] = lambda: None
) -> None:
    """That nothing is broken when all answer again, neither before nor after the END of what is left of the trouble."""
    world.still_running(case.kit.machines, case.kit.baseline)
    play.safe()
    if run.status == 0:
        play.verify(run)
    again = stage.run(play.call)
    case.log.append(f"again: status {again.status} after {again.seconds:.1f} s")
    works(case, again, play)
    end()
    clean(case, play, before, again)
