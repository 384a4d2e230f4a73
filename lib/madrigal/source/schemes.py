"""What every opened source can do, what a datastore allows of sources, and how one is opened."""

from __future__ import annotations

import os
import re

from madrigal import deadline
from madrigal.errors import UsageError

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Terms:
    """What a datastore allows of its sources, and what they may need to be opened.

    `guard` opens a local path for reading or raises why not (guard.open_allowed).  `directories`: what that takes,
    for files of other machines, where the home directory counts too.  `verify`: whether certificates are checked.
    `private`: whether a public web server may redirect into a private network.  `market`: the attributes of the
    marketplace that the image is from, which has the keys to what it keeps.
    """

    def __init__(
        self,
        guard: Callable[[str], int],
        safe_dirs: str = "",
        restricted_dirs: str = "",
        always_restricted: Sequence[str] = (),
        verify: bool = True,
        private: bool = False,
        market: Callable[[str], str] = lambda name: "",
    ) -> None:
        self.guard = guard
        self.directories = (safe_dirs, restricted_dirs, tuple(always_restricted))
        self.verify, self.private = verify, private
        self.market = market

    def identity(self) -> tuple[object, ...]:
        """What differs where an image could be refused, or be another one."""
        keys = [self.market(name) for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION", "AWS", "ENDPOINT")]
        return (*self.directories, self.verify, self.private, *keys)


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

    def peek(self, offset: int, length: int) -> bytes | None:
        """LENGTH bytes from OFFSET on, whatever has been read; None if this source cannot."""
        return None

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def is_far(url: str) -> bool:
    """Whether URL is of another machine."""
    match = _URL.match(url)
    return match is not None and match[1].lower() != "file"


def open(url: str, terms: Terms, stall: float | None = None, rate: int | None = None) -> Source:
    """Open URL, or the local path it is.

    STALL: seconds without progress (default: deadline.stall()).  RATE: the most bytes a second that are read from it.
    Raises UsageError for what cannot be a source, SourceUnavailable, Forbidden, NotFound, DeadlineExceeded.
    """
    from importlib import import_module

    match = _URL.match(url)
    if not match and not url.startswith("/"):
        raise UsageError(f"'{url}' is neither an absolute path nor a URL")
    scheme = match[1].lower() if match else "file"
    module = _modules().get(scheme.translate(_NAMES))
    if not module:
        listed = ", ".join(f"{known}://" for known in sorted(_modules()))
        raise UsageError(f"'{scheme}://' is not a known kind of source: give an absolute path, or a URL with {listed}")
    opened: Source = import_module(module).open(url, terms, deadline.stall() if stall is None else stall)
    if rate is None:
        return opened
    from madrigal.source import pace

    return pace.Paced(opened, rate)


_NAMES = str.maketrans("+.-", "___")


def _modules() -> Mapping[str, str]:
    """The modules of source/scheme by their names."""
    from madrigal.source import scheme

    found = (name[:-3] for name in os.listdir(scheme.__path__[0]) if name.endswith(".py") and name[0] != "_")
    return {name: f"madrigal.source.scheme.{name}" for name in found}
