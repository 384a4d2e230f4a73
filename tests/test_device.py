"""Block devices that get an image, or give one: loop devices of both sector sizes, here and on a host."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Hosts, eventually

from madrigal.errors import BadImage, InUse, MadrigalError, NoSpace, NotFound, NotSupported, UsageError
from madrigal.host import Host
from madrigal.host.local import LocalSession
from madrigal.location import Location
from madrigal.onhost import device, stream, survey
from madrigal.onhost.session import Session
from madrigal.transfer import by_hand, carry, plan

KIB, MIB = 1 << 10, 1 << 20
STALE = b"\xaa"
BEGUN = survey.BEGUN.ljust(MIB, b"\0")
"""What a device begins with that is not complete."""

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="loop devices need root")


class Loop:
    """A loop device over a file, full of what it was used for before."""

    def __init__(self, backing: Path, size: int, sector: int) -> None:
        self.backing, self.size = backing, size
        backing.write_bytes(STALE * size)
        argv = ["losetup", "--find", "--show", "--sector-size", str(sector), str(backing)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.path = done.stdout.strip()

    def content(self) -> bytes:
        """What is really there, not what a cache believes."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            fcntl.ioctl(file, 0x1261)  # BLKFLSBUF
            found = file.read()
        assert found == self.backing.read_bytes()
        return found

    def close(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    made: list[Loop] = []

    def make(size: int = 32 * MIB, sector: int = 512) -> Loop:
        made.append(Loop(tmp_path / f"backing{len(made)}", size, sector))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture(params=[512, 4096])
def loop(request: pytest.FixtureRequest, loops: Callable[..., Loop]) -> Loop:
    return loops(sector=request.param)


def image(path: Path, end: int = 20 * MIB + 300) -> bytes:
    """A sparse file with data where zeros are made in every way: beside pages, and with gaps small and large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for offset, data in ((0, b"boot"), (3 * MIB + 512, os.urandom(70 * KIB)), (9 * MIB, os.urandom(2 * MIB))):
            file.seek(offset)
            file.write(data)
        file.seek(12 * MIB)
        file.write(bytes(4 * MIB))  # zeros that are allocated
        file.truncate(end)
    return path.read_bytes()


@pytest.fixture(params=["here", "host01"])
def origin(request: pytest.FixtureRequest, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> str:
    """The machine that has the image; this one has the device."""
    for name in ("ONE_LOCATION", "MADRIGAL_SSH_CONFIG", "MADRIGAL_RUN_DIR"):
        monkeypatch.setenv(name, hosts.env[name])
    return "" if request.param == "here" else str(request.param)


def at(hosts: Hosts, origin: str, datastore: str, name: str = "image") -> tuple[Path, Location]:
    path = f"{datastore}/{name}"
    return (hosts.on(origin, path) if origin else Path(path)), Location(origin, path)


def test_nothing_of_what_was_there_shows_through(hosts: Hosts, origin: str, datastore: str, loop: Loop) -> None:
    path, source = at(hosts, origin, datastore)
    content = image(path)
    by_hand.copy(source, Location("", loop.path), replace=True)
    found = loop.content()
    assert found[: len(content)] == content
    assert found[len(content) :] == bytes(loop.size - len(content))


@pytest.mark.parametrize("bulk", [False, True])
def test_from_this_machine_to_a_host(
    hosts: Hosts, origin: str, datastore: str, loop: Loop, bulk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sees the devices of this machine; as much it has a connection of its own, and one only."""
    if bulk:
        monkeypatch.setattr(carry, "BULK", MIB)
    path, source = at(hosts, origin, datastore)
    content = image(path, 32 * MIB)
    assert by_hand.copy(source, Location("host02", loop.path), replace=True).endswith("bytes streamed")
    assert loop.content() == content


def test_what_reads_as_zeros_already_is_not_zeroed(
    hosts: Hosts, origin: str, datastore: str, loops: Callable[..., Loop]
) -> None:
    path, source = at(hosts, origin, datastore)
    content = image(path)
    loop = loops()
    with open(loop.path, "r+b") as file:
        file.write(bytes(2 * MIB))
    by_hand.copy(source, Location("", loop.path), reads_zeros=True)
    found = loop.content()
    assert found[: 2 * MIB] == content[: 2 * MIB] and found[9 * MIB : 11 * MIB] == content[9 * MIB : 11 * MIB]
    assert found[12 * MIB : 20 * MIB] == STALE * (8 * MIB)  # the caller was wrong, which shows what was left out
    with pytest.raises(BadImage, match="should read as zeros, and does not"):
        by_hand.copy(source, Location("", loop.path), reads_zeros=True)


def test_device_that_is_too_small(hosts: Hosts, origin: str, datastore: str, loops: Callable[..., Loop]) -> None:
    path, source = at(hosts, origin, datastore)
    image(path)
    loop = loops(20 * MIB)
    with pytest.raises(NoSpace, match=f"device {loop.path} has 20971520 bytes, and the image 20971820"):
        by_hand.copy(source, Location("", loop.path), replace=True)
    assert loop.content() == STALE * loop.size


def test_device_that_has_something_on_it_is_asked_for(
    hosts: Hosts, origin: str, datastore: str, loops: Callable[..., Loop]
) -> None:
    path, source = at(hosts, origin, datastore)
    image(path)
    loop = loops()
    with pytest.raises(InUse, match="has something on it; --replace"):
        by_hand.copy(source, Location("", loop.path))
    assert loop.content() == STALE * loop.size


def test_device_that_is_used(
    hosts: Hosts, origin: str, datastore: str, loops: Callable[..., Loop], tmp_path: Path
) -> None:
    path, source = at(hosts, origin, datastore)
    image(path)
    loop = loops(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", loop.path], check=True)
    before = loop.content()
    fd = os.open(loop.path, os.O_RDONLY | os.O_EXCL)  # as a mount has it
    try:
        with pytest.raises(InUse, match="it is mounted, or a part of another device"):
            by_hand.copy(source, Location("", loop.path), replace=True)
        with LocalSession() as session, pytest.raises(InUse, match="it is mounted"):
            session.receive(stream.give(str(path)), path=loop.path, device={"reads_zeros": False})
        with pytest.raises(InUse, match="it is mounted"):
            by_hand.copy(Location("", loop.path), Location("", str(tmp_path / "copy")))
    finally:
        os.close(fd)
    assert loop.content() == before


def test_a_directory_is_no_image(
    hosts: Hosts, origin: str, datastore: str, loops: Callable[..., Loop], tmp_path: Path
) -> None:
    path, source = at(hosts, origin, datastore, "directory")
    path.mkdir(parents=True)
    loop = loops()
    with pytest.raises(BadImage, match="is a directory, and the other is not"):
        by_hand.copy(source, Location("", loop.path), replace=True)
    with LocalSession() as session, pytest.raises(NotSupported, match="an image and no directory"):
        session.receive(stream.give(str(tmp_path)), path=loop.path, device={"reads_zeros": False})
    assert loop.content() == STALE * loop.size


# -- failures ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def frames(path: Path, count: int) -> Iterator[Any]:
    """COUNT frames, and then the end of everything."""
    for number, frame in enumerate(stream.give(str(path))):
        if number == count:
            raise Broken
        yield frame


@pytest.mark.parametrize("machine", ["", "host01"])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_what_failed_looks_like_nothing(
    hosts: Hosts, env: dict[str, str], loops: Callable[..., Loop], tmp_path: Path, machine: str, count: int
) -> None:
    image(tmp_path / "image")
    loop = loops()
    with pytest.raises((Broken, MadrigalError)), Host(machine).session() as session:
        session.receive(frames(tmp_path / "image", count), path=loop.path, device={"reads_zeros": False})
    assert eventually(lambda: not machine or not hosts.workers(machine))
    assert loop.content()[:MIB] == BEGUN


def test_what_was_interrupted_is_done_again(
    hosts: Hosts, env: dict[str, str], loops: Callable[..., Loop], tmp_path: Path
) -> None:
    """It is known for what it is, and not for a device that reads as zeros, though it was one."""
    content = image(tmp_path / "image", 32 * MIB)
    loop = loops()
    with open(loop.path, "r+b") as file:
        file.write(bytes(loop.size))
    with pytest.raises(Broken), LocalSession() as session:
        session.receive(frames(tmp_path / "image", 5), path=loop.path, device={"reads_zeros": True})
    assert loop.content()[:MIB] == BEGUN
    with pytest.raises(BadImage, match="should read as zeros, and does not"):
        by_hand.copy(Location("", str(tmp_path / "image")), Location("", loop.path), reads_zeros=True)
    by_hand.copy(Location("", str(tmp_path / "image")), Location("", loop.path))
    assert loop.content() == content


def test_what_was_damaged_is_sent_again(
    hosts: Hosts, env: dict[str, str], loops: Callable[..., Loop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "image", 32 * MIB)
    loop, wrong = loops(), [True]
    with open(loop.path, "r+b") as file:
        file.write(bytes(loop.size))
    send = LocalSession.send

    def damaging(session: LocalSession, path: str, **state: Any) -> Iterator[Any]:
        for kind, offset, payload in send(session, path, **state):
            is_hit = kind == b"D" and offset > 8 * MIB and wrong.pop() if wrong else False
            yield kind, offset, bytes(len(payload)) if is_hit else payload

    monkeypatch.setattr(LocalSession, "send", damaging)
    monkeypatch.setattr(by_hand, "_sees", lambda *_: False)
    by_hand.copy(Location("", str(tmp_path / "image")), Location("host01", loop.path), reads_zeros=True)
    assert not wrong and loop.content() == (tmp_path / "image").read_bytes()


def test_failure_after_it_was_there(loops: Callable[..., Loop], tmp_path: Path) -> None:
    image(tmp_path / "image")
    loop = loops()
    session = LocalSession()
    session.receive(stream.give(str(tmp_path / "image")), path=loop.path, device={"reads_zeros": False})
    assert loop.content()[:4] == b"boot"
    session.fail()
    assert loop.content()[:MIB] == BEGUN


def test_worker_that_is_killed(hosts: Hosts, env: dict[str, str], loops: Callable[..., Loop], tmp_path: Path) -> None:
    image(tmp_path / "image")
    loop = loops()

    def killing() -> Iterator[Any]:
        for number, frame in enumerate(stream.give(str(tmp_path / "image"))):
            if number == 4:
                assert eventually(lambda: loop.backing.read_bytes()[:MIB] == BEGUN)
                for pid in hosts.workers("host01"):
                    os.kill(pid, signal.SIGKILL)
            yield frame

    with pytest.raises(MadrigalError), Host("host01").session() as session:
        session.receive(killing(), path=loop.path, device={"reads_zeros": False})
        session.done()
    assert loop.content()[:MIB] == BEGUN


# -- zeros -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["punch", "zero_out", "written"])
@pytest.mark.parametrize(("start", "end"), [(0, 32 * MIB), (1, 2), (4095, 4097), (511, 3 * MIB + 1), (5000, 9000)])
def test_zeros(loop: Loop, way: str, start: int, end: int) -> None:
    fd = os.open(loop.path, os.O_RDWR | os.O_EXCL)
    try:
        zeros = device.Zeros(fd)
        zeros._ways = {"punch": zeros._ways[:1], "zero_out": zeros._ways[1:], "written": []}[way]
        count = len(zeros._ways)
        os.pwrite(fd, b"\xbb" * (64 * KIB), 0)  # which is in the page cache alone
        zeros.make(start, end)
        assert len(zeros._ways) == count, "the device cannot do what it should show"
    finally:
        os.close(fd)
    found = loop.content()
    expected = bytearray(b"\xbb" * (64 * KIB) + STALE * (loop.size - 64 * KIB))
    expected[start:end] = bytes(end - start)
    assert found == expected


def test_a_device_that_cannot_is_written_to(loops: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    loop = loops()
    fd = os.open(loop.path, os.O_RDWR | os.O_EXCL)
    try:
        zeros = device.Zeros(fd)
        zeros._ways = [cannot, cannot]
        zeros.make(MIB, 2 * MIB)
        zeros.make(2 * MIB + 1, 3 * MIB)
    finally:
        os.close(fd)
    expected = bytearray(STALE * loop.size)
    expected[MIB : 3 * MIB] = bytes(2 * MIB)
    expected[2 * MIB] = STALE[0]
    assert loop.content() == expected


def test_large_gaps_are_zeroed_when_nobody_waits(loops: Callable[..., Loop], tmp_path: Path) -> None:
    """Who sends has to wait for what is made zeros on the way."""
    loop = loops(200 * MIB)
    with open(tmp_path / "image", "wb") as file:
        file.write(b"boot")
        file.seek(150 * MIB)
        file.write(b"end")
    waits = []
    session = Session({"lock": 10, "work": 10}, lambda **_: waits.append(1))
    session.receive(stream.give(str(tmp_path / "image")), loop.path, device={"reads_zeros": False})
    session.done()
    assert waits
    found = loop.content()
    assert found[:4] == b"boot" and found[150 * MIB : 150 * MIB + 3] == b"end"
    assert found.count(0) == len(found) - 7


# -- a device as the source ----------------------------------------------------------------------------------------


def test_from_a_device(hosts: Hosts, origin: str, datastore: str, loop: Loop) -> None:
    """Its zeros are not written: nothing is known of it but what it reads."""
    path, target = at(hosts, origin, datastore, "copy")
    path.parent.mkdir(parents=True)
    with open(loop.path, "r+b") as file:
        file.write(bytes(30 * MIB))
        file.seek(5 * MIB)
        file.write(b"data")
    by_hand.copy(Location("", loop.path), target)
    assert path.read_bytes() == loop.content()
    assert path.stat().st_blocks * 512 < 4 * MIB


@pytest.mark.parametrize("far", [False, True])
def test_from_a_device_over_a_connection_of_its_own(
    hosts: Hosts,
    env: dict[str, str],
    datastore: str,
    loops: Callable[..., Loop],
    monkeypatch: pytest.MonkeyPatch,
    far: bool,
) -> None:
    monkeypatch.setattr(carry, "BULK", MIB)
    monkeypatch.setitem(plan.COSTS, "window", (1 if far else 1 << 60, ""))
    loop = loops()
    with open(loop.path, "r+b") as file:
        file.write(os.urandom(20 * MIB))
    target = Location("host01", f"{datastore}/copy")
    hosts.on("host01", datastore).mkdir(parents=True)
    by_hand.copy(Location("", loop.path), target)
    assert hosts.on("host01", target.path).read_bytes() == loop.content()


def test_what_was_left_of_a_device_is_not_gone_on_with(
    hosts: Hosts, env: dict[str, str], datastore: str, loops: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can say whether it has been written to since."""
    monkeypatch.setattr(carry, "BULK", MIB)
    loop = loops()
    there = hosts.on("host01", datastore)
    there.mkdir(parents=True)
    (there / ".copy.stream.part").write_bytes(b"\xcc" * loop.size)
    by_hand.copy(Location("", loop.path), Location("host01", f"{datastore}/copy"))
    assert (there / "copy").read_bytes() == STALE * loop.size
    assert os.listdir(there) == ["copy"]


def test_from_device_to_device(loops: Callable[..., Loop]) -> None:
    source, target = loops(), loops(48 * MIB, 4096)
    with open(source.path, "r+b") as file:
        file.seek(3 * MIB)
        file.write(bytes(8 * MIB))
    assert by_hand.copy(Location("", source.path), Location("", target.path), replace=True) == "read"
    assert target.content() == source.content() + bytes(16 * MIB)
    with pytest.raises(UsageError, match="are one device"):
        by_hand.copy(Location("", source.path), Location("", source.path), replace=True)


def test_device_under_another_name(loops: Callable[..., Loop], tmp_path: Path) -> None:
    """As volumes have: what they are called is a link."""
    loop = loops()
    content = image(tmp_path / "image", loop.size)
    (tmp_path / "volume").symlink_to(loop.path)
    by_hand.copy(Location("", str(tmp_path / "image")), Location("", str(tmp_path / "volume")), replace=True)
    assert loop.content() == content and (tmp_path / "volume").is_symlink()


def test_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        by_hand.copy(Location("", "/dev/vg/none"), Location("", str(tmp_path / "copy")))
