"""A file of this machine, as a path or a file:// URL."""

from __future__ import annotations

import os

from madrigal.errors import SourceUnavailable, UsageError
from madrigal.source.schemes import Source

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from madrigal.source.schemes import Terms


def open(url: str, terms: Terms, _stall: float) -> Source:
    return _File(url, terms.guard(url if url.startswith("/") else _path(url)))


def _path(url: str) -> str:
    from urllib.parse import unquote_to_bytes

    host, _, path = url.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise UsageError(f"'{url}' names a file of the host '{host}': a file:// URL has none, as in file:///srv/image")
    return os.fsdecode(b"/" + unquote_to_bytes(path))


class _File(Source):
    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.local_fd: int = fd
        self._offset = 0
        try:
            self.size = os.lseek(fd, 0, os.SEEK_END)  # st_size of a block device is 0
            os.lseek(fd, 0, os.SEEK_SET)
        except OSError:
            self.size = None
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except OSError:
            pass  # only advice

    def read(self, most: int) -> bytes:
        try:
            data = os.pread(self.local_fd, most, self._offset)
        except OSError as error:
            raise SourceUnavailable(f"cannot read {self.name}: {error.strerror}") from None
        self._offset += len(data)
        return data

    def peek(self, offset: int, length: int) -> bytes | None:
        return os.pread(self.local_fd, length, offset)

    def close(self) -> None:
        os.close(self.local_fd)
