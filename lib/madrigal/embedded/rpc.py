"""While actions run, answer what their drivers ask about VMs, datastores, images and hosts, as oned's XML-RPC does.

Listens on 127.0.0.1 only, in this process only, and answers nobody who does not show the token.
docs/contract.md, "What the front-end is asked"; documents.py makes what it answers.
"""

from __future__ import annotations

import hmac
import socketserver
import threading
from collections.abc import Callable, Mapping
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

from madrigal.errors import MadrigalError, NotFound

AUTHENTICATION, NO_EXISTS, UNKNOWN, INTERNAL = 0x0100, 0x0400, 0x1000, 0x2000

Show = Callable[["str | int"], bytes]


class _Handler(SimpleXMLRPCRequestHandler):
    rpc_paths = ("/RPC2",)
    timeout = 30  # nobody can keep a connection that says nothing


class _Server(socketserver.ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True


class Answering:
    """Answers from its making until `close`.  SHOW: for `vm`, `datastore`, ... what makes the document of an id."""

    def __init__(self, token: str, show: Mapping[str, Show]) -> None:
        self._session = f"oneadmin:{token}".encode()
        self._show = show
        self._server = _Server(("127.0.0.1", 0), _Handler, logRequests=False)
        self._server.register_instance(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/RPC2"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _dispatch(self, method: str, params: tuple[object, ...]) -> list[object]:
        """[True, document, 0] or [False, message, error code]."""
        parts = method.split(".")
        if len(parts) != 3 or parts[0] != "one" or parts[1] not in self._show or parts[2] != "info":
            return [False, f"[{method}] is not answered by the embedded front-end", UNKNOWN]
        session = params[0] if params else ""
        if not isinstance(session, str) or not hmac.compare_digest(session.encode(), self._session):
            return [False, f"[{method}] User couldn't be authenticated, aborting call.", AUTHENTICATION]
        ident = params[1] if len(params) > 1 else None
        if not isinstance(ident, (int, str)):
            return [False, f"[{method}] expected an id", UNKNOWN]
        try:
            return [True, self._show[parts[1]](ident).decode(), 0]
        except NotFound:
            return [False, f"[{method}] Error getting {parts[1]} [{ident}].", NO_EXISTS]
        except MadrigalError as error:
            return [False, f"[{method}] {error}", INTERNAL]
