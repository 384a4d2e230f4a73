"""What every driver.toml says of its driver.

A driver is a directory `datastore/<name>` or `tm/<name>` with executables and a driver.toml, whose keys are the
fields of Driver and Option below.  No action reads it: what actions need of it is in madrigal/defaults.py, which
with other files is made from it (generate.py; `make generated`).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from madrigal.errors import ConfigError, NotFound, UsageError

KINDS = ("datastore", "tm")
TARGETS = ("NONE", "SELF", "SYSTEM")
ORPHANS = ("NO", "YES", "FORMAT", "MIXED", "LINEAR")
DISK_TYPES = ("FILE", "BLOCK", "RBD", "ISCSI", "GLUSTER", "SHEEPDOG", "FILESYSTEM")
TYPES = {
    "text": r".*",
    "yes/no": r"(yes|no)?",
    "words": r"[^\n]*",
    "directories": r"(/\S*( /\S*)*)?",
    "octal": r"[0-7]+",
    "raw or qcow2": r"(raw|qcow2)?",
}
"""Type of an option: what its default must look like."""

_KEYS = {"description": str, "formats": list, "sudo": list}
_OPTIONAL = {"front_end": dict, "hosts": dict, "options": dict, "refused": dict}
_TM_KEYS = {
    "shared": bool,
    "clone_target": str,
    "ln_target": str,
    "allow_orphans": str,
    "ds_migrate": bool,
    "ds_live_migrate": bool,
    "ds_migrate_snap": bool,
    "persistent_snapshots": bool,
    "live_snapshots": bool,
}
_DS_KEYS = {"persistent_only": bool, "marketplace_actions": list, "required_attributes": list}
_TM_OPTIONAL = {"driver": str, "disk_type": str, "tm_mad_system": dict}
_SYSTEM_KEYS = {"clone_target": str, "ln_target": str, "disk_type": str}
_OPTION_KEYS = {"type": str, "default": str, "help": str}
_OPTION_OPTIONAL = {"user": bool, "common": bool, "template_only": bool}
_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*(<[a-z]+>)?\Z")
_COMMAND = re.compile(r"/[\w./+-]+( [^\n#\"]*)?\Z")


@dataclass(frozen=True)
class Option:
    """One thing that can be set about a driver."""

    name: str
    """With `<fs>` in it: one option per file system, `FS_OPTS_ext4`."""
    type: str
    default: str
    help: str
    user: bool = False
    """Whether a disk or an image, which users write, may set it."""
    common: bool = False
    """Whether it stands in the file of all drivers of its kind, `datastore/datastore.conf`."""
    template_only: bool = False
    """Whether only the datastore's template can set it, and no configuration file."""


@dataclass(frozen=True)
class Driver:
    """One directory of executables, and what its driver.toml says."""

    kind: str
    name: str
    actions: tuple[str, ...]
    description: str
    formats: tuple[str, ...]
    sudo: tuple[str, ...]
    """Commands that sudo has to allow on hosts, as sudoers wants them."""
    front_end: dict[str, str]
    """What has to be installed on the front-end (programs, packages), and what for."""
    hosts: dict[str, str]
    options: tuple[Option, ...]
    refused: dict[str, str]
    """Attributes of a datastore that are refused, and what they would mean."""
    shared: bool = False
    """(The rest is of tm drivers.)  Whether system datastores are on storage that all hosts share."""
    clone_target: str = ""
    """Where the copy for a non-persistent disk takes space: NONE, SELF (the image datastore) or SYSTEM."""
    ln_target: str = ""
    allow_orphans: str = "NO"
    """Which snapshots may lose the one they were made of: one of ORPHANS, as the front-end's ALLOW_ORPHANS."""
    ds_migrate: bool = False
    """Whether the disks of a VM can go to another system datastore."""
    ds_live_migrate: bool = False
    """The same while it runs."""
    ds_migrate_snap: bool = False
    """The same with snapshots."""
    persistent_snapshots: bool = False
    """Whether the snapshots of a persistent disk stay with its image."""
    live_snapshots: bool = False
    """Whether snapshots can be taken while the VM runs."""
    driver: str = ""
    """The format that all images get, if the driver wants one."""
    disk_type: str = ""
    """What the hypervisor gets, of DISK_TYPES; files if it is not said."""
    tm_mad_system: dict[str, dict[str, str]] = field(default_factory=dict)
    """Other drivers that the system datastore of its disks may have, each with clone_target, ln_target, disk_type."""
    persistent_only: bool = False
    """(The rest is of datastore drivers.)  Whether all its images are persistent."""
    marketplace_actions: tuple[str, ...] = ()
    """What a marketplace may ask of it: export."""
    required_attributes: tuple[str, ...] = ()
    """What the template of a datastore must have."""

    @property
    def path(self) -> str:
        """`tm/ssh`"""
        return f"{self.kind}/{self.name}"


def load(tree: str) -> list[Driver]:
    """The drivers in TREE/datastore and TREE/tm, by kind and name; raises ConfigError for a wrong driver.toml."""
    found = []
    for kind in KINDS:
        for name in sorted(os.listdir(f"{tree}/{kind}")):
            driver = read(tree, kind, name)
            if driver:
                found.append(driver)
    options = [option for driver in found for option in driver.options]
    for kind in KINDS:
        of_kind = [option for driver in found if driver.kind == kind for option in driver.options]
        defaults = {option.name: option.default for option in of_kind}
        if differing := sorted({o.name for o in of_kind if o.default != defaults[o.name]}):
            raise ConfigError(f"{', '.join(differing)}: `default` must be the same in all driver.toml of {tree}/{kind}")
    if mixed := {o.name for o in options if o.user} & {o.name for o in options if not o.user}:
        raise ConfigError(f"{', '.join(sorted(mixed))}: `user` must be the same in all driver.toml of {tree}")
    return found


def find(drivers: list[Driver], name: str) -> Driver:
    """The driver called `tm/ssh`, or `ssh` where only one kind has it; raises NotFound, UsageError."""
    found = [driver for driver in drivers if name in (driver.path, driver.name)]
    if len(found) > 1:
        raise UsageError(f"'{name}' is {' and '.join(driver.path for driver in found)}: say which")
    if not found:
        raise NotFound(f"there is no driver '{name}'; there are {', '.join(driver.path for driver in drivers)}")
    return found[0]


def read(tree: str, kind: str, name: str) -> Driver | None:
    """The driver TREE/KIND/NAME; None if it has no driver.toml, which stock drivers have not."""
    directory = f"{tree}/{kind}/{name}"
    path = f"{directory}/driver.toml"
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    is_tm = kind == "tm"
    needed, optional = (_KEYS | _TM_KEYS, _OPTIONAL | _TM_OPTIONAL) if is_tm else (_KEYS, _OPTIONAL | _DS_KEYS)
    _check(path, values, needed, optional)
    for key in ("formats", "sudo", *(key for key, of in _DS_KEYS.items() if of is list and key in values)):
        if not all(isinstance(item, str) for item in values[key]):
            raise ConfigError(f"{path}: {key} is a list of texts")
        values[key] = tuple(values[key])
    for key in ("front_end", "hosts", "refused"):
        table = values.setdefault(key, {})
        _check(f"{path}, [{key}]", table, dict.fromkeys(table, str), {})
    if "\n" in values["description"]:
        raise ConfigError(f"{path}: description is one line")
    if is_tm:
        _check_words(path, values)
    for other, table in values.get("tm_mad_system", {}).items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [tm_mad_system.{other}] must be a table")
        _check(where := f"{path}, [tm_mad_system.{other}]", table, _SYSTEM_KEYS, {})
        _check_words(where, table)
    for command in values["sudo"]:
        if not _COMMAND.match(command):
            raise ConfigError(f"{path}: sudo has '{command}', expected the absolute path of a program, then arguments")
    options = [_option(f"{path}, option {name}", name, table) for name, table in values.pop("options", {}).items()]
    return Driver(kind, name, _actions(directory), **values, options=tuple(options))


def _actions(directory: str) -> tuple[str, ...]:
    """What the driver can do: its executables but those that only say that it cannot."""
    paths = {name: f"{directory}/{name}" for name in sorted(os.listdir(directory))}
    return tuple(
        name
        for name, path in paths.items()
        if os.access(path, os.X_OK) and not os.path.basename(os.path.realpath(path)).startswith("unsupported")
    )


def _option(where: str, name: str, table: Any) -> Option:
    if not isinstance(table, dict) or not _NAME.match(name):
        raise ConfigError(f"{where}: an option is a table with a name such as SAFE_DIRS")
    _check(where, table, _OPTION_KEYS, _OPTION_OPTIONAL)
    option = Option(name, **table)
    if option.type not in TYPES:
        raise ConfigError(f"{where}: type is '{option.type}', expected one of {', '.join(TYPES)}")
    if not re.fullmatch(TYPES[option.type], option.default):
        raise ConfigError(f"{where}: the default '{option.default}' is not of the type {option.type}")
    if option.default and "<" in name:
        raise ConfigError(f"{where}: an option for many names has no default")
    return option


def _check_words(where: str, values: dict[str, Any]) -> None:
    known = {
        "clone_target": TARGETS,
        "ln_target": TARGETS,
        "allow_orphans": ORPHANS,
        "disk_type": DISK_TYPES,
        "driver": ("raw", "qcow2"),
    }
    for key, words in known.items():
        if key in values and values[key] not in words:
            raise ConfigError(f"{where}: {key} is '{values[key]}', expected one of {', '.join(words)}")


def _check(where: str, values: dict[str, Any], needed: Mapping[str, type], optional: Mapping[str, type]) -> None:
    known = {**needed, **optional}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: '{key}' is not known; known are {', '.join(known)}")
        if type(value) is not known[key]:
            raise ConfigError(f"{where}: {key} must be of the type {known[key].__name__}")
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"{where}: {' and '.join(missing)} is missing")
