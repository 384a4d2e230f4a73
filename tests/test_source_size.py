"""How large an image will be, before it is imported."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import time
import zlib
from pathlib import Path

import pytest
from servers import DRIP, Web
from sources import MIB, NO_FILE, PACKERS, TERMS, content, packed

from madrigal.errors import BadImage, DeadlineExceeded, NotSupported
from madrigal.source import size


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image of 100 MiB with something in it, in every format that is imported."""
    place = tmp_path_factory.mktemp("images")
    raw = place / "raw"
    with raw.open("wb") as file:
        file.write(content(MIB))
        file.truncate(100 * MIB)
    made = {"raw": raw}
    for format in ("qcow2", "vmdk", "vdi", "vhdx"):
        made[format] = place / format
        argv = ["qemu-img", "convert", "-f", "raw", "-O", format, raw, made[format]]
        subprocess.run(argv, check=True, timeout=60)
    return made


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhdx"])
@pytest.mark.parametrize("packer", [None, *PACKERS])
def test_the_size_of_every_format_packed_and_not_here_and_there(
    images: dict[str, Path], tmp_path: Path, web: Web, format: str, packer: str | None
) -> None:
    path = images[format]
    if packer:
        path = tmp_path / "packed"
        with path.open("wb") as file:
            fast = [] if packer == "bzip2" else ["-1"]
            subprocess.run([packer, "-c", *fast, images[format]], stdout=file, check=True, timeout=60)
    assert size.virtual_size(str(path), TERMS) == 100 * MIB
    assert size.virtual_size(f"file://{path}", TERMS) == 100 * MIB
    if packer:
        assert size.virtual_size(str(path), TERMS, decompress=False) == path.stat().st_size
    url = web.page("/image", path.read_bytes())
    assert size.virtual_size(url, NO_FILE) == 100 * MIB
    if packer:
        assert size.virtual_size(url, NO_FILE, decompress=False) == path.stat().st_size
    assert {asked for asked, _ in web.asked} == {"/image"}
    assert len(web.asked) == (2 if packer else 1)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Raw images of 5 GiB, more than gzip can say: with a partition table, with a file system, with neither."""
    place = tmp_path_factory.mktemp("disks")
    made = {name: place / name for name in ("gpt", "ext4", "xfs", "nothing")}
    for path in made.values():
        with path.open("wb") as file:
            file.truncate(5 << 30)
    for name in ("ext4", "xfs"):
        subprocess.run([f"/usr/sbin/mkfs.{name}", "-q", made[name]], check=True, timeout=60)
    with made["gpt"].open("r+b") as file:
        file.seek(512)
        file.write(b"EFI PART" + bytes(24) + ((5 << 30) // 512 - 1).to_bytes(8, "little"))
    for path in made.values():
        with path.open("r+b") as file:  # what does not pack
            file.seek(16 * MIB)
            file.write(random.Random(1).randbytes(24 * MIB))
    return made


def gzipped(path: Path) -> bytes:
    """As gzip makes of it but for the checksum, in no time: behind the first 64 MiB one MiB of zeros, repeated."""
    with path.open("rb") as file:
        begin = file.read(64 * MIB)
    packer = zlib.compressobj(1, wbits=31)
    data = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    packer.compress(bytes(MIB))
    packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    size = path.stat().st_size
    data += zeros * ((size - len(begin)) // MIB) + b"\x03\x00" + bytes(4)
    return data + (size % (1 << 32)).to_bytes(4, "little")


def pack(path: Path, to: Path, *argv: str) -> Path:
    with to.open("wb") as file:
        subprocess.run([*argv, "-c", path], stdout=file, check=True, timeout=120)
    return to


MARKS = ["zstd -1", "zstd -1 -B1M --no-check", "lz4 -1 --content-size"]


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 512 MiB that says so, and has 24 MiB that do not pack."""
    path = tmp_path_factory.mktemp("ext4") / "image"
    path.touch()
    os.truncate(path, 512 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", path], check=True, timeout=60)
    with path.open("r+b") as file:
        file.seek(200 * MIB)
        file.write(random.Random(1).randbytes(24 * MIB))
    return path


@pytest.mark.parametrize("packer", MARKS)
def test_what_packers_write_down_is_believed_if_the_disk_says_the_same(
    ext4: Path, tmp_path: Path, web: Web, packer: str
) -> None:
    path = pack(ext4, tmp_path / "packed", *packer.split())
    url = web.file("/image", path.read_bytes())
    assert size.virtual_size(url, NO_FILE) == 512 * MIB
    assert web.sent < 16 * MIB
    start = time.process_time()
    assert size.virtual_size(str(path), TERMS) == 512 * MIB
    assert time.process_time() - start < 1


@pytest.mark.parametrize("packer", MARKS)
def test_of_a_disk_that_says_nothing_all_frames_pass_by_and_none_is_unpacked(
    tmp_path: Path, web: Web, packer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pack so well that the first could be all of the file."""
    monkeypatch.setattr(size, "_COUNTED", 0)
    with (tmp_path / "image").open("wb") as file:
        file.write(random.Random(1).randbytes(24 * MIB))
        file.truncate(512 * MIB)
    one = pack(tmp_path / "image", tmp_path / "packed", *packer.split()).read_bytes()
    for number, times in enumerate((1, 2, 3)):
        url = web.file(f"/{number}", one * times)
        web.sent, start = 0, time.process_time()
        assert size.virtual_size(url, NO_FILE) == times * 512 * MIB
        assert web.sent < 1.1 * times * len(one) + MIB
        assert time.process_time() - start < 3
        path = tmp_path / "many"
        path.write_bytes(one * times)
        assert size.virtual_size(str(path), TERMS) == times * 512 * MIB


@pytest.mark.parametrize("packer", MARKS)
def test_what_grew_by_another_frame_or_member_has_the_size_of_both(
    ext4: Path, tmp_path: Path, web: Web, packer: str
) -> None:
    """The first of them is what the disk says, and the second is small."""
    more = tmp_path / "more"
    more.write_bytes(bytes(3 * MIB))
    body = pack(ext4, tmp_path / "packed", *packer.split()).read_bytes()
    body += pack(more, tmp_path / "more.packed", *packer.split()).read_bytes()
    assert size.virtual_size(web.file("/image", body), NO_FILE) == 515 * MIB


def test_a_second_member_of_gzip_is_seen_although_it_ends_as_the_first(ext4: Path, tmp_path: Path, web: Web) -> None:
    """As much again: the end says what the disk does."""
    one = pack(ext4, tmp_path / "packed", "gzip", "-1").read_bytes()
    zeros = gzip.compress(bytes(512 * MIB), 9)
    assert size.virtual_size(web.file("/one", one), NO_FILE) == 512 * MIB
    assert size.virtual_size(web.file("/two", one + zeros), NO_FILE) == 1024 * MIB
    path = tmp_path / "two"
    path.write_bytes(one + zeros)
    assert size.virtual_size(str(path), TERMS) == 1024 * MIB


def test_frames_without_a_size_of_their_own_are_not_left_out(tmp_path: Path, web: Web) -> None:
    """From a pipe neither packer knows how much comes."""
    data = content(6 * MIB)
    known, unknown = packed(data, "zstd", f"--stream-size={len(data)}"), packed(data, "zstd")
    assert size.virtual_size(web.file("/unknown", unknown + known), NO_FILE) == 12 * MIB
    with pytest.raises(NotSupported, match="not all in it says its own: give SIZE"):
        size.virtual_size(web.file("/known", known + unknown), NO_FILE)
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    assert size.virtual_size(web.file("/skipped", skipped + known + skipped + known), NO_FILE) == 12 * MIB


@pytest.mark.parametrize(
    "options", [["-0"], ["-0", "-T2"], ["-0", "--block-size=65536"], ["-0", "-C", "none"]], ids=str
)
def test_the_index_of_xz(tmp_path: Path, web: Web, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(40 * MIB)
    one, two = packed(data, "xz", *options), packed(data[:MIB], "xz")
    monkeypatch.setattr(size, "_COUNTED", 0)
    for number, (body, length) in enumerate(
        [(one, 40 * MIB), (one + two, 41 * MIB), (one + bytes(8) + two + bytes(4096), 41 * MIB)]
    ):
        url = web.file(f"/{number}", body)
        web.sent = 0
        assert size.virtual_size(url, NO_FILE) == length
        assert web.sent < len(body)
        (tmp_path / "image").write_bytes(body)
        assert size.virtual_size(str(tmp_path / "image"), TERMS) == length
    broken = bytearray(one)
    broken[-20] ^= 1
    for body in (bytes(broken), one + bytes(3), one[:-4]):
        with pytest.raises(NotSupported, match="as it is packed: give SIZE"):
            size.virtual_size(web.file("/x", body), NO_FILE)
    with pytest.raises(NotSupported):  # a server without ranges
        size.virtual_size(web.page("/y", one), NO_FILE)


@pytest.mark.parametrize("disk", ["gpt", "ext4", "xfs", "nothing"])
def test_gzip_is_believed_if_the_disk_says_the_same(
    disks: dict[str, Path], tmp_path: Path, web: Web, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 GiB it writes down 1: what the stock driver takes for the size."""
    path = tmp_path / "packed"
    path.write_bytes(gzipped(disks[disk]))
    url = web.file("/image", path.read_bytes())
    monkeypatch.setattr(size, "_COUNTED", 0)
    if disk == "nothing":
        with pytest.raises(NotSupported):
            size.virtual_size(url, NO_FILE)
    else:
        assert size.virtual_size(url, NO_FILE) == 5 << 30
        assert size.virtual_size(str(path), TERMS) == 5 << 30
    assert web.sent < 32 * MIB
    more = web.file("/more", path.read_bytes() + gzip.compress(b"x"))
    with pytest.raises(NotSupported):
        size.virtual_size(more, NO_FILE)


def test_marks_that_lie_are_not_believed(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a claim: less than has been seen, or than so many bytes can be, is none."""
    data = content(40 * MIB)
    monkeypatch.setattr(size, "_COUNTED", 0)
    one = packed(data, "zstd", "-1")
    frames = packed(data[:MIB], "zstd", "-1") + packed(random.Random(2).randbytes(4 * MIB), "zstd")
    for number, body in enumerate((one[:4] + b"\xa0" + (99).to_bytes(4, "little") + one[9:], frames)):
        with pytest.raises((NotSupported, BadImage)):
            size.virtual_size(web.file(f"/{number}", body), NO_FILE)


def test_only_the_head_of_a_page_is_read(web: Web) -> None:
    """The rest never comes, and is not waited for."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n"
    assert size.virtual_size(web.raw("/raw", head + bytes(MIB), 30.0), NO_FILE) == 1 << 40


def test_a_raw_page_without_a_length_has_no_size(web: Web) -> None:
    url = web.raw("/image", b"HTTP/1.0 200 OK\r\n\r\n", bytes(MIB))
    with pytest.raises(NotSupported, match="server does not say it: give SIZE"):
        size.virtual_size(url, NO_FILE)


@pytest.mark.parametrize("length", [0, 1, 30000, 65536])
def test_small_files_are_read_to_their_end(web: Web, tmp_path: Path, length: int) -> None:
    """Smaller than the place where an ISO says that it is one."""
    path = tmp_path / "small"
    path.write_bytes(bytes(length))
    packed_path = tmp_path / "small.gz"
    packed_path.write_bytes(gzip.compress(bytes(length)))
    assert size.virtual_size(str(path), TERMS) == length
    assert size.virtual_size(str(packed_path), TERMS) == length
    assert size.virtual_size(web.page("/small", bytes(length)), NO_FILE) == length
    if length < 65536:
        endless = web.raw("/no-length", b"HTTP/1.0 200 OK\r\n\r\n", bytes(length))
        assert size.virtual_size(endless, NO_FILE) == length


def test_a_small_image_has_the_size_its_header_says(web: Web, tmp_path: Path) -> None:
    path = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", path, "100M"], check=True, timeout=60
    )
    assert path.stat().st_size < 4096
    for data in (path.read_bytes(), gzip.compress(path.read_bytes())):
        assert size.virtual_size(web.page("/image", data), NO_FILE) == 100 * MIB


def test_what_would_not_be_imported_has_no_size(web: Web, tmp_path: Path) -> None:
    path = tmp_path / "image"
    argv: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "/etc/shadow",
        "-F",
        "raw",
        path,
        "100M",
    ]
    subprocess.run(argv, check=True, timeout=60)
    packed_path = tmp_path / "image.gz"
    packed_path.write_bytes(gzip.compress(path.read_bytes()))
    urls = [str(path), str(packed_path), web.page("/a", path.read_bytes()), web.page("/b", packed_path.read_bytes())]
    for url in urls:
        with pytest.raises(BadImage, match="refers to another file"):
            size.virtual_size(url, TERMS)


def test_a_packed_file_that_is_cut_off_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "image.gz"
    path.write_bytes(gzip.compress(content())[:-5])
    with pytest.raises(BadImage, match="cut off"):
        size.virtual_size(str(path), TERMS)


def test_counting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Web) -> None:
    path = tmp_path / "image.gz"
    path.write_bytes(gzip.compress(bytes(64 * MIB), 1))
    monkeypatch.setattr(size, "_LOCAL", 0.01)
    with pytest.raises(DeadlineExceeded, match=r"finding the size of .*image.gz took longer"):
        size.virtual_size(str(path), TERMS)
    monkeypatch.setattr(size, "_REMOTE", 0.5)
    dripping = web.raw("/image", b"HTTP/1.0 200 OK\r\n\r\n", *DRIP * 100)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        size.virtual_size(dripping, NO_FILE)
    assert time.monotonic() - start < 5
