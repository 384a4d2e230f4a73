"""`madrigal host`: the machines that VMs' disks are brought to."""

from __future__ import annotations

from typing import Any

import click

from madrigal.cli.settings import Group, Settings, document, pass_settings
from madrigal.embedded import FrontEnd
from madrigal.embedded.records import Host


@click.group(cls=Group)
def host() -> None:
    """Machines that VMs' disks are brought to, by the names under which ssh reaches them."""


def _document(front_end: FrontEnd, record: Host) -> dict[str, Any]:
    return {**document(record), "vms": [vm.id for vm in front_end.vms.all() if vm.on_host(record.id)]}


@host.command()
@click.argument("name")
@click.option(
    "--datastores",
    metavar="PATH",
    help="Where the datastores are on this host.  In today's contract that is the same on all machines.",
)
@click.option("--vmm", default="", metavar="VMM", help="A hypervisor that really runs VMs there: kvm (not in 3.4).")
@pass_settings
def create(settings: Settings, name: str, datastores: str | None, vmm: str) -> None:
    """Add a host.  It is not connected to before something is done there."""
    with settings.front_end() as front_end:
        record = front_end.hosts.create(name, datastores or "", vmm)
        settings.answer(_document(front_end, record), f"host {record.id}: {record.name}")


@host.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """List the hosts."""
    with settings.front_end() as front_end:
        documents = [_document(front_end, record) for record in front_end.hosts.all()]
        rows = [(d["id"], d["name"], d["datastores"], len(d["vms"])) for d in documents]
        settings.table(("ID", "NAME", "DATASTORES", "VMS"), rows, documents)


@host.command()
@click.argument("host")
@pass_settings
def show(settings: Settings, host: str) -> None:
    """Show a host (name or id)."""
    with settings.front_end() as front_end:
        settings.show(_document(front_end, front_end.hosts.get(host)))


@host.command()
@click.argument("host")
@pass_settings
def delete(settings: Settings, host: str) -> None:
    """Forget a host (name or id) that has no VM."""
    with settings.front_end() as front_end:
        record = front_end.hosts.delete(host)
        settings.answer(document(record), f"host {record.id} is forgotten")
