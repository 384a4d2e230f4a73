"""What the processes of an action use, on both ends: memory at most, and CPU."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

INTERVAL = 0.03
_TICK = os.sysconf("SC_CLK_TCK")


def below(pids: Iterable[int]) -> set[int]:
    """PIDS and all that descend from them."""
    todo, found = list(pids), set()
    while todo:
        pid = todo.pop()
        if pid in found:
            continue
        found.add(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    todo += [int(child) for child in file.read().split()]
        except OSError:
            pass  # it has just ended
    return found


def cpu(hosts: Sequence[int]) -> float:
    """Seconds of CPU that our children which have ended have used, and all on the hosts whose first pids are HOSTS.

    What is about to end there is waited for: only then it counts.
    """
    end = time.monotonic() + 3
    now = below(hosts)
    while (before := now) and time.monotonic() < end:
        time.sleep(0.1)
        if (now := below(hosts)) == before:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for pid in now:
        try:
            with open(f"/proc/{pid}/stat") as file:
                ticks += sum(
                    map(int, file.read().rpartition(")")[2].split()[11:15])
                )  # its own, and of what it waited for
        except OSError:
            pass
    return used.ru_utime + used.ru_stime + ticks / _TICK


class Peak:
    """While it is open, the highest resident size of the processes below PIDS, and of ssh's that mention WORD.

    The kernel keeps the highest size of every process; what is looked at again and again is which processes there are,
    so that one which ends is missed by a moment at most.
    """

    def __init__(self, pids: Sequence[int], word: str) -> None:
        self.kib: dict[str, int] = defaultdict(int)
        """By program."""
        self._pids, self._word = pids, word.encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def mib(self) -> float:
        """Of the one that took most."""
        return max(self.kib.values(), default=0) / 1024

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        kept: list[int] = []
        rounds = 0
        while not self._over.wait(INTERVAL):
            if rounds % 10 == 0:  # connections that are kept are nobody's children
                kept = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._mentions(pid)]
            rounds += 1
            for pid in below([*self._pids, *kept]):
                try:
                    self._look(pid)
                except OSError:
                    pass  # it has just ended

    def _mentions(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read()
        except OSError:
            return False
        return words.startswith(b"ssh") and self._word in words

    def _look(self, pid: int) -> None:
        name, highest = "", 0
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("Name:"):
                    name = line.split()[1]
                elif line.startswith("VmHWM:"):
                    highest = int(line.split()[1])
        self.kib[name] = max(self.kib[name], highest)
