"""A dense image goes from the front-end to a host, both of them this machine: how fast, with each way of verifying it.

The limit is `cat image | ssh -c aes128-gcm@openssh.com host 'cat >disk'`.  Both ends and the cipher share this
machine's processors, so it is their CPU time that decides: it is compared too, as what others do to a machine
disturbs it less.
"""

from __future__ import annotations

from bench import images, moves
from bench.cloud import Cloud
from bench.contest import Contest, Findings, Options

SIZE = 4 << 30
VERIFY = ("none", "checksum", "digest")


def measure(options: Options) -> Findings:
    found = Findings()
    with Cloud(options.stock) as cloud:
        image = f"{cloud.images}/dense"
        images.dense(image, options.size or SIZE)
        moves.warm_up(cloud)
        contest = Contest("throughput.dense", moves.clones(cloud, image, VERIFY), options.rounds)
        contest.tell(found)
        for mode in VERIFY:
            name = "throughput.dense" if mode == "none" else f"throughput.dense_{mode}"
            for other in contest.samples:
                if other in ("pipe", "stock"):
                    found.ratios[f"{name}.cpu_vs_{other}"] = contest.thrift(f"ours_{mode}", other)
                if not other.startswith("ours"):
                    found.ratios[f"{name}.vs_{other}"] = contest.speed(f"ours_{mode}", other)
        found.ratios["throughput.peak_mib"] = contest.peak()
    return found
