"""What there is on all machines before and after an action, and what differs: files, processes, mounts."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from madrigal.conformance.machines import Machines, OwnMachine, command_line

SETTLED = 6.0
"""Seconds that what an action started may take to end after it."""
_CONNECTION = re.compile(r"(.*/)?sshd\b|ssh: .*mux\]")


@dataclass(frozen=True)
class World:
    files: dict[str, list[object]]
    """`machine:path`; what is shared is the front-end's."""
    mounts: dict[str, str]

    def changes(self, later: World) -> list[str]:
        """`made|changed|removed machine:path`, sorted by path."""
        found = []
        for before, after, what in ((self.files, later.files, "made"), (self.mounts, later.mounts, "mounted")):
            for path in sorted({*before, *after}):
                if path not in before:
                    found.append(f"{what} {path}")
                elif path not in after:
                    found.append(f"un{what} {path}" if what == "mounted" else f"removed {path}")
                elif before[path] != after[path]:
                    found.append(f"changed {path}")
        return found


def look(machines: Machines) -> World:
    files: dict[str, list[object]] = {}
    mounts: dict[str, str] = {}
    but = [*machines.kept, f"{machines.work}/home/.ssh"]
    for key, machine in machines.machines.items():
        directories = list(machines.owned)
        if key == "fe":
            directories = [f"{machines.work}/one/var", f"{machines.work}/home"]
            directories += [] if machine.own else [machines.imports]
        if machine.own:
            directories.append("/tmp")
            text = Path(f"/proc/{machine.pid}/mountinfo").read_text() if isinstance(machine, OwnMachine) else ""
            mounts.update({f"{key}:{line.split()[4]}": "" for line in text.splitlines()})
        files.update({f"{key}:{path}": entry for path, entry in machine.scan(directories, but).items()})
    return World(files, mounts)


def unexpected(changes: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Those of CHANGES whose path matches none of ALLOWED, patterns of the shell."""
    return [
        one for one in changes if not any(fnmatch.fnmatchcase(one.split(" ", 1)[1], pattern) for pattern in allowed)
    ]


def is_connection(words: Sequence[str]) -> bool:
    """Whether a process is a server or a kept connection, which may stay."""
    if not words:
        return True  # it has just ended
    is_kept = words[0].rpartition("/")[2] == "ssh" and "-N" in words
    return is_kept or bool(_CONNECTION.match(" ".join(words)))


def running(machines: Machines, baseline: dict[str, set[int]]) -> list[str]:
    """`machine: command line` of what runs beyond BASELINE; kept connections do not count."""
    found = []
    for key, machine in machines.machines.items():
        for pid in machine.pids() - baseline.get(key, set()):
            words = command_line(pid)
            if words != [""] and words and not is_connection(words):
                found.append(f"{key}: {' '.join(words)[:200]}")
    return found


def still_running(machines: Machines, baseline: dict[str, set[int]]) -> list[str]:
    """The same, after waiting for what is about to end."""
    end = time.monotonic() + SETTLED
    while left := running(machines, baseline):
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return left
