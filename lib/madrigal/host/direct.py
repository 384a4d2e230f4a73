"""A session for what another host is to bring straight to this one (onhost/direct.py), past the front-end."""

from __future__ import annotations

import os
import time

from madrigal import config, deadline, leftovers
from madrigal.errors import ConfigError, HostUnreachable, MadrigalError, MissingProgram
from madrigal.host.channel import failure
from madrigal.host.program import COMMAND
from madrigal.host.remote import RemoteSession
from madrigal.messages import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from madrigal.host import Host
    from madrigal.host.local import LocalSession

    AnySession = LocalSession | RemoteSession

_ATTEMPTS = 3
_REMEMBERED = 600
"""Seconds for which a host that did not reach another is not asked again: a firewall takes the whole timeout."""

_INSTEAD = "the data go through this machine, because they cannot go from {} to {} directly: {}"


def is_wanted(origin: Host, host: Host) -> bool:
    """Whether data from ORIGIN to HOST, both other machines, may spare the front-end; raises ConfigError."""
    chosen = os.environ.get("MADRIGAL_DIRECT") or "yes"
    if chosen not in ("yes", "no"):
        raise ConfigError(f"MADRIGAL_DIRECT is '{chosen}', expected yes or no")
    if chosen == "no":
        return False
    try:
        with open(_memory(origin.name, host.name), encoding="utf-8") as file:
            reason, age = file.read(), time.time() - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return True
    if 0 <= age < _REMEMBERED:
        log(_INSTEAD.format(origin.name, host.name, f"{reason} ({age // 60:.0f} minutes ago)"))
        return False
    return True


def _memory(origin: str, host: str) -> str:
    return f"{config.run_dir()}/{origin}-{host}.relay"


class DirectSession(RemoteSession):
    """As any on HOST, and ORIGIN, one on the other host, may bring it data itself."""

    def __init__(self, host: Host, origin: RemoteSession) -> None:
        super().__init__(host, bulk=False)
        self._origin = origin
        self._rtt = 0.0

    def another(self, origin: AnySession | None = None) -> RemoteSession:
        if not isinstance(origin, RemoteSession):
            return super().another()
        made = DirectSession(self.host, origin)
        try:
            made.connect()
        except BaseException:
            made.fail()
            raise
        return made

    is_direct = True

    def distance(self, origin: AnySession) -> float:
        return self._rtt

    def connects(self) -> bool:
        """Whether the other host gets here; it is told and remembered if not."""
        try:
            self.connect()
        except MadrigalError as error:
            log(_INSTEAD.format(self._origin.name, self.name, error))
            if not getattr(error, "crowded", False):
                leftovers.tidy()
                with open(_memory(self._origin.name, self.name), "w", encoding="utf-8") as file:
                    file.write(str(error))
            return False
        return True

    def connect(self) -> None:
        """Let the other host log in here; raises what says why it cannot."""
        from madrigal.onhost import direct

        with open(os.path.join(os.path.dirname(direct.__file__), "relay.py"), encoding="utf-8") as file:
            text = file.read()
        program = f"{text}\nmain({self.call('direct', do='listen')!r}, {direct.MARKER!r})\n"
        arguments = {"host": self.name, "command": COMMAND, "program": program, "seconds": deadline.connect()}
        for attempt in range(1, _ATTEMPTS + 1):
            found = self._origin.call("direct", do="connect", **arguments)
            if "rtt" in found:
                self._rtt = found["rtt"]
                return
            if "missing" in found:
                raise MissingProgram(f"{self._origin.name} cannot run ssh ({found['missing']}): install it there")
            error = failure(self.name, found["status"], found["said"].encode())
            if attempt == _ATTEMPTS or not getattr(error, "crowded", False):
                raise error
            time.sleep((0.2 + (os.getpid() % 16) / 16) * attempt)

    def bring(
        self,
        send: dict[str, Any],
        receive: dict[str, Any],
        heard: Callable[[int], None],
        end: Callable[[], None],
        method: str = "receive",
    ) -> int:
        """Session.METHOD, with the arguments RECEIVE, of what Session.send has there; returns the bytes of data.

        HEARD is called now and then with the bytes so far and may raise, END before the other host says that those were
        all.
        """
        self._origin.heard = heard
        self.tell(method, directly=True, **receive)
        try:
            count: int = self._origin.call("send", directly=True, **send)
        except HostUnreachable as error:
            if self._origin.is_over:  # not if it was CHECK: nobody answers then
                try:
                    self._settle()  # if the data were refused here, that is why
                except HostUnreachable:
                    raise error from None
            raise
        end()
        self._origin.tell("direct", do="complete")
        if method == "lane":
            self._settle()
        return count
