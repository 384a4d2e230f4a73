"""An image datastore that is a directory: every image a file of it, named by the image's id and time.

`<BASE_PATH>/<md5 of "REGTIME:ID">` is the image; `.snap` and `.md5sum` with the same beginning are what other
drivers keep beside it, and are removed with it.
"""

from __future__ import annotations

import os

from madrigal.errors import NotFound
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from madrigal.host.local import LocalSession
    from madrigal.onhost.part import Part

_CONVERTED = ("raw", "qcow2")
_BESIDE = (".snap", ".md5sum")
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


class Stored:
    """An image of the datastore.  `size`: bytes a VM sees; of a directory, those of its files."""

    def __init__(self, path: str, format: str, size: int) -> None:
        self.path = path
        self.format = format
        self.size = size


class Store:
    """The datastore in the directory BASE_PATH, changed in SESSION."""

    def __init__(self, session: LocalSession, base_path: str) -> None:
        self._session = session
        self.base_path = base_path

    def path_of(self, time: int, image_id: int) -> str:
        """Where the image with this id, registered at TIME, goes: the same whenever the action is repeated."""
        import hashlib

        return f"{self.base_path}/{hashlib.md5(f'{time}:{image_id}'.encode(), usedforsecurity=False).hexdigest()}"

    def add(
        self,
        path: str,
        url: str,
        open_local: Callable[[str], int],
        digests: Mapping[str, str],
        decompress: bool,
        is_disk: bool,
        driver: str,
    ) -> Stored:
        """Make PATH the image that URL (or a local path) leads to.

        OPEN_LOCAL opens a local path or raises Forbidden.  DIGESTS: MD5, SHA1, SHA256 of the bytes as fetched.
        IS_DISK: refuse what a VM must not have as a disk (inspector.check_import).  DRIVER: the format it gets.
        """
        from madrigal import inspector
        from madrigal.onhost import copy
        from madrigal.source import schemes, stream

        digests = stream.check_digests(digests)
        self._session.call("hold", path=path, make="parents")
        if os.path.lexists(path):
            log(f"{url} was imported as {path} before")
            return self._look(path, is_disk)
        with schemes.open(url, guard=open_local) as opened:
            local = f"/proc/self/fd/{opened.local_fd}" if opened.local_fd is not None else ""
            if local and os.path.isdir(local):
                self._session.call("copy", source=local, path=path)
                return self._look(path, is_disk)
            part = self._session.part(path, "import")
            if opened.local_fd is not None and not digests and not (decompress and _packed(opened.local_fd)):
                copy.copy_file(opened.local_fd, part.fd, lambda: None)
            else:
                writer = _Writer(part.fd)
                stream.fetch(opened, writer.write, decompress=decompress, digests=digests, limit=None)
                writer.finish()
            name = opened.name
        if is_disk:
            found = inspector.check_import(part.fd)
            if driver in _CONVERTED and found.format != "luks" and found.driver != driver:
                part = self._convert(part, found.driver, path, driver)
        self._session.publish(part)
        log(f"imported {name} as {path}")
        return self._look(path, is_disk)

    def make(self, path: str, format: str, size: int, fs: str, fs_options: list[str]) -> None:
        """Make PATH an empty image of SIZE bytes with the file system FS (or `swap`) in it."""
        self._session.call("hold", path=path, make="parents")
        if not os.path.lexists(path):
            self._session.call("make", path=path, format=format, size=size, fs=fs, fs_options=fs_options)
        log(f"made {path}")

    def clone(self, original: str, format: str, path: str, driver: str) -> Stored:
        """Make PATH a copy of the image ORIGINAL, which is of FORMAT, converted to DRIVER if that is another."""
        from madrigal.onhost import copy

        self._session.call("hold", path=path, make="parents")
        if not os.path.lexists(path):
            try:
                fd = os.open(original, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise NotFound(f"the image to clone, {original}, does not exist") from None
            try:
                part = self._session.part(path, "clone")
                copy.copy_file(fd, part.fd, lambda: None)
            finally:
                os.close(fd)
            if format in _CONVERTED and driver in _CONVERTED and format != driver:
                part = self._convert(part, format, path, driver)
            self._session.publish(part)
        log(f"cloned {original} to {path}")
        return Stored(path, driver if driver in _CONVERTED else format, os.stat(path).st_size)

    def remove(self, path: str) -> None:
        """Remove the image at PATH and what is beside it; it may be gone already."""
        there = self._session.call("delete", path=path, within=path, beside=_BESIDE)
        log(f"removed {path}" if there else f"{path} was gone already")

    def capacity(self) -> tuple[int, int, int]:
        """Bytes used, in all, and free for this user, of the file system (as df counts them)."""
        os.makedirs(self.base_path, exist_ok=True)
        found = os.statvfs(self.base_path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        return used, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

    def _convert(self, part: Part, format: str, path: str, driver: str) -> Part:
        from madrigal import deadline
        from madrigal.onhost import image

        converted = self._session.part(path, "converted", beside=part)
        image.convert(part.path, format, converted.path, driver, lambda: None, deadline.stall())
        part.discard()
        return converted

    def _look(self, path: str, is_disk: bool) -> Stored:
        if os.path.isdir(path):
            sizes = (os.lstat(os.path.join(top, name)).st_size for top, _, names in os.walk(path) for name in names)
            return Stored(path, "dir", sum(sizes))
        if not is_disk:
            return Stored(path, "raw", os.stat(path).st_size)
        from madrigal import inspector

        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = inspector.check_import(fd)
        finally:
            os.close(fd)
        return Stored(path, found.driver, os.stat(path).st_size)


def _packed(fd: int) -> bool:
    from madrigal.source import codec

    return codec.kind(os.pread(fd, codec.HEAD, 0)) is not None


class _Writer:
    """Writes a stream into a new file, leaving holes where it has zeros."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if block != _ZEROS[: len(block)]:
                view = memoryview(block)
                at = self._offset + start
                while view:
                    written = os.pwrite(self._fd, view, at)
                    view, at = view[written:], at + written
        self._offset += len(data)

    def finish(self) -> None:
        os.ftruncate(self._fd, self._offset)
