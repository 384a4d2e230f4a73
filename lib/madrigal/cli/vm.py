"""`madrigal vm`: VMs, and the events of their life that drivers are run at."""

from __future__ import annotations

import os
from typing import Any

import click

from madrigal.cli.settings import Group, Settings, document, pairs, pass_settings
from madrigal.embedded import DiskRequest, FrontEnd
from madrigal.embedded.records import DONE, VM
from madrigal.errors import UsageError

DISK_HELP = """
A disk: image=IMAGE[,size=MIB], or volatile: type=swap,size=MIB or type=fs,size=MIB[,fs=FS][,format=raw|qcow2];
in 3.4 also image=IMAGE,save-as=NAME, which makes an image of it at shutdown.
"""


@click.group(cls=Group)
def vm() -> None:
    """VMs, by name or id.  What a command does is done by drivers; if one fails, see `recover`."""


def _document(front_end: FrontEnd, record: VM) -> dict[str, Any]:
    return {**document(record), "status": record.status, "place": front_end.vms.place(record)}


def _answer(settings: Settings, front_end: FrontEnd, record: VM) -> None:
    shown = _document(front_end, record)
    place = f", disks in {shown['place']}" if shown["place"] else ""
    settings.answer(shown, f"VM {record.id} ({record.name}) is {record.status}{place}")


@vm.command()
@click.argument("name")
@click.option("--disk", "disks", multiple=True, metavar="KEY=VALUE,...", help=DISK_HELP + "The order is the disks'.")
@click.option("--context", multiple=True, metavar="KEY=VALUE", help="A variable for context.sh on the context disk.")
@click.option("--context-file", multiple=True, metavar="PATH", help="A file for the context disk; can be repeated.")
@click.option("--system-datastore", default="0", metavar="DATASTORE", help="Where its directory is.  [default: 0]")
@pass_settings
def create(
    settings: Settings,
    name: str,
    disks: tuple[str, ...],
    context: tuple[str, ...],
    context_file: tuple[str, ...],
    system_datastore: str,
) -> None:
    """Describe a VM.  Nothing is brought anywhere before `deploy`."""
    requests = [DiskRequest.parse(disk) for disk in disks]
    files = [file if "://" in file else os.path.abspath(file) for file in context_file]
    with settings.front_end() as front_end:
        record = front_end.vms.create(name, requests, pairs(context, "--context"), files, system_datastore)
        _answer(settings, front_end, record)


@vm.command("list")
@click.option("--all", "with_done", is_flag=True, help="Also those that are done.")
@pass_settings
def list_(settings: Settings, with_done: bool) -> None:
    """List the VMs."""
    with settings.front_end() as front_end:
        records = [record for record in front_end.vms.all() if with_done or record.state != DONE]
        documents = [_document(front_end, record) for record in records]
        rows = [(d["id"], d["name"], d["status"], d["place"].partition(":")[0], len(d["disks"])) for d in documents]
        settings.table(("ID", "NAME", "STATE", "HOST", "DISKS"), rows, documents)


@vm.command()
@click.argument("vm")
@pass_settings
def show(settings: Settings, vm: str) -> None:
    """Show a VM."""
    with settings.front_end() as front_end:
        settings.show(_document(front_end, front_end.vms.get(vm)))


@vm.command()
@click.argument("vm")
@click.argument("host")
@click.option("--deploy-id", default="", help="The name by which the host's hypervisor knows it.  [default: one-ID]")
@pass_settings
def deploy(settings: Settings, vm: str, host: str, deploy_id: str) -> None:
    """Provide the disks of a VM on a host."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.deploy(vm, host, deploy_id))


@vm.command()
@click.argument("vm")
@pass_settings
def stop(settings: Settings, vm: str) -> None:
    """Move the disks of a running VM to the front-end."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.stop(vm))


@vm.command()
@click.argument("vm")
@click.argument("host", required=False, default="")
@pass_settings
def resume(settings: Settings, vm: str, host: str) -> None:
    """Move the disks of a stopped or undeployed VM to a host; without one, to where they came from."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.resume(vm, host))


@vm.command()
@click.argument("vm")
@pass_settings
def undeploy(settings: Settings, vm: str) -> None:
    """Move the disks of a running or powered-off VM to the front-end (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.undeploy(vm))


@vm.command()
@click.argument("vm")
@pass_settings
def poweroff(settings: Settings, vm: str) -> None:
    """Say that a running VM does not run any more; its disks stay on the host (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.poweroff(vm))


@vm.command()
@click.argument("vm")
@pass_settings
def start(settings: Settings, vm: str) -> None:
    """Start a powered-off VM, with a new context disk (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.start(vm))


@vm.command()
@click.argument("vm")
@click.argument("host")
@click.option("--live", is_flag=True, help="While it runs: drivers are called before and after (not in 3.4).")
@click.option(
    "--hypervisor",
    default="",
    envvar="MADRIGAL_HYPERVISOR",
    metavar="PROGRAM",
    help="What moves a running VM: run as PROGRAM migrate FROM_HOST TO_HOST TO_DIRECTORY ID, its XML on stdin.",
)
@click.option("--system-datastore", default="", metavar="DATASTORE", help="Into another one (not in 3.4).")
@pass_settings
def migrate(settings: Settings, vm: str, host: str, live: bool, hypervisor: str, system_datastore: str) -> None:
    """Move a running or powered-off VM to another host."""
    with settings.front_end() as front_end:
        record = front_end.vms.migrate(vm, host, live, system_datastore, hypervisor if live else "")
        _answer(settings, front_end, record)


@vm.command()
@click.argument("vm")
@pass_settings
def shutdown(settings: Settings, vm: str) -> None:
    """Save the persistent disks of a running or powered-off VM in their images, and remove the VM."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.shutdown(vm))


@vm.command()
@click.argument("vm")
@click.option("--hard", is_flag=True, help="Also one whose operation failed; nothing of that is saved then.")
@pass_settings
def terminate(settings: Settings, vm: str, hard: bool) -> None:
    """As shutdown, also for a stopped, undeployed or pending VM (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.terminate(vm, hard))


@vm.command()
@click.argument("vm")
@pass_settings
def delete(settings: Settings, vm: str) -> None:
    """Remove a VM in whatever state it is.  Nothing is saved."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.delete(vm))


@vm.command()
@click.argument("vm")
@click.option("--disk", required=True, metavar="KEY=VALUE,...", help=DISK_HELP)
@pass_settings
def attach(settings: Settings, vm: str, disk: str) -> None:
    """Give a running or powered-off VM another disk (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.attach(vm, DiskRequest.parse(disk)))


@vm.command()
@click.argument("vm")
@click.argument("disk_id", type=int)
@pass_settings
def detach(settings: Settings, vm: str, disk_id: int) -> None:
    """Take a disk from a running or powered-off VM; a persistent one is saved (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.detach(vm, disk_id))


@vm.command("disk-saveas")
@click.argument("vm")
@click.argument("disk_id", type=int)
@click.argument("name")
@click.option("--snapshot", default="", metavar="SNAPSHOT", help="As it was in this snapshot (id or name).")
@pass_settings
def disk_saveas(settings: Settings, vm: str, disk_id: int, name: str, snapshot: str) -> None:
    """Copy a disk of a VM that is on a host or on the front-end into a new image (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.disk_saveas(vm, disk_id, name, snapshot))


@vm.command()
@click.argument("vm")
@click.argument("disk_id", type=int)
@click.argument("size", type=click.IntRange(min=1))
@pass_settings
def resize(settings: Settings, vm: str, disk_id: int, size: int) -> None:
    """Let a disk have SIZE MiB, which must be more than it has (not in 3.4)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.resize(vm, disk_id, size))


@vm.group(cls=Group)
def snapshot() -> None:
    """Snapshots of a VM's disks (not in 3.4).  Their ids count from 0, and none is used again."""


@snapshot.command("create")
@click.argument("vm")
@click.argument("disk_id", type=int)
@click.argument("name", default="")
@pass_settings
def snapshot_create(settings: Settings, vm: str, disk_id: int, name: str) -> None:
    """Take a snapshot of a disk; of a running VM where hypervisor and driver can."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.snapshot_create(vm, disk_id, name))


@snapshot.command("revert")
@click.argument("vm")
@click.argument("disk_id", type=int)
@click.argument("snapshot")
@pass_settings
def snapshot_revert(settings: Settings, vm: str, disk_id: int, snapshot: str) -> None:
    """Bring a disk of a VM that does not run back to a snapshot (id or name)."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.snapshot_revert(vm, disk_id, snapshot))


@snapshot.command("delete")
@click.argument("vm")
@click.argument("disk_id", type=int)
@click.argument("snapshot")
@click.option("--force", is_flag=True, help="Also one that others depend on: ask the driver all the same.")
@pass_settings
def snapshot_delete(settings: Settings, vm: str, disk_id: int, snapshot: str, force: bool) -> None:
    """Delete a snapshot (id or name) of a disk."""
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.snapshot_delete(vm, disk_id, snapshot, force))


@vm.command()
@click.argument("vm")
@click.option("--retry", is_flag=True, help="Run the failed transfer script again, whole.")
@click.option("--delete", "give_up", is_flag=True, help="Give the VM up, as `delete` does.")
@pass_settings
def recover(settings: Settings, vm: str, retry: bool, give_up: bool) -> None:
    """Deal with a VM after a failure, or after this command was killed."""
    if retry == give_up:
        raise UsageError("say either --retry or --delete")
    with settings.front_end() as front_end:
        _answer(settings, front_end, front_end.vms.delete(vm) if give_up else front_end.vms.recover(vm))
