"""Packing the data of a stream while the way is slower than packing, and unpacking them.

zlib at its fastest, because every Python has it: 50 to 100 MB/s.  zstd as a program of its own packs a piece in half
the time, but unpacking takes as long as starting it.
"""

import time
import zlib

from madrigal.errors import BadImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Union

    Payload = Union[bytes, memoryview]

_WINDOW = 4 << 20  # bytes over which the speed of the way is taken; fewer only fill a pipe
_WAIT = 64  # pieces at most that go as they are after some that were not worth it
_GAIN = 0.9  # of the time without packing that is worth the trouble
_SAMPLE = 64 << 10  # bytes of a piece that are packed to see what that gives
_FASTEST = 400e6  # bytes a second, on a way that is faster nothing is worth packing


class Squeezer:
    """Decides for each piece of data whether it goes packed."""

    def __init__(self) -> None:
        self._sent, self._took = 0, 0.0
        self._speed = 0.0  # bytes a second on the way
        self._wait, self._pause = 0, 1

    def packed(self, data: "Payload") -> "Optional[bytes]":
        """DATA packed, or None if they should go as they are."""
        if not 0 < self._speed < _FASTEST:
            return None
        if self._wait:
            self._wait -= 1
            return None
        if self._pays(data[:_SAMPLE]):
            self._pause = 1
            return zlib.compress(data, 1)
        # So little is soon misjudged, by a process that wants the processor at that moment.
        self._wait, self._pause = self._pause, min(2 * self._pause, _WAIT)
        return None

    def _pays(self, data: "Payload") -> bool:
        began = time.monotonic()
        packed = zlib.compress(data, 1)
        took = time.monotonic() - began
        return took + len(packed) / self._speed < _GAIN * len(data) / self._speed

    def sent(self, count: int, seconds: float) -> None:
        """COUNT bytes have gone in so many SECONDS."""
        self._sent += count
        self._took += seconds
        if self._sent >= _WINDOW:
            self._speed = self._sent / max(self._took, 1e-9)
            self._sent, self._took = 0, 0.0


def unpacked(data: "Payload", most: int) -> bytes:
    """What was packed as DATA, MOST bytes; raises BadImage if it is damaged or more."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, most)
    except zlib.error as error:
        raise BadImage("the stream has packed data that are damaged: {}".format(error)) from None
    if not unpacker.eof:
        raise BadImage("the stream has packed data that do not end, or that are too large")
    return found
