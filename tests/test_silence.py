"""A way that is lost without a word: what a host does who hears nothing any more, and who is heard all the same."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Done, Hosts, Link, check_stderr, eventually, run_action, start_action
from test_host import forget
from test_session import MIB, Frame, an, complete
from test_worker import PYTHONS, Near, Pipes

from madrigal.errors import Busy, DeadlineExceeded, HostUnreachable
from madrigal.host import Host, remote
from madrigal.host.direct import DirectSession
from madrigal.host.remote import RemoteSession
from madrigal.onhost import stream

LIMIT = 2.0
"""Seconds of silence that a host bears in these tests."""
SOON = LIMIT + 4


class Way:
    """A way to each host that can be lost, with sessions there, and what is in a directory of host01's."""

    def __init__(self, hosts: Hosts, env: dict[str, str], directory: str, links: list[Link]) -> None:
        self.hosts, self.env, self.directory, self.links = hosts, env, directory, links
        self.vm, self.disk = f"{directory}/17", f"{directory}/17/disk.0"
        self._opened: list[RemoteSession] = []

    def session(self, bulk: bool = False) -> RemoteSession:
        made = RemoteSession(Host("host01"), bulk)
        self._opened.append(made)
        return made

    def holder(self) -> RemoteSession:
        """A session that holds the VM directory, which it has made."""
        made = self.session()
        made.call("hold", path=self.vm, make="all")
        return made

    def lose(self) -> None:
        """What goes over connections that are open never arrives, and they stay open; new ones are like any."""
        for link in self.links:
            link.tell("lose")

    def left(self) -> list[str]:
        top = self.hosts.on("host01", self.directory)
        return sorted(str(path.relative_to(top)) for path in top.rglob("*")) if top.exists() else []

    def is_given_up(self, within: float = SOON) -> bool:
        """Whether all workers end WITHIN so many seconds, and not at once, while the way is still lost."""
        began = time.monotonic()
        ended = eventually(lambda: not any(map(self.hosts.workers, self.hosts.names)), within)
        return ended and time.monotonic() - began > LIMIT / 2

    def close(self) -> None:
        for session in self._opened:
            if session._channel:
                session._channel.close()
        for link in self.links:
            link.tell("cut")
            link.close()


@pytest.fixture
def way(hosts: Hosts, cold: dict[str, str], datastore: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    values = {"SILENCE": f"{LIMIT:g}", "CONNECT": "2"}
    variables = {f"MADRIGAL_{name}_TIMEOUT": value for name, value in values.items()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget()
    made = Way(hosts, {**cold, **variables}, datastore, [hosts.link(name) for name in hosts.names])
    yield made
    made.close()
    forget()


@pytest.fixture
def slow(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """qemu-img on host01 takes as long as one lets it, and has a child that does so too."""
    program = Path(hosts.work, "hosts/host01/bin/qemu-img")
    program.write_text("#!/bin/sh\nsleep 1000 &\nsleep 1000\n")
    program.chmod(0o755)
    yield
    program.unlink()


# -- who is given up -------------------------------------------------------------------------------------------


def test_lost_between_two_requests(way: Way) -> None:
    """What was made goes, the lock is free, and who comes next over a new connection finds that."""
    way.holder().call("make", path=way.disk, format="raw", size=MIB)
    assert way.left() == [".17.lock", "17", "17/disk.0"]
    way.lose()
    assert way.is_given_up()
    assert way.left() == []
    with way.session(bulk=True) as again:
        again.call("hold", path=way.vm, make="all")


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_lost_while_a_program_works(way: Way, slow: None) -> None:
    """It and what it has started end with the worker."""
    session = way.holder()
    session.tell("make", path=way.disk, format="qcow2", size=MIB)

    def programs() -> list[int]:
        found = [(pid, Path(f"/proc/{pid}/cmdline")) for pid in way.hosts.pids("host01")]
        return [pid for pid, words in found if words.exists() and words.read_bytes().startswith(b"sleep")]

    assert eventually(lambda: len(programs()) == 2)
    way.lose()
    assert way.is_given_up()
    assert way.left() == [] and programs() == []


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_lost_while_a_copy_is_made(way: Way) -> None:
    session = way.holder()
    way.hosts.on("host01", f"{way.directory}/image").write_bytes(os.urandom(20 * MIB))
    session.tell("limit", rate=MIB)
    session.tell("copy", source=f"{way.directory}/image", path=way.disk)
    assert eventually(lambda: "17/.disk.0.copy.part" in way.left())
    way.lose()
    assert way.is_given_up()
    assert way.left() == ["image"]


def unending(begun: threading.Event) -> Iterator[Frame]:
    """Twenty MiB of a file, and nothing that would come after them."""
    yield an("", size=64 * MIB)
    for number in range(20):
        yield b"D", number * MIB, os.urandom(MIB)
    begun.set()
    time.sleep(10 * LIMIT)


@pytest.mark.parametrize("source", ["", "42"])
def test_lost_amid_what_the_host_receives(way: Way, source: str) -> None:
    """Of much a part stays, to be gone on with."""
    session, begun = way.holder(), threading.Event()

    def give() -> None:
        frames = (frame for frame in unending(begun))
        with pytest.raises((HostUnreachable, DeadlineExceeded, OSError)):
            session.receive(frames, path=way.disk, source=source)

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    assert begun.wait(20)
    there = way.hosts.on("host01", f"{way.vm}/.disk.0.stream{source}.part")
    assert eventually(lambda: there.exists() and there.stat().st_blocks * 512 >= 18 * MIB)
    way.lose()
    assert way.is_given_up()
    assert way.left() == (["17", "17/.disk.0.stream42.part"] if source else [])


@pytest.mark.parametrize("reads", [1, 40])
def test_lost_amid_what_the_host_sends(way: Way, reads: int) -> None:
    """It waits for room for more, which nobody makes."""
    session = way.holder()
    way.hosts.on("host01", way.disk).write_bytes(os.urandom(96 * MIB))
    frames = session.send(way.disk)
    for _ in range(reads):
        next(frames)
    way.lose()
    assert way.is_given_up()
    assert way.left() == ["17", "17/disk.0"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_lost_while_it_waits_for_a_lock(way: Way) -> None:
    way.hosts.on("host01", way.directory).mkdir()
    with open(way.hosts.on("host01", f"{way.directory}/.17.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        way.session().tell("hold", path=way.vm)
        assert eventually(lambda: way.hosts.workers("host01"))
        time.sleep(0.5)
        way.lose()
        assert way.is_given_up()


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
@pytest.mark.parametrize("which", ["host01", "host02", "both"])
def test_lost_amid_what_one_host_brings_another(way: Way, which: str) -> None:
    """Data still flow between the hosts, and nobody is there for whom they do."""
    given = way.holder()
    way.hosts.on("host01", way.disk).write_bytes(os.urandom(96 * MIB))
    session = DirectSession(Host("host02"), given)
    session.call("hold", path=way.vm, make="all")
    way.hosts.port("host02")  # what comes from the other host does not go over the link
    assert session.connects()
    given.tell("limit", rate=4 * MIB)
    session.tell("receive", directly=True, path=way.disk, source="42")
    given.tell("send", directly=True, path=way.disk)
    there = way.hosts.on("host02", f"{way.vm}/.disk.0.stream42.part")
    assert eventually(lambda: there.exists() and there.stat().st_blocks * 512 > 18 * MIB)
    for link, name in zip(way.links, way.hosts.names, strict=True):
        if which in (name, "both"):
            link.tell("lose")
    assert way.is_given_up(within=SOON + 4 * LIMIT)  # it looks each second, which at such a limit is seldom
    assert there.exists(), "what has arrived is not kept"
    assert way.left() == ["17", "17/disk.0"]
    assert session._channel
    session._channel.close()


def clone(way: Way, image: Path, **env: str) -> subprocess.Popen[bytes]:
    """One that has begun to bring IMAGE to host01, slowly."""
    image.write_bytes(os.urandom(24 * MIB))
    way.links[0].tell("rate 16000000")
    action = start_action("tm/ssh/clone", f"fe:{image}", f"host01:{way.disk}", env={**way.env, **env})
    assert eventually(lambda: "17/.disk.0.stream.part" in way.left())
    return action


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_the_next_run_after_the_front_end_has_lost_its_power(way: Way, tmp_path: Path) -> None:
    """It waits for the lock as long as it takes the host to notice; who may not wait so long hears who has it."""
    action = clone(way, tmp_path / "image", MADRIGAL_SILENCE_TIMEOUT=f"{4 * LIMIT:g}")
    worker = way.hosts.workers("host01")[0]
    way.lose()
    way.links[0].tell("rate 0")
    os.killpg(action.pid, signal.SIGKILL)
    action.communicate()
    again = "tm/ssh/clone", f"fe:{tmp_path}/image", f"host01:{way.disk}"
    done = run_action(*again, env={**way.env, "MADRIGAL_LOCK_TIMEOUT": "0.2"})
    text = check_stderr(done, "clone", marks=True)
    assert done.status == 11 and re.search(r"host01: .*/17 is being changed by process \d+ and did not", text), text
    assert worker in way.hosts.workers("host01")
    began = time.monotonic()
    done = run_action(*again, env=way.env)
    assert done.status == 0, done.stderr
    assert time.monotonic() - began < 3 * LIMIT + SOON
    assert way.hosts.on("host01", way.disk).read_bytes() == (tmp_path / "image").read_bytes()
    assert way.left() == ["17", "17/disk.0"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_an_action_that_stood_still(way: Way, tmp_path: Path) -> None:
    """For longer than hosts bear: it says so when it goes on, and ends."""
    action = clone(way, tmp_path / "image")
    action.send_signal(signal.SIGSTOP)
    assert way.is_given_up()
    assert way.left() == []
    action.send_signal(signal.SIGCONT)
    stdout, stderr = action.communicate(timeout=20)
    done = Done(action.returncode, stdout.decode(), stderr.decode())
    text = check_stderr(done, "clone", marks=True)
    assert done.status == 10 and text == "the connection to host01 broke: the front-end was not heard there for 2 s"


# -- who is not --------------------------------------------------------------------------------------------------


def test_one_that_idles_while_another_works(way: Way) -> None:
    """And while the front-end does something that nobody on a host hears of."""
    idle = way.holder()
    with way.session() as other:
        other.call("exists", path="/")
        end = time.monotonic() + 2 * LIMIT
        while time.monotonic() < end:
            sum(range(1 << 16))
    idle.call("make", path=way.disk, format="raw", size=MIB)
    idle.done()
    assert way.left() == ["17", "17/disk.0"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_a_stream_at_a_crawl(way: Way, tmp_path: Path) -> None:
    """A frame takes longer than the limit, in either direction."""
    content = os.urandom(2 * MIB)
    (tmp_path / "image").write_bytes(content)
    terms = {"rate": MIB / LIMIT / 1.5}
    with way.session() as session:
        session.call("hold", path=way.vm, make="all")
        session.receive(stream.give(str(tmp_path / "image"), terms=terms), path=way.disk)
    with way.session() as session:
        session.tell("limit", **terms)
        assert b"".join(bytes(data) for kind, _, data in session.send(way.disk) if kind == b"D") == content
    assert way.hosts.on("host01", way.disk).read_bytes() == content


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_a_stream_over_a_narrow_way(way: Way, tmp_path: Path) -> None:
    """One frame is on its way for longer than the limit."""
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    session = way.holder()
    way.links[0].tell(f"rate {MIB * 8 / LIMIT / 1.5:.0f}")
    session.receive(stream.give(str(tmp_path / "image")), path=way.disk)
    session.done()
    assert way.hosts.on("host01", way.disk).read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_work_that_takes_long(way: Way) -> None:
    session = way.holder()
    way.hosts.on("host01", f"{way.directory}/image").write_bytes(os.urandom(32 * MIB))
    session.tell("limit", rate=8 * MIB / LIMIT)
    session.tell("copy", source=f"{way.directory}/image", path=way.disk)
    session.done()
    assert way.left() == ["17", "17/disk.0", "image"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_one_who_waits_for_a_lock_with_all_pipes_full(way: Way, tmp_path: Path) -> None:
    """There is no room for anything to be heard, and when there is, all that was sent is in order."""
    (tmp_path / "image").write_bytes(os.urandom(24 * MIB))
    first, second = way.holder(), way.session()

    def bring() -> None:
        second._ready()
        second.tell("hold", path=way.vm, make="all")
        second.receive(stream.give(str(tmp_path / "image")), path=way.disk)
        second.done()

    thread = threading.Thread(target=bring)
    thread.start()
    time.sleep(2.5 * LIMIT)
    assert thread.is_alive() and len(way.hosts.workers("host01")) == 2
    first.done()
    thread.join(30)
    assert not thread.is_alive()
    assert way.hosts.on("host01", way.disk).read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_a_lock_is_waited_for_longer_than_a_stream_may_stand_still(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has data behind a lock that does not become free hears who has it, as anybody else."""
    (tmp_path / "image").write_bytes(os.urandom(24 * MIB))
    way.holder()
    monkeypatch.setenv("MADRIGAL_LOCK_TIMEOUT", "12")
    monkeypatch.setenv("MADRIGAL_STALL_TIMEOUT", "7")
    second = way.session()
    second.tell("hold", path=way.vm, make="all")
    with pytest.raises(Busy, match=r"host01: .*/17 is being changed by process \d+ and did not become free in 12 s"):
        second.receive(stream.give(str(tmp_path / "image")), path=way.disk)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_a_host_that_stood_still(way: Way) -> None:
    """What was said meanwhile is only now on its way: a worker that runs again before its sshd does waits for it."""
    idle = way.holder()
    pids = way.hosts.pids("host01")
    (worker,) = way.hosts.workers("host01")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    os.kill(worker, signal.SIGCONT)
    time.sleep(LIMIT / 4)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert idle.call("exists", path=way.vm)
    idle.done()


@pytest.mark.long
@pytest.mark.parametrize("transport", ["openssh"], indirect=True)
def test_data_from_host_to_host_at_a_crawl(way: Way) -> None:
    """Neither hears of the front-end but that it is there."""
    given = way.holder()
    content = os.urandom(4 * MIB)
    way.hosts.on("host01", way.disk).write_bytes(content)
    with DirectSession(Host("host02"), given) as session:
        assert session.connects()
        session.call("hold", path=way.vm, make="all")
        given.tell("limit", rate=MIB / LIMIT / 1.5)
        session.bring({"path": way.disk}, {"path": way.disk}, lambda count: None, lambda: None)
        assert given.call("exists", path=way.disk)
    given.done()
    assert way.hosts.on("host02", way.disk).read_bytes() == content


# -- the two ends, without ssh -------------------------------------------------------------------------------------


@pytest.fixture(params=list(PYTHONS), ids=list(PYTHONS.values()))
def near(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RemoteSession:
    monkeypatch.setenv("MADRIGAL_SILENCE_TIMEOUT", "1")
    return RemoteSession(Near(request.param), bulk=False)  # type: ignore[arg-type]


def test_every_python_hears_the_front_end(near: RemoteSession, tmp_path: Path) -> None:
    def crawling() -> Iterator[Frame]:
        yield an("", size=4)
        time.sleep(2)
        yield b"D", 0, b"data"
        time.sleep(2)
        yield complete(b"data")

    with near as session:
        session.call("hold", path=str(tmp_path / "17"), make="all")
        time.sleep(2)
        session.receive(crawling(), path=str(tmp_path / "17/disk.0"))
    assert (tmp_path / "17/disk.0").read_bytes() == b"data"


def test_every_python_gives_up(near: RemoteSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, for who is there after all."""
    monkeypatch.setattr(remote, "_BEATS", 0.01)
    silent = RemoteSession(near.host, bulk=False)
    silent.call("hold", path=str(tmp_path / "17"), make="all")
    time.sleep(2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        HostUnreachable, match=r"^the connection to near broke: the front-end was not heard there for 1 s$"
    ):
        silent.call("exists", path="/")
    near.done()


def test_a_beat_comes_between_and_not_within() -> None:
    """What was written in part, and will never be whole, is followed by nothing."""
    process = subprocess.Popen(["sleep", "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    reader = os.dup(os.open(f"/proc/{process.pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK))
    channel = Pipes(process)
    channel.beat(0.01)
    time.sleep(0.2)
    channel.write(1, b"whole\n")
    time.sleep(0.2)
    beats, _, more = os.read(reader, 1 << 20).partition(b"whole\n")
    assert len(beats) > 3 and len(more) > 3 and set(beats + more) == {ord("\n")}
    with pytest.raises(DeadlineExceeded):
        channel.write(0.1, b"x" * (8 << 20))
    time.sleep(0.1)
    assert set(os.read(reader, 4 << 20)) == {ord("x")}
    time.sleep(0.2)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    channel.close_stdin()
    process.kill()
    channel.close()


def test_no_lock_deadline_is_shorter_than_the_silence_that_it_waits_for() -> None:
    """So that, as it comes, the next run succeeds: its wait is as long as that of the host, and more."""
    from madrigal import deadline

    assert deadline.silence() + 30 <= deadline.lock() and deadline.silence() <= deadline.stall()
