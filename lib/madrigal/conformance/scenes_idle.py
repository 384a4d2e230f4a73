"""What is asked of drivers that only tell sizes, link devices, or have nothing to do."""

from __future__ import annotations

import base64
import re

from madrigal.conformance import vms
from madrigal.conformance.calls import Call, Run
from madrigal.conformance.scenes import Play, Unfit, Wrong, expect, gone, scene
from madrigal.conformance.stage import Stage
from madrigal.conformance.subject import Subject

# -- monitoring, and drivers that keep nothing -------------------------------------------------------------------

CAPACITY = r"(?=(?s:.*)USED_MB=\d+)(?=(?s:.*)TOTAL_MB=\d+)(?=(?s:.*)FREE_MB=\d+)((USED|TOTAL|FREE)_MB=\d+M?\s*){3}"


def tells_room(stage: Stage, run: Run, path: str) -> None:
    """That the answer says how much room there is where PATH is; others may write there meanwhile."""
    if not stage.subject.is_files:
        return
    told = {name: int(value) for name, value in re.findall(r"(USED|TOTAL|FREE)_MB=(\d+)", run.stdout)}
    words = stage.machine("fe").sh('df -P -B1M "$1" | tail -1', path).decode().split()
    seen = dict(zip(("TOTAL", "USED", "FREE"), map(int, words[1:4]), strict=True))
    much = seen["TOTAL"] // 20 + 8
    for name, value in seen.items():
        if abs(told.get(name, -much) - value) > much:
            raise Wrong(f"{name}_MB\n  expected: {value}, as df says\n  seen:     {told.get(name)}")


@scene("tm", "monitor", forms=vms.TODAY, needs=lambda subject: subject.is_shared)
def monitor(stage: Stage, format: str) -> Play:
    more = {"DATASTORE_LOCATION": stage.machines.location, "MONITOR_VM_DISKS": 0}
    store = stage.datastore(system=True)
    dump = stage.documents.dump(None, stage.documents.datastore(store, stage.system, []), more)
    return Play(
        Call("monitor", (str(stage.system_id),), dump),
        lambda run: tells_room(stage, run, stage.system),
        [stage.at("fe", f"{stage.system}/.monitor")],
        CAPACITY,
    )


@scene("tm", "monitor_ds", forms=vms.TODAY)
def monitor_ds(stage: Stage, format: str) -> Play:
    """On the host, by a probe.  Snapshots of two digits are there too."""
    stage.machine(stage.host).sh(
        'mkdir -p "$1/disk.0.snap" && cd "$1" && '
        'for name in disk.0 disk.0.snap/3 disk.0.snap/12; do head -c 1M /dev/urandom >"$name"; done',
        stage.vm_dir,
    )

    def verify(run: Run) -> None:
        lines = [line for line in run.stdout.splitlines() if f"ID = {stage.vm_id}," in line]
        expect(len(lines), 1, f"lines for VM {stage.vm_id} in {run.stdout!r}")
        inner = base64.b64decode(lines[0].split('MONITOR = "')[1].split('"')[0]).decode()
        for part in ("DISK_SIZE = [ ID=0, SIZE=1]", "ID=3, DISK_ID=0, SIZE=1", "ID=12, DISK_ID=0, SIZE=1"):
            expect(part in inner, True, f"{part!r} in what is told of VM {stage.vm_id}: {inner!r}")

    call = Call("monitor_ds", (stage.system,), on=stage.host)
    return Play(call, verify, [], r'(VM = \[ ID = \d+, MONITOR = "[A-Za-z0-9+/=]+"\]\n?)+')


def _leads_to_devices(subject: Subject) -> bool:
    return subject.kind == "tm" and not subject.is_files and bool(subject.formats)


@scene("tm", "ln", "of a device", needs=_leads_to_devices)
def ln_device(stage: Stage, format: str) -> Play:
    return _device(stage, "ln")


@scene("tm", "ln", "of a device beside another disk", needs=_leads_to_devices)
def ln_device_beside(stage: Stage, format: str) -> Play:
    vms.neighbour(stage)
    return _device(stage, "ln")


@scene("tm", "clone", "of a device", needs=_leads_to_devices)
def clone_device(stage: Stage, format: str) -> Play:
    vms.neighbour(stage)
    return _device(stage, "clone")


def _device(stage: Stage, action: str) -> Play:
    found = stage.machine(stage.host).sh("find /dev -type b | sort | head -1").decode().strip()
    if not found:
        raise Unfit("there is no block device in /dev")
    disk = f"{stage.vm_dir}/disk.0"
    stage.disk(0, source=found, clone=False, save=True)

    def verify(run: Run) -> None:
        seen = stage.machine(stage.host).sh('readlink "$1" || :', disk).decode().strip()
        expect(seen, found, f"the target of the link {disk}")

    return Play(
        stage.tm(action, f"{stage.fe}:{found}", f"{stage.host}:{disk}", ds=stage.image_ds),
        verify,
        vms.of_vm(stage, stage.host),
    )


@scene("tm", "delete", "of a link to a device", needs=lambda subject: not subject.is_files and bool(subject.formats))
def delete_device(stage: Stage, format: str) -> Play:
    disk = f"{stage.vm_dir}/disk.0"
    stage.disk(0, source="/dev/null", clone=False, save=True)
    stage.machine(stage.host).sh('mkdir -p "$1" && ln -s /dev/null "$1/disk.0"', stage.vm_dir)
    vms.neighbour(stage)
    changes = [stage.at(stage.host, disk)]
    return Play(
        stage.tm("delete", f"{stage.host}:{disk}", ds=stage.image_ds),
        lambda run: gone(stage, stage.host, disk),
        changes,
    )


def plain(stage: Stage, action: str) -> Call:
    """ACTION with arguments that are right, for drivers that do nothing and for what a driver cannot do."""
    disk, image = f"{stage.host}:{stage.vm_dir}/disk.0", f"{stage.base}/image"
    stage.disk(0, source=image)
    arguments: dict[str, tuple[str, ...]] = {
        "clone": (f"{stage.fe}:{image}", disk),
        "ln": (f"{stage.fe}:{image}", disk),
        "mv": (stage.place(stage.host), stage.place(stage.other)),
        "mvds": (disk, image),
        "cpds": (disk, f"{stage.base}/saved{stage.number or ''}", "-1"),
        "delete": (disk,),
        "mkimage": ("16", "raw", disk),
        "mkswap": ("16", disk),
        "context": ("/etc/hostname", disk),
        "resize": (disk, "7"),
        **dict.fromkeys(("snap_create", "snap_create_live", "snap_revert", "snap_delete"), (disk, "0")),
    }
    if action in ("premigrate", "postmigrate", "failmigrate"):
        return vms.migration(stage, action)
    if action in BACKUPS:
        place, told = stage.place(stage.host), stage.vm_document(stage.vm_id)
        return Call(action, (place, "0", "one-17", "5", str(stage.vm_id), str(stage.image_ds)), told)
    if action == "restore":
        return Call(action, (stage.place(stage.host), str(stage.vm_id), "8", "-1", "-1"))
    return stage.tm(action, *arguments[action], ds=stage.image_ds)


BACKUPS = ("prebackup", "prebackup_live", "postbackup", "postbackup_live")
IDLE = ("clone", "ln", "mv", "mvds", "delete", "mkimage", "mkswap", "context")
IDLE_TODAY: tuple[str, ...] = ("cpds", "resize", "snap_create", "snap_create_live", "snap_revert", "snap_delete")
IDLE_TODAY += ("premigrate", "postmigrate", "failmigrate")


def _idle(action: str) -> None:
    forms = vms.TODAY if action in IDLE_TODAY else ("3.4", "current")

    @scene("tm", action, "with nothing to do", forms=forms, needs=lambda subject: subject.is_idle(action))
    def nothing(stage: Stage, format: str) -> Play:
        return Play(plain(stage, action), vms.silent)


for _action in (*IDLE, *IDLE_TODAY):
    _idle(_action)


@scene(
    "tm",
    "restore",
    "of a driver that keeps nothing",
    forms=vms.TODAY,
    needs=lambda subject: subject.kind == "tm" and not subject.formats,
)
def restore(stage: Stage, format: str) -> Play:
    return Play(plain(stage, "restore"), vms.silent)
