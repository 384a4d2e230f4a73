"""`madrigal new`: the beginning of a driver, whose actions run and say that they are not written yet."""

from __future__ import annotations

import os
import re

import click

from madrigal.cli.settings import Group, Settings, pass_settings
from madrigal.embedded.front_end import default_tree
from madrigal.errors import InUse, UsageError

_RECIPE = '''#!/usr/bin/env python3
"""{what}"""

import sys

sys.path[0] += "/../../lib"
from madrigal import {module}
from madrigal.errors import NotSupported


@{module}.action
def {action}({parameters}) -> {result}:
    raise NotSupported("{action} is not written yet")


{action}()
'''

_REQUEST = "request: datastore.Request"
_TO_WRITE = {
    "datastore": {
        "cp": ("Import an image; answers SOURCE FORMAT (3.4: SOURCE SIZE_MB).", _REQUEST, "str"),
        "mkfs": ("Make an empty image; answers SOURCE (3.4: SOURCE SIZE_MB).", _REQUEST, "str"),
        "rm": ("Remove an image.", _REQUEST, "None"),
        "clone": ("Copy an image; answers SOURCE FORMAT.", _REQUEST, "str"),
        "stat": ("Tell the size of what may become an image, in MiB.", _REQUEST, "str"),
        "monitor": ("Tell the capacity of the datastore, in MiB.", _REQUEST, "str"),
    },
    "tm": {
        "clone": (
            "Give a VM its own copy of an image.",
            "image: tm.Location, disk: tm.Location, vm: tm.VM",
            "None",
        ),
        "ln": ("Let a VM use a persistent image.", "image: tm.Location, disk: tm.Location, vm: tm.VM", "None"),
        "mv": (
            "Take a VM's directory to another place.",
            "source: tm.Location, target: tm.Location, vm: tm.VM",
            "None",
        ),
        "mvds": ("Bring a persistent disk back.", "disk: tm.Location, image: tm.Location, vm: tm.VM", "None"),
        "cpds": (
            "Save a disk, or a snapshot of it, as an image.",
            "disk: tm.Location, image: tm.Location, snapshot: int, vm: tm.VM",
            "None",
        ),
        "premigrate": (
            "Make room for a VM that comes while it runs.",
            "origin: str, target: tm.Location, vm: tm.VM",
            "None",
        ),
        "postmigrate": (
            "Remove what a VM left where it came from.",
            "origin: str, target: tm.Location, vm: tm.VM",
            "None",
        ),
        "failmigrate": (
            "Remove what a VM that stayed left at the target.",
            "origin: str, target: tm.Location, vm: tm.VM",
            "None",
        ),
    },
}
_COMMON = {
    "datastore": dict.fromkeys(("export", "snap_delete", "snap_flatten", "snap_revert"), "unsupported"),
    "tm": {
        **{name: name for name in ("context", "delete", "mkimage", "mkswap", "resize")},
        **dict.fromkeys(("snap_create", "snap_create_live", "snap_delete", "snap_revert"), "unsupported"),
    },
}
"""Actions that are the same for every driver whose disks are files, and those that it cannot do at first."""

_TOML = {
    "datastore": """description = "One line about the driver."
formats = ["raw"]
sudo = []
""",
    "tm": """description = "One line about the driver."
formats = ["raw"]
shared = false
clone_target = "SYSTEM"
ln_target = "SYSTEM"
allow_orphans = "NO"
ds_migrate = false
ds_live_migrate = false
ds_migrate_snap = false
persistent_snapshots = false
live_snapshots = false
sudo = []
""",
}


@click.group(cls=Group)
def new() -> None:
    """Begin something."""


@new.command()
@click.argument("name")
@click.option("--datastore", is_flag=True, help="A datastore driver.")
@click.option("--tm", is_flag=True, help="A transfer driver.")
@click.option("--in", "directory", metavar="DIR", default=".", help="The tree to put it in.  [default: here]")
@pass_settings
def driver(settings: Settings, name: str, datastore: bool, tm: bool, directory: str) -> None:
    """Make the directories of the driver NAME, a recipe for each action, and driver.toml.

    `madrigal check` then says what is missing.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"'{name}' cannot name a driver: small letters, digits and _, a letter first")
    kinds = [kind for kind, wanted in (("datastore", datastore), ("tm", tm)) if wanted]
    if not kinds:
        raise UsageError("say what kind of driver: --datastore, --tm, or both")
    tree = os.path.abspath(directory)
    ours = default_tree()
    for kind in kinds:
        path = f"{tree}/{kind}/{name}"
        if os.path.lexists(path):
            raise InUse(f"{path} is there already: choose another name, or remove it")
        os.makedirs(path)
        for action, (what, parameters, result) in _TO_WRITE[kind].items():
            text = _RECIPE.format(what=what, module=kind, action=action, parameters=parameters, result=result)
            _write(f"{path}/{action}", text, 0o777)
        for action, same in _COMMON[kind].items():
            os.symlink(f"../common/{same}", f"{path}/{action}")
        _write(f"{path}/driver.toml", _TOML[kind], 0o666)
        _link(f"{ours}/{kind}/common", f"{tree}/{kind}/common")
        settings.answer({"driver": path}, f"{path}: write the actions, then `madrigal check --{kind} {path}`")
    _link(f"{ours}/lib", f"{tree}/lib")


def _write(path: str, text: str, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)


def _link(target: str, path: str) -> None:
    """What recipes expect beside them; in a tree that has it, that stays."""
    if not os.path.lexists(path):
        os.symlink(target, path)
