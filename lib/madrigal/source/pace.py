"""How fast an image may come: so many bytes a second on average, whichever way it comes."""

from __future__ import annotations

import re

from madrigal.errors import ConfigError
from madrigal.onhost.pace import Pace
from madrigal.source.schemes import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from madrigal.onhost.stream import Frame

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LEAST = 1 << 10
_STEP = 0.25  # seconds between two reads, more or less: a server sees no pauses but a slow reader


def parse(text: str, name: str) -> int | None:
    """The bytes a second that TEXT says as curl's --limit-rate does (`10M`, `500k`, `100000`); None if it is empty.

    Raises ConfigError for anything else, with NAME, the option it is the value of.
    """
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([bkmgt]?)", text.lower())
    rate = int(match[1]) * _UNITS[match[2]] if match else 0
    if not rate:
        raise ConfigError(f"{name} is '{text[:40]}', expected bytes a second such as 10M, 500k or 100000")
    return rate


def paced(frames: Iterator[Frame], rate: int) -> Iterator[Frame]:
    """FRAMES of a stream (onhost/stream.py), their data at RATE."""
    pace = Pace(rate)
    for kind, offset, payload in frames:
        pace.took(len(payload) if kind == b"D" else 0)
        yield kind, offset, payload


class Paced(Source):
    """SOURCE, read at RATE."""

    def __init__(self, source: Source, rate: int) -> None:
        self._source, self.rate, self._pace = source, rate, Pace(rate)
        self.name, self.size, self.local_fd = source.name, source.size, source.local_fd

    def read(self, most: int) -> bytes:
        data = self._source.read(min(most, max(int(self.rate * _STEP), _LEAST)))
        self._pace.took(len(data))
        return data

    def peek(self, offset: int, length: int) -> bytes | None:
        return self._source.peek(offset, length)

    def close(self) -> None:
        self._source.close()
