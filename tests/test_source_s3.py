"""Objects of a real S3 store (Swift's S3 face), with the keys of a marketplace."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import PATH, RIGS, run_action
from dumps import dump
from servers import Handler, Web
from sources import MIB, content, no_file, packed

from madrigal.errors import ConfigError, SourceUnavailable, UsageError
from madrigal.source import resume, schemes, sigv4, size, stream
from madrigal.source.scheme import s3

pytestmark = pytest.mark.long

KEYS = {"ACCESS_KEY_ID": "test:tester", "SECRET_ACCESS_KEY": "testing", "REGION": "us-east-1", "AWS": "no"}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The endpoint of an S3 store with image, image.xz and a/key%/with in the bucket `market`."""
    rig = RIGS / "swift-up"
    can = subprocess.run([rig, "/x", "can"], capture_output=True, text=True)
    if can.returncode:
        pytest.skip(f"an S3 store needs Swift: {can.stdout.strip()}")
    work = tempfile.mkdtemp(prefix="swift", dir="/var/tmp")
    try:
        up = subprocess.run([rig, f"{work}/s"], capture_output=True, text=True, timeout=120)
        assert up.returncode == 0, up.stderr
        endpoint = up.stdout.strip()
        put(endpoint, "market", b"")
        for name, data in (("image", content()), ("image.xz", packed(content(), "xz")), ("a/key%25/with", b"slashes")):
            put(endpoint, f"market/{name}", data)
        yield endpoint
    finally:
        subprocess.run([f"{rig.parent}/swift-down", f"{work}/s"], check=True)
        shutil.rmtree(work)


def put(endpoint: str, path: str, data: bytes) -> None:
    """By the Swift face: what put it there is none of ours."""
    asked = Request(f"{endpoint}/auth/v1.0", headers={"X-Auth-User": "test:tester", "X-Auth-Key": "testing"})
    with urlopen(asked, timeout=30) as answer:
        headers = {"X-Auth-Token": answer.headers["X-Auth-Token"]}
    urlopen(Request(f"{endpoint}/v1/AUTH_test/{path}", data, headers, method="PUT"), timeout=30).close()


def test_the_signature_is_the_one_of_the_documentation() -> None:
    """The example "GET Object" of AWS's pages on Signature Version 4."""
    keys = sigv4.Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    url, at = "https://examplebucket.s3.amazonaws.com/test.txt", 1369353600
    said = keys.sign(url, {"Range": "bytes=0-9", "If-Range": "x"}, at)["Authorization"]
    assert said.endswith("Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")


def terms(**keys: str) -> schemes.Terms:
    known = {**KEYS, **keys}
    return schemes.Terms(no_file, market=lambda name: known.get(name, ""))


def fetched(url: str, **keys: str) -> bytes:
    out = bytearray()
    with schemes.open(url, terms(**keys)) as opened:
        stream.fetch(opened, out.extend, decompress=True, digests={}, limit=None)
    return bytes(out)


def test_an_object_is_fetched_with_the_keys_of_the_market(store: str) -> None:
    assert fetched("s3://market/image", ENDPOINT=store) == content()
    assert fetched("s3://market/image.xz", ENDPOINT=store + "/") == content()
    assert fetched("S3://any/prefix/market/image", ENDPOINT=store, AWS="NO") == content()
    assert fetched("s3://market/a%2Fkey%25%2Fwith", ENDPOINT=store) == b"slashes"
    assert size.virtual_size("s3://market/image.xz", terms(ENDPOINT=store)) == len(content())


def test_what_the_store_says_is_told_without_a_secret(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for keys, path in (
        ({"SECRET_ACCESS_KEY": "wrong-hush"}, "image"),
        ({"ACCESS_KEY_ID": "nobody"}, "image"),
        ({}, "nothing"),
    ):
        with pytest.raises(SourceUnavailable, match=r"answered 40[34]") as raised:
            fetched(f"s3://market/{path}", ENDPOINT=store, **keys)
        assert "hush" not in str(raised.value) and "testing" not in str(raised.value)


def test_a_cut_object_goes_on_signed_anew(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PAUSE", 0.001)
    web.file("/market/image", content(), [MIB, 1000])
    assert fetched("s3://market/image", ENDPOINT=web.url) == content()
    assert len(web.asked) == 3
    for _, headers in web.asked:
        assert headers["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=test:tester/")
        assert headers["X-Amz-Date"]
        assert "testing" not in str(headers)


def test_another_server_gets_no_signature(web: Web) -> None:
    other = Web()
    try:
        other.page("/image", content())
        web.redirect("/market/image", f"{other.url}/image")
        assert fetched("s3://market/image", ENDPOINT=web.url) == content()
        assert not {"Authorization", "X-Amz-Date"} & set(other.asked[0][1])
    finally:
        other.stop()


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({}, "https://bucket.s3.us-east-1.amazonaws.com/key"),
        ({"AWS": "yes", "ENDPOINT": "http://127.0.0.1"}, "https://bucket.s3.us-east-1.amazonaws.com/key"),
        # to the stock driver a word with "no" in it is no
        ({"AWS": "unknown", "ENDPOINT": "http://127.0.0.1"}, "https://bucket.s3.us-east-1.amazonaws.com/key"),
        ({"AWS": "", "REGION": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com/key"),
        ({"AWS": "no", "ENDPOINT": "http://127.0.0.1:81/"}, "http://127.0.0.1:81/bucket/key"),
    ],
)
def test_where_an_object_is(keys: dict[str, str], place: str) -> None:
    asked = schemes.Terms(no_file, market=lambda name: keys.get(name, ""))
    assert s3._place("s3://bucket/key", "x", asked) == place


def test_a_bucket_with_dots_has_a_certificate_too() -> None:
    nowhere = schemes.Terms(no_file)
    assert s3._place("s3://a.b/c d".replace(" ", "%20"), "x", nowhere) == (
        "https://s3.us-east-1.amazonaws.com/a.b/c%20d"
    )


@pytest.mark.parametrize(
    ("url", "keys", "error", "says"),
    [
        ("s3://bucket", {}, UsageError, "is not s3://BUCKET/OBJECT"),
        ("s3:///", {}, UsageError, "is not s3://BUCKET/OBJECT"),
        ("s3://-x/key", {}, UsageError, "is not s3://BUCKET/OBJECT"),
        ("s3://b$(id)/key", {}, UsageError, "is not s3://BUCKET/OBJECT"),
        ("s3://bucket/%2e%2e%2fother%2fkey", {}, UsageError, "is not s3://BUCKET/OBJECT"),
        ("s3://bucket/a\nb", {}, UsageError, "blank or a control character"),
        ("s3://bucket/key", {"ACCESS_KEY_ID": ""}, ConfigError, "set ACCESS_KEY_ID and SECRET_ACCESS_KEY"),
        ("s3://bucket/key", {"SECRET_ACCESS_KEY": ""}, ConfigError, "set ACCESS_KEY_ID and SECRET_ACCESS_KEY"),
        ("s3://bucket/key", {"ENDPOINT": ""}, ConfigError, "ENDPOINT of the marketplace is ''"),
        ("s3://bucket/key", {"ENDPOINT": "file:///etc"}, ConfigError, "expected https://HOST"),
        ("s3://bucket/key", {"ENDPOINT": "https://me:hush@host"}, ConfigError, "expected https://HOST"),
        ("s3://bucket/key", {"AWS": "yes", "REGION": "x.evil.example/"}, ConfigError, "REGION of the marketplace"),
    ],
)
def test_what_cannot_be_is_refused(url: str, keys: dict[str, str], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        schemes.open(url, terms(**{"ENDPOINT": "http://127.0.0.1:1", **keys}))
    assert says in str(raised.value)
    assert "hush" not in str(raised.value)


def test_cp_takes_the_keys_from_the_dump_and_shows_them_to_nobody(web: Web, tmp_path: Path) -> None:
    """In the stock driver curl and openssl have them among their arguments, where every user sees them."""
    seen: list[str] = []

    def look() -> None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                seen.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue

    web.file("/market/image", content())
    page = web.pages["/market/image"]

    def watched(handler: Handler) -> None:
        look()
        page(handler)

    web.pages["/market/image"] = watched
    market = "".join(f"<{name}>{value}</{name}>" for name, value in {**KEYS, "ENDPOINT": web.url}.items())
    (tmp_path / "one/var").mkdir(parents=True)
    env = {"PATH": PATH, "HOME": str(tmp_path), "ONE_LOCATION": str(tmp_path / "one")}
    text = dump(tmp_path / "ds", {"PATH": "s3://market/image"}, market=market.replace("testing", "s3cr3t"))
    done = run_action("datastore/fs/cp", "42", env=env, input=text)
    assert done.status == 0, done.stderr
    assert Path(done.stdout.split()[0]).read_bytes() == content()
    assert seen and not any("s3cr3t" in argv for argv in seen)
    assert "s3cr3t" not in done.stderr
