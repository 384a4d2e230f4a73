"""What happens to disks when something goes wrong on their way: a connection is cut, the action is killed, a disk is
full, a bit is wrong.  A disk has 160 MiB, which is much; of the points where something happens, of which each is at
random within its piece of the whole, `make test-long` takes every one with some way, `make thorough` the rest.

After each there is the right content or one clear error, nothing half-written under a final name, and the next try
succeeds and leaves nothing but what it should: no part, no lock, no process.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PATH,
    RIGS,
    TREE,
    Done,
    Hosts,
    Link,
    _cmdline,
    _environment,
    _mentioning,
    check_stderr,
    eventually,
    rig,
    run_action,
    start_action,
)
from dumps import front_end, vm_document

MIB = 1 << 20
DATA = 160 * MIB
HOLE = 40 * MIB
ROOM = 500
"""MiB that a machine has: for two disks, which a second try needs."""
VM = 17
POINTS = 20
MARK = bytes(range(1, 33))
"""What every MiB of a disk begins with."""


def make(path: Path) -> None:
    """A disk with DATA in two halves and a HOLE between them, and one at its end."""
    with open(path, "wb") as file:
        for number in range(DATA // MIB):
            if number == DATA // MIB // 2:
                file.seek(HOLE, os.SEEK_CUR)
            file.write(MARK + os.urandom(MIB - len(MARK)))
        file.truncate(DATA + 2 * HOLE)


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", "-s", one, other]).returncode == 0


@pytest.fixture(scope="module")
def contents() -> Iterator[list[Path]]:
    """What a disk may hold: two of them, and one that is much the same as the second."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        paths = [Path(directory, name) for name in ("one", "other", "near")]
        for path in paths[:2]:
            make(path)
        subprocess.run(["cp", *paths[1:]], check=True)
        with open(paths[2], "r+b") as file:
            for number in range(0, DATA // MIB, 10):
                file.seek(number * MIB + MIB // 2)
                file.write(os.urandom(MIB // 2))
        yield paths


class Lab:
    """A VM on host01, or on its way there, an image datastore, and no connection to any host yet."""

    def __init__(self, hosts: Hosts, contents: list[Path], work: Path) -> None:
        self.hosts, self.contents, self.work = hosts, contents, work
        self.system, self.images = f"{hosts.datastores}/0", Path(hosts.datastores, "1")
        self.vm = f"{self.system}/{VM}"
        self.run_dir = tempfile.mkdtemp(prefix="run", dir=hosts.work)
        self.bin = work / "bin"
        self.bin.mkdir()
        (self.bin / "ssh").symlink_to(RIGS / "flip-ssh")
        self.env = {
            **hosts.env,
            "MADRIGAL_TRANSPORT": "openssh",
            "MADRIGAL_RUN_DIR": self.run_dir,
            "MADRIGAL_STALL_TIMEOUT": "8",
        }
        mib = (DATA + 2 * HOLE) // MIB
        self.document = vm_document(VM, {0: {"SIZE": mib, "ORIGINAL_SIZE": mib, "FORMAT": "raw"}}, history=[0])

    def close(self) -> None:
        from madrigal.host import openssh

        with _environment(MADRIGAL_RUN_DIR=self.run_dir):
            openssh.disconnect()
        self.clear()
        kept = [" ".join(_cmdline(pid)) for pid in _mentioning(self.run_dir)]
        assert eventually(lambda: not _mentioning(self.run_dir), 10), f"did not end by itself: {kept}"

    def clear(self) -> None:
        for place in (Path(self.hosts.datastores), *(self.hosts.on(name) for name in self.hosts.names)):
            subprocess.run(["rm", "-rf", *place.iterdir()], check=True)

    def left(self) -> set[str]:
        """Every file on all machines, but the marker that a datastore is monitored."""
        found = set()
        for host in ("fe", *self.hosts.names):
            place = Path(self.hosts.datastores) if host == "fe" else self.hosts.on(host)
            found |= {f"{host}:{path.relative_to(place)}" for path in place.rglob("*") if not path.is_dir()}
        return {name for name in found if not name.endswith("/.monitor")}

    def processes(self) -> list[str]:
        """What still works on disks."""
        found = [f"{name}: a worker" for name in self.hosts.names if self.hosts.workers(name)]
        lines = [_cmdline(pid) for pid in _mentioning(self.hosts.ssh_config)]
        return found + [" ".join(line) for line in lines if "-N" not in line and line[:1] == ["ssh"]]


class Way:
    """An action that moves a disk, from a state that it makes."""

    action = ""
    linked: tuple[str, ...] = ("host01",)
    """The hosts over whose links the data goes."""
    last: frozenset[str]
    """What is there in the end."""
    sent = DATA
    """Bytes that pass at least."""
    direct = ""
    """MADRIGAL_DIRECT."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.old, self.new = lab.contents[:2]

    def prepare(self) -> None:
        raise NotImplementedError

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def whole(self) -> None:
        """Assert that nothing under a final name is half-written, and that the disk is somewhere."""
        raise NotImplementedError

    def check(self, done: Done) -> None:
        """Assert that it went well, or failed as it should."""
        message = check_stderr(done, self.action)
        assert done.status in range(256) and (not done.status or message), done
        self.whole()

    def finish(self) -> None:
        """Try again; assert that all is as after one clean run."""
        done = self.run()
        assert done.status == 0, done.stderr
        check_stderr(done, self.action)
        self.whole()
        assert self.lab.left() == self.last
        assert eventually(lambda: not self.lab.processes()), self.lab.processes()

    def run(self, **env: str) -> Done:
        with front_end(self.lab.work, self.lab.document) as asked:
            return run_action(self.action, *self.argv(), env={**self._env(asked), **env})

    @contextlib.contextmanager
    def begun(self) -> Iterator[subprocess.Popen[bytes]]:
        with front_end(self.lab.work, self.lab.document) as asked:
            with start_action(self.action, *self.argv(), env=self._env(asked)) as process:
                yield process

    def _env(self, asked: dict[str, str]) -> dict[str, str]:
        return {**self.lab.env, **asked, "MADRIGAL_DIRECT": self.direct}

    def argv(self) -> list[str]:
        return [*self.arguments(), str(VM), "0"]

    def put(self, content: Path, host: str, path: str) -> None:
        there = Path(path) if host == "fe" else self.lab.hosts.on(host, path)
        there.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", content, there], check=True)  # which keeps holes

    def on(self, host: str, path: str) -> Path:
        return self.lab.hosts.on(host, path)


class Clone(Way):
    action = "tm/ssh/clone"
    last = frozenset({"fe:1/image", f"host01:0/{VM}/disk.0"})

    def prepare(self) -> None:
        self.put(self.new, "fe", f"{self.lab.images}/image")

    def arguments(self) -> list[str]:
        return [f"fe:{self.lab.images}/image", f"host01:{self.lab.vm}/disk.0"]

    def whole(self) -> None:
        disk = self.on("host01", f"{self.lab.vm}/disk.0")
        assert not os.path.lexists(disk) or same(self.new, disk)


class Mv(Way):
    """Past the front-end."""

    action = "tm/ssh/mv"
    linked: tuple[str, ...] = ("host02",)
    last = frozenset({f"host02:0/{VM}/disk.0", f"host02:0/{VM}/deployment"})

    def prepare(self) -> None:
        self.put(self.new, "host01", f"{self.lab.vm}/disk.0")
        self.on("host01", f"{self.lab.vm}/deployment").write_text("small")

    def arguments(self) -> list[str]:
        return [f"host01:{self.lab.vm}", f"host02:{self.lab.vm}"]

    def whole(self) -> None:
        there = [host for host in ("host01", "host02") if os.path.lexists(self.on(host, self.lab.vm))]
        assert there
        for host in there:
            directory = self.on(host, self.lab.vm)
            assert same(self.new, directory / "disk.0"), host
            assert (directory / "deployment").read_text() == "small", host


class Through(Mv):
    linked = ("host01", "host02")
    direct = "no"


class Mvds(Way):
    action = "tm/ssh/mvds"
    last = frozenset({"fe:1/image", f"host01:0/{VM}/disk.0"})

    def prepare(self) -> None:
        self.put(self.old, "fe", f"{self.lab.images}/image")
        self.put(self.new, "host01", f"{self.lab.vm}/disk.0")

    def arguments(self) -> list[str]:
        return [f"host01:{self.lab.vm}/disk.0", f"fe:{self.lab.images}/image"]

    def whole(self) -> None:
        image, disk = self.lab.images / "image", self.on("host01", f"{self.lab.vm}/disk.0")
        if same(self.new, image):
            assert not disk.exists() or same(self.new, disk)
        else:
            assert same(self.old, image)
            assert same(self.new, disk)

    def finish(self) -> None:
        super().finish()
        assert same(self.new, self.lab.images / "image")
        assert os.readlink(self.on("host01", f"{self.lab.vm}/disk.0")) == f"{self.lab.images}/image"


class Delta(Mvds):
    """Where most is there already."""

    sent = DATA // 20 * 3 // 5  # not where the disk has its hole

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.old = lab.contents[2]


WAYS: dict[str, type[Way]] = {"clone": Clone, "mv": Mv, "through": Through, "mvds": Mvds, "delta": Delta}


def each(names: Sequence[str], points: Iterable[int]) -> Callable[[Any], Any]:
    """Run a test for each way of NAMES at each of POINTS: at each of these one of the ways is for every day."""
    found = []
    for number, point in enumerate(points):
        for name in names:
            mark = pytest.mark.long if name == names[number % len(names)] else pytest.mark.thorough
            found.append(pytest.param(name, point, marks=mark))
    return pytest.mark.parametrize(("way", "point"), found, indirect=["way"])


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """In memory: the disks of this machine are not on trial."""
    yield from rig(where="/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", size=f"{ROOM}m")


@pytest.fixture
def lab(hosts: Hosts, contents: list[Path], tmp_path: Path) -> Iterator[Lab]:
    made = Lab(hosts, contents, tmp_path)
    yield made
    made.close()


@pytest.fixture
def way(lab: Lab, request: pytest.FixtureRequest) -> Way:
    made = WAYS[str(request.param)](lab)
    made.prepare()
    return made


def somewhere(point: int, least: float, most: float) -> float:
    """At random, in the POINT-th of POINTS equal pieces: all of it is tried."""
    return least + (most - least) * (point + random.random()) / POINTS


# -- cut -------------------------------------------------------------------------------------------------------


@each([*WAYS], range(POINTS))
def test_a_connection_is_cut(way: Way, point: int) -> None:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(way.lab.hosts.link(name)) for name in way.linked]
        at = int(somewhere(point, 0, way.sent + MIB))
        links[point % len(links)].cut_after(at)
        done = way.run()
        if at < way.sent:
            assert links[point % len(links)].count()["cuts"] == 1, at
        way.check(done)
        if done.status:
            assert done.status == 10, done
        way.finish()


# -- kill ------------------------------------------------------------------------------------------------------

_seconds: dict[type[Way], float] = {}


def seconds(way: Way) -> float:
    """How long it takes if nothing happens to it."""
    if type(way) not in _seconds:
        began = time.monotonic()
        way.finish()
        _seconds[type(way)] = time.monotonic() - began
        way.lab.clear()
        way.prepare()
    return _seconds[type(way)]


@each([*WAYS], range(POINTS))
def test_an_action_is_killed(way: Way, point: int) -> None:
    after = somewhere(point, 0, seconds(way))
    with way.begun() as process:
        time.sleep(after)
        process.kill()
        process.communicate()
    way.whole()
    way.finish()


# -- full ------------------------------------------------------------------------------------------------------


def ballast(directory: Path, leave: int, name: str = "ballast") -> Path:
    """A file that leaves no more than so many bytes of a file system free, which somebody else may be filling too."""
    path = directory / name
    with open(path, "wb") as file, contextlib.suppress(OSError):
        while free(directory) > leave:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), 4 * MIB)
    return path


def free(directory: Path) -> int:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize


def fill_when_begun(directory: Path, running: Callable[[], bool]) -> Path:
    """As ballast, when a fifth of a disk has arrived; what is left is too little for it."""
    before = free(directory)
    assert eventually(lambda: free(directory) < before - DATA // 5 or not running()) and running()
    return ballast(directory, 10 * MIB)


def nearly_full(directory: Path) -> Path:
    """As ballast, with just enough for a disk, so that the rest is filled before that is there."""
    return ballast(directory, DATA + 8 * MIB, "before")


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("name", ["clone", "mv", "through"])
def test_a_host_is_full(lab: Lab, name: str, when: str) -> None:
    way = WAYS[name](lab)
    way.prepare()
    place = lab.hosts.on("host01" if name == "clone" else "host02")
    filled = [nearly_full(place) if when == "meanwhile" else ballast(place, 50 * MIB)]
    with way.begun() as process:
        if when == "meanwhile":
            filled.append(fill_when_begun(place, lambda: process.poll() is None))
        stdout, stderr = process.communicate(timeout=60)
    done = Done(process.returncode, stdout.decode(), stderr.decode())
    way.check(done)
    assert done.status == 12, done
    for file in filled:
        file.unlink()
    way.finish()


FULL = """
mount -t tmpfs -o size="$ROOM"m tmpfs "$1" || exit 99
user=$2; shift 2
[ "$user" = 0 ] || unshare="unshare --user --map-user=$user --map-group=$user"
echo mounted
while read -r _; do $unshare "$@" >"$OUT" 2>"$ERR"; echo $?; done
"""


class Full(Mvds):
    """mvds, of which the datastore is a small file system that this action alone has."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        lab.images.mkdir(parents=True)
        spaces = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
        inner = ["sh", "-c", FULL, "sh", str(lab.images), str(os.getuid()), f"{TREE}/{self.action}", *self.argv()]
        self._asked = front_end(lab.work, lab.document)
        self._files = lab.work / "out", lab.work / "err"
        env = {**lab.env, **self._asked.__enter__(), "OUT": str(self._files[0]), "ERR": str(self._files[1])}
        env["ROOM"] = str(ROOM)
        env["PATH"] += ":/usr/sbin:/sbin"
        self.shell = subprocess.Popen(spaces + inner, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/")
        assert self._line() == "mounted"
        self.images = Path(f"/proc/{self.shell.pid}/root{lab.images}")

    def _line(self) -> str:
        assert self.shell.stdout
        return self.shell.stdout.readline().decode().strip()

    def start(self) -> None:
        assert self.shell.stdin
        self.shell.stdin.write(b"go\n")
        self.shell.stdin.flush()

    def end(self) -> Done:
        status = int(self._line())
        return Done(status, self._files[0].read_text(), self._files[1].read_text())

    def run(self, **env: str) -> Done:
        self.start()
        return self.end()

    def close(self) -> None:
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.close()
        self.shell.wait()
        self.shell.stdout.close()
        self._asked.__exit__(None, None, None)


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_the_front_end_is_full(lab: Lab, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Full(lab)
    try:
        monkeypatch.setattr(lab, "images", way.images)  # as this machine sees it
        way.prepare()
        filled = [nearly_full(way.images) if when == "meanwhile" else ballast(way.images, 50 * MIB)]
        way.start()
        if when == "meanwhile":
            filled.append(fill_when_begun(way.images, lambda: way.shell.poll() is None))
        done = way.end()
        way.check(done)
        assert done.status == 12, done
        for file in filled:
            file.unlink()
        assert way.run().status == 0
        assert same(way.new, way.images / "image")
        assert os.listdir(way.images) == ["image"]
        assert eventually(lambda: not lab.processes())
    finally:
        way.close()


# -- damage ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flip(lab: Lab, what: str) -> Iterator[dict[str, str]]:
    """The variables with which the ssh of this machine does WHAT (tests/rigs/flip-ssh)."""
    (lab.bin / "flip").write_text(what)
    yield {"PATH": f"{lab.bin}:{PATH}"}
    (lab.bin / "flip").unlink(missing_ok=True)


def damaged(way: Way, what: str) -> None:
    with flip(way.lab, what) as env:
        done = way.run(**env)
    way.check(done)
    assert (way.lab.bin / "flipped").exists(), what
    way.finish()


@each(["clone", "through", "mvds"], range(0, POINTS, 3))
def test_a_bit_is_wrong(way: Way, point: int) -> None:
    """In what is sent after the first MiB, which has the program that is run on a host."""
    back = isinstance(way, Mvds) or (isinstance(way, Mv) and point % 2)
    damaged(way, f"{'back' if back else 'forth'} {int(somewhere(point, MIB, DATA / 4))}")


DISTANCES = [
    pytest.param(distance, marks=pytest.mark.thorough if distance % 4 else pytest.mark.long)
    for distance in range(1, 25)
]


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_bit_is_wrong_before_data(lab: Lab, distance: int) -> None:
    """Where a protocol says where the data belongs and how long it is."""
    way = Clone(lab)
    way.prepare()
    damaged(way, f"forth {MARK.hex()} {distance}")


# -- again -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("changed", ["content", "size"])
def test_the_source_changes_between_two_tries(lab: Lab, changed: str) -> None:
    way = Clone(lab)
    way.prepare()
    image = lab.images / "image"
    with lab.hosts.link("host01") as link:
        link.cut_after(DATA // 2)
        way.check(done := way.run())
        assert done.status == 10, done
        wanted = lab.work / "wanted"
        if changed == "content":
            subprocess.run(["cp", lab.contents[0], image], check=True)
        else:
            os.truncate(image, DATA // 3)
        subprocess.run(["cp", image, wanted], check=True)
        way.new = wanted
        way.finish()


@pytest.mark.long
@pytest.mark.parametrize("how", ["cut", "kill"])
@pytest.mark.parametrize("way", ["clone", "mv", "through", "mvds"], indirect=True)
def test_a_retry_sends_only_what_is_missing(way: Way, how: str) -> None:
    """Both tries together send little more than the disk once: counted by the links, whatever the program says."""
    with contextlib.ExitStack() as stack:
        links: list[Link] = [stack.enter_context(way.lab.hosts.link(name)) for name in way.linked]
        sent = 0
        if how == "cut":
            links[-1].cut_after(DATA * 2 // 3)
            assert way.run().status == 10
        else:
            with way.begun() as process:
                while sent < DATA * 2 // 3 and process.poll() is None:
                    time.sleep(0.01)
                    sent += _most(links[-1])
                process.send_signal(signal.SIGKILL)
                process.communicate()
        sent += _most(links[-1])
        way.whole()
        way.finish()
        again = _most(links[-1])
        assert sent > DATA // 2
        assert again < DATA - sent + 48 * MIB, f"{sent >> 20} MiB and then {again >> 20} MiB"


def _most(link: Link) -> int:
    said = link.count()
    return max(said["forth"], said["back"])
