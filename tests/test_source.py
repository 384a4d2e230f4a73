"""Local files as sources, how fast they are read, digests, and what an action loads for it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from servers import Web
from sources import MIB, NO_FILE, PACKERS, TERMS, content, drain, packed

from madrigal.errors import (
    ConfigError,
    DigestMismatch,
    Forbidden,
    MadrigalError,
    NotFound,
    SourceUnavailable,
    UsageError,
)
from madrigal.onhost import guard as door
from madrigal.onhost.pace import Pace
from madrigal.source import download, pace, schemes, size, stream


def test_a_local_path_gives_its_bytes_size_and_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a b%20c"
    path.write_bytes(content())
    with schemes.open(str(path), TERMS) as opened:
        assert (opened.size, opened.name) == (len(content()), str(path))
        assert opened.local_fd is not None
        opened.read(1000)
        assert os.lseek(opened.local_fd, 0, os.SEEK_CUR) == 0  # whoever copies it begins at the beginning
        fd = opened.local_fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert drain(path) == content()


@pytest.mark.parametrize("prefix", ["file://", "file://localhost", "FILE://", "file://LOCALHOST"])
def test_a_file_url_is_decoded(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a b?c#d%\xe9"
    path.write_bytes(b"odd")
    assert drain(prefix + quote(str(path))) == b"odd"
    latin = os.fsencode(tmp_path) + b"/\xe9"
    Path(os.fsdecode(latin)).write_bytes(b"latin")
    assert drain(f"file://{tmp_path}/%E9") == b"latin"


@pytest.mark.parametrize("url", ["file://elsewhere/etc/passwd", "file://127.0.0.1/etc/passwd", "file://a@localhost/x"])
def test_a_file_url_of_another_host_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="names a file of the host"):
        schemes.open(url, NO_FILE)


@pytest.mark.parametrize("url", ["/srv/a\0b", "file:///srv/a%00b", "file:///srv/%2e%2e/etc/passwd", "file://"])
def test_the_guard_sees_the_decoded_path(url: str) -> None:
    with pytest.raises(MadrigalError):
        drain(url)


def test_what_the_guard_says_is_the_answer(tmp_path: Path) -> None:
    (tmp_path / "image").touch()

    def strict(path: str) -> int:
        return door.open_allowed(path, "", "/", ())

    for url in (str(tmp_path / "image"), f"file://{tmp_path}/image"):
        with pytest.raises(Forbidden):
            schemes.open(url, schemes.Terms(strict))
        with pytest.raises(Forbidden):
            size.virtual_size(url, schemes.Terms(strict))
    with pytest.raises(NotFound):
        schemes.open("/nowhere/at/all", TERMS)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/x", "'ftp://' is not a known"),
        ("gopher://x", "file://, http://, https://"),
        ("s3+x://bucket/x", "s3\\+x"),
        ("", "neither an absolute path nor a URL"),
        ("image.qcow2", "neither an absolute path nor a URL"),
        ("file:/etc/passwd", "neither an absolute path nor a URL"),
        ("http:/host/x", "neither an absolute path nor a URL"),
        ("javascript:alert", "neither an absolute path nor a URL"),
        ("http://", "it has no host"),
        ("http:///x", "it has no host"),
        ("http://host:port/", "host or port is malformed"),
        ("http://host:99999/", "host or port is malformed"),
        ("http://[::1/", "host or port is malformed"),
        ("http://host/a b", "blank or a control character"),
        ("http://host/a\r\nX-Evil: 1", "blank or a control character"),
        ("http://host\n/", "blank or a control character"),
    ],
)
def test_what_cannot_be_a_source_is_a_usage_error(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        schemes.open(url, NO_FILE)
    assert raised.value.status == 2


def test_a_directory_is_for_the_caller_to_copy(tmp_path: Path) -> None:
    with schemes.open(
        str(tmp_path), schemes.Terms(lambda path: door.open_allowed(path, "", "", (), directory=True))
    ) as opened:
        assert opened.local_fd is not None
        with pytest.raises(SourceUnavailable, match="directory"):
            opened.read(10)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("", None),
        ("1", 1),
        ("100000", 100000),
        ("500k", 500 << 10),
        ("10M", 10 << 20),
        ("10m", 10 << 20),
        ("2G", 2 << 30),
    ],
)
def test_a_rate_is_read_as_curl_does(text: str, rate: int | None) -> None:
    assert pace.parse(text, "LIMIT_TRANSFER_BW") == rate


@pytest.mark.parametrize(
    "text", ["0", "0k", "-1", "k", "1.5M", "10MB", "1 M", " 1", "1;id", "1\n", "½", "1" * 20, "1E"]
)
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="LIMIT_TRANSFER_BW"):
        pace.parse(text, "LIMIT_TRANSFER_BW")


class Clock:
    """Time that passes only in sleep()."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.mark.parametrize("rate", [100, 200 << 10, 7 << 20])
def test_who_reads_at_a_rate_waits_as_long_as_that_takes(
    tmp_path: Path, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("madrigal.onhost.pace.time", clock)
    length = rate * 4 + 1
    (tmp_path / "image").write_bytes(os.urandom(length))
    most, read = 0, 0
    with schemes.open(str(tmp_path / "image"), TERMS, rate=rate) as source:
        while data := source.read(MIB):
            read += len(data)
            most = max(most, len(data))
            assert clock.slept <= read / rate + 1e-6  # no longer than needed
            assert read <= clock.slept * rate + 1
    assert (read, round(clock.slept)) == (length, 4)
    assert most <= max(rate // 4, 1024)  # little at a time: a server sees a slow reader, and no pauses


def test_time_that_passes_elsewhere_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("madrigal.onhost.pace.time", clock)
    at = Pace(1000)
    clock.now += 2
    at.took(1500)
    assert clock.slept == 0
    at.took(1500)
    assert clock.slept == 1
    frames = [(b"O", 0, b"{}" * 1000), (b"D", 0, bytes(4000)), (b"C", 0, bytes(4))]
    clock.slept = 0
    assert list(pace.paced(iter(frames), 1000)) == frames
    assert clock.slept == 4


def digests(data: bytes) -> dict[str, str]:
    return {name: hashlib.new(name.lower(), data).hexdigest() for name in ("MD5", "SHA1", "SHA256")}


def test_digests_are_of_the_bytes_as_fetched(web: Web) -> None:
    gz = packed(content(), "gzip")
    url = web.page("/image.gz", gz)
    assert drain(url, digests(gz)) == content()
    assert drain(url, digests(gz), decompress=False) == gz
    upper = {name.lower(): f" {value.upper()}\n" for name, value in digests(gz).items()}
    assert drain(url, upper) == content()
    assert drain(url, {"MD5": "", "SHA1": ""}) == content()
    with pytest.raises(DigestMismatch):
        drain(url, digests(content()))


@pytest.mark.parametrize("name", ["MD5", "SHA1", "SHA256"])
def test_every_digest_given_is_checked(web: Web, name: str) -> None:
    wrong = digests(content()) | {name: digests(b"other")[name]}
    with pytest.raises(DigestMismatch) as raised:
        drain(web.page("/image", content()), wrong)
    assert raised.value.status == 40
    for word in (name, wrong[name], digests(content())[name], "/image"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MD5", "abc"),
        ("MD5", "g" * 32),
        ("SHA1", "0" * 41),
        ("SHA256", "0" * 40),
        ("MD5", "0" * 31 + ";"),
        ("MD5", "$(touch /tmp/x)"),
        ("SHA1", "0" * 39 + "\u0660"),
        ("SHA512", "0" * 128),
        ("PATH", ""),
    ],
)
def test_a_digest_that_cannot_be_one_is_refused_before_a_byte_is_read(name: str, value: str) -> None:
    class Untouched(schemes.Source):
        name = "untouched"
        size = None

        def read(self, most: int) -> bytes:
            raise AssertionError("read")

        def close(self) -> None:
            pass

    with pytest.raises(UsageError, match=name):
        stream.fetch(Untouched(), lambda _: None, decompress=True, digests={name: value}, limit=None)


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x")
    code = """
import sys
before = set(sys.modules)
from madrigal import inspector
from madrigal.onhost import guard
from madrigal.source import schemes, size, stream
opened = schemes.open(sys.argv[1], schemes.Terms(lambda path: guard.open_allowed(path, "", "", ())))
stream.fetch(opened, lambda _: None, decompress=True, digests={}, limit=None)
heavy = "urllib http ssl socket hashlib zlib bz2 lzma zstandard subprocess tempfile shutil pathlib typing"
heavy += " dataclasses inspect logging email"
print(*sorted(set(heavy.split()) & (set(sys.modules) - before)))
"""
    env = {"PYTHONPATH": str(Path(schemes.__file__).parents[2])}
    argv: list[str | Path] = [sys.executable, "-S", "-c", code, tmp_path / "image"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "\n"


def test_the_real_packers_are_here() -> None:
    assert all(shutil.which(packer) for packer in PACKERS)


def test_a_download_is_a_file_without_a_name(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = web.page("/init.sh", content())
    with download.downloaded(url) as fd:
        assert os.pread(fd, len(content()) + 1, 0) == content()
        assert os.listdir(tmp_path) == []
        assert os.fstat(fd).st_mode & 0o777 == 0o600
    with (
        pytest.raises(Forbidden, match="expected a path of the front-end, http://"),
        download.downloaded("file:///etc/passwd"),
    ):
        pass
    with pytest.raises(SourceUnavailable), download.downloaded(web.url + "/nothing"):
        pass
