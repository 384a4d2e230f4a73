"""Asking web servers: certificates verified, proxies as the environment has them, no way into private networks."""

from __future__ import annotations

from madrigal import deadline
from madrigal.errors import ConfigError, DeadlineExceeded, Forbidden, MadrigalError, SourceUnavailable, UsageError
from madrigal.source.resume import Broken

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from collections.abc import Callable
    from http.client import HTTPConnection, HTTPResponse

    from madrigal.source.schemes import Terms

    Sign = Callable[[str, dict[str, str]], dict[str, str]]

REDIRECTS = 10
_LONGEST = 300  # characters of a URL in a message; a server may redirect to one of any length
_MOVED = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


def shown(url: str) -> str:
    """URL for a message: without user, password and query, and not longer than somebody reads."""
    scheme, _, rest = url.partition("://")
    rest, query, _ = rest.partition("#")[0].partition("?")
    host, slash, path = rest.partition("/")
    text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return f"{text[:_LONGEST]}{'...' if len(text) > _LONGEST else ''}{'?...' if query else ''}"


class Answer:
    """What a server has answered for PAGE: `status`, `headers`, and the body to be read.

    `public`: whether it has an address that the whole world can reach.
    """

    def __init__(self, page: Page, connection: HTTPConnection, response: HTTPResponse, public: bool) -> None:
        self.page, self.public = page, public
        self._connection, self._response = connection, response
        self.status, self.headers = response.status, response.headers
        self.length: int | None = response.length

    def read(self, most: int) -> bytes:
        """Some bytes of the body, b"" at its end; raises Broken."""
        from http.client import HTTPException

        try:
            return self._response.read1(most)  # read() would wait for all of it, however slowly it drips
        except (OSError, ValueError, HTTPException) as error:
            raise Broken(_said(f"{self.page.name} broke off", error), reached=True) from None

    def refused(self) -> MadrigalError | Broken:
        """That this is not the page; Broken if it may be at another time."""
        reason = "".join(c for c in self._response.reason[:60] if c.isprintable())
        error = SourceUnavailable(f"{self.page.name} answered {self.status} {reason}".rstrip())
        if self.status not in _AGAIN:
            return error
        after = self.headers.get("Retry-After", "").strip()
        return Broken(error, reached=True, after=float(after) if after.isascii() and after.isdigit() else 0)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def get(
    url: str, terms: Terms, headers: dict[str, str], patience: float, seconds: float, sign: Sign | None = None
) -> Answer:
    """What URL and the redirects from there lead to; followed to http and https only, at most ten, within SECONDS.

    PATIENCE: seconds that the connection may be silent.  SIGN: headers that the server of URL wants, and no other.
    Raises Broken for what another try may mend.
    """
    from urllib.parse import quote, urljoin

    wait = deadline.Deadline(seconds, f"reaching {shown(url)}")
    page, first, public = Page(url), Page(url).place, None
    for _ in range(REDIRECTS + 1):
        signed = sign(page.url, headers) if sign and page.place == first else {}
        answer = page.get(wait, patience, {**headers, **signed}, terms, inside=not public or terms.private)
        public = answer.public if public is None else public
        location = answer.headers.get("Location")
        if answer.status not in _MOVED or not location:
            return answer
        answer.close()
        # http.client takes headers for Latin-1; what is not ASCII came as bytes of a URL.
        before, page = page, Page(urljoin(page.url, quote(location, safe="%!#$&'()*+,/:;=?@[]~", encoding="latin-1")))
        if page.place == before.place:
            page.credentials = page.credentials or before.credentials
    raise SourceUnavailable(f"{shown(url)} redirects more than {REDIRECTS} times")


class Page:
    """One URL: `place` (scheme, host, port), `credentials` ("user:password" or "")."""

    def __init__(self, url: str) -> None:
        from urllib.parse import quote, unquote, urlsplit

        if not url.isprintable() or " " in url:
            raise UsageError(f"'{url}' is not a URL: it has a blank or a control character, which a URL writes as %20")
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

    def get(
        self, wait: deadline.Deadline, patience: float, headers: dict[str, str], terms: Terms, inside: bool
    ) -> Answer:
        """Ask for the page; the connection may be silent for PATIENCE seconds from then on.

        INSIDE: whether its address may be private; if not, nothing is asked of one.
        """
        import http.client
        import ssl

        connection, more, target, proxied = self._connection(min(deadline.connect(), wait.left()), terms.verify)
        if self.credentials:
            more["Authorization"] = _basic(self.credentials)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise Forbidden(
                f"the certificate of {self.name} is not trusted ({error.verify_message}): have the front-end trust "
                "its authority (update-ca-certificates), or set TLS_VERIFY of the datastore to no"
            ) from None
        except (OSError, ValueError) as error:
            connection.close()
            raise self._unreached(error) from None
        try:
            socket = connection.sock  # the connection forgets it when the server will not go on with another
            public = _is_public(self.place[1] if proxied else socket.getpeername()[0])
            if not public and not inside:
                raise Forbidden(
                    f"the source redirects into a private network, to {self.name}: "
                    "set PRIVATE_REDIRECTS of the datastore to yes if that is right"
                )
            socket.settimeout(min(patience, wait.left()))
            connection.request("GET", target, headers={**more, **headers})
            response = connection.getresponse()
            socket.settimeout(patience)
        except (OSError, ValueError, http.client.HTTPException, MadrigalError) as error:
            connection.close()
            said = _said(f"{self.name} does not answer", error)
            if isinstance(error, MadrigalError):
                raise said from None
            raise Broken(said, reached=True) from None
        return Answer(self, connection, response, public)

    def _unreached(self, error: OSError | ValueError) -> MadrigalError | Broken:
        import socket

        said = _said(f"cannot reach {self.name}", error)
        if isinstance(error, ValueError) or (isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN):
            return said
        return Broken(said, reached=False)

    def _connection(self, seconds: float, verify: bool) -> tuple[HTTPConnection, dict[str, str], str, bool]:
        """A connection to the server or its proxy, not made yet; the headers, the target, whether it is a proxy."""
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
            if not verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            secure = http.client.HTTPSConnection(*reached, timeout=seconds, context=context)
            if proxy:
                secure.set_tunnel(host, port, proxy_headers)
            return secure, headers, target, bool(proxy)
        if proxy:
            place = f"[{host}]" if ":" in host else host
            headers.update(proxy_headers)
            target = f"http://{place}:{port}{target}"
        return http.client.HTTPConnection(*reached, timeout=seconds), headers, target, bool(proxy)


def _is_public(host: str) -> bool:
    """Whether HOST is an address that the whole world can reach; what only a proxy resolves counts as one."""
    import ipaddress

    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".") != "localhost"
    if isinstance(address, ipaddress.IPv6Address):
        if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: the last four bytes are an IPv4 address
            return _is_public(str(ipaddress.IPv4Address(address.packed[12:])))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return _is_public(str(inner))
    return address.is_global and not address.is_multicast


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
