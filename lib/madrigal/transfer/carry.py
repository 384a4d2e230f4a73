"""The bytes of an image or a VM directory on their way from one machine to another.

Much is not sent blindly: what the other side has already, of an interrupted run or of an older copy, is compared by
digests first; and where the way is long several connections share the work.
"""

from __future__ import annotations

import os
import time

from madrigal import config
from madrigal.errors import ConfigError, HostUnreachable
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from madrigal.host import Host
    from madrigal.host.local import LocalSession
    from madrigal.host.remote import RemoteSession
    from madrigal.onhost.stream import Frame

    AnySession = LocalSession | RemoteSession
    Arguments = dict[str, Any]

BULK = 128 << 20
"""Bytes from which on a connection of its own, which takes 0.3 s, is faster than sharing the kept one."""

LANES = 4
"""Connections for one transfer where the way is long."""

_LONG = 0.005  # seconds there and back: ssh has 2 MiB on its way at most, 400 MB/s then

_NOTES = ".blocks"
_NOTES_AGE = 30 * 24 * 3600  # seconds

_HOW = {
    "part": "going on with what an interrupted copy has left of {}",
    "old": "sending what is not the same as in what {} was before",
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
    rate = config.read_shell(f"{config.etc_dir()}/tmrc").get("LIMIT_TRANSFER_BW", "")
    if rate:
        from madrigal.source import pace

        opened.tell("limit", rate=pace.parse(rate, "LIMIT_TRANSFER_BW of tmrc"))


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

    WEIGHT: as Session.weigh has it.  OLD: as for Session.known.  NOTE: as in the terms of a stream.  What
    TARGET makes of it is not safe yet.
    """
    terms: Arguments = {"verify": verification()}
    if weight["allocated"] < BULK:
        return _told(_bring(origin, target, dict(send, terms=terms), receive))
    terms["squeeze"] = True
    if note:
        terms["note"] = note
    known = target.call("known", path=receive["path"], source=weight["source"], old=old)
    if known["how"]:
        log(_HOW[known["how"]].format(receive["path"]))
    if known["files"]:
        terms["known"] = known["files"]
    if known["how"] != "old":
        receive = dict(receive, source=weight["source"])
        if target.distance(origin) > _LONG and weight.get("is_plain", True):
            return _told(_Lanes(origin, target, send, receive, terms).run())
    return _told(_bring(origin, target, dict(send, terms=terms), receive))


def _bring(
    origin: AnySession,
    target: AnySession,
    send: Arguments,
    receive: Arguments,
    check: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
    method: str = "receive",
) -> int:
    """Session.METHOD on TARGET with what Session.send has on ORIGIN; returns the bytes of data.

    CHECK is called on the way and END when all but the end has been sent; both may raise.
    """
    if origin.name and target.name:
        from madrigal.host.direct import DirectSession

        if isinstance(target, DirectSession):
            return target.bring(send, receive, check, end, method)

    def frames() -> Iterator[Frame]:
        for frame in origin.send(**send):
            check()
            yield frame
        end()

    return target.lane(frames(), **receive) if method == "lane" else target.receive(frames(), **receive)


def notes(session: AnySession, path: str) -> str:
    """Where the digests of the image PATH of this machine are kept, "" for another machine's."""
    if session.name:
        return ""
    directory = config.run_dir()
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(_NOTES) and entry.stat().st_mtime < time.time() - _NOTES_AGE:
                os.unlink(entry.path)
    return f"{directory}/{path.replace('/', '%')[-200:]}{_NOTES}"


def _told(count: int) -> str:
    return f"{count} bytes streamed"


class _Lanes:
    """One transfer over several connections, each with its share of every file."""

    def __init__(
        self, origin: AnySession, target: AnySession, send: Arguments, receive: Arguments, terms: Arguments
    ) -> None:
        import threading

        self._origin, self._target = origin, target
        self._send, self._receive, self._terms = send, receive, terms
        self._over = threading.Event()
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
            send, receive = self._share(0), self._receive
            return _bring(self._origin, self._target, send, receive, self._check, self._end) + sum(self._counts)
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

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
                receive = {"path": self._receive["path"], "source": self._receive["source"]}
                self._counts.append(_bring(origin, target, self._share(number), receive, self._wanted, method="lane"))
        except BaseException as error:
            self._error = self._error or error

    def _wanted(self) -> None:
        if self._over.is_set() or self._error:
            raise HostUnreachable("another connection of the same transfer has failed")
