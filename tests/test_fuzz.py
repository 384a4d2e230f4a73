"""What parses is fed with anything: it answers, or raises one of madrigal.errors, and nothing else; it ends soon.

hypothesis makes inputs out of right ones (seeds.py); those worth keeping are files in tests/corpus, which are always
tried first.  The parsers are in readers.py and readers_of_hosts.py.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import json
import lzma
import os
import re
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import readers
import readers_of_hosts
import seeds
from conftest import TREE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import MOST, RIGHT
from readers_of_hosts import framed

from madrigal.conformance import broken
from madrigal.errors import HostUnreachable, MadrigalError
from madrigal.host.known_hosts import fits
from madrigal.onhost import survey

READERS = {**readers.READERS, **readers_of_hosts.READERS}
CORPUS = TREE / "tests/corpus"
SOME, MANY = (
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck)) for count in (100, 800)
)
SECONDS = 20
"""That one input may take."""
MEMORY = 2 << 30
"""Bytes of address space that this process may have more than it has."""

NUMBERS = (b"0", b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"18446744073709551616", "²".encode(), b"NaN")
JSON = (b"null", b"true", b'""', b"[]", b"{}", b"[" * 100_000, b'"\\ud800"', b"1.5")
BYTES = (b"\0", b"\xff" * 8, b"\x7f" * 4, b"\n", b"\r\n", b"\x1e", "é".encode(), b"'", b'"', b"../", b"%00")
TOKENS = (*NUMBERS, *JSON, *BYTES)


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
    for data in seeds.SEEDS[name]:
        survives(name, data)


def test_every_reader_has_seeds_and_a_corpus() -> None:
    assert sorted(os.listdir(CORPUS)) == sorted(READERS) == sorted(seeds.SEEDS)


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
    """One of seeds.SEEDS with a few changes, perhaps cut off."""
    cut = st.none() | st.integers(0, 5000)
    return st.tuples(st.sampled_from(seeds), st.lists(EDIT, max_size=5), cut).map(_edited)


def _anything(name: str, data: st.DataObject) -> None:
    survives(name, data.draw(st.binary(max_size=300) | _made_of(seeds.SEEDS[name])))


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
    "frames": (json.loads(seeds.about()), lambda text: framed((b"O", 0, text), (b"C", 0, b""), (b"X", 0, b""))),
    "described": (json.loads(seeds.SEEDS["described"][0]), lambda text: text),
    "snapshots": (seeds.SNAPSHOTS, lambda text: text),
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
    lambda status, headers, body: seeds.http(
        *(f"{name}: {value}" for name, value in headers), body=body, status=status
    ),
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
        "tar in gzip": lambda data: gzip.compress(seeds.tar(data)),
        "zip": seeds.zipped,
    }
    made = packers[kind](bytes(4 * MOST))
    tracemalloc.start()
    try:
        survives("packed", made)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


PATTERN = st.text(alphabet="ab*?", max_size=8)


@SOME
@given(PATTERN, st.text(alphabet="ab", max_size=8))
def test_patterns_of_host_names(pattern: str, name: str) -> None:
    """As a regular expression has it, which for some patterns would take for ever."""
    assert fits(pattern, name) == bool(re.fullmatch(pattern.replace("*", ".*").replace("?", "."), name))
    assert not fits("*a" * 50 + "*b", "a" * 250)


def test_a_host_that_never_ends_its_line() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HostUnreachable, match="64 MiB in one line"):
            readers_of_hosts.Pipe(bytes(80 << 20)).readline(20)
        assert tracemalloc.get_traced_memory()[1] < 250 << 20
    finally:
        tracemalloc.stop()


def test_names_of_mounts() -> None:
    """mountinfo has any bytes, and blanks and backslashes as octal numbers."""
    assert survey.unescaped(b"/mnt/a\\040b\\134") == "/mnt/a b\\"
    assert survey.unescaped("/mnt/é".encode()) == "/mnt/é"
    assert os.fsencode(survey.unescaped(b"/mnt/\xff")) == b"/mnt/\xff"
    assert survey._type("/proc") == "proc"
