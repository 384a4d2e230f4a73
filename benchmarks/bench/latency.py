"""A dense image goes over a path of 20 ms each way and 2 Gbit/s: what one stream over ssh leaves of it."""

from __future__ import annotations

from bench import images, moves
from bench.cloud import Cloud
from bench.contest import Contest, Findings, Options

SIZE = 1 << 30
DELAY = 20  # ms each way
RATE = 2e9


def measure(options: Options) -> Findings:
    found = Findings()
    with Cloud(options.stock) as cloud:
        cloud.link("host01", DELAY, RATE)
        image = f"{cloud.images}/dense"
        images.dense(image, options.size or SIZE)
        moves.warm_up(cloud)
        contest = Contest("latency", moves.clones(cloud, image), options.rounds)
        contest.tell(found)
        for other in contest.samples:
            if other != "ours":
                found.ratios[f"latency.vs_{other}"] = contest.speed("ours", other)
        found.ratios["latency.peak_mib"] = contest.peak()
    return found
