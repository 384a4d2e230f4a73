"""qemu-img, one function per sub-command, the format always given.

What a guest has written into a raw disk can look like any format, so none is ever guessed: a format is a
mandatory argument here and one of FORMATS.  A path is a file's, whatever it looks like (`json:{...}`, `nbd:x`):
qemu takes what stands before a colon as a protocol only if no slash comes first.

WAITING is called now and then while qemu-img works and may raise; TIMEOUT is seconds without progress.
"""

import os
import re
import signal
import stat
import struct

from madrigal.command import CommandFailed, run
from madrigal.errors import BadImage, ConfigError, InUse, MissingProgram, NoSpace, NotSupported, UsageError
from madrigal.onhost import lock, part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, List, Optional, Tuple

    from madrigal.command import Result

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")

_MADE = ("raw", "qcow2")
_HEADER = 64 << 10  # bytes: the name of the backing file lies in the first cluster, mostly in its first KiB
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 4  # of the incompatible features
_STEP = 1 << 30  # bytes that are reserved at a time
_MEMORY = 2 << 30  # bytes of address space; converting 100 GiB of qcow2 needs 400 MB
_TABLE = 32 << 20  # bytes of the table where an image's data are found; qemu takes no larger one either
_TEXT = 32 << 20  # bytes of a list of an image's pieces, a hundred or so for each
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
    done = _run("create", ["-f", format] + _options(options, format) + ["--", _file(path), str(size)], waiting, timeout)
    _believe(done, path, format, size)


def overlay(
    path: str,
    size: int,
    backing: str,
    backing_format: str,
    options: str,
    waiting: "Callable[[], None]",
    timeout: float,
) -> None:
    """Make an empty qcow2 image of SIZE bytes on BACKING in the existing file PATH.  OPTIONS as in `_options`.

    BACKING, which is not opened, stands in the image as it is given: relative to the directory of the image.
    """
    on = ["-u", "-b", _backing(backing), "-F", _format(backing_format)]
    arguments = ["-f", "qcow2"] + on + _options(options, "qcow2")
    _believe(_run("create", arguments + ["--", _file(path), str(size)], waiting, timeout), path, "qcow2", size)


def rebase(path: str, backing: str, backing_format: str, waiting: "Callable[[], None]", timeout: float) -> None:
    """Let the qcow2 image at PATH lie on BACKING (as for `overlay`; "": on nothing), with the same content.

    It holds that content at every moment, so it may be killed.  It is not on the disk yet when this returns.
    """
    on = ["-b", _backing(backing), "-F", _format(backing_format)] if backing else ["-b", ""]
    _moved(_run("rebase", ["-f", "qcow2"] + on + ["--", _file(path)], waiting, timeout), path, backing)


def rename_backing(path: str, backing: str, backing_format: str, waiting: "Callable[[], None]", timeout: float) -> None:
    """Let the qcow2 image at PATH have another name for the backing file that it lies on, which is not opened."""
    on = ["-u", "-b", _backing(backing), "-F", _format(backing_format)]
    _moved(_run("rebase", ["-f", "qcow2"] + on + ["--", _file(path)], waiting, timeout), path, backing)


def convert(
    source: str,
    source_format: str,
    target: str,
    target_format: str,
    waiting: "Callable[[], None]",
    timeout: float,
    options: str = "",
    in_use: bool = False,
) -> None:
    """Write the image SOURCE into the existing file TARGET in TARGET_FORMAT; zeros become holes.

    OPTIONS as in `_options`.  IN_USE: a guest that stands still has SOURCE open.  It is not on the disk yet when this
    returns: qemu-img does not flush it.  Raises NoSpace, CommandFailed.
    """
    arguments = ["-f", _format(source_format), "-O", _format(target_format, _MADE)] + _options(options, target_format)
    if in_use:
        arguments.append("-U")
    if target_format == "raw":
        # In qcow2 the order of writing is the order on the disk, and it gains nothing: 0.30 s against 0.29 s
        # for 700 MB of data in 8 GiB; into raw 0.29 s against 1.15 s.
        arguments.append("-W")
    _believe(_run("convert", arguments + ["--", _file(source), _file(target)], waiting, timeout), target, target_format)


def convert_range(
    source: str,
    source_format: str,
    target: str,
    target_format: str,
    start: int,
    end: int,
    waiting: "Callable[[], None]",
    timeout: float,
) -> None:
    """Write what the disk in SOURCE has from START to END to the same place of TARGET, where there are only zeros.

    Raises NotSupported if this qemu-img cannot leave zeros out of an image that exists.
    """
    # raw, on top of the format that is given: a window
    arguments = ["-n", "--target-is-zero", "--image-opts", "--target-image-opts"]
    if _format(target_format, _MADE) == "raw":
        arguments.append("-W")
    window = "driver=raw,offset={},".format(start)
    if source_format == "raw":
        end = min(end, os.stat(source).st_size)
    # a raw image may end within a sector, of which a window knows nothing
    length = "size={},".format(end - start) if (end - start) % 512 == 0 else ""
    try:
        _run(
            "convert",
            arguments + ["--", window + length + _node(source, source_format), window + _node(target, target_format)],
            waiting,
            timeout,
        )
    except CommandFailed as error:
        if b"unrecognized option" not in error.result.stderr:
            raise
        raise NotSupported("this qemu-img is older than 5.0") from None


def extents(
    path: str, format: str, room: int, waiting: "Callable[[], None]", timeout: float
) -> "Iterator[Tuple[int, int, Optional[int]]]":
    """(start, length, offset) of every piece of the disk in the image at PATH, in order.

    The offset is where it lies in the file, None if that is not to be told, -1 for zeros.  ROOM: an empty file to work
    in.  Raises NotSupported if there are very many, or in a form that is not known.
    """
    try:
        _run("map", ["-f", _format(format), "--output=json", "--", _file(path)], waiting, timeout, room)
    except CommandFailed as error:
        if error.result.status != 128 + signal.SIGXFSZ:
            raise
        raise NotSupported("the image is in very many pieces") from None
    return _listed(room)


def _listed(fd: int) -> "Iterator[Tuple[int, int, Optional[int]]]":
    import json

    with open(fd, "rb", closefd=False) as lines:
        lines.seek(0)
        for line in lines:  # each has one
            try:
                about = json.loads(line.strip(b"[],\n").decode())
                start, length = about["start"], about["length"]
                offset = about.get("offset") if about["data"] else -1
                numbers = [start, length, -1 if offset is None else offset]
                if not all(type(number) is int and -1 <= number < 1 << 62 for number in numbers):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise NotSupported("qemu-img says what the image is made of in a way that is not known here") from None
            yield start, length, offset


def grow(path: str, format: str, size: int, waiting: "Callable[[], None]", timeout: float) -> None:
    """Let the disk in the image have SIZE bytes if it has fewer."""
    if _format(format, _MADE) == "raw":
        if size > os.stat(path).st_size:
            os.truncate(path, size)
    elif size > virtual_size(path):
        _believe(_run("resize", ["-f", format, "--", _file(path), str(size)], waiting, timeout), path, format, size)


def resize(path: str, format: str, size: int, preallocate: bool, waiting: "Callable[[], None]", timeout: float) -> None:
    """Let the disk in the file PATH have SIZE bytes; PREALLOCATE: with room on the disk for what it grows by.

    Raises NotSupported for fewer bytes than it has: what a guest has there would be lost.
    """
    _format(format, _MADE)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise NotSupported("{} is not a file, and other disks cannot be resized by this driver".format(path))
    now = found.st_size if format == "raw" else virtual_size(path)
    if size < now:
        text = "{} has {:g} MiB and cannot shrink to {:g} MiB: what is behind that would be lost"
        raise NotSupported(text.format(path, now / (1 << 20), size / (1 << 20)))
    if format != "raw":
        if size > now:
            more = ["--preallocation=falloc"] if preallocate else []
            done = _run("resize", more + ["-f", format, "--", _file(path), str(size)], waiting, timeout)
            _believe(done, path, format, size)
    elif preallocate:
        try:
            fill(path, now, size, waiting)
        except BaseException:
            os.truncate(path, now)
            raise
    else:
        os.truncate(path, size)


def fill(path: str, start: int, size: int, waiting: "Callable[[], None]") -> None:
    """Let the raw image at PATH have SIZE bytes, with room on the disk for all of them from START on."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for offset in range(start, size, _STEP):
            waiting()
            os.posix_fallocate(fd, offset, min(_STEP, size - offset))
    except OSError as error:
        error.filename = path  # the call itself knows only the descriptor
        raise
    finally:
        os.close(fd)


def preallocated(options: str) -> str:
    """OPTIONS for making a qcow2 image, and that it takes all its room at once, if they do not say how it does."""
    if "preallocation=" in options:
        return options
    return options.rstrip() + ("," if options.strip() else "") + "preallocation=falloc"


def virtual_size(path: str) -> int:
    """The bytes of the disk in the qcow2 image at PATH; raises BadImage if it is not one."""
    return int.from_bytes(_header(path)[24:32], "big")


def is_overlay(path: str) -> bool:
    """Whether the qcow2 image at PATH has a backing file; raises BadImage if it is not one."""
    return _header(path)[8:16] != bytes(8)


def backing(path: str) -> "Optional[Tuple[str, str]]":
    """The backing file that the qcow2 image at PATH names, and its format ("": it does not say); None without one.

    Raises BadImage if it is no qcow2 image, or if its data are in yet another file.
    """
    header = _header(path)
    offset, length = struct.unpack(">QI", header[8:20])
    start = 72
    if header[4:8] != b"\0\0\0\2":
        if header[79] & _DATA_FILE:
            raise BadImage("{} has its data in another file, which is not supported here".format(path))
        start = int.from_bytes(header[100:104], "big")
    if not offset:
        return None
    if offset + length > len(header):
        raise BadImage("{} has a damaged header: its backing file is not named where it should be".format(path))
    format = ""
    while start + 8 <= offset:
        kind, size = struct.unpack(">II", header[start : start + 8])
        if not kind:
            break
        if kind == _BACKING_FORMAT:
            format = header[start + 8 : start + 8 + size].decode("ascii", "replace")
        start += 8 + (size + 7) // 8 * 8
    return os.fsdecode(header[offset : offset + length]), format


def is_empty(path: str) -> bool:
    """Whether nothing was ever written to the qcow2 image at PATH: it shows what it lies on."""
    header = _header(path)
    entries, offset = struct.unpack(">IQ", header[36:48])
    with open(path, "rb") as file:
        if 8 * entries > _TABLE or offset + 8 * entries > os.fstat(file.fileno()).st_size:
            raise BadImage("{} has a damaged header: nobody can say where its data are".format(path))
        file.seek(offset)
        return not any(file.read(8 * entries))


def _header(path: str) -> bytes:
    with part.opened(path) as file:
        header = file.read(_HEADER)
    if header[:4] != b"QFI\xfb" or len(header) < 104:
        raise BadImage("{} should be a qcow2 image and is none; the FORMAT of the disk is wrong".format(path))
    return header


def _backing(name: str) -> str:
    if ":" in name.partition("/")[0]:
        raise BadImage("'{}' is not the name of a backing file that can be used here".format(name))
    return name


def _format(name: str, allowed: "Tuple[str, ...]" = FORMATS) -> str:
    if name not in allowed:
        text = "'{}' is not an image format that can be used here: it must be {}"
        raise UsageError(text.format(name, ", ".join(allowed)))
    return name


def _file(path: str) -> str:
    return os.path.join(os.getcwd(), path)


def _node(path: str, format: str) -> str:
    """What a window on the image at PATH lies on, as an option; a comma in a name is written twice."""
    file = "driver=file,file.filename=" if format == "raw" else "driver={},file.file.driver=file,file.file.filename="
    return "file." + file.format(_format(format)) + _file(path).replace(",", ",,")


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


def _believe(done: "Result", path: str, format: str, size: int = 1) -> None:
    """That there is an image of SIZE bytes in PATH, as DONE says.

    A wrapper in PATH or a disk that was just taken away can end well and have done nothing.
    """
    found = os.stat(path).st_size if os.path.exists(path) else 0
    if format == "qcow2" and found:
        found = size if size == 1 else virtual_size(path)
    if found < size:
        raise CommandFailed(
            "qemu-img said that all went well, but has not made {} what it should be".format(path), done
        )


def _moved(done: "Result", path: str, name: str) -> None:
    """That the image at PATH lies on NAME, as DONE says: what it lay on may be about to go."""
    found = backing(path)
    if (found[0] if found else "") != name:
        raise CommandFailed("qemu-img said that all went well, but {} lies on what it did".format(path), done)


def _run(
    command: str, arguments: "List[str]", waiting: "Callable[[], None]", timeout: float, output: "Optional[int]" = None
) -> "Result":
    # The image may be anybody's: what it makes qemu-img allocate has an end (CVE-2015-5162 was one without).
    limits = ["prlimit", "--as={}".format(_MEMORY)]
    if output is not None:
        limits += ["--fsize={}".format(_TEXT), "--core=0"]
    argv = limits + ["qemu-img", command] + ([] if command == "map" else ["-q"]) + arguments
    what = "qemu-img {}".format(command)
    # The locks go along: if we are killed, what it still writes stays ours until it has ended.
    fds = lock.inherited()
    result = run(argv, timeout, what=what, pass_fds=fds, waiting=waiting, patient=True, check=False, output=output)
    if not result.status:
        return result
    complaint = result.complaint()
    if complaint.startswith("prlimit: failed to execute"):
        raise MissingProgram("qemu-img is not installed: install the package qemu-utils")
    if b"No space left on device" in result.stderr:
        raise NoSpace("{}: {}".format(what, complaint))
    if b"Is another process using the image" in result.stderr:
        raise InUse("{}: another process uses {}".format(what, complaint.partition("[")[2].rpartition("]")[0]))
    raise CommandFailed("{} failed ({}): {}".format(what, result.status, complaint or "it gave no reason"), result)
