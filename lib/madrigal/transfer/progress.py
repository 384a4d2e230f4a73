"""How far the large transfers of this process are: on a terminal, for MADRIGAL_PROGRESS, and for `madrigal ps`.

A report is {"pid", "action", "arguments", "path": what is made, "started", "seconds", "bytes", "total": bytes or 0 if
nobody knows, "rate": bytes a second of late, "is_done"}.  No trouble with reporting is trouble for the transfer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import sys
import time

from madrigal import config, messages
from madrigal.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from madrigal.onhost.stream import Frame

    Report = dict[str, Any]
    Sink = Callable[[Report], None]

_OFTEN = 0.1  # seconds between two pictures on a terminal
_SELDOM = 1.0  # between two lines, or two versions of a file
_LATELY = 10.0  # seconds over which the rate is taken
_SUFFIX = ".progress"
_PLAIN = re.compile(r"(?:[\w.@-]+:)?/[^\0]*\Z|[\w.,=-]{1,64}\Z")
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/@]*@)?([^?#]*)")


@contextlib.contextmanager
def of(path: str, total: int) -> Iterator[Transfer]:
    """Report on what makes PATH of TOTAL bytes, 0 if nobody knows how many there will be; raises ConfigError."""
    made = Transfer(path, total, sinks())
    try:
        yield made
        made.report(is_done=True)
    finally:
        made.close()


class Transfer:
    """One transfer, of which several connections may bring parts; SINKS get the reports, each at most so often."""

    def __init__(self, path: str, total: int, sinks: list[tuple[float, Sink, Callable[[], None]]]) -> None:
        self._path, self._total, self._sinks = path, total, sinks
        self._due = [0.0] * len(sinks)
        self._counts: dict[object, int] = {}
        self._started, self._began = time.time(), time.monotonic()
        self._seen = [(self._began, 0)]

    def follow(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """FRAMES; their data count as having arrived when the next one is asked for."""
        count, packed, who = 0, -1, object()
        for kind, offset, payload in frames:
            if packed >= 0 and kind in (b"D", b"P"):
                count += min(max(offset - packed, 0), 1 << 20)  # what was packed there, at most
                packed = -1
            if kind == b"P":
                packed = offset
            length = len(payload) if kind == b"D" else 0
            yield kind, offset, payload
            count += length
            self.reached(count, who)

    def reached(self, count: int, who: object = None) -> None:
        """WHO has brought COUNT bytes so far."""
        self._counts[who] = count
        self.report()

    def report(self, is_done: bool = False) -> None:
        now = time.monotonic()
        if not is_done and now < min(self._due, default=now + 1):
            return
        count = sum(list(self._counts.values()))
        if now - self._seen[-1][0] >= _SELDOM:
            self._seen = [seen for seen in self._seen if now - seen[0] < _LATELY] + [(now, count)]
        since, before = self._seen[0] if self._seen[0][0] < now else (self._began, 0)
        about = {
            "pid": os.getpid(),
            "action": messages.name(),
            "arguments": [_shown(word) for word in sys.argv[1:]],
            "path": self._path,
            "started": self._started,
            "seconds": now - self._began,
            "bytes": count,
            "total": self._total,
            "rate": (count - before) / max(now - since, 0.001),
            "is_done": is_done,
        }
        for number, (every, sink, _) in enumerate(self._sinks):
            if is_done or now >= self._due[number]:
                self._due[number] = now + every
                with contextlib.suppress(OSError):
                    sink(about)

    def close(self) -> None:
        """Nothing comes any more, whatever the reason."""
        for _, _, end in self._sinks:
            with contextlib.suppress(OSError):
                end()


def _shown(word: str) -> str:
    """WORD of a command line, if it cannot be a secret: a dump has some, and a URL may."""
    url = _URL.match(word)
    if url:
        return url[1] + url[2]
    return word if _PLAIN.match(word) else "..."


# -- where it is shown ------------------------------------------------------------------------------------------------


def sinks() -> list[tuple[float, Sink, Callable[[], None]]]:
    """(seconds between reports, what takes one, what ends it) of all who want to know; raises ConfigError."""
    found: list[tuple[float, Sink, Callable[[], None]]] = []
    bar = Bar()
    if bar.is_wanted:
        found.append((_OFTEN, bar.show, bar.clear))
    chosen = os.environ.get("MADRIGAL_PROGRESS", "")
    if chosen:
        fd = _opened(chosen)
        is_ours = not chosen.startswith("fd:")
        found.append((_SELDOM, lambda report: _write_line(fd, report), lambda: os.close(fd) if is_ours else None))
    path = f"{config.run_dir()}/{os.getpid()}{_SUFFIX}"
    found.append((_SELDOM, lambda report: _write_file(path, report), lambda: os.unlink(path)))
    return found


def _opened(chosen: str) -> int:
    kind, _, number = chosen.partition(":")
    if kind == "fd" and number.isdigit():
        try:
            os.fstat(int(number))
        except OSError:
            raise ConfigError(f"MADRIGAL_PROGRESS is '{chosen}', and no such descriptor is open") from None
        return int(number)
    if not chosen.startswith("/"):
        raise ConfigError(f"MADRIGAL_PROGRESS is '{chosen}', expected fd:NUMBER or the absolute path of a file")
    try:
        return os.open(chosen, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise ConfigError(f"MADRIGAL_PROGRESS: cannot write to {chosen}: {error.strerror}") from None


def _write_line(fd: int, report: Report) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):  # a reader that is slow misses some; it does not hold us up
        os.write(fd, json.dumps(report).encode() + b"\n")


def _write_file(path: str, report: Report) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump({**report, "clock": _clock(os.getpid())}, file)
    os.rename(f"{path}.new", path)


def _clock(pid: int) -> str:
    """When process PID was started, "" if there is none: another one may have its number later."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def running() -> list[Report]:
    """The reports of this user's transfers that are under way; what processes left that were killed goes."""
    directory, found = config.run_dir(), []
    for name in sorted(os.listdir(directory)):
        path = f"{directory}/{name}"
        if not name.endswith((_SUFFIX, f"{_SUFFIX}.new")):
            continue
        pid = name.partition(".")[0]
        try:
            with open(path, encoding="utf-8") as file:
                report = json.load(file) if name.endswith(_SUFFIX) else {}
            if report and report.pop("clock") == _clock(int(pid)):
                found.append(report)
            elif report or not _clock(int(pid)):
                os.unlink(path)
        except (FileNotFoundError, ValueError, KeyError):
            continue  # it has just ended
    return found


# -- on a terminal ----------------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """COUNT bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def span(seconds: float) -> str:
    """SECONDS for people."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def percent(report: Report) -> int | None:
    """How much of it is there, None if nobody knows."""
    if report["is_done"]:
        return 100
    return min(int(report["bytes"] * 100 / report["total"]), 99) if report["total"] else None


class Bar:
    """A line on the terminal that stderr is."""

    def __init__(self) -> None:
        self.is_wanted = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._width = 0

    def show(self, report: Report) -> None:
        columns = (os.get_terminal_size(2).columns or 80) - 1
        done, words = percent(report), f"{size(report['bytes'])}, {size(report['rate'])}/s"
        if done is not None:
            left = (report["total"] - report["bytes"]) / (report["rate"] or 1)
            words = f"{done:3} %  {words}" + (f", {span(max(left, 0))} left" if report["rate"] >= 1 else "")
        length = min(max(columns - len(words) - 4, 0), 40)
        filled = length * (done or 0) // 100
        bar = f"[{'#' * filled}{'-' * (length - filled)}] " if length >= 8 and done is not None else ""
        line = (bar + words)[:columns]
        os.write(2, f"\r{line.ljust(self._width)}".encode())
        self._width = len(line)

    def clear(self) -> None:
        """Take it away."""
        if self._width:
            os.write(2, b"\r" + b" " * self._width + b"\r")
            self._width = 0
