"""`madrigal image`: what VMs' disks are made from."""

from __future__ import annotations

import os
from typing import Any

import click

from madrigal.cli.settings import Group, Settings, document, pairs, pass_settings
from madrigal.embedded import FrontEnd
from madrigal.embedded.records import Image


@click.group(cls=Group)
def image() -> None:
    """What VMs' disks are made from."""


def _document(front_end: FrontEnd, record: Image) -> dict[str, Any]:
    return {**document(record), "vms": front_end.images.users(record)}


def _state(shown: dict[str, Any]) -> str:
    return "used" if shown["vms"] and shown["state"] == "READY" else str(shown["state"]).lower()


@image.command()
@click.argument("name")
@click.option("--datastore", required=True, metavar="DATASTORE", help="Name or id of an image datastore.")
@click.option("--path", default="", metavar="PATH-or-URL", help="Import this.")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Make an empty image of this many MiB; with --path, do not ask the driver for its size (not in 3.4).",
)
@click.option("--format", "form", type=click.Choice(["raw", "qcow2"]), help="Format of an empty image (not in 3.4).")
@click.option("--fs", default="", metavar="FS", help="File system to make in an empty image, as ext4.")
@click.option("--type", "kind", type=click.Choice(["os", "cdrom", "datablock"]))
@click.option("--persistent", is_flag=True, help="One VM at a time uses it, and what the VM writes is kept.")
@click.option("--md5", metavar="HEX", help="Digest the imported bytes must have.")
@click.option("--sha1", metavar="HEX", help="The same.")
@click.option("--sha256", metavar="HEX", help="The same.")
@click.option("--attr", multiple=True, metavar="KEY=VALUE", help="A template attribute; can be repeated.")
@pass_settings
def create(
    settings: Settings,
    name: str,
    datastore: str,
    path: str,
    size: int | None,
    form: str | None,
    fs: str,
    kind: str | None,
    persistent: bool,
    attr: tuple[str, ...],
    **digests: str | None,
) -> None:
    """Import an image from a file or a URL, or make an empty one."""
    attrs = pairs(attr, "--attr")
    attrs.update({key: value for key, value in digests.items() if value})
    if path and "://" not in path:
        path = os.path.abspath(path)
    with settings.front_end() as front_end:
        record = front_end.images.create(
            name,
            datastore,
            path=path,
            size=size or 0,
            format=form or "",
            fs=fs,
            type=kind or "",
            persistent=persistent,
            attrs=attrs,
        )
        settings.answer(_document(front_end, record), f"image {record.id}: {record.name}, {record.size} MiB")


@image.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """List the images; sizes in MiB."""
    with settings.front_end() as front_end:
        documents = [_document(front_end, record) for record in front_end.images.all()]
        names = {record.id: record.name for record in front_end.datastores.all()}
        rows = [
            (
                *(d["id"], d["name"], names[d["datastore_id"]], d["type"].lower(), d["format"] or d["fs"] or "-"),
                *(d["size"], "yes" if d["persistent"] else "no", _state(d), len(d["vms"])),
            )
            for d in documents
        ]
        columns = ("ID", "NAME", "DATASTORE", "TYPE", "FORMAT", "SIZE", "PERSISTENT", "STATE", "VMS")
        settings.table(columns, rows, documents)


@image.command()
@click.argument("image")
@pass_settings
def show(settings: Settings, image: str) -> None:
    """Show an image (name or id)."""
    with settings.front_end() as front_end:
        settings.show(_document(front_end, front_end.images.get(image)))


@image.command()
@click.argument("image")
@click.option("--force", is_flag=True, help="Forget it even if its driver cannot remove it.")
@pass_settings
def delete(settings: Settings, image: str, force: bool) -> None:
    """Delete an image (name or id) that no VM uses."""
    with settings.front_end() as front_end:
        record = front_end.images.delete(image, force)
        settings.answer(document(record), f"image {record.id} is deleted")


@image.command()
@click.argument("image")
@click.argument("name")
@click.option("--datastore", default="", metavar="DATASTORE", help="Into this one.  [default: the image's own]")
@pass_settings
def clone(settings: Settings, image: str, name: str, datastore: str) -> None:
    """Make a copy of an image (name or id) that is not persistent (not in 3.4)."""
    with settings.front_end() as front_end:
        record = front_end.images.clone(image, name, datastore)
        settings.answer(_document(front_end, record), f"image {record.id}: {record.name}, {record.size} MiB")


@image.group(cls=Group)
def snapshot() -> None:
    """Snapshots that a VM has left in a persistent image, while no VM uses it (not in 3.4)."""


def _snapshot(settings: Settings, action: str, image: str, snapshot: str) -> None:
    with settings.front_end() as front_end:
        record = getattr(front_end.images, f"snapshot_{action}")(image, snapshot)
        left = len(record.snapshots.all) if record.snapshots else 0
        settings.answer(_document(front_end, record), f"image {record.id} has {left} snapshots")


@snapshot.command("revert")
@click.argument("image")
@click.argument("snapshot")
@pass_settings
def snapshot_revert(settings: Settings, image: str, snapshot: str) -> None:
    """Bring an image back to a snapshot (id or name)."""
    _snapshot(settings, "revert", image, snapshot)


@snapshot.command("delete")
@click.argument("image")
@click.argument("snapshot")
@pass_settings
def snapshot_delete(settings: Settings, image: str, snapshot: str) -> None:
    """Delete a snapshot (id or name) of an image."""
    _snapshot(settings, "delete", image, snapshot)


@snapshot.command("flatten")
@click.argument("image")
@click.argument("snapshot")
@pass_settings
def snapshot_flatten(settings: Settings, image: str, snapshot: str) -> None:
    """Make a snapshot the whole content of an image, and forget all its snapshots."""
    _snapshot(settings, "flatten", image, snapshot)
