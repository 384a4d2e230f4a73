"""What people see while driver actions run: a moving line on a terminal, a line per action without one."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

from madrigal.embedded import Call, Observer, Outcome
from madrigal.transfer.progress import size

_FRAMES = "|/-\\"


class Progress(Observer):
    """Writes to stderr, so that stdout is the answer alone.  QUIET: only what goes wrong, unless VERBOSE."""

    def __init__(self, verbose: bool, quiet: bool) -> None:
        self._verbose = verbose
        self._quiet = quiet and not verbose
        self._moves = not quiet and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shown = 0  # columns of the moving line
        self.steps: list[dict[str, Any]] = []
        """What ran, for --json."""

    def started(self, call: Call) -> None:
        if self._verbose:
            self._line(f"+ {shlex.join(call.command)}")

    def working(self, call: Call, seconds: float) -> None:
        if not self._moves:
            return
        frame = _FRAMES[int(seconds * 10) % len(_FRAMES)]
        width = shutil.get_terminal_size().columns - 1
        text = f"{frame} {call.title}  {seconds:.0f} s"[:width]
        sys.stderr.write("\r" + text.ljust(self._shown))
        sys.stderr.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def finished(self, outcome: Outcome) -> None:
        call = outcome.call
        self.steps.append(
            {
                "action": call.title,
                "command": call.command,
                "seconds": round(outcome.seconds, 3),
                "status": outcome.status,
                "bytes": outcome.bytes,
                "stdout": outcome.stdout,
                "stderr": outcome.stderr,
            }
        )
        if self._verbose:
            for line in outcome.stderr.splitlines():
                self._line(f"  {line}")
        if not self._quiet:
            moved = f", {size(outcome.bytes)}" if outcome.bytes and outcome.ok else ""
            result = "" if outcome.ok else f", failed ({outcome.status})"
            self._line(f"{call.title} ... {outcome.seconds:.1f} s{moved}{result}")

    def warn(self, text: str) -> None:
        self._line(f"madrigal: warning: {text}")

    def _line(self, text: str) -> None:
        self.clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
