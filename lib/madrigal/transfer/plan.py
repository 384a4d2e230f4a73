"""Which ways there are for bytes from one place to another, and what each costs: worked out of facts alone.

The cheapest that works is taken, and the next one when it fails before anything has moved.  Every fact costs a round
trip, so an action asks for one only when the answer makes a difference: on one machine the worker tries the ways of
this machine in the order they have here (onhost/copy.py); whether two machines see one storage a probe file says;
only what is large enough that the rest matters is planned for between machines (transfer/carry.py).  `madrigal
transfer explain` asks for all of them and shows the whole list.
"""

from __future__ import annotations

from madrigal.errors import MadrigalError
from madrigal.messages import log
from madrigal.transfer import carry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TypeVar

    Result = TypeVar("Result")

RENAME = "rename"
REFLINK = "reflink"
COPY_RANGE = "copy_file_range"
READ = "read"
DELTA = "delta"
DIRECT = "direct"
SEVERAL = "several connections"
STREAM = "stream"

_MIB = 1 << 20

COSTS: dict[str, tuple[float, str]] = {
    "publish": (0.005, "seconds to flush and name it: ext4 and XFS, 20 renames with a flush in 0.07 to 0.09 s"),
    "reflink": (0.0, "seconds besides: XFS, 512 MiB in 0.001 s, flush and all"),
    "copy_file_range": (830e6, "bytes a second: ext4, 512 MiB from the page cache, two busy cores"),
    "read": (340e6, "bytes a second: the same, read and written; zeros are looked for and left out"),
    "session": (0.1, "seconds until a worker answers over the connection that is kept"),
    "connection": (0.3, "seconds until a connection of its own is there: key exchange, login, worker"),
    "kept": (190e6, "bytes a second over it: chacha20-poly1305, which is what OpenSSH chooses where nobody asks"),
    "ssh": (400e6, "bytes a second of one of its own: aes128-gcm, loopback, two cores: 404 to 503 MB/s"),
    "relay": (200e6, "bytes a second where this machine decrypts and encrypts again: half of the above"),
    "window": (2 << 20, "bytes that one connection has on its way: OpenSSH's channel window"),
    "digest": (1e9, "bytes a second that are read and digested: 0.5 s of a processor for 512 MiB, SHA-256 in hardware"),
    "changed": (0.1, "share of an older copy that is taken to have changed: nobody knows before the digests are there"),
}
"""What a way costs: (number, its unit and where it comes from).  All measured on one small machine with two cores, so
they put ways in order, and seconds they are only roughly."""


class Unfit(MadrigalError):
    """A way does not work after all; nothing has moved yet, so the next one can be taken."""


class Place:
    """What is known of one side.  `kind`: file, dir, device or nothing; `file_system`: the same number for the same."""

    def __init__(
        self,
        machine: str = "",
        path: str = "",
        kind: str = "nothing",
        size: int = 0,
        allocated: int = 0,
        file_system: int = 0,
        fs_type: str = "",
        old: int = 0,
        left: int = 0,
    ) -> None:
        """OLD: allocated bytes of the file that is to be replaced; LEFT: of what an interrupted run has brought."""
        self.machine, self.path, self.kind = machine, path, kind
        self.size, self.allocated = size, allocated
        self.file_system, self.fs_type = file_system, fs_type
        self.old, self.left = old, left

    @property
    def where(self) -> str:
        """The machine for people."""
        return self.machine or "this machine"


class Offer:
    """A way of its own that the module of a storage has, as a snapshot that is cloned; WHY_NOT, if not for this."""

    def __init__(self, name: str, seconds: float, why: str, why_not: str = "") -> None:
        self.name, self.seconds, self.why, self.why_not = name, seconds, why, why_not


class Facts:
    """All that is known of a transfer.

    ONE_MACHINE: one machine has both ends, or SEES both on storage that two share.  REFLINKS: whether the file systems
    can share blocks (None: not asked).  IS_GOING: the source is not to stay.  RTT: seconds there and back, of the
    longest way.  NO_DIRECT: why the hosts cannot reach each other.  IS_PLAIN: the source is sent as it lies there, and
    in any order.  LIMIT: bytes a second that are allowed, 0 for any.
    """

    def __init__(
        self,
        source: Place,
        target: Place,
        one_machine: bool = False,
        sees: str = "",
        reflinks: bool | None = None,
        is_going: bool = False,
        rtt: float = 0,
        no_direct: str = "",
        is_plain: bool = True,
        limit: float = 0,
        offers: Sequence[Offer] = (),
    ) -> None:
        self.source, self.target = source, target
        self.one_machine, self.sees = one_machine or bool(sees), sees
        self.reflinks, self.is_going = reflinks, is_going
        self.rtt, self.no_direct, self.is_plain, self.limit = rtt, no_direct, is_plain, limit
        self.offers = offers


class Way:
    """One way: SECONDS that it is expected to take, None if it is impossible; WHY says the reason for either."""

    def __init__(self, name: str, seconds: float | None, why: str) -> None:
        self.name, self.seconds, self.why = name, seconds, why

    @property
    def is_possible(self) -> bool:
        return self.seconds is not None

    def document(self) -> dict[str, Any]:
        return {"way": self.name, "seconds": self.seconds, "why": self.why}


def ways(facts: Facts) -> list[Way]:
    """Every way, the cheapest first and the impossible ones last."""
    found = [
        Way(offer.name, None if offer.why_not else offer.seconds, offer.why_not or offer.why) for offer in facts.offers
    ]
    found += [_rename(facts), _reflink(facts), _copy_range(facts), _read(facts)]
    found += [_direct(facts), _stream(facts), _several(facts), _delta(facts)]
    return sorted(found, key=lambda way: float("inf") if way.seconds is None else way.seconds)


def between(
    origin: str, host: str, weight: Mapping[str, Any], receive: Mapping[str, Any], rtt: float = 0, old: int = 0
) -> Facts:
    """What an action knows of a transfer to another machine that is large enough to be planned for.

    ORIGIN and HOST: the machines, "" for this one.  WEIGHT: as Session.weigh has it.  RECEIVE: as Session.receive.
    OLD: as a Place's.
    """
    source = Place(origin, kind="file", allocated=weight["allocated"])
    target = Place(host, receive.get("path", ""), "device" if receive.get("device") else "nothing", old=old)
    return Facts(source, target, rtt=rtt, is_plain=weight.get("is_plain", True))


def is_best(name: str, facts: Facts) -> bool:
    """Whether NAME is the cheapest way."""
    best = ways(facts)[0]
    return best.is_possible and best.name == name


def take(facts: Facts, workers: Mapping[str, Callable[[], Result]]) -> Result:
    """What the worker of the cheapest way returns; of WORKERS, by way, that one is tried whose way is possible.

    One that raises Unfit is followed by the next, and an error of the last is the error.
    """
    possible = [way for way in ways(facts) if way.is_possible and way.name in workers]
    for number, way in enumerate(possible, 1):
        try:
            return workers[way.name]()
        except Unfit as error:
            if number == len(possible):
                raise
            if str(error):
                log(f"the way '{way.name}' to {facts.target.path} does not work: {error}; taking the next", "WARN")
    raise Unfit(f"there is no way from {facts.source.path} to {facts.target.path}")


def _cost(name: str) -> float:
    return COSTS[name][0]


def _size(count: float) -> str:
    return f"{count / _MIB:,.0f} MiB"


# -- on one machine, in the order in which its worker tries them ----------------------------------------------------


def _apart(facts: Facts) -> str:
    """Why nothing can be done on one machine, "" if it can."""
    if facts.one_machine:
        return ""
    return f"{facts.target.where} does not see the storage of {facts.source.where}"


def _no_shared_blocks(facts: Facts) -> str:
    """Why the two ends cannot be names or owners of the same blocks."""
    for place in (facts.source, facts.target):
        if place.kind == "device":
            return f"{place.path} is a block device"
    if facts.source.file_system != facts.target.file_system and not facts.reflinks:  # subvolumes have numbers each
        return "source and destination are on different file systems"
    return ""


def _rename(facts: Facts) -> Way:
    why = "" if facts.is_going else "the source stays"
    if not why and facts.source.file_system != facts.target.file_system:
        why = "source and destination are on different file systems"
    why = why or _apart(facts) or _no_shared_blocks(facts)
    return Way(RENAME, None, why) if why else Way(RENAME, _cost("publish"), "one file system, and the source is to go")


def _reflink(facts: Facts) -> Way:
    why = _apart(facts) or _no_shared_blocks(facts)
    if not why and facts.source.kind == "dir":
        why = "the source is a directory, of which the files are copied one by one"
    if not why and not facts.reflinks:
        name = facts.source.fs_type or "the file system"
        why = f"{name} cannot share blocks between files" if facts.reflinks is False else f"nobody has asked {name}"
    if why:
        return Way(REFLINK, None, why)
    return Way(REFLINK, _cost("publish") + _cost("reflink"), "the file system lets both have the same blocks")


def _copy_range(facts: Facts) -> Way:
    why = _apart(facts) or _no_shared_blocks(facts)
    if not why and facts.source.kind == "dir":
        why = "the source is a directory, of which the files are read"
    if why:
        return Way(COPY_RANGE, None, why)
    seconds = _cost("publish") + facts.source.allocated / _cost("copy_file_range")
    return Way(COPY_RANGE, seconds, f"the kernel copies {_size(facts.source.allocated)} on one machine")


def _read(facts: Facts) -> Way:
    why = _apart(facts)
    if why:
        return Way(READ, None, why)
    seconds = _cost("publish") + facts.source.allocated / _cost("read")
    return Way(READ, seconds, f"{_size(facts.source.allocated)} are read and written")


# -- between machines -----------------------------------------------------------------------------------------------


def _together(facts: Facts) -> str:
    if not facts.one_machine:
        return ""
    return f"{facts.sees} sees both on shared storage" if facts.sees else "both are on one machine"


def _rest(facts: Facts) -> tuple[float, float, str]:
    """(bytes to bring, seconds until it is known which, words) where an interrupted run may have brought some."""
    left, whole = facts.target.left, facts.source.allocated
    if not left:
        return whole, 0, _size(whole)
    rest = max(whole - left, 0)
    return rest, left / _cost("digest"), f"{_size(rest)}, and an interrupted run has left {_size(left)}"


def _rate(facts: Facts, lanes: int = 1, kind: str = "ssh") -> float:
    """Bytes a second over carry.LANES connections of a KIND."""
    rate = _cost(kind)  # more connections have no more processors
    if facts.rtt:
        rate = min(rate, lanes * _cost("window") / facts.rtt)
    return min(rate, facts.limit) if facts.limit else rate


def _here(facts: Facts) -> str:
    """The kind of connection for what passes this machine, which may be neither end."""
    return "relay" if facts.source.machine and facts.target.machine else "ssh"


def _stream(facts: Facts) -> Way:
    why = _together(facts)
    if why:
        return Way(STREAM, None, why)
    count, before, words = _rest(facts)
    if facts.source.allocated < carry.BULK:
        seconds = _cost("session") + before + count / _rate(facts, kind="kept")
    else:
        seconds = _cost("connection") + before + count / _rate(facts, kind=_here(facts))
    over = "through this machine, which reaches both" if _here(facts) == "relay" else "one of the ends is this machine"
    return Way(STREAM, seconds, f"{words}: {over}")


def _several(facts: Facts) -> Way:
    why = _together(facts)
    if not why and facts.target.kind == "device":
        why = f"{facts.target.path} is a block device, which is written in order"
    if not why and not facts.is_plain:
        why = "the source is made while it is sent, in one order"
    if not why and facts.source.allocated < carry.BULK:
        why = f"{_size(facts.source.allocated)} are there before further connections are"
    if why:
        return Way(SEVERAL, None, why)
    count, before, words = _rest(facts)
    seconds = 2 * _cost("connection") + before + count / _rate(facts, carry.LANES, _here(facts))
    return Way(
        SEVERAL, seconds, f"{words} over {carry.LANES} connections, with {facts.rtt * 1000:.1f} ms there and back"
    )


def _direct(facts: Facts) -> Way:
    why = _together(facts)
    if not why and not (facts.source.machine and facts.target.machine):
        why = "one of the ends is this machine: there is no shorter way"
    why = why or facts.no_direct
    if why:
        return Way(DIRECT, None, why)
    count, before, words = _rest(facts)
    seconds = 2 * _cost("connection") + before + count / _rate(facts)
    return Way(DIRECT, seconds, f"{words} from {facts.source.machine} to {facts.target.machine}, past this machine")


def _delta(facts: Facts) -> Way:
    why, old = _together(facts), facts.target.old
    if not why and not old:
        why = "there is no older copy at the destination"
    if why:
        return Way(DELTA, None, why)
    common = min(old, facts.source.allocated) * (1 - _cost("changed"))
    changed = facts.source.allocated - common
    digests = (old + facts.source.allocated) / _cost("digest")
    seconds = _cost("connection") + digests + changed / _rate(facts, kind=_here(facts))
    return Way(DELTA, seconds, f"both sides are read and digested, and about {_size(changed)} may have changed")
