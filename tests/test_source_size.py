"""How large an image will be, before it is imported."""

from __future__ import annotations

import gzip
import subprocess
import time
from pathlib import Path

import pytest
from servers import DRIP, Web
from sources import MIB, NO_FILE, PACKERS, TERMS, content

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
    if format == "raw" and packer:
        with pytest.raises(NotSupported, match="as it is packed: give SIZE"):
            size.virtual_size(url, NO_FILE)
        assert size.virtual_size(url, NO_FILE, decompress=False) == path.stat().st_size
    else:
        assert size.virtual_size(url, NO_FILE) == 100 * MIB
    assert {asked for asked, _ in web.asked} == {"/image"}
    assert len(web.asked) == (2 if format == "raw" and packer else 1)


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
