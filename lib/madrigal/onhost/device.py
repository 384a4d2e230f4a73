"""A block device that gets an image, in place: what it held before never shows through."""

import errno
import fcntl
import os
import struct

from madrigal.errors import BadImage, InUse, NoSpace, NotSupported
from madrigal.onhost.receiver import File, write_zeros
from madrigal.onhost.survey import BEGUN, HEAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Tuple

    from madrigal.onhost.stream import Payload
    from madrigal.onhost.undo import Undo

_BLKZEROOUT = 0x127F
_BLKSSZGET = 0x1268
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_SMALL = 64 << 20  # bytes of a gap that are made zeros at once: for more, who sends would have to wait
_STEP = 256 << 20
_PAGE = 4096
# the device, its driver or the kernel cannot; ENODEV and ENOTTY: not even the call is known for devices
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOTTY, errno.ENOSYS)


class Device:
    """The block device that PATH leads to.  Nobody else may use it; raises InUse, if it is mounted for one.

    READS_ZEROS: the caller knows that all of it reads as zeros, as a fresh thin volume does.  WAITING is called while
    something takes time.  What is written looks like nothing until `publish`, and like nothing again if UNDO has to
    take it back: the first MiB comes last.  Until then there is a line of text.
    """

    is_dir = False

    def __init__(self, undo: "Undo", path: str, reads_zeros: bool, waiting: "Callable[[], None]") -> None:
        self._undo, self._path, self._reads_zeros, self._waiting = undo, path, reads_zeros, waiting
        self.fd = _opened(path)
        undo.push(self._close)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        self._zeros = Zeros(self.fd)
        self._head = bytearray(min(HEAD, self.size))
        self._gaps: "List[Tuple[int, int]]" = []

    def begin(self, about: "Dict[str, Any]") -> File:
        """What gets the data of the file that ABOUT describes (onhost/stream.py); raises NoSpace if they are more."""
        if about["type"] != "file":
            raise NotSupported("{} is a block device, which can hold an image and no directory".format(self._path))
        self._need(about["size"] or 0)
        if not self._reads_zeros:
            self._zeros.make(0, len(self._head))
        elif os.pread(self.fd, len(self._head), 0).strip(b"\0"):
            # also what an interrupted run has left, which has written more than that
            raise BadImage("the device {} should read as zeros, and does not".format(self._path))
        write(self.fd, memoryview(BEGUN)[: len(self._head)], 0)
        os.fsync(self.fd)
        return _File(self, about)

    def put(self, view: memoryview, offset: int) -> int:
        """Write the first bytes of VIEW; returns how many."""
        if offset >= HEAD:
            return os.pwrite(self.fd, view, offset)
        count = min(len(view), len(self._head) - offset)
        if not count:
            raise BadImage("the stream has data outside of the device {}".format(self._path))
        self._head[offset : offset + count] = view[:count]
        return count

    def leave_out(self, start: int, end: int) -> None:
        """Nothing comes between START and END: let there be zeros."""
        start = max(start, len(self._head))
        if self._reads_zeros or start >= end:
            return
        if end - start > _SMALL:
            self._gaps.append((start, end))
        else:
            self._zeros.make(start, end)

    def end(self, size: int) -> None:
        """SIZE bytes were all."""
        self._need(size)
        self.leave_out(size, self.size)

    def publish(self) -> None:
        """Let it be seen; on return it is on the device, and taken back if the action fails after all."""
        for start, end in self._gaps:
            for offset in range(start, end, _STEP):
                self._waiting()
                self._zeros.make(offset, min(offset + _STEP, end))
        os.fsync(self.fd)
        write(self.fd, memoryview(self._head), 0)
        os.fsync(self.fd)
        self._undo.push(_blank, self._path)
        self._close()

    def discard(self) -> None:
        """Leave it as it is: without a beginning."""
        self._close()

    def _close(self) -> None:
        self._undo.forget(self._close)
        os.close(self.fd)

    def _need(self, size: int) -> None:
        if size > self.size:
            text = "the device {} has {} bytes, and the image {}: take a larger device"
            raise NoSpace(text.format(self._path, self.size, size))


class _File(File):
    """Data on their way to a device, in order."""

    def __init__(self, device: Device, about: "Dict[str, Any]") -> None:
        File.__init__(self, device.fd, about, "the image", device.leave_out, self._zero)
        self._device = device

    def _zero(self, _fd: int, start: int, end: int) -> None:
        self._device.leave_out(start, end)

    def _put(self, payload: "Payload", offset: int) -> int:
        return self._device.put(memoryview(payload), offset)

    def _end(self, size: int) -> None:
        self._device.end(size)


class Zeros:
    """Makes zeros on the open device FD, by the cheapest of what it can, which the first try shows.

    A hole is punched, which also gives the space back where that is known to read as zeros afterwards (the kernel
    refuses it elsewhere); or the device is asked to write zeros itself; or they are written.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        sector = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, b"\0" * 4))[0]
        self._unit = max(sector, _PAGE)  # a page is never written and zeroed by turns
        self._ways: "List[Callable[[int, int], None]]" = [
            lambda start, length: punch(fd, start, length),
            self._zero_out,
        ]

    def make(self, start: int, end: int) -> None:
        """Zeros from START to END."""
        first, last = -(-start // self._unit) * self._unit, end // self._unit * self._unit
        if first >= last:
            write_zeros(self._fd, start, end)
            return
        write_zeros(self._fd, start, first)
        while self._ways:
            try:
                self._ways[0](first, last - first)
                break
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._ways.pop(0)
        else:
            write_zeros(self._fd, first, last)
        write_zeros(self._fd, last, end)

    def _zero_out(self, start: int, length: int) -> None:
        fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", start, length))


def punch(fd: int, start: int, length: int) -> None:
    """Make a hole of LENGTH bytes from START on in the file or device FD."""
    import ctypes  # here, because os has no fallocate with a mode

    library = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(library, "fallocate64", library.fallocate)
    if fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _opened(path: str) -> int:
    try:
        # O_EXCL: of a device, that nobody has mounted it or holds it in the same way
        return os.open(os.path.realpath(path), os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        text = "{} is in use: it is mounted, a part of another device, or being written by another action"
        raise InUse(text.format(path)) from None


def _blank(path: str) -> None:
    """Let the device at PATH look like nothing."""
    fd = _opened(path)
    try:
        size = min(HEAD, os.lseek(fd, 0, os.SEEK_END))
        Zeros(fd).make(0, size)
        write(fd, memoryview(BEGUN)[:size], 0)
        os.fsync(fd)
    finally:
        os.close(fd)
