"""The disks of a VM that are not copied from anywhere: links, empty disks, context images; and their removal."""

from __future__ import annotations

import os

from madrigal.config import Options, etc_dir, read_shell
from madrigal.errors import ConfigError
from madrigal.host import Host
from madrigal.location import Location
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from madrigal.transfer.route import AnySession

BESIDE = (".snap", ".iso")
"""What may stand beside `disk.N` and goes with it: snapshots, and 3.4's second name of a context image."""


def link(
    image: Location, disk: Location, relative: bool = False, monitor: str | None = None, format: str = "raw"
) -> None:
    """Make DISK a symbolic link to the persistent IMAGE, which is of FORMAT, on the same machine.

    Of a qcow2 image, to the newest of its files (onhost/layout.py).  RELATIVE where machines see them at different
    paths.
    """
    path = image.checked().path
    with Host(disk.host).session() as session:
        session.tell("need", path=path, message=f"{path} does not exist: is its datastore mounted there?")
        session.tell("hold", path=disk.dir, make="all")
        if format == "qcow2":
            session.tell("hold", path=path)
            session.tell("link_image", source=path, path=disk.path)
        else:
            session.tell("link", target=os.path.relpath(path, disk.dir) if relative else path, path=disk.path)
        session.tell("drop", path=disk.path + ".snap")  # of a disk that was there before
        _mark(session, disk, monitor)
    log(f"linked {disk} to {image}")


def overlay(image: Location, disk: Location, size: int, monitor: str | None = None) -> None:
    """Make DISK a qcow2 disk of SIZE bytes, or as many as IMAGE has, that lies on IMAGE on the same machine."""
    path = image.checked().path
    with Host(disk.host).session() as session:
        session.tell("need", path=path, message=f"{path} does not exist: is its datastore mounted there?")
        session.tell("hold", path=disk.dir, make="all")
        session.tell("overlay", source=path, path=disk.path, size=size, options=qcow2_options())
        _mark(session, disk, monitor)
    log(f"made {disk} on {image}")


def _mark(session: AnySession, disk: Location, monitor: str | None) -> None:
    if monitor is not None:
        session.tell("mark", path=f"{os.path.dirname(disk.dir)}/.monitor", text=monitor)


def link_device(device: Location, disk: Location) -> None:
    """Make DISK a symbolic link to the block DEVICE of the same machine."""
    path = device.checked().path
    with Host(disk.host).session() as session:
        session.tell("need_device", path=path)
        session.tell("hold", path=disk.dir, make="all")
        session.tell("link", target=path, path=disk.path)
    log(f"linked {disk} to {path}")


def make(
    disk: Location, format: str, size: int, fs: str, fs_options: Sequence[str] = (), preallocate: bool = False
) -> None:
    """Make DISK an empty image of SIZE bytes, with the file system FS (or `swap`) in it.

    PREALLOCATE: with room on the disk for all of it.
    """
    options = qcow2_options() if format == "qcow2" else ""
    about = {"fs": fs, "fs_options": list(fs_options), "options": options, "preallocate": preallocate}
    with Host(disk.host).session() as session:
        session.tell("hold", path=disk.dir, make="all")
        session.tell("make", path=disk.path, format=format, size=size, **about)
    log(f"made {disk}, {size >> 20} MiB{' with ' + fs if fs else ''}")


def resize(disk: Location, format: str, size: int, preallocate: bool) -> None:
    """Let DISK, or the file it leads to, have SIZE bytes; raises NotSupported if it has more."""
    with Host(disk.host).session() as session:
        session.tell("hold", path=disk.dir)
        session.tell("resize", path=disk.path, format=format, size=size, preallocate=preallocate)
    log(f"{disk} has {size >> 20} MiB")


def delete(target: Location) -> None:
    """Remove the disk or VM directory TARGET, and end whoever still works on it; it may be gone already."""
    is_disk = target.disk_id is not None
    within = target.dir if is_disk else target.path
    with Host(target.host).session() as session:
        there = session.call("delete", path=target.path, within=within, beside=BESIDE if is_disk else ())
    log(f"removed {target}" if there else f"{target} was gone already")


def qcow2_options() -> str:
    """What an administrator says of new qcow2 images: QCOW2_OPTIONS of the front-end's tmrc."""
    return read_shell(f"{etc_dir()}/tmrc").get("QCOW2_OPTIONS", "")


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
