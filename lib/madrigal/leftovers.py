"""What is in the run directory and nobody needs any more: it goes when somebody comes by."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time

from madrigal import config
from madrigal.onhost import lock

_DAY = 24 * 3600
_AGES = {
    r".*\.blocks": 30 * _DAY,  # digests of images (transfer/carry.py)
    r".*\.relay": _DAY // 24,  # which host did not reach which (host/direct.py)
    r".*\.running": _DAY,  # of actions that were killed (running.py)
    r"import-[0-9a-f]+(\.others)?": _DAY,  # of imports that were killed (source/flight.py)
}


def tidy() -> None:
    """Remove what is old, and locked by no process."""
    with os.scandir(config.run_dir()) as entries:
        for entry in entries:
            age = next((age for pattern, age in _AGES.items() if re.fullmatch(pattern, entry.name, re.DOTALL)), None)
            if age is not None:
                with contextlib.suppress(OSError):  # somebody else was here, or has it
                    _remove_old(entry.path, time.time() - age)


def _remove_old(path: str, since: float) -> None:
    if os.lstat(path).st_mtime >= since:
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock.is_current(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)
