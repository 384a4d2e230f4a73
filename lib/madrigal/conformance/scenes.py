"""What an action is asked to do: a scene for each, which all checks play in their own ways.

A scene prepares a stage and gives a Play: the call, what has to hold when it has worked, and what it may change.  It is
made of what docs/contract.md says, and knows no driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from madrigal.conformance.calls import Call, Run
from madrigal.conformance.stage import Stage
from madrigal.conformance.subject import FORMS, Subject


class Wrong(AssertionError):
    """What a driver did is not what docs/contract.md says."""


class Unfit(Exception):
    """This machine has not what a scene needs."""


@dataclass
class Play:
    """A scene on a stage that is ready."""

    call: Call
    verify: Callable[[Run], None]
    """Raises Wrong unless all is as one clean run leaves it.  Called after each run that has to have worked."""
    changes: list[str] = field(default_factory=list)
    """What it may make, change or remove: patterns of `machine:path`."""
    answer: str = ""
    """A regular expression for what stdout has to be, without the newline at its end."""
    safe: Callable[[], None] = lambda: None
    """Raises Wrong if, after a kill at any moment, something is lost or half a thing is under a final name."""
    moves: str = ""
    """`machine:path` where bytes arrive, for scenes that move many; a prefix."""
    sources: list[str] = field(default_factory=list)
    """`machine:path` of what is only read."""
    astray: list[str] = field(default_factory=list)
    """What it may change instead where its dump, broken, names another place."""


Build = Callable[[Stage, str], Play]


@dataclass(frozen=True)
class Scene:
    kind: str
    action: str
    name: str
    """`clone raw`"""
    build: Build
    forms: tuple[str, ...]
    format: str
    fails: bool
    """Whether the action has to fail, and to leave everything as it is."""
    streams: bool
    """Whether it can be played with an image that takes a while."""
    needs: Callable[[Subject], bool]

    def unfit(self, subject: Subject) -> str:
        """Why it is not for SUBJECT; "" if it is.  "-": it has nothing to do with it."""
        if subject.kind != self.kind or subject.form not in self.forms or not self.needs(subject):
            return "-"
        if why := subject.cannot(self.action):
            return why
        if self.format and self.format not in subject.formats:
            return f"{subject.path} has no disks in the format {self.format}"
        return ""


SCENES: list[Scene] = []


def is_files(subject: Subject) -> bool:
    return subject.is_files


def scene(
    kind: str,
    action: str,
    what: str = "",
    forms: tuple[str, ...] = FORMS,
    formats: tuple[str, ...] = ("",),
    streams: bool = False,
    fails: bool = False,
    needs: Callable[[Subject], bool] = is_files,
) -> Callable[[Build], Build]:
    """Register a scene for ACTION, once for each of FORMATS; in 3.4 all disks are raw."""

    def register(build: Build) -> Build:
        for format in formats:
            name = " ".join(part for part in (action, format, what) if part)
            fit = tuple(form for form in forms if form != "3.4" or format in ("", "raw"))
            SCENES.append(Scene(kind, action, name, build, fit, format, fails, streams, needs))
        return build

    return register


def expect(seen: object, expected: object, what: str) -> None:
    if seen != expected:
        raise Wrong(f"{what}\n  expected: {expected}\n  seen:     {seen}")


def holds(stage: Stage, host: str, path: str, format: str, digest: str, what: str) -> None:
    """That a guest would read from PATH of HOST what has DIGEST."""
    seen = stage.read(host, path, format)
    if seen != digest:
        listed = stage.machine(host).sh('ls -ln "$1"* "$1".snap/ 2>&1 | head -20', path, check=False).decode()
        reason = "there is no such file, or it is not of its format" if not seen else f"sha256 {seen}"
        where = f"{what} does not hold what it should: {host}:{path}"
        raise Wrong(f"{where}\n  expected: sha256 {digest}\n  seen:     {reason}\n{listed}")


def exists(stage: Stage, host: str, path: str) -> bool:
    return bool(stage.machine(host).sh('if [ -e "$1" ] || [ -L "$1" ]; then echo yes; fi', path))


def gone(stage: Stage, host: str, path: str) -> None:
    if exists(stage, host, path):
        raise Wrong(f"{host}:{path} is still there\n  expected: nothing\n  seen:     a file, link or directory")


def whole(stage: Stage, host: str, path: str, format: str, *digests: str) -> Callable[[], None]:
    """That PATH, if it is there, is one of what has DIGESTS: nothing half-made has a final name."""

    def look() -> None:
        seen = stage.read(host, path, format)
        if not seen and format != "raw" and stage.machine(host).sh('if [ -f "$1" ]; then echo yes; fi', path):
            seen = "a file that is not of its format"
        if seen and seen not in digests:
            where = f"half of it has its final name: {host}:{path}"
            raise Wrong(f"{where}\n  expected: nothing, or what is whole\n  seen:     {seen}")

    return look


def kept(stage: Stage, places: list[tuple[str, str]], format: str, digest: str) -> Callable[[], None]:
    """That one of PLACES, (host, path), has what must not be lost, and that none has half of it."""

    def look() -> None:
        found = [stage.read(host, path, format) for host, path in places]
        if digest not in found:
            raise Wrong(
                f"data is lost: none of {places} holds it any more\n  expected: sha256 {digest}\n  seen:     {found}"
            )

    return look


def load() -> list[Scene]:
    """All scenes."""
    import madrigal.conformance.scenes_bridge
    import madrigal.conformance.scenes_datastore
    import madrigal.conformance.scenes_disks
    import madrigal.conformance.scenes_idle
    import madrigal.conformance.scenes_tm
    import madrigal.conformance.scenes_tm_between  # noqa: F401

    return SCENES
