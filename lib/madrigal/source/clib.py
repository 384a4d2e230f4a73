"""zstd and lz4 through the C libraries that every distribution has: output in bounded pieces, input as it comes."""

from __future__ import annotations

import ctypes

from madrigal.errors import MissingProgram

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


class FrameError(Exception):
    """What the library says is wrong with the data."""


def library(name: str, package: str, what: str) -> ctypes.CDLL:
    """The shared library NAME; raises MissingProgram with the PACKAGE that has it."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise MissingProgram(f"unpacking {what} needs {name}: install the package {package}") from None


class _Room:
    """Where output goes: one for all frames of a file, most of which may be small."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(0)

    def of(self, length: int) -> ctypes.Array[ctypes.c_char]:
        if len(self.buffer) < length:
            self.buffer = ctypes.create_string_buffer(length)
        return self.buffer


class _Frame:
    """One frame being unpacked, with the manners of bz2's object."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self.eof, self.needs_input, self.unused_data = False, True, b""
        self._input, self._at = b"", 0

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._input, self._at = self._input[self._at :] + data, 0
        output = self._room.of(max_length)
        used, made, over = self._step(output, max_length)
        self._at += used
        if over:
            self.eof, self.unused_data = True, self._input[self._at :]
        # what fits no more stays inside until it is asked for
        self.needs_input = made < max_length and self._at == len(self._input)
        return ctypes.string_at(output, made)

    def _step(self, output: ctypes.Array[ctypes.c_char], length: int) -> tuple[int, int, bool]:
        """Bytes used, bytes made, and whether the frame is complete."""
        raise NotImplementedError


class _In(ctypes.Structure):
    _fields_ = (("at", ctypes.c_char_p), ("size", _SIZE), ("position", _SIZE))


class _Out(ctypes.Structure):
    # an address: ctypes.cast() would keep the buffer alive in a cycle
    _fields_ = (("at", _POINTER), ("size", _SIZE), ("position", _SIZE))


def zstd() -> tuple[Callable[[], _Frame], tuple[type[Exception], ...]]:
    """What makes the object for a frame, and what that raises.  A window has 128 MiB at most, as with the program."""
    c = library("libzstd.so.1", "libzstd1", "zstd")
    c.ZSTD_createDStream.restype = _POINTER
    c.ZSTD_freeDStream.argtypes = [_POINTER]
    c.ZSTD_decompressStream.restype = _SIZE
    c.ZSTD_decompressStream.argtypes = [_POINTER, ctypes.POINTER(_Out), ctypes.POINTER(_In)]
    c.ZSTD_isError.argtypes = [_SIZE]
    c.ZSTD_getErrorName.argtypes = [_SIZE]
    c.ZSTD_getErrorName.restype = ctypes.c_char_p

    room = _Room()

    class Frame(_Frame):
        def __init__(self) -> None:
            super().__init__(room)
            self._stream = c.ZSTD_createDStream()

        def __del__(self) -> None:
            c.ZSTD_freeDStream(self._stream)

        def _step(self, output: ctypes.Array[ctypes.c_char], length: int) -> tuple[int, int, bool]:
            into = _Out(ctypes.addressof(output), length, 0)
            out_of = _In(self._input, len(self._input), self._at)
            left = c.ZSTD_decompressStream(self._stream, ctypes.byref(into), ctypes.byref(out_of))
            if c.ZSTD_isError(left):
                raise FrameError(c.ZSTD_getErrorName(left).decode())
            return out_of.position - self._at, into.position, left == 0

    return Frame, (FrameError,)


def lz4() -> tuple[Callable[[], _Frame], tuple[type[Exception], ...]]:
    """The same for lz4."""
    c = library("liblz4.so.1", "liblz4-1", "lz4")
    c.LZ4F_createDecompressionContext.argtypes = [ctypes.POINTER(_POINTER), ctypes.c_uint]
    c.LZ4F_createDecompressionContext.restype = _SIZE
    c.LZ4F_freeDecompressionContext.argtypes = [_POINTER]
    sizes = ctypes.POINTER(_SIZE)
    c.LZ4F_decompress.argtypes = [_POINTER, _POINTER, sizes, _POINTER, sizes, _POINTER]
    c.LZ4F_decompress.restype = _SIZE
    c.LZ4F_isError.argtypes = [_SIZE]
    c.LZ4F_getErrorName.argtypes = [_SIZE]
    c.LZ4F_getErrorName.restype = ctypes.c_char_p

    room = _Room()

    class Frame(_Frame):
        def __init__(self) -> None:
            super().__init__(room)
            self._context = _POINTER()
            if c.LZ4F_isError(c.LZ4F_createDecompressionContext(ctypes.byref(self._context), 100)):
                raise MemoryError("lz4")

        def __del__(self) -> None:
            c.LZ4F_freeDecompressionContext(self._context)

        def _step(self, output: ctypes.Array[ctypes.c_char], length: int) -> tuple[int, int, bool]:
            rest = self._input[self._at :] if self._at else self._input
            made, used = _SIZE(length), _SIZE(len(rest))
            left = c.LZ4F_decompress(
                self._context, output, ctypes.byref(made), ctypes.c_char_p(rest), ctypes.byref(used), None
            )
            if c.LZ4F_isError(left):
                raise FrameError(c.LZ4F_getErrorName(left).decode())
            return used.value, made.value, left == 0

    return Frame, (FrameError,)
