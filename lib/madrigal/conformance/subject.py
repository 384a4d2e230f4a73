"""The driver under test in one of the two forms, and what it can do.

What it can do is what its directory has executables for that do not only say that they cannot.  driver.toml says the
rest; where there is none, a driver for storage that hosts share is known by having `monitor` and not `monitor_ds`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from madrigal import drivers
from madrigal.errors import NotFound, UsageError

FORMS = ("3.4", "current")
OLD_ACTIONS = {
    "datastore": ("cp", "mkfs", "rm"),
    "tm": ("clone", "ln", "mv", "mvds", "delete", "mkimage", "mkswap", "context"),
}
"""Those that 3.4 has too (docs/contract.md, "Two forms")."""

_REFUSING = ("unsupported", "unsupported_backup", "not_supported.sh")
_IDLE = ("nothing", "dummy.sh")


@dataclass(frozen=True)
class Subject:
    """A driver in one form."""

    kind: str
    """datastore or tm."""
    name: str
    directory: str
    form: str
    formats: tuple[str, ...]
    """Formats of disks and images it knows; none: it keeps nothing."""
    is_shared: bool
    """Whether front-end and hosts see the same files."""
    is_files: bool
    """Whether images and disks are files."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}[{self.form}]"

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def tree(self) -> str:
        """The directory with `datastore` and `tm`."""
        return os.path.dirname(os.path.dirname(self.directory))

    @property
    def is_old(self) -> bool:
        return self.form == "3.4"

    def executable(self, action: str) -> str:
        return f"{self.directory}/{action}"

    def cannot(self, action: str) -> str:
        """Why ACTION is not to be asked of it; "" if it can be."""
        path = self.executable(action)
        if self.is_old and action not in OLD_ACTIONS[self.kind]:
            return f"there is no {action} in 3.4"
        if not os.access(path, os.X_OK):
            return f"{self.path} has no executable {action}"
        if self.refuses(action):
            return f"{self.path} says that it cannot {action}"
        return ""

    def refuses(self, action: str) -> bool:
        return os.path.basename(os.path.realpath(self.executable(action))) in _REFUSING

    def is_idle(self, action: str) -> bool:
        """Whether it is known to have nothing to do for ACTION."""
        return os.path.basename(os.path.realpath(self.executable(action))) in _IDLE

    @property
    def actions(self) -> list[str]:
        """The executables in its directory."""
        return sorted(
            name
            for name in os.listdir(self.directory)
            if os.access(self.executable(name), os.X_OK) and os.path.isfile(self.executable(name))
        )


def of(kind: str, directory: str, form: str) -> Subject:
    tree, name = os.path.dirname(os.path.dirname(directory)), os.path.basename(directory)
    driver = drivers.read(tree, kind, name)
    if driver:
        shared = bool(driver.shared) if kind == "tm" else False
        is_files = bool(driver.formats) and driver.disk_type in ("", "FILE") and not driver.persistent_only
        return Subject(kind, name, directory, form, driver.formats, shared, is_files)
    idle = os.path.basename(os.path.realpath(f"{directory}/rm" if kind == "datastore" else f"{directory}/clone"))
    has = {
        action: os.access(f"{directory}/{action}", os.X_OK) for action in ("monitor", "monitor_ds", "mkimage", "mkfs")
    }
    refuses_mkfs = os.path.basename(os.path.realpath(f"{directory}/mkfs")) in _REFUSING
    is_files = idle not in _IDLE and (has["mkimage"] if kind == "tm" else has["mkfs"] and not refuses_mkfs)
    shared = kind == "tm" and has["monitor"] and not has["monitor_ds"]
    return Subject(kind, name, directory, form, ("raw", "qcow2") if is_files else (), shared, is_files)


def find(tree: str, datastores: Sequence[str], tms: Sequence[str], forms: Sequence[str] = ()) -> Iterator[Subject]:
    """The drivers of these names or directories, all of TREE if none is named, in FORMS.

    A driver without driver.toml is taken for one of today unless FORMS says otherwise.
    """
    named = {"datastore": datastores, "tm": tms}
    for kind in drivers.KINDS:
        names = named[kind]
        if not datastores and not tms:
            names = [
                name
                for name in sorted(os.listdir(f"{tree}/{kind}"))
                if os.path.exists(f"{tree}/{kind}/{name}/driver.toml")
            ]
        for name in names:
            directory = os.path.abspath(name) if "/" in name else f"{tree}/{kind}/{name}"
            if not os.path.isdir(directory):
                raise NotFound(f"there is no driver in {directory}: give a directory, or a name in {tree}/{kind}")
            if os.path.basename(os.path.dirname(directory)) != kind:
                raise UsageError(f"{directory} is not in a directory named {kind}, where a {kind} driver has to be")
            has_toml = os.path.exists(f"{directory}/driver.toml")
            for form in forms or (FORMS if has_toml else FORMS[1:]):
                yield of(kind, directory, form)
