"""Downloads that are cut: they go on where they were, with the right bytes, or say why they cannot."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import random
import time
from pathlib import Path

import pytest
from servers import DRIP, Handler, Web
from sources import MIB, NO_FILE, content, drain

from madrigal.errors import DeadlineExceeded, DigestMismatch, MadrigalError, SourceUnavailable
from madrigal.source import resume, schemes, stream

pytestmark = pytest.mark.usefixtures("no_proxy", "hasty")

DATE = "Sat, 21 Nov 2026 10:00:00 GMT"
LATER = "Sat, 21 Nov 2026 10:00:01 GMT"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries that a test can wait for."""
    monkeypatch.setattr(resume, "PAUSE", 0.001)


@pytest.mark.parametrize("size", [1 << 30, pytest.param(4 << 30, marks=pytest.mark.long)])
def test_4_gib_cut_ten_times_are_right_and_fetched_once(web: Web, tmp_path: Path, size: int) -> None:
    dice = random.Random(4)
    path = tmp_path / "image"
    with path.open("wb") as file:
        for offset in range(0, size, size // 64):  # what is between are holes, which come over the wire as zeros
            file.seek(offset)
            file.write(dice.randbytes(MIB))
        file.truncate(size)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()
    with path.open("rb") as file:
        url = web.file("/image", file, cuts=[dice.randrange(size // 40, size // 11) for _ in range(10)])
        with schemes.open(url, NO_FILE) as opened:
            got = stream.fetch(opened, lambda _: None, decompress=True, digests={"SHA1": digest}, limit=None)
    assert got == size
    assert len(web.asked) == 11
    assert web.sent <= 1.05 * size


@pytest.mark.parametrize("seed", range(5))
def test_digest_and_unpacking_go_on_where_the_connection_broke(web: Web, seed: int) -> None:
    dice = random.Random(seed)
    packed = gzip.compress(dice.randbytes(2 * MIB) + content(), 1)
    cuts = [dice.randrange(300000) for _ in range(10)]
    digest = {"SHA256": hashlib.sha256(packed).hexdigest()}
    assert drain(web.file("/image.gz", packed, cuts), digest) == gzip.decompress(packed)
    starts = [int(headers["Range"][6:-1]) for _, headers in web.asked[1:] if "Range" in headers]
    assert starts == sorted(starts)
    with pytest.raises(DigestMismatch):
        drain(web.file("/image.gz", packed, cuts), {"SHA256": "0" * 64})


def test_what_if_range_says(web: Web) -> None:
    assert drain(web.file("/a", content(), [MIB], ETag='"x-y"')) == content()
    assert web.asked[-1][1]["If-Range"] == '"x-y"'
    # A date names the bytes if no second write can have had the same.
    for date, etag in ((LATER, 'W/"1"'), (LATER, "nonsense")):
        assert drain(web.file("/a", content(), [MIB], ETag=etag, Last_Modified=DATE, Date=date)) == content()
        assert web.asked[-1][1]["If-Range"] == DATE


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": ""},
        {"ETag": 'W/"1"'},
        {"ETag": 'W/"1"', "Last_Modified": "yesterday"},
        {"ETag": '"a', "Last_Modified": LATER, "Date": LATER},  # it could have changed twice in that second
    ],
)
def test_without_a_sure_name_it_is_read_again_and_compared(web: Web, headers: dict[str, str]) -> None:
    if headers.get("Date"):
        headers = {**headers, "Date": LATER}
    url = web.raw("/image")
    bodies = iter([content(), content(), b"x" + content()[1:]])
    page = web.pages
    answered = 0

    def answer(handler: Handler) -> None:
        nonlocal answered
        body, answered = next(bodies), answered + 1
        handler.send_response_only(200)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if answered == 1:
            handler.wfile.write(body[:MIB])
            handler.reset()
        else:
            handler.wfile.write(body)

    page["/image"] = answer
    assert drain(url) == content()
    assert ["Range" in asked for _, asked in web.asked] == [False, False]
    answered = 0
    bodies = iter([content(), b"x" + content()[1:]])
    with pytest.raises(SourceUnavailable, match="was changed while it was fetched"):
        drain(url)


def test_200_instead_of_206_is_read_from_the_beginning(web: Web) -> None:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content())))
        handler.send_header("ETag", '"1"' if len(web.asked) < 4 else '"2"')
        handler.end_headers()
        handler.wfile.write(content()[: MIB * len(web.asked)])
        handler.reset()

    web.pages["/image"] = answer
    with pytest.raises(SourceUnavailable, match="was changed while it was fetched"):
        drain(web.url + "/image")
    assert len(web.asked) == 4
    web.asked.clear()
    web.pages["/image"] = lambda handler: answer(handler) if len(web.asked) < 3 else web_page(handler)

    def web_page(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content())))
        handler.send_header("ETag", '"1"')
        handler.end_headers()
        handler.wfile.write(content())

    assert drain(web.url + "/image") == content()


HEAD = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 6\r\n\r\nabc'
OPEN = b'HTTP/1.1 200 OK\r\nETag: "1"\r\n\r\nabc'
CHUNKED = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n'
PART = b"HTTP/1.1 206 Partial Content\r\n"


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (HEAD, PART + b'ETag: "1"\r\nContent-Range: bytes 3-5/6\r\n\r\ndef', b"abcdef"),
        (HEAD, PART + b"Content-Range: bytes 3-5/*\r\n\r\ndef", b"abcdef"),
        (HEAD, b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 6\r\n\r\nabcdef', b"abcdef"),
        (CHUNKED, PART + b"Content-Range: bytes 3-5/6\r\nContent-Length: 3\r\n\r\ndef", b"abcdef"),
        (CHUNKED, b"HTTP/1.1 416 X\r\nContent-Range: bytes */3\r\n\r\n", b"abc"),  # only its end was missing
        (HEAD, PART + b'ETag: "2"\r\nContent-Range: bytes 3-5/6\r\n\r\ndef', "was changed"),
        (HEAD, PART + b'ETag: "1"\r\nContent-Range: bytes 3-6/7\r\n\r\ndefg', "was changed"),
        (HEAD, b'HTTP/1.1 200 OK\r\nETag: "2"\r\nContent-Length: 6\r\n\r\nabcdef', "was changed"),
        (HEAD, b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 7\r\n\r\nabcdefg', "was changed"),
        (HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nxyzdef", "was changed"),
        (HEAD, b"HTTP/1.1 416 X\r\nContent-Range: bytes */3\r\n\r\n", "was changed"),
        (HEAD, b"HTTP/1.1 416 X\r\n\r\n", "was changed"),
        (CHUNKED, b"HTTP/1.1 416 X\r\nContent-Range: bytes */4\r\n\r\n", "was changed"),
        (HEAD, PART + b"Content-Range: bytes 0-5/6\r\n\r\nabcdef", "another part"),
        (HEAD, PART + b"Content-Range: bytes 4-5/6\r\n\r\nef", "another part"),
        (HEAD, PART + b"Content-Range: bytes */6\r\n\r\ndef", "another part"),
        (HEAD, PART + b"Content-Type: multipart/byteranges\r\n\r\ndef", "another part"),
        (HEAD, PART + b"Content-Range: octets 3-5/6\r\n\r\ndef", "another part"),
        (HEAD, b"HTTP/1.1 404 Gone\r\n\r\n", "answered 404"),
        (HEAD, b"HTTP/1.1 403 Expired\r\n\r\n", "answered 403"),
        (HEAD, b"HTTP/1.1 302 X\r\nLocation: file:///etc/passwd\r\n\r\n", "only http:// and https://"),
        # a length that never comes true
        (HEAD, PART + b"Content-Range: bytes 3-5/6\r\n\r\n", "broke off after 3 of 6"),
        (HEAD, b"HTTP/1.1 503 Busy\r\n\r\n", "answered 503"),
    ],
)
def test_every_second_answer_is_judged(web: Web, first: bytes, second: bytes, result: bytes | str) -> None:
    answers = itertools.chain([first], itertools.repeat(second))

    def answer(handler: Handler) -> None:
        handler.wfile.write(next(answers))
        handler.close_connection = True

    web.pages["/image"] = answer
    if isinstance(result, bytes):
        assert drain(web.url + "/image") == result
    else:
        with pytest.raises(MadrigalError, match=result):
            drain(web.url + "/image")
    assert web.asked[1][1]["Range"] == "bytes=3-"


def test_a_body_that_ends_with_the_connection_has_no_other_end(web: Web) -> None:
    """Whether it was cut nobody can tell; a digest can."""
    assert drain(web.raw("/image", OPEN)) == b"abc"


def test_a_server_that_is_busy_or_away_is_asked_again(web: Web) -> None:
    answers = [
        b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\n\r\n",
        b"",
        b"HTTP/1.1 429 Slow down\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    ]

    def answer(handler: Handler) -> None:
        handler.wfile.write(answers[len(web.asked) - 1])
        handler.close_connection = True

    web.pages["/image"] = answer
    assert drain(web.url + "/image") == b"abc"
    assert len(web.asked) == 4


def test_the_pauses_become_longer_and_heed_the_server(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    class Clock:
        monotonic = staticmethod(time.monotonic)
        sleep = slept.append

    monkeypatch.setattr(resume, "time", Clock)
    monkeypatch.setattr(resume, "PAUSE", 0.5)
    with pytest.raises(SourceUnavailable, match="answered 502"):
        drain(web.raw("/image", b"HTTP/1.1 502 X\r\n\r\n"))
    assert slept == [0.5, 1, 2]
    slept.clear()
    with pytest.raises(SourceUnavailable, match="answered 503"):
        drain(web.raw("/image", b"HTTP/1.1 503 X\r\nRetry-After: 7\r\n\r\n"))
    assert slept == [7, 7, 7]
    slept.clear()
    with pytest.raises(SourceUnavailable, match="answered 503"):  # longer than anybody waits here
        drain(web.raw("/image", b"HTTP/1.1 503 X\r\nRetry-After: 99999999999999\r\n\r\n"))
    assert slept == []


def test_a_connection_that_hangs_is_given_up_for_another(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_STALL_TIMEOUT", "1")

    def answer(handler: Handler) -> None:
        if len(web.asked) > 1:
            handler.wfile.write(PART + b'ETag: "1"\r\nContent-Range: bytes 3-5/6\r\n\r\ndef')
        else:
            handler.wfile.write(HEAD)
            web.over.wait(20)
        handler.close_connection = True

    web.pages["/image"] = answer
    assert drain(web.url + "/image") == b"abcdef"


def test_there_is_an_end_to_it_even_if_it_always_moves(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_SOURCE_TIMEOUT", "0.5")
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"fetching http://.*/image took longer than 0.5 s"):
        drain(web.raw("/image", head, *DRIP * 1000))
    assert time.monotonic() - start < 5


def test_a_moved_page_is_asked_for_where_it_moved_from(web: Web) -> None:
    """A link of a mirror may be good for a minute only."""
    web.file("/signed/1", content(), [MIB])
    web.file("/signed/2", content())

    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"/signed/{1 if len(web.asked) < 3 else 2}")
        handler.end_headers()

    web.pages["/image"] = answer
    assert drain(web.url + "/image") == content()
    assert [path for path, _ in web.asked] == ["/image", "/signed/1", "/image", "/signed/2"]


def test_a_piece_from_elsewhere_of_the_same_file(web: Web) -> None:
    with schemes.open(web.file("/image", content()), NO_FILE) as opened:
        opened.read(10)
        assert opened.peek(MIB, 100) == content()[MIB : MIB + 100]
        assert opened.peek(len(content()) - 1, 1) == content()[-1:]
        assert opened.peek(len(content()) - 1, 2) is None
        web.file("/image", os.urandom(MIB * 4), ETag='"2"')
        assert opened.peek(MIB, 100) is None
    with schemes.open(web.page("/image", content()), NO_FILE) as opened:
        assert opened.peek(MIB, 100) is None
