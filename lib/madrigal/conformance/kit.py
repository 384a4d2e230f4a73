"""One run of the check: the machines, the drivers, and scenes brought about again and again.

A scene is prepared once, with the driver's own actions; the files it then consists of are kept and put back for every
check.  Its first clean run is kept too, with all that was seen of it: many checks look at that one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from madrigal.conformance import world
from madrigal.conformance.answers import Answers, furnish, point
from madrigal.conformance.calls import Run
from madrigal.conformance.faults import Fakes
from madrigal.conformance.machines import Machine, Machines, OwnMachine
from madrigal.conformance.scenes import Play, Scene, load
from madrigal.conformance.stage import Stage
from madrigal.conformance.subject import Subject, find, of
from madrigal.conformance.web import Web
from madrigal.conformance.world import World
from madrigal.embedded.front_end import default_tree

PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Options:
    """What `madrigal check` was asked."""

    tree: str
    datastores: tuple[str, ...] = ()
    tms: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    profile: str = "quick"
    only: str = ""
    """A pytest expression: names of checks, drivers, scenes."""
    junit: str = ""
    json: str = ""
    html: str = ""
    prepare: str = ""
    """A tree whose drivers bring about what checks begin with; "": the driver under test does."""
    seed: int = 0
    jobs: int = 1
    """How many scenes are played at a time, each on machines of its own."""
    queue: str = ""
    """A file with the number of the next scene, for several processes that play all of them together."""
    pytest: tuple[str, ...] = ()
    """More words for pytest."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all that can be checked of the project's own drivers."""
        selected = self.datastores or self.tms or self.hosts or self.forms or self.only or self.pytest
        is_ours = os.path.realpath(self.tree) == os.path.realpath(default_tree())
        return self.profile == "full" and is_ours and not selected

    def words(self) -> list[str]:
        """Those of `python3 -m madrigal.conformance` for the same."""
        return [json.dumps(asdict(self))]


@dataclass
class Observation:
    """A scene's first clean run, and the worlds around it."""

    stage: Stage
    play: Play
    run: Run
    before: World
    after: World
    left: list[str]
    """What was still running."""
    runs: list[Run] = field(default_factory=list)
    wrong: str = ""
    """What `verify` said."""


class Kit:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.subjects = list(find(options.tree, options.datastores, options.tms, options.forms))
        self.scenes = load()
        self._ready: dict[tuple[Subject, str, bool], tuple[Stage, Play]] = {}
        self._notes: dict[tuple[Subject, str, bool], int] = {}
        self._seen: dict[tuple[Subject, str], Observation] = {}
        self._machines: Machines | None = None
        self._tree = ""
        self._down = ""
        self._settled = 0
        self._fakes: dict[str, Fakes] = {}
        self.progress = 0
        """Bytes that were where a play's bytes arrive when it was last interrupted."""

    def before(self, subject: Subject) -> list[Subject]:
        """The drivers that come before this one by name."""
        known = {one.directory for one in self.subjects if one.kind == subject.kind}
        return [of(subject.kind, path, subject.form) for path in sorted(known) if path < subject.directory]

    def shown_by(self, subject: Subject, action: str) -> str:
        """The driver before it with the same executable for ACTION and the same kind of storage; "" if none is."""
        path = os.path.realpath(subject.executable(action))
        for other in self.before(subject):
            alike = (other.is_shared, other.is_files) == (subject.is_shared, subject.is_files)
            if alike and os.path.realpath(other.executable(action)) == path:
                return other.path
        return ""

    def with_action(self, subject: Subject, action: str) -> int:
        """How many drivers that are checked have ACTION."""
        others = [one for one in self.subjects if (one.kind, one.form) == (subject.kind, subject.form)]
        return sum(not one.cannot(action) for one in others)

    @property
    def is_full(self) -> bool:
        return self.options.profile == "full"

    @property
    def machines(self) -> Machines:
        if self._machines is None:
            trees = {path for one in self.subjects for path in (one.tree, one.directory)} | {
                self.options.prepare or self.options.tree
            }
            library = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
            wanted = (*trees, library, sys.prefix, sys.base_prefix)
            keep = {os.path.realpath(path) for path in wanted if os.path.realpath(path).startswith("/tmp/")}
            keep |= {path for path in os.environ.get("RUBYLIB", "").split(":") if path.startswith("/tmp/")}
            outer = [path for path in sorted(keep) if not any(path.startswith(f"{other}/") for other in keep)]
            self._machines = Machines(self.options.hosts, outer)
            self.answers, self.web = Answers(), Web()
            self.baseline = {key: machine.pids() for key, machine in self._machines.machines.items()}
        return self._machines

    def reach(self) -> None:
        """Have the machines; raises HostUnreachable if one that was given is none."""
        assert self.machines

    def down(self) -> str:
        """The name of a host that is down."""
        if not self._down:
            self._down = "host09"
            self.machines.add(self._down)
            self.machines.end(self._down)
        return self._down

    @property
    def fakes(self) -> dict[str, Fakes]:
        """By machine; none where the machines are not the check's own."""
        if not self._fakes:
            self._fakes = {key: Fakes(machine) for key, machine in self.machines.machines.items() if machine.own}
        return self._fakes

    def close(self) -> None:
        if self._machines:
            self.answers.close()
            self.web.close()
            self._machines.close()

    # -- scenes ------------------------------------------------------------------------------------------------

    def stage(self, subject: Subject) -> Stage:
        """An empty one, with nothing but bystanders on the machines."""
        if self._tree != subject.tree:
            (point if self._tree else furnish)(self.machines, subject.tree)
            self._tree = subject.tree
        self.wipe()
        stage = self._stage(subject)
        stage.bystanders()
        return stage

    def _stage(self, subject: Subject, number: int = 0) -> Stage:
        helper = None
        if self.options.prepare:
            helper = of(subject.kind, f"{self.options.prepare}/{subject.path}", subject.form)
        stage = Stage(self.machines, subject, self.answers, helper, number)
        stage.web = self.web
        return stage

    def crowd(self, subject: Subject, scene: Scene, count: int) -> list[tuple[Stage, Play]]:
        """SCENE for COUNT different VMs and images at the same time."""
        self.stage(subject)
        stages = [self._stage(subject, number) for number in range(count)]
        return [(stage, scene.build(stage, scene.format)) for stage in stages]

    @property
    def is_stirred(self) -> bool:
        """Whether an action was run since all was settled."""
        return self._machines is not None and self.answers.started > self._settled

    def ready(self, subject: Subject, scene: Scene, big: bool = False) -> tuple[Stage, Play]:
        """SCENE for SUBJECT, as if nothing had happened yet; BIG: with much to move."""
        key = (subject, scene.name, big)
        if key in self._ready:
            stage, play = self._ready[key]
            if self._tree != subject.tree:
                self.stage(subject)
            self._restore(key)
            stage.runs.clear()
            del stage.notes[self._notes[key] :]
            return stage, play
        stage = self.stage(subject)
        stage.is_big = big
        play = scene.build(stage, scene.format)
        self._save(key)
        self._ready[key] = stage, play
        self._notes[key] = len(stage.notes)
        return stage, play

    def forget(self, subject: Subject, scene: Scene) -> None:
        """The scene is over."""
        self._seen.pop((subject, scene.name), None)
        for big in (False, True):
            key = (subject, scene.name, big)
            if self._ready.pop(key, None):
                del self._notes[key]
                for name in self.machines.machines:
                    os.unlink(self._file(key, name))

    def _directories(self, machine: Machine) -> list[str]:
        own = list(self.machines.owned)
        if machine is self.machines.fe:
            own += [*self.machines.shared, self.machines.work + "/home", self.machines.imports]
        return own

    def _file(self, key: tuple[Subject, str, bool], machine: str) -> str:
        directory = f"{self.machines.work}/saved"
        os.makedirs(directory, exist_ok=True)
        name = "".join(char if char.isalnum() else "-" for char in f"{key[0]}-{key[1]}-{key[2]}")
        return f"{directory}/{name}.{machine}"

    def _save(self, key: tuple[Subject, str, bool]) -> None:
        for name, machine in self.machines.machines.items():
            script = 'cd / && for d; do [ ! -e "$d" ] || echo "${d#/}"; done | tar -cSpf - -T -'
            with open(self._file(key, name), "wb") as file:
                argv = machine.argv(["sh", "-c", script, "sh", *self._directories(machine)])
                subprocess.run(argv, stdout=file, stderr=subprocess.DEVNULL, check=True)

    def _restore(self, key: tuple[Subject, str, bool]) -> None:
        self.wipe()
        started = []
        for name, machine in self.machines.machines.items():
            with open(self._file(key, name), "rb") as file:
                argv = machine.argv(["tar", "-C", "/", "-xpf", "-"])
                started.append(subprocess.Popen(argv, stdin=file, stderr=subprocess.DEVNULL))
        for process in started:
            process.wait()

    def wipe(self) -> None:
        """Remove what is in the datastores, and in the machines' own /tmp."""
        for machine in self.machines.machines.values():
            machine.empty(self._directories(machine))
            if machine.own:
                machine.empty(["/tmp"], sorted({path.split("/")[2] for path in self.machines.kept}))

    # -- looking -----------------------------------------------------------------------------------------------

    def look(self) -> World:
        return world.look(self.machines)

    def observe(self, subject: Subject, scene: Scene) -> Observation:
        """The first clean run of SCENE."""
        key = (subject, scene.name)
        if key not in self._seen:
            stage, play = self.ready(subject, scene)
            before = self.look()
            run = stage.run(play.call, watch=True)
            left = world.still_running(self.machines, self.baseline)
            self._seen[key] = seen = Observation(stage, play, run, before, self.look(), left, [run])
            self.settle()
            if not scene.fails and not run.status:
                try:
                    play.verify(run)
                except Exception as error:
                    seen.wrong = str(error) or repr(error)
        return self._seen[key]

    def look_anew(self) -> None:
        """The driver is another one from now on."""
        self._seen.clear()

    def settle(self) -> None:
        """Let what was stopped go on, what hangs end, and all programs be what they are."""
        self._settled = self.answers.started
        for machine in self.machines.machines.values():
            if isinstance(machine, OwnMachine):
                machine.signal(signal.SIGCONT)
                machine.signal(signal.SIGKILL, lambda words: words != [""] and not world.is_connection(words))
        for fakes in self.fakes.values():
            fakes.clear()

    def moved(self, play: Play) -> int:
        """Bytes on the disk where the play's bytes arrive."""
        key, _, directory = play.moves.partition(":")
        machine = self.machines.machines.get(key)
        if not isinstance(machine, OwnMachine):
            return 0
        total = 0
        for base, _, names in os.walk(f"/proc/{machine.pid}/root{directory}"):
            for name in names:
                try:
                    total += os.lstat(f"{base}/{name}").st_blocks * 512
                except OSError:
                    pass
        return total

    def allowed(self, play: Play, run: Run | None = None) -> list[str]:
        """Patterns of what PLAY may change."""
        found = [one for one in play.changes if one != "SOURCE"]
        if "SOURCE" in play.changes and run and run.stdout:
            found.append(f"fe:{run.stdout.split(' ')[0].strip()}")
        return found

    def unexpected(self, play: Play, before: World, after: World, run: Run | None = None) -> list[str]:
        return world.unexpected(before.changes(after), self.allowed(play, run))


def describe(changes: Sequence[str]) -> str:
    return "\n".join(f"  {change}" for change in changes[:20])
