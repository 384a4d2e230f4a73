"""What transfer drivers are asked to do with disks that are there or new, and with snapshots.

docs/contract.md, "Transfer manager actions" and "Snapshots of disks".
"""

from __future__ import annotations

import os

from madrigal.conformance import guests, vms
from madrigal.conformance.calls import Run
from madrigal.conformance.scenes import Play, Unfit, Wrong, expect, holds, kept, scene, whole
from madrigal.conformance.stage import MIB, Stage


def _mkimage(stage: Stage, format: str, fs: str, size: int = 16) -> Play:
    disk = f"{stage.vm_dir}/disk.0"
    old = stage.subject.is_old
    stage.disk(
        0, type="fs", size=size, original_size=0, format=format, fs=fs, image_id=None, datastore_id=None, tm_mad=""
    )
    asked = (fs or "raw") if old else format

    def verify(run: Run) -> None:
        script = 'f=$(readlink -f "$2"); [ -f "$f" ] && qemu-img info -U -f "$1" --output=json "$f" | grep virtual-size'
        told = stage.machine(stage.host).sh(script, format, disk, check=False).decode()
        expect(
            "".join(filter(str.isdigit, told)),
            str(size * MIB),
            f"the size that a guest sees of {disk}, a {format} file",
        )
        if format == "raw":
            probe = 'blkid -p -s TYPE -o value "$(readlink -f "$1")" || :'
            expect(stage.machine(stage.host).sh(probe, disk).decode().strip(), fs, f"the file system on {disk}")

    return Play(
        stage.tm("mkimage", str(size), asked, f"{stage.host}:{disk}"),
        verify,
        vms.of_vm(stage, stage.host),
    )


@scene("tm", "mkimage", formats=vms.BOTH)
def mkimage(stage: Stage, format: str) -> Play:
    return _mkimage(stage, format, "")


@scene("tm", "mkimage", "with ext4", formats=("raw",))
def mkimage_ext4(stage: Stage, format: str) -> Play:
    vms.neighbour(stage)
    return _mkimage(stage, format, "ext4")


@scene("tm", "mkimage", "with a file system that is not known", formats=("raw",), fails=True)
def mkimage_unknown(stage: Stage, format: str) -> Play:
    play = _mkimage(stage, format, "nosuchfs")
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    play.changes = []
    return play


@scene("tm", "mkswap")
def mkswap(stage: Stage, format: str) -> Play:
    disk = f"{stage.vm_dir}/disk.0"
    vms.neighbour(stage)
    stage.disk(0, type="swap", size=16, original_size=0, format="raw", image_id=None, datastore_id=None, tm_mad="")

    def verify(run: Run) -> None:
        probe = 'f=$(readlink -f "$1"); blkid -p -s TYPE -o value "$f"; stat -c %s "$f"'
        expect(
            stage.machine(stage.host).sh(probe, disk, check=False).decode().split(),
            ["swap", str(16 * MIB)],
            f"what {disk} is",
        )

    return Play(stage.tm("mkswap", "16", f"{stage.host}:{disk}"), verify, vms.of_vm(stage, stage.host))


@scene("tm", "context")
def context(stage: Stage, format: str) -> Play:
    files = f"{stage.import_dir}/files"
    machine = stage.machine("fe")
    machine.write(f"{files}/context.sh", b"SECRET='x'\n")
    machine.write(f"{files}/a=b;c'd", b"named")
    disk = f"{stage.vm_dir}/disk.1"
    vms.neighbour(stage)

    def verify(run: Run) -> None:
        host = stage.machine(stage.host)
        names = {"context.sh": b"SECRET='x'\n", "init.sh": b"named"}
        for name, content in names.items():
            seen = host.sh('isoinfo -R -i "$(readlink -f "$1")" -x "/$2"', disk, name, check=False)
            expect(seen, content, f"what {disk}, an ISO image, has as {name}")
        label = host.sh('blkid -p -s LABEL -o value "$(readlink -f "$1")" || :', disk).decode().strip()
        expect(label, "CONTEXT", f"the label of {disk}")
        # the number of blocks of 2 KiB that the volume says it has
        script = 'f=$(readlink -f "$1"); echo $(($(od -An -tu4 -j32848 -N4 "$f") * 2048 <= $(stat -c %s "$f")))'
        expect(host.sh(script, disk).strip(), b"1", f"whether {disk} is as long as it says")

    return Play(
        stage.tm("context", f"{files}/context.sh", f"{files}/a=b;c'd:init.sh", f"{stage.host}:{disk}"),
        verify,
        vms.of_vm(stage, stage.host, "disk.1"),
        sources=[f"fe:{files}/context.sh"],
    )


@scene("tm", "context", "of a file that is not there", fails=True)
def context_missing(stage: Stage, format: str) -> Play:
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    return vms.refused(stage, stage.tm("context", f"{stage.import_dir}/missing", f"{stage.host}:{stage.vm_dir}/disk.1"))


# -- snapshots and sizes ---------------------------------------------------------------------------------------


def _of_disk(stage: Stage, image: str) -> list[str]:
    paths = [f"{stage.vm_dir}/disk.0", f"{stage.vm_dir}/disk.0.snap*"]
    if stage.is_shared:
        paths += [f"{image}.snap*", image]
    return [stage.at(stage.host, path) for path in paths]


def _snapshot_holds(stage: Stage, disk: str, number: int, format: str, digest: str) -> None:
    """That the disk's snapshot NUMBER holds what has DIGEST, as whoever saves it sees it."""
    vms.described_snapshot(stage, number)
    saved = f"{stage.base}/of-a-snapshot{stage.number or ''}"
    call = stage.tm("cpds", f"{stage.host}:{disk}", saved, str(number), ds=stage.image_ds)
    run = stage.run(call, subject=stage.helper)
    if run.status:
        raise Wrong(f"snapshot {number} is not there\n  expected: that cpds saves it\n  seen:     {run.message[:600]}")
    stage.runs.remove(run)
    holds(stage, "fe", saved, format, digest, f"snapshot {number}")
    stage.machine("fe").run("rm", saved)


@scene("tm", "snap_create", forms=vms.TODAY, formats=vms.BOTH, streams=True)
def snap_create(stage: Stage, format: str) -> Play:
    disk, content, image = vms.given(stage, format)
    digest = stage.digest(content)

    def verify(run: Run) -> None:
        holds(stage, stage.host, disk, format, digest, "the disk")
        _snapshot_holds(stage, disk, 0, format, digest)

    return Play(
        stage.tm("snap_create", f"{stage.host}:{disk}", "0", ds=stage.image_ds),
        verify,
        _of_disk(stage, ""),
        safe=kept(stage, [(stage.host, disk)], format, digest),
        moves=stage.at(stage.host, stage.system),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "snap_create", "of a disk that is not there", forms=vms.TODAY, fails=True)
def snap_create_missing(stage: Stage, format: str) -> Play:
    disk = vms.described(stage, "raw", stage.image(stage.content()))
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    return vms.refused(stage, stage.tm("snap_create", f"{stage.host}:{disk}", "0", ds=stage.image_ds))


@scene("tm", "snap_create_live", "of a guest", forms=vms.TODAY)
def snap_create_live(stage: Stage, format: str) -> Play:
    """It may stand still meanwhile, and goes on; the snapshot is of one moment."""
    if not os.path.exists(f"{stage.subject.directory}/driver.toml") or not stage.machines.is_own:
        raise Unfit("a guest is played to drivers with a driver.toml, on hosts of the check's own")
    disk, content, image = vms.given(stage, "raw")
    stage.vm.state, stage.vm.lcm_state = 3, 57
    guests.run(stage, disk)

    def verify(run: Run) -> None:
        expect(guests.stands_still(stage), False, "whether the VM stands still after it")
        then, now = (stage.written(content, byte, guests.PLACE) for byte in (guests.STILL, guests.GOING))
        holds(stage, stage.host, disk, "raw", stage.digest(now), "the disk, when the VM has gone on")
        _snapshot_holds(stage, disk, 0, "raw", stage.digest(then))

    return Play(
        stage.tm("snap_create_live", f"{stage.host}:{disk}", "0", ds=stage.image_ds),
        verify,
        _of_disk(stage, ""),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "snap_create_live", "where no guest runs", forms=vms.TODAY, fails=True)
def snap_create_live_refused(stage: Stage, format: str) -> Play:
    """Its disk could change meanwhile: whoever cannot talk to the hypervisor must not copy it."""
    disk, _, _ = vms.given(stage, "raw")
    stage.vm.state, stage.vm.lcm_state = 3, 57
    return vms.refused(stage, stage.tm("snap_create_live", f"{stage.host}:{disk}", "0", ds=stage.image_ds))


@scene("tm", "snap_revert", forms=vms.TODAY, formats=vms.BOTH)
def snap_revert(stage: Stage, format: str) -> Play:
    disk, content, image = vms.given(stage, format)
    vms.snapshot(stage, disk, 0)
    stage.guest_writes(stage.host, disk, format)
    digests = stage.digest(content), stage.digest(stage.written(content))

    def verify(run: Run) -> None:
        holds(stage, stage.host, disk, format, digests[0], "the disk")
        _snapshot_holds(stage, disk, 0, format, digests[0])

    return Play(
        stage.tm("snap_revert", f"{stage.host}:{disk}", "0", ds=stage.image_ds),
        verify,
        _of_disk(stage, ""),
        safe=whole(stage, stage.host, disk, format, *digests),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "snap_revert", "to a snapshot that is not there", forms=vms.TODAY, formats=vms.BOTH, fails=True)
def snap_revert_missing(stage: Stage, format: str) -> Play:
    disk, _, _ = vms.given(stage, format)
    vms.snapshot(stage, disk, 0)
    return vms.refused(stage, stage.tm("snap_revert", f"{stage.host}:{disk}", "5", ds=stage.image_ds))


@scene("tm", "snap_revert", "of a persistent disk", forms=vms.TODAY, formats=vms.BOTH)
def snap_revert_persistent(stage: Stage, format: str) -> Play:
    """What is written after a revert has to reach the image when the VM ends."""
    disk, content, image = vms.given(stage, format, "ln")
    vms.snapshot(stage, disk, 0)
    stage.guest_writes(stage.host, disk, format)
    newest = vms.newest(stage, image, format)

    def verify(run: Run) -> None:
        holds(stage, stage.host, disk, format, stage.digest(content), "the disk")
        stage.guest_writes(stage.host, disk, format, 0x77, MIB)
        stage.prepare(stage.tm("mvds", f"{stage.host}:{disk}", image, ds=stage.image_ds))
        what = "after a write and mvds, the image"
        holds(stage, "fe", newest(), format, stage.digest(stage.written(content, 0x77, MIB)), what)

    return Play(
        stage.tm("snap_revert", f"{stage.host}:{disk}", "0", ds=stage.image_ds),
        verify,
        [
            *_of_disk(stage, image),
            *vms.of_vm(stage, stage.host),
            stage.at("fe", image),
            stage.at("fe", f"{image}.snap*"),
        ],
    )


@scene("tm", "snap_delete", forms=vms.TODAY, formats=vms.BOTH)
def snap_delete(stage: Stage, format: str) -> Play:
    disk, content, image = vms.given(stage, format)
    vms.snapshot(stage, disk, 0)
    stage.guest_writes(stage.host, disk, format)
    vms.snapshot(stage, disk, 1)
    digest = stage.digest(stage.written(content))
    at = f"{stage.host}:{disk}"

    def verify(run: Run) -> None:
        holds(stage, stage.host, disk, format, digest, "the disk")
        again = stage.run(stage.tm("snap_revert", at, "0", ds=stage.image_ds), subject=stage.helper)
        if not again.status:
            raise Wrong(
                "snapshot 0 is still there\n  expected: that nobody can revert to it\n  seen:     snap_revert works"
            )
        stage.runs.remove(again)
        holds(stage, stage.host, disk, format, digest, "the disk, after a revert that was refused,")
        _snapshot_holds(stage, disk, 1, format, digest)

    return Play(
        stage.tm("snap_delete", at, "0", ds=stage.image_ds),
        verify,
        _of_disk(stage, ""),
        safe=kept(stage, [(stage.host, disk)], format, digest),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "resize", forms=vms.TODAY, formats=vms.BOTH)
def resize(stage: Stage, format: str) -> Play:
    disk, content, _ = vms.given(stage, format)
    stage.disk(0, size=7, previous_size=3)
    grown = stage.digest(content, 7)
    paths = [disk, f"{disk}.snap/*"]
    return Play(
        stage.tm("resize", f"{stage.host}:{disk}", "7", ds=stage.image_ds),
        lambda run: holds(stage, stage.host, disk, format, grown, "the disk"),
        [stage.at(stage.host, path) for path in paths],
        safe=whole(stage, stage.host, disk, format, grown, stage.digest(content)),
    )


@scene("tm", "resize", "of a disk that is not there", forms=vms.TODAY, fails=True)
def resize_missing(stage: Stage, format: str) -> Play:
    disk = vms.described(stage, "raw", stage.image(stage.content()))
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    return vms.refused(stage, stage.tm("resize", f"{stage.host}:{disk}", "7", ds=stage.image_ds))
