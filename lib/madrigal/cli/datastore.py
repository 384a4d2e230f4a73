"""`madrigal datastore`: where images are kept, and which drivers handle them."""

from __future__ import annotations

import re
from typing import Any

import click

from madrigal.cli.settings import Group, Settings, document, pairs, pass_settings
from madrigal.embedded import FrontEnd
from madrigal.embedded.records import DATASTORE_TYPES, Datastore

_SECRET = re.compile("PASS|SECRET|TOKEN")


@click.group(cls=Group)
def datastore() -> None:
    """Where images are kept.  Datastore 0, `system`, is there from the start: the VMs' directories on hosts."""


def _document(front_end: FrontEnd, record: Datastore) -> dict[str, Any]:
    shown = document(record)
    shown["template"] = {k: "********" if _SECRET.search(k) else v for k, v in record.template.items()}
    shown["base_path"] = front_end.layout.base_path(record.id)
    shown["images"] = [image.id for image in front_end.images.all() if image.datastore_id == record.id]
    return shown


@datastore.command()
@click.argument("name")
@click.option("--type", "kind", type=click.Choice(list(DATASTORE_TYPES)), default="image", show_default=True)
@click.option("--ds-mad", default="fs", show_default=True, help="Datastore driver, a directory of datastore/.")
@click.option("--tm-mad", required=True, help="Transfer driver, a directory of tm/.")
@click.option("--attr", multiple=True, metavar="KEY=VALUE", help="A template attribute; can be repeated.")
@pass_settings
def create(settings: Settings, name: str, kind: str, ds_mad: str, tm_mad: str, attr: tuple[str, ...]) -> None:
    """Add a datastore.

    Unless SAFE_DIRS or RESTRICTED_DIRS is given, images may be imported from anywhere (SAFE_DIRS=/): whoever types
    commands here could read the files anyway.  A cloud's front-end would say SAFE_DIRS=/var/tmp.
    """
    with settings.front_end() as front_end:
        record = front_end.datastores.create(name, tm_mad, kind, ds_mad, pairs(attr, "--attr"))
        settings.answer(_document(front_end, record), f"datastore {record.id}: {record.name}")


@datastore.command()
@click.argument("datastore")
@click.option("--tm-mad", default="", help="Another transfer driver, while no VM uses the datastore.")
@click.option("--attr", multiple=True, metavar="KEY=VALUE", help="Set an attribute; an empty value removes it.")
@pass_settings
def update(settings: Settings, datastore: str, tm_mad: str, attr: tuple[str, ...]) -> None:
    """Change the transfer driver or the attributes of a datastore (name or id)."""
    with settings.front_end() as front_end:
        record = front_end.datastores.update(datastore, tm_mad, pairs(attr, "--attr"))
        settings.answer(_document(front_end, record), f"datastore {record.id} is changed")


@datastore.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """List the datastores; sizes in MiB, as their drivers told last."""
    with settings.front_end() as front_end:
        documents = [_document(front_end, record) for record in front_end.datastores.all()]
        columns = ("ID", "NAME", "TYPE", "DS_MAD", "TM_MAD", "TOTAL", "FREE", "IMAGES")
        keys = ("id", "name", "type", "ds_mad", "tm_mad", "total_mb", "free_mb")
        rows = [(*(d[key] for key in keys), len(d["images"])) for d in documents]
        settings.table(columns, rows, documents)


@datastore.command()
@click.argument("datastore")
@pass_settings
def show(settings: Settings, datastore: str) -> None:
    """Show a datastore (name or id)."""
    with settings.front_end() as front_end:
        settings.show(_document(front_end, front_end.datastores.get(datastore)))


@datastore.command()
@click.argument("datastore")
@pass_settings
def monitor(settings: Settings, datastore: str) -> None:
    """Ask how much room a datastore (name or id) has, and how much the disks of VMs take in it (not in 3.4)."""
    with settings.front_end() as front_end:
        record = front_end.datastores.ask(datastore)
        text = f"datastore {record.id} has {record.free_mb} of {record.total_mb} MiB free"
        settings.answer(_document(front_end, record), text)


@datastore.command()
@click.argument("datastore")
@pass_settings
def delete(settings: Settings, datastore: str) -> None:
    """Forget a datastore (name or id) that has no images; its directory stays."""
    with settings.front_end() as front_end:
        record = front_end.datastores.delete(datastore)
        settings.answer(_document(front_end, record), f"datastore {record.id} is forgotten")
