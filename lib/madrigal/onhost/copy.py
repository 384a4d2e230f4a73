"""Copy a file within one machine: the cheapest way the file systems allow."""

import errno
import fcntl
import os

from madrigal.errors import MadrigalError, NoSpace
from madrigal.onhost import blocks, stream
from madrigal.onhost.pace import Pace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Callable, List, Optional

_FICLONE = 0x40049409
_WINDOW = 32 << 20
_THREADS = 2


def copy_file(source: int, target: int, waiting: "Callable[..., None]", rate: int = 0) -> str:
    """Copy all of the open file SOURCE to the new, empty file TARGET; returns the way: reflink, copy_file_range, read.

    WAITING is called between pieces with the `bytes` so far, and may raise; RATE: bytes a second at most, if it is not
    a reflink (0: any).
    """
    before = os.fstat(source)
    if clone(source, target):
        return "reflink"
    check_room(before.st_blocks * 512, target)
    filler, pace = Filler(source, target), Pace(rate) if rate else None
    behind = Behind(source, before.st_blocks * 512), Behind(target, before.st_blocks * 512)
    count = 0
    for offset, length in stream.Extents(source).within(0, before.st_size):
        waiting(bytes=count)
        count += length
        if pace:
            pace.took(length)
        filler.copy(offset, offset + length)
        for file in behind:
            file.passed(offset)
    os.ftruncate(target, before.st_size)
    after = os.fstat(source)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise MadrigalError("the source was changed while it was copied; try again when nobody uses it")
    return filler.way


def check_room(needed: int, target: int) -> None:
    """Raise NoSpace unless the file system of the open file TARGET has room for so many bytes."""
    free = os.fstatvfs(target)
    if needed > free.f_bavail * free.f_frsize:
        text = "{} MiB are needed for a copy and {} MiB are free"
        raise NoSpace(text.format(needed >> 20, free.f_bavail * free.f_frsize >> 20))


def clone(source: int, target: int) -> bool:
    """Let the open file TARGET share all blocks of SOURCE; returns whether the file system could."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError:
        return False  # not one copy-on-write file system


class Filler:
    """Copies ranges of the open file SOURCE to the same place in the open file TARGET, which has nothing there.

    `way` is how: copy_file_range, or read.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._copy_range = getattr(os, "copy_file_range", None)  # Python 3.8
        self._reader: "Optional[blocks.Reader]" = None
        self.way = "copy_file_range" if self._copy_range else "read"

    def copy(self, offset: int, end: int) -> None:
        """Copy from OFFSET to END, at most 1 MiB."""
        while offset < end and self._copy_range:
            try:
                copied = self._copy_range(self._source, self._target, end - offset, offset, offset)
            except OSError as error:
                # EXDEV: two file systems; the others: this kernel or file system cannot
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO):
                    raise
                copied = 0
            if not copied:
                self._copy_range, self.way = None, "read"  # once is enough to know
            offset += copied
        if offset < end:
            if self._reader is None:
                self._reader = blocks.Reader(self._source)
            data = self._reader.read(offset, end - offset)
            for start, stop in stream.not_zero(self._reader.buffer, len(data)):
                while start < stop:
                    start += os.pwrite(self._target, data[start:stop], offset + start)


class Ahead:
    """Copies ranges of one open file to another as Filler does, while its user goes on; `end` waits for that.

    By two threads: where the files are in memory, one takes all of its time to copy.
    """

    def __init__(self, source: int, target: int) -> None:
        from concurrent.futures import ThreadPoolExecutor  # here, because few sessions need it

        self._size, self._extents = os.fstat(source).st_size, stream.Extents(source)
        # its own: whatever interrupts us, no thread is left with the number of a file that has become another one
        self._files = [os.dup(source), os.dup(target)]
        self._fillers = [Filler(*self._files) for _ in range(_THREADS)]
        self._threads = ThreadPoolExecutor(_THREADS)
        self._begun: "List[Future[None]]" = []

    def fill(self, start: int, end: int) -> None:
        """Have what is allocated between START and END copied, as far as there is something; or raise what failed."""
        for offset, length in self._extents.within(start, min(end, self._size)):
            while len(self._begun) > _THREADS:
                self._begun.pop(0).result()
            self._begun.append(self._threads.submit(self._copy, offset, offset + length))

    def _copy(self, offset: int, end: int) -> None:
        filler = self._fillers.pop()
        try:
            filler.copy(offset, end)
        finally:
            self._fillers.append(filler)

    def end(self) -> None:
        """All is there, or raise what failed."""
        while self._begun:
            self._begun.pop(0).result()
        self.close()

    def close(self) -> None:
        """From here on no thread uses the files."""
        for one in self._begun:
            one.cancel()
        self._threads.shutdown()
        while self._files:
            os.close(self._files.pop())


class Behind:
    """Keeps a large file from filling the memory with what was just read or written of it, more or less in order.

    Otherwise the copy of a disk pushes out what others work with; of a small one the cache may be welcome.
    """

    def __init__(self, fd: int, allocated: int) -> None:
        self._fd, self._done = fd, 0
        self._is_large = allocated > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8

    def passed(self, offset: int) -> None:
        """All before OFFSET has been read or written."""
        while self._is_large and offset - self._done >= _WINDOW:
            # what is dirty is only begun to be written by this, and goes when asked for the second time
            for start in (self._done, max(self._done - 4 * _WINDOW, 0)):
                os.posix_fadvise(self._fd, start, _WINDOW, os.POSIX_FADV_DONTNEED)
            self._done += _WINDOW
