"""Images that are mostly holes, or mostly zeros, beside a dense one with as much data.

100 GiB with 1 GiB of data in extents of 64 KiB, the same in extents of 1 to 8 MiB, and 4 GiB of which all is written,
but three quarters with zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from bench import images, moves
from bench.cloud import Cloud, Sample
from bench.contest import Contest, Findings, Options

GIB = 1 << 30
MIB = 1 << 20
SIZE = 100 * GIB


def measure(options: Options) -> Findings:
    found = Findings()
    size = options.size or SIZE
    data = max(size // 100 // MIB, 1) * MIB if options.size else GIB
    with Cloud(options.stock) as cloud:
        moves.warm_up(cloud)
        paths = {name: f"{cloud.images}/{name}" for name in ("dense_1g", "64k", "1m_8m", "zeros")}
        images.dense(paths["dense_1g"], data)
        images.sparse(paths["64k"], size, data, 64 << 10, 64 << 10)
        images.sparse(paths["1m_8m"], size, data, MIB, 8 * MIB)
        images.sparse(paths["zeros"], 4 * data, data, 64 << 10, 64 << 10, zeros=True)
        ways: dict[str, Callable[[], Sample]] = {}
        for name, path in paths.items():
            others = () if name == "dense_1g" else ("qemu-img",)  # rsync reads 100 GiB of zeros
            for way, run in moves.clones(cloud, path, others=others).items():
                if way != "pipe":
                    ways[f"{name}.{way}"] = _of(cloud, path, run)
        contest = Contest("sparse", ways, options.rounds)
        contest.tell(found)
        names = ("64k", "1m_8m", "zeros")
        for name in names:
            found.ratios[f"sparse.{name}.vs_dense_1g"] = contest.speed(f"{name}.ours", "dense_1g.ours")
            for way in ways:
                kind, _, other = way.partition(".")
                if kind == name and other != "ours":
                    found.ratios[f"sparse.{name}.vs_{other}"] = contest.speed(f"{name}.ours", way)
        found.ratios["sparse.vs_dense_1g"] = min(found.ratios[f"sparse.{name}.vs_dense_1g"] for name in names[:2])
        peak = max(sample.mib for way in ways if way.endswith("ours") for sample in contest.samples[way])
        found.ratios["sparse.peak_mib"] = peak
    return found


def _of(cloud: Cloud, path: str, run: Callable[[], Sample]) -> Callable[[], Sample]:
    import os

    def go() -> Sample:
        cloud.document(os.path.getsize(path))
        return run()

    return go
