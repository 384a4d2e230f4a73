"""The inspector against images that qemu-img made, and against headers nobody's program made."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from madrigal import inspector
from madrigal.errors import BadImage
from madrigal.source import schemes
from madrigal.storage.arrival import Arrival

MIB = 1 << 20
SIZE = 100 * MIB


def qemu_img(*arguments: object) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def inspect(path: Path) -> inspector.Found:
    with path.open("rb") as file:
        return inspector.inspect(file.fileno())


def check_import(path: Path) -> inspector.Found:
    """What it is, as a file and while it passes on its way into a datastore."""
    passed = {passing(path, is_plain) for is_plain in (True, False)}
    try:
        with path.open("rb") as file:
            found = inspector.check_import(file.fileno())
    except BadImage as error:
        assert passed == {str(error)}
        raise
    assert passed == {repr(found)}
    return found


class Fetched(schemes.Source):
    """A file as if it came from a web server."""

    def __init__(self, source: schemes.Source) -> None:
        self.name, self.size, self.read = source.name, source.size, source.read  # type: ignore[method-assign]


def passing(path: Path, is_plain: bool) -> str:
    with schemes.open(str(path), schemes.Terms(lambda name: os.open(name, os.O_RDONLY))) as source:
        arrival = Arrival(source if is_plain else Fetched(source), decompress=False, digests={})
        for _ in arrival.frames(checked=is_plain):
            pass
        try:
            return repr(arrival.found())
        except BadImage as error:
            return str(error)


def made(tmp_path: Path, data: bytes, name: str = "image") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def patched(path: Path, *changes: tuple[int, bytes]) -> Path:
    with path.open("r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)
    return path


MADE = [
    ("raw", "raw", ""),
    ("qcow2", "qcow2", ""),
    ("qcow2", "qcow2", "compat=0.10"),
    ("qcow2", "qcow2", "cluster_size=512"),
    ("qcow2", "qcow2", "cluster_size=2M,extended_l2=on,compression_type=zstd,lazy_refcounts=on"),
    ("vmdk", "vmdk", ""),
    ("vmdk", "vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vdi", "vdi", ""),
    ("vdi", "vdi", "static=on"),
    ("vpc", "vpc", ""),
    ("vpc", "vpc", "force_size=on"),
    ("vhdx", "vhdx", ""),
    ("vhdx", "vhdx", "subformat=fixed"),
]


@pytest.mark.parametrize(("format", "found", "options"), MADE)
def test_what_qemu_img_makes_is_accepted_with_the_size_it_says(
    tmp_path: Path, format: str, found: str, options: str
) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, *(["-o", options] if options else []), path, SIZE)
    says = json.loads(qemu_img("info", "--output=json", "-f", format, path))
    result = check_import(path)
    assert (result.format, result.virtual_size, result.refers_to) == (found, says["virtual-size"], None)
    assert result.driver == format
    # The same from a head that grows: never wrong, and known within what `stat` reads of a source.
    with path.open("rb") as file:
        whole = file.read(8 * MIB)
    heads = [inspector.inspect_head(whole[:n], whole=False) for n in (0, 512, 4096, 65536, MIB, 4 * MIB)]
    assert {h.format for h in heads if h} <= {found}
    last = inspector.inspect_head(whole, whole=len(whole) < 8 * MIB)
    assert last
    assert last.format == found
    if found != "raw":
        assert last.virtual_size == says["virtual-size"]


def test_a_streamed_vmdk_is_accepted_and_its_end_must_repeat_its_beginning(tmp_path: Path) -> None:
    raw = made(tmp_path, os.urandom(MIB), "raw")
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    assert check_import(path).virtual_size == MIB
    # qemu believes the header at the end.  qemu-img's own has none, VMware's does: made here.
    data = bytearray(path.read_bytes())
    data[56:64] = b"\xff" * 8
    data += bytes(-len(data) % 512)
    marker = bytearray(512)
    marker[12] = 3
    footer = bytes(marker) + bytes(data[:56]) + (21).to_bytes(8, "little") + bytes(data[64:512]) + bytes(512)
    assert check_import(made(tmp_path, bytes(data) + footer)).virtual_size == MIB
    for offset in (0, 12, 28):
        lie = bytearray(footer)
        lie[512 + offset] ^= 1
        with pytest.raises(BadImage, match="ends in a header other"):
            inspect(made(tmp_path, bytes(data + lie)))
    with pytest.raises(BadImage, match="ends in a header other"):
        inspect(made(tmp_path, bytes(data)))


def test_other_creators_of_vpc_mean_the_size_and_not_the_geometry(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vpc", path, 10 * MIB)
    geometry = inspect(path).virtual_size
    size = int.from_bytes(path.read_bytes()[48:56], "big")
    assert geometry == json.loads(qemu_img("info", "--output=json", "-f", "vpc", path))["virtual-size"]
    patched(path, (28, b"win "), (48, (size - 512).to_bytes(8, "big")))
    footer = path.read_bytes()[:64] + bytes(4) + path.read_bytes()[68:512]
    patched(path, (64, (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")))
    assert inspect(path).virtual_size == size - 512 != geometry
    assert json.loads(qemu_img("info", "--output=json", "-f", "vpc", path))["virtual-size"] == size - 512


REFERRING = [
    ("qcow2", ["-b", "/etc/shadow", "-F", "raw", "-u"], "qcow2", "backing file '/etc/shadow'"),
    ("qcow2", ["-b", "json:{}", "-F", "raw", "-u"], "qcow2", "backing file 'json:{}'"),
    ("qcow2", ["-o", "compat=0.10", "-b", "base", "-F", "raw", "-u"], "qcow2", "backing file 'base'"),
    ("qcow2", ["-o", "data_file=DATA"], "qcow2", "data file 'DATA'"),
    ("qcow2", ["-o", "data_file=DATA,data_file_raw=on"], "qcow2", "data file 'DATA'"),
    ("qcow", ["-b", "base", "-F", "raw", "-u"], "qcow1", "backing file 'base'"),
    ("qed", ["-b", "base", "-F", "raw", "-u"], "qed", "backing file 'base'"),
    ("vmdk", ["-b", "base.vmdk", "-F", "vmdk"], "vmdk", "parent 'base.vmdk'"),
    ("vmdk", ["-o", "subformat=monolithicFlat"], "vmdk", "extent 'image-flat.vmdk'"),
    ("vmdk", ["-o", "subformat=twoGbMaxExtentFlat"], "vmdk", "extent 'image-f001.vmdk'"),
    ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"], "vmdk", "extent 'image-s001.vmdk'"),
]


@pytest.mark.parametrize(("format", "arguments", "found", "refers"), REFERRING)
def test_an_image_that_names_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, arguments: list[str], found: str, refers: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "vmdk", "base.vmdk", SIZE)
    path = tmp_path / "image.vmdk"
    qemu_img("create", "-q", "-f", format, *arguments, path, SIZE)
    result = inspect(path)
    assert (result.format, result.refers_to) == (found, refers)
    assert result.virtual_size == SIZE
    with pytest.raises(BadImage, match="refers to another file") as raised:
        check_import(path)
    assert refers in str(raised.value)
    assert "convert it" in str(raised.value)
    assert raised.value.status == 41


def test_a_part_of_a_split_vmdk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "image.vmdk", SIZE)
    with pytest.raises(BadImage, match="part of a disk"):
        inspect(tmp_path / "image-s001.vmdk")


@pytest.mark.parametrize(("format", "found"), [("qcow", "qcow1"), ("qed", "qed"), ("parallels", "parallels")])
def test_a_format_that_is_not_imported_is_named(tmp_path: Path, format: str, found: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, path, SIZE)
    assert inspect(path).format == found
    assert inspect(path).virtual_size == SIZE
    with pytest.raises(BadImage, match=f"{found} are not imported: convert it first"):
        check_import(path)


def test_a_cowd_image_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, b"COWD" + bytes(8) + (2048).to_bytes(4, "little") + bytes(2048))
    assert inspect(path).virtual_size == MIB
    with pytest.raises(BadImage, match="cowd are not imported"):
        check_import(path)


def iso(tmp_path: Path, *options: str) -> Path:
    (tmp_path / "files").mkdir(exist_ok=True)
    (tmp_path / "files/hello").write_text("hello\n")
    path = tmp_path / "image.iso"
    subprocess.run(["genisoimage", "-quiet", *options, "-o", path, tmp_path / "files"], check=True, timeout=60)
    return path


@pytest.mark.parametrize("options", [[], ["-udf"]])
def test_an_iso_is_raw_to_everybody_else(tmp_path: Path, options: list[str]) -> None:
    path = iso(tmp_path, *options)
    found = check_import(path)
    assert (found.format, found.driver, found.virtual_size) == ("iso", "raw", path.stat().st_size)


def test_an_iso_that_boots_from_a_disk_too_is_an_iso(tmp_path: Path) -> None:
    path = patched(iso(tmp_path), (0, b"\xeb\x63\x90"), (446, b"\x80\0\0\0\x17"), (510, b"\x55\xaa"))
    assert check_import(path).format == "iso"


def test_luks_counts_as_raw(tmp_path: Path) -> None:
    # Made by hand: qemu-img cannot always measure how fast this machine is, and then makes none.
    for version in (1, 2):
        path = made(tmp_path, b"LUKS\xba\xbe\0" + bytes([version]) + b"aes".ljust(32, b"\0") + os.urandom(4096))
        found = check_import(path)
        assert (found.format, found.driver, found.virtual_size) == ("luks", "raw", path.stat().st_size)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        bytes(510) + b"\x55\xaa",  # MBR
        bytes(510) + b"\x55\xaaEFI PART" + bytes(4096),  # GPT
        b"version=1\nthis is somebody's configuration\n",
        b"#!/bin/sh\necho createType\n",
        b"\x1f\x8b\x08" + bytes(100),
        b"\xa7" * 100000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_anything_else_is_raw(tmp_path: Path, data: bytes) -> None:
    found = check_import(made(tmp_path, data))
    assert (found.format, found.driver, found.virtual_size) == ("raw", "raw", len(data))
    whole = inspector.inspect_head(data, whole=True)
    assert whole
    assert whole.virtual_size == len(data)


HEADERS = {
    "qcow2": (0, b"QFI\xfb\0\0\0\3"),
    "qed": (0, b"QED\0"),
    "vmdk": (0, b"KDMV\1\0\0\0"),
    "cowd": (0, b"COWD"),
    "vpc": (0, b"conectix"),
    "vhdx": (0, b"vhdxfile"),
    "luks": (0, b"LUKS\xba\xbe"),
    "parallels": (0, b"WithoutFreeSpace"),
    "vmdk descriptor": (0, b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\n'),
    "vdi": (0x40, b"\x7f\x10\xda\xbe"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_that_is_also_an_iso_is_refused(tmp_path: Path, name: str) -> None:
    path = patched(iso(tmp_path), HEADERS[name])
    with pytest.raises(BadImage, match=f"{name} and iso at once"):
        inspect(path)


@pytest.mark.parametrize("name", [name for name in HEADERS if name != "vdi"])
def test_a_file_that_is_also_a_vdi_is_refused(tmp_path: Path, name: str) -> None:
    path = patched(made(tmp_path, bytes(4096)), HEADERS[name], HEADERS["vdi"])
    with pytest.raises(BadImage, match=r"vdi.* at once"):
        inspect(path)


PARTITIONED = {
    "mbr": (446, b"\x80\1\1\0\x83".ljust(64, b"\0") + b"\x55\xaa"),
    "gpt": (512, b"EFI PART\0\0\1\0"),
}


@pytest.mark.parametrize("table", PARTITIONED)
@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vdi", "vpc", "vhdx", "vmdk", "parallels"])
def test_an_image_that_is_also_a_disk_with_partitions_is_refused(tmp_path: Path, format: str, table: str) -> None:
    """Whoever takes it for raw sees other data in it, as the format inspectors of OpenStack have it."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, path, SIZE)
    inspect(path)
    with pytest.raises(BadImage, match="and a disk with partitions at once"):
        inspect(patched(path, PARTITIONED[table]))


def test_a_disk_with_partitions_may_be_an_iso_or_raw(tmp_path: Path) -> None:
    for format, path in (("iso", iso(tmp_path)), ("raw", made(tmp_path, bytes(MIB)))):
        assert check_import(patched(path, *PARTITIONED.values())).format == format


CUT = {
    "qcow2": (8, 47, 48, 103),
    "qed": (4, 63),
    "vmdk": (8, 71),
    "cowd": (4, 15),
    "vpc": (8, 511),
    "vhdx": (8, 4096, 192 << 10),
    "parallels": (16, 63),
    "vdi": (0x44, 511),
}


@pytest.mark.parametrize(("name", "length"), [(name, length) for name in CUT for length in CUT[name]])
def test_a_header_that_is_cut_off_is_refused(tmp_path: Path, name: str, length: int) -> None:
    path = tmp_path / "image"
    if name == "cowd":
        path.write_bytes(HEADERS[name][1] + bytes(100))
    else:
        qemu_img("create", "-q", "-f", name, path, SIZE)
    inspect(path)
    os.truncate(path, length)
    with pytest.raises(BadImage, match="cut off"):
        inspect(path)


def be(value: int, length: int) -> bytes:
    return value.to_bytes(length, "big")


QCOW2_DAMAGE = {
    "version 4": ((4, be(4, 4)), "version 4"),
    "version 0": ((4, be(0, 4)), "version 0"),
    "clusters of 2^63": ((20, be(63, 4)), "clusters of"),
    "clusters of 1 byte": ((20, be(0, 4)), "clusters of"),
    "size of 2^63": ((24, be(1 << 63, 8)), "claims a size"),
    "feature bit 5": ((72, be(1 << 5, 8)), "not known .bits 0x20"),
    "feature bit 63": ((72, be(1 << 63, 8)), "not known"),
    "corrupt": ((72, be(2, 8)), "marked as corrupt"),
    "header of 0 bytes": ((100, be(0, 4)), "header of 0 bytes"),
    "header of 4 GiB": ((100, be((1 << 32) - 1, 4)), "header of 4294967295"),
    "backing name of 4 GiB": ((8, be(200, 8) + be((1 << 32) - 1, 4)), "backing file that lies outside"),
    "backing name at 2^63": ((8, be(1 << 63, 8) + be(10, 4)), "backing file that lies outside"),
    "extension of 4 GiB": ((112, b"\xe2\x79\x2a\xca\xff\xff\xff\xff"), "longer than its header"),
    "extensions without end": ((112, (b"\x11\x22\x33\x44" + bytes(4)) * 1000), "more than 256"),
}


@pytest.mark.parametrize("name", QCOW2_DAMAGE)
def test_a_damaged_qcow2_header_is_refused(tmp_path: Path, name: str) -> None:
    change, says = QCOW2_DAMAGE[name]
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    patched(path, (112, bytes(400)), change)
    with pytest.raises(BadImage, match=says):
        inspect(path)


def test_a_qcow2_data_file_is_seen_by_its_bit_and_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    only_bit = patched(path, (72, be(4, 8)), (112, bytes(400)))
    assert inspect(only_bit).refers_to == "data file ''"
    only_name = patched(path, (72, bytes(8)), (112, b"\0\x11\x22\x33" + be(3, 4) + b"abc" + bytes(5)))
    patched(only_name, (128, b"DATA" + be(11, 4) + b"/etc/shadow" + bytes(5)))
    assert inspect(only_name).refers_to == "data file '/etc/shadow'"


def test_an_empty_backing_name_is_a_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    assert inspect(patched(path, (8, be(200, 8)))).refers_to == "backing file ''"


def test_names_in_messages_are_printable_and_short(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    name = b"a\nERROR: x\x1b[31m\xff" + b"z" * 900
    refers = inspect(patched(path, (8, be(4096, 8) + be(len(name), 4)), (4096, name))).refers_to
    assert refers
    assert refers.isprintable()
    assert len(refers) < 130
    nul = inspect(patched(path, (8, be(4096, 8) + be(9, 4)), (4096, b"/etc\0/pwd"))).refers_to
    assert nul == "backing file '/etc'"


def embedded_vmdk(tmp_path: Path, change: tuple[bytes, bytes], capacity: int | None = None) -> Path:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vmdk", path, SIZE)
    data = path.read_bytes()
    text = data[512 : 512 + 10240].rstrip(b"\0")
    assert change[0] in text
    text = text.replace(*change).ljust(10240, b"\0")
    data = data[:512] + text + data[512 + 10240 :]
    if capacity is not None:
        data = data[:12] + capacity.to_bytes(8, "little") + data[20:]
    return made(tmp_path, data)


@pytest.mark.parametrize(
    ("change", "capacity", "refers"),
    [
        ((b'SPARSE "image"', b'FLAT "/etc/shadow" 0'), 0, "extent '/etc/shadow'"),
        ((b'SPARSE "image"', b'FLAT "image" 0'), None, "extent 'image'"),
        ((b'SPARSE "image"', b'VMFSRDM "image"'), None, "extent 'image'"),
        ((b'SPARSE "image"', b'SPARSE "../secret"'), None, "extent '../secret'"),
        ((b'SPARSE "image"', b'SPARSE "image"\nRW 1 SPARSE "second"'), None, "extent 'image'"),
        ((b'createType="monolithicSparse"', b'createType="monolithicFlat"'), None, "extent 'image'"),
        (
            (b"parentCID=ffffffff", b'parentCID=ffffffff\nparentFileNameHint="/etc/shadow"'),
            None,
            "parent '/etc/shadow'",
        ),
        (
            (b"parentCID=ffffffff", b'parentCID=ffffffff\nPARENTFILENAMEHINT="/etc/shadow"'),
            None,
            "parent '/etc/shadow'",
        ),
        ((b"#DDB", b'\0parentFileNameHint="/etc/shadow"'), None, "parent '/etc/shadow'"),
        ((b"parentCID=ffffffff", b"parentCID=12345678"), None, "parent "),
    ],
)
def test_a_descriptor_inside_a_vmdk_may_not_name_files(
    tmp_path: Path, change: tuple[bytes, bytes], capacity: int | None, refers: str
) -> None:
    found = inspect(embedded_vmdk(tmp_path, change, capacity))
    assert found.refers_to
    assert found.refers_to.startswith(refers)


@pytest.mark.parametrize(
    ("offset", "data", "says"),
    [
        (4, b"\4\0\0\0", "version 4"),
        (28, bytes(8), "no descriptor"),
        (28, b"\xff" * 8, "no descriptor"),
        (12, bytes(8), "no size"),
        (12, b"\xff" * 8, "claims a size"),
        (512, bytes(10240), "empty descriptor"),
    ],
)
def test_a_damaged_vmdk_header_is_refused(tmp_path: Path, offset: int, data: bytes, says: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vmdk", path, SIZE)
    with pytest.raises(BadImage, match=says):
        inspect(patched(path, (offset, data)))


def test_a_vmdk_with_a_descriptor_of_2_to_the_63_bytes_is_read_in_bounds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vmdk", path, SIZE)
    assert check_import(patched(path, (36, b"\xff" * 8))).virtual_size == SIZE


def test_differences_are_refused(tmp_path: Path) -> None:
    images = {}
    for format in ("vdi", "vpc", "vhdx"):
        images[format] = tmp_path / format
        qemu_img("create", "-q", "-f", format, images[format], SIZE)
    patched(images["vdi"], (0x4C, b"\4"))
    assert inspect(images["vdi"]).refers_to
    patched(images["vdi"], (0x4C, b"\1"), (0x1A8, b"\1"))
    assert inspect(images["vdi"]).refers_to
    name = "C:\\parent.vhd".encode("utf-16-be")
    patched(images["vpc"], (60, be(4, 4)), (512 + 64, name))
    assert inspect(images["vpc"]).refers_to == "parent 'C:\\parent.vhd'"
    patched(images["vpc"], (60, be(3, 4)), (512 + 40, b"\1"))
    assert inspect(images["vpc"]).refers_to
    patched(images["vpc"], (60, be(2, 4)))
    with pytest.raises(BadImage, match="type 2"):
        inspect(images["vpc"])
    data = bytearray(images["vhdx"].read_bytes())
    parameters = data.index(bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b"))
    table = data.index(b"metadata")
    at = table + int.from_bytes(data[parameters + 16 : parameters + 20], "little")
    patched(images["vhdx"], (at + 4, b"\2"))
    assert inspect(images["vhdx"]).refers_to
    patched(images["vhdx"], (at + 4, b"\0"))
    assert not inspect(images["vhdx"]).refers_to
    logical = data.index(bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f"))
    patched(images["vhdx"], (logical, bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")))
    assert inspect(images["vhdx"]).refers_to


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        ((192 << 10) + 8, b"\xff\xff\xff\xff"),  # entries
        (192 << 10, b"none"),
        ((192 << 10) + 16, bytes(128)),
        ((192 << 10) + 32, b"\xff" * 8),  # where the first region lies
        ((192 << 10) + 64, b"\xff" * 8),
    ],
)
def test_a_damaged_vhdx_header_is_refused_or_read_in_bounds(tmp_path: Path, offset: int, data: bytes) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vhdx", path, SIZE)
    patched(path, (offset, data))
    with contextlib.suppress(BadImage):
        assert inspect(path).virtual_size == SIZE  # it was the other region
    patched(path, ((192 << 10) + 32, b"\xff" * 8), ((192 << 10) + 64, b"\xff" * 8))
    with pytest.raises(BadImage):
        inspect(path)


@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels"])
def test_ten_thousand_broken_headers_never_do_more_than_be_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, path, SIZE)
    whole = path.read_bytes()[: 4 * MIB]
    table = whole.find(b"metadata")
    places = [range(512), range(512, 1536), range(192 << 10, (192 << 10) + 200), range(table, table + 400)]
    places = [place for place in places if place.start >= 0 and place.stop <= len(whole)]
    data = bytearray(whole)
    dice = random.Random(format)
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, whole, 0)
        os.ftruncate(fd, len(whole))
        for _ in range(1250):
            place = dice.choice(places)
            changed = [
                (dice.choice(place), dice.choice((0, 1, 2, 0x7F, 0x80, 0xFF))) for _ in range(dice.randrange(1, 5))
            ]
            width = dice.choice((1, 4, 8))
            for offset, value in changed:
                os.pwrite(fd, bytes([value]) * width, offset)
            cut = dice.choice((len(whole), len(whole), dice.randrange(len(whole))))
            if cut < len(whole):
                os.ftruncate(fd, cut)
            with contextlib.suppress(BadImage):
                found = inspector.inspect(fd)
                assert 0 <= found.virtual_size < 1 << 63
                assert found.refers_to is None or found.refers_to.isprintable()
            head = os.pread(fd, 65536, 0)
            with contextlib.suppress(BadImage):
                inspector.inspect_head(head, whole=False)
                assert inspector.inspect_head(head, whole=True)
            for offset, _ in changed:
                os.pwrite(fd, data[offset : offset + 8], offset)
            if cut < len(whole):
                os.pwrite(fd, whole, 0)
    finally:
        os.close(fd)


def test_little_is_read_and_the_offset_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    lengths = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    with path.open("rb") as file:
        os.lseek(file.fileno(), 77, os.SEEK_SET)
        inspector.inspect(file.fileno())
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 77
    assert sum(lengths) < 4096
