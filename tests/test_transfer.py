"""Much data between machines: an interrupted copy is gone on with, older copies spare sending, damage is mended."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from conftest import Hosts, eventually
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from madrigal import snapshots, transfer
from madrigal.errors import BadImage, ConfigError, DigestMismatch, MadrigalError
from madrigal.host.local import LocalSession
from madrigal.host.remote import RemoteSession
from madrigal.location import Location
from madrigal.onhost import blocks, gmac, squeeze, stream
from madrigal.onhost.part import WORTH
from madrigal.transfer import carry, plan

MIB = 1 << 20
Frame = tuple[bytes, int, bytes | memoryview]
RAW = {"format": "raw", "snapshot": -1, "image": ""}


@pytest.fixture(autouse=True)
def bulk(monkeypatch: pytest.MonkeyPatch, hosts: Hosts) -> None:
    """A small amount is much already."""
    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "window", (1 << 60, ""))  # a busy machine may look far away
    for name in ("ONE_LOCATION", "MADRIGAL_SSH_CONFIG", "MADRIGAL_RUN_DIR"):
        monkeypatch.setenv(name, hosts.env[name])


class Flow:
    """What passes in a transfer: `data` bytes so far; HOOK is called with every frame and may change it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sender: type[LocalSession] | type[RemoteSession]) -> None:
        self.data = 0
        self.sends = 0
        self.hook: Callable[[Frame], Frame] = lambda frame: frame
        send = sender.send

        def sending(session: LocalSession | RemoteSession, path: str, **how: object) -> Iterator[Frame]:
            self.sends += 1
            for frame in send(session, path, **how):  # type: ignore[arg-type]
                self.data += len(frame[2]) if frame[0] == b"D" else 0
                yield self.hook(frame)

        monkeypatch.setattr(sender, "send", sending)

    def stop_after(self, count: int, how: Callable[[], object]) -> None:
        """Do HOW once, when COUNT bytes have passed."""

        def hook(frame: Frame) -> Frame:
            if self.data >= count:
                self.hook = lambda frame: frame
                how()
            return frame

        self.hook = hook


def written(path: Path, size: int, seed: int = 1) -> bytes:
    """A file of SIZE bytes with a hole and zeros that are no hole; returns what is in it."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[size // 8 : size // 4] = bytes(size // 4 - size // 8)
    with open(path, "wb") as file:
        file.write(data[: size // 8])
        file.seek(size // 8 + (64 << 10))
        file.write(data[size // 8 + (64 << 10) :])
    return bytes(data)


def parts(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.endswith((".part", ".lock")))


def cut(hosts: Hosts, name: str) -> None:
    """End the connections of the sessions on a host."""
    for pid in hosts.pids(name):
        with contextlib.suppress(OSError):  # it has just ended by itself
            if "notty" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, 9)
    assert eventually(lambda: not hosts.workers(name))


# -- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["connection", "worker", "action"])
def test_what_has_arrived_is_not_sent_again(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    content = written(tmp_path / "image", 48 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    there = hosts.on("host01", f"{datastore}/17")
    flow = Flow(monkeypatch, LocalSession)

    def breaks() -> None:
        if broken == "connection":
            cut(hosts, "host01")
        elif broken == "worker":
            for pid in hosts.workers("host01"):
                os.kill(pid, 9)
        else:
            raise KeyboardInterrupt

    flow.stop_after(32 * MIB, breaks)
    with pytest.raises((MadrigalError, KeyboardInterrupt)):
        transfer.copy(image, disk)
    assert eventually(lambda: not hosts.workers("host01"))
    assert not (there / "disk.0").exists()
    assert [name for name in parts(there) if name.endswith(".part")] == [part(image)]

    before, flow.data = flow.data, 0
    transfer.copy(image, disk)
    assert (there / "disk.0").read_bytes() == content
    assert parts(there) == []
    # what was in a pipe when it broke goes a second time: at most what pipes and ssh hold
    assert flow.data <= 42 * MIB - before + 12 * MIB
    assert (there / "disk.0").stat().st_blocks * 512 <= 42 * MIB + MIB, "zeros were written"


def part(source: Location) -> str:
    return f".disk.0.stream{stream.measure(source.path)['source']}.part"


def test_a_disk_that_comes_back_goes_on(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a host to the front-end, with snapshots."""
    there = hosts.on("host01", f"{datastore}")
    (there / "17" / "disk.0.snap").mkdir(parents=True)
    content = written(there / "17" / "disk.0", 48 * MIB)
    old = written(there / "17" / "disk.0.snap" / "0", 4 * MIB, seed=2)
    disk, image = Location("host01", f"{datastore}/17/disk.0"), Location("", str(tmp_path / "image"))
    flow = Flow(monkeypatch, RemoteSession)
    flow.stop_after(32 * MIB, lambda: cut(hosts, "host01"))
    with pytest.raises(MadrigalError):
        transfer.bring_back(disk, image, RAW)
    assert (there / "17" / "disk.0").read_bytes() == content
    assert len(parts(tmp_path)) == 1 and not image_exists(image)
    flow.data = 0
    transfer.bring_back(disk, image, RAW)
    assert Path(image.path).read_bytes() == content
    assert Path(image.path + ".snap/0").read_bytes() == old
    assert parts(tmp_path) == [] and flow.data < 24 * MIB


def image_exists(image: Location) -> bool:
    return os.path.lexists(image.path)


def test_a_vm_that_moves_goes_on(hosts: Hosts, datastore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hosts.on("host01", datastore) / "17"
    source.mkdir(parents=True)
    contents = {name: written(source / name, size * MIB) for name, size in (("disk.0", 20), ("disk.1", 20))}
    (source / "disk.2").symlink_to("disk.1")
    (source / "sub").mkdir(mode=0o500)
    monkeypatch.setenv("MADRIGAL_DIRECT", "no")
    flow = Flow(monkeypatch, RemoteSession)
    flow.stop_after(24 * MIB, lambda: cut(hosts, "host02"))
    one, two = Location("host01", f"{datastore}/17"), Location("host02", f"{datastore}/17")
    with pytest.raises(MadrigalError):
        transfer.move(one, two)
    assert (source / "disk.0").read_bytes() == contents["disk.0"]
    flow.data = 0
    transfer.move(one, two)
    target = hosts.on("host02", datastore) / "17"
    assert {name: (target / name).read_bytes() for name in contents} == contents
    assert os.readlink(target / "disk.2") == "disk.1" and (target / "sub").stat().st_mode & 0o777 == 0o500
    assert not source.exists() and parts(target.parent) == [] and flow.data < 24 * MIB


def test_a_source_that_was_changed_starts_over(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "image", 48 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    flow = Flow(monkeypatch, LocalSession)
    flow.stop_after(32 * MIB, lambda: cut(hosts, "host01"))
    with pytest.raises(MadrigalError):
        transfer.copy(image, disk)
    content = written(tmp_path / "image", 44 * MIB, seed=3)
    flow.data = 0
    transfer.copy(image, disk)
    assert "has been changed since a copy of it was interrupted" in capfd.readouterr().err
    there = hosts.on("host01", f"{datastore}/17")
    assert (there / "disk.0").read_bytes() == content and parts(there) == []
    assert flow.data >= 38 * MIB


def test_little_is_not_kept(hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "image", 48 * MIB)
    flow = Flow(monkeypatch, LocalSession)
    flow.stop_after(WORTH // 2, lambda: cut(hosts, "host01"))
    with pytest.raises(MadrigalError):
        transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert eventually(lambda: not hosts.on("host01", datastore).exists())


def test_what_is_refused_is_not_kept(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "image", 48 * MIB)
    flow = Flow(monkeypatch, LocalSession)
    flow.stop_after(32 * MIB, lambda: os.utime(tmp_path / "image", (5, 5)))
    with pytest.raises(MadrigalError, match="was changed while it was copied"):
        transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert eventually(lambda: not hosts.on("host01", datastore).exists())


def test_a_part_that_somebody_writes_to_is_left_alone(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of the interrupted run that still lives must not write into the disk of the next."""
    content = written(tmp_path / "image", 24 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    there = hosts.on("host01", f"{datastore}/17")
    there.mkdir(parents=True)
    (there / part(image)).write_bytes(b"part")
    with open(there / part(image), "r+b") as stray:
        fcntl.flock(stray, fcntl.LOCK_SH)
        transfer.copy(image, disk)
        stray.write(b"late")
        stray.flush()
    assert (there / "disk.0").read_bytes() == content and parts(there) == []


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 1])
def test_damage_on_the_way_is_mended(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    content = written(tmp_path / "image", size * MIB)
    flow = Flow(monkeypatch, LocalSession)

    def hook(frame: Frame) -> Frame:
        if frame[0] != b"D" or flow.data < size * MIB // 2:
            return frame
        flow.hook = lambda frame: frame
        return frame[0], frame[1], bytes([frame[2][0] ^ 1]) + bytes(frame[2][1:])

    flow.hook = hook
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    there = hosts.on("host01", f"{datastore}/17")
    assert (there / "disk.0").read_bytes() == content and parts(there) == [] and flow.sends == 2
    assert flow.data < (size + 8) * MIB or size == 1


def test_damage_that_does_not_end(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "image", 24 * MIB)
    flow = Flow(monkeypatch, LocalSession)
    flow.hook = lambda frame: (frame[0], frame[1], bytes(frame[2])[:-1] + b"?") if frame[0] == b"D" else frame
    with pytest.raises(DigestMismatch):
        transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert flow.sends == 3
    assert not (hosts.on("host01", f"{datastore}/17") / "disk.0").exists()


@pytest.mark.parametrize("verify", ["none", "checksum", "digest"])
def test_every_verification(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    monkeypatch.setenv("MADRIGAL_VERIFY", verify)
    content = written(tmp_path / "image", 8 * MIB)
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert (hosts.on("host01", f"{datastore}/17") / "disk.0").read_bytes() == content


def test_verification_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADRIGAL_VERIFY", "md5")
    with pytest.raises(MadrigalError, match="MADRIGAL_VERIFY is 'md5'"):
        carry.verification()


# -- slow ways ---------------------------------------------------------------------------------------------------


def text(path: Path, size: int) -> bytes:
    """A file of SIZE bytes that can be packed."""
    data = (b"The quick brown fox jumps over the lazy dog. %d\n" * (size // 40) % tuple(range(size // 40)))[:size]
    path.write_bytes(data)
    return data


def test_a_slow_way_gets_packed_data(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = text(tmp_path / "image", 40 * MIB)
    kinds: list[bytes] = []
    flow = Flow(monkeypatch, LocalSession)

    def hook(frame: Frame) -> Frame:
        kinds.append(frame[0])
        time.sleep(len(frame[2]) / (20 * MIB))
        return frame

    flow.hook = hook
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert (hosts.on("host01", f"{datastore}/17") / "disk.0").read_bytes() == content
    assert kinds.count(b"P") > 20, "it was not packed"


def test_what_cannot_be_packed_goes_as_it_is(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = written(tmp_path / "image", 24 * MIB)
    kinds: list[bytes] = []
    flow = Flow(monkeypatch, LocalSession)

    def hook(frame: Frame) -> Frame:
        kinds.append(frame[0])
        time.sleep(len(frame[2]) / (50 * MIB))
        return frame

    flow.hook = hook
    transfer.copy(Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0"))
    assert (hosts.on("host01", f"{datastore}/17") / "disk.0").read_bytes() == content
    assert b"P" not in kinds


def test_what_was_misjudged_once_is_soon_tried_again() -> None:
    squeezer, noise, words = squeeze.Squeezer(), os.urandom(1000), b"word " * 10000
    squeezer.sent(64 * MIB, 1000)
    assert squeezer.packed(noise) is None and squeezer.packed(words) is None
    assert squeezer.packed(words), "one piece was left out"
    assert [squeezer.packed(noise) for _ in range(4)] == [None] * 4
    assert [bool(squeezer.packed(words)) for _ in range(3)] == [False, True, True]


def test_packed_data_that_are_damaged() -> None:
    squeezer = squeeze.Squeezer()
    assert squeezer.packed(b"word " * 10000) is None, "nobody knows the way yet"
    squeezer.sent(64 * MIB, 1000)
    packed = squeezer.packed(b"word " * 10000)
    assert packed and len(packed) < 5000
    assert squeeze.unpacked(packed, 50000) == b"word " * 10000
    for most, data in ((49999, packed), (50000, packed[:-6]), (50000, b"\0" + packed[1:]), (50000, b"")):
        with pytest.raises(BadImage):
            squeeze.unpacked(data, most)


@pytest.mark.parametrize("way", ["to a host", "from a host", "within a machine", "several connections"])
def test_no_more_than_the_limit(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("ONE_LOCATION", str(tmp_path / "one"))
    etc = tmp_path / "one/etc"
    etc.mkdir(parents=True)
    (etc / "tmrc").write_text('LIMIT_TRANSFER_BW="8M"\n')
    monkeypatch.setattr(squeeze.Squeezer, "packed", lambda *_: None)
    if way == "several connections":
        monkeypatch.setitem(plan.COSTS, "window", (1, ""))
    content = written(tmp_path / "image", 24 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    if way == "from a host":
        there = hosts.on("host01", f"{datastore}/17")
        there.mkdir(parents=True)
        shutil.copy(image.path, there / "disk.0")
        os.unlink(image.path)
    began = time.monotonic()
    if way == "from a host":
        transfer.bring_back(disk, image, RAW)
    elif way == "within a machine":
        transfer.copy(image, Location("", str(tmp_path / "17" / "disk.0")))
    else:
        transfer.copy(image, disk)
    assert time.monotonic() - began > 2.4  # 21 MiB of data
    found = {"from a host": tmp_path / "image", "within a machine": tmp_path / "17/disk.0"}
    assert found.get(way, hosts.on("host01", f"{datastore}/17/disk.0")).read_bytes() == content


def test_a_limit_that_is_none(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_LOCATION", str(tmp_path / "one"))
    (tmp_path / "one/etc").mkdir(parents=True)
    (tmp_path / "one/etc/tmrc").write_text("LIMIT_TRANSFER_BW=fast\n")
    (tmp_path / "image").write_bytes(b"x")
    with pytest.raises(ConfigError, match="LIMIT_TRANSFER_BW of tmrc is 'fast'"):
        transfer.copy(Location("", str(tmp_path / "image")), Location("", str(tmp_path / "17" / "disk.0")))


# -- several connections -----------------------------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way is long."""
    monkeypatch.setitem(plan.COSTS, "window", (1, ""))


def test_several_connections(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: None, transport: str
) -> None:
    content = written(tmp_path / "image", 80 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    there = hosts.on("host01", f"{datastore}/17")
    flow = Flow(monkeypatch, LocalSession)
    transfer.copy(image, disk)
    assert flow.sends == carry.LANES
    assert (there / "disk.0").read_bytes() == content and parts(there) == []
    assert flow.data < 72 * MIB

    back = Location("", str(tmp_path / "back"))
    flow = Flow(monkeypatch, RemoteSession)
    transfer.bring_back(disk, back, RAW)
    assert flow.sends == carry.LANES
    assert Path(back.path).read_bytes() == content and parts(tmp_path) == []


def test_several_connections_from_host_to_host(
    hosts: Hosts, datastore: str, monkeypatch: pytest.MonkeyPatch, far: None
) -> None:
    source = hosts.on("host01", datastore) / "17"
    source.mkdir(parents=True)
    contents = {name: written(source / name, size * MIB) for name, size in (("disk.0", 30), ("disk.1", 3), ("x", 0))}
    monkeypatch.setenv("MADRIGAL_DIRECT", "no")
    flow = Flow(monkeypatch, RemoteSession)
    transfer.move(Location("host01", f"{datastore}/17"), Location("host02", f"{datastore}/17"))
    target = hosts.on("host02", datastore) / "17"
    assert {name: (target / name).read_bytes() for name in contents} == contents
    assert not source.exists() and parts(target.parent) == [] and flow.sends == carry.LANES


@pytest.mark.parametrize("which", range(3))
def test_several_connections_of_which_one_breaks(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: None, which: int
) -> None:
    content = written(tmp_path / "image", 80 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    flow = Flow(monkeypatch, LocalSession)
    flow.stop_after(45 * MIB, lambda: os.kill(hosts.workers("host01")[: which + 1][-1], 9))
    with pytest.raises(MadrigalError):
        transfer.copy(image, disk)
    there = hosts.on("host01", f"{datastore}/17")
    assert eventually(lambda: not hosts.workers("host01"))
    assert not (there / "disk.0").exists()
    flow.data = 0
    transfer.copy(image, disk)
    assert (there / "disk.0").read_bytes() == content and parts(there) == []
    assert flow.data < 64 * MIB


# -- an older copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["some", "nothing", "shorter", "longer", "zeros", "hole"])
def test_only_what_is_not_the_same_comes_back(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    written(tmp_path / "image", 32 * MIB)
    content = bytearray(written(there / "disk.0", 32 * MIB))
    with open(there / "disk.0", "r+b") as file:
        if change == "some":
            for offset in (0, 10 * MIB + 5, 32 * MIB - 3):
                content[offset : offset + 3] = b"new"
        elif change == "shorter":
            del content[20 * MIB + 1 :]
        elif change == "longer":
            content += b"more" * (MIB >> 1)
        elif change in ("zeros", "hole"):
            content[9 * MIB + 17 : 14 * MIB] = bytes(5 * MIB - 17)
        if change == "hole":
            file.truncate(0)
            for offset in range(0, len(content), 4096):
                if any(content[offset : offset + 4096]):
                    file.seek(offset)
                    file.write(content[offset : offset + 4096])
        else:
            file.write(content)
        file.truncate(len(content))
    flow = Flow(monkeypatch, RemoteSession)
    image = Location("", str(tmp_path / "image"))
    transfer.bring_back(Location("host01", f"{datastore}/17/disk.0"), image, RAW)
    assert (tmp_path / "image").read_bytes() == content
    assert parts(tmp_path) == [] and flow.data <= 5 * MIB
    assert (tmp_path / "image").stat().st_blocks * 512 <= len(content) + MIB


@pytest.mark.parametrize("but", ["", "it was changed", "the host cannot make such digests"])
def test_what_an_image_had_is_noted_when_it_goes_out(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, but: str
) -> None:
    """Then it need not be read again when the disk comes back; unless the notes are of no use any more."""
    written(tmp_path / "image", 31 * MIB + 12345)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    transfer.copy_whole(image, disk, RAW)
    there = hosts.on("host01", datastore) / "17/disk.0"
    if but == "it was changed":
        with open(tmp_path / "image", "r+b") as file:
            file.seek(20 * MIB)
            file.write(b"somebody else's")
    with open(there, "r+b") as file:
        file.seek(9 * MIB)
        file.write(b"new")
        file.truncate(34 * MIB)
        file.seek(33 * MIB)
        file.write(b"more")
    content = there.read_bytes()
    described: list[int] = []
    describe = blocks.describe

    def describing(fd: int, waiting: Callable[[], None], block: int, kind: str) -> dict[str, object]:
        described.append(fd)
        return describe(fd, waiting, block, kind)

    monkeypatch.setattr(blocks, "describe", describing)
    call = RemoteSession.call
    if but.startswith("the host"):
        slow = {"sha256": "blake2b", "blake2b": "sha256"}[blocks.strong()]
        monkeypatch.setattr(RemoteSession, "call", lambda *to, **of: [slow] if to[1] == "kinds" else call(*to, **of))
    flow = Flow(monkeypatch, RemoteSession)
    transfer.bring_back(disk, image, RAW)
    assert (tmp_path / "image").read_bytes() == content and parts(tmp_path) == []
    # the blocks around the zeros are not noted: they are not read whole
    assert bool(described) == bool(but) and flow.data < 6 * MIB


@pytest.mark.parametrize("what", ["a VM directory", "a persistent disk"])
def test_a_signal_does_not_part_the_new_place_from_the_old(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Told to end when its work has been kept on one machine, an action removes what it was made of on the other."""

    class Told(Exception):
        pass

    def tell(*_: object) -> None:
        raise Told

    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    content = written(there / "disk.0", 2 * MIB)
    made = tmp_path / "image" if what == "a persistent disk" else hosts.on("host02", datastore) / "17/disk.0"
    kept, disk = RemoteSession.done, Location("host01", f"{datastore}/17/disk.0")

    def keeping(session: RemoteSession) -> object:
        result = kept(session)
        if made.exists() and session.host.name == "host02":
            signal.raise_signal(signal.SIGTERM)
        return result

    class Keeping(LocalSession):
        def done(self) -> list[object]:
            result = super().done()
            if made.exists():
                signal.raise_signal(signal.SIGTERM)
            return result

    handler = signal.signal(signal.SIGTERM, tell)
    try:
        with pytest.raises(Told):
            if what == "a VM directory":
                monkeypatch.setattr(RemoteSession, "done", keeping)
                transfer.move(Location("host01", f"{datastore}/17"), Location("host02", f"{datastore}/17"))
            else:
                monkeypatch.setattr("madrigal.host.local.LocalSession", Keeping)
                transfer.bring_back(disk, Location("", str(tmp_path / "image")), RAW)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert made.read_bytes() == content
    assert there.exists() == (what == "a persistent disk")
    if there.exists():
        assert os.readlink(there / "disk.0") == str(made)


def changed(path: Path, *offsets: int) -> bytes:
    """Write something to PATH; returns what it has then."""
    with open(path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"new")
    return path.read_bytes()


@pytest.mark.parametrize("how", ["plain", "a snapshot"])
def test_a_saved_disk_is_made_of_what_it_was_made_of(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """cpds: the image from which the VM was deployed is still in the datastore."""
    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    base = written(tmp_path / "image", 32 * MIB)
    saved = there / "disk.0"
    if how == "a snapshot":
        written(saved, MIB, seed=3)
        saved = there / "disk.0.snap/2"
        saved.parent.mkdir()
    saved.write_bytes(base)
    content = changed(saved, 0, 20 * MIB)
    flow = Flow(monkeypatch, RemoteSession)
    disk, new = Location("host01", f"{datastore}/17/disk.0"), Location("", str(tmp_path / "new"))
    state = {**RAW, "snapshot": 2 if how == "a snapshot" else -1}
    transfer.save(disk, new, state, made_of=str(tmp_path / "image"))
    assert Path(new.path).read_bytes() == content and flow.data < 2 * MIB
    assert (tmp_path / "image").read_bytes() == base and parts(tmp_path) == []


@pytest.mark.parametrize("missing", ["", "/nowhere/image", "directory", "other"])
def test_a_saved_disk_of_nothing_that_is_there(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    content = written(there / "disk.0", 32 * MIB)
    if missing == "directory":
        missing = str(tmp_path)
    elif missing == "other":
        written(tmp_path / "other", 32 * MIB, seed=7)
        missing = str(tmp_path / "other")
    monkeypatch.setattr(blocks, "describe", None)  # nobody reads and digests what is not much the same
    disk, new = Location("host01", f"{datastore}/17/disk.0"), Location("", str(tmp_path / "new"))
    transfer.save(disk, new, RAW, made_of=missing)
    assert Path(new.path).read_bytes() == content


@pytest.mark.parametrize("what", ["disk", "chain"])
def test_what_is_compared_with_an_older_copy_goes_on_too(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Neither what has arrived nor what is the same is sent again."""
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    state = {"format": "raw" if what == "disk" else "qcow2", "snapshot": -1, "image": ""}
    written(tmp_path / "image", 64 * MIB)
    if what == "chain":
        os.rename(image.path, tmp_path / "raw")
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "raw"), image.path]
        subprocess.run(convert, check=True)
    transfer.copy_whole(image, disk, state, chain="" if what == "disk" else "path")
    there = hosts.on("host01", f"{datastore}/17/disk.0")
    top = there if what == "disk" else there.parent / "disk.0.snap/0"
    size = top.stat().st_size
    with open(top, "r+b") as file:
        for offset in (*range(16 * MIB, 36 * MIB, 128 << 10), size - MIB):  # half of every second
            file.seek(offset)
            file.write(os.urandom(64 << 10))
    content = top.read_bytes()
    flow = Flow(monkeypatch, RemoteSession)
    flow.stop_after(8 * MIB, lambda: cut(hosts, "host01"))
    with pytest.raises(MadrigalError):
        transfer.bring_back(disk, image, state)
    first, flow.data = flow.data, 0
    transfer.bring_back(disk, image, state)
    assert Path(os.path.realpath(image.path)).read_bytes() == content
    assert first >= 8 * MIB and flow.data < 6 * MIB, f"{first >> 20} MiB and then {flow.data >> 20} MiB"
    assert [name for name in os.listdir(tmp_path) if name.endswith((".part", ".lock"))] == []


def test_an_older_copy_that_changes_meanwhile(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was the same when it was compared may not be any more when it is copied."""
    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    written(there / "disk.0", 32 * MIB)
    shutil.copy(there / "disk.0", tmp_path / "image")
    changed(there / "disk.0", 30 * MIB)
    flow = Flow(monkeypatch, RemoteSession)
    flow.stop_after(0, lambda: changed(tmp_path / "image", 31 * MIB))
    disk, new = Location("host01", f"{datastore}/17/disk.0"), Location("", str(tmp_path / "new"))
    with pytest.raises(MadrigalError, match="image was changed while blocks were taken from it"):
        transfer.save(disk, new, RAW, made_of=str(tmp_path / "image"))
    assert sorted(os.listdir(tmp_path)) == ["image"]


@pytest.mark.parametrize("what", ["clone", "ln"])
@pytest.mark.parametrize("now", ["same", "changed", "locked"])
def test_a_disk_that_is_made_again(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, now: str
) -> None:
    """When one of a VM's disks could not be brought, all are brought again; but not what is there already."""
    content = written(tmp_path / "image", 32 * MIB)
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")

    def make() -> None:
        if what == "clone":
            transfer.copy(image, disk, ("raw", 40 * MIB), state=RAW)
        else:
            transfer.copy_whole(image, disk, RAW, ("raw", 40 * MIB))

    make()
    there = hosts.on("host01", f"{datastore}/17/disk.0")
    if now == "changed":
        content = changed(tmp_path / "image", 5 * MIB)
        changed(there, 31 * MIB, 38 * MIB)
    flow = Flow(monkeypatch, LocalSession)
    with open(there, "r+b") as user:
        if now == "locked":  # as qemu does it
            fcntl.fcntl(user, 37, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 100, 1, 0))  # F_OFD_SETLK
        make()
    assert there.read_bytes() == content + bytes(8 * MIB)
    assert parts(there.parent) == [] and (flow.data > 24 * MIB) == (now == "locked")


@pytest.mark.parametrize("names", ["path", "number"])
def test_a_chain_comes_back_where_its_image_is(
    hosts: Hosts, datastore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """What the image was is the first file of a disk that has snapshots, and every file has its older copy."""
    image, disk = Location("", str(tmp_path / "image")), Location("host01", f"{datastore}/17/disk.0")
    state = {"format": "qcow2", "snapshot": -1, "image": ""}
    written(tmp_path / "raw", 32 * MIB)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "raw"), image.path]
    subprocess.run(convert, check=True)
    there = hosts.on("host01", f"{datastore}/17")
    for snapshot in (0, 1):
        transfer.copy_whole(image, disk, state, chain=names)
        qemu_io(there, f"write -P {snapshot + 1} 3M 1M")
        snapshots.create(disk, snapshot, chained=True)
        qemu_io(there, f"write -P {snapshot + 1} 9M 64k")
        flow = Flow(monkeypatch, RemoteSession)
        transfer.bring_back(disk, image, state)
        assert flow.data < 8 * MIB
        shutil.rmtree(there)
    top = os.path.realpath(f"{image.path}.snap/2")
    for offset, value in (("3M", 2), ("9M", 2)):
        subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {value} {offset} 64k", top], check=True)


def qemu_io(directory: Path, command: str) -> None:
    top = os.path.join(directory, os.readlink(directory / "disk.0"))
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, top], capture_output=True, text=True)
    assert done.returncode == 0 and "rror" not in done.stdout + done.stderr, done


def test_an_older_copy_that_is_a_small_one_is_not_looked_at(
    hosts: Hosts, datastore: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = hosts.on("host01", datastore) / "17"
    there.mkdir(parents=True)
    written(tmp_path / "image", 1 * MIB)
    content = written(there / "disk.0", 32 * MIB)
    transfer.bring_back(Location("host01", f"{datastore}/17/disk.0"), Location("", str(tmp_path / "image")), RAW)
    assert (tmp_path / "image").read_bytes() == content
    assert "not the same" not in capfd.readouterr().err


# -- blocks ------------------------------------------------------------------------------------------------------


def spans(path: Path, described: dict[str, object]) -> list[tuple[int, int, bool]]:
    with open(path, "rb") as file:
        known = blocks.Known(described)
        found = list(known.spans(0, path.stat().st_size, file.fileno()))
    return [span for span in found if span[1] > span[0]]


def test_a_file_system_is_asked_once_for_what_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in memory looks through the whole file for a hole, which took long where many blocks had changed."""
    choice = random.Random(5)
    data = bytearray(8 * MIB)
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(len(data))
        for _ in range(4):  # extents, of which some may touch
            offset = choice.randrange(0, 7 * MIB, 4096)
            file.seek(offset)
            piece = choice.randbytes(choice.randrange(4096, MIB, 4096))
            data[offset : offset + len(piece)] = piece
            file.write(piece)
        file.flush()
        asked = 0
        lseek = os.lseek

        def counting(*args: int) -> int:
            nonlocal asked
            asked += 1
            return lseek(*args)

        monkeypatch.setattr(os, "lseek", counting)
        extents, seen = stream.Extents(file.fileno()), bytearray(len(data))
        for start in range(0, len(data), 10_000):
            end = min(start + 10_000, len(data))
            for offset, length in extents.within(start, end):
                assert start <= offset < offset + length <= end and offset // MIB == (offset + length - 1) // MIB
                seen[offset : offset + length] = data[offset : offset + length]
        assert seen == data and 2 <= asked <= 10
        assert list(extents.within(0, 4096)) == list(stream.Extents(file.fileno()).within(0, 4096))


def described(path: Path, kind: str = "sha256") -> dict[str, object]:
    with open(path, "rb") as file:
        return blocks.describe(file.fileno(), lambda: None, blocks.block_of(path.stat().st_size), kind)


KEYED = "gmac:" + "0123456789abcdef" * 2


def test_the_fastest_digest_that_both_sides_can_make_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(blocks.kinds())[0] == "blake2b" and blocks.kinds()[-1] != blocks.strong()
    assert blocks.chosen(["sha256", "blake2b"]) == blocks.strong()
    assert blocks.chosen(["blake2b"]) == "blake2b"
    monkeypatch.setattr(blocks, "_cpu", lambda: ["sha_ni", "aes", "pclmulqdq"])
    assert blocks.kinds() == ["gmac", "sha256", "blake2b"]
    first, second = (blocks.chosen(["blake2b", "gmac"]) for _ in range(2))
    assert first != second and len(first) == len(second) == len(KEYED)
    monkeypatch.setattr(gmac, "_found", None)
    monkeypatch.setitem(cast("dict[str, object]", sys.modules), "_hashlib", None)  # a Python without OpenSSL
    assert blocks.kinds() == ["sha256", "blake2b"]
    monkeypatch.setattr(blocks, "_cpu", list)
    assert blocks.kinds() == ["blake2b", "sha256"]


@pytest.mark.parametrize("length", [0, 1, 16, 65536, MIB + 5])
def test_gmac_is_what_others_make(length: int) -> None:
    key, data = os.urandom(16), bytearray(os.urandom(length))
    made = gmac.Gmac(key)
    made.update(memoryview(data)[: length // 3])
    made.update(memoryview(data)[length // 3 :])
    assert made.digest() == AESGCM(key).encrypt(bytes(12), b"", bytes(data))


def test_a_gmac_that_is_not_right_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gmac, "_IV", b"another nonce"[:12])
    assert not gmac.works()


@pytest.mark.parametrize("kind", ["sha256", "blake2b", KEYED])
@pytest.mark.parametrize("python", ["3.6", "3.7"])
@pytest.mark.parametrize("block", [64 << 10, 1 * MIB, 4 * MIB])
def test_blocks_that_are_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, python: str, kind: str
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", block)
    if python == "3.6":
        monkeypatch.setattr(blocks, "_preadv", None)
    size = 18 * MIB + 77
    written(tmp_path / "old", size)
    shutil.copy(tmp_path / "old", tmp_path / "new")
    old = described(tmp_path / "old", kind)
    assert spans(tmp_path / "new", old) == [span for span in spans(tmp_path / "new", old) if span[2]]
    offsets = [5 * MIB + 1, 5 * MIB + block, 11 * MIB, size - 1]
    data = bytearray((tmp_path / "old").read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    (tmp_path / "new").write_bytes(data)
    changed = {
        number
        for start, end, bare in spans(tmp_path / "new", old)
        if not bare
        for number in _numbers(start, end, block)
    }
    assert changed == {offset // block for offset in offsets}


def _numbers(start: int, end: int, block: int) -> range:
    return range(start // block, -(-end // block))


def test_blocks_of_a_large_file_are_large(tmp_path: Path) -> None:
    with open(tmp_path / "image", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x")
    about = described(tmp_path / "image")
    assert about["block"] == 4 * MIB and len(str(about["digests"])) < 6 * MIB
    assert all(bare for _, _, bare in spans(tmp_path / "image", about))
    with open(tmp_path / "image", "r+b") as file:
        file.seek((1 << 39) + 5)
        file.write(b"y")
    assert [span for span in spans(tmp_path / "image", about) if not span[2]] == [(1 << 39, (1 << 39) + 4 * MIB, False)]


@pytest.mark.parametrize("seed", range(60))
def test_any_file_is_made_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What is sent besides an older copy, or what an interrupted run left, gives the new one."""
    chance = random.Random(seed)
    monkeypatch.setattr(blocks, "_BLOCK", chance.choice([4096, 64 << 10, MIB]))
    monkeypatch.setattr(blocks, "_MOST", chance.choice([4, 1 << 18]))
    source = tmp_path / "new"
    pieces = chance.randrange(1, 12)
    for path in (source, tmp_path / "old", tmp_path / "left"):
        with open(path, "wb") as file:
            for number in range(pieces):
                kind = chance.choice(["same", "same", "hole", "zeros", "other", "other"])
                length = random.Random(seed + number).choice([1, 4096, 65536, 70001, MIB, MIB + 4096])
                if kind == "hole":
                    file.seek(length, os.SEEK_CUR)
                else:
                    own = chance if kind == "other" else random.Random(seed + number)
                    file.write(bytes(length) if kind == "zeros" else own.randbytes(length))
            file.truncate(max(file.tell() + chance.choice([0, 1, 65536]), 0))
    session, given = LocalSession(), LocalSession()
    with session:
        session.call("hold", path=str(tmp_path / "made"))
        having = chance.choice(["old", "left", "old and left"])
        if "left" in having:
            subprocess.run(["cp", tmp_path / "left", tmp_path / ".made.streamxyz.part"], check=True)  # with its holes
            os.truncate(tmp_path / ".made.streamxyz.part", chance.randrange((tmp_path / "left").stat().st_size + 1))
            assert session.call("known", path=str(tmp_path / "made"), source="xyz")["how"] == "part"
        older = {"": str(tmp_path / "old")} if "old" in having else {}
        kinds = chance.choice([["sha256", "blake2b"], ["blake2b"], given.call("kinds")])
        files = session.call("compare", files=older, noted={}, kinds=kinds)
        frames = given.send(str(source), terms={"known": files})
        session.receive(frames, path=str(tmp_path / "made"), source="xyz")
    assert (tmp_path / "made").read_bytes() == source.read_bytes()
    assert parts(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 65536, 20 * MIB + 5])
def test_notes_say_what_the_file_has(tmp_path: Path, size: int) -> None:
    written(tmp_path / "image", size)
    list(stream.give(str(tmp_path / "image"), terms={"note": {"": str(tmp_path / "notes")}}))
    with open(tmp_path / "image", "rb") as file:
        noted = blocks.noted(file.fileno(), str(tmp_path / "notes"))
    assert noted
    own = described(tmp_path / "image", str(noted["kind"]))
    true, found = (base64.b64decode(str(kept["digests"])) for kept in (own, noted))
    assert (tmp_path / "notes").stat().st_mode & 0o777 == 0o600  # it may have a key
    pairs = [(true[at : at + 16], found[at : at + 16]) for at in range(0, len(true), 16)]
    assert all(mine == theirs or theirs == b"\xff" * 16 for mine, theirs in pairs) and len(true) == len(found)
    assert sum(theirs == b"\xff" * 16 for _, theirs in pairs) <= 2
    os.utime(tmp_path / "image", (1, 1))
    with open(tmp_path / "image", "rb") as file:
        assert blocks.noted(file.fileno(), str(tmp_path / "notes")) is None
