"""What parses is fed with anything: it answers, or raises one of madrigal.errors, and nothing else; it ends soon.

hypothesis makes inputs out of right ones (SEEDS); those worth keeping are files in tests/corpus, which are always tried
first.  The parsers are in readers.py and readers_of_hosts.py.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import resource
import signal
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import readers
import readers_of_hosts
from conftest import TREE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import MOST, RIGHT, RIGHT_VM
from readers_of_hosts import framed, qcow2

from madrigal.conformance import broken
from madrigal.errors import MadrigalError

READERS = {**readers.READERS, **readers_of_hosts.READERS}
CORPUS = TREE / "tests/corpus"
SOME, MANY = (
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck)) for count in (100, 1500)
)
SECONDS = 20
"""That one input may take."""
MEMORY = 2 << 30
"""Bytes of address space that this process may have more than it has."""

NUMBERS = (b"0", b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"18446744073709551616", "²".encode(), b"NaN")
JSON = (b"null", b"true", b'""', b"[]", b"{}", b"[" * 100_000, b'"\\ud800"', b"1.5")
BYTES = (b"\0", b"\xff" * 8, b"\x7f" * 4, b"\n", b"\r\n", b"\x1e", "é".encode(), b"'", b'"', b"../", b"%00")
TOKENS = (*NUMBERS, *JSON, *BYTES)


def _tar(content: bytes = b"disk" * 175) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        about = tarfile.TarInfo("d/disk-é")
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return made.getvalue()


def _zip(content: bytes = b"disk" * 500) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disk", content)
    return made.getvalue()


def _http(*headers: str, body: bytes = b"x" * 20, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def _rpc(*values: str) -> bytes:
    data = "".join(f"<value>{value}</value>" for value in values)
    inner = f"<params><param><value><array><data>{data}</data></array></value></param></params>"
    return _http(body=f"<?xml version='1.0'?><methodResponse>{inner}</methodResponse>".encode())


def _about(path: str = "", type: str = "file", **more: object) -> bytes:
    about = {"path": path, "type": type, "size": 70_000, "allocated": 70_000, "mode": 0o600, "mtime": 1, **more}
    return json.dumps({"owner": [0, 0], "verify": "crc32", **about}).encode()


def _frames() -> list[bytes]:
    data = b"data" * 1000
    check = zlib.crc32(data).to_bytes(4, "big")
    zero = zlib.crc32((5000).to_bytes(8, "big"), 8000).to_bytes(4, "big")
    end = (b"X", 0, b"")
    return [
        framed((b"O", 0, _about()), (b"D", 0, data), (b"C", 0, check), end),
        framed((b"O", 0, _about()), (b"D", 0, data), (b"V", 0, check), (b"Z", 8000, (5000).to_bytes(8, "big"))),
        framed((b"O", 0, _about()), (b"Z", 8000, (5000).to_bytes(8, "big")), (b"C", 0, zero), end),
        framed((b"O", 0, _about(verify="none")), (b"P", 0, zlib.compress(data)), (b"C", 0, b""), end),
        framed(
            (b"O", 0, _about("", "dir")),
            (b"O", 0, _about("d", "dir")),
            (b"O", 0, _about("d/l", "link", target="../x")),
            (b"O", 0, _about("d/f", size=4000)),
            (b"D", 0, data),
            (b"C", 0, check),
            end,
        ),
        framed((b"E", 0, b'["NotFound", "it is not there"]')),
    ]


DOMAIN = b"""<domain><devices><disk type='file'><driver type='qcow2'/><source file='/x/disk.0' index='1'/>
<backingStore type='file' index='2'><format type='raw'/><source file='/x/1'/><backingStore/></backingStore>
<mirror type='file' ready='yes'/><target dev='vda'/></disk></devices></domain>"""
SNAPSHOTS = [
    ["disk.0", "link", "disk.0.snap/1"],
    ["disk.0.snap/disk.0.snap", "link", "."],
    ["disk.0.snap/0", "qcow2", ""],
    ["disk.0.snap/1", "qcow2", "disk.0.snap/0"],
    ["disk.0.snap/3.current", "file", "/0/17/disk.0.snap/1"],
]

SEEDS: dict[str, list[bytes]] = {
    "dump": [RIGHT, base64.b64decode(RIGHT)],
    "vm": [RIGHT_VM],
    "argument": [
        b"host01:/var/lib/one/datastores/0/17/disk.0",
        b"host01:/ds/0/17\n0:1\none-17\n5\n17\n0",
        b"host01:/ds/0/17\n17\n8\n-1\n-1",
        b"disk.1",
    ],
    "credentials": [b"oneadmin:secret\n", b"http://host.example:2633/RPC2"],
    "answer-of-front-end": [
        _rpc("<boolean>1</boolean>", "<string>&lt;VM&gt;&lt;ID&gt;1&lt;/ID&gt;&lt;/VM&gt;</string>", "<i4>0</i4>"),
        _rpc("<boolean>0</boolean>", "<string>no</string>", "<i4>1024</i4>"),
    ],
    "configuration": [b"A=b\nexport C='d e' # f\nG=\"h\\$i\"\n"],
    "driver": [Path(TREE, path, "driver.toml").read_bytes() for path in ("tm/shared", "datastore/fs")],
    "qcow2-options": [b"-o cluster_size=2M,compat=1.1", b"lazy_refcounts=on"],
    "monitord": [b'NETWORK = [ ADDRESS = "0.0.0.0", MONITOR_ADDRESS = "auto", PORT = 4124, PUBKEY = "" ]\n'],
    "ssh-config": [
        b"Host *.example !x\n User one\n Port 2222\n IdentityFile ~/.ssh/%h\n KexAlgorithms +a*,b\nMatch user one\n"
        b" ProxyJump a@b:22,[::1]:5\n HostName %h.x\nInclude none\n SetEnv A=b\n"
    ],
    "known-hosts": [b"host.example,h? ssh-rsa a2V5\n@revoked * ssh-rsa a2V5\n|1|c2FsdA==|ZGlnZXN0 ssh-rsa a2V5\n"],
    "image": [
        *(head + bytes(600) for head in (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"KDMV", b"vhdxfile", b"conectix")),
        b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "x" 0\n',
        b"QED\0" + bytes(100),
        bytes(64) + b"\x7f\x10\xda\xbe" + bytes(600),
    ],
    "qcow2": [qcow2(""), qcow2("disk.0.snap/0"), qcow2("/x", "raw")],
    "map": [
        b'[{ "start": 0, "length": 65536, "present": true, "zero": false, "data": true, "offset": 327680},\n'
        b'{ "start": 65536, "length": 983040, "depth": 0, "zero": true, "data": false}]\n'
    ],
    "packed": [
        *(pack(b"disk" * 3000) for pack in (gzip.compress, bz2.compress, lzma.compress)),
        _tar(),
        _zip(),
        gzip.compress(_tar()),
        b"\x28\xb5\x2f\xfd\x64\x00\x01\x45\x00\x00\x10AA\x01\x00\xfb\x2b\x80\x05",
        b"\x04\x22\x4d\x18\x68\x40\x10\x00\x00\x00\x00\x00\x00\x00\xa7\x04\x00\x00\x80disk\x00\x00\x00\x00",
    ],
    "url": [
        b"https://user:pass@host.example:8443/a/b?c=d#e",
        b"s3://bucket.x/key/object",
        b"ssh://one@host:/x/y",
        b"/x/y",
        b"http://[::1]:80/",
    ],
    "http": [
        _http("Content-Length: 20", 'ETag: "x"'),
        _http("Content-Length: 30", 'ETag: "x"')
        + b"\x1e"
        + _http("Content-Range: bytes 20-29/30", 'ETag: "x"', body=b"y" * 10, status="206 Partial Content"),
        _http("Content-Length: 30") + b"\x1e" + _http("Content-Length: 30", body=b"x" * 30),
        _http("Location: /other", body=b"", status="302 Found") + b"\x1e" + _http("Content-Length: 20"),
        _http("Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n0\r\n\r\n"),
        _http("Retry-After: 0", body=b"", status="503 Busy") + b"\x1e" + _http("Content-Length: 20"),
        _http("Last-Modified: Sat, 01 Jan 2022 00:00:00 GMT", "Date: Sun, 02 Jan 2022 00:00:00 GMT"),
        _http("Content-Range: bytes */20", body=b"", status="416 No"),
    ],
    "answer-of-host": [
        b'{"busy": true, "bytes": 5}\n{"ok": false}\n',
        b'{"error": ["NotFound", "not there", ["left"]]}\n',
        framed((b"O", 0, _about()), (b"D", 0, b"data"), (b"X", 0, b"")) + b'{"ok": null}\n',
        b'{"busy": true}\n' + framed((b"X", 0, b"")) + b'{"ok": null}\n',
    ],
    "file-of-host": [
        b'{"size": 10, "version": [1, 2]}\n' + struct.pack(">QI4sQIQI", 0, 4, b"data", 10, 0, 10, 0),
        b'{"error": ["Forbidden", "not allowed"]}\n',
    ],
    "frames": _frames(),
    "described": [
        json.dumps({"of": [1, 2, 3, 4], "described": {"block": 65536, "kind": "sha256", "digests": "AAAA"}}).encode()
    ],
    "virsh": [DOMAIN, b"running", b"Capacity:       1048576\nAllocation: 0\n", b" type=Block Copy\n cur=1\n end=2\n"],
    "snapshots": [json.dumps(SNAPSHOTS).encode()],
}
"""What each reader takes."""


class Hangs(AssertionError):
    """An input took too long."""


def survives(name: str, data: bytes) -> None:
    """That the reader answers, or says in one of our words what is wrong, soon and with little memory."""

    def late(*_: object) -> None:
        raise Hangs(f"{name} takes longer than {SECONDS} s for {data[:200]!r}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.suppress(MadrigalError):
            READERS[name](data)
    except MemoryError:
        pytest.fail(f"{name} wants more than {MEMORY} bytes for {data[:200]!r}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*/*")), ids=lambda path: str(path.relative_to(CORPUS)))
def test_what_was_kept(path: Path) -> None:
    survives(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("name", sorted(READERS))
def test_what_is_right(name: str) -> None:
    """Else nothing would be learnt from what is made of it."""
    for data in SEEDS[name]:
        survives(name, data)


def test_every_reader_has_seeds_and_a_corpus() -> None:
    assert sorted(os.listdir(CORPUS)) == sorted(READERS) == sorted(SEEDS)


# -- what is made ----------------------------------------------------------------------------------------------------

EDIT = st.tuples(
    st.integers(0, 5000), st.sampled_from((0, 0, 1, 2, 8, 40)), st.binary(max_size=4) | st.sampled_from(TOKENS)
)


def _edited(made: tuple[bytes, list[tuple[int, int, bytes]], int | None]) -> bytes:
    data, edits, length = made
    for at, gone, put in edits:
        at %= len(data) + 1
        data = data[:at] + put + data[at + gone :]
    return data if length is None else data[: length % (len(data) + 1)]


def _made_of(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of SEEDS with a few changes, perhaps cut off."""
    cut = st.none() | st.integers(0, 5000)
    return st.tuples(st.sampled_from(seeds), st.lists(EDIT, max_size=5), cut).map(_edited)


def _anything(name: str, data: st.DataObject) -> None:
    survives(name, data.draw(st.binary(max_size=300) | _made_of(SEEDS[name])))


@pytest.mark.parametrize("name", sorted(READERS))
@SOME
@given(st.data())
def test_anything(name: str, data: st.DataObject) -> None:
    _anything(name, data)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(READERS))
@MANY
@given(st.data())
def test_more_of_anything(name: str, data: st.DataObject) -> None:
    _anything(name, data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def _other_values(document: object) -> st.SearchStrategy[object]:
    """DOCUMENT with other values here and there, of any type, or without them."""
    if isinstance(document, dict):
        kept = {name: st.just(value) | _other_values(value) for name, value in document.items()}
        return st.fixed_dictionaries({}, optional=kept) | VALUES
    if isinstance(document, list):
        return st.tuples(*[st.just(value) | _other_values(value) for value in document]).map(list) | VALUES
    return VALUES


PIECE = {"start": 0, "length": 65536, "zero": False, "data": True, "offset": 327680}
DOCUMENTS: dict[str, tuple[object, Callable[[bytes], bytes]]] = {
    "map": (PIECE, lambda text: b"[" + text + b"]\n"),
    "answer-of-host": ({"ok": 1, "error": ["NotFound", "x", []], "busy": True}, lambda text: text + b"\n"),
    "file-of-host": ({"size": 4, "version": [1], "error": ["NotFound", "x"]}, lambda text: text + b"\n"),
    "frames": (json.loads(_about()), lambda text: framed((b"O", 0, text), (b"C", 0, b""), (b"X", 0, b""))),
    "described": (json.loads(SEEDS["described"][0]), lambda text: text),
    "snapshots": (SNAPSHOTS, lambda text: text),
}


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
@SOME
@given(st.data())
def test_other_values(name: str, data: st.DataObject) -> None:
    """JSON that is right, with values that are not."""
    document, around = DOCUMENTS[name]
    survives(name, around(json.dumps(data.draw(_other_values(document))).encode()))


NAMES = st.sampled_from(
    ["disk.0", *(f"disk.0.snap/{name}" for name in "0 1 2 3 10 3.current 0.current disk.0.snap x".split())]
)
LEADS = st.sampled_from(
    ["", ".", "..", "0", "1", "2", "disk.0", "disk.0.snap/1", "disk.0.snap/2", "/", "/etc/passwd", "x:y"]
)


@SOME
@given(st.lists(st.tuples(NAMES, st.sampled_from(["link", "file", "qcow2", "dir", "fifo"]), LEADS), max_size=8))
def test_odd_snapshots(entries: list[tuple[str, str, str]]) -> None:
    survives("snapshots", json.dumps(entries).encode())


HEADERS = st.tuples(
    st.sampled_from(["Content-Length", "Content-Range", "Location", "ETag", "Last-Modified", "Date", "Retry-After"])
    | st.sampled_from(["Transfer-Encoding", "Content-Encoding", "X"]),
    st.sampled_from(
        ["5", "-1", "20", "9" * 30, "²", "chunked", '"x"', 'W/"x"', "bytes 5-19/20", "bytes */*", "bytes 9-5/5"]
    )
    | st.sampled_from(
        ["/", "//x", "http://[", "http://h:99999/", "ftp://x/", "\x00", "é", "Sat, 99 Jan 0000", "é" * 9000]
    )
    | st.text(max_size=20),
)
ANSWER = st.builds(
    lambda status, headers, body: _http(*(f"{name}: {value}" for name, value in headers), body=body, status=status),
    st.sampled_from(
        ["200 OK", "206 Partial", "302 Found", "416 No", "503 Busy", "404 No", "100 Continue", "x", "99999 y"]
    ),
    st.lists(HEADERS, max_size=4),
    st.sampled_from([b"", b"x" * 5, b"x" * 20, b"5\r\nabcde\r\n0\r\n\r\n", b"ffffffffffffffff\r\n"])
    | st.binary(max_size=30),
)


@SOME
@given(st.lists(ANSWER, min_size=1, max_size=4))
def test_odd_servers(answers: list[bytes]) -> None:
    survives("http", b"\x1e".join(answers))


@SOME
@given(st.integers(0, 1 << 30))
def test_broken_dumps(seed: int) -> None:
    for _, changed in broken.dumps(RIGHT, 10, str(seed)):
        survives("dump", changed)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "gzip in gzip", "tar in gzip", "zip"])
def test_bombs(kind: str) -> None:
    """What unpacks to much comes in pieces, and is not kept."""
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": functools.partial(lzma.compress, preset=0),
        "gzip in gzip": lambda data: gzip.compress(gzip.compress(data)),
        "tar in gzip": lambda data: gzip.compress(_tar(data)),
        "zip": _zip,
    }
    made = packers[kind](bytes(4 * MOST))
    tracemalloc.start()
    try:
        survives("packed", made)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
