"""The pytest plug-in: gives each check the drivers and scenes that it is for, and collects what they say.

A check is a function `test_...(case)` of a module in checks/, under the decorator `each` here.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from madrigal.conformance import world
from madrigal.conformance.calls import Run
from madrigal.conformance.kit import Kit, Observation, describe
from madrigal.conformance.machines import OwnMachine
from madrigal.conformance.report import Report, Result
from madrigal.conformance.scenes import Play, Scene, Unfit, Wrong
from madrigal.conformance.stage import Stage, Unprepared
from madrigal.conformance.subject import OLD_ACTIONS, Subject
from madrigal.conformance.world import World

Popen = subprocess.Popen[bytes]
ALL, FIRST, SOME, NONE = "all", "first", "some", "none"


def each(
    scenes: Callable[[Scene], bool] | None = None, quick: str = NONE, what: Callable[[Subject], list[str]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Play the check for each of SCENES (default: all) or, with WHAT, for each of its words.

    QUICK: for all of them in the quick profile too, for the first of each action (FIRST) or driver (SOME), or for none.
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.__dict__["asks"] = (scenes or (lambda scene: True), quick, what)
        return function

    return mark


@dataclass
class Case:
    """One check of one driver, perhaps in one scene."""

    kit: Kit
    subject: Subject
    scene: Scene | None
    word: str
    skip: str = ""
    stage: Stage | None = None
    runs: list[Run] | None = None
    log: list[str] = field(default_factory=list)
    """What a check wants to have told, also of what holds."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many kills and such there were."""

    @property
    def label(self) -> str:
        return f"{self.subject}-{self.scene.name if self.scene else self.word}"

    @property
    def is_first(self) -> bool:
        """Whether its scene is the first one of its action for this driver."""
        of_action = [one for one in self.kit.scenes if self.scene and one.action == self.scene.action]
        return self.scene is next((one for one in of_action if not one.unfit(self.subject)), None)

    def observe(self) -> Observation:
        assert self.scene
        with fit():
            seen = self.kit.observe(self.subject, self.scene)
        self.stage = seen.stage
        self.runs = seen.runs
        return seen

    def ready(self, big: bool = False) -> tuple[Stage, Play]:
        assert self.scene
        with fit():
            stage, play = self.kit.ready(self.subject, self.scene, big)
        self.stage, self.runs = stage, stage.runs
        return stage, play

    def crowd(self, count: int) -> list[tuple[Stage, Play]]:
        assert self.scene
        with fit():
            found = self.kit.crowd(self.subject, self.scene, count)
        self.stage, self.runs = found[0][0], []
        return found

    def empty(self) -> Stage:
        """A stage with nothing but bystanders."""
        self.stage = self.kit.stage(self.subject)
        self.runs = self.stage.runs
        return self.stage

    # -- ending it -----------------------------------------------------------------------------------------------

    def kill(
        self, play: Play, how: Callable[[Case, Popen], None], seconds: float = 0, moved: int = 0
    ) -> tuple[Run, int]:
        """Start the play's action and do HOW to it after SECONDS, or when MOVED bytes have arrived; its run to the end.

        Also how many bytes had arrived then; -1 if it had ended before.
        """
        assert self.stage
        base, since, arrived = self.kit.moved(play) if play.moves else 0, time.monotonic(), -1
        process = self.stage.start(play.call)
        self.stage.feed(play.call, process)
        while process.poll() is None:
            if moved:
                is_time = self.kit.moved(play) - base >= moved
            else:
                is_time = time.monotonic() - since >= seconds
            if is_time:
                arrived = max(0, self.kit.moved(play) - base) if play.moves else 0
                how(self, process)
                break
            time.sleep(0.002)
        return self.stage.finish(play.call, process, since), arrived

    def end(self, process: Popen, how: str) -> None:
        """KILL, of whom HOW says; with TERM the process group is asked."""
        if how == "TERM":
            self.signal(process, signal.SIGTERM)
        elif how == "group" or (how == "hosts" and not self.kit.machines.is_own):
            self.signal(process, signal.SIGKILL)
        elif how == "hosts":
            self.signal_hosts(signal.SIGKILL, lambda words: words != [""])
        else:
            # what starts it is another process only where it is started in namespaces
            action = _children(process.pid)[:1] if self.kit.machines.is_own else [process.pid]
            for pid in action if how == "action" else _below(action):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @staticmethod
    def signal(process: Popen, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def signal_hosts(self, number: int, which: Callable[[list[str]], bool]) -> None:
        for machine in self.kit.machines.hosts:
            if isinstance(machine, OwnMachine):
                machine.signal(number, which)

    def script(self) -> str:
        """What was run, for a person to run it again."""
        lines = [f"# {note}" for note in (self.stage.notes if self.stage else [])]
        for run in (self.runs or [])[-6:]:
            lines += ["", run.script()]
        if self.stage and self.stage.vm.disks and self.subject.kind == "tm" and not self.subject.is_old:
            lines += ["", "# what `onevm show -x` says:", self.stage.vm_document(self.stage.vm_id).decode()]
        return "\n".join(lines).strip()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _below(pids: list[int]) -> list[int]:
    """All that descend from PIDS."""
    found = []
    todo = [child for pid in pids for child in _children(pid)]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += _children(pid)
    return found


@contextlib.contextmanager
def fit() -> Iterator[None]:
    """Skip, by name, what cannot be brought about."""
    try:
        yield
    except (Unfit, Unprepared) as error:
        pytest.skip(str(error))


def works(case: Case, run: Run, play: Play) -> None:
    """That RUN did what PLAY says; raises Wrong."""
    if run.hung:
        raise Wrong(f"{run.call.action} hangs: it had to be ended after {run.seconds:.0f} s")
    if run.status:
        raise Wrong(
            f"{run.call.action} fails\n  expected: status 0\n  seen:     status {run.status}: {run.message[:600]}"
        )
    play.verify(run)


def _case(item: pytest.Item) -> Case:
    case: Case = item.callspec.params["case"]  # type: ignore[attr-defined]
    return case


def _scene(item: pytest.Item) -> tuple[str, str]:
    case = _case(item)
    return str(case.subject), case.scene.name if case.scene else ""


def _weight(group: list[pytest.Item]) -> int:
    """How long the checks of a scene take, about."""
    scene = _case(group[0]).scene
    return len(group) + (40 if scene is None or scene.streams else 20 if scene.kind == "datastore" else 0)


class Plugin:
    def __init__(self, kit: Kit, report: Report) -> None:
        self.kit, self.report = kit, report

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        scenes, quick, what = metafunc.function.asks
        cases: list[Case] = []
        for subject in self.kit.subjects:
            found = []
            if what is not None:
                found = [Case(self.kit, subject, None, word) for word in what(subject)]
            else:
                for scene in self.kit.scenes:
                    if not scenes(scene) or (unfit := scene.unfit(subject)) == "-":
                        continue
                    found.append(Case(self.kit, subject, scene, "", unfit or self._out_of_reach(subject)))
            if what is None:
                found = self._thorough(found, quick) if self.kit.is_full else self._quick(found, quick)
            cases += found
        metafunc.parametrize("case", cases, ids=[case.label for case in cases], indirect=False)

    def _out_of_reach(self, subject: Subject) -> str:
        """Why hosts that are given are none for SUBJECT; "" if they are."""
        if self.kit.options.hosts and subject.is_shared:
            return f"hosts that are given share no storage, which {subject.path} needs"
        return ""

    def _thorough(self, cases: list[Case], quick: str) -> list[Case]:
        """Those that the full profile has: what is more than one run is left to one of several that are the same."""
        for case in cases:
            assert case.scene
            if quick != ALL and not case.skip and not case.is_first:
                case.skip = self._left(case)
        return cases

    def _left(self, case: Case) -> str:
        """Why a scene that is not the first of its action need not be played; "" if it has to be.

        What another driver with the same executable and kind of storage shows is played for the first scene alone.
        """
        assert case.scene
        other = self.kit.shown_by(case.subject, case.scene.action)
        return other and f"most is left to {other} where the executable is the same"

    def _quick(self, cases: list[Case], quick: str) -> list[Case]:
        """Those of one check and driver that the quick profile has."""
        if quick == NONE:
            return []
        if quick == SOME:
            return [case for case in cases if not case.skip][:1]
        found = []
        for case in cases:
            assert case.scene
            if case.skip or case.is_first:
                found.append(case)
            elif quick == ALL:
                case.skip = self._left(case)
                found.append(case)
        return found

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """By driver, then by scene, so that what one scene has brought about is used at once."""
        items[:] = [item for item in items if isinstance(_case(item), Case)]  # else there is no case for a check
        subjects = {str(subject): number for number, subject in enumerate(self.kit.subjects)}
        scenes = {id(scene): number for number, scene in enumerate(self.kit.scenes)}
        items.sort(
            key=lambda item: (subjects[str(_case(item).subject)], scenes.get(id(_case(item).scene), len(scenes)))
        )

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Scene by scene, those that nobody else has taken."""
        groups = [list(group) for _, group in itertools.groupby(session.items, _scene)]
        if self.kit.options.queue:
            groups.sort(key=_weight, reverse=True)  # so that all end at about the same time
        for group in self._taken(groups):
            for item, after in zip(group, [*group[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
            case = _case(group[0])
            if case.scene:
                self.kit.forget(case.subject, case.scene)
        return True

    def _taken(self, groups: list[list[pytest.Item]]) -> Iterator[list[pytest.Item]]:
        if not self.kit.options.queue:
            yield from groups
            return
        while True:
            with open(self.kit.options.queue, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                number = int(file.read())
                file.seek(0)
                file.write(str(number + 1))
            if number >= len(groups):
                return
            yield groups[number]

    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        case = _case(item)
        if case.skip:
            pytest.skip(case.skip)
        yield
        if self.kit.is_stirred:
            self.kit.settle()

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome = yield
        report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
        if report.when != "call" and not report.failed:
            return
        case = _case(item)
        name = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
        said, script = "", ""
        if report.failed:
            error = call.excinfo.value if call.excinfo else None
            said = str(error) if isinstance(error, Wrong) else str(report.longrepr)
            script = case.script()
            report.longrepr = (
                f"{case.subject} {case.scene.name if case.scene else case.word}: {name}\n{said}\n\n{script}"
            )
        elif report.skipped:
            said = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
                "Skipped: "
            )
        what = case.scene.name if case.scene else case.word
        action = case.scene.action if case.scene else case.word
        self.report.add(
            Result(
                str(case.subject),
                name,
                action,
                what,
                report.outcome,
                said,
                script,
                report.duration,
                case.log,
                dict(case.counts),
            )
        )


def clean(case: Case, play: Play, before: World, run: Run | None = None) -> None:
    """That since BEFORE nothing changed that PLAY must not; raises Wrong.  After a failure that is anything at all."""
    allowed = case.kit.allowed(play, run) if run is None or not run.status else []
    if changes := world.unexpected(before.changes(case.kit.look()), allowed):
        expected = "as before, but for the result" if allowed else "as before"
        raise Wrong(f"left over\n  expected: {expected}\n  seen:\n{describe(changes)}")
    if left := world.still_running(case.kit.machines, case.kit.baseline):
        raise Wrong(f"still running\n  expected: nothing\n  seen:\n{describe(left)}")


def scene_of(case: Case) -> Scene:
    assert case.scene
    return case.scene


def known_actions(subject: Subject) -> list[str]:
    """Those of its executables that are actions of its form."""
    return [name for name in subject.actions if not subject.is_old or name in OLD_ACTIONS[subject.kind]]


for _name in ("pytest_runtest_call", "pytest_runtest_makereport"):
    setattr(Plugin, _name, pytest.hookimpl(hookwrapper=True)(getattr(Plugin, _name)))
