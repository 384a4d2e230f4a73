"""The disks of a VM that are not copied from anywhere: links, empty disks, context images; and their removal."""

from __future__ import annotations

import os

from madrigal.config import Options
from madrigal.errors import ConfigError
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BESIDE = (".snap", ".iso")
"""What may stand beside `disk.N` and goes with it: snapshots, and 3.4's second name of a context image."""


def link(image: Location, disk: Location, relative: bool, monitor: str | None = None) -> None:
    """Make DISK a symbolic link to IMAGE on the same machine; RELATIVE where machines see them at different paths."""
    path = image.checked().path
    target = os.path.relpath(path, disk.dir) if relative else path
    with Host(disk.host).session() as session:
        session.tell("need", path=path, message=f"{path} does not exist: is its datastore mounted there?")
        session.tell("hold", path=disk.dir, make="all")
        session.tell("link", target=target, path=disk.path)
        if monitor is not None:
            session.tell("mark", path=f"{os.path.dirname(disk.dir)}/.monitor", text=monitor)
    log(f"linked {disk} to {target}")


def make(disk: Location, format: str, size: int, fs: str, fs_options: Sequence[str] = ()) -> None:
    """Make DISK an empty image of SIZE bytes, with the file system FS (or `swap`) in it."""
    with Host(disk.host).session() as session:
        session.tell("hold", path=disk.dir, make="all")
        session.tell("make", path=disk.path, format=format, size=size, fs=fs, fs_options=list(fs_options))
    log(f"made {disk}, {size >> 20} MiB{' with ' + fs if fs else ''}")


def delete(target: Location) -> None:
    """Remove the disk or VM directory TARGET, and end whoever still works on it; it may be gone already."""
    is_disk = target.disk_id is not None
    within = target.dir if is_disk else target.path
    with Host(target.host).session() as session:
        there = session.call("delete", path=target.path, within=within, beside=BESIDE if is_disk else ())
    log(f"removed {target}" if there else f"{target} was gone already")


def mkfs_options(fs: str) -> list[str]:
    """The words that datastore.conf adds for mkfs (FS_OPTS_<fs>); raises ConfigError if SUPPORTED_FS has not FS."""
    import shlex

    options = Options("datastore", "fs")
    supported = options["SUPPORTED_FS"].replace(",", " ").split()
    if fs and fs != "swap" and fs not in supported:
        raise ConfigError(
            f"the file system '{fs}' is not in SUPPORTED_FS of datastore.conf ({', '.join(supported) or 'nothing'})"
        )
    return shlex.split(options["FS_OPTS_" + fs]) if fs else []
