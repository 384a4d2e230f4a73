"""Files of real sshd hosts as sources: what may be read there, holes, odd names, connections that break."""

from __future__ import annotations

import hashlib
import os
import pwd
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hosts, run_action
from dumps import dump
from sources import MIB, content, guard, no_file, packed

from madrigal.errors import (
    BadImage,
    Forbidden,
    HostUnreachable,
    MadrigalError,
    NotFound,
    SourceUnavailable,
    UsageError,
)
from madrigal.source import resume, schemes, size, stream

TERMS = schemes.Terms(no_file)


@pytest.fixture
def there(hosts: Hosts, env: dict[str, str], datastore: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of host01."""
    monkeypatch.setattr(resume, "PAUSE", 0.01)
    path = hosts.on("host01", datastore)
    path.mkdir()
    yield path


def fetched(url: str, terms: schemes.Terms = TERMS, digests: dict[str, str] | None = None) -> bytes:
    out = bytearray()
    with schemes.open(url, terms) as opened:
        stream.fetch(opened, out.extend, decompress=True, digests=digests or {}, limit=None)
    return bytes(out)


@pytest.mark.parametrize("name", ["image", "a b", "$(id)", "x'y\"z;&|*", "-rf", "täst", "%41", "a:b", "a\nb"])
def test_a_file_of_a_host_whatever_its_name(there: Path, datastore: str, name: str) -> None:
    """In the stock driver host and path are shell text."""
    (there / name).write_bytes(content())
    digests = {"MD5": hashlib.md5(content()).hexdigest()}
    with schemes.open(f"ssh://host01:{datastore}/{name}", TERMS) as opened:
        assert (opened.size, opened.local_fd) == (len(content()), None)
    assert fetched(f"SSH://host01:{datastore}/{name}", digests=digests) == content()


def test_packed_and_its_size(there: Path, datastore: str) -> None:
    (there / "image.xz").write_bytes(packed(content(), "xz"))
    (there / "raw").write_bytes(content())
    for name in ("image.xz", "raw"):
        assert fetched(f"ssh://host01:{datastore}/{name}") == content()
        assert size.virtual_size(f"ssh://host01:{datastore}/{name}", TERMS) == len(content())


def test_holes_do_not_come_over_the_wire(there: Path, datastore: str) -> None:
    with (there / "image").open("wb") as file:
        file.truncate(30 << 30)
        file.seek(5 << 30)
        file.write(b"x" * 100)
    start, total = time.process_time(), 0
    with schemes.open(f"ssh://host01:{datastore}/image", TERMS) as opened:
        assert opened.peek((5 << 30) - 2, 4) == b"\0\0xx"
        assert opened.peek((30 << 30) - 2, 4) is None
        while data := opened.read(MIB):
            total += len(data)
    assert total == 30 << 30
    assert time.process_time() - start < 20


def test_what_the_datastore_allows_holds_there_too(there: Path, datastore: str, hosts: Hosts) -> None:
    """The stock driver looks at nothing: `readlink -f ssh://...` is empty, and fits no pattern."""
    (there / "safe").mkdir()
    (there / "safe/image").write_bytes(b"x")
    (there / "safety").mkdir()
    (there / "safety/image").write_bytes(b"x")
    (there / "safe/link").symlink_to("/etc/passwd")
    (there / "safe/fifo").touch()
    safe = f"{datastore}/safe"
    terms = schemes.Terms(guard, safe, "/", [hosts.var])
    assert fetched(f"ssh://host01:{safe}/image", terms) == b"x"
    for path in ("/etc/passwd", f"{safe}/link", f"{datastore}/safety/image", "/nothing/there", f"{safe}/nothing/x"):
        for look in (fetched, size.virtual_size):
            with pytest.raises(MadrigalError) as raised:
                look(f"ssh://host01:{path}", terms)
            if "nothing/x" in path:
                assert isinstance(raised.value, NotFound)
            else:
                assert isinstance(raised.value, Forbidden) and "RESTRICTED_DIRS" in str(raised.value)
    for path in (f"{safe}/../safe/image", "/proc/self/environ", "/dev/zero", safe):
        with pytest.raises(MadrigalError, match="host01: "):
            fetched(f"ssh://host01:{path}", schemes.Terms(no_file))
    home = pwd.getpwuid(os.getuid()).pw_dir
    with pytest.raises(Forbidden, match="is always restricted"):
        fetched(f"ssh://host01:{home}/.bashrc", schemes.Terms(no_file))
    with pytest.raises(Forbidden, match="is always restricted"):
        fetched(f"ssh://host01:{datastore}/safe/image", schemes.Terms(no_file, "", "", [hosts.var]))


@pytest.mark.parametrize(
    "url",
    [
        "ssh://host01",
        "ssh://host01/etc/passwd",
        "ssh://host01:etc/passwd",
        "ssh://host01:22/etc/passwd",
        "ssh://:/etc/passwd",
        "ssh://-oProxyCommand=id:/etc/passwd",
        "ssh://host01;id:/etc/passwd",
        "ssh://$(id):/etc/passwd",
        "ssh://a b:/x",
        "ssh://me@-x:/x",
        "ssh://host\n01:/x",
    ],
)
def test_what_is_no_host_is_refused_before_anything_runs(url: str) -> None:
    with pytest.raises(UsageError, match=r"is not ssh://\[USER@\]HOST:/PATH"):
        schemes.open(url, TERMS)


def test_this_machine_is_no_way_around_the_guard(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"here")
    assert fetched(f"ssh://localhost:{tmp_path}/image", schemes.Terms(guard)) == b"here"

    def strict(path: str) -> int:
        raise Forbidden(path)

    with pytest.raises(Forbidden):
        fetched(f"ssh://localhost:{tmp_path}/image", schemes.Terms(strict))


def test_a_host_that_is_away(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PAUSE", 0.01)
    with pytest.raises(HostUnreachable):
        schemes.open("ssh://no-such-host.invalid:/x", TERMS)


def test_a_broken_connection_goes_on_where_it_was(
    there: Path, datastore: str, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(64 * MIB)
    (there / "image").write_bytes(data)
    out, killed = bytearray(), 0
    with schemes.open(f"ssh://host01:{datastore}/image", TERMS) as opened:
        while piece := opened.read(MIB):
            out += piece
            if len(out) > (killed + 1) * 16 * MIB and killed < 3:
                killed += 1
                for pid in hosts.workers("host01"):
                    os.kill(pid, signal.SIGKILL)
    assert killed == 3
    assert bytes(out) == data


def test_a_file_that_changes_is_not_taken(there: Path, datastore: str) -> None:
    (there / "image").write_bytes(os.urandom(32 * MIB))
    with schemes.open(f"ssh://host01:{datastore}/image", TERMS) as opened:
        opened.read(MIB)
        with (there / "image").open("r+b") as file:
            file.write(b"other")
        with pytest.raises(SourceUnavailable, match="was changed while it was fetched"):
            while opened.read(MIB):
                pass


def test_a_silent_host_is_left(there: Path, datastore: str, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_STALL_TIMEOUT", "1")
    monkeypatch.setenv("MADRIGAL_CONNECT_TIMEOUT", "1")
    (there / "image").write_bytes(os.urandom(64 * MIB))
    stop = threading.Event()

    def halt() -> None:
        while not stop.wait(0.02):
            for pid in hosts.workers("host01"):
                os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=halt)
    with schemes.open(f"ssh://host01:{datastore}/image", TERMS) as opened:
        opened.read(MIB)
        thread.start()
        try:
            with pytest.raises(MadrigalError) as raised:
                while opened.read(MIB):
                    pass
        finally:
            stop.set()
            thread.join()
            for pid in hosts.workers("host01"):
                os.kill(pid, signal.SIGKILL)
    assert raised.value.status in (10, 124)


def test_cp_and_stat_by_ssh(there: Path, datastore: str, env: dict[str, str], tmp_path: Path) -> None:
    (there / "image").write_bytes(content())
    qcow2 = there / "leads.qcow2"
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw"]
    subprocess.run([*argv, qcow2, "1M"], check=True, timeout=60)
    url, template = f"ssh://host01:{datastore}/image", {"SAFE_DIRS": datastore, "RESTRICTED_DIRS": "/"}
    done = run_action("datastore/fs/cp", "42", env=env, input=dump(tmp_path / "ds", {"PATH": url}, None, template))
    assert done.status == 0, done.stderr
    assert Path(done.stdout.split()[0]).read_bytes() == content()
    done = run_action("datastore/fs/stat", "1", env=env, input=dump(tmp_path / "ds", {"PATH": url}, None, template))
    assert (done.status, done.stdout) == (0, "4\n"), done.stderr
    for action in ("cp", "stat"):
        for path, more, status in (("image", {"SAFE_DIRS": "/x"}, 21), ("leads.qcow2", {}, BadImage.status)):
            text = dump(tmp_path / "ds2", {"PATH": f"ssh://host01:{datastore}/{path}"}, None, {**template, **more})
            assert run_action(f"datastore/fs/{action}", "43", env=env, input=text).status == status
    assert not (tmp_path / "ds2").exists() or os.listdir(tmp_path / "ds2") == []
