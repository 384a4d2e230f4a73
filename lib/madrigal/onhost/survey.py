"""What is known of a path of this machine before anything is copied from or to it: asked, and nothing is changed."""

import errno
import fcntl
import os
import re
import stat
import struct

from madrigal.onhost import part
from madrigal.onhost.lock import locked_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional

_FICLONERANGE = 0x4020940D
HEAD = 1 << 20
"""Bytes at the beginning of a device that say what is on it."""

BEGUN = b"madrigal: an image was being written to this device; its beginning would have come last\n"
"""What a device begins with meanwhile."""

_PROBED = 64 << 10  # bytes


def survey(path: str) -> "Dict[str, Any]":
    """What PATH leads to: {"kind": file, dir, device, other or nothing, "size", "allocated", "path": without links}.

    Of where it lies: {"file_system": its number on this machine, "fs_type", "free": bytes, "is_writable"}; and {"left":
    the allocated bytes that an interrupted run has left of it, "used": who uses it, "" if nobody is known to,
    "is_blank": whether a device has nothing at its beginning but zeros, or what an interrupted run has left}.
    """
    real = os.path.realpath(path)
    directory, name = os.path.split(real)
    try:
        found = os.stat(real)
    except (FileNotFoundError, NotADirectoryError):
        about = {"kind": "nothing", "size": 0, "allocated": 0, "used": "", "is_blank": False}
    else:
        about = _about(real, found)
    above = directory
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    free = os.statvfs(above)
    names = os.listdir(above) if above == directory else []
    left = [entry for entry in names if part.is_part_of(name, entry)]
    about.update(
        path=real,
        file_system=os.stat(real if about["kind"] == "dir" else above).st_dev,
        fs_type=_type(above),
        is_writable=os.access(above, os.W_OK),
        free=free.f_bavail * free.f_frsize,
        left=max([part.left(os.path.join(directory, entry)) for entry in left], default=0),
    )
    return about


def _about(path: str, found: os.stat_result) -> "Dict[str, Any]":
    if stat.S_ISBLK(found.st_mode):
        size, used = device_size(path), _device_used(path)
        return {"kind": "device", "size": size, "allocated": size, "used": used, "is_blank": _is_blank(path)}
    kind = "dir" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
    allocated = part.left(path) if kind == "dir" else found.st_blocks * 512
    locked = locked_in(path)
    used = "a process has locked {}".format(locked) if locked else ""
    return {"kind": kind, "size": found.st_size, "allocated": allocated, "used": used, "is_blank": False}


def device_size(path: str) -> int:
    """The bytes of the block device PATH."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _is_blank(path: str) -> bool:
    with open(path, "rb", buffering=0) as file:
        return file.read(HEAD).strip(b"\0") in (b"", BEGUN)


def _device_used(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return "it is mounted, or a part of another device"
    return "a process has locked it" if locked_in(path) else ""


def _type(path: str) -> str:
    """The type of the file system that PATH, without links, is on."""
    best, kind = "", ""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words = line.split(b" ")
            point = unescaped(words[4])
            if len(point) >= len(best) and (path + "/").startswith(point.rstrip("/") + "/"):
                best, kind = point, os.fsdecode(words[words.index(b"-") + 1])
    return kind


def unescaped(field: bytes) -> str:
    """A name as mountinfo has it, in which blanks are \\040."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), field))


def reflinks(source: str, path: str) -> "Optional[bool]":
    """Whether a file beside PATH could have its blocks in common with the file SOURCE: tried with some of them.

    None if nobody can tell, as where this user may not write.
    """
    directory = os.path.dirname(os.path.realpath(path))
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    given = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        made = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        os.close(given)
        return None
    try:
        length = _PROBED if os.fstat(given).st_size >= _PROBED else 0  # 0: up to its end
        fcntl.ioctl(made, _FICLONERANGE, struct.pack("qQQQ", given, 0, length, 0))
        return True
    except OSError:
        return False
    finally:
        os.close(made)
        os.close(given)
