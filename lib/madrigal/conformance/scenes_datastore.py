"""What datastore drivers are asked to do (docs/contract.md, "Datastore actions")."""

from __future__ import annotations

import gzip
import hashlib
import re

from madrigal.conformance.calls import Call, Run
from madrigal.conformance.scenes import Play, Wrong, expect, gone, holds, is_files, scene, whole
from madrigal.conformance.scenes_idle import CAPACITY, tells_room
from madrigal.conformance.stage import MIB, Stage
from madrigal.conformance.subject import Subject
from madrigal.conformance.vms import BIG

BOTH = ("raw", "qcow2")
_BESIDE = (".snap", ".snap/*", ".md5sum", ".export")
"""What may belong to an image."""
TODAY = ("current",)


def without_files(subject: Subject) -> bool:
    return not subject.is_files


def _content(stage: Stage) -> bytes:
    return stage.content(BIG if stage.is_big else 3)


def _answer(stage: Stage, format: str, size: int) -> str:
    """`SOURCE FORMAT`, and `SOURCE SIZE_MB` in 3.4, as a regular expression."""
    return rf"/\S+ {size if stage.subject.is_old else format}"


def source(run: Run) -> str:
    return run.stdout.split(" ")[0].strip()


def _made(stage: Stage, format: str, digest: str, call: Call, answer: str, sources: list[str], into: str = "") -> Play:
    """A play after which SOURCE of the answer holds what has DIGEST."""

    def verify(run: Run) -> None:
        path = source(run)
        expect(path.startswith(f"{stage.base}/"), True, f"SOURCE is in BASE_PATH, {stage.base}: {path}")
        holds(stage, "fe", path, into or format, digest, "the new image")

    def safe() -> None:
        for path in stage.listed(stage.base, "[0-9a-f]{32}"):
            whole(stage, "fe", path, into or format, digest)()

    return Play(call, verify, ["SOURCE"], answer, safe=safe, moves=stage.at("fe", stage.base), sources=sources)


@scene("datastore", "cp", formats=BOTH, streams=True)
def cp(stage: Stage, format: str) -> Play:
    content = _content(stage)
    path = stage.put("fe", f"{stage.import_dir}/image", content, format)
    call = stage.ds("cp", image={"path": path})
    size = -(-int(stage.machine("fe").sh('stat -c %s "$1"', path)) // MIB)
    return _made(stage, format, stage.digest(content), call, _answer(stage, format, size), [stage.at("fe", path)])


@scene("datastore", "cp", "that is converted", forms=TODAY)
def cp_converted(stage: Stage, _: str) -> Play:
    content = stage.content()
    path = stage.put("fe", f"{stage.import_dir}/image", content, "qcow2")
    call = stage.ds("cp", image={"path": path}, template={"DRIVER": "raw"})
    return _made(stage, "raw", stage.digest(content), call, r"/\S+ raw", [stage.at("fe", path)])


@scene("datastore", "cp", "of a packed image")
def cp_packed(stage: Stage, _: str) -> Play:
    content = stage.content()
    path = stage.put("fe", f"{stage.import_dir}/image.gz", gzip.compress(content, 1))
    call = stage.ds("cp", image={"path": path})
    return _made(stage, "raw", stage.digest(content), call, _answer(stage, "raw", 3), [stage.at("fe", path)])


@scene("datastore", "cp", "from a web server", streams=True)
def cp_http(stage: Stage, _: str) -> Play:
    content = _content(stage)
    url = stage.serve("image", content)
    digests = {"MD5": hashlib.md5(content, usedforsecurity=False).hexdigest()}
    call = stage.ds("cp", image={"path": url}, attributes=digests)
    return _made(stage, "raw", stage.digest(content), call, _answer(stage, "raw", len(content) // MIB), [])


def _refused(call: Call) -> Play:
    return Play(call, lambda run: None)


@scene("datastore", "cp", "with a wrong digest", fails=True)
def cp_wrong_digest(stage: Stage, _: str) -> Play:
    path = stage.put("fe", f"{stage.import_dir}/image", stage.content())
    return _refused(stage.ds("cp", image={"path": path}, attributes={"MD5": "0" * 32}))


@scene("datastore", "cp", "from a web server that stops in the middle", fails=True)
def cp_cut(stage: Stage, _: str) -> Play:
    url = stage.serve("cut", stage.content(), cut=True)
    return _refused(stage.ds("cp", image={"path": url}))


@scene("datastore", "cp", "of what is not there", fails=True)
def cp_missing(stage: Stage, _: str) -> Play:
    return _refused(stage.ds("cp", image={"path": f"{stage.import_dir}/missing"}))


@scene("datastore", "cp", "of what RESTRICTED_DIRS forbids", fails=True)
def cp_restricted(stage: Stage, _: str) -> Play:
    path = stage.put("fe", f"{stage.import_dir}/image", stage.content())
    return _refused(stage.ds("cp", image={"path": path}, template={"RESTRICTED_DIRS": stage.import_dir}))


@scene("datastore", "cp", "of a link to what RESTRICTED_DIRS forbids", fails=True)
def cp_link(stage: Stage, _: str) -> Play:
    path = stage.put("fe", f"{stage.import_dir}/secret/image", stage.content())
    stage.machine("fe").sh('ln -s "$1" "$2"', path, f"{stage.import_dir}/link")
    template = {"RESTRICTED_DIRS": f"{stage.import_dir}/secret"}
    return _refused(stage.ds("cp", image={"path": f"{stage.import_dir}/link"}, template=template))


@scene("datastore", "cp", "from beside SAFE_DIRS", fails=True)
def cp_beside(stage: Stage, _: str) -> Play:
    """A directory is not covered by another that its name begins with."""
    path = stage.put("fe", f"{stage.import_dir}/safe-not/image", stage.content())
    template = {"RESTRICTED_DIRS": "/", "SAFE_DIRS": f"{stage.import_dir}/safe"}
    return _refused(stage.ds("cp", image={"path": path}, template=template))


@scene("datastore", "cp", "of an image on another file", fails=True)
def cp_backed(stage: Stage, _: str) -> Play:
    """Its guest would read that file."""
    path = f"{stage.import_dir}/image"
    stage.machine("fe").sh('mkdir -p "${1%/*}" && qemu-img create -q -u -f qcow2 -F raw -b /etc/passwd "$1" 1M', path)
    return _refused(stage.ds("cp", image={"path": path}))


@scene("datastore", "mkfs", formats=BOTH)
def mkfs(stage: Stage, format: str) -> Play:
    values = {"fs": "ext4"} if stage.subject.is_old else {"format": format}
    return _empty(stage, format, "", values)


@scene("datastore", "mkfs", "with ext4", formats=("raw",))
def mkfs_ext4(stage: Stage, format: str) -> Play:
    values = {"fs": "ext4"} if stage.subject.is_old else {"format": format, "fs": "ext4"}
    return _empty(stage, format, "ext4", values)


def _empty(stage: Stage, format: str, fs: str, values: dict[str, str]) -> Play:
    def verify(run: Run) -> None:
        path = source(run)
        script = 'qemu-img info -U -f "$1" --output=json "$2" | grep virtual-size'
        told = stage.machine("fe").sh(script, format, path, check=False).decode()
        expect(
            "".join(filter(str.isdigit, told)), str(16 * MIB), f"the size that a guest sees of {path}, a {format} image"
        )
        if fs:
            probe = 'blkid -p -s TYPE -o value "$1" || :'
            expect(stage.machine("fe").sh(probe, path).decode().strip(), fs, f"the file system on {path}")

    call = stage.ds("mkfs", image={"type": "DATABLOCK", "size": 16, **values})
    return Play(call, verify, ["SOURCE"], r"/\S+ 16" if stage.subject.is_old else r"/\S+")


@scene("datastore", "mkfs", "that reserves a name")
def mkfs_save_as(stage: Stage, _: str) -> Play:
    call = stage.ds("mkfs", image={"size": 16, "reserve": True})
    return Play(call, lambda run: gone(stage, "fe", source(run)), [], r"/\S+ 16" if stage.subject.is_old else r"/\S+")


@scene("datastore", "mkfs", "with a file system that is not known", fails=True)
def mkfs_unknown(stage: Stage, _: str) -> Play:
    values = {"fs": "nosuchfs"} if stage.subject.is_old else {"format": "raw", "fs": "nosuchfs"}
    return _refused(stage.ds("mkfs", image={"type": "DATABLOCK", "size": 16, **values}))


@scene("datastore", "rm")
def rm(stage: Stage, _: str) -> Play:
    path = stage.put("fe", f"{stage.base}/{stage.hash}", stage.content())
    stage.machine("fe").sh('mkdir "$1.snap" && echo x >"$1.snap/0" && echo x >"$1.md5sum"', path)

    def verify(run: Run) -> None:
        for end in ("", ".snap", ".md5sum"):
            gone(stage, "fe", path + end)

    changes = [stage.at("fe", f"{path}{end}") for end in ("", *_BESIDE)]
    return Play(stage.ds("rm", image={"source": path, "state": "DELETE"}), verify, changes)


@scene("datastore", "rm", "of what is not in the datastore", fails=True)
def rm_elsewhere(stage: Stage, _: str) -> Play:
    path = stage.put("fe", f"{stage.import_dir}/precious", b"precious")
    return _refused(stage.ds("rm", image={"source": path, "state": "DELETE"}))


@scene("datastore", "clone", forms=TODAY, formats=BOTH, streams=True)
def clone(stage: Stage, format: str) -> Play:
    content = _content(stage)
    path = stage.image(content, format, "original")
    call = stage.ds("clone", image={"path": path, "format": format, "cloned": 7})
    return _made(stage, format, stage.digest(content), call, rf"/\S+ {format}", [stage.at("fe", path)])


@scene("datastore", "clone", "of what is not there", forms=TODAY, fails=True)
def clone_missing(stage: Stage, _: str) -> Play:
    return _refused(stage.ds("clone", image={"path": f"{stage.base}/missing", "format": "raw", "cloned": 7}))


@scene("datastore", "stat", forms=TODAY, formats=BOTH)
def stat(stage: Stage, format: str) -> Play:
    path = stage.put("fe", f"{stage.import_dir}/image", stage.content(5), format)
    call = stage.ds("stat", 318 + stage.number, image={"path": path}, only_path=True)
    return Play(call, lambda run: None, [], "5", sources=[stage.at("fe", path)])


@scene("datastore", "stat", "of a web server", forms=TODAY)
def stat_http(stage: Stage, _: str) -> Play:
    url = stage.serve("five", stage.content(5))
    return Play(stage.ds("stat", 318 + stage.number, image={"path": url}, only_path=True), lambda run: None, [], "5")


@scene("datastore", "stat", "of what a web server has not", forms=TODAY, fails=True)
def stat_missing(stage: Stage, _: str) -> Play:
    assert stage.web
    return _refused(stage.ds("stat", 318 + stage.number, image={"path": f"{stage.web.url}/missing"}, only_path=True))


@scene("datastore", "monitor", forms=TODAY, needs=lambda subject: subject.kind == "datastore")
def monitor(stage: Stage, _: str) -> Play:
    return Play(stage.ds("monitor", stage.image_ds), lambda run: tells_room(stage, run, stage.base), [], CAPACITY)


def _chain(stage: Stage, format: str) -> tuple[str, list[bytes]]:
    """An image with snapshots 0 and 1, as disks of today's stock drivers leave them, and what 0, 1 and it hold."""
    contents = [stage.content(3, "zero"), stage.content(3, "one"), stage.content(3, "now")]
    path = f"{stage.base}/{stage.hash}"
    directory = f"{path}.snap"
    if format == "raw":
        for place, content in zip((f"{directory}/0", f"{directory}/1", path), contents, strict=True):
            stage.put("fe", place, content)
        return path, contents
    contents = [contents[0], stage.written(contents[0], 1), stage.written(stage.written(contents[0], 1), 2, 2 * MIB)]
    stage.put("fe", path, contents[0], "qcow2")
    stage.machine("fe").sh(
        'd=$1.snap; mkdir "$d"; ln -s . "$d/$2.snap"; ln -s "$1" "$d/0"; cd "$1.snap"; '
        'qemu-img create -q -f qcow2 -F qcow2 -b "$2.snap/0" 1; qemu-io -f qcow2 -c "write -P 1 $3 65536" 1; '
        'qemu-img create -q -f qcow2 -F qcow2 -b "$2.snap/1" 2; qemu-io -f qcow2 -c "write -P 2 $4 65536" 2',
        *(path, path.rpartition("/")[2], str(MIB + 4096), str(2 * MIB)),
    )
    return path, contents


def _now(stage: Stage, path: str, format: str) -> str:
    """Where an image's current state is."""
    script = '[ ! -L "$1" ] && ls "$1.snap" 2>/dev/null | grep -x "[0-9]*" | sort -n | tail -1'
    number = stage.machine("fe").sh(script, path, check=False).decode().strip()
    return f"{path}.snap/{number}" if format == "qcow2" and number else path


def _of_image(stage: Stage, action: str, path: str, format: str, snapshot: int, tm: str = "") -> Call:
    values: dict[str, object] = {"source": path, "format": format, "persistent": True, "snapshot": snapshot}
    return stage.ds(action, image=values, tm=tm)


@scene("datastore", "snap_delete", forms=TODAY, formats=("raw",))
def snap_delete(stage: Stage, format: str) -> Play:
    path, contents = _chain(stage, format)

    def verify(run: Run) -> None:
        gone(stage, "fe", f"{path}.snap/0")
        holds(stage, "fe", f"{path}.snap/1", format, stage.digest(contents[1]), "the other snapshot")
        holds(stage, "fe", path, format, stage.digest(contents[2]), "the image")

    return Play(_of_image(stage, "snap_delete", path, format, 0), verify, [stage.at("fe", f"{path}.snap/0")])


def _revert(stage: Stage, format: str, tm: str) -> Play:
    path, contents = _chain(stage, format)
    which = 1
    digest = stage.digest(contents[which])
    changes = [stage.at("fe", path), stage.at("fe", f"{path}.snap/2"), stage.at("fe", f"{path}.md5sum")]
    return Play(
        _of_image(stage, "snap_revert", path, format, which, tm),
        lambda run: holds(stage, "fe", _now(stage, path, format), format, digest, "the image"),
        changes,
        safe=whole(stage, "fe", _now(stage, path, format), format, digest, stage.digest(contents[2])),
    )


@scene("datastore", "snap_revert", forms=TODAY, formats=BOTH)
def snap_revert(stage: Stage, format: str) -> Play:
    return _revert(stage, format, "qcow2")


@scene("datastore", "snap_revert", "where TM_MAD is shared", forms=TODAY, formats=("qcow2",))
def snap_revert_shared(stage: Stage, format: str) -> Play:
    """It is the image that is qcow2, and shared has such chains too."""
    return _revert(stage, format, "shared")


@scene("datastore", "snap_flatten", forms=TODAY, formats=BOTH)
def snap_flatten(stage: Stage, format: str) -> Play:
    path, contents = _chain(stage, format)
    digest = stage.digest(contents[1])

    def verify(run: Run) -> None:
        holds(stage, "fe", path, format, digest, "the image")
        gone(stage, "fe", f"{path}.snap")

    call = _of_image(stage, "snap_flatten", path, format, 1, "qcow2")
    return Play(call, verify, [stage.at("fe", f"{path}{end}") for end in ("", *_BESIDE)])


@scene("datastore", "export", forms=TODAY, formats=("raw",))
def export(stage: Stage, format: str) -> Play:
    content = stage.content()
    path = stage.image(content, format)

    def verify(run: Run) -> None:
        found = dict(re.findall(r"<(\w+)>(?:<!\[CDATA\[)?([^<\]]*)", run.stdout))
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        expect(found.get("MD5"), digest, "MD5 of what is exported")
        expect(found.get("DISPOSE"), "NO", "DISPOSE of the datastore's own image")
        expect((found.get("SIZE"), found.get("FORMAT")), ("3", format), "SIZE (MiB) and FORMAT")
        if not re.search(re.escape(path), found.get("IMPORT_SOURCE", "")):
            raise Wrong(f"IMPORT_SOURCE is {found.get('IMPORT_SOURCE')!r} and does not name {path}")

    call = stage.ds("export", 7, image={"source": path, "format": format, "size": 3})
    return Play(
        call,
        verify,
        [stage.at("fe", f"{path}.md5sum")],
        r"(?s)<IMPORT_INFO>.*</IMPORT_INFO>",
        sources=[stage.at("fe", path)],
    )


# -- drivers without files ---------------------------------------------------------------------------------------


@scene("datastore", "cp", "of a name", needs=without_files)
def cp_name(stage: Stage, _: str) -> Play:
    answer = r"\S+ \d+" if stage.subject.is_old else r"\S+ \S+"
    return Play(stage.ds("cp", image={"path": "/dev/null", "size": 3}), lambda run: None, [], answer)


@scene("datastore", "mkfs", "of a name", needs=without_files)
def mkfs_name(stage: Stage, _: str) -> Play:
    answer = r"\S+ \d+" if stage.subject.is_old else r"\S+"
    return Play(stage.ds("mkfs", image={"size": 3, "format": "raw"}), lambda run: None, [], answer)


@scene("datastore", "clone", "of a name", forms=TODAY, needs=without_files)
def clone_name(stage: Stage, _: str) -> Play:
    call = stage.ds("clone", image={"path": "name", "format": "raw", "cloned": 7})
    return Play(call, lambda run: None, [], r"\S+( \S+)?")


@scene("datastore", "stat", "of a name", forms=TODAY, needs=without_files)
def stat_name(stage: Stage, _: str) -> Play:
    return Play(
        stage.ds("stat", 318 + stage.number, image={"path": "/dev/null"}, only_path=True), lambda run: None, [], r"\d+"
    )


@scene("datastore", "export", "of a name", forms=TODAY, needs=without_files)
def export_name(stage: Stage, _: str) -> Play:
    call = stage.ds("export", 7, image={"source": "name", "format": "raw", "size": 3})
    return Play(call, lambda run: None, [], r"(?s)<IMPORT_INFO>.*</IMPORT_INFO>")


@scene("datastore", "restore", forms=TODAY, needs=without_files)
def restore(stage: Stage, _: str) -> Play:
    return Play(stage.ds("restore", 318, image={"source": "name"}), lambda run: None, [], r"-?\d+( \S+)+")


def plain(stage: Stage, action: str) -> Call:
    """ACTION with a dump that is right, for drivers that do nothing and for what a driver cannot do."""
    values = {"source": f"{stage.base}/image", "path": f"{stage.import_dir}/image", "format": "raw", "size": 3}
    return stage.ds(action, image=values)


def _idle(action: str) -> None:
    forms = ("3.4", "current") if action == "rm" else TODAY

    def idle(subject: Subject) -> bool:
        return subject.is_idle(action) and not is_files(subject)

    @scene("datastore", action, "with nothing to do", forms=forms, needs=idle)
    def nothing(stage: Stage, _: str) -> Play:
        return Play(plain(stage, action), lambda run: None)


for _action in ("rm", "snap_delete", "snap_revert", "snap_flatten"):
    _idle(_action)
