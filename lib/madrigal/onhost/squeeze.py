"""Packing the data of a stream while the way is slower than packing, and unpacking them."""

import time
import zlib

from madrigal.errors import BadImage, NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Optional, Sequence, Union

    Payload = Union[bytes, memoryview]

_WINDOW = 4 << 20  # bytes over which the speed of the way is taken; fewer only fill a pipe
_WAIT = 64  # pieces that go as they are after one that was not worth it
_GAIN = 0.9  # of the time without packing that is worth the trouble


def codecs() -> "List[str]":
    """What can be packed and unpacked here, the best first."""
    return (["zstd"] if _zstd() else []) + ["zlib"]


def _zstd() -> "Any":
    """What packs with zstd, what unpacks at most so many bytes, and what that raises; None if there is no zstd.

    It comes with Python 3.14, or in the package zstandard.
    """
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return zstd.compress, lambda data, most: zstd.ZstdDecompressor().decompress(data, most), zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        return None
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return lambda data, _: packer.compress(data), _reading(unpacker), zstandard.ZstdError


def _reading(unpacker: "Any") -> "Callable[[Payload, int], bytes]":
    return lambda data, most: bytes(unpacker.stream_reader(bytes(data)).read(most))


class Squeezer:
    """Decides for each piece of data whether it goes packed; THEIRS are the other side's codecs().

    `codec` is the one that is used.
    """

    def __init__(self, theirs: "Sequence[str]") -> None:
        self.codec = next((name for name in codecs() if name in theirs), "")
        self._pack = _zstd()[0] if self.codec == "zstd" else zlib.compress
        self._sent, self._took = 0, 0.0
        self._speed = 0.0  # bytes a second on the way
        self._wait = 0

    def packed(self, data: "Payload") -> "Optional[bytes]":
        """DATA packed, or None if they should go as they are."""
        if not self._speed or not self.codec:
            return None
        if self._wait:
            self._wait -= 1
            return None
        began = time.monotonic()
        packed: bytes = self._pack(data, 1)
        if time.monotonic() - began + len(packed) / self._speed < _GAIN * len(data) / self._speed:
            return packed
        self._wait = _WAIT
        return None

    def sent(self, count: int, seconds: float) -> None:
        """COUNT bytes have gone in so many SECONDS."""
        self._sent += count
        self._took += seconds
        if self._sent >= _WINDOW:
            self._speed = self._sent / max(self._took, 1e-9)
            self._sent, self._took = 0, 0.0


class Unpacker:
    """Unpacks what a Squeezer has packed with CODEC, at most LIMIT bytes a piece."""

    def __init__(self, codec: str, limit: int) -> None:
        self._limit = limit
        if codec == "zlib":
            self._unpack, self._errors = _unzlib, zlib.error  # type: Any, Any
        elif codec == "zstd" and _zstd():
            _, self._unpack, self._errors = _zstd()
        else:
            raise NotSupported("the stream is packed with '{}', which is not known here".format(codec))

    def unpacked(self, data: "Payload") -> bytes:
        try:
            found: bytes = self._unpack(data, self._limit + 1)
        except self._errors as error:
            raise BadImage("the stream has packed data that are damaged: {}".format(error)) from None
        if len(found) > self._limit:
            raise BadImage("the stream has a frame that is too large")
        return found


def _unzlib(data: "Payload", most: int) -> bytes:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, most)
    if len(found) < most and not unpacker.eof:
        raise zlib.error("they have no end")
    return found
