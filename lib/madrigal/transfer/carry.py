"""The bytes of an image or a VM directory on their way from one machine to another.

Much is not sent blindly: what the other side has already, of an interrupted run or of an older copy, is compared by
digests first; and where the way is long several connections share the work.
"""

from __future__ import annotations

import contextlib
import os

from madrigal import config, leftovers
from madrigal.errors import ConfigError, HostUnreachable, MadrigalError
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from madrigal.host import Host
    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession
    from madrigal.onhost.stream import Frame
    from madrigal.transfer.progress import Transfer

    AnySession = LocalSession | RemoteSession
    Arguments = dict[str, Any]

BULK = 128 << 20
"""Bytes from which on a connection of its own, which takes 0.3 s, is faster than sharing the kept one."""

LANES = 4
"""Connections for one transfer where the way is long."""

_ALIKE = 0.5
"""The share of blocks that are to be the same in an older copy: it is read and digested on both sides then, and nobody
knows how fast the way between them is, nor who else needs it."""

_HOW = {
    "part": "going on with what an interrupted copy has left of {}",
    "old": "sending what is not the same as in {}",
    "stale": "the source of {} has been changed since a copy of it was interrupted: starting over",
}


def verification() -> str:
    """How data are checked on their way (onhost/blocks.py), by MADRIGAL_VERIFY; raises ConfigError."""
    chosen = os.environ.get("MADRIGAL_VERIFY") or "checksum"
    kinds = {"none": "none", "checksum": "crc32", "digest": ""}
    if chosen not in kinds:
        raise ConfigError(f"MADRIGAL_VERIFY is '{chosen}', expected none, checksum or digest")
    if not kinds[chosen]:
        from madrigal.onhost import blocks

        return blocks.strong()
    return kinds[chosen]


def session(host: Host, bulk: bool = False) -> AnySession:
    """A session on HOST, in which no more than LIMIT_TRANSFER_BW of tmrc is sent; raises ConfigError."""
    opened = host.session(bulk)
    limit(opened)
    return opened


def limit(opened: AnySession) -> None:
    """The same for a session that is there."""
    allowed = rate()
    if allowed:
        opened.tell("limit", rate=allowed)


def rate() -> int:
    """Bytes a second that LIMIT_TRANSFER_BW of tmrc allows, 0 for any; raises ConfigError."""
    chosen = config.read_shell(f"{config.etc_dir()}/tmrc").get("LIMIT_TRANSFER_BW", "")
    if not chosen:
        return 0
    from madrigal.source import pace

    return pace.parse(chosen, "LIMIT_TRANSFER_BW of tmrc") or 0


def stream(
    origin: AnySession,
    target: AnySession,
    send: Arguments,
    receive: Arguments,
    weight: Arguments,
    old: Arguments | None = None,
    note: Arguments | None = None,
) -> str:
    """Have TARGET receive what ORIGIN sends, with these arguments (onhost/session.py); returns how.

    WEIGHT: as Session.weigh has it.  OLD: where TARGET may have older copies, as for Session.known, and `noted` as for
    Session.compare.  NOTE: as in the terms of a stream.  What TARGET makes of it is not safe yet.
    """
    terms: Arguments = {"verify": verification()}
    if weight["allocated"] < BULK:
        return _told(_bring(origin, target, dict(send, terms=terms), receive))
    terms["squeeze"] = True
    if note:
        terms["note"] = note
    known = target.call("known", path=receive["path"], source=weight["source"], old=(old or {}).get("files"))
    if known["how"]:
        log(_HOW[known["how"]].format(receive["path"]))
    older = known["old"] and _worth_comparing(origin, send["path"], weight, known["old"])
    if older or known["how"] == "part":
        noted, kinds = (old or {}).get("noted", {}), origin.call("kinds")
        terms["known"] = target.call("compare", files=older, noted=noted, kinds=kinds)
    if older:
        log(_HOW["old"].format(" and ".join(sorted(set(older.values())))))
    receive = dict(receive, source=weight["source"])
    # here, because little data are not worth it
    from madrigal.transfer import plan, progress

    with progress.of(receive["path"], 0 if "known" in terms else weight["allocated"]) as shown:
        workers = {
            plan.STREAM: lambda: _bring(origin, target, dict(send, terms=terms), receive, shown),
            plan.SEVERAL: lambda: _Lanes(origin, target, send, receive, terms, shown).run(),
        }
        if older:  # what is taken from there is taken in order
            return _told(workers[plan.STREAM]())
        # what one host gives another passes this machine only if it cannot do so directly
        from_ = "" if target.is_direct else origin.name
        facts = plan.between(from_, target.name, weight, receive, target.distance(origin))
        return _told(plan.take(facts, workers))


def _worth_comparing(origin: AnySession, path: str, weight: Arguments, old: Arguments) -> dict[str, str]:
    """The paths of those OLD files, of which Session.known has samples, that have much in common with what is sent."""
    from madrigal.onhost import blocks

    files = weight.get("files", {"": path})
    wanted = {within: [files[within], about["size"]] for within, about in old.items() if within in files}
    return {
        within: old[within]["path"]
        for within, about in origin.call("sample", files=wanted).items()
        if old[within]["allocated"] >= about["allocated"] // 4
        and blocks.alike(about["blocks"], old[within]["blocks"]) >= _ALIKE
    }


def _bring(
    origin: AnySession,
    target: AnySession,
    send: Arguments,
    receive: Arguments,
    shown: Transfer | None = None,
    check: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
    method: str = "receive",
) -> int:
    """Session.METHOD on TARGET with what Session.send has on ORIGIN; returns the bytes of data.

    SHOWN is told how many.  CHECK is called on the way and END when all but the end has been sent; both may raise.
    """
    if origin.name and target.name:
        from madrigal.host.direct import DirectSession

        if isinstance(target, DirectSession):

            def heard(count: int) -> None:
                if shown:
                    shown.reached(count, target)
                check()

            return target.bring(send, receive, heard, end, method)

    def frames() -> Iterator[Frame]:
        sent = origin.send(**send)
        for frame in shown.follow(sent) if shown else sent:
            check()
            yield frame
        end()

    return target.lane(frames(), **receive) if method == "lane" else target.receive(frames(), **receive)


@contextlib.contextmanager
def followed(frames: Iterator[Frame], path: str, total: int) -> Iterator[Iterator[Frame]]:
    """FRAMES, of which PATH is made, reported on if they have much: TOTAL bytes, 0 if nobody knows."""
    if 0 < total < BULK:
        yield frames
        return
    from madrigal.transfer import progress

    with progress.of(path, total) as shown:
        yield shown.follow(frames)


def notes(session: AnySession, path: str) -> str:
    """Where the digests of the image PATH of this machine are kept, "" for another machine's."""
    if session.name:
        return ""
    leftovers.tidy()
    return f"{config.run_dir()}/{path.replace('/', '%')[-200:]}.blocks"


def _told(count: int) -> str:
    return f"{count} bytes streamed"


class _Lanes:
    """One transfer over several connections, each with its share of every file."""

    def __init__(
        self,
        origin: AnySession,
        target: AnySession,
        send: Arguments,
        receive: Arguments,
        terms: Arguments,
        shown: Transfer,
    ) -> None:
        import threading

        self._origin, self._target, self._shown = origin, target, shown
        self._send, self._receive, self._terms = send, receive, terms
        self._over, self._opened = threading.Event(), threading.Barrier(LANES)
        self._threads = [
            threading.Thread(target=self._bring, args=(number,), daemon=True) for number in range(1, LANES)
        ]
        self._counts: list[int] = []
        self._error: BaseException | None = None

    def run(self) -> int:
        """Returns the bytes of all."""
        for thread in self._threads:
            thread.start()
        try:
            self._wait()
            send, receive = self._share(0), self._receive
            count = _bring(self._origin, self._target, send, receive, self._shown, self._check, self._end)
            return count + sum(self._counts)
        finally:
            self._over.set()
            self._opened.abort()
            for thread in self._threads:
                thread.join()

    def _wait(self) -> None:
        """Return when all connections are there; raises plan.Unfit if one cannot be had."""
        from threading import BrokenBarrierError

        from madrigal.transfer.plan import Unfit

        try:
            self._opened.wait()
        except BrokenBarrierError:
            if not isinstance(self._error, MadrigalError):
                raise self._error or HostUnreachable("a connection was given up") from None
            raise Unfit(str(self._error)) from None

    def _end(self) -> None:
        """Let the session that publishes what all bring wait for it."""
        for thread in self._threads:
            thread.join()
        self._check()

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _share(self, number: int) -> Arguments:
        return dict(self._send, terms=dict(self._terms, lane=[number, LANES]))

    def _bring(self, number: int) -> None:
        try:
            with self._origin.another() as origin, self._target.another(origin) as target:
                limit(origin)
                for session in origin, target:
                    session.call("exists", path="/")
                self._opened.wait()
                to = {"path": self._receive["path"], "source": self._receive["source"]}
                share = self._share(number)
                self._counts.append(_bring(origin, target, share, to, self._shown, self._wanted, method="lane"))
        except BaseException as error:
            self._error = self._error or error
            self._opened.abort()

    def _wanted(self) -> None:
        if self._over.is_set() or self._error:
            raise HostUnreachable("another connection of the same transfer has failed")
