"""See, while an action runs, whether a secret is in the arguments of a process that it starts.

Everybody on a machine can read those.  The secret is looked for as it is and as it looks within base64.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from madrigal.conformance.machines import Machines, command_line

PAUSE = 0.004
FRESH = 0.1


def forms(secret: str) -> list[str]:
    """SECRET, and what is always in the base64 of a text that has it, wherever it begins."""
    found = [secret]
    for before in range(3):
        packed = base64.b64encode(b"x" * before + secret.encode()).decode().rstrip("=")
        found.append(packed[4 if before else 0 : -2])
    return found


class Watch:
    """Looks from entering to leaving; `found` has the command lines, shortened.

    ACTION, its path and arguments, does not count: in 3.4 the front-end itself puts the dump there.
    """

    def __init__(self, machines: Machines, secrets: Sequence[str], action: Sequence[str]) -> None:
        self._spaces = {space for machine in machines.machines.values() if (space := machine.space)}
        # where the front-end is this machine itself, others work there too, perhaps other checks
        self._mark = b"" if machines.is_own else f"={machines.work}/".encode()
        self._action = list(action)
        self._secrets = [form for secret in secrets for form in forms(secret)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.found: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        since: dict[str, float] = {}
        while not self._over.is_set():
            now = time.monotonic()
            for name in os.listdir("/proc"):
                # a process becomes another program within its first moments
                if name.isdigit() and since.setdefault(name, now) > now - FRESH:
                    self._examine(name)
            self._over.wait(PAUSE)

    def _examine(self, pid: str) -> None:
        words = command_line(int(pid))
        if not any(secret in word for word in words for secret in self._secrets):
            return
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") not in self._spaces:
                return
            if self._mark not in Path(f"/proc/{pid}/environ").read_bytes():
                return
        except OSError:
            return
        own = words[words.index(self._action[0]) :] if self._action[0] in words else words
        # of a process that is just becoming the action perhaps not all was read
        if "\0".join(self._action).startswith("\0".join(own)):
            return
        line = " ".join(words)
        if (short := f"{line[:160]}{'...' if len(line) > 160 else ''}") not in self.found:
            self.found.append(short)
