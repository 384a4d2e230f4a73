"""The pipes that lead to ssh and come from sshd: large ones, filled in large pieces."""

import fcntl
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

SIZE = 1 << 20
"""Bytes that wait in a pipe at most."""

_SETPIPE_SZ, _GETPIPE_SZ = 1031, 1032
_MUCH, _BREATH = SIZE // 4, 0.0005  # bytes, seconds


def widen(fd: int) -> None:
    """Let the pipe FD hold SIZE bytes, if it may."""
    try:
        fcntl.fcntl(fd, _SETPIPE_SZ, SIZE)
    except OSError:
        pass  # no pipe, or the user's share of pipe memory is used up: smaller pieces then


def room(fd: int) -> int:
    """How many bytes FD holds, at least, when nobody reads them."""
    try:
        return fcntl.fcntl(fd, _GETPIPE_SZ)
    except OSError:
        return 64 << 10  # a socket


def put(fd: int, views: "List[memoryview]") -> "List[memoryview]":
    """Write what FD takes of VIEWS; returns what is left of them.  Raises what writing raises, BlockingIOError too."""
    count = os.writev(fd, views)
    left, much = list(views), count >= _MUCH
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if left:
        left[0] = left[0][count:]
        if not much:
            # It is read in small pieces: giving each its successor at once takes more CPU than all else that we do.
            time.sleep(_BREATH)
    return left
