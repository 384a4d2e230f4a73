#!/usr/bin/env python3
"""Tell the room that the disks of VMs take, a line a VM.

usage: monitor_ds DATASTORE_DIRECTORY

A probe of the front-end starts this file on a host, where nothing else of ours is (docs/contract.md, "Sizes of
disks"): it imports the standard library of Python 3.6 alone.  A VM without disks has no line.

exit status: 0 done, 2 usage
"""

import base64
import os
import re
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, List, Optional, Pattern, Tuple

_DISK = re.compile(r"disk\.([0-9]+)\Z")
_NUMBER = re.compile(r"([0-9]+)\Z")
_MIB = 1 << 20


def main(arguments: "List[str]") -> int:
    if arguments in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return 0
    if len(arguments) != 1:
        sys.stderr.write("usage: monitor_ds DATASTORE_DIRECTORY\n")
        return 2
    for line in lines(arguments[0]):
        print(line)
    return 0


def lines(directory: str) -> "Iterator[str]":
    """`VM = [ ID = 17, MONITOR = "base64"]` for each VM with disks in the datastore DIRECTORY."""
    for vm, name in _numbered(directory, _NUMBER):
        text = "\n".join(_sizes(os.path.join(directory, name)))
        if text:
            yield 'VM = [ ID = {}, MONITOR = "{}"]'.format(vm, base64.b64encode(text.encode("ascii")).decode("ascii"))


def _sizes(vm_dir: str) -> "Iterator[str]":
    for disk, name in _numbered(vm_dir, _DISK):
        taken = _taken(os.path.join(vm_dir, name))
        if taken is None:
            continue
        yield "DISK_SIZE = [ ID={}, SIZE={}]".format(disk, taken)
        snapshots = os.path.join(vm_dir, name + ".snap")
        for snapshot, entry in _numbered(snapshots, _NUMBER):
            taken = _taken(os.path.join(snapshots, entry))
            if taken is not None:
                yield "SNAPSHOT_SIZE = [ ID={}, DISK_ID={}, SIZE={}]".format(snapshot, disk, taken)


def _numbered(directory: str, pattern: "Pattern[str]") -> "List[Tuple[int, str]]":
    """The entries of DIRECTORY whose names fit PATTERN, by the number in them; none if it has just been removed."""
    try:
        matches = [pattern.match(name) for name in os.listdir(directory)]
    except OSError:
        return []
    return sorted((int(match.group(1)), match.group()) for match in matches if match)


def _taken(path: str) -> "Optional[int]":
    """MiB of room that what PATH leads to takes, rounded up; None if it has just been removed."""
    try:
        return (os.stat(path).st_blocks * 512 + _MIB - 1) // _MIB
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
