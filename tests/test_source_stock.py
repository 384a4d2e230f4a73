"""What the stock downloader and its size estimation do wrong, a test for each, by the executables.

The others are where their subject is: keys in argv (test_source_s3), ssh:// past the guard and shell text made of it
(test_source_ssh), redirects into private networks (test_source_http), archives laid out in place
(test_source_archive), waiting for ever (test_source_resume), gzip's size modulo 4 GiB (test_source_size), names that
collide (test_datastore).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import PATH, Done, check_stderr, eventually, run_action, start_action
from dumps import dump
from servers import Handler, Web
from sources import MIB, content

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


def test_21_asking_for_a_size_leaves_nothing(web: Web, cloud: Cloud) -> None:
    for path in (web.url + "/nothing", web.page("/bad", b"QFI\xfb" + bytes(70000)), "/nothing/at/all", "ftp://x/y"):
        cloud.refused(path, action="stat")


def test_22_the_length_of_an_error_page_is_no_size(web: Web, cloud: Cloud) -> None:
    url = web.raw("/image", b"HTTP/1.1 404 Not Found\r\nContent-Length: 5000000\r\n\r\n" + bytes(5000))
    assert cloud.refused(url, action="stat") == 13


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "dict://127.0.0.1:11211/stat"])
def test_25_redirects_lead_to_web_servers_only(web: Web, cloud: Cloud, to: str) -> None:
    for action in ("cp", "stat"):
        assert cloud.refused(web.redirect("/image", to), action=action) == 21


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
