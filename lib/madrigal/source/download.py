"""Fetch a URL whole, for who needs it as a file: a context file, or the URL that 3.4 may give for an image."""

from __future__ import annotations

import contextlib
import os

from madrigal import scratch
from madrigal.errors import Forbidden
from madrigal.source import schemes
from madrigal.source.stream import fetch

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def downloaded(url: str) -> Iterator[int]:
    """An open file without a name with what the http:// or https:// URL gives, as it is."""

    def no_local(path: str) -> int:
        raise Forbidden(f"'{path}' is a file of this machine, not a URL")

    with scratch.nameless() as fd:
        with schemes.open(url, schemes.Terms(no_local)) as opened, os.fdopen(fd, "wb", closefd=False) as file:
            fetch(opened, file.write, decompress=False, digests={}, limit=None)
        yield fd
