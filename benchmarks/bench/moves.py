"""The ways to bring an image from the front-end to a host, of which several parts measure one or the other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

from bench import images
from bench.cloud import Cloud, Sample
from bench.contest import Ways

# As tm/ssh/clone of the stock drivers has it.
TAR = 'tar -C "$dir" --transform="flags=r;s|$name|disk.0|" -cSf - "$name" | $ssh host01 "tar -C $vm -xSf -"'
PIPE = 'cat "$dir/$name" | $fast host01 "cat >$vm/disk.0"'
RSYNC = 'rsync --inplace --whole-file -e "$fast" "$dir/$name" "host01:$vm/disk.0"'
# The host offers its disk by NBD, through ssh.
QEMU = """
exec 3< <($fast -o ExitOnForwardFailure=yes -L "$work/near:$work/far" host01 "
    truncate -s $size $vm/disk.0
    qemu-nbd -k $work/far -f raw --discard=unmap $vm/disk.0 & nbd=\\$!
    while [ ! -S $work/far ]; do sleep 0.01; done
    echo up; wait \\$nbd" </dev/null)
read -r up <&3
qemu-img convert -n --target-is-zero -f raw -O raw -W -m 8 "$dir/$name" "nbd:unix:$work/near"
read -r up <&3 || rm -f "$work/near" "$work/far"
"""


def clones(
    cloud: Cloud, image: str, verify: Sequence[str] = ("",), others: Sequence[str] = ("rsync", "qemu-img")
) -> Ways:
    """The ways to give host01 a copy of IMAGE: the pipe, the stock ones, OTHERS, and ours with each of VERIFY."""
    size = os.path.getsize(image)
    cloud.document(size)
    directory, name = os.path.split(image)
    disk = f"{cloud.vm}/disk.0"
    there = cloud.on("host01", disk)
    os.makedirs(os.path.dirname(there), exist_ok=True)
    values = {"dir": directory, "name": name, "vm": cloud.vm, "work": cloud.work, "size": str(size)}
    arguments = "tm/ssh/clone", f"{cloud.front_end}:{image}", f"host01:{disk}"

    def checked(way: str, run: Callable[[], Sample]) -> Callable[[], Sample]:
        def go() -> Sample:
            cloud.clear(there)
            sample = run()
            images.check_same(image, there)
            if way.startswith("ours") and images.allocated(there) > 1.1 * images.allocated(image) + (1 << 20):
                raise ValueError(f"{there} takes more room than {image}")
            cloud.clear(there)
            return sample

        return go

    ways = {"pipe": lambda: cloud.shell(PIPE, **values), "stock": lambda: cloud.shell(TAR, **values)}
    if cloud.stock:
        ways["stock_driver"] = lambda: cloud.of_stock(*arguments)
    if "rsync" in others and shutil.which("rsync"):
        ways["rsync"] = lambda: cloud.shell(RSYNC, **values)
    if "qemu-img" in others and shutil.which("qemu-nbd"):
        ways["qemu_img"] = lambda: cloud.shell(QEMU, **values)
    for mode in verify:
        ways[f"ours_{mode}" if mode else "ours"] = lambda mode=mode: cloud.ours(*arguments, verify=mode)  # type: ignore[misc]
    return {way: checked(way, run) for way, run in ways.items()}


def warm_up(cloud: Cloud) -> None:
    """Have the connections that a front-end keeps."""
    image = f"{cloud.images}/small"
    images.dense(image, 1 << 20)
    for way, run in clones(cloud, image).items():
        if way in ("ours", "stock_driver"):
            run()
    os.unlink(image)
