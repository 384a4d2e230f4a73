"""Room for something that is needed for a moment: a file without a name, which no kill can leave behind."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def nameless() -> Iterator[int]:
    """A descriptor to read and write a new file in TMPDIR, or else /var/tmp; only this user can get at it."""
    fd = os.open(os.environ.get("TMPDIR") or "/var/tmp", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
