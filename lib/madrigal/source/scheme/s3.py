"""An object of an S3 store, `s3://BUCKET/OBJECT`: fetched as from any web server, with the marketplace's keys.

The keys sign every request; they are sent to nobody.
"""

from __future__ import annotations

import re

from madrigal.errors import ConfigError, UsageError
from madrigal.source import sigv4, web
from madrigal.source.scheme import http

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from madrigal.source.schemes import Source, Terms

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_REGION = re.compile(r"[A-Za-z0-9-]{1,64}")


def open(url: str, terms: Terms, stall: float) -> Source:
    name = web.shown(url)
    place = _place(url, name, terms)
    return http.Download(place, terms, stall, _signer(terms), name)


def _place(url: str, name: str, terms: Terms) -> str:
    """Where the object is on the web.  Of a longer path the last two parts count, as the stock drivers have it."""
    from urllib.parse import quote, unquote

    if not url.isprintable() or " " in url:
        raise UsageError(f"'{url}' is not a URL: it has a blank or a control character, which a URL writes as %20")
    parts = [part for part in url.partition("://")[2].split("/") if part]
    if len(parts) < 2 or not _BUCKET.fullmatch(parts[-2]):
        raise UsageError(f"{name} is not s3://BUCKET/OBJECT")
    bucket, key = parts[-2], quote(unquote(parts[-1]), safe="/~")
    if any(part in (".", "..") for part in key.split("/")):
        raise UsageError(f"{name} is not s3://BUCKET/OBJECT")
    if terms.market("AWS").lower() == "no":
        endpoint = terms.market("ENDPOINT").rstrip("/")
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^?#\s]*)?", endpoint):
            said = web.shown(endpoint) if "://" in endpoint else endpoint
            raise ConfigError(f"ENDPOINT of the marketplace is '{said[:80]}', expected https://HOST")
        return f"{endpoint}/{bucket}/{key}"
    host = f"s3.{_region(terms)}.amazonaws.com"
    # a certificate for *.s3... does not cover a name with further dots
    return f"https://{host}/{bucket}/{key}" if "." in bucket else f"https://{bucket}.{host}/{key}"


def _region(terms: Terms) -> str:
    region = terms.market("REGION") or "us-east-1"
    if not _REGION.fullmatch(region):
        raise ConfigError(f"REGION of the marketplace is '{region[:80]}', expected one such as eu-west-1")
    return region


def _signer(terms: Terms) -> web.Sign:
    """What makes the headers by which the store knows us."""
    key, secret = terms.market("ACCESS_KEY_ID"), terms.market("SECRET_ACCESS_KEY")
    if not key or not secret:
        raise ConfigError(
            "s3:// images come with the keys of their marketplace: set ACCESS_KEY_ID and SECRET_ACCESS_KEY there"
        )
    return sigv4.Keys(key, secret, _region(terms)).sign
