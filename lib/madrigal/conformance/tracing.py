"""Kill points by system call: a signal before the n-th rename, link, unlink, flush, ... of a process.

By strace, so that no driver has to know of it.  What a kill leaves is what is on disks, and these calls are all that
changes what a crash leaves there: between two of them it does not matter when.  That a driver's undo is registered
before or after one is covered by that.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from madrigal.conformance.machines import BrokenRig, Machines

NAMES = ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat")
"""What gives and takes names."""
CALLS = (
    *NAMES,
    *("mkdir", "mkdirat", "rmdir", "truncate", "ftruncate", "fallocate", "fsync", "fdatasync"),
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat", "copy_file_range", "sendfile"),
)
_SET = ",".join(f"?{name}" for name in CALLS)  # those that the architecture has
_LINE = re.compile(r"(\d+) +(?:(\w+)\(|\+\+\+ killed by SIG(\w+)|--- SIG(\w+) )")
FE, HOSTS = "the front-end", "the hosts"


@dataclass(frozen=True)
class Point:
    """The NUMBER-th CALL of a process on PLACE."""

    place: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"before {self.call} {self.number} of a process on {self.place}"


@functools.cache
def missing() -> str:
    """Why it is not to be had here; "" if it is."""
    if not shutil.which("strace"):
        return "kill points by system call need strace, which is not installed"
    done = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True)
    return f"strace does not work here: {done.stderr.strip()[:200]}" if done.returncode else ""


class Tracing:
    """From entering to leaving, the machines are traced, and with POINT one process gets SIGNAL there.

    `under` are the words that an action on the front-end has to be started with.
    """

    def __init__(self, machines: Machines, point: Point | None = None, signal: str = "KILL") -> None:
        self._machines, self._point, self._signal = machines, point, signal
        self._work = tempfile.mkdtemp(dir=machines.work)
        self.under = self._words(FE, f"{self._work}/{FE}")
        if not point or point.place != FE:
            self.under.append("--seccomp-bpf")  # cheaper, but strace 6.1 can send no signal from where that stops
        self._hosts: subprocess.Popen[bytes] | None = None

    def _words(self, place: str, file: str) -> list[str]:
        words = ["strace", "-f", "-o", file, "-s", "200", "-e", f"trace={_SET}"]
        if self._point and self._point.place == place:
            words += ["-e", f"inject={self._point.call}:signal={self._signal}:when={self._point.number}"]
        return words

    def __enter__(self) -> Tracing:
        pids = [str(pid) for machine in self._machines.hosts for pid in sorted(machine.pids())]
        said = f"{self._work}/said"
        with open(said, "wb") as file:
            argv = [*self._words(HOSTS, f"{self._work}/{HOSTS}"), *(word for pid in pids for word in ("-p", pid))]
            self._hosts = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=file)
        end = time.monotonic() + 20
        while open(said).read().count("ttach") < len(pids):  # attached, or that one has just ended
            if self._hosts.poll() is not None or time.monotonic() > end:
                raise BrokenRig(f"strace does not attach to the hosts' processes: {open(said).read()[-300:]}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hosts:
            self._hosts.terminate()
            self._hosts.wait()
        self._lines = {place: self._read(f"{self._work}/{place}") for place in (FE, HOSTS)}
        shutil.rmtree(self._work, ignore_errors=True)

    @staticmethod
    def _read(path: str) -> list[str]:
        try:
            with open(path, errors="replace") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    def points(self) -> list[Point]:
        """Where processes could be ended, in what was traced."""
        found = []
        for place, lines in self._lines.items():
            calls: dict[str, Counter[str]] = defaultdict(Counter)
            for line in lines:
                if (read := _LINE.match(line)) and read[2]:
                    calls[read[2]][read[1]] += 1
            for call, by_process in calls.items():
                found += [Point(place, call, number + 1) for number in range(max(by_process.values()))]
        return found

    def reached(self) -> str:
        """The call before which a process was ended; "" if none was."""
        assert self._point
        last: dict[str, str] = {}
        for line in self._lines[self._point.place]:
            if not (read := _LINE.match(line)):
                continue
            if read[2]:
                last[read[1]] = line.partition(" ")[2].strip()
            elif self._signal in (read[3], read[4]) and last.get(read[1], "").startswith(f"{self._point.call}("):
                return last[read[1]][:300]
        return ""
