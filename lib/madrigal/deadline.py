"""How long things may take: a total for control commands, a pause without progress for data streams."""

from __future__ import annotations

import os
import time

from madrigal.errors import ConfigError, DeadlineExceeded


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0
    if not 0 < value < 1e9:  # "nan" and "inf" are numbers to float()
        raise ConfigError(f"{variable}='{text}' is not a number of seconds")
    return value


def control() -> float:
    """Seconds a control command (here or on a host) may take in all."""
    return _seconds("MADRIGAL_CONTROL_TIMEOUT", 60)


def stall() -> float:
    """Seconds a data stream, or work on a disk, may go without progress."""
    return _seconds("MADRIGAL_STALL_TIMEOUT", 120)


def source() -> float:
    """Seconds in which all of an image has to have come from another machine."""
    return _seconds("MADRIGAL_SOURCE_TIMEOUT", 86400)


def lock() -> float:
    """Seconds to wait until somebody else is done with an object."""
    return _seconds("MADRIGAL_LOCK_TIMEOUT", 120)


def silence() -> float:
    """Seconds after which a host that hears nothing from here takes this process, or the way to it, for gone."""
    return _seconds("MADRIGAL_SILENCE_TIMEOUT", 60)


def connect() -> float:
    """Seconds to reach a host."""
    return _seconds("MADRIGAL_CONNECT_TIMEOUT", 20)


class Deadline:
    """A point in time after which `left` raises.  `what` is what the user reads that took too long."""

    def __init__(self, seconds: float, what: str) -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds
        self.what = what

    def left(self) -> float:
        """Seconds that remain; raises DeadlineExceeded when none do."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{self.what} took longer than {self._seconds:g} s")
        return left
