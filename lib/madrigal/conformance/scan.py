"""Looking at files and removing them, on this machine or, sent over a connection, on another.

Alone, and in Python 3.6 with the standard library only: it also runs on hosts.
"""

import hashlib
import json
import os
import shutil
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST = 64 << 20
"""Bytes on the disk; of a file that takes more only its size is told."""
SETTLED = 100000000
"""Nanoseconds without a change after which the next change will show in a file's times."""

_digests: "dict[tuple[int, int], tuple[int, int, str]]" = {}
"""{(device, inode): (time of change, size, digest)}: most files stay as they are from one look to the next."""


def scan(directories: "Sequence[str]", but: "Sequence[str]" = (), root: str = "") -> "dict[str, list[object]]":
    """{path: [kind, mode, size, digest or target]} of all below DIRECTORIES that is not BUT; ROOT goes before both."""
    found = {}
    for top in directories:
        for base, names, files in os.walk(root + top):
            names[:] = [name for name in names if os.path.join(base, name)[len(root) :] not in but]
            for name in names + files:
                path = os.path.join(base, name)
                try:
                    found[path[len(root) :]] = _entry(path)
                except OSError:
                    pass  # it is just being removed
    return found


def _entry(path: str) -> "list[object]":
    status = os.lstat(path)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return ["link", 0, 0, os.readlink(path)]
    if stat.S_ISDIR(status.st_mode):
        return ["directory", mode, 0, ""]
    if not stat.S_ISREG(status.st_mode):
        return ["special", mode, status.st_rdev, ""]
    if status.st_blocks * 512 > MOST:
        return ["file", mode, status.st_size, ""]
    return ["file", mode, status.st_size, _digest(path, status)]


def _digest(path: str, status: "os.stat_result") -> str:
    now = time.time_ns() if hasattr(time, "time_ns") else int(time.time() * 1e9)  # Python 3.6 has no time_ns
    file_id, state = (status.st_dev, status.st_ino), (status.st_ctime_ns, status.st_size)
    known = _digests.get(file_id)
    if known and known[:2] == state:
        return known[2]
    digest = _sha256(path)
    if now - status.st_ctime_ns > SETTLED:
        _digests[file_id] = (*state, digest)
    return digest


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def content(path: str, root: str = "") -> str:
    """The SHA-256 of the file that PATH leads to; "" if it leads to none.  ROOT is where the links in it begin."""
    todo, found, links = path.split("/"), "", 0
    while todo:
        name = todo.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            found = os.path.dirname(found)
            continue
        try:
            target = os.readlink(root + found + "/" + name)
        except OSError:
            found += "/" + name
            continue
        links += 1
        if links > 40:
            return ""
        todo[:0] = target.split("/")
        if target.startswith("/"):
            found = ""
    return _sha256(root + found) if os.path.isfile(root + found) else ""


def remove(path: str, root: str = "") -> None:
    """Remove the file or directory, as far as that can be."""
    try:
        os.unlink(root + path)
    except IsADirectoryError:
        shutil.rmtree(root + path, ignore_errors=True)
    except OSError:
        pass


def empty(directories: "Sequence[str]", kept: "Sequence[str]" = (), root: str = "") -> None:
    """Remove what is in DIRECTORIES and not named in KEPT, as far as that can be."""
    for directory in directories:
        if os.path.isdir(root + directory):
            for name in set(os.listdir(root + directory)) - set(kept):
                remove(os.path.join(directory, name), root)


if __name__ == "__main__":
    json.dump(globals()[sys.argv[1]](*json.loads(sys.argv[2])), sys.stdout)
