"""Web servers as sources: real ones, that redirect, hang, lie, break off and are not trusted."""

from __future__ import annotations

import http.server
import io
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import DRIP, Web
from sources import NO_FILE, content, drain, no_file

from madrigal.errors import ConfigError, DeadlineExceeded, Forbidden, SourceUnavailable
from madrigal.source import resume, schemes, stream

pytestmark = pytest.mark.usefixtures("no_proxy", "hasty")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries that a test can wait for."""
    monkeypatch.setattr(resume, "PAUSE", 0.001)


def test_a_page_is_fetched_once(web: Web) -> None:
    url = web.page("/dir/image.img?token=1", content())
    with schemes.open(url, NO_FILE) as opened:
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
    with schemes.open(chunked, NO_FILE) as opened:
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
    assert len(web.asked) == resume.TRIES


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
        schemes.open(web.redirect("/image?hush", to), NO_FILE)
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


def test_a_datastore_may_do_without_certificates(secure: Web) -> None:
    url = secure.page("/image", b"here")
    with schemes.open(url, schemes.Terms(no_file, verify=False)) as opened:
        assert opened.read(100) == b"here"


_PRIVATE = """
import sys
sys.path[:0] = sys.argv[1:3]
from servers import Web
from madrigal.errors import MadrigalError
from madrigal.source import schemes

def server(address):
    web = Web(address=address)
    web.page("/image", b"here")
    return web

public, other, private, local = map(server, ("9.9.9.9", "8.8.8.8", "10.1.2.3", "127.0.0.1"))
mapped = local.url.replace("127.0.0.1", "[::ffff:127.0.0.1]")
for begin, to in (
    (public, other.url), (public, private.url), (public, local.url), (public, mapped), (private, local.url),
    (local, public.url),
):
    for allowed in (False, True):
        try:
            with schemes.open(begin.redirect("/moved", to + "/image"), schemes.Terms(None, private=allowed)) as opened:
                print(opened.read(9).decode())
        except MadrigalError as error:
            print(error.status, str(error).replace(str(begin.server_port), "PORT"))
# by more than one step, and no way around by a second look at a public one
public.redirect("/a", other.url + "/b")
other.redirect("/b", private.url + "/image")
try:
    schemes.open(public.url + "/a", schemes.Terms(None))
except MadrigalError as error:
    print(error.status)
print(*(sum(path == "/image" for path, _ in web.asked) for web in (private, local)))
for web in (public, other, private, local):
    web.stop()
"""


def test_a_public_server_does_not_lead_into_a_private_network() -> None:
    """In a network of its own, where this machine has public addresses too.

    What is asked of a private server is nothing: the stock downloader would have sent the request.
    """
    addresses = " && ".join(f"ip address add {a}/32 dev lo" for a in ("9.9.9.9", "8.8.8.8", "10.1.2.3"))
    argv = ["unshare", "-Urn", "sh", "-c", f'ip link set lo up && {addresses} && exec "$@"', "sh", sys.executable]
    paths = [str(Path(schemes.__file__).parents[2]), str(Path(__file__).parent)]
    done = subprocess.run([*argv, "-c", _PRIVATE, *paths], capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr or "ip:" in done.stderr:
        pytest.skip(f"this machine has no networks of a user's own: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["here"] * 2, done.stderr
    for refused, allowed in zip(lines[2:8:2], lines[3:8:2], strict=True):
        assert refused.startswith("21 the source redirects into a private network, to http://")
        assert allowed == "here"
    assert lines[8:] == ["here"] * 4 + ["21", "1 4"]
