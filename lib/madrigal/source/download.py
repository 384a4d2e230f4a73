"""Fetch a URL whole, for who needs it as a file: a context file, or the URL that 3.4 may give for an image."""

from __future__ import annotations

import contextlib
import os

from madrigal import scratch
from madrigal.errors import Forbidden
from madrigal.source import schemes
from madrigal.source.stream import fetch
from madrigal.source.web import shown

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def downloaded(url: str) -> Iterator[int]:
    """An open file without a name with what the http:// or https:// URL gives, as it is; raises Forbidden for others.

    No datastore says here which files may be read, on this machine or by ssh://.
    """
    if url.partition("://")[0].lower() not in ("http", "https"):
        raise Forbidden(f"'{shown(url)}' is not for this: expected a path of the front-end, http:// or https://")

    def no_local(path: str) -> int:
        raise AssertionError(f"{path} is not on the web")

    with scratch.nameless() as fd:
        with schemes.open(url, schemes.Terms(no_local)) as opened, os.fdopen(fd, "wb", closefd=False) as file:
            fetch(opened, file.write, decompress=False, digests={}, limit=None)
        yield fd
