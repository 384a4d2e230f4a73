"""qemu-img, one function per sub-command, the format always given.

What a guest has written into a raw disk can look like any format, so none is ever guessed: a format is a
mandatory argument here and one of FORMATS.  A path is a file's, whatever it looks like (`json:{...}`, `nbd:x`):
qemu takes what stands before a colon as a protocol only if no slash comes first.

WAITING is called now and then while qemu-img works and may raise; TIMEOUT is seconds without progress.
"""

import os
import re

from madrigal.command import CommandFailed, run
from madrigal.errors import BadImage, ConfigError, InUse, MissingProgram, NoSpace, UsageError
from madrigal.onhost import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Tuple

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")

_MADE = ("raw", "qcow2")
_MEMORY = 2 << 30  # bytes of address space; converting 100 GiB of qcow2 needs 400 MB
_OPTIONS = {
    "raw": ("extent_size_hint", "nocow", "preallocation"),
    "qcow2": (
        "cluster_size",
        "compat",
        "compression_type",
        "extended_l2",
        "extent_size_hint",
        "lazy_refcounts",
        "nocow",
        "preallocation",
        "refcount_bits",
    ),
}


def create(path: str, format: str, size: int, options: str, waiting: "Callable[[], None]", timeout: float) -> None:
    """Make an empty image of SIZE bytes in the existing file PATH.  OPTIONS as in `_options`."""
    if _format(format, _MADE) == "raw" and not options:
        os.truncate(path, size)  # the same, without a process
        return
    _run("create", ["-f", format] + _options(options, format) + ["--", _file(path), str(size)], waiting, timeout)


def convert(
    source: str, source_format: str, target: str, target_format: str, waiting: "Callable[[], None]", timeout: float
) -> None:
    """Write the image SOURCE into the existing file TARGET in TARGET_FORMAT; zeros become holes.

    It is not on the disk yet when this returns: qemu-img does not flush it.  Raises NoSpace, CommandFailed.
    """
    arguments = ["-f", _format(source_format), "-O", _format(target_format, _MADE)]
    if target_format == "raw":
        # In qcow2 the order of writing is the order on the disk, and it gains nothing: 0.30 s against 0.29 s
        # for 700 MB of data in 8 GiB; into raw 0.29 s against 1.15 s.
        arguments.append("-W")
    _run("convert", arguments + ["--", _file(source), _file(target)], waiting, timeout)


def grow(path: str, format: str, size: int, waiting: "Callable[[], None]", timeout: float) -> None:
    """Let the disk in the image have SIZE bytes if it has fewer."""
    if _format(format, _MADE) == "raw":
        if size > os.stat(path).st_size:
            os.truncate(path, size)
    elif size > virtual_size(path):
        _run("resize", ["-f", format, "--", _file(path), str(size)], waiting, timeout)


def virtual_size(path: str) -> int:
    """The bytes of the disk in the qcow2 image at PATH; raises BadImage if it is not one."""
    return int.from_bytes(_header(path)[24:32], "big")


def is_overlay(path: str) -> bool:
    """Whether the qcow2 image at PATH has a backing file; raises BadImage if it is not one."""
    return _header(path)[8:16] != bytes(8)


def _header(path: str) -> bytes:
    with open(path, "rb") as file:
        header = file.read(32)
    if header[:4] != b"QFI\xfb" or len(header) < 32:
        raise BadImage("{} should be a qcow2 image and is none; the FORMAT of the disk is wrong".format(path))
    return header


def _format(name: str, allowed: "Tuple[str, ...]" = FORMATS) -> str:
    if name not in allowed:
        text = "'{}' is not an image format that can be used here: it must be {}"
        raise UsageError(text.format(name, ", ".join(allowed)))
    return name


def _file(path: str) -> str:
    return os.path.join(os.getcwd(), path)


def _options(text: str, format: str) -> "List[str]":
    """The arguments for `cluster_size=2M,compat=1.1`, which an administrator may have written with `-o` before it.

    Raises ConfigError for what is not an option of the format's own layout, such as backing_file and data_file.
    """
    text = re.sub(r"^\s*-o\b", "", text).strip()
    if not text:
        return []
    for option in text.split(","):
        name, _, value = option.partition("=")
        if name not in _OPTIONS[format] or not re.match(r"[A-Za-z0-9.]+\Z", value):
            known = ", ".join(_OPTIONS[format])
            raise ConfigError("'{}' is not an option for making a {} image; known: {}".format(option, format, known))
    return ["-o", text]


def _run(command: str, arguments: "List[str]", waiting: "Callable[[], None]", timeout: float) -> None:
    # The image may be anybody's: what it makes qemu-img allocate has an end (CVE-2015-5162 was one without).
    argv = ["prlimit", "--as={}".format(_MEMORY), "qemu-img", command, "-q"] + arguments
    what = "qemu-img {}".format(command)
    # The locks go along: if we are killed, what it still writes stays ours until it has ended.
    fds = lock.inherited()
    result = run(argv, timeout, what=what, pass_fds=fds, waiting=waiting, patient=True, check=False)
    if not result.status:
        return
    complaint = result.complaint()
    if complaint.startswith("prlimit: failed to execute"):
        raise MissingProgram("qemu-img is not installed: install the package qemu-utils")
    if b"No space left on device" in result.stderr:
        raise NoSpace("{}: {}".format(what, complaint))
    if b"Is another process using the image" in result.stderr:
        raise InUse("{}: another process uses {}".format(what, complaint.partition("[")[2].rpartition("]")[0]))
    raise CommandFailed("{} failed ({}): {}".format(what, result.status, complaint or "it gave no reason"), result)
