"""What the stock downloader and its size estimation do wrong, a test for each, by the executables.

The numbers are those of the list of its weaknesses.  More of the same is where its subject is: keys in argv
(test_source_s3), ssh:// past the guard, shell text made of it and what is left on a host (test_source_ssh), redirects
into private networks (test_source_http), archives laid out in place (test_source_archive), waiting for ever
(test_source_resume), gzip's size modulo 4 GiB (test_source_size), names that collide (test_datastore).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import PATH, Done, check_stderr, eventually, run_action, start_action
from dumps import dump
from servers import Handler, Web
from sources import MIB, content, drain, no_file

from madrigal.errors import UsageError
from madrigal.source import scheme, schemes
from madrigal.source.scheme import s3

pytestmark = pytest.mark.usefixtures("no_proxy")


class Cloud:
    """A datastore in an empty world, of which everything is looked at afterwards."""

    def __init__(self, work: Path) -> None:
        self.work, self.base, self.tmp = work, work / "ds", work / "tmp"
        for directory in ("one/var", "tmp", "files", "home"):
            (work / directory).mkdir(parents=True)
        self.env = {
            "PATH": PATH,
            "HOME": str(work / "home"),
            "ONE_LOCATION": str(work / "one"),
            "TMPDIR": str(self.tmp),
            "MADRIGAL_RUN_DIR": str(work / "run"),
            "MADRIGAL_STALL_TIMEOUT": "5",
        }

    def act(
        self,
        action: str,
        path: object,
        attributes: Mapping[str, object] | None = None,
        template: Mapping[str, object] | None = None,
    ) -> Done:
        text = dump(self.base, {"PATH": path}, attributes, template)
        return run_action(f"datastore/fs/{action}", "42", env=self.env, input=text)

    def imported(self, path: object, attributes: Mapping[str, object] | None = None) -> bytes:
        done = self.act("cp", path, attributes)
        assert done.status == 0, done.stderr
        made = Path(done.stdout.split()[0])
        data = made.read_bytes()
        made.unlink()
        self.nothing_left()
        return data

    def refused(self, path: object, *more: Mapping[str, object], action: str = "cp") -> int:
        """The status; there is one sentence, and nothing is left anywhere."""
        done = self.act(action, path, *more)
        assert done.status != 0
        check_stderr(done, action)
        self.nothing_left()
        return done.status

    def nothing_left(self) -> None:
        assert not self.base.exists() or os.listdir(self.base) == []
        assert os.listdir(self.tmp) == []
        assert os.listdir(self.work / "one/var") == []
        assert [name for name in os.listdir("/tmp") if name.startswith("downloader.hash")] == []


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_1_certificates_are_verified_for_s3_too_before_anything_is_said(secure: Web, cloud: Cloud) -> None:
    url = secure.page("/market/image", content())
    assert cloud.refused(url) == 21
    keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s3cr3t", "AWS": "no", "ENDPOINT": secure.url}
    market = "".join(f"<{name}>{value}</{name}>" for name, value in keys.items())
    for template, status in (({}, 21), ({"TLS_VERIFY": "no"}, 0)):
        text = dump(cloud.base, {"PATH": "s3://market/image"}, None, template, market=market)
        done = run_action("datastore/fs/cp", "42", env=cloud.env, input=text)
        assert done.status == status, done.stderr
        assert "s3cr3t" not in done.stderr
        assert len(secure.asked) == (0 if status else 1)
    # what a user writes into an image changes nothing
    done = run_action(
        "datastore/fs/cp", "43", env=cloud.env, input=dump(cloud.base, {"PATH": url, "ID": 43}, {"TLS_VERIFY": "no"})
    )
    assert done.status == 21


def test_2_the_keys_of_a_store_are_no_argument_of_anything(web: Web, cloud: Cloud) -> None:
    seen: list[bytes] = []
    page = web.file("/market/image", content())

    def watched(handler: Handler) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                seen.append(path.read_bytes())
        plain(handler)

    plain, web.pages["/market/image"] = web.pages["/market/image"], watched
    keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s3cr3t", "AWS": "no", "ENDPOINT": page.rpartition("/mar")[0]}
    market = "".join(f"<{name}>{value}</{name}>" for name, value in keys.items())
    text = dump(cloud.base, {"PATH": "s3://market/image"}, market=market)
    done = run_action("datastore/fs/cp", "42", env=cloud.env, input=text)
    assert done.status == 0, done.stderr
    assert len(seen) > 5 and not any(b"s3cr3t" in argv for argv in seen)


def test_3_a_dump_larger_than_an_argument_may_be(cloud: Cloud) -> None:
    path = cloud.work / "files/image"
    path.write_bytes(content())
    assert cloud.imported(path, {"COMMENT": "x" * (1 << 20)}) == content()


@pytest.mark.parametrize(
    "name", ["it's", "a b", "$(touch pwned)", "`touch pwned`", 'x";touch pwned;"', "a\\nb", "a\\", "-rf", "*", "é\nx"]
)
def test_4_and_19_a_path_is_a_path_whatever_is_in_it(cloud: Cloud, name: str) -> None:
    path = cloud.work / "files" / name
    path.write_bytes(content())
    assert cloud.imported(path) == content()
    assert cloud.act("stat", path).stdout == "4\n"
    assert list(cloud.work.rglob("pwned")) == []


@pytest.mark.parametrize(
    "value", ["x;touch pwned", "$(touch pwned)", "' -o /x '", "0" * 31 + "\n", "0" * 33, "\u0660" * 32]
)
@pytest.mark.parametrize("name", ["MD5", "SHA1", "SHA256"])
def test_4_a_digest_is_hexadecimal_or_refused(cloud: Cloud, name: str, value: str) -> None:
    path = cloud.work / "files/image"
    path.write_bytes(content())
    assert cloud.refused(path, {name: value}) in (2, 40)
    assert list(cloud.work.rglob("pwned")) == []


@pytest.mark.parametrize("rate", ["1;touch pwned", "10M -o /x", "$(id)", "-1"])
def test_4_a_rate_is_a_rate(cloud: Cloud, rate: str) -> None:
    path = cloud.work / "files/image"
    path.write_bytes(content())
    assert cloud.refused(path, {}, {"LIMIT_TRANSFER_BW": rate}) == 20


def test_8_what_holds_for_one_kind_of_source_holds_for_all(web: Web, cloud: Cloud) -> None:
    """Digests and rates: the stock driver for volume groups heeds neither, others heed the rate for the web alone."""
    path = cloud.work / "files/image"
    path.write_bytes(data := os.urandom(3 * MIB))
    for source in (path, f"file://{path}", f"ssh://localhost:{path}", web.file("/image", data)):
        assert cloud.refused(source, {"SHA1": "0" * 40}) == 40
        began = time.monotonic()
        done = cloud.act("cp", source, None, {"LIMIT_TRANSFER_BW": "3M"})
        assert done.status == 0 and time.monotonic() - began > 0.9, done
        Path(done.stdout.split()[0]).unlink()


def test_10_and_11_every_digest_is_checked_over_all_bytes(web: Web, cloud: Cloud) -> None:
    url = web.page("/image.gz", data := gzip.compress(content()))
    right = {name: hashlib.new(name, data).hexdigest().upper() for name in ("MD5", "SHA1", "SHA256")}
    assert cloud.imported(url, right) == content()
    for name in right:
        assert cloud.refused(url, {**right, name: hashlib.new(name, data + b"x").hexdigest()}) == 40


def test_12_and_9_nothing_is_left_by_what_fails_or_is_ended(web: Web, cloud: Cloud) -> None:
    damaged = bytearray(gzip.compress(content()))
    damaged[len(damaged) // 2] ^= 0xFF
    assert cloud.refused(web.page("/damaged", bytes(damaged))) == 41
    assert cloud.refused(web.page("/cut", gzip.compress(content())[:-100])) == 41
    assert cloud.refused(web.url + "/nothing") == 13
    qcow2 = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(2 * MIB)
    assert cloud.refused(web.page("/no-qcow2", qcow2), {}, {"DRIVER": "raw"}) == 41
    go = threading.Event()

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not go.wait(0.01):
            handler.wfile.write(os.urandom(MIB))

    web.pages["/endless"] = endless
    for number in (signal.SIGTERM, signal.SIGHUP):
        process = start_action("datastore/fs/cp", "42", env=cloud.env)
        assert process.stdin
        process.stdin.write(dump(cloud.base, {"PATH": web.url + "/endless"}))
        process.stdin.close()
        assert eventually(lambda: cloud.base.exists() and any(p.stat().st_size for p in cloud.base.iterdir()))
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        for stream in (process.stdout, process.stderr):
            assert stream
            stream.close()
        cloud.nothing_left()
    go.set()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/$(touch pwned)",
        "http://127.0.0.1:1/a\nb",
        "http://$(touch pwned)/image",
        "http://127.0.0.1:1/';touch pwned;'",
        "ssh://$(touch pwned):/image",
        "ssh://-oProxyCommand=touch${IFS}pwned:/image",
        "ssh://host:/x';touch pwned;'\n",
        "s3://bucket';touch pwned;'/key",
        "rbd://host/pool/image",
        "-o /x http://host",
    ],
)
def test_4_and_5_a_url_is_a_url_whatever_is_in_it(cloud: Cloud, url: str) -> None:
    for action in ("cp", "stat"):
        assert cloud.refused(url, action=action) in (2, 10, 13, 20, 21)
    assert list(cloud.work.rglob("pwned")) == []


def test_6_no_kind_of_source_goes_past_the_directories(web: Web, cloud: Cloud) -> None:
    """To the stock driver `readlink -f` of anything with a scheme is empty, and fits no directory."""
    path = cloud.work / "files/image"
    path.write_bytes(content())
    rules = {"SAFE_DIRS": "/nothing", "RESTRICTED_DIRS": "/"}
    kinds = ("file://", "FILE://", "ssh://localhost:", "SSH://localhost:", "")
    for action in ("cp", "stat"):
        for kind in kinds:
            assert cloud.refused(f"{kind}{path}", {}, rules, action=action) == 21
    redirected = web.redirect("/image", f"file://{path}")
    assert cloud.refused(redirected, {}, rules) == 21


def test_7_directories_are_directories_and_no_patterns(cloud: Cloud) -> None:
    files = cloud.work / "files"
    for name in ("safe", "safer", "s.fe"):
        (files / name).mkdir()
        (files / name / "image").write_bytes(content())
    link = files / "safe/link"
    link.symlink_to(files / "safer/image")
    rules = {"SAFE_DIRS": f"{files}/safe", "RESTRICTED_DIRS": "/"}
    for action in ("cp", "stat"):
        for path in (files / "safer/image", files / "s.fe/image", link, "/etc/shadow", f"ssh://localhost:{link}"):
            assert cloud.refused(path, {}, rules, action=action) == 21
    assert cloud.act("cp", files / "safe/image", None, rules).status == 0


def test_13_nothing_that_a_source_needed_on_its_way_stays_when_it_fails(web: Web, cloud: Cloud) -> None:
    """No program is started for one, no directory made, no lock kept: with a digest that is wrong, and cut off."""
    path = cloud.work / "files/image"
    path.write_bytes(content())
    keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s3cr3t", "AWS": "no", "ENDPOINT": web.url}
    market = "".join(f"<{name}>{value}</{name}>" for name, value in keys.items())
    web.file("/market/image", content())
    for source in (path, f"ssh://localhost:{path}", web.url + "/market/image", "s3://market/image"):
        text = dump(cloud.base, {"PATH": source}, {"MD5": "0" * 32}, market=market)
        done = run_action("datastore/fs/cp", "42", env=cloud.env, input=text)
        assert done.status == 40, done
        cloud.nothing_left()
        assert not cloud.base.exists()
        assert not (cloud.work / "run").exists() or os.listdir(cloud.work / "run") == []


def test_14_a_name_is_one_image_s_and_an_image_is_never_written_over(cloud: Cloud) -> None:
    """The stock driver names images after the second, and writes over what has the name."""
    path = cloud.work / "files/image"
    path.write_bytes(content())
    names = set()
    for number in (42, 43):
        text = dump(cloud.base, {"PATH": path, "ID": number})
        done = run_action("datastore/fs/cp", str(number), env=cloud.env, input=text)
        assert done.status == 0
        names.add(done.stdout.split()[0])
    assert len(names) == 2
    path.write_bytes(b"something else")
    again = cloud.act("cp", path)
    assert again.status == 0
    assert Path(again.stdout.split()[0]).read_bytes() == content()


def test_15_the_source_is_asked_once(web: Web, cloud: Cloud) -> None:
    for number, data in enumerate((content(), gzip.compress(content()))):
        web.asked.clear()
        assert cloud.imported(web.file(f"/{number}", data)) == content()
        assert len(web.asked) == 1


def test_16_an_archive_is_one_file_and_no_name_in_it_a_path(web: Web, cloud: Cloud) -> None:
    for name, times in (("../../pwned", 1), ("/pwned", 1), ("image", 2)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for number in range(times):
                about = tarfile.TarInfo(f"{name}{number or ''}")
                about.size = len(content())
                archive.addfile(about, io.BytesIO(content()))
        assert cloud.refused(web.page("/image.tar", data.getvalue())) == 41
    assert list(cloud.work.rglob("pwned*")) == []


def test_17_what_does_not_move_is_left(web: Web, cloud: Cloud) -> None:
    cloud.env["MADRIGAL_STALL_TIMEOUT"] = "1"
    silent = web.raw("/image", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000), 60.0)
    began = time.monotonic()
    assert cloud.refused(silent) == 124
    assert time.monotonic() - began < 10


def test_18_every_part_of_the_way_is_checked(web: Web, cloud: Cloud) -> None:
    """The digest is right, so what arrived is what was promised; but it does not unpack."""
    data = gzip.compress(content())[:-4] + b"\1\2\3\4"
    assert cloud.refused(web.page("/image", data), {"MD5": hashlib.md5(data).hexdigest()}) == 41


def test_20_only_no_is_no() -> None:
    """To the stock downloader any word with "no" in it is, so that `unknown` sends keys to ENDPOINT."""
    for word, place in (
        ("unknown", "amazonaws.com"),
        ("not", "amazonaws.com"),
        ("No", "127.0.0.1"),
        ("no", "127.0.0.1"),
    ):
        known = {"AWS": word, "ENDPOINT": "http://127.0.0.1"}
        terms = schemes.Terms(no_file, market=lambda name, known=known: known.get(name, ""))  # type: ignore[misc]
        assert place in s3._place("s3://bucket/key", "it", terms)


def test_21_asking_for_a_size_leaves_nothing(web: Web, cloud: Cloud) -> None:
    for path in (web.url + "/nothing", web.page("/bad", b"QFI\xfb" + bytes(70000)), "/nothing/at/all", "ftp://x/y"):
        cloud.refused(path, action="stat")


def test_22_the_length_of_an_error_page_is_no_size(web: Web, cloud: Cloud) -> None:
    url = web.raw("/image", b"HTTP/1.1 404 Not Found\r\nContent-Length: 5000000\r\n\r\n" + bytes(5000))
    assert cloud.refused(url, action="stat") == 13


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "lz4"])
def test_22_the_size_of_a_packed_raw_image_is_not_that_of_the_file(web: Web, cloud: Cloud, kind: str) -> None:
    """The stock driver refuses these, or believes four bytes; the image is not fetched for it."""
    raw = cloud.work / "files/raw"
    raw.touch()
    os.truncate(raw, 512 * MIB)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-t", "ext4", raw], check=True, timeout=60)
    with raw.open("r+b") as file:
        file.seek(200 * MIB)
        file.write(os.urandom(48 * MIB))
    packer = {"gz": ["gzip", "-1"], "xz": ["xz", "-0"], "zst": ["zstd", "-1"], "lz4": ["lz4", "-1", "--content-size"]}
    body = subprocess.run([*packer[kind], "-c", raw], capture_output=True, check=True, timeout=120).stdout
    url = web.file(f"/image.{kind}", body)
    assert cloud.act("stat", url).stdout == "512\n"
    assert web.sent < len(body) / 2
    cloud.nothing_left()


@pytest.mark.parametrize(
    "url",
    [
        "lxd://https://host/rootfs.tar.xz?size=1;touch pwned&filesystem=ext4",
        "onebex://1:0",
        "restic://1/2/0:x/disk.0",
        "rsync://1/2/0:x//x/disk.0",
        "rbd://host/pool/image?CEPH_USER=$(touch pwned)",
        "docker://host/x",
        "vcenter://x",
        "netapp:///x",
    ],
)
def test_23_and_24_kinds_that_run_or_listen_are_unknown(cloud: Cloud, url: str) -> None:
    for action in ("cp", "stat"):
        done = cloud.act(action, url)
        assert done.status == 2 and "is not a known kind of source" in check_stderr(done, action)
        cloud.nothing_left()
    assert list(cloud.work.rglob("pwned")) == []


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "dict://127.0.0.1:11211/stat"])
def test_25_redirects_lead_to_web_servers_only(web: Web, cloud: Cloud, to: str) -> None:
    for action in ("cp", "stat"):
        assert cloud.refused(web.redirect("/image", to), action=action) == 21


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1:1/';touch pwned;'",
        "http://$(touch pwned)/x",
        "http://a b/x",
        "http://me:hush@127.0.0.1:1/x\ttouch pwned",
        "//-oProxyCommand=touch pwned/x",
        "\x00\x1b[2J",
        "http://" + "x" * 5000,
        "é漢",
    ],
)
def test_what_a_server_answers_is_data(web: Web, cloud: Cloud, to: str) -> None:
    """A place to go to, and the names of a file, its type and its packing."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: " + to.encode() + b"\r\nContent-Length: 0\r\n\r\n")
        handler.close_connection = True

    web.pages["/image"] = answer
    for action in ("cp", "stat"):
        done = cloud.act(action, web.url + "/image")
        assert done.status in (2, 10, 13, 20, 21), done
        assert "hush" not in check_stderr(done, action) and len(done.stderr) < 1000, done
        assert done.stderr.isprintable() or all(c == "\n" or c.isprintable() for c in done.stderr), repr(done.stderr)
        cloud.nothing_left()
    names = {
        "Content_Disposition": 'attachment; filename="../../pwned"',
        "Content_Type": "application/x-gzip; $(touch pwned)",
        "Server": "'; touch pwned; '",
        "ETag": '"$(touch pwned)"',
        "Last_Modified": "`touch pwned`",
        "X_Long": "x" * 30000,
    }
    assert cloud.imported(web.page("/headers", content(), **names)) == content()
    assert list(cloud.work.rglob("pwned")) == []


def test_a_further_kind_is_one_module_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new_kind.py").write_text(
        "from madrigal.source.schemes import Source, Terms\n\n\n"
        "class Answer(Source):\n"
        '    name, size, left = "it", 2, [b"42"]\n'
        "    def read(self, most: int) -> bytes:\n"
        '        return self.left.pop() if self.left else b""\n'
        "    def close(self) -> None:\n"
        "        pass\n\n\n"
        "def open(url: str, terms: Terms, stall: float) -> Source:\n"
        '    assert url == "New-Kind://x"\n'
        "    return Answer()\n"
    )
    monkeypatch.setattr(scheme, "__path__", [str(tmp_path)])
    assert drain("New-Kind://x") == b"42"
    with pytest.raises(UsageError, match="a URL with new_kind://"):
        drain("newkind://x")


def test_an_image_that_is_larger_than_its_size_is_told(web: Web, cloud: Cloud) -> None:
    """Its SIZE is from `stat`, which a packer's mark may have misled, or from a user."""
    path = cloud.work / "files/image"
    path.write_bytes(content())
    for size, is_told in ((2, True), (4, False), (0, False)):
        text = dump(cloud.base, {"PATH": path, "SIZE": size})
        done = run_action("datastore/fs/cp", "42", env=cloud.env, input=text)
        assert done.status == 0
        assert ("the image has 4 MiB, but its SIZE is 2" in done.stderr) == is_told
        Path(done.stdout.split()[0]).unlink()


def test_an_import_never_holds_a_second_copy(web: Web, cloud: Cloud) -> None:
    """All that the datastore, TMPDIR and /var/tmp have, named or not, while 192 MiB come packed."""
    data = os.urandom(MIB) * 192
    url = web.file("/image.gz", gzip.compress(data, 1))
    process = start_action("datastore/fs/cp", "42", env=cloud.env)
    assert process.stdin
    process.stdin.write(dump(cloud.base, {"PATH": url}))
    process.stdin.close()
    peak = 0
    while process.poll() is None:
        used = {}
        for fd in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                found = fd.stat()
            except OSError:
                continue
            if found.st_mode & 0o170000 == 0o100000:
                used[found.st_dev, found.st_ino] = found.st_blocks * 512
        for directory in (cloud.base, cloud.tmp):
            for path in directory.rglob("*") if directory.exists() else ():
                try:
                    found = path.stat()
                except OSError:
                    continue
                used[found.st_dev, found.st_ino] = found.st_blocks * 512
        peak = max(peak, sum(used.values()))
    assert process.stdout and process.stderr
    answer, stderr = process.stdout.read().split(), process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 0, stderr
    assert Path(answer[0].decode()).read_bytes() == data
    assert 180 * MIB < peak < 1.1 * len(data)
