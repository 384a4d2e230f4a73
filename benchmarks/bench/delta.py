"""A persistent image of which a guest has changed 2 % goes back to its datastore, behind 1 Gbit/s.

Each way begins with the same: the datastore has the image as it was, and the driver itself has brought it to the host,
by `ln`, where 2 % of its bytes are then overwritten.  `delta` has blocks of 1 MiB changed, at random; `delta.scattered`
blocks of 64 KiB, which is as hard as a guest can make it.  The stock way has no part in how they lie.  `delta.reflink`
has all on an xfs, where what is the same is shared with the image as it was, and not copied; that takes root.  The disk
of the guest is in memory in both: how fast it would be read is not ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from bench import images, moves
from bench.cloud import MEMORY, Cloud, Sample
from bench.contest import Contest, Findings, Options

SIZE = 4 << 30
RATE = 1e9
CHANGED = 0.02

# As tm/ssh/mvds of the stock drivers has it, but that the front-end needs no sshd.
TAR = '$ssh host01 "tar -C $vm --transform=\\"flags=r;s|disk.0|$name|\\" -cSf - disk.0" | tar -C "$dir" -xSf -'
PIPE = '$fast host01 "cat $vm/disk.0" | cat >"$dir/$name"'
RSYNC = 'rsync --inplace --no-whole-file -e "$fast" "host01:$vm/disk.0" "$dir/$name"'


def measure(options: Options) -> Findings:
    found = Findings()
    _measure(options, found, reflink=False)
    if os.geteuid() == 0:
        _measure(options, found, reflink=True)
    return found


def _measure(options: Options, found: Findings, reflink: bool) -> None:
    with Cloud(options.stock, reflink) as cloud:
        # The stock driver's data goes from the host to the front-end's sshd, ours the other way round.
        links = [cloud.link(name, rate=RATE) for name in ("host01", cloud.front_end)]
        image, disk = f"{cloud.images}/persistent", f"{cloud.vm}/disk.0"
        images.dense(image, options.size or SIZE)
        moves.warm_up(cloud)
        there = cloud.on("host01", disk)
        cloud.document(os.path.getsize(image), PERSISTENT="YES")
        values = {"dir": cloud.images, "name": "persistent", "vm": cloud.vm}
        ends = f"host01:{disk}", f"{cloud.front_end}:{image}"

        def way(
            run: Callable[[], Sample], block: int, bring: Callable[[], Sample] | None = None
        ) -> Callable[[], Sample]:
            def go() -> Sample:
                for link in links:
                    link.tell("rate 0")
                cloud.clear(there)
                if bring:
                    bring()
                else:
                    shutil.copyfile(image, there)
                images.change(there, CHANGED, block)
                # A file that nobody moves, to compare with: mvds takes the disk away.
                wanted = f"{os.path.dirname(there)}/.wanted"
                os.link(there, wanted)
                os.sync()  # or one way writes for another
                images.load(there)  # what is measured is not the disk
                images.touch(MEMORY, os.path.getsize(there))
                for link in links:
                    link.tell(f"rate {RATE}")
                sample = run()
                images.check_same(wanted, image)
                cloud.clear(wanted, there)
                return sample

            return go

        def brought(block: int) -> Callable[[], Sample]:
            return way(
                lambda: cloud.ours("tm/ssh/mvds", *ends), block, lambda: cloud.ours("tm/ssh/ln", *reversed(ends))
            )

        ways = {
            "pipe": way(lambda: cloud.shell(PIPE, **values), 1 << 20),
            "stock": way(lambda: cloud.shell(TAR, **values), 1 << 20),
            "ours": brought(1 << 20),
            "ours_scattered": brought(64 << 10),
        }
        if cloud.stock:
            ways["stock_driver"] = way(lambda: cloud.of_stock("tm/ssh/mvds", *ends), 1 << 20)
        if shutil.which("rsync"):
            ways["rsync"] = way(lambda: cloud.shell(RSYNC, **values), 1 << 20)
        name = "delta.reflink" if reflink else "delta"
        contest = Contest(name, ways, options.rounds)
        contest.tell(found)
        for other in contest.samples:
            if not other.startswith("ours"):
                found.ratios[f"{name}.vs_{other}"] = contest.speed("ours", other)
                found.ratios[f"{name}.scattered.vs_{other}"] = contest.speed("ours_scattered", other)
        found.ratios[f"{name}.peak_mib"] = contest.peak()
