"""What parses is fed with anything: it answers, or raises one of madrigal.errors, and nothing else.

hypothesis looks for inputs; those worth keeping are files in tests/corpus, which are always tried first.
"""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TREE
from dumps import dump, vm_document
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madrigal import inspector
from madrigal.config import read_shell
from madrigal.conformance import broken
from madrigal.dump import VM, Dump
from madrigal.errors import MadrigalError
from madrigal.location import Location, arg_host, arg_path, fix_dir_slashes

CORPUS = TREE / "tests/corpus"
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
RIGHT = dump("/ds/1", {"PATH": "/x", "FORMAT": "raw", "FS": "ext4", "SIZE": 5}, {"MD5": "0" * 32}, {"SAFE_DIRS": "/x"})
BYTES = st.binary(max_size=400)


def read_dump(data: bytes) -> None:
    """All that a recipe may ask of a dump."""
    read = Dump(data)
    for thing in (read.image, read.datastore):
        for name in vars(type(thing)):
            if isinstance(vars(type(thing))[name], property):
                with contextlib.suppress(MadrigalError):
                    getattr(thing, name)
        thing.attribute("MD5")


def read_vm(data: bytes) -> None:
    vm = VM(data)
    for name in vars(VM):
        if isinstance(vars(VM)[name], property):
            with contextlib.suppress(MadrigalError):
                getattr(vm, name)
    disk = vm.disk(0)
    assert disk is None or disk.format


def read_argument(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    arg_host(text), arg_path(text), fix_dir_slashes(text)
    for parse in (Location.parse, Location.of_image):
        with contextlib.suppress(MadrigalError):
            found = parse(text).checked()
            assert ".." not in found.path.split("/") and not found.host.startswith("-")


def read_configuration(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        read_shell(file.name)


def read_image(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = inspector.check_import(file.fileno())
        assert found.format
        inspector.inspect_head(data, True)


READERS: dict[str, Callable[[bytes], None]] = {
    "dump": read_dump,
    "argument": read_argument,
    "configuration": read_configuration,
    "image": read_image,
}


def survives(reader: Callable[[bytes], None], data: bytes) -> None:
    with contextlib.suppress(MadrigalError):
        reader(data)


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*/*")), ids=lambda path: str(path.relative_to(CORPUS)))
def test_what_was_kept(path: Path) -> None:
    survives(READERS[path.parent.name], path.read_bytes())


def test_every_reader_has_a_corpus() -> None:
    assert sorted(os.listdir(CORPUS)) == sorted(READERS)


@MANY
@given(st.one_of(BYTES, BYTES.map(base64.b64encode), st.integers(0, 1 << 30)))
def test_dumps(data: bytes | int) -> None:
    if isinstance(data, int):  # one that was right
        for _, changed in broken.dumps(RIGHT, 10, str(data)):
            survives(read_dump, changed)
    else:
        survives(read_dump, data)


@MANY
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=5), st.integers(0, 400))
def test_vms(changes: list[tuple[int, int]], length: int) -> None:
    text = bytearray(vm_document(17, {0: {"SIZE": 5, "FORMAT": "raw"}}, history=(0, 1)))
    for at, byte in changes:
        text[at % len(text)] = byte
    survives(read_vm, bytes(text[:length]) if length < 100 else bytes(text))


@MANY
@given(st.one_of(BYTES, st.text(alphabet=":/.-$( )'\nfe01", max_size=60).map(str.encode)))
def test_arguments(data: bytes) -> None:
    survives(read_argument, data)


@MANY
@given(st.one_of(BYTES, st.text(alphabet="AB=\"'\\$`# \n;export", max_size=80).map(str.encode)))
def test_configurations(data: bytes) -> None:
    survives(read_configuration, data)


HEADS = (
    b"QFI\xfb\0\0\0\2",
    b"QFI\xfb\0\0\0\3",
    b"KDMV",
    b"# Disk DescriptorFile\n",
    b"vhdxfile",
    b"conectix",
    b"QED\0",
)


@MANY
@given(st.sampled_from(HEADS), st.binary(max_size=600))
def test_images(head: bytes, rest: bytes) -> None:
    survives(read_image, head + rest)
    survives(read_image, bytes(64) + b"\x7f\x10\xda\xbe" + rest)  # vdi
