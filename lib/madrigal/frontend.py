"""Ask the front-end about a VM or a datastore: over its XML-RPC interface, or with its own command-line tool.

ONE_XMLRPC (or ~/.one/one_endpoint) says where it is, ONE_AUTH (or ~/.one/one_auth) is the file with
`user:password`; both as for the front-end's own tools.
"""

from __future__ import annotations

import os

from madrigal import command, deadline
from madrigal.dump import MAX_BYTES, VM, Datastore, parse
from madrigal.errors import (
    ConfigError,
    Forbidden,
    HostUnreachable,
    MadrigalError,
    NotFound,
    SourceUnavailable,
    UsageError,
)
from madrigal.location import is_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEFAULT = "http://localhost:2633/RPC2"
_FORBIDDEN, _NOT_FOUND = (0x100, 0x200), 0x400  # error codes of its interface: authentication, authorization, no such


def vm(vm_id: int) -> VM:
    """The VM with this id as the front-end knows it; raises NotFound, Forbidden, SourceUnavailable."""
    return VM(_ask("vm", vm_id))


def datastore(ds_id: int) -> Datastore:
    """The datastore with this id; raises what vm() does."""
    return Datastore.of(_ask("datastore", ds_id))


def _ask(kind: str, number: int) -> bytes:
    auth = _auth()
    if auth is not None:
        try:
            return _call(f"one.{kind}.info", auth, number)
        except HostUnreachable as error:
            unreachable = error
    else:
        unreachable = HostUnreachable("there is no ONE_AUTH and no ~/.one/one_auth")
    return _ask_tool([f"one{kind}", "show", "-x", str(number)], unreachable)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{path} is not a line of text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _auth() -> str | None:
    path = os.environ.get("ONE_AUTH") or os.path.expanduser("~/.one/one_auth")
    return _read(path)


def _endpoint() -> str:
    return os.environ.get("ONE_XMLRPC") or _read(os.path.expanduser("~/.one/one_endpoint")) or _DEFAULT


def _call(method: str, auth: str, number: int) -> bytes:
    """The document that METHOD(auth, NUMBER) answers.

    A dozen lines of HTTP here, because the standard library's client costs 25 ms of import in every action,
    half of what a whole action costs.
    """
    auth = auth.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    request = (
        f'<?xml version="1.0"?><methodCall><methodName>{method}</methodName><params>'
        f"<param><value><string>{auth}</string></value></param>"
        f"<param><value><i4>{number}</i4></value></param></params></methodCall>"
    ).encode()
    try:
        response = parse(_post(_endpoint(), request), "it")
    except UsageError:
        raise SourceUnavailable(f"{_endpoint()} answers {method} with something that is not XML-RPC") from None
    values = ["".join(map(str, value.itertext())) for value in response.iterfind("params/param/value/array/data/value")]
    if len(values) < 2:
        raise SourceUnavailable(f"{_endpoint()} cannot answer {method}")
    if values[0].strip() in ("1", "true"):
        return values[1].encode()
    code = int(values[2]) if len(values) > 2 and is_number(values[2].strip()) else 0
    kind = NotFound if code == _NOT_FOUND else Forbidden if code in _FORBIDDEN else MadrigalError
    raise kind(f"the front-end refuses {method}: {values[1]}")


def _post(endpoint: str, body: bytes) -> bytes:
    import socket

    scheme, _, rest = endpoint.partition("://")
    authority, _, path = rest.partition("/")
    host, colon, port = authority.rpartition(":")
    if not colon or not is_number(port):
        host, port = authority, ""
    number = int(port) if port else 443 if scheme == "https" else 80
    if scheme not in ("http", "https") or not host or "@" in host or number > 65535:
        raise ConfigError(f"ONE_XMLRPC is '{endpoint}', expected http://host:port/path")
    head = (
        f"POST /{path} HTTP/1.0\r\nHost: {authority}\r\nContent-Type: text/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    limit, answer = deadline.Deadline(deadline.control(), f"asking {endpoint}"), bytearray()
    try:
        name = host.strip("[]")
        # as bytes, where that serves: the codec for the names of the world costs as much as the question
        address: Any = (name.encode() if name.isascii() else name, number)
        with socket.create_connection(address, timeout=limit.left()) as connection:
            if scheme == "https":
                import ssl

                connection = ssl.create_default_context().wrap_socket(connection, server_hostname=name)
            connection.sendall(head.encode() + body)
            while block := connection.recv(1 << 16):
                answer += block
                if len(answer) > MAX_BYTES:
                    raise SourceUnavailable(f"{endpoint} answers with more than {MAX_BYTES >> 20} MiB")
                connection.settimeout(limit.left())
    except (OSError, ValueError) as error:  # ValueError: a name that is none
        raise HostUnreachable(f"the front-end does not answer at {endpoint}: {error}") from None
    headers, _, content = bytes(answer).partition(b"\r\n\r\n")
    status = headers.split(b"\r\n", 1)[0].split(b" ")
    if len(status) < 2 or status[1] != b"200":
        raise SourceUnavailable(f"{endpoint} answers '{b' '.join(status)[:80].decode('ascii', 'replace')}'")
    return content


def _ask_tool(argv: list[str], reason: MadrigalError) -> bytes:
    try:
        return command.run(argv, deadline.control()).stdout
    except MadrigalError as error:
        raise type(reason)(f"{reason}; and {argv[0]} does not help: {error}") from None
