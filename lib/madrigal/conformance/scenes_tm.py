"""What transfer drivers are asked to bring and to remove (docs/contract.md, "Transfer manager actions")."""

from __future__ import annotations

from collections.abc import Callable

from madrigal.conformance import vms
from madrigal.conformance.calls import Run
from madrigal.conformance.scenes import Play, Wrong, exists, expect, gone, holds, kept, scene, whole
from madrigal.conformance.stage import Stage
from madrigal.conformance.subject import Subject


def _copy(stage: Stage, format: str, verb: str, grow: int = 0, suffix: str = "") -> Play:
    content = stage.content(vms.image_size(stage))
    image = stage.image(content, format)
    disk = vms.described(stage, format, image, grow, clone=verb == "clone")
    if format == "qcow2" or (verb == "ln" and stage.subject.is_old):  # else the directory has to be made, too
        vms.neighbour(stage)
    digest = stage.digest(content, grow)
    return Play(
        stage.tm(verb + suffix, f"{stage.fe}:{image}", f"{stage.host}:{disk}", ds=stage.image_ds),
        lambda run: holds(stage, stage.host, disk, format, digest, "the disk"),
        # persistent images on vms.shared storage get links for their snapshots beside them
        vms.of_vm(stage, stage.host) + ([stage.at("fe", f"{image}.snap*")] if stage.is_shared else []),
        safe=whole(stage, stage.host, disk, format, digest),
        moves=stage.at(stage.host, stage.system),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "clone", formats=vms.BOTH, streams=True)
def clone(stage: Stage, format: str) -> Play:
    return _copy(stage, format, "clone")


@scene("tm", "clone", "that grows", forms=vms.TODAY, formats=vms.BOTH, streams=True)
def clone_grown(stage: Stage, format: str) -> Play:
    """A copy that fails is not to be hidden by growing what there is of it, which works."""
    return _copy(stage, format, "clone", grow=vms.image_size(stage) + 4)


@scene("tm", "ln", formats=vms.BOTH, streams=True)
def ln(stage: Stage, format: str) -> Play:
    return _copy(stage, format, "ln")


@scene("tm", "clone", "of a kernel")
def clone_kernel(stage: Stage, format: str) -> Play:
    content = b"kernel" * 1000
    image = stage.image(content)
    path = f"{stage.vm_dir}/kernel"
    vms.neighbour(stage)
    return Play(
        stage.tm("clone", f"{stage.fe}:{image}", f"{stage.host}:{path}", ds=stage.image_ds),
        lambda run: holds(stage, stage.host, path, "raw", stage.digest(content), "the kernel"),
        vms.of_vm(stage, stage.host, "kernel"),
        sources=[stage.at("fe", image)],
    )


def _without_image(stage: Stage, action: str) -> Play:
    disk = vms.described(stage, "raw", f"{stage.base}/missing", clone=action.startswith("clone"))
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    return vms.refused(
        stage, stage.tm(action, f"{stage.fe}:{stage.base}/missing", f"{stage.host}:{disk}", ds=stage.image_ds)
    )


@scene("tm", "clone", "of an image that is not there", fails=True)
def clone_missing(stage: Stage, format: str) -> Play:
    return _without_image(stage, "clone")


@scene("tm", "ln", "of an image that is not there", fails=True)
def ln_missing(stage: Stage, format: str) -> Play:
    return _without_image(stage, "ln")


@scene("tm", "mvds", formats=vms.BOTH, streams=True)
def mvds(stage: Stage, format: str) -> Play:
    return _saved(stage, format)


def _saved(stage: Stage, format: str, suffix: str = "") -> Play:
    disk, content, image = vms.given(stage, format, f"ln{suffix}")
    stage.guest_writes(stage.host, disk, format)
    stage.machine("fe").sh('echo stale >"$1.md5sum"', image)
    digest = stage.digest(stage.written(content))
    newest = vms.newest(stage, image, format)

    def verify(run: Run) -> None:
        holds(stage, "fe", newest(), format, digest, "the image")
        left = stage.read(stage.host, disk, format)
        if left not in ("", digest):
            raise Wrong(f"the disk is neither gone nor the image: {left}")

    return Play(
        stage.tm(f"mvds{suffix}", f"{stage.host}:{disk}", image, ds=stage.image_ds),
        verify,
        [
            *vms.of_vm(stage, stage.host),
            stage.at("fe", image),
            stage.at("fe", f"{image}.snap*"),
            stage.at("fe", f"{image}.md5sum"),
        ],
        safe=kept(stage, [(stage.host, disk), ("fe", image), ("fe", f"{image}.snap/0")], format, digest),
        moves=stage.at("fe", stage.base),
    )


@scene("tm", "mvds", "of a file in place of the link", needs=vms.shared)
def mvds_file(stage: Stage, format: str) -> Play:
    """As a revert leaves it with some drivers."""
    content = stage.content()
    image = stage.image(stage.content(3, "before"))
    disk = vms.described(stage, "raw", image, clone=False)
    stage.put(stage.host, disk, content)
    digest = stage.digest(content)
    return Play(
        stage.tm("mvds", f"{stage.host}:{disk}", image, ds=stage.image_ds),
        lambda run: holds(stage, "fe", image, "raw", digest, "the image"),
        [*vms.of_vm(stage, stage.host), stage.at("fe", image)],
        safe=kept(stage, [(stage.host, disk), ("fe", image)], "raw", digest),
    )


@scene("tm", "mvds", "of a disk that is not there", needs=vms.owned, fails=True)
def mvds_missing(stage: Stage, format: str) -> Play:
    return _without_disk(stage, "mvds", stage.image(stage.content()))


def _without_disk(stage: Stage, action: str, *arguments: str) -> Play:
    disk = vms.described(stage, "raw", f"{stage.base}/image", clone=not action.startswith("mvds"))
    stage.machine(stage.host).sh('mkdir -p "$1"', stage.vm_dir)
    return vms.refused(stage, stage.tm(action, f"{stage.host}:{disk}", *arguments, ds=stage.image_ds))


@scene("tm", "cpds", forms=vms.TODAY, formats=vms.BOTH, streams=True)
def cpds(stage: Stage, format: str) -> Play:
    return _copied(stage, format)


def _copied(stage: Stage, format: str, suffix: str = "") -> Play:
    disk, content, _ = vms.given(stage, format, f"clone{suffix}")
    stage.guest_writes(stage.host, disk, format)
    saved = f"{stage.base}/saved{stage.number or ''}"
    digest = stage.digest(stage.written(content))
    return Play(
        stage.tm(f"cpds{suffix}", f"{stage.host}:{disk}", saved, "-1", ds=stage.image_ds),
        lambda run: holds(stage, "fe", saved, format, digest, "the saved image"),
        [stage.at("fe", saved)],
        safe=whole(stage, "fe", saved, format, digest),
        moves=stage.at("fe", stage.base),
        sources=[stage.at(stage.host, disk), stage.at(stage.host, f"{disk}.snap/0")],
    )


@scene("tm", "cpds", "of a snapshot", forms=vms.TODAY, formats=vms.BOTH)
def cpds_snapshot(stage: Stage, format: str) -> Play:
    disk, content, _ = vms.given(stage, format)
    vms.snapshot(stage, disk, 0)
    stage.guest_writes(stage.host, disk, format)
    saved = f"{stage.base}/saved{stage.number or ''}"
    return Play(
        stage.tm("cpds", f"{stage.host}:{disk}", saved, "0", ds=stage.image_ds),
        lambda run: holds(stage, "fe", saved, format, stage.digest(content), "the saved image"),
        [stage.at("fe", saved)],
    )


@scene("tm", "cpds", "of a disk that is not there", forms=vms.TODAY, fails=True)
def cpds_missing(stage: Stage, format: str) -> Play:
    stage.image(stage.content())
    return _without_disk(stage, "cpds", f"{stage.base}/saved{stage.number or ''}", "-1")


@scene("tm", "delete", "of a disk", forms=vms.TODAY, formats=vms.BOTH)
def delete_disk(stage: Stage, format: str) -> Play:
    disk, _, image = vms.given(stage, format)
    vms.snapshot(stage, disk, 0)
    neighbour = f"{stage.vm_dir}/disk.5"

    def verify(run: Run) -> None:
        gone(stage, stage.host, disk)
        gone(stage, stage.host, f"{disk}.snap")
        expect(exists(stage, stage.host, neighbour), True, f"{neighbour}, a disk beside it, is there")

    changes = [stage.at(stage.host, f"{disk}{end}") for end in ("", ".snap", ".snap/*")]
    return Play(
        stage.tm("delete", f"{stage.host}:{disk}", ds=stage.image_ds), verify, changes, sources=[stage.at("fe", image)]
    )


@scene("tm", "delete", "of a link")
def delete_link(stage: Stage, format: str) -> Play:
    """A persistent disk on vms.shared storage is a link: what it leads to stays."""
    content = stage.content()
    image = stage.image(content)
    disk = vms.described(stage, "raw", image, clone=False)
    stage.machine(stage.host).sh('mkdir -p "$1" && ln -s "$2" "$1/disk.0"', stage.vm_dir, image)
    vms.neighbour(stage)

    def verify(run: Run) -> None:
        if not stage.subject.is_old:  # where file-based drivers may leave it to the directory
            gone(stage, stage.host, disk)
        holds(stage, "fe", image, "raw", stage.digest(content), "the image")

    changes = [stage.at(stage.host, disk)]
    return Play(
        stage.tm("delete", f"{stage.host}:{disk}", ds=stage.image_ds), verify, changes, sources=[stage.at("fe", image)]
    )


@scene("tm", "delete", "of the directory")
def delete_directory(stage: Stage, format: str) -> Play:
    _, _, image = vms.given(stage, "raw")
    stage.machine(stage.host).write(f"{stage.vm_dir}/deployment.0", b"x")
    return Play(
        stage.tm("delete", f"{stage.host}:{stage.vm_dir}"),
        lambda run: gone(stage, stage.host, stage.vm_dir),
        [stage.at(stage.host, stage.vm_dir), stage.at(stage.host, f"{stage.vm_dir}/*")],
        sources=[stage.at("fe", image)],
    )


# -- from host to host -----------------------------------------------------------------------------------------


@scene("tm", "mv", "of the directory", formats=vms.BOTH, streams=True, needs=vms.owned)
def mv(stage: Stage, format: str) -> Play:
    return _moved(stage, format)


def _moved(stage: Stage, format: str, suffix: str = "") -> Play:
    disk, content, image = vms.given(stage, format, f"clone{suffix}")
    stage.guest_writes(stage.host, disk, format)
    stage.machine(stage.host).write(f"{stage.vm_dir}/deployment.0", b"deployment")
    digest = stage.digest(stage.written(content))

    def verify(run: Run) -> None:
        holds(stage, stage.other, disk, format, digest, "the disk on its new host")
        expect(exists(stage, stage.other, f"{stage.vm_dir}/deployment.0"), True, "deployment.0 came along")
        gone(stage, stage.host, stage.vm_dir)

    places = {
        stage.host: [stage.vm_dir, f"{stage.vm_dir}/*", f"{stage.system}/.monitor"],
        stage.other: [*_whole_vm(stage.vm_dir), f"{stage.system}/.monitor"],
    }
    return Play(
        stage.tm(f"mv{suffix}", stage.place(stage.host), stage.place(stage.other)),
        verify,
        [stage.at(host, path) for host, paths in places.items() for path in paths],
        safe=kept(stage, [(stage.host, disk), (stage.other, disk)], format, digest),
        moves=stage.at(stage.other, stage.system),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "mv", "on vms.shared storage", needs=vms.shared)
def mv_shared(stage: Stage, format: str) -> Play:
    disk, content, image = vms.given(stage, "raw")
    digest = stage.digest(content)
    return Play(
        stage.tm("mv", stage.place(stage.host), stage.place(stage.other)),
        lambda run: holds(stage, stage.other, disk, "raw", digest, "the disk"),
        [stage.at(stage.host, f"{stage.system}/.monitor")],
        safe=kept(stage, [(stage.host, disk)], "raw", digest),
        sources=[stage.at("fe", image)],
    )


def _whole_vm(directory: str) -> list[str]:
    """What comes along when the directory of a VM moves."""
    names = ("disk.0", "disk.0.snap", "disk.0.snap/*", "disk.5", "deployment.0")
    return [directory, *(f"{directory}/{name}" for name in names)]


def _elsewhere(stage: Stage) -> str:
    """The VM's directory in another system datastore that all share."""
    return f"{stage.machines.location}/102/{stage.vm_id}"


@scene("tm", "mv", "to another datastore", needs=vms.shared)
def mv_elsewhere(stage: Stage, format: str) -> Play:
    disk, content, image = vms.given(stage, "raw")
    digest, there = stage.digest(content), _elsewhere(stage)

    def verify(run: Run) -> None:
        holds(stage, stage.other, f"{there}/disk.0", "raw", digest, "the disk in its new datastore")
        expect(exists(stage, stage.other, f"{there}/disk.5"), True, "the disk beside it came along")
        gone(stage, stage.host, stage.vm_dir)

    places = [stage.vm_dir, f"{stage.vm_dir}/*", *_whole_vm(there), f"{stage.system}/.monitor"]
    return Play(
        stage.tm("mv", stage.place(stage.host), f"{stage.other}:{there}", ds=102),
        verify,
        [stage.at(stage.host, path) for path in [*places, f"{stage.machines.location}/102/.monitor"]],
        safe=kept(stage, [(stage.host, disk), (stage.other, f"{there}/disk.0")], "raw", digest),
        sources=[stage.at("fe", image)],
    )


@scene("tm", "mv", "of a disk")
def mv_disk(stage: Stage, format: str) -> Play:
    """File-based drivers leave it to the directory; whatever they do, the disk is at one place afterwards."""
    disk, content, image = vms.given(stage, "raw")
    digest = stage.digest(content)
    places = [stage.vm_dir, f"{disk}*", f"{stage.system}/.monitor"]
    return Play(
        stage.tm("mv", f"{stage.host}:{disk}", f"{stage.other}:{disk}", ds=stage.image_ds),
        lambda run: kept(stage, [(stage.host, disk), (stage.other, disk)], "raw", digest)(),
        [stage.at(host, path) for host in (stage.host, stage.other) for path in places],
        sources=[stage.at("fe", image)],
    )


@scene("tm", "mv", "of a directory that is not there", needs=vms.owned)
def mv_missing(stage: Stage, format: str) -> Play:
    """What is at the target stays: it may be all that is left of the VM."""
    stage.machine(stage.other).sh('mkdir -p "$1"', stage.system)
    content = stage.content()
    stage.put(stage.other, f"{stage.vm_dir}/disk.0", content)
    return Play(
        stage.tm("mv", stage.place(stage.host), stage.place(stage.other)),
        lambda run: holds(
            stage, stage.other, f"{stage.vm_dir}/disk.0", "raw", stage.digest(content), "the disk at the target"
        ),
        [stage.at(stage.other, f"{stage.system}/.monitor")],
    )


def _variant(action: str, play: Callable[[Stage, str], Play], missing: Callable[[Stage], Play] | None = None) -> None:
    """Scenes for the variant of ACTION for system datastores on the hosts' own storage.

    MISSING: where there is nothing to act on.
    """

    def has(subject: Subject) -> bool:
        return vms.shared(subject) and action in subject.actions

    @scene("tm", action, "apart", forms=vms.TODAY, formats=vms.BOTH, streams=True, needs=has)
    def apart(stage: Stage, format: str) -> Play:
        stage.store_apart()
        stage.bystanders()
        return play(stage, format)

    if missing:

        @scene("tm", action, "apart, of what is not there", forms=vms.TODAY, fails=True, needs=has)
        def nothing(stage: Stage, format: str) -> Play:
            stage.store_apart()
            stage.bystanders()
            return missing(stage)


_variant(
    "clone.ssh",
    lambda stage, format: _copy(stage, format, "clone", suffix=".ssh"),
    lambda stage: _without_image(stage, "clone.ssh"),
)
_variant(
    "ln.ssh",
    lambda stage, format: _copy(stage, format, "ln", suffix=".ssh"),
    lambda stage: _without_image(stage, "ln.ssh"),
)
_variant(
    "mvds.ssh",
    lambda stage, format: _saved(stage, format, ".ssh"),
    lambda stage: _without_disk(stage, "mvds.ssh", stage.image(stage.content())),
)
_variant(
    "cpds.ssh",
    lambda stage, format: _copied(stage, format, ".ssh"),
    lambda stage: _without_disk(stage, "cpds.ssh", f"{stage.base}/saved{stage.number or ''}", "-1"),
)
_variant("mv.ssh", lambda stage, format: _moved(stage, format, ".ssh"))


def _live(stage: Stage) -> tuple[str, bytes, str]:
    disk, content, image = vms.given(stage, "raw")
    stage.vm.state, stage.vm.lcm_state = 3, 4
    last = stage.vm.history[-1]
    stage.vm.history.append(type(last)(1, 1, stage.other, last.datastores, last.system_ds, last.tm_mad, last.stime))
    return disk, content, image


@scene("tm", "premigrate", forms=vms.TODAY)
def premigrate(stage: Stage, format: str) -> Play:
    disk, content, _ = _live(stage)
    if not stage.is_shared:
        stage.put(stage.other, f"{stage.vm_dir}/disk.0", b"of an earlier try")

    def verify(run: Run) -> None:
        holds(stage, stage.host, disk, "raw", stage.digest(content), "the disk on its old host")
        if not stage.is_shared:
            gone(stage, stage.other, f"{stage.vm_dir}/disk.0")

    return Play(vms.migration(stage, "premigrate"), verify, _directory(stage, stage.other))


def _directory(stage: Stage, host: str) -> list[str]:
    """What may change where a whole directory goes; on vms.shared storage that is nothing but the marker."""
    paths = [f"{stage.system}/.monitor"]
    if not stage.is_shared:
        paths += [stage.vm_dir, f"{stage.vm_dir}/*"]
    return [stage.at(host, path) for path in paths]


@scene("tm", "postmigrate", forms=vms.TODAY)
def postmigrate(stage: Stage, format: str) -> Play:
    disk, content, _ = _live(stage)
    if not stage.is_shared:
        stage.put(stage.other, disk, content)
    digest = stage.digest(content)

    def verify(run: Run) -> None:
        holds(stage, stage.other, disk, "raw", digest, "the disk on its new host")
        if not stage.is_shared:
            gone(stage, stage.host, stage.vm_dir)

    changes = _directory(stage, stage.host) + [stage.at(stage.other, f"{stage.system}/.monitor")]
    return Play(
        vms.migration(stage, "postmigrate"), verify, changes, safe=kept(stage, [(stage.other, disk)], "raw", digest)
    )


@scene("tm", "postmigrate", "to another datastore", forms=vms.TODAY, needs=vms.shared)
def postmigrate_elsewhere(stage: Stage, format: str) -> Play:
    _, content, _ = _live(stage)
    there = _elsewhere(stage)
    stage.vm.history[-1].system_ds = 102
    stage.put(stage.other, f"{there}/disk.0", content)
    digest = stage.digest(content)

    def verify(run: Run) -> None:
        holds(stage, stage.other, f"{there}/disk.0", "raw", digest, "the disk in its new datastore")
        gone(stage, stage.host, stage.vm_dir)

    changes = [stage.at(stage.host, f"{stage.vm_dir}{end}") for end in ("", "/*")]
    changes += [stage.at(stage.host, f"{one}/.monitor") for one in (stage.system, f"{stage.machines.location}/102")]
    call = vms.migration(stage, "postmigrate", there, 102)
    return Play(call, verify, changes, safe=kept(stage, [(stage.other, f"{there}/disk.0")], "raw", digest))


@scene("tm", "failmigrate", forms=vms.TODAY)
def failmigrate(stage: Stage, format: str) -> Play:
    disk, content, _ = _live(stage)
    if not stage.is_shared:
        stage.put(stage.other, disk, b"half of it")
    digest = stage.digest(content)
    safe = kept(stage, [(stage.host, disk)], "raw", digest)

    def verify(run: Run) -> None:
        safe()
        if not stage.is_shared:
            gone(stage, stage.other, stage.vm_dir)

    return Play(vms.migration(stage, "failmigrate"), verify, _directory(stage, stage.other), safe=safe)
