"""A source on another machine: where the connection breaks, it is asked to go on from there."""

from __future__ import annotations

import time

from madrigal import deadline
from madrigal.errors import DeadlineExceeded, MadrigalError
from madrigal.source.schemes import Source

TRIES = 4
"""How often it is asked without getting a byte more, if it answers at all."""

PAUSE, LONGEST = 0.5, 15.0
"""Seconds before the second try, doubled for every further one, and the most it becomes."""


class Broken(Exception):
    """ERROR, which another try may mend.  REACHED: whether somebody was there.  AFTER: seconds it asks us to wait."""

    def __init__(self, error: MadrigalError, reached: bool, after: float = 0) -> None:
        super().__init__(str(error))
        self.error, self.reached, self.after = error, reached, after


class Resuming(Source):
    """A source that is asked again: `ask` and `some` of the subclass raise Broken for what that may mend.

    It is asked until STALL seconds have gone by without a byte, at most, and for as long as deadline.source() in all.
    """

    def __init__(self, name: str, stall: float) -> None:
        self.name, self.size = name, None
        self._stall = stall
        self._whole = deadline.Deadline(deadline.source(), f"fetching {name}")
        self._moved = time.monotonic()
        self._tries = 0
        self._over = False
        self.got = 0
        """How many bytes have been read."""

    def ask(self, offset: int) -> None:
        """Connect, so that some() gives what is from OFFSET on; sets `size`."""
        raise NotImplementedError

    def some(self, most: int) -> bytes:
        """Some bytes, at most MOST; b"" at the end."""
        raise NotImplementedError

    def end(self) -> None:
        """All has been read: raise what is wrong with it."""

    def begin(self) -> None:
        """Ask for the first time."""
        self._try(None)

    def patience(self) -> float:
        """Seconds that a connection may be silent: so few that there is time for another."""
        return max(self._stall / 2, 0.001)

    def read(self, most: int) -> bytes:
        while not self._over:
            try:
                if self.size == self.got:
                    self.end()
                    data = b""
                else:
                    data = self.some(most if self.size is None else min(most, self.size - self.got))
            except Broken as broken:
                self._try(broken)
                continue
            self._over = not data
            if data:
                self.moved()
                self._tries = 0
                self.got += len(data)
            return data
        return b""

    def moved(self) -> None:
        """Say that the source does something; raises DeadlineExceeded when it is too late for all of it."""
        self._moved = time.monotonic()
        self._whole.left()

    def _try(self, broken: Broken | None) -> None:
        while True:
            if broken:
                self._pause(broken)
            try:
                return self.ask(self.got)
            except Broken as again:
                broken = again

    def _pause(self, broken: Broken) -> None:
        """Wait before another try, or raise what is wrong if there is to be none."""
        self._tries += 1
        pause = max(min(PAUSE * 2 ** (self._tries - 1), LONGEST), broken.after)
        late = time.monotonic() + pause - self._moved > self._stall
        # A server that is away in the middle of it comes back, maybe; one that was never there need not.
        if late or (self._tries >= TRIES and (broken.reached or not self.got)):
            raise broken.error from None
        try:
            self._whole.left()
        except DeadlineExceeded:
            raise broken.error from None
        time.sleep(pause)
