"""Archives as sources: the one file in a tar or zip, and everything else refused in one sentence, with nothing left."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from sources import MIB, TERMS, content, drain

from madrigal.errors import BadImage
from madrigal.source import archive, schemes, size, stream

TAR = ["tar", "--format=gnu"], ["tar", "--format=pax"], ["tar", "--format=ustar"], ["tar", "--format=posix", "--xattrs"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "files/sub").mkdir(parents=True)
    path = tmp_path / "files/sub/image.raw"
    path.write_bytes(content())
    return path


@pytest.mark.parametrize("tar", TAR, ids=lambda argv: argv[1])
@pytest.mark.parametrize("options", [[], ["-z"], ["-J"], ["--zstd"]], ids=str)
def test_the_file_in_a_tar_of_the_real_program(image: Path, tmp_path: Path, tar: list[str], options: list[str]) -> None:
    made = tmp_path / "image.tar"
    for names in (["sub/image.raw"], ["."]):
        subprocess.run([*tar, "-C", tmp_path / "files", *options, "-cf", made, *names], check=True, timeout=60)
        assert drain(made) == content()
        assert drain(made, decompress=False) == made.read_bytes()
        assert size.virtual_size(str(made), TERMS) == len(content())


def test_the_file_in_a_tar_with_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 200) / ("n" * 200)
    path.parent.mkdir()
    path.write_bytes(content())
    for tar in TAR[:2]:
        made = tmp_path / "image.tar"
        subprocess.run([*tar, "-C", tmp_path, "-cf", made, path.parent.name], check=True, timeout=60)
        assert drain(made) == content()


@pytest.mark.parametrize("options", [[], ["-0"], ["-9"]], ids=str)
def test_the_file_in_a_zip_of_the_real_program(image: Path, tmp_path: Path, options: list[str]) -> None:
    made, where = tmp_path / "image.zip", tmp_path / "files"
    ways: list[list[str | Path]] = [["-r", made, "."], [made, "sub/image.raw"]]
    for names in ways:
        made.unlink(missing_ok=True)
        subprocess.run(["zip", "-q", *options, *names], check=True, timeout=60, cwd=where)
        assert drain(made) == content()
    with image.open("rb") as file:  # sizes that are said behind the data
        data = subprocess.run(["zip", "-q", "-", "-"], stdin=file, capture_output=True, check=True, timeout=60).stdout
    made.write_bytes(data)
    assert drain(made) == content()


class Sink(io.RawIOBase):
    """What cannot be sought in, so that sizes stand behind the data."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("large", [False, True])
def test_the_file_in_a_zip_of_python(tmp_path: Path, large: bool) -> None:
    for out in (Sink(), io.BytesIO()):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
            with made.open("image", "w", force_zip64=large) as file:
                file.write(content())
        (tmp_path / "image.zip").write_bytes(out.data if isinstance(out, Sink) else out.getvalue())
        assert drain(tmp_path / "image.zip") == content()


def tar(*entries: tuple[str, bytes, bytes | str]) -> bytes:
    """A tar of (name, type, content or what a link leads to)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, type, what in entries:
            info = tarfile.TarInfo(name)
            info.type = type
            if isinstance(what, bytes):
                info.size = len(what)
                made.addfile(info, io.BytesIO(what))
            else:
                info.linkname = what
                made.addfile(info)
    return out.getvalue()


def zipped(*names: str, data: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name in names:
            made.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


REG, LINK, HARD, DEV, DIR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (tar(("a", REG, b"x"), ("b", REG, b"y")), "more than one file ('a' and 'b')"),
        (tar(("../../etc/cron.d/x", REG, b"x")), "'../../etc/cron.d/x', which leads out"),
        (tar(("a/../../x", REG, b"x")), "leads out"),
        (tar(("/etc/passwd", REG, b"x")), "leads out"),
        (tar(("n" * 150 + "/../..", REG, b"x")), "leads out"),
        (tar(("a", LINK, "/etc/shadow")), "is a link"),
        (tar(("a", LINK, "/etc"), ("a/passwd", REG, b"x")), "is a link"),
        (tar(("a", HARD, "/etc/shadow")), "is a link"),
        (tar(("a", DEV, "")), "is a link, a device"),
        (tar(("a\n\x1b[31mb", LINK, "x")), "'a??[31mb'"),
        (tar(("a", DIR, "")), "has no file"),
        (tar(*((f"d{n}", DIR, "") for n in range(1001))), "more than 1000 entries"),
        (tar(("a", REG, bytes(2000)))[:1500], "is cut off"),
        (tar(("a", REG, bytes(2000)))[:2560], "is cut off"),
        (tar(("a", REG, b"x"))[:1024] + b"garbage" * 100, "is damaged"),
        (zipped("a", "b"), "more than one file ('a' and 'b')"),
        (zipped("../a"), "leads out"),
        (zipped("a\\..\\..\\b"), "leads out"),
        (zipped("/a"), "leads out"),
        (zipped("\\a"), "leads out"),
        (zipped("a/"), "has no file"),
        (zipped(*(f"d{n}/" for n in range(1001)), data=b""), "more than 1000 entries"),
        (zipped("a", data=b"x" * 1000)[:500], "is cut off"),
        (zipped("a").replace(b"x", b"y", 1), "is damaged"),
        (b"PK\x03\x04" + zipped("a")[4:6] + b"\1" + zipped("a")[7:], "is encrypted"),
        (b"PK\x03\x04" + zipped("a")[4:8] + b"\x0e" + zipped("a")[9:], "a way that is not known"),
        (b"PK\x03\x04" + zipped("a")[4:18] + b"\xff" * 8 + zipped("a")[26:], "is damaged"),
    ],
)
def test_a_hostile_archive_is_refused_in_one_sentence(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "archive").write_bytes(data)
    (tmp_path / "archive.gz").write_bytes(gzip.compress(data))
    for name in ("archive", "archive.gz"):
        with pytest.raises(BadImage) as raised:
            drain(tmp_path / name)
        assert says in str(raised.value)
        assert str(raised.value).isprintable()
    assert sorted(os.listdir(tmp_path)) == ["archive", "archive.gz"]


def test_names_without_end_take_no_memory(tmp_path: Path) -> None:
    head = bytearray(tar(("a" * 150, REG, b"x"))[:512])
    head[124:136] = b"%011o\0" % (1 << 30)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path = tmp_path / "archive"
    path.write_bytes(bytes(head))
    os.truncate(path, 1 << 30)
    with pytest.raises(BadImage, match="more than 1 MiB of names"):
        drain(path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"comment": "x" * (2 * MIB)}
        made.addfile(info)
    path.write_bytes(out.getvalue())
    with pytest.raises(BadImage, match="more than 1 MiB of names"):
        drain(path)


def test_a_tar_with_holes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(MIB)
    made = tmp_path / "x.tar"
    for format in ("gnu", "pax"):
        argv: list[str | Path] = ["tar", f"--format={format}", "--sparse", "-C", tmp_path, "-cf", made, "image"]
        subprocess.run(argv, check=True, timeout=60)
        with pytest.raises(BadImage, match=r"in pieces|holes"):
            drain(made)


def test_more_than_8_gib_in_a_tar(tmp_path: Path) -> None:
    """Of which the header alone is looked at."""
    length = 9 << 30
    info = tarfile.TarInfo("image")
    info.size = length
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "archive"
        path.write_bytes(info.tobuf(format))
        os.truncate(path, path.stat().st_size + length)
        with schemes.open(str(path), TERMS) as opened:
            pieces = iter(stream.Unpacked(opened, True, lambda _: None))
            assert sum(len(next(pieces)) for _ in range(100)) > 90 * MIB


@pytest.mark.parametrize("head", [b"PK\x05\x06", b"PK", bytes(257) + b"ustar" + bytes(250), bytes(512)])
def test_what_is_no_archive_is_left_alone(tmp_path: Path, head: bytes) -> None:
    assert archive.kind(head) is None
    (tmp_path / "image").write_bytes(head)
    assert drain(tmp_path / "image") == head


def test_a_crc_behind_the_data_is_compared(tmp_path: Path) -> None:
    out = Sink()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("image", content())
    at = out.data.index(b"PK\x07\x08") + 4
    (tmp_path / "x.zip").write_bytes(out.data[:at] + struct.pack("<I", 1) + out.data[at + 4 :])
    with pytest.raises(BadImage, match="is damaged"):
        drain(tmp_path / "x.zip")
