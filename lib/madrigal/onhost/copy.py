"""Copy a file within one machine: the cheapest way the file systems allow."""

import errno
import fcntl
import os

from madrigal.errors import MadrigalError, NoSpace
from madrigal.onhost import stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

_FICLONE = 0x40049409


def copy_file(source: int, target: int, waiting: "Callable[[], None]") -> str:
    """Copy all of the open file SOURCE to the new, empty file TARGET; returns the way: reflink, copy_file_range, read.

    WAITING is called between pieces and may raise.
    """
    before = os.fstat(source)
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return "reflink"
    except OSError:
        pass  # not one copy-on-write file system
    free = os.fstatvfs(target)
    if before.st_blocks * 512 > free.f_bavail * free.f_frsize:
        raise NoSpace(
            "{} MiB are needed for a copy and {} MiB are free".format(
                before.st_blocks * 512 >> 20, free.f_bavail * free.f_frsize >> 20
            )
        )
    way = "copy_file_range"
    copy_range = getattr(os, "copy_file_range", None)  # Python 3.8
    for offset, length in stream.extents(source, before.st_size):
        waiting()
        end = offset + length
        while offset < end and copy_range:
            try:
                copied = copy_range(source, target, end - offset, offset, offset)
            except OSError as error:
                # EXDEV: two file systems; the others: this kernel or file system cannot
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO):
                    raise
                copied = 0
            if not copied:
                copy_range = None  # once is enough to know
            offset += copied
        if offset < end:
            way = "read"
            _through_memory(source, target, offset, end)
    os.ftruncate(target, before.st_size)
    after = os.fstat(source)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise MadrigalError("the source was changed while it was copied; try again when nobody uses it")
    return way


def _through_memory(source: int, target: int, offset: int, end: int) -> None:
    block = os.pread(source, end - offset, offset)
    if block == bytes(len(block)):
        return
    view = memoryview(block)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
