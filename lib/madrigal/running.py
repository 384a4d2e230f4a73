"""Which actions of this machine are at work on a VM directory, so that a delete can end them first.

A front-end that gives an action up ends its own thread and not our process, and starts `delete` at once.  The
locks on the host stop what has arrived there; this stops what is still on its way, which would make again what
the delete has removed.
"""

from __future__ import annotations

import fcntl
import os

from madrigal import config
from madrigal.errors import Deleted
from madrigal.onhost import lock


def register(vm_dir: str) -> None:
    """Be found by end() as long as this process lives; raises Deleted if that is at work already."""
    fd = os.open(_file(vm_dir), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Deleted(f"{vm_dir} is being deleted by another action") from None


def end(vm_dir: str) -> None:
    """End the other actions on VM_DIR; returns when they have taken back what they made."""
    taken = lock.Lock(vm_dir, _file(vm_dir))
    taken.acquire(4 * lock.GRACE, lambda: None, taking_over=True)
    taken.release(deleted=True)


def _file(vm_dir: str) -> str:
    return f"{config.run_dir()}/{vm_dir.replace('/', '%')[-200:]}.running"
