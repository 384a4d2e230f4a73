"""A session on one of several hosts that have the same storage: one that is down makes the next be tried."""

from __future__ import annotations

from madrigal import messages
from madrigal.errors import HostUnreachable
from madrigal.host import Host
from madrigal.host.remote import RemoteSession

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from madrigal.host.channel import Channel


class BridgeSession(RemoteSession):
    """The files of the first host of NAMES that can be reached; ATTRIBUTE has them, for messages.

    Once a host has begun it stays with that: what was asked is sent again only to one that did not start.
    """

    def __init__(self, names: Sequence[str], attribute: str) -> None:
        self._names, self._attribute = list(names[1:]), attribute
        self._reasons: list[str] = []
        self._is_chosen = False
        super().__init__(Host(names[0]), bulk=False)

    def reopen(self) -> None:
        self._is_chosen = True  # what was asked of it before holds on for it alone, such as a mount
        super().reopen()

    def _start(self) -> Channel:
        while True:
            try:
                return super()._start()
            except HostUnreachable as error:
                if self._is_chosen:
                    raise
                self._next(error)

    def _ready(self) -> Channel:
        while True:
            try:
                return super()._ready()
            except HostUnreachable as error:
                if self._is_ready or self._is_chosen:
                    raise
                self._next(error)
                self._channel = self._start()

    def _next(self, error: HostUnreachable) -> None:
        self._reasons.append(str(error))
        if not self._names:
            raise HostUnreachable(f"no host of {self._attribute} can be reached: {'; '.join(self._reasons)}") from None
        messages.log(f"{error}; trying {self._names[0]}", "WARN")
        self.host = Host(self._names.pop(0))
