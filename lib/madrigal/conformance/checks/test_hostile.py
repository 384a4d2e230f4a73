"""What users write and what arrives broken: nothing of it is executed, nothing breaks but the one call."""

from __future__ import annotations

import base64
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from madrigal.conformance import broken, world
from madrigal.conformance.calls import Call, Run
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import ALL, SOME, Case, each, scene_of, works
from madrigal.conformance.scenes import Play, Scene, Wrong
from madrigal.conformance.stage import Stage
from madrigal.conformance.world import World

DUMPS = {"quick": 6, "full": 256}
EXECUTED = "a command"
LONGEST = 64 << 10
"""Bytes that an action may say about one wrong call."""

OF_IMAGES = (
    "IMAGE/PATH",
    "IMAGE/FORMAT",
    "IMAGE/FSTYPE",
    "IMAGE/FS",
    "IMAGE/SIZE",
    "IMAGE/SOURCE",
    "IMAGE/NAME",
    "IMAGE/REGTIME",
)
OF_TEMPLATES = ("MD5", "SHA1", "SHA256", "DRIVER", "DEV_PREFIX", "FORMAT", "PATH")
BY_USERS = (*OF_IMAGES, *(f"IMAGE/TEMPLATE/{name}" for name in OF_TEMPLATES))
"""Elements of a dump that whoever may make an image chooses."""
OF_DISKS = ("FS", "FORMAT", "TARGET", "DEV_PREFIX", "DRIVER", "QCOW2_OPTIONS", "SPARSE", "IMAGE", "TYPE")
NAMES = [
    "a b",
    f"it'$(touch {broken.CANARY})'",
    'q"uote',
    "semi;colon",
    f"$(touch {broken.CANARY})",
    "new\nline",
    "-rf",
    "é漢",
    "back\\slash",
    "n" * 255,
]


def _with_dump(scene: Scene) -> bool:
    return scene.kind == "datastore" or scene.action == "monitor"


def with_dump(call: Call, dump: bytes) -> Call:
    if call.stdin:
        return dataclasses.replace(call, stdin=dump)
    return dataclasses.replace(call, arguments=(dump.decode("latin-1").replace("\0", "x"), *call.arguments[1:]))


def dump_of(call: Call) -> bytes:
    return call.stdin or call.arguments[0].encode()


def _survives(case: Case, run: Run, play: Play, before: World, what: str) -> None:
    """That a call with something wrong in it did no harm, whether it failed or could live with it."""
    after = case.kit.look()
    if canaries := [path for path in after.files if broken.CANARY in path and path not in before.files]:
        raise Wrong(f"{what}\n  expected: a value\n  seen:     {EXECUTED}, which made {canaries}")
    if run.hung:
        raise Wrong(f"{what}: it hangs")
    if "Traceback (most recent call last)" in run.stderr or run.status < 0:
        raise Wrong(f"{what}\n  expected: one sentence\n  seen:     status {run.status}, {run.stderr[-600:]}")
    if len(run.stderr) + len(run.stdout) > LONGEST:
        raise Wrong(f"{what}\n  expected: one sentence\n  seen:     {len(run.stderr) + len(run.stdout)} bytes")
    if run.status and not run.message.strip():
        raise Wrong(f"{what}: status {run.status} without a message")
    changes = before.changes(after)
    if run.status:
        if changes:
            raise Wrong(f"{what}: status {run.status}, left over\n  expected: as before\n  seen:\n{describe(changes)}")
        return
    made = [Path(word) for word in run.stdout.split() if word.startswith("/")]  # perhaps below another BASE_PATH
    allowed = [*case.kit.allowed(play, run), *play.astray, *(f"fe:{path}*" for path in made)]
    allowed += [f"fe:{parent}" for path in made for parent in path.parents if f"fe:{parent}" not in before.files]
    if changes := world.unexpected(changes, allowed):
        raise Wrong(f"{what}: status 0\n  expected: nothing but the result\n  seen:\n{describe(changes)}")


def _forget(case: Case) -> None:
    """Failures show the last runs only."""
    if case.runs and len(case.runs) > 4:
        del case.runs[:-1]


@each(lambda scene: _with_dump(scene) and not scene.fails, quick=SOME)
def test_broken_dumps(case: Case) -> None:
    """Cut off, no XML, entities, missing, doubled and huge elements: one sentence, and nothing is left."""
    stage, play = case.ready()
    if case.is_first:
        dumps = [*broken.always(), *broken.dumps(dump_of(play.call), DUMPS[case.kit.options.profile], case.label)]
    else:
        dumps = list(broken.dumps(dump_of(play.call), DUMPS[case.kit.options.profile] // 5, case.label))
    before = case.kit.look()
    for what, dump in dumps:
        if case.subject.is_old and len(dump) > 120_000:
            continue  # no argument can be so long
        run = stage.run(with_dump(play.call, dump), limit=60)
        try:
            _survives(case, run, play, before, f"a dump that is wrong: {what}")
            case.counts["broken dumps"] += 1
        finally:
            _forget(case)
        if run.status == 0 and before.changes(case.kit.look()):
            stage, play = case.ready()
    case.log.append(f"{len(dumps)} dumps")


@each(lambda scene: _with_dump(scene) and not scene.fails and scene.kind == "datastore", quick=SOME)
def test_large_dump(case: Case) -> None:
    """70 MiB, and a whole one with elements that nobody knows."""
    stage, play = case.ready()
    before = case.kit.look()
    if not case.subject.is_old:
        text = base64.b64decode(dump_of(play.call))
        large = base64.b64encode(text[:-24] + b"<X>" + b"x" * (56 << 20) + b"</X></DS_DRIVER_ACTION_DATA>")
        run = stage.run(with_dump(play.call, large), limit=120)
        _survives(case, run, play, before, "a dump of 75 MiB")
        stage, play = case.ready()
    known = broken.of_attribute(dump_of(play.call), "IMAGE/NEW_IN_THE_NEXT_VERSION", "x")
    run = stage.run(with_dump(play.call, broken.of_attribute(known, "FUTURE/THING", "y")))
    works(case, run, play)


def _attributes(scene: Scene) -> bool:
    return scene.kind == "datastore" and not scene.fails and scene.action in ("cp", "mkfs", "stat", "clone")


@each(_attributes)
def test_hostile_attributes(case: Case) -> None:
    """Commands, quotes, blanks and other places in what users may write: they are values."""
    if not case.is_first and scene_of(case).name != "cp from a web server":
        pytest.skip(f"another scene shows it for {scene_of(case).action}")
    _attribute_by_attribute(case, [(path, value) for path in BY_USERS for value in _some(case, path)])


@each(lambda scene: scene.name in ("cp raw", "mkfs raw", "mkfs raw with ext4", "stat raw"), quick=ALL)
def test_injection(case: Case) -> None:
    """The most usual commands in what users may write: none is executed."""
    values = [value for value in broken.injections() if broken.CANARY in value]
    if not case.kit.is_full:
        values = [values[0], values[2], values[4]]
    paths = ("IMAGE/PATH", "IMAGE/TEMPLATE/MD5") if scene_of(case).action == "cp" else ("IMAGE/FS", "IMAGE/PATH")
    places = [("IMAGE/PATH", f"http://127.0.0.1:1/x{end}") for end in values] if scene_of(case).action == "cp" else []
    _attribute_by_attribute(case, [(path, value) for path in paths for value in values] + places)


def _attribute_by_attribute(case: Case, asked: Sequence[tuple[str, str]]) -> None:
    """All of (element, value), one after the other; what is executed is told before what is left over."""
    stage, play = case.ready()
    before = case.kit.look()
    wrong: list[str] = []
    for path, value in asked:
        dump = broken.of_attribute(dump_of(play.call), path, value)
        run = stage.run(with_dump(play.call, dump), limit=60)
        try:
            _survives(case, run, play, before, f"{path} is {value!r}")
        except Wrong as error:
            wrong.append(f"{error}\n{run.script() if EXECUTED in str(error) else ''}".rstrip())
        _forget(case)
        if before.changes(case.kit.look()):
            stage, play = case.ready()
    if wrong:
        raise Wrong("\n\n".join(sorted(wrong, key=lambda text: EXECUTED not in text)[:8]))


@each(lambda scene: scene.name in ("cp raw", "stat raw"), quick=SOME)
def test_names(case: Case) -> None:
    """Image files with blanks, quotes, newlines, leading dashes, of 255 bytes: they are imported like any other."""
    stage, play = case.ready()
    scene = scene_of(case)
    for name in NAMES if case.kit.is_full else NAMES[:5]:
        stage, play = case.ready()
        path = f"{stage.import_dir}/{name}"
        stage.put("fe", path, stage.content(5 if scene.action == "stat" else 3))
        before = case.kit.look()
        run = stage.run(with_dump(play.call, broken.of_attribute(dump_of(play.call), "IMAGE/PATH", path)))
        try:
            _survives(case, run, play, before, "what is left")
            works(case, run, play)
        except Wrong as error:
            raise Wrong(f"a file called {name!r}: {error}") from None


def _of_vm(scene: Scene) -> bool:
    return (
        scene.kind == "tm"
        and not scene.fails
        and scene.name
        in (*("clone raw", "mkimage raw with ext4", "ln raw", "cpds raw", "snap_create raw", "resize raw", "mvds raw"),)
    )


@each(_of_vm)
def test_hostile_disk(case: Case) -> None:
    """The same in the attributes of a VM's disk, which a driver asks the front-end for."""
    if case.subject.is_old:
        pytest.skip("3.4 asks nobody about a VM")
    for attribute in OF_DISKS:
        for value in _some(case, attribute):
            _hostile_disk(case, attribute, value)


@each(lambda scene: scene.name == "mkimage raw with ext4", quick=ALL)
def test_injection_by_disk(case: Case) -> None:
    """Commands as the file system of a volatile disk: none is executed."""
    if case.subject.is_old:
        stage, play = case.ready()
        for value in broken.injections()[:5]:
            before = case.kit.look()
            arguments = (play.call.arguments[0], value, *play.call.arguments[2:])
            run = stage.run(dataclasses.replace(play.call, arguments=arguments), limit=60)
            _survives(case, run, play, before, f"the format is {value!r}")
        return
    for value in broken.injections()[:5]:
        _hostile_disk(case, "FS", value)


def _some(case: Case, attribute: str) -> list[str]:
    """A few values, for each attribute of each driver others."""
    return random.Random(f"{case.label}{attribute}{case.kit.options.seed}").sample(broken.injections(), 3)


def _hostile_disk(case: Case, attribute: str, value: str) -> None:
    stage, play = case.ready()
    before = case.kit.look()
    with _changed(stage, attribute, value):
        run = stage.run(play.call, limit=60)
        case.log.append(f"{attribute}={value[:30]!r}: status {run.status}")
        _survives(case, run, play, before, f"the disk's {attribute} is {value!r}")
    _forget(case)


class _changed:
    """The VM's disk 0 with an attribute that has another value."""

    def __init__(self, stage: Stage, attribute: str, value: str) -> None:
        self._disk, self._attribute, self._value = stage.disk(), attribute, value

    def __enter__(self) -> None:
        self._before = dict(vars(self._disk))
        field = self._attribute.lower()
        if field in vars(self._disk) and isinstance(self._before[field], str):
            setattr(self._disk, field, self._value)
        else:
            self._disk.attributes = {**self._disk.attributes, self._attribute: self._value}

    def __exit__(self, *_: object) -> None:
        vars(self._disk).update(self._before)


def wrong_arguments(play: Play) -> Iterator[tuple[str, ...]]:
    """The play's arguments with too few, too many, or one that is none."""
    given = play.call.arguments
    yield ()
    yield given[:-1]
    yield (*given, "x", "y", "z", "1")
    for number in range(len(given)):
        for value in ("", "-oProxyCommand=id", f"$(touch /tmp/{broken.CANARY})", "../../etc", "x" * 5000, "é\n"):
            yield (*given[:number], value, *given[number + 1 :])


@each(lambda scene: not scene.fails, quick=SOME)
def test_wrong_arguments(case: Case) -> None:
    """Too few, too many, or none that the contract knows: one sentence, nothing is changed."""
    stage, play = case.ready()
    if not case.is_first:
        pytest.skip(f"another scene shows it for {play.call.action}")
    before = case.kit.look()
    calls = list(wrong_arguments(play))
    for arguments in calls:
        run = stage.run(dataclasses.replace(play.call, arguments=arguments), limit=60)
        try:
            _survives(case, run, play, before, f"arguments {[word[:60] for word in arguments]}")
            if not arguments and run.status == 0:
                raise Wrong("no arguments\n  expected: another status than 0\n  seen:     status 0, a false success")
        finally:
            _forget(case)
        if run.status == 0 and before.changes(case.kit.look()):
            stage, play = case.ready()
    case.log.append(f"{len(calls)} calls")


@each(
    lambda scene: scene.name in ("cp raw", "clone raw", "mkimage raw", "mkswap", "context") and not scene.fails,
    quick=SOME,
)
def test_links(case: Case) -> None:
    """Where the result will be is a link to another file: that file stays as it is."""
    stage, play = case.ready()
    run = stage.run(play.call)
    works(case, run, play)
    if case.subject.kind == "tm":
        disk = next(word for word in play.call.arguments if word.startswith(f"{stage.host}:"))
        host, path = stage.host, disk.partition(":")[2]
    else:
        host, path = "fe", run.stdout.split(" ")[0].strip()
    stage, play = case.ready()
    victim = f"{path.rpartition('/')[0]}/victim"
    stage.machine(host).sh('mkdir -p "${1%/*}" && echo victim >"$1" && ln -s "$1" "$2"', victim, path)
    run = stage.run(play.call)
    seen = stage.machine(host).run("cat", victim)
    if seen != b"victim\n":
        raise Wrong(
            f"{path} was a link to another file\n  expected: that file as before\n  seen:     it has {len(seen)} bytes"
        )
    if run.status == 0 and case.subject.kind == "tm":  # an image that has its name counts as imported
        play.verify(run)
