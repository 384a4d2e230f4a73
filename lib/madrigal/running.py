"""Which actions of this machine are at work on a VM directory, so that a delete can end them first.

A front-end that gives an action up ends its own thread and not our process, and starts `delete` at once.  The
locks on the host stop what has arrived there; this stops what is still on its way, which would make again what
the delete has removed.

Every action holds a shared lock on a file named after the directory; a delete takes it over (onhost/lock.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from madrigal import config
from madrigal.errors import Deleted
from madrigal.onhost import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def registered(vm_dir: str) -> Iterator[None]:
    """Be found by end() meanwhile; raises Deleted if that is at work already."""
    file = _file(vm_dir)
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if lock.is_current(fd, file):
                break
        except BlockingIOError:
            if os.pread(fd, 16, 0).startswith(b"delete"):
                raise Deleted(f"{vm_dir} is being deleted by another action") from None
        os.close(fd)  # the last one to leave is just removing it
    try:
        yield
    finally:
        with contextlib.suppress(BlockingIOError):  # others are still there
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.is_current(fd, file):
                os.unlink(file)
        os.close(fd)


def end(vm_dir: str) -> None:
    """End the other actions on VM_DIR; returns when they have taken back what they made."""
    taken = lock.Lock(vm_dir, _file(vm_dir))
    taken.acquire(4 * lock.GRACE, lambda: None, taking_over=True)
    taken.release(deleted=True)


def _file(vm_dir: str) -> str:
    return f"{config.run_dir()}/{vm_dir.replace('/', '%')[-200:]}.running"
