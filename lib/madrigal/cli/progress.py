"""What people see while driver actions run: a moving line on a terminal, a line per action without one."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

from madrigal.embedded import Call, Observer, Outcome

_FRAMES = "|/-\\"


def size(count: int) -> str:
    """COUNT bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Bar:
    """How far something with TOTAL bytes (None: unknown) is, on a terminal; nothing without one, or if QUIET."""

    def __init__(self, total: int | None, quiet: bool) -> None:
        self._total = total
        self._moves = not quiet and _is_terminal()
        self._drawn = 0.0  # seconds

    def show(self, count: int, seconds: float) -> None:
        """COUNT bytes have come in SECONDS; drawn ten times a second."""
        if not self._moves or (seconds - self._drawn < 0.1 and count != self._total):
            return
        self._drawn = seconds
        speed = f"{size(int(count / max(seconds, 0.001)))}/s"
        text = f"{size(count)}  {speed}"
        if self._total:
            done = min(count / self._total, 1)
            left = seconds / done * (1 - done) if done else 0
            bar = ("#" * int(done * 30)).ljust(30, ".")
            text = f"[{bar}] {done:4.0%}  {size(count)} of {size(self._total)}  {speed}  {left:.0f} s left"
        sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()

    def clear(self) -> None:
        """Take it away."""
        if self._moves:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Progress(Observer):
    """Writes to stderr, so that stdout is the answer alone.  QUIET: only what goes wrong, unless VERBOSE."""

    def __init__(self, verbose: bool, quiet: bool) -> None:
        self._verbose = verbose
        self._quiet = quiet and not verbose
        self._moves = not quiet and _is_terminal()
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
