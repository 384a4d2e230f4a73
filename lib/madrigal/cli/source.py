"""`madrigal source`: what a source would give, without a datastore."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from typing import Any

import click

from madrigal.cli.settings import Settings, pairs, pass_settings
from madrigal.errors import BadImage
from madrigal.host import Host
from madrigal.onhost import guard
from madrigal.source import schemes
from madrigal.source.stream import check_digests
from madrigal.storage.arrival import Arrival
from madrigal.transfer import progress

_MARKET = {
    "ACCESS_KEY_ID": ("AWS_ACCESS_KEY_ID",),
    "SECRET_ACCESS_KEY": ("AWS_SECRET_ACCESS_KEY",),
    "REGION": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "ENDPOINT": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
}
"""What a marketplace would say of an S3 store, and the variables that say it here."""


@click.command()
@click.argument("url")
@click.option("--to", metavar="FILE", help="Keep what comes of it, unpacked and with holes where it has zeros.")
@click.option("--no-decompress", is_flag=True, help="Take what is packed as it is.")
@click.option("--no-verify", is_flag=True, help="Do not check certificates.")
@click.option("--digest", multiple=True, metavar="NAME=HEX", help="MD5, SHA1 or SHA256 of what is fetched; repeatable.")
@pass_settings
def source(
    settings: Settings, url: str, to: str | None, no_decompress: bool, no_verify: bool, digest: tuple[str, ...]
) -> None:
    """Fetch URL, or the file it is the path of, as an import would, and show what it is.

    Kinds: a path, file://, http://, https://, ssh://[USER@]HOST:/PATH, s3://BUCKET/OBJECT (with AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION and, where the store is not Amazon's, AWS_ENDPOINT_URL).
    """
    if "://" not in url:
        url = os.path.abspath(url)
    wanted = check_digests(pairs(digest, "--digest"))
    terms = schemes.Terms(_open, "/", "", (), verify=not no_verify, private=True, market=_market)
    with schemes.open(url, terms) as opened, contextlib.closing(_Watched(opened, settings.json)) as watched:
        arrival = Arrival(watched, not no_decompress, wanted)
        if to is None:
            for _ in arrival.frames(checked=False):
                pass
        else:
            _keep(arrival, os.path.abspath(to))
        watched.end()
        settings.show(_document(watched, arrival, to))


def _keep(arrival: Arrival, path: str) -> None:
    with Host("").session() as session:
        session.tell("hold", path=path)
        session.receive(arrival.frames(checked=False), path=path)


def _open(path: str) -> int:
    return guard.open_allowed(path, "/", "", ())


def _market(name: str) -> str:
    if name == "AWS":
        return "no" if _market("ENDPOINT") else "yes"
    return next((os.environ[variable] for variable in _MARKET[name] if os.environ.get(variable)), "")


def _document(watched: _Watched, arrival: Arrival, to: str | None) -> dict[str, Any]:
    seconds = watched.seconds
    document = {"source": watched.name, "fetched": watched.got, "size": arrival.size}
    try:
        found = arrival.found()
        document |= {"format": found.format, "virtual_size": found.virtual_size}
    except BadImage as error:
        document["not_importable"] = str(error)
    document |= watched.digests()
    document |= {"seconds": round(seconds, 3), "bytes_per_second": int(watched.got / max(seconds, 0.001))}
    return document | ({"file": to} if to is not None else {})


class _Watched(schemes.Source):
    """SOURCE, with its digests, and how far it is on a terminal."""

    def __init__(self, source: schemes.Source, quiet: bool) -> None:
        self._source = source
        # read like any other: its digest is wanted, which a copy that the file system makes does not give
        self.name, self.size = source.name, source.size
        self._sums = {name: hashlib.new(name, usedforsecurity=False) for name in ("md5", "sha256")}
        self._shown = progress.Transfer(source.name, source.size or 0, [] if quiet else progress.sinks())
        self._began = time.monotonic()
        self.got, self.seconds = 0, 0.0

    def read(self, most: int) -> bytes:
        data = self._source.read(most)
        for digest in self._sums.values():
            digest.update(data)
        self.got += len(data)
        self.seconds = time.monotonic() - self._began
        self._shown.reached(self.got)
        return data

    def digests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._sums.items()}

    def end(self) -> None:
        """It was all."""
        self._shown.report(is_done=True)

    def close(self) -> None:
        self._shown.close()
