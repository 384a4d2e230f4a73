"""How much memory the processes of an action take at most, on both ends.

The kernel keeps the highest resident size of every process; what is looked at again and again is which processes there
are, so that one which ends is missed by a moment at most.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Sequence

INTERVAL = 0.03


class Peak:
    """While it is open, the highest resident size of the processes below PIDS, and of those that mention WORD."""

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
            todo, seen = [*self._pids, *kept], set()
            while todo:
                pid = todo.pop()
                if pid in seen:
                    continue
                seen.add(pid)
                try:
                    todo += [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in _children(pid, task)]
                    self._look(pid)
                except (OSError, ValueError):
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


def _children(pid: int, task: str) -> list[str]:
    with open(f"/proc/{pid}/task/{task}/children") as file:
        return file.read().split()
