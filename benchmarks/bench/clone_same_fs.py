"""Images on a file system with reflinks (an xfs on a loop device, which takes root) are cloned within it by tm/shared.

An empty image, one of 1 GiB, and one of 1 TiB that is full: the same GiB again and again, by reflinks.  A clone should
take no longer for what is in it: `clone_same_fs.extra_ms` is how much longer the slower of the two takes than the
empty one, in milliseconds.  The limit is `cp --reflink=always` on the host.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable

from bench import images
from bench.cloud import Cloud, Sample
from bench.contest import Contest, Findings, Options

GIB = 1 << 30
NAMES = {"empty": 0, "1g": GIB, "1t": 1 << 40}
FICLONERANGE = 0x4020940D
REFLINK = '$ssh host01 "mkdir -p $vm && cp --reflink=always $image $vm/disk.0"'


def measure(options: Options) -> Findings:
    found = Findings()
    with Cloud(options.stock, reflink=True) as cloud:
        paths = {name: f"{cloud.images}/{name}" for name in NAMES}
        images.dense(paths["1g"], GIB)
        _full(paths["1t"], options.size or NAMES["1t"], paths["1g"])
        with open(paths["empty"], "wb") as file:
            file.truncate(GIB)
        os.sync()
        ways: dict[str, Callable[[], Sample]] = {}
        for name, path in paths.items():
            ways.update({f"{name}.{way}": run for way, run in _ways(cloud, path).items()})
        for run in ways.values():
            run()  # connections that are kept
        contest = Contest("clone_same_fs", ways, 3 * options.rounds)  # they are short
        contest.tell(found)
        for way in dict.fromkeys(way.partition(".")[2] for way in ways):
            extra = max(contest.median(f"{name}.{way}") - contest.median(f"empty.{way}") for name in ("1g", "1t"))
            suffix = "" if way == "ours" else f".{way}"
            found.ratios[f"clone_same_fs.extra_ms{suffix}"] = round(extra * 1000, 1)
            if way != "ours":
                found.ratios[f"clone_same_fs.vs_{way}"] = contest.speed("1t.ours", f"1t.{way}")
    return found


def _full(path: str, size: int, block: str) -> None:
    """An image of SIZE bytes, all of it reflinks of BLOCK."""
    with open(path, "wb") as file, open(block, "rb") as source:
        length = os.path.getsize(block)
        for offset in range(0, size, length):
            fcntl.ioctl(file, FICLONERANGE, struct.pack("=qQQQ", source.fileno(), 0, length, offset))


def _ways(cloud: Cloud, image: str) -> dict[str, Callable[[], Sample]]:
    disk = f"{cloud.vm}/disk.0"
    arguments = "tm/shared/clone", f"{cloud.front_end}:{image}", f"host01:{disk}"

    def checked(run: Callable[[], Sample]) -> Callable[[], Sample]:
        def go() -> Sample:
            cloud.document(os.path.getsize(image))
            cloud.clear(disk)
            sample = run()
            if images.allocated(disk) != images.allocated(image):
                raise ValueError(f"{disk} is no reflink of {image}")
            if images.allocated(image) <= GIB:
                images.check_same(image, disk)
            cloud.clear(disk)
            return sample

        return go

    ways = {"reflink": checked(lambda: cloud.shell(REFLINK, vm=cloud.vm, image=image))}
    if cloud.stock:
        ways["stock_driver"] = checked(lambda: cloud.of_stock(*arguments))
    ways["ours"] = checked(lambda: cloud.ours(*arguments))
    return ways
