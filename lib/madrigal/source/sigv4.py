"""The signature by which an S3 store knows who asks (AWS Signature Version 4), for requests without a body.

It is made here: botocore's loads 60 MB of packages, and TLS libraries with it that this machine need not have in order.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import urlsplit

_NOTHING = hashlib.sha256().hexdigest()


class Keys:
    """The keys of one user for a REGION.  What it signs holds for 15 minutes, for one object."""

    def __init__(self, key: str, secret: str, region: str) -> None:
        self._key, self._secret, self._region = key, secret, region

    def sign(self, url: str, headers: dict[str, str], now: float | None = None) -> dict[str, str]:
        """Headers that go with a GET of URL, a URL without a query, and HEADERS, of which Range is signed too."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        if parts.port and parts.port != {"http": 80, "https": 443}.get(parts.scheme):
            host += f":{parts.port}"
        added = {"X-Amz-Content-SHA256": _NOTHING, "X-Amz-Date": stamp}
        signed = {"host": host, **{name.lower(): value for name, value in added.items()}}
        signed |= {name.lower(): value for name, value in headers.items() if name.lower() == "range"}
        names = ";".join(sorted(signed))
        lines = [f"{name}:{value}" for name, value in sorted(signed.items())]
        request = "\n".join(["GET", parts.path or "/", "", *lines, "", names, _NOTHING])
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
        key = f"AWS4{self._secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        credential = f"Credential={self._key}/{scope}"
        added["Authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        return added
