"""The schemes a source may have, and what every opened source can do."""

from __future__ import annotations

import re

from madrigal import deadline
from madrigal.errors import UsageError

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

# A scheme and the module here whose `open` opens it.
_SCHEMES = {"file": "local", "http": "http", "https": "http"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Source:
    """An opened source: bytes as they are fetched, once, in order.

    `name`: what messages call it: the path, or the URL without anything secret.  `size`: how many bytes it has
    in all, None if it does not say.  `local_fd`: the descriptor of a file of this machine, which may be copied
    without reading it here, None for anything else; it is closed with the source.
    """

    name: str
    size: int | None
    local_fd: int | None = None

    def read(self, most: int) -> bytes:
        """Some bytes, at most MOST, b"" at the end.  Raises SourceUnavailable, DeadlineExceeded."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open(url: str, *, guard: Callable[[str], int], stall: float | None = None, rate: int | None = None) -> Source:
    """Open URL, or the local path it is.

    GUARD opens a local path for reading or raises why not (guard.open_allowed).  STALL: seconds without progress
    (default: deadline.stall()).  RATE: the most bytes a second that are read from it.  Raises UsageError for what
    cannot be a source, SourceUnavailable, Forbidden, NotFound, DeadlineExceeded.
    """
    from importlib import import_module

    match = _URL.match(url)
    if not match and not url.startswith("/"):
        raise UsageError(f"'{url}' is neither an absolute path nor a URL")
    scheme = match[1].lower() if match else "file"
    if scheme not in _SCHEMES:
        known = ", ".join(known + "://" for known in _SCHEMES)
        raise UsageError(f"'{scheme}://' is not a known kind of source: give an absolute path, or a URL with {known}")
    module = import_module(f"madrigal.source.{_SCHEMES[scheme]}")
    opened: Source = module.open(url, guard, deadline.stall() if stall is None else stall)
    if rate is None:
        return opened
    from madrigal.source import pace

    return pace.Paced(opened, rate)
