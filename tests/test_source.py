"""Sources against real servers and real packers: one pass, checked, bounded, and refused in one sentence."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import lzma
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from madrigal import guard as door
from madrigal.errors import (
    BadImage,
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    Forbidden,
    MadrigalError,
    MissingProgram,
    NotFound,
    NotSupported,
    SourceUnavailable,
    UsageError,
)
from madrigal.source import codec, download, pace, schemes, size, stream

MIB = 1 << 20
DRIP: list[bytes | float] = [b"x", 0.1]
PACKERS = {"gzip": "gz", "bzip2": "bz2", "xz": "xz", "zstd": "zst"}


def guard(path: str) -> int:
    return door.open_allowed(path, "", "", ())


def no_file(path: str) -> int:
    raise AssertionError(f"{path} was asked for")


def content(length: int = 3 * MIB + 123) -> bytes:
    """Something that packs, but not to nothing."""
    dice = random.Random(7)
    noise = dice.randbytes(length // 4)
    return (noise + bytes(length // 2) + noise + b"end" * length)[:length]


def packed(data: bytes, packer: str, *options: str) -> bytes:
    """DATA through the real program."""
    argv = [packer, "-c", *options]
    return subprocess.run(argv, input=data, capture_output=True, check=True, timeout=60).stdout


def drain(
    url: str | Path, digests: dict[str, str] | None = None, decompress: bool = True, limit: int | None = None
) -> bytes:
    out = io.BytesIO()
    with schemes.open(str(url), guard=guard) as opened:
        written = stream.fetch(opened, out.write, decompress=decompress, digests=digests or {}, limit=limit)
    assert written == len(out.getvalue())
    return out.getvalue()


# --- how fast ------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(pace, "time", clock)
    length = rate * 4 + 1
    (tmp_path / "image").write_bytes(os.urandom(length))
    most, read = 0, 0
    with schemes.open(str(tmp_path / "image"), guard=guard, rate=rate) as source:
        while data := source.read(MIB):
            read += len(data)
            most = max(most, len(data))
            assert clock.slept <= read / rate + 1e-6  # no longer than needed
            assert read <= clock.slept * rate + 1
    assert (read, round(clock.slept)) == (length, 4)
    assert most <= max(rate // 4, 1024)  # little at a time: a server sees a slow reader, and no pauses


def test_time_that_passes_elsewhere_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    at = pace.Pace(1000)
    clock.now += 2
    at.took(1500)
    assert clock.slept == 0
    at.took(1500)
    assert clock.slept == 1
    frames = [(b"O", 0, b"{}" * 1000), (b"D", 0, bytes(4000)), (b"C", 0, bytes(4))]
    clock.slept = 0
    assert list(pace.paced(iter(frames), 1000)) == frames
    assert clock.slept == 4


# --- local ---------------------------------------------------------------------------------------------------------


def test_a_local_path_gives_its_bytes_size_and_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a b%20c"
    path.write_bytes(content())
    with schemes.open(str(path), guard=guard) as opened:
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
        schemes.open(url, guard=no_file)


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
            schemes.open(url, guard=strict)
        with pytest.raises(Forbidden):
            size.virtual_size(url, guard=strict)
    with pytest.raises(NotFound):
        schemes.open("/nowhere/at/all", guard=guard)


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
        schemes.open(url, guard=no_file)
    assert raised.value.status == 2


def test_a_directory_is_for_the_caller_to_copy(tmp_path: Path) -> None:
    with schemes.open(str(tmp_path), guard=lambda path: door.open_allowed(path, "", "", (), directory=True)) as opened:
        assert opened.local_fd is not None
        with pytest.raises(SourceUnavailable, match="directory"):
            opened.read(10)


# --- web servers ---------------------------------------------------------------------------------------------------


class Web(http.server.ThreadingHTTPServer):
    """A server whose pages are functions of the handler; `asked` has the requests."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.pages: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.over = threading.Event()
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are what is tested

    def page(self, path: str, body: bytes, **headers: str) -> str:
        def answer(handler: Handler) -> None:
            handler.send_response(200)
            for name, value in ({"Content_Length": str(len(body))} | headers).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.pages[path] = answer
        return self.url + path

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        def answer(handler: Handler) -> None:
            handler.send_response(status)
            handler.send_header("Location", to)
            handler.end_headers()

        self.pages[path] = answer
        return self.url + path

    def raw(self, path: str, *pieces: bytes | float) -> str:
        """Bytes as they are, with pauses."""

        def answer(handler: Handler) -> None:
            for piece in pieces:
                if isinstance(piece, bytes):
                    handler.wfile.write(piece)
                    handler.wfile.flush()
                else:
                    self.over.wait(piece)
            handler.close_connection = True

        self.pages[path] = answer
        return self.url + path

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path)
        if page:
            page(self)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate for 127.0.0.1 in one file."""
    place = tmp_path_factory.mktemp("tls")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files: list[str | Path] = ["-keyout", place / "key", "-out", place / "certificate"]
    subprocess.run([*argv, *names, *files], check=True, capture_output=True, timeout=60)
    (place / "both").write_bytes((place / "key").read_bytes() + (place / "certificate").read_bytes())
    return place / "both"


@pytest.fixture
def secure(certificate: Path) -> Iterator[Web]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Web(context)
    yield server
    server.stop()


def test_a_page_is_fetched_once(web: Web) -> None:
    url = web.page("/dir/image.img?token=1", content())
    with schemes.open(url, guard=no_file) as opened:
        assert opened.size == len(content())
        assert opened.local_fd is None
        assert opened.name == web.url + "/dir/image.img?..."
        out = io.BytesIO()
        stream.fetch(opened, out.write, decompress=True, digests={}, limit=None)
        assert opened.read(100) == b""
    assert out.getvalue() == content()
    assert [path for path, _ in web.asked] == ["/dir/image.img?token=1"]


def test_chunks_and_no_length_at_all_are_read_to_the_end(web: Web) -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (n, b"x" * n) for n in (1, 5000, 70000)) + b"0\r\n\r\n"
    chunked = web.raw("/chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    plain = web.raw("/plain", b"HTTP/1.0 200 OK\r\n\r\n", b"a" * 100000, 0.05, b"b")
    empty = web.page("/empty", b"")
    assert drain(chunked) == b"x" * 75001
    assert drain(plain) == b"a" * 100000 + b"b"
    assert drain(empty) == b""
    with schemes.open(chunked, guard=no_file) as opened:
        assert opened.size is None


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    ],
)
def test_a_body_that_is_shorter_than_promised_is_not_taken(web: Web, answer: bytes) -> None:
    url = web.raw("/image", answer)
    with pytest.raises(SourceUnavailable, match="broke off after") as raised:
        drain(url)
    assert raised.value.status == 13
    assert url in str(raised.value)


def test_a_body_longer_than_promised_is_cut_at_the_promise(web: Web) -> None:
    assert drain(web.raw("/image", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef")) == b"abc"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X" * 70000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1000 + b"\r\n",
        b"\0" * 100000,
    ],
)
def test_what_is_not_http_is_said_in_one_sentence(web: Web, answer: bytes) -> None:
    with pytest.raises(SourceUnavailable, match="does not answer"):
        drain(web.raw("/image", answer))


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 500, 503])
def test_any_other_status_is_named_with_the_url_and_no_secret(web: Web, status: int) -> None:
    web.raw("/dir/image?signature=hush", b"HTTP/1.1 %d A \x1b[31mreason\r\nContent-Length: 0\r\n\r\n" % status)
    url = web.url.replace("//", "//me:hush@") + "/dir/image?signature=hush"
    with pytest.raises(SourceUnavailable) as raised:
        drain(url)
    text = str(raised.value)
    assert f"/dir/image?... answered {status}" in text
    assert "hush" not in text
    assert "me:" not in text
    assert text.isprintable()
    assert web.asked[0][1]["Authorization"] == "Basic bWU6aHVzaA=="


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web: Web, status: int) -> None:
    web.page("/there/a%20b?x=%C3%A9", b"here")
    for number, to in enumerate((web.url + "/there/a b?x=\xc3\xa9", "/there/a%20b?x=%C3%A9", "there/a b?x=%C3%A9")):
        web.redirect(f"/{number}", to, status)
        assert drain(f"{web.url}/{number}") == b"here"


@pytest.mark.parametrize(
    "to",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "FILE:///etc/passwd",
        "gopher://x/",
        "data:text/plain,x",
        "s3://b/o",
        "dict:x",
    ],
)
def test_redirects_lead_to_web_servers_only(web: Web, to: str) -> None:
    with pytest.raises(Forbidden, match="only http:// and https:// are followed") as raised:
        schemes.open(web.redirect("/image?hush", to), guard=no_file)
    assert raised.value.status == 21
    assert "hush" not in str(raised.value)


def test_redirects_end(web: Web) -> None:
    for number in range(12):
        web.redirect(f"/{number}", f"/{number + 1}")
    web.page("/12", b"here")
    assert drain(web.url + "/2") == b"here"  # ten
    before = len(web.asked)
    with pytest.raises(SourceUnavailable, match="redirects more than 10 times"):
        drain(web.url + "/1")
    assert len(web.asked) - before == 11
    web.redirect("/loop", "/loop")
    with pytest.raises(SourceUnavailable, match="more than 10 times"):
        drain(web.url + "/loop")


def test_a_redirect_to_nowhere_is_an_answer_like_any_other(web: Web) -> None:
    with pytest.raises(SourceUnavailable, match="answered 302"):
        drain(web.raw("/image", b"HTTP/1.1 302 Found\r\n\r\n"))


def test_a_password_stays_with_its_server(web: Web) -> None:
    other = Web()
    try:
        other.page("/image", b"here")
        web.page("/same", b"here")
        web.redirect("/other", other.url + "/image")
        web.redirect("/to-same", "/same")
        mine = web.url.replace("//", "//me:p%40ss@")
        assert drain(mine + "/to-same") == b"here"
        assert [headers.get("Authorization") for _, headers in web.asked] == ["Basic bWU6cEBzcw=="] * 2
        assert drain(mine + "/other") == b"here"
        assert "Authorization" not in other.asked[0][1]
    finally:
        other.stop()


def test_nobody_there_and_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(SourceUnavailable, match=r"cannot reach http://127.0.0.1:\d+/image: Connection refused"):
            drain(f"http://me:hush@127.0.0.1:{taken.getsockname()[1]}/image")
    for host in ("no-such-host.invalid", "a..b", "x" * 70 + ".invalid"):
        with pytest.raises(SourceUnavailable, match="cannot reach http://"):
            drain(f"http://{host}/image")


def test_a_server_that_hangs_is_left(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_STALL_TIMEOUT", "0.3")
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
    for url in (
        web.raw("/at-once", 30.0),
        web.raw("/in-header", b"HTTP/1.1 200", 30.0),
        web.raw("/in-body", head, b"abc", 30.0),
    ):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="nothing came for too long") as raised:
            drain(url)
        assert raised.value.status == 124
        assert url in str(raised.value)
        assert time.monotonic() - start < 5
    assert drain(web.raw("/slow", head, *DRIP * 10)) == b"x" * 10  # slow is not hanging


def test_a_server_that_does_not_take_connections_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(full.getsockname())
            waiting.append(client)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="cannot reach"):
            drain(f"http://127.0.0.1:{full.getsockname()[1]}/image")
        assert time.monotonic() - start < 5
        for client in waiting:
            client.close()


def test_all_redirects_share_one_time(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_STALL_TIMEOUT", "0.6")
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "0.4")
    web.raw("/loop", 0.3, b"HTTP/1.1 302 Found\r\nLocation: /loop\r\n\r\n")
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        drain(web.url + "/loop")
    assert time.monotonic() - start < 2.5


def test_a_certificate_nobody_trusts_is_refused(
    secure: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = secure.page("/image", b"here")
    with pytest.raises(Forbidden, match=r"is not trusted .*self.signed.*update-ca-certificates"):
        drain(url)
    assert secure.asked == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert drain(url) == b"here"
    with pytest.raises(Forbidden, match=r"is not trusted .*mismatch"):
        drain(url.replace("127.0.0.1", "localhost"))


def test_https_and_http_lead_to_each_other(
    secure: Web, web: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    to_web = secure.redirect("/image", web.page("/image", b"there"))
    assert drain(to_web) == b"there"
    to_secure = web.redirect("/again", secure.page("/again", b"back"))
    assert drain(to_secure) == b"back"


def test_a_server_without_tls_is_said(web: Web) -> None:
    with pytest.raises(SourceUnavailable, match="cannot reach https://"):
        drain(web.page("/image", b"x").replace("http:", "https:"))


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy that fetches http and tunnels https; it writes down what it was asked."""

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"via proxy")

    def do_CONNECT(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))  # type: ignore[attr-defined]
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

            def pump(one: socket.socket, other: socket.socket) -> None:
                while piece := one.recv(65536):
                    other.sendall(piece)
                other.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(upstream, self.connection), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                pump(self.connection, upstream)
            back.join(5)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_proxies_of_the_environment_are_used(
    proxy: http.server.ThreadingHTTPServer, secure: Web, web: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str | None]] = proxy.asked  # type: ignore[attr-defined]
    place = f"127.0.0.1:{proxy.server_port}"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{place}/")
    monkeypatch.setenv("https_proxy", place)
    assert drain("http://images.invalid:81/a%20b?x=1") == b"via proxy"
    assert asked.pop() == ("GET", "http://images.invalid:81/a%20b?x=1", "Basic bWU6cEBzcw==")
    assert drain(secure.page("/image", b"tunnelled")) == b"tunnelled"
    assert asked.pop() == ("CONNECT", f"127.0.0.1:{secure.server_port}", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1,example.org")
    assert drain(web.page("/image", b"direct")) == b"direct"
    assert asked == []
    monkeypatch.setenv("http_proxy", "socks5://me:hush@127.0.0.1:1/")
    with pytest.raises(ConfigError, match="is not an http:// proxy") as raised:
        drain("http://images.invalid/x")
    assert "hush" not in str(raised.value)


# --- digests -------------------------------------------------------------------------------------------------------


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


# --- packed --------------------------------------------------------------------------------------------------------


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
    if packer == "zstd":
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
    "garbage", [b"x", b"garbage" * 20, b"\0x", b"\x1f", b"BZ", b"BZh9nonsense", b"\xfd7z", b"\x28\xb5"]
)
def test_garbage_after_the_end_is_refused(packer: str, garbage: bytes) -> None:
    for fed in (1, 65536):
        with pytest.raises(BadImage, match="something else after its end") as raised:
            unpack(packed(content(5000), packer) + garbage, fed)
        assert raised.value.status == 41


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_cut_off_is_refused_wherever(packer: str) -> None:
    data = packed(content(3000), packer)
    starts = {"gzip": 3, "bzip2": 10, "xz": 6, "zstd": 4}
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
        with schemes.open(str(path), guard=guard) as opened:
            stream.fetch(opened, sink, decompress=True, digests={}, limit=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 128 * MIB
    assert largest <= stream.PIECE
    assert peak < 16 * MIB
    with schemes.open(str(path), guard=guard) as opened, pytest.raises(BadImage, match="more than the 1000000 bytes"):
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


def test_an_lz4_file_is_not_taken_for_zstd() -> None:
    assert codec.kind(zstd_skippable(4) + b"\x04\x22\x4d\x18" + bytes(50)) is None


def test_zstd_without_its_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        return  # it is in the standard library
    data = packed(b"x", "zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)  # type: ignore[misc]
    with pytest.raises(MissingProgram, match="python3-zstandard"):
        codec.decompressor(data)


def test_the_python_packers_are_understood_too() -> None:
    assert unpack(gzip.compress(content(5000))) == content(5000)
    assert unpack(bz2.compress(content(5000))) == content(5000)
    assert unpack(lzma.compress(content(5000))) == content(5000)


def test_a_sink_that_fails_ends_it(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(content())

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with schemes.open(str(tmp_path / "image"), guard=guard) as opened, pytest.raises(OSError, match="No space"):
        stream.fetch(opened, full, decompress=True, digests={}, limit=None)


# --- the size before the import ------------------------------------------------------------------------------------


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
    assert size.virtual_size(str(path), guard=guard) == 100 * MIB
    assert size.virtual_size(f"file://{path}", guard=guard) == 100 * MIB
    if packer:
        assert size.virtual_size(str(path), guard=guard, decompress=False) == path.stat().st_size
    url = web.page("/image", path.read_bytes())
    if format == "raw" and packer:
        with pytest.raises(NotSupported, match="as it is packed: give SIZE"):
            size.virtual_size(url, guard=no_file)
        assert size.virtual_size(url, guard=no_file, decompress=False) == path.stat().st_size
    else:
        assert size.virtual_size(url, guard=no_file) == 100 * MIB
    assert {asked for asked, _ in web.asked} == {"/image"}
    assert len(web.asked) == (2 if format == "raw" and packer else 1)


def test_only_the_head_of_a_page_is_read(web: Web) -> None:
    """The rest never comes, and is not waited for."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n"
    assert size.virtual_size(web.raw("/raw", head + bytes(MIB), 30.0), guard=no_file) == 1 << 40


def test_a_raw_page_without_a_length_has_no_size(web: Web) -> None:
    url = web.raw("/image", b"HTTP/1.0 200 OK\r\n\r\n", bytes(MIB))
    with pytest.raises(NotSupported, match="server does not say it: give SIZE"):
        size.virtual_size(url, guard=no_file)


@pytest.mark.parametrize("length", [0, 1, 30000, 65536])
def test_small_files_are_read_to_their_end(web: Web, tmp_path: Path, length: int) -> None:
    """Smaller than the place where an ISO says that it is one."""
    path = tmp_path / "small"
    path.write_bytes(bytes(length))
    packed_path = tmp_path / "small.gz"
    packed_path.write_bytes(gzip.compress(bytes(length)))
    assert size.virtual_size(str(path), guard=guard) == length
    assert size.virtual_size(str(packed_path), guard=guard) == length
    assert size.virtual_size(web.page("/small", bytes(length)), guard=no_file) == length
    if length < 65536:
        endless = web.raw("/no-length", b"HTTP/1.0 200 OK\r\n\r\n", bytes(length))
        assert size.virtual_size(endless, guard=no_file) == length


def test_a_small_image_has_the_size_its_header_says(web: Web, tmp_path: Path) -> None:
    path = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", path, "100M"], check=True, timeout=60
    )
    assert path.stat().st_size < 4096
    for data in (path.read_bytes(), gzip.compress(path.read_bytes())):
        assert size.virtual_size(web.page("/image", data), guard=no_file) == 100 * MIB


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
            size.virtual_size(url, guard=guard)


def test_a_packed_file_that_is_cut_off_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "image.gz"
    path.write_bytes(gzip.compress(content())[:-5])
    with pytest.raises(BadImage, match="cut off"):
        size.virtual_size(str(path), guard=guard)


def test_counting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Web) -> None:
    path = tmp_path / "image.gz"
    path.write_bytes(gzip.compress(bytes(64 * MIB), 1))
    monkeypatch.setattr(size, "_LOCAL", 0.01)
    with pytest.raises(DeadlineExceeded, match=r"finding the size of .*image.gz took longer"):
        size.virtual_size(str(path), guard=guard)
    monkeypatch.setattr(size, "_REMOTE", 0.5)
    dripping = web.raw("/image", b"HTTP/1.0 200 OK\r\n\r\n", *DRIP * 100)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        size.virtual_size(dripping, guard=no_file)
    assert time.monotonic() - start < 5


# --- the hot path --------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x")
    code = """
import sys
before = set(sys.modules)
from madrigal import guard, inspector
from madrigal.source import schemes, size, stream
opened = schemes.open(sys.argv[1], guard=lambda path: guard.open_allowed(path, "", "", ()))
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
    with pytest.raises(Forbidden, match="not a URL"), download.downloaded("file:///etc/passwd"):
        pass
    with pytest.raises(SourceUnavailable), download.downloaded(web.url + "/nothing"):
        pass
