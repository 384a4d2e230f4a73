"""What is packed, by the real packers: to the last byte of the last member, in bounded pieces."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import os
import random
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from sources import MIB, PACKERS, TERMS, content, drain, packed

from madrigal.errors import BadImage, MissingProgram
from madrigal.source import codec, schemes, stream


@pytest.fixture(params=["inline", "beside"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to unpack: what is large is unpacked in another thread."""
    monkeypatch.setattr(stream, "_LARGE", 0 if request.param == "beside" else 1 << 40)


def test_who_stops_in_the_middle_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "image.gz"
    path.write_bytes(packed(content(20 * MIB), "gzip"))
    before = threading.active_count()
    with schemes.open(str(path), TERMS) as opened:
        pieces = stream.pieces(opened, decompress=True, digests={})
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("length", [0, 1, 100, 3 * MIB + 123])
def test_what_the_real_program_packs_is_unpacked(tmp_path: Path, packer: str, length: int) -> None:
    path = tmp_path / f"image.{PACKERS[packer]}"
    path.write_bytes(packed(content(length), packer))
    assert drain(path) == content(length)
    assert drain(path, decompress=False) == path.read_bytes()


@pytest.mark.parametrize(
    "argv",
    [
        ("gzip", "-1"),
        ("gzip", "-9"),
        ("bzip2", "-1"),
        ("xz", "-0"),
        ("xz", "--check=sha256"),
        ("xz", "--check=none"),
        ("xz", "--block-size=65536"),
        ("zstd", "--no-check"),
        ("zstd", "-19"),
        ("zstd", "--fast=5"),
        ("zstd", "-T2", "-B65536"),
        ("zstd", "--long=27"),
        ("lz4", "-9", "-BX"),
        ("lz4", "-B4", "--no-frame-crc", "--content-size"),
        ("lz4", "-BD", "-B7"),
    ],
)
def test_settings_of_the_packers(argv: tuple[str, ...]) -> None:
    data = packed(content(), *argv)
    assert unpack(data) == content()


def unpack(data: bytes, fed: int = 1 << 16, most: int = 1 << 20) -> bytes:
    decompressor = codec.decompressor(data[: codec.HEAD])
    assert decompressor
    out = b""
    for start in range(0, len(data), fed):
        piece = decompressor.feed(data[start : start + fed], most)
        while piece:
            assert len(piece) <= most
            out += piece
            piece = decompressor.feed(b"", most)
    decompressor.finish()
    return out


def zstd_skippable(length: int) -> bytes:
    return b"\x5a\x2a\x4d\x18" + length.to_bytes(4, "little") + os.urandom(length)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("fed", [1, 3, 17, 1000, 65536])
@pytest.mark.parametrize("most", [1, 100, 1 << 20])
def test_members_in_any_pieces(packer: str, fed: int, most: int) -> None:
    parts = [content(5000), b"", b"x", content(300)]
    data = b"".join(packed(part, packer) for part in parts)
    if packer in ("zstd", "lz4"):
        data = zstd_skippable(4) + data + zstd_skippable(0) + zstd_skippable(1000)
    assert unpack(data, fed, most) == b"".join(parts)


@pytest.mark.parametrize("packer", ["gzip", "xz"])
@pytest.mark.parametrize("zeros", [4, 512, 100000])
def test_zeros_at_the_end_are_padding(packer: str, zeros: int) -> None:
    data = packed(content(5000), packer) + bytes(zeros)
    assert unpack(data) == content(5000)
    assert unpack(data + data, 1000) == content(5000) * 2


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    "garbage", [b"x", b"garbage" * 20, b"\0x", b"\x1f", b"BZ", b"BZh9nonsense", b"\xfd7z", b"\x28\xb5", b"\x04\x22"]
)
def test_garbage_after_the_end_is_refused(packer: str, garbage: bytes) -> None:
    for fed in (1, 65536):
        with pytest.raises(BadImage, match="something else after its end") as raised:
            unpack(packed(content(5000), packer) + garbage, fed)
        assert raised.value.status == 41


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_cut_off_is_refused_wherever(packer: str) -> None:
    data = packed(content(3000), packer)
    starts = {"gzip": 3, "bzip2": 10, "xz": 6, "zstd": 4, "lz4": 4}
    for length in [*range(starts[packer], 40), *range(40, len(data), 97), len(data) - 1]:
        with pytest.raises(BadImage, match="cut off"):
            unpack(data[:length])
    second = data + data[: len(data) // 2]
    with pytest.raises(BadImage, match="cut off"):
        unpack(second)


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_damaged_is_refused_or_right(packer: str) -> None:
    """zstd and gzip headers have bits that mean nothing; whatever is given back must be the content."""
    data = packed(content(20000), packer)
    dice = random.Random(packer)
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        broken[dice.randrange(10, len(data))] ^= 1 << dice.randrange(8)
        try:
            assert unpack(bytes(broken)) == content(20000)
        except BadImage:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("packer", PACKERS)
def test_a_bomb_stays_small_in_memory(tmp_path: Path, packer: str) -> None:
    """128 MiB of zeros out of a few kB."""
    path = tmp_path / "bomb"
    with path.open("wb") as file:
        zeros = subprocess.Popen(["head", "-c", str(128 * MIB), "/dev/zero"], stdout=subprocess.PIPE)
        level = {"xz": ["-0"], "zstd": ["-3"]}.get(packer, ["-9"])
        subprocess.run([packer, "-c", *level], stdin=zeros.stdout, stdout=file, check=True, timeout=60)
        assert zeros.stdout
        zeros.stdout.close()
        zeros.wait()
    total = largest = 0

    def sink(piece: bytes) -> None:
        nonlocal total, largest
        total += len(piece)
        largest = max(largest, len(piece))

    tracemalloc.start()
    try:
        with schemes.open(str(path), TERMS) as opened:
            stream.fetch(opened, sink, decompress=True, digests={}, limit=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 128 * MIB
    assert largest <= stream.PIECE
    assert peak < 16 * MIB
    with schemes.open(str(path), TERMS) as opened, pytest.raises(BadImage, match="more than the 1000000 bytes"):
        stream.fetch(opened, lambda _: None, decompress=True, digests={}, limit=1000000)


def test_a_limit_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(content(5000))
    assert drain(tmp_path / "image", limit=5000) == content(5000)
    with pytest.raises(BadImage, match="more than the 4999 bytes"):
        drain(tmp_path / "image", limit=4999)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_file_of_empty_members_takes_no_square_of_its_size(packer: str) -> None:
    empty = packed(b"", packer)
    data = empty * (300000 // len(empty))

    class Memory(schemes.Source):
        name, size, rest = "memory", len(data), data

        def read(self, most: int) -> bytes:
            piece, self.rest = self.rest[:most], self.rest[most:]
            return piece

    start = time.process_time()
    assert stream.fetch(Memory(), lambda _: None, decompress=True, digests={}, limit=None) == 0
    assert time.process_time() - start < 8


def test_a_window_larger_than_ours_is_refused() -> None:
    data = packed(content(5000), "xz", "--lzma2=dict=512MiB")
    with pytest.raises(BadImage, match=r"[Mm]emory"):
        unpack(data)
    # A window of 2 GiB, as `zstd --long=31` makes for a large file: said in the frame's header.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\0\0"
    with pytest.raises(BadImage, match=r"[Mm]emory"):
        unpack(frame)


@pytest.mark.parametrize(
    "head", [b"", b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x07", b"BZh", b"BZh9disk", b"\xfd7zX", b"QFI\xfb", bytes(64)]
)
def test_what_is_not_packed_is_left_alone(tmp_path: Path, head: bytes) -> None:
    assert codec.kind(head) is None
    assert codec.decompressor(head) is None
    (tmp_path / "image").write_bytes(head)
    assert drain(tmp_path / "image") == head


def test_frames_that_zstd_and_lz4_skip() -> None:
    for packer in ("zstd", "lz4"):
        assert codec.kind(zstd_skippable(4) + packed(b"x", packer)) == packer
    assert codec.kind(zstd_skippable(4) + bytes(50)) is None


@pytest.mark.parametrize(("packer", "package"), [("zstd", "libzstd1"), ("lz4", "liblz4-1")])
def test_without_its_library_the_package_is_named(packer: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    data = packed(b"x", packer)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(MissingProgram, match=f"install the package {package}"):
        codec.decompressor(data)


def test_the_python_packers_are_understood_too() -> None:
    assert unpack(gzip.compress(content(5000))) == content(5000)
    assert unpack(bz2.compress(content(5000))) == content(5000)
    assert unpack(lzma.compress(content(5000))) == content(5000)


def test_a_sink_that_fails_ends_it(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(content())

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with schemes.open(str(tmp_path / "image"), TERMS) as opened, pytest.raises(OSError, match="No space"):
        stream.fetch(opened, full, decompress=True, digests={}, limit=None)
