"""Make a file system, or swap space, in a raw image."""

from madrigal.command import CommandFailed, run
from madrigal.errors import NoSpace, UsageError
from madrigal.onhost import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List

# What makes each mkfs overwrite without asking and without talking.
_MKFS = {
    "ext2": ["-F", "-q"],
    "ext3": ["-F", "-q"],
    "ext4": ["-F", "-q"],
    "xfs": ["-f", "-q"],
    "btrfs": ["-f", "-q"],
    "reiserfs": ["-f", "-q"],
    "jfs": ["-q"],
    "ntfs": ["-F", "-Q", "-q"],
    "vfat": [],
}

KNOWN = (*_MKFS, "swap")

_FIRST = 132 << 10  # bytes in which each of them has its head; btrfs and reiserfs begin at 64 KiB


def make(path: str, fs: str, options: "List[str]", waiting: "Callable[[], None]", timeout: float) -> None:
    """Make FS (one of KNOWN) in the image at PATH, all of it; OPTIONS: further words for mkfs."""
    if fs == "swap":
        argv = ["mkswap", "-L", "swap"]
    elif fs in _MKFS:
        argv = ["mkfs." + fs] + _MKFS[fs] + options
    else:
        raise UsageError("'{}' is not a known file system; known are {}".format(fs, ", ".join(KNOWN)))
    try:
        done = run(argv + [path], timeout, pass_fds=lock.inherited(), waiting=waiting, patient=True)
    except CommandFailed as error:
        if b"No space left on device" in error.result.stderr:
            raise NoSpace("no space left to make the file system in {}".format(path)) from None
        raise
    with open(path, "rb") as file:
        if not any(file.read(_FIRST)):
            raise CommandFailed("{} said that all went well, but has written nothing to {}".format(argv[0], path), done)
