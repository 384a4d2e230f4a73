"""A file of a web server: http:// and https://, certificates verified, proxies as the environment has them."""

from __future__ import annotations

from madrigal import deadline
from madrigal.errors import ConfigError, DeadlineExceeded, Forbidden, MadrigalError, SourceUnavailable, UsageError
from madrigal.source.schemes import Source

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from http.client import HTTPConnection, HTTPResponse

_REDIRECTS = 10
_MOVED = (301, 302, 303, 307, 308)


def open(url: str, _guard: Callable[[str], int], stall: float) -> Source:
    """GET URL.  Redirects are followed to http and https only, at most ten, all within the time for one."""
    from urllib.parse import quote, urljoin

    if not url.isprintable() or " " in url:
        raise UsageError(f"'{url}' is not a URL: it has a blank or a control character, which a URL writes as %20")
    wait = deadline.Deadline(deadline.connect() + stall, f"reaching {shown(url)}")
    page = _Page(url)
    for _ in range(_REDIRECTS + 1):
        connection, response = page.get(wait, stall)
        if response.status == 200:
            return _Body(page, connection, response)
        connection.close()
        location = response.headers.get("Location")
        if response.status not in _MOVED or not location:
            reason = "".join(c for c in response.reason[:60] if c.isprintable())
            raise SourceUnavailable(f"{page.name} answered {response.status} {reason}".rstrip())
        # http.client takes headers for Latin-1; what is not ASCII came as bytes of a URL.
        before, page = page, _Page(urljoin(page.url, quote(location, safe="%!#$&'()*+,/:;=?@[]~", encoding="latin-1")))
        if page.place == before.place:
            page.credentials = page.credentials or before.credentials
    raise SourceUnavailable(f"{shown(url)} redirects more than {_REDIRECTS} times")


def shown(url: str) -> str:
    """URL for a message: without user, password and query."""
    scheme, _, rest = url.partition("://")
    rest, query, _ = rest.partition("#")[0].partition("?")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?...' if query else ''}"


class _Page:
    """One URL: `place` (scheme, host, port), `credentials` ("user:password" or "")."""

    def __init__(self, url: str) -> None:
        from urllib.parse import quote, unquote, urlsplit

        self.url, self.name = url, shown(url)
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        except ValueError:
            raise UsageError(f"{self.name} is not a URL: its host or port is malformed") from None
        if parts.scheme not in ("http", "https"):
            raise Forbidden(f"the source redirects to a {parts.scheme}:// URL: only http:// and https:// are followed")
        if not parts.hostname:
            raise UsageError(f"{self.name} is not a URL: it has no host")
        self.place = (parts.scheme, parts.hostname, port)
        path = quote(parts.path or "/", safe="%!$&'()*+,/:;=@[]~")
        self.target = path + ("?" + quote(parts.query, safe="%!$&'()*+,/:;=?@[]~") if parts.query else "")
        user, password = (unquote(part or "") for part in (parts.username, parts.password))
        self.credentials = f"{user}:{password}" if user or password else ""

    def get(self, wait: deadline.Deadline, stall: float) -> tuple[HTTPConnection, HTTPResponse]:
        """Ask for the page; the connection's socket waits for STALL seconds at most from then on."""
        import http.client
        import ssl

        connection, headers, target = self._connection(min(deadline.connect(), wait.left()))
        if self.credentials:
            headers["Authorization"] = _basic(self.credentials)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise Forbidden(
                f"the certificate of {self.name} is not trusted ({error.verify_message}): "
                "have the front-end trust its authority (update-ca-certificates)"
            ) from None
        except (OSError, ValueError) as error:
            connection.close()
            raise _said(f"cannot reach {self.name}", error) from None
        try:
            socket = connection.sock  # the connection forgets it when the server will not go on with another
            socket.settimeout(min(stall, wait.left()))
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            socket.settimeout(stall)
        except (OSError, ValueError, http.client.HTTPException, MadrigalError) as error:
            connection.close()
            raise _said(f"{self.name} does not answer", error) from None
        return connection, response

    def _connection(self, seconds: float) -> tuple[HTTPConnection, dict[str, str], str]:
        """A connection to the server or its proxy, not made yet; the headers and the target to ask for."""
        import http.client
        import ssl
        from urllib.parse import unquote, urlsplit
        from urllib.request import getproxies_environment, proxy_bypass

        scheme, host, port = self.place
        headers, target = {"User-Agent": "madrigal", "Connection": "close", "Accept": "*/*"}, self.target
        proxies = getproxies_environment()
        proxy = proxies.get(scheme) or proxies.get("all") or ""
        reached = (host, port)
        proxy_headers = {}
        if proxy_bypass(host, proxies):
            proxy = ""
        if proxy:
            parts = urlsplit(proxy if "://" in proxy else "http://" + proxy)
            if parts.scheme != "http" or not parts.hostname:
                raise ConfigError(f"the proxy {shown(proxy)} for {scheme}:// is not an http:// proxy")
            reached = (parts.hostname, parts.port or 80)
            if parts.username:
                credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                proxy_headers["Proxy-Authorization"] = _basic(credentials)
        if scheme == "https":
            context = ssl.create_default_context()
            secure = http.client.HTTPSConnection(*reached, timeout=seconds, context=context)
            if proxy:
                secure.set_tunnel(host, port, proxy_headers)
            return secure, headers, target
        if proxy:
            place = f"[{host}]" if ":" in host else host
            headers.update(proxy_headers)
            target = f"http://{place}:{port}{target}"
        return http.client.HTTPConnection(*reached, timeout=seconds), headers, target


class _Body(Source):
    def __init__(self, page: _Page, connection: HTTPConnection, response: HTTPResponse) -> None:
        self.name = page.name
        self.size = response.length
        self._connection, self._response = connection, response
        self._got = 0

    def read(self, most: int) -> bytes:
        from http.client import HTTPException

        if self.size is not None:
            most = min(most, self.size - self._got)
        if not most:
            return b""
        try:
            data = self._response.read1(most)  # read() would wait for all of it, however slowly it drips
        except (OSError, ValueError, HTTPException) as error:
            raise _said(f"{self.name} broke off after {self._got} bytes", error) from None
        self._got += len(data)
        if not data and self.size is not None:
            raise SourceUnavailable(f"{self.name} broke off after {self._got} of {self.size} bytes: try again")
        return data

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def _basic(credentials: str) -> str:
    import base64

    return "Basic " + base64.b64encode(credentials.encode()).decode()


def _said(what: str, error: Exception) -> MadrigalError:
    """ERROR of a connection as one of ours."""
    if isinstance(error, MadrigalError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{what}: nothing came for too long")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return SourceUnavailable(f"{what}: {reason}")
