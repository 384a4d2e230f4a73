"""The planner: which ways a transfer has, in which order, and why others are impossible.  Tables; nothing runs."""

from __future__ import annotations

from typing import Any

import pytest

from madrigal.transfer import plan
from madrigal.transfer.plan import COPY_RANGE, DELTA, DIRECT, READ, REFLINK, RENAME, SEVERAL, STREAM

MIB, GIB = 1 << 20, 1 << 30
LOCAL = (RENAME, REFLINK, COPY_RANGE, READ)
FAR = (DIRECT, SEVERAL, STREAM, DELTA)


def file(machine: str = "", **known: Any) -> plan.Place:
    fields = {"kind": "file", "size": 4 * GIB, "allocated": 4 * GIB, "file_system": 1, "fs_type": "xfs", **known}
    return plan.Place(machine, "/ds/0/1/disk.0", **fields)


def nothing(machine: str = "", **known: Any) -> plan.Place:
    return plan.Place(machine, "/ds/0/2/disk.0", **{"file_system": 1, "fs_type": "xfs", **known})


def test_every_cost_says_where_it_comes_from() -> None:
    for name, (number, source) in plan.COSTS.items():
        assert number >= 0 and len(source) > 20, name


ORDERS: dict[str, tuple[plan.Facts, list[str]]] = {
    "a move within a file system": (
        plan.Facts(file(), nothing(), one_machine=True, reflinks=True, is_going=True),
        [RENAME, REFLINK, COPY_RANGE, READ],
    ),
    "a copy within one that cannot share blocks": (
        plan.Facts(file(), nothing(), one_machine=True, reflinks=False),
        [COPY_RANGE, READ],
    ),
    "one that can": (
        plan.Facts(file(), nothing(), one_machine=True, reflinks=True),
        [REFLINK, COPY_RANGE, READ],
    ),
    "subvolumes of one": (
        plan.Facts(file(), nothing(file_system=2), one_machine=True, reflinks=True),
        [REFLINK, COPY_RANGE, READ],
    ),
    "between file systems": (
        plan.Facts(file(), nothing(file_system=2), one_machine=True, reflinks=False, is_going=True),
        [READ],
    ),
    "a directory": (plan.Facts(file(kind="dir"), nothing(), one_machine=True, reflinks=True), [READ]),
    "a block device": (plan.Facts(file(), nothing(kind="device"), one_machine=True), [READ]),
    "from one": (plan.Facts(file(kind="device"), nothing(), one_machine=True), [READ]),
    "storage that a host shares": (
        plan.Facts(file(), nothing("host01"), sees="host01", reflinks=False, is_going=True),
        [RENAME, COPY_RANGE, READ],
    ),
    "little to a host": (plan.Facts(file(allocated=MIB), nothing("host01"), rtt=0.04), [STREAM]),
    "much to a host that is near": (plan.Facts(file(), nothing("host01"), rtt=0.0005), [STREAM, SEVERAL]),
    "to one that is far": (plan.Facts(file(), nothing("host01"), rtt=0.04), [SEVERAL, STREAM]),
    "between two hosts": (
        plan.Facts(file("host01"), nothing("host02"), rtt=0.0005),
        [DIRECT, STREAM, SEVERAL],
    ),
    "that cannot reach each other": (
        plan.Facts(file("host01"), nothing("host02"), rtt=0.0005, no_direct="host01 has no key for host02"),
        [STREAM, SEVERAL],
    ),
    "what is made while it is sent": (plan.Facts(file(), nothing("host01"), rtt=0.04, is_plain=False), [STREAM]),
    "a block device that is far": (plan.Facts(file(), nothing("host01", kind="device"), rtt=0.04), [STREAM]),
    "an older copy, and a slow line": (
        plan.Facts(file(), file("host01", old=4 * GIB), rtt=0.0005, limit=10e6),
        [DELTA, STREAM, SEVERAL],
    ),
    "one with little of it": (
        plan.Facts(file(), file("host01", old=GIB), rtt=0.0005),
        [STREAM, SEVERAL, DELTA],
    ),
    "a small one": (plan.Facts(file(allocated=MIB), file("host01", old=MIB), rtt=0.0005), [STREAM, DELTA]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name: str) -> None:
    facts, expected = ORDERS[name]
    found = plan.ways(facts)
    assert [way.name for way in found if way.is_possible] == expected
    assert {way.name for way in found} == {*LOCAL, *FAR}
    seconds = [way.seconds for way in found if way.seconds is not None]
    assert seconds == sorted(seconds) and found[-1].seconds is None
    assert all(way.why for way in found)


REASONS: list[tuple[plan.Facts, str, str]] = [
    (plan.Facts(file(), nothing(), one_machine=True), RENAME, "the source stays"),
    (
        plan.Facts(file(), nothing(file_system=2), one_machine=True, is_going=True),
        RENAME,
        "source and destination are on different file systems",
    ),
    (plan.Facts(file(), nothing(), one_machine=True), REFLINK, "nobody has asked xfs"),
    (
        plan.Facts(file(fs_type="ext4"), nothing(), one_machine=True, reflinks=False),
        REFLINK,
        "ext4 cannot share blocks between files",
    ),
    (plan.Facts(file(), nothing("host01")), READ, "host01 does not see the storage of this machine"),
    (plan.Facts(file(), nothing(), one_machine=True), STREAM, "both are on one machine"),
    (plan.Facts(file(), nothing("host01"), sees="host01"), STREAM, "host01 sees both on shared storage"),
    (plan.Facts(file(), nothing("host01")), DIRECT, "one of the ends is this machine: there is no shorter way"),
    (plan.Facts(file(), nothing("host01")), DELTA, "there is no older copy at the destination"),
    (
        plan.Facts(file(), nothing("host01", kind="device")),
        SEVERAL,
        "/ds/0/2/disk.0 is a block device, which is written in order",
    ),
]


@pytest.mark.parametrize(("facts", "name", "why"), REASONS, ids=[why for _, _, why in REASONS])
def test_reason(facts: plan.Facts, name: str, why: str) -> None:
    (way,) = (way for way in plan.ways(facts) if way.name == name)
    assert (way.seconds, way.why) == (None, why)


def test_what_an_interrupted_run_has_left_is_not_sent_again() -> None:
    def seconds(left: int) -> float:
        facts = plan.Facts(file(), nothing("host01", left=left), rtt=0.0005, limit=50e6)
        (way,) = (way for way in plan.ways(facts) if way.name == STREAM)
        assert way.seconds is not None
        return way.seconds

    assert seconds(3 * GIB) < seconds(0) / 2


def test_offers_of_a_storage() -> None:
    """A module's own way stands among the others, by its cost."""
    offers = [plan.Offer("clone of a snapshot", 0.2, "the pool has both"), plan.Offer("array", 0, "", "other arrays")]
    found = plan.ways(plan.Facts(file(), nothing(), one_machine=True, reflinks=False, offers=offers))
    assert found[0].document() == {"way": "clone of a snapshot", "seconds": 0.2, "why": "the pool has both"}
    assert next(way for way in found if way.name == "array").document()["seconds"] is None


# -- taking them ------------------------------------------------------------------------------------------------


class Workers:
    def __init__(self, **unfit: str) -> None:
        self.tried: list[str] = []
        self._unfit = unfit

    def __getitem__(self, name: str) -> Any:
        def work() -> str:
            self.tried.append(name)
            if name in self._unfit:
                raise plan.Unfit(self._unfit[name])
            return name

        return work

    def __contains__(self, name: str) -> bool:
        return name in FAR


FACTS = plan.Facts(file("host01"), nothing("host02"), rtt=0.0005)


def test_the_cheapest_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers()
    assert plan.take(FACTS, workers) == DIRECT  # type: ignore[arg-type]
    assert workers.tried == [DIRECT] and capfd.readouterr().err == ""


def test_one_that_fails_before_anything_has_moved_is_followed_by_the_next(capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers(direct="host01 has no key for host02")
    assert plan.take(FACTS, workers) == STREAM  # type: ignore[arg-type]
    assert workers.tried == [DIRECT, STREAM]
    err = capfd.readouterr().err
    assert "the way 'direct' to /ds/0/2/disk.0 does not work: host01 has no key for host02; taking the next" in err


def test_an_error_of_the_work_is_the_error() -> None:
    def fail() -> str:
        raise ValueError("half of it has moved")

    with pytest.raises(ValueError, match="half of it"):
        plan.take(FACTS, {DIRECT: fail, STREAM: lambda: "not reached"})


def test_when_no_way_works() -> None:
    workers = Workers(**{name: f"no {name}" for name in FAR})
    with pytest.raises(plan.Unfit, match="no several connections"):
        plan.take(FACTS, workers)  # type: ignore[arg-type]
    assert workers.tried == [DIRECT, STREAM, SEVERAL]
    with pytest.raises(plan.Unfit, match="there is no way from"):
        plan.take(FACTS, {RENAME: lambda: ""})
