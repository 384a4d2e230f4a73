"""qemu-img through `onhost.image`: the real program, real files, and no call without a format."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from madrigal.command import CommandFailed
from madrigal.errors import BadImage, ConfigError, DeadlineExceeded, InUse, MissingProgram, NoSpace, UsageError
from madrigal.onhost import image

MIB = 1 << 20

# Names that qemu would take for something else if they stood alone.
ODD_NAMES = [
    'json:{"driver":"null-co","size":1048576}',
    "a,b:c",
    "fd:3",
    "nbd:unix:x",
    "-rf",
    "a b;$(id)'\"*",
    "new\nline",
    "%s",
]


PATIENCE = (lambda: None, 60.0)  # what to do while waiting, and how long to wait


def made(path: Path) -> str:
    """PATH as an empty file, as the library has it before an image is put into it."""
    path.touch()
    return str(path)


def content(path: Path, format: str) -> bytes:
    out = path.parent / "content"
    subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", path, out], check=True, timeout=60)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def data(size: int = 3 * MIB) -> bytes:
    """A disk with data, zeros and data."""
    some = random.Random(1).randbytes(MIB)
    return (some + bytes(size))[: size - MIB] + some


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_create_makes_an_empty_image_of_that_size(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    image.create(made(path), format, 3 * MIB, "", *PATIENCE)
    assert content(path, format) == bytes(3 * MIB)
    assert path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize(
    "options", ["compat=0.10", "-o compat=0.10", "  -o  compat=0.10 ", "cluster_size=2M,compat=0.10"]
)
def test_options_are_those_of_the_format(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    image.create(made(path), "qcow2", MIB, options, *PATIENCE)
    assert path.read_bytes()[4:8] == b"\0\0\0\2"
    assert path.read_bytes()[20:24] == (b"\0\0\0\x15" if "2M" in options else b"\0\0\0\x10")


@pytest.mark.parametrize(
    "options",
    [
        "backing_file=/etc/shadow",
        "cluster_size=2M,backing_file=/etc/shadow,backing_fmt=raw",
        "data_file=/etc/shadow",
        "encrypt.format=luks",
        "cluster_size=2M,,backing_file=x",
        "cluster_size",
        "cluster_size=",
        "-o cluster_size=2M -b /etc/shadow",
        "--help",
        "?",
    ],
)
def test_an_option_that_is_none_is_refused(tmp_path: Path, options: str) -> None:
    with pytest.raises(ConfigError, match="is not an option"):
        image.create(str(tmp_path / "image"), "qcow2", MIB, options, *PATIENCE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
@pytest.mark.parametrize("source_format", image.FORMATS)
def test_convert_keeps_the_content_and_the_holes(tmp_path: Path, source_format: str, target_format: str) -> None:
    raw, source, target = tmp_path / "raw", tmp_path / "source", tmp_path / "target"
    raw.write_bytes(data(20 * MIB))
    options = ["-o", "force_size=on"] if source_format == "vpc" else []
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", source_format, *options, raw, source], check=True, timeout=60
    )
    image.convert(str(source), source_format, str(target), target_format, *PATIENCE)
    assert content(target, target_format) == data(20 * MIB)
    assert target.stat().st_blocks * 512 < 5 * MIB


def test_a_raw_disk_that_looks_like_qcow2_stays_raw(tmp_path: Path) -> None:
    """CVE-2026-24708 elsewhere: what a guest writes into its raw disk must not be believed."""
    secret, source, target = tmp_path / "secret", tmp_path / "source", tmp_path / "target"
    secret.write_bytes(b"secret" * 1000)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", source], check=True, timeout=60
    )
    whole = source.read_bytes()
    image.convert(str(source), "raw", str(target), "raw", *PATIENCE)
    assert target.read_bytes() == whole + bytes(-len(whole) % 512)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_a_file_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        (tmp_path / name).touch()
        image.create(path, "qcow2", MIB, "", *PATIENCE)
        image.grow(path, "qcow2", 2 * MIB, *PATIENCE)
        assert image.virtual_size(path) == 2 * MIB
        image.convert(path, "qcow2", path + ".raw", "raw", *PATIENCE)
        assert sorted(os.listdir(tmp_path)) == sorted([name, name + ".raw"])
        assert (tmp_path / (name + ".raw")).stat().st_size == 2 * MIB
        for file in os.listdir(tmp_path):
            os.unlink(file)


def test_a_file_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / format
        path.touch(0o600)
        image.create(str(path), format, MIB, "", *PATIENCE)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (tmp_path / "target").touch(0o600)
        image.convert(str(path), format, str(tmp_path / "target"), format, *PATIENCE)
        assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600


def test_grow_never_shrinks(tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / format
        (tmp_path / "raw-data").write_bytes(data())
        image.convert(str(tmp_path / "raw-data"), "raw", str(path), format, *PATIENCE)
        image.grow(str(path), format, 7 * MIB + 512, *PATIENCE)
        assert content(path, format) == data() + bytes(4 * MIB + 512)
        image.grow(str(path), format, MIB, *PATIENCE)
        assert content(path, format) == data() + bytes(4 * MIB + 512)


def test_what_is_said_to_be_qcow2_and_is_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data())
    with pytest.raises(BadImage, match="FORMAT of the disk is wrong"):
        image.grow(str(path), "qcow2", 9 * MIB, *PATIENCE)
    with pytest.raises(BadImage, match="FORMAT of the disk is wrong"):
        image.is_overlay(str(path))
    assert path.read_bytes() == data()


def test_an_overlay_is_told_from_a_whole_image(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    image.create(made(base), "qcow2", MIB, "", *PATIENCE)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay], check=True)
    assert not image.is_overlay(str(base))
    assert image.is_overlay(str(overlay))


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_backing_file_of_an_overlay_is_named_with_its_format(tmp_path: Path, compat: str) -> None:
    base = made(tmp_path / "base")
    image.create(base, "qcow2", MIB, "", *PATIENCE)
    assert image.backing(base) is None
    for name, more, format in (("a b;'*", ["-F", "qcow2"], "qcow2"), ("x" * 1000, ["-F", "raw"], "raw")):
        create = ["qemu-img", "create", "-u", "-f", "qcow2", "-o", f"compat={compat}", "-b", name, *more]
        subprocess.run([*create, tmp_path / "top", "1M"], check=True, capture_output=True)
        assert image.backing(str(tmp_path / "top")) == (name, format)
    # an older qemu-img said no format, and another program may say other things there
    header = (tmp_path / "top").read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1)
    (tmp_path / "top").write_bytes(header)
    assert image.backing(str(tmp_path / "top")) == ("x" * 1000, "")


def test_an_image_that_is_in_use_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "image"
    image.create(made(path), "qcow2", MIB, "", *PATIENCE)
    user = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert user.stdin
        assert user.stdout
        user.stdin.write(b"write 0 4k\n")
        user.stdin.flush()
        while b"wrote" not in user.stdout.readline():
            pass
        with pytest.raises(InUse, match="another process uses") as raised:
            image.grow(str(path), "qcow2", 2 * MIB, *PATIENCE)
        assert str(path) in str(raised.value)
    finally:
        user.kill()
        user.communicate()


CALLS: dict[str, Callable[[str], object]] = {
    "create": lambda format: image.create("/nowhere/image", format, MIB, "", *PATIENCE),
    "convert from": lambda format: image.convert("/nowhere/image", format, "/nowhere/target", "raw", *PATIENCE),
    "convert to": lambda format: image.convert("/nowhere/image", "raw", "/nowhere/target", format, *PATIENCE),
    "convert_range from": lambda format: image.convert_range("/nowhere/image", format, "/x", "raw", 0, 1, *PATIENCE),
    "convert_range to": lambda format: image.convert_range("/nowhere/image", "vdi", "/x", format, 0, 1, *PATIENCE),
    "extents": lambda format: image.extents("/nowhere/image", format, 0, *PATIENCE),
    "grow": lambda format: image.grow("/nowhere/image", format, MIB, *PATIENCE),
    "resize": lambda format: image.resize("/nowhere/image", format, MIB, False, *PATIENCE),
    "overlay": lambda format: image.overlay("/nowhere/image", MIB, "/x", format, "", *PATIENCE),
    "rebase": lambda format: image.rebase("/nowhere/image", "/x", format, *PATIENCE),
    "rename_backing": lambda format: image.rename_backing("/nowhere/image", "/x", format, *PATIENCE),
}

OF_ONE_FORMAT = {"virtual_size", "is_overlay", "backing", "is_empty", "preallocated", "fill"}
"""They read a header that must be qcow2's, or are for one format alone."""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("format", ["", "auto", "luks", "qcow", "nbd", "RAW", "raw,file=x", "-U", "iso"])
def test_no_call_without_a_known_format(monkeypatch: pytest.MonkeyPatch, name: str, format: str) -> None:
    monkeypatch.setattr(image, "run", None)  # nothing may run
    with pytest.raises(UsageError, match="is not an image format"):
        CALLS[name](format)


def test_every_function_has_its_row_and_a_mandatory_format() -> None:
    """All that run qemu-img give the format."""
    functions = {
        name: value
        for name, value in vars(image).items()
        if inspect.isfunction(value) and value.__module__ == image.__name__ and not name.startswith("_")
    }
    assert set(functions) == {name.split()[0] for name in CALLS} | OF_ONE_FORMAT
    for name in {name.split()[0] for name in CALLS}:
        parameters = inspect.signature(functions[name]).parameters.values()
        formats = [p for p in parameters if p.name.endswith("format")]
        assert formats, name
        assert all(p.default is p.empty and p.annotation is str for p in formats)


@pytest.mark.parametrize("format", ["vmdk", "vdi"])
def test_images_are_made_raw_or_qcow2_only(format: str) -> None:
    for name in ("create", "convert to", "convert_range to", "grow", "resize"):
        with pytest.raises(UsageError, match="it must be raw, qcow2"):
            CALLS[name](format)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_overlays(tmp_path: Path, name: str) -> None:
    """On any file, by a name as it is given; moved to another with the same content, and to none."""
    base, other, top = tmp_path / "base" / name, tmp_path / "other", tmp_path / "top"
    base.parent.mkdir()
    base.write_bytes(data())
    image.convert(str(base), "raw", made(other), "qcow2", *PATIENCE)
    for backing, format in ((str(base), "raw"), (f"base/{name}", "raw"), ("other", "qcow2")):
        image.overlay(made(top), 3 * MIB, backing, format, "cluster_size=4k", *PATIENCE)
        assert image.backing(str(top)) == (backing, format) and image.is_empty(str(top))
        assert content(top, "qcow2") == data() and image.virtual_size(str(top)) == 3 * MIB
    image.rebase(str(top), str(base), "raw", *PATIENCE)
    assert image.backing(str(top)) == (str(base), "raw") and content(top, "qcow2") == data()
    image.rebase(str(top), "", "", *PATIENCE)
    base.unlink()
    assert image.backing(str(top)) is None and not image.is_empty(str(top)) and content(top, "qcow2") == data()


def test_a_backing_file_is_a_file(tmp_path: Path) -> None:
    for name in ("nbd:localhost:1", 'json:{"driver":"null-co"}', "fd:3"):
        with pytest.raises(BadImage, match="name of a backing file"):
            image.overlay(made(tmp_path / "top"), MIB, name, "raw", "", *PATIENCE)


def test_headers_of_overlays(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for compat in ("0.10", "1.1"):
        image.overlay(made(top), MIB, "/x", "raw", f"compat={compat}", *PATIENCE)
        assert image.backing(str(top)) == ("/x", "raw")
        header = bytearray(top.read_bytes())
        header[8:16] = (1 << 40).to_bytes(8, "big")
        top.write_bytes(header)
        with pytest.raises(BadImage, match="damaged header"):
            image.backing(str(top))
    for bad in (b"", b"QFI\xfb", bytes(4096)):
        top.write_bytes(bad)
        for function in (image.backing, image.is_empty, image.is_overlay, image.virtual_size):
            with pytest.raises(BadImage):
                function(str(top))


FAKE = """#!{python}
import json, os, resource, sys
with open(os.environ["FAKE_LOG"], "w") as file:
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    json.dump([sys.argv[1:], *limits], file)
sys.stderr.write(os.environ.get("FAKE_SAYS", ""))
print("{{}}")
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qemu-img that writes down how it was called."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/qemu-img"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path


@pytest.mark.parametrize(
    ("call", "argv"),
    [
        (
            lambda: image.create("/a", "qcow2", 5, "compat=1.1", *PATIENCE),
            ["create", "-q", "-f", "qcow2", "-o", "compat=1.1", "--", "/a", "5"],
        ),
        (
            lambda: image.convert("/a", "vdi", "/b", "raw", *PATIENCE),
            ["convert", "-q", "-f", "vdi", "-O", "raw", "-W", "--", "/a", "/b"],
        ),
        (
            lambda: image.convert("/a", "raw", "/b", "qcow2", *PATIENCE),
            ["convert", "-q", "-f", "raw", "-O", "qcow2", "--", "/a", "/b"],
        ),
        (
            lambda: image.convert_range("/a,b", "vdi", "/c", "raw", 1024, 2048, *PATIENCE),
            [
                *("convert", "-q", "-n", "--target-is-zero", "--image-opts", "--target-image-opts", "-W", "--"),
                "driver=raw,offset=1024,size=1024,file.driver=vdi,file.file.driver=file,file.file.filename=/a,,b",
                "driver=raw,offset=1024,file.driver=file,file.filename=/c",
            ],
        ),
    ],
)
def test_the_exact_call_and_its_limits(fake: Path, call: Callable[[], object], argv: list[str]) -> None:
    """One that does nothing is not believed, where a file tells that."""
    tells = contextlib.nullcontext() if "--image-opts" in argv else pytest.raises(CommandFailed, match="has not made /")
    with tells:
        call()
    said, memory, _ = json.loads((fake / "log").read_text())
    assert said == argv
    assert memory == 2 << 30


def test_a_rebase_that_did_nothing_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, below in (("0", ""), ("1", "0")):
        with open(tmp_path / name, "w"):
            pass
        if below:
            image.overlay(str(tmp_path / name), MIB, below, "qcow2", "", *PATIENCE)
        else:
            image.create(str(tmp_path / name), "qcow2", MIB, "", *PATIENCE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu-img").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for call in (image.rebase, image.rename_backing):
        with pytest.raises(CommandFailed, match="lies on what it did"):
            call(str(tmp_path / "1"), "elsewhere", "qcow2", *PATIENCE)
    with pytest.raises(CommandFailed, match="lies on what it did"):
        image.rebase(str(tmp_path / "1"), "", "", *PATIENCE)


def test_failures_are_told_by_kind(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STATUS", "1")
    monkeypatch.setenv("FAKE_SAYS", "qemu-img: something\n")
    with pytest.raises(CommandFailed, match=r"qemu-img convert failed \(1\): qemu-img: something"):
        image.convert("/a", "raw", "/b", "raw", *PATIENCE)
    monkeypatch.setenv("FAKE_SAYS", "qemu-img: error while writing at byte 0: No space left on device\n")
    with pytest.raises(NoSpace, match="error while writing"):
        image.convert("/a", "raw", "/b", "raw", *PATIENCE)
    (fake / "bin/qemu-img").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(DeadlineExceeded, match="did nothing for"):
        image.convert("/a", "raw", "/b", "raw", lambda: None, 0.3)


def test_what_waits_may_stop_it(fake: Path) -> None:
    (fake / "bin/qemu-img").write_text("#!/bin/sh\nexec sleep 60\n")

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        image.convert("/a", "raw", "/b", "raw", stop, 60)


def test_a_missing_qemu_img_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prlimit = subprocess.run(["which", "prlimit"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "prlimit").symlink_to(prlimit)
    monkeypatch.setattr("madrigal.command.environment", lambda: {"PATH": str(tmp_path), "LC_ALL": "C"})
    with pytest.raises(MissingProgram, match="qemu-utils"):
        image.convert("/a", "raw", "/b", "raw", *PATIENCE)
