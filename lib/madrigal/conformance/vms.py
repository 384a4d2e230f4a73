"""What scenes of transfer drivers begin with: a VM that was given a disk, or is about to be."""

from __future__ import annotations

import base64
from typing import Any

from madrigal.conformance.calls import Call, Run
from madrigal.conformance.scenes import Play
from madrigal.conformance.stage import Stage
from madrigal.conformance.subject import Subject

BOTH = ("raw", "qcow2")
TODAY = ("current",)
BIG = 24
"""MiB of an image that takes a while, some tenths of a second: a thousand of them are moved and compared."""


def owned(subject: Subject) -> bool:
    return subject.is_files and not subject.is_shared


def shared(subject: Subject) -> bool:
    return subject.is_files and subject.is_shared


def image_size(stage: Stage) -> int:
    return BIG if stage.is_big else 3


def described(stage: Stage, format: str, source: str = "", size: int = 0, clone: bool = True) -> str:
    """Describe the disk; returns its path."""
    original = image_size(stage)
    apart = "" if stage.is_shared == stage.subject.is_shared else "ssh"
    values: dict[str, Any] = {"clone": clone, "save": not clone, "source": source, "format": format}
    stage.disk(size=size or original, original_size=original, tm_mad_system=apart, **values)
    return f"{stage.vm_dir}/disk.0"


def of_vm(stage: Stage, host: str, name: str = "disk.0") -> list[str]:
    """What may change where a disk is made or removed."""
    disk = f"{stage.vm_dir}/{name}"
    paths = [stage.vm_dir, disk, *(disk + end for end in (".snap", ".snap/*", ".iso")), f"{stage.system}/.monitor"]
    return [stage.at(host, path) for path in paths]


def given(stage: Stage, format: str, verb: str = "clone") -> tuple[str, bytes, str]:
    """A VM that was given a disk of an image: the disk's path, what it holds, the image's path."""
    content = stage.content(image_size(stage), verb)
    image = stage.image(content, format)
    disk = described(stage, format, image, clone=verb.startswith("clone"))
    neighbour(stage)
    stage.prepare(stage.tm(verb, f"{stage.fe}:{image}", f"{stage.host}:{disk}", ds=stage.image_ds))
    return disk, content, image


def neighbour(stage: Stage) -> str:
    """Another disk of the VM, which no action on the one has a reason to touch; returns its path."""
    path = f"{stage.vm_dir}/disk.5"
    stage.machine(stage.host).write(path, b"another disk")
    return path


def silent(_run: Run) -> None:
    pass


def refused(stage: Stage, call: Call) -> Play:
    return Play(call, silent)


def snapshot(stage: Stage, disk: str, number: int) -> None:
    if "snap_create" in stage.subject.actions and not stage.subject.is_old:
        stage.prepare(stage.tm("snap_create", f"{stage.host}:{disk}", str(number), ds=stage.image_ds))
        described_snapshot(stage, number)


def described_snapshot(stage: Stage, number: int) -> None:
    """Have the front-end know snapshot NUMBER of the disk."""
    known = stage.disk(0).snapshots
    if known is None or all(one.id != number for one in known.all):
        stage.snapshots(0, number)


def newest(stage: Stage, image: str, format: str):  # type: ignore[no-untyped-def]
    """Where an image's current state is: the newest of its chain if it has one."""

    def find() -> str:
        script = '[ -L "$1.snap/0" ] && ls "$1.snap" | grep -x "[0-9]*" | sort -n | tail -1'  # else they are copies
        number = stage.machine("fe").sh(script, image, check=False).decode().strip()
        return f"{image}.snap/{number}" if format == "qcow2" and number else image

    return find


def migration(stage: Stage, action: str, directory: str = "", ds: int | None = None) -> Call:
    """ACTION for the VM that goes to the other host, to DIRECTORY (default: its own there) in the datastore DS."""
    document = base64.b64encode(stage.vm_document(stage.vm_id))
    return stage.tm(action, stage.host, stage.other, directory or stage.vm_dir, stdin=document, ds=ds)
