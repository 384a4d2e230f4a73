"""Ways to do one thing take turns, round by round; what comes of it are medians."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.cloud import Sample

Ways = Mapping[str, Callable[[], Sample]]


@dataclass
class Options:
    """What may be said on the command line."""

    rounds: int
    stock: str = ""
    """A remotes tree to compare with."""
    size: int = 0
    """Bytes of the images, in place of what a part has as its own; 0 for that."""
    drivers: list[str] = field(default_factory=list)
    """Only these transfer drivers, where a part measures several."""


@dataclass
class Findings:
    """What a part has found, by names that begin with the part's."""

    ratios: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Medians."""

    def show(self) -> None:
        for kind, values in (("s", self.seconds), ("", self.ratios)):
            for name, value in values.items():
                print(f"{name:<44}{value:>12.3f} {kind}", flush=True)


class Contest:
    """The samples of WAYS, which take turns in ROUNDS.  NAME is what they move."""

    def __init__(self, name: str, ways: Ways, rounds: int) -> None:
        self.name = name
        self.samples: dict[str, list[Sample]] = {way: [] for way in ways}
        for number in range(1, rounds + 1):
            for way, run in ways.items():
                if sys.stderr.isatty():
                    print(f"\r{name}: round {number} of {rounds}, {way}\033[K", end="", file=sys.stderr, flush=True)
                self.samples[way].append(run())
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)

    def median(self, way: str) -> float:
        """Seconds."""
        return statistics.median(sample.seconds for sample in self.samples[way])

    def speed(self, way: str, other: str) -> float:
        """How many times as fast as OTHER a way is: the median of what the rounds say, each for itself."""
        pairs = zip(self.samples[way], self.samples[other], strict=True)
        return round(statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs), 3)

    def thrift(self, way: str, other: str) -> float:
        """How many times the CPU of a way OTHER takes."""
        pairs = zip(self.samples[way], self.samples[other], strict=True)
        return round(statistics.median(theirs.cpu / ours.cpu for ours, theirs in pairs), 3)

    def peak(self) -> float:
        """MiB of the process of ours that took most."""
        return max(sample.mib for way, samples in self.samples.items() if way.startswith("ours") for sample in samples)

    def tell(self, findings: Findings) -> None:
        """Add the medians."""
        for way in self.samples:
            findings.seconds[f"{self.name}.{way}"] = round(self.median(way), 3)
