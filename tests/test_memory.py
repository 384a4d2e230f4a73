"""How much memory the processes of a transfer take, on either machine and on every way: under 100 MiB each.

Images have 160 MiB of data, which is much, spread over 1 TiB, so that lists of their blocks are as long as they can be.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Hosts, eventually, start_action
from dumps import front_end, vm_document

pytestmark = pytest.mark.long

MIB = 1 << 20
MOST = 100 * MIB
DATA, SIZE = 160, 1 << 40


class Meter:
    """The most memory that each program has had while this ran: the actions, and what worked on hosts for them."""

    def __init__(self, hosts: Hosts, pids: Callable[[], list[int]]) -> None:
        self._hosts, self._pids = hosts, pids
        self._over = threading.Event()
        self.peak: dict[str, int] = {}

    def __enter__(self) -> Meter:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for pid in self._pids() + [pid for name in self._hosts.names for pid in self._hosts.pids(name)]:
                with contextlib.suppress(OSError, ValueError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                    name = " ".join(words[:4])[:60]
                    self.peak[name] = max(self.peak.get(name, 0), kib * 1024)


class Vm:
    """VM 17, whose disks are on host01, or are to be."""

    def __init__(self, hosts: Hosts, env: dict[str, str], datastore: str, work: Path) -> None:
        self.hosts, self.env, self.work, self.path = hosts, env, work, f"{datastore}/17"
        self.image = work / "image"
        disks = {number: {"SIZE": SIZE // MIB, "FORMAT": "raw", "SOURCE": str(self.image)} for number in range(4)}
        self.document = vm_document(17, disks)
        self.action: subprocess.Popen[bytes] | None = None
        self.peak: dict[str, int] = {}

    def on(self, host: str, name: str = "disk.0") -> Path:
        path = self.hosts.on(host, f"{self.path}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def begun(self, action: str, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        with front_end(self.work, self.document) as asked, Meter(self.hosts, self._pids) as meter:
            env = {**self.env, **asked, **more}
            with start_action(action, *arguments, "17", "1", env=env) as self.action:
                yield self.action
        for name, peak in meter.peak.items():
            self.peak[name] = max(self.peak.get(name, 0), peak)

    def _pids(self) -> list[int]:
        if self.action is None:
            return []
        children = Path(f"/proc/{self.action.pid}/task/{self.action.pid}/children")
        with contextlib.suppress(OSError):
            return [self.action.pid, *map(int, children.read_text().split())]
        return []

    def run(self, action: str, *arguments: str, **more: str) -> str:
        with self.begun(action, *arguments, **more) as process:
            stderr = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, stderr
        return stderr

    def kill_midway(self, action: str, *arguments: str, there: Path, **more: str) -> None:
        """Kill an action when much of what it makes is in the directory THERE."""
        with self.begun(action, *arguments, **more) as process:
            assert eventually(lambda: _allocated(there) > 60 * MIB or process.poll() is not None, 60)
            process.kill()
        assert process.returncode == -9
        assert eventually(lambda: not any(self.hosts.workers(name) for name in self.hosts.names))


def _allocated(directory: Path) -> int:
    found = [path for part in directory.glob(".*.part") for path in (part, *part.rglob("*"))]
    return sum(path.lstat().st_blocks for path in found) * 512


def fill(path: Path, mib: int = DATA, packs: bool = False) -> None:
    """As much data at PATH, from its beginning to its end."""
    with open(path, "wb") as file:
        for number in range(mib):
            file.seek(SIZE // mib * number // 4096 * 4096)
            file.write(b"%01023d\n" % number * 1024 if packs else os.urandom(MIB))
        file.truncate(SIZE)


def clone(vm: Vm, packs: bool = False, **more: str) -> str:
    fill(vm.image, packs=packs)
    return vm.run("tm/ssh/clone", f"fe:{vm.image}", f"host01:{vm.path}/disk.0", **more)


def packed(vm: Vm) -> str:
    with vm.hosts.link("host01", rate=160e6):
        return clone(vm, packs=True)


def lanes(vm: Vm) -> str:
    with vm.hosts.link("host01", delay=15):
        return clone(vm)


def resumed(vm: Vm) -> str:
    fill(vm.image)
    argv = "tm/ssh/clone", f"fe:{vm.image}", f"host01:{vm.path}/disk.0"
    vm.kill_midway(*argv, there=vm.on("host01").parent)
    said = vm.run(*argv)
    assert "going on with" in said
    return said


def again(vm: Vm) -> str:
    clone(vm)
    said = vm.run("tm/ssh/ln", f"fe:{vm.image}", f"host01:{vm.path}/disk.0")
    assert "not the same as in" in said
    return said


def moved(vm: Vm, **more: str) -> str:
    for number in range(4):
        fill(vm.on("host01", f"disk.{number}"), DATA // 4)
    argv = "tm/ssh/mv", f"host01:{vm.path}", f"host02:{vm.path}"
    vm.kill_midway(*argv, there=vm.hosts.on("host02", os.path.dirname(vm.path)), **more)
    said = vm.run(*argv, **more)
    assert "going on with" in said and ("directly" in said) == (not more)
    return said


def through(vm: Vm) -> str:
    return moved(vm, MADRIGAL_DIRECT="no")


def brought_back(vm: Vm) -> str:
    fill(vm.on("host01"))
    return vm.run("tm/ssh/mvds", f"host01:{vm.path}/disk.0", f"fe:{vm.image}")


def delta(vm: Vm) -> str:
    fill(vm.image)
    subprocess.run(["cp", "--sparse=always", vm.image, vm.on("host01")], check=True)
    with open(vm.on("host01"), "r+b") as file:
        file.write(os.urandom(9 * MIB))
    said = vm.run("tm/ssh/mvds", f"host01:{vm.path}/disk.0", f"fe:{vm.image}")
    assert "not the same as in" in said
    return said


def digests(vm: Vm) -> str:
    return clone(vm, MADRIGAL_VERIFY="digest")


def saved(vm: Vm) -> str:
    fill(vm.image)
    subprocess.run(["cp", "--sparse=always", vm.image, vm.on("host01")], check=True)
    return vm.run("tm/ssh/cpds", f"host01:{vm.path}/disk.0", f"fe:{vm.work}/new", "-1")


WAYS = [clone, digests, packed, lanes, resumed, again, moved, through, brought_back, delta, saved]
CASES = [("openssh", way) for way in WAYS] + [("paramiko", way) for way in (clone, lanes, resumed, delta)]


@pytest.mark.parametrize(
    ("transport", "way"), CASES, indirect=["transport"], ids=lambda what: getattr(what, "__name__", what)
)
def test_no_process_takes_more(
    hosts: Hosts, cold: dict[str, str], datastore: str, tmp_path: Path, way: Callable[[Vm], str]
) -> None:
    vm = Vm(hosts, cold, datastore, tmp_path)
    said = way(vm)
    assert "streamed" in said
    assert any("python" in name and peak > 5 * MIB for name, peak in vm.peak.items()), "nothing was measured"
    largest = max(vm.peak, key=lambda name: vm.peak[name])
    assert vm.peak[largest] < MOST, f"{largest}: {vm.peak[largest] >> 20} MiB; {said}"
