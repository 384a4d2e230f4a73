"""Monitoring of system datastores: capacity, the sizes of disks told by UDP, and those told on hosts by monitor_ds."""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATH, TREE, Done, check_stderr, run_action
from dumps import system_dump
from test_hostpart import FOUND

MIB = 1 << 20
MONITOR_DS = TREE / "tm" / "ssh" / "monitor_ds"


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A system datastore with many VMs: raw disks, a qcow2 chain with eleven snapshots, and what is none of these."""
    system = tmp_path / "a b" / "0"
    for vm in (*range(20), 1234567):
        (system / str(vm)).mkdir(parents=True)
        disk = system / str(vm) / "disk.0"
        disk.write_bytes(os.urandom(MIB + 1))
        os.truncate(disk, 100 * MIB)
    snapshots = system / "7" / "disk.12.snap"
    snapshots.mkdir()
    for number in range(12):
        (snapshots / str(number)).write_bytes(os.urandom((number % 3 + 1) * MIB))
    for name in ("disk.12.snap", "base.1", "3.current", ".4.copy.part"):
        (snapshots / name).symlink_to(".")
    (system / "7" / "disk.12").symlink_to("disk.12.snap/11")
    (system / "7" / "disk.3").symlink_to("/no/such/image")
    (system / "8" / "disk.0").unlink()
    (system / "8" / "a b; disk.0").touch()
    for name in ("17x", ".17.lock", "1 2", "disk.0"):
        (system / name).touch()
    (system / ".monitor").write_text("ssh\n")
    return system


def sizes(text: str, pattern: str) -> dict[int, str]:
    """The text about each VM in TEXT, whose lines look like PATTERN."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(pattern, line)
        assert match, line
        found[int(match[1])] = base64.b64decode(match[2], validate=True).decode()
    return found


ON_HOST = r'VM = \[ ID = (\d+), MONITOR = "([A-Za-z0-9+/=]+)"\]'
SENT = r'VM=\[ID=(\d+), MONITOR="([A-Za-z0-9+/=]+)"\]'


def check(found: dict[int, str]) -> None:
    assert set(found) == {*range(20), 1234567} - {8}
    assert found[1234567] == "DISK_SIZE = [ ID=0, SIZE=2]"
    seven = [f"SNAPSHOT_SIZE = [ ID={number}, DISK_ID=12, SIZE={number % 3 + 1}]" for number in range(12)]
    assert found[7].split("\n") == ["DISK_SIZE = [ ID=0, SIZE=2]", "DISK_SIZE = [ ID=12, SIZE=3]", *seven]


@pytest.mark.parametrize("python", FOUND)
def test_monitor_ds_alone_on_a_host(python: str, system: Path, tmp_path: Path) -> None:
    """A copy of the one file, where nothing else of ours is, run by the oldest Python and by the newest."""
    copy = tmp_path / "var/tmp/one/tm/ssh/monitor_ds"
    copy.parent.mkdir(parents=True)
    shutil.copy(MONITOR_DS, copy)
    assert os.access(copy, os.X_OK)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(FOUND[python])
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    done = subprocess.run([copy, system], capture_output=True, text=True, env=env, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    check(sizes(done.stdout, ON_HOST))
    for argv, status in (([], 2), (["a", "b"], 2), ([tmp_path / "gone"], 0), (["--help"], 0)):
        done = subprocess.run([copy, *argv], capture_output=True, text=True, env=env, cwd="/")
        assert done.returncode == status and "Traceback" not in done.stderr


def test_vms_that_are_removed_meanwhile_are_no_error(tmp_path: Path) -> None:
    for vm in range(300):
        (tmp_path / str(vm) / "disk.0.snap").mkdir(parents=True)
        (tmp_path / str(vm) / "disk.0").write_bytes(b"x")
        (tmp_path / str(vm) / "disk.0.snap" / "0").write_bytes(b"x")
    with subprocess.Popen(["rm", "-rf", *(str(tmp_path / str(vm)) for vm in range(300))]) as remover:
        while remover.poll() is None:
            done = subprocess.run([MONITOR_DS, tmp_path], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            sizes(done.stdout, ON_HOST)


# -- shared datastores -----------------------------------------------------------------------------------------


class FrontEnd:
    """A front-end's directories, and the socket of its monitoring."""

    def __init__(self, work: Path) -> None:
        self.etc = work / "one" / "etc"
        self.etc.mkdir(parents=True)
        (work / "one" / "var").mkdir()
        self.env = {"PATH": PATH, "ONE_LOCATION": str(work / "one"), "MADRIGAL_RUN_DIR": str(work / "run")}
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * MIB)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(0.2)

    def conf(self, pubkey: str = "", address: str = "auto") -> None:
        port = self.socket.getsockname()[1]
        (self.etc / "monitord.conf").write_text(
            f'# NETWORK = [ PORT = 1, MONITOR_ADDRESS = "192.0.2.1" ]\nLOG = [ SYSTEM = "file" ]\nNETWORK = [\n'
            f'    ADDRESS         = "0.0.0.0",\n    MONITOR_ADDRESS = "{address}",\n    PORT    = {port},\n'
            f'    THREADS = 8,\n    PUBKEY  = "{pubkey}",\n    PRIKEY  = ""\n]\n'
        )

    def messages(self) -> list[bytes]:
        """The data of the messages that have come."""
        found: list[bytes] = []
        while True:
            try:
                message = self.socket.recv(1 << 16)
            except TimeoutError:
                return found
            match = re.fullmatch(rb"MONITOR_VM SUCCESS -1 0 ([A-Za-z0-9+/=]+)\n", message)
            assert match, message
            found.append(zlib.decompress(base64.b64decode(match[1], validate=True)))

    def monitor(self, dump: bytes, driver: str = "shared") -> Done:
        return run_action(f"tm/{driver}/monitor", "0", env=self.env, input=dump)


@pytest.fixture
def front_end(tmp_path: Path) -> Iterator[FrontEnd]:
    made = FrontEnd(tmp_path)
    yield made
    made.socket.close()


def capacity(done: Done) -> dict[str, int]:
    assert done.status == 0, done
    check_stderr(done, "monitor")
    assert re.fullmatch(r"USED_MB=\d+\nTOTAL_MB=\d+\nFREE_MB=\d+\n", done.stdout)
    return {name: int(value) for name, value in (line.split("=") for line in done.stdout.splitlines())}


def test_capacity_is_what_df_says(front_end: FrontEnd, tmp_path: Path) -> None:
    found = capacity(front_end.monitor(system_dump(f"{tmp_path}//new")))
    assert (tmp_path / "new" / "0").is_dir(), "it is made, as with images' datastores"
    df = subprocess.run(["df", "-B1M", "-P", tmp_path], capture_output=True, text=True).stdout.splitlines()[1].split()
    assert [abs(found[name] - int(df[n])) < 100 for name, n in (("TOTAL_MB", 1), ("USED_MB", 2), ("FREE_MB", 3))]
    assert found["TOTAL_MB"] == int(df[1]) or abs(found["TOTAL_MB"] - int(df[1])) == 1
    assert front_end.messages() == []


def test_sizes_are_told_when_they_are_wanted(front_end: FrontEnd, system: Path) -> None:
    dump = system_dump(system.parent, disks=True)
    done = front_end.monitor(dump)
    assert capacity(done) and done.stderr == "", "without a monitord.conf nothing is said"
    front_end.conf()
    capacity(front_end.monitor(system_dump(system.parent)))
    assert front_end.messages() == [], "not asked for"
    capacity(front_end.monitor(dump))
    (message,) = front_end.messages()
    check(sizes(message.decode(), SENT))


def test_many_vms_take_several_messages(front_end: FrontEnd, tmp_path: Path) -> None:
    system = tmp_path / "0"
    for vm in range(3000):
        (system / str(vm)).mkdir(parents=True)
        for disk in range(3):
            (system / str(vm) / f"disk.{disk * vm}").touch()
    front_end.conf(pubkey=key(tmp_path)[0])
    capacity(front_end.monitor(system_dump(tmp_path, disks=True)))
    messages = front_end.messages()
    assert len(messages) > 1
    first = decrypted(tmp_path, messages[0][:256]).splitlines()[0]
    assert sizes(first, SENT)[0] == "DISK_SIZE = [ ID=0, SIZE=0]"


def key(work: Path) -> tuple[str, str]:
    """(public key, private key) as the front-end's documentation makes them."""
    private, public = f"{work}/private.pem", f"{work}/public.pem"
    subprocess.run(["openssl", "genrsa", "-out", private, "2048"], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", private, "-RSAPublicKey_out", "-out", public], check=True, capture_output=True
    )
    return public, private


def decrypted(work: Path, data: bytes) -> str:
    assert len(data) % 256 == 0
    text = b""
    for start in range(0, len(data), 256):
        argv = ["openssl", "pkeyutl", "-decrypt", "-inkey", f"{work}/private.pem"]
        text += subprocess.run(argv, input=data[start : start + 256], capture_output=True, check=True).stdout
    return text.decode()


def test_sizes_are_encrypted_if_there_is_a_key(front_end: FrontEnd, system: Path, tmp_path: Path) -> None:
    front_end.conf(pubkey=key(tmp_path)[0])
    capacity(front_end.monitor(system_dump(system.parent, disks=True)))
    (message,) = front_end.messages()
    assert b"MONITOR" not in message
    check(sizes(decrypted(tmp_path, message), SENT))


@pytest.mark.parametrize("wrong", ["PORT", "PUBKEY", "a key of another kind", "MONITOR_ADDRESS"])
def test_what_is_wrong_with_monitoring_is_logged_and_no_more(front_end: FrontEnd, tmp_path: Path, wrong: str) -> None:
    front_end.conf(address="no such host" if wrong == "MONITOR_ADDRESS" else "auto")
    if wrong == "PUBKEY":
        front_end.conf(pubkey="/no/such/key")
    if wrong == "a key of another kind":
        (tmp_path / "key").write_text("-----BEGIN RSA PUBLIC KEY-----\nMAYCAQMCAQM=\n-----END RSA PUBLIC KEY-----\n")
        front_end.conf(pubkey=f"{tmp_path}/key")
    if wrong == "PORT":
        (front_end.etc / "monitord.conf").write_text("NETWORK = [ PORT = x ]\n")
    done = front_end.monitor(system_dump(tmp_path, disks=True))
    assert capacity(done)
    assert "ERROR: monitor: monitoring was not told the sizes of disks: " in done.stderr


def test_what_cannot_be_monitored_is_refused(front_end: FrontEnd, tmp_path: Path) -> None:
    for dump, status, text in (
        (system_dump("relative"), 2, "DATASTORE_LOCATION"),
        (system_dump("/x/../y"), 2, "DATASTORE_LOCATION"),
        (b"", 2, "dump"),
    ):
        done = front_end.monitor(dump)
        assert (done.status, text in check_stderr(done, "monitor")) == (status, True), done


def test_dummy(front_end: FrontEnd, tmp_path: Path) -> None:
    done = front_end.monitor(system_dump(tmp_path), "dummy")
    assert capacity(done) == {"USED_MB": 1429920, "TOTAL_MB": 4796800, "FREE_MB": 3333260}
