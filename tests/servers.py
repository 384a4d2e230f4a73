"""Web servers for tests, and a proxy: whole pages, files in ranges, connections that are cut, bytes as they are."""

from __future__ import annotations

import contextlib
import http.server
import io
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from typing import BinaryIO

DRIP: list[bytes | float] = [b"x", 0.1]
"""For Web.raw(): a byte now and then."""


class Web(http.server.ThreadingHTTPServer):
    """A server whose pages are functions of the handler; `asked` has the requests."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), Handler)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.pages: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        """Bytes of the bodies of file()."""
        self.over = threading.Event()
        self.url = f"http{'s' if context else ''}://{address}:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are what is tested

    def page(self, path: str, body: bytes, **headers: str) -> str:
        def answer(handler: Handler) -> None:
            handler.send_response(200)
            for name, value in ({"Content_Length": str(len(body))} | headers).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.pages[path] = answer
        return self.url + path

    def file(self, path: str, body: bytes | BinaryIO, cuts: Sequence[int] = (), **headers: str) -> str:
        """A file with an ETag, in ranges; the first connections are reset after as many bytes as CUTS says."""
        left = list(cuts)

        def answer(handler: Handler) -> None:
            file = io.BytesIO(body) if isinstance(body, bytes) else body
            size = file.seek(0, 2)
            said = {"ETag": '"1"', "Accept_Ranges": "bytes"} | headers
            start, end = 0, size
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
            if match and handler.headers.get("If-Range", said["ETag"]) in (said["ETag"], said.get("Last_Modified")):
                start, end = int(match[1]), min(int(match[2] or size) + 1, size)
                if start >= size:
                    handler.send_response(416)
                    handler.send_header("Content-Range", f"bytes */{size}")
                    handler.end_headers()
                    return
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            else:
                handler.send_response(200)
            for name, value in ({"Content_Length": str(end - start)} | said).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            stop = min(end, start + left.pop(0)) if left else end
            file.seek(start)
            while start < stop and (piece := file.read(min(1 << 20, stop - start))):
                handler.wfile.write(piece)
                self.sent += len(piece)
                start += len(piece)
            if start < end:
                handler.reset()

        self.pages[path] = answer
        return self.url + path

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        def answer(handler: Handler) -> None:
            handler.send_response(status)
            handler.send_header("Location", to)
            handler.end_headers()

        self.pages[path] = answer
        return self.url + path

    def raw(self, path: str, *pieces: bytes | float) -> str:
        """Bytes as they are, with pauses."""

        def answer(handler: Handler) -> None:
            for piece in pieces:
                if isinstance(piece, bytes):
                    handler.wfile.write(piece)
                    handler.wfile.flush()
                else:
                    self.over.wait(piece)
            handler.close_connection = True

        self.pages[path] = answer
        return self.url + path

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path)
        if page:
            page(self)
        else:
            self.send_error(404)

    def reset(self) -> None:
        """End the connection as a machine does that has lost it; what is on its way is lost too."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy that fetches http and tunnels https; it writes down what it was asked."""

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"via proxy")

    def do_CONNECT(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))  # type: ignore[attr-defined]
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

            def pump(one: socket.socket, other: socket.socket) -> None:
                while piece := one.recv(65536):
                    other.sendall(piece)
                other.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(upstream, self.connection), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                pump(self.connection, upstream)
            back.join(5)

    def log_message(self, *_: object) -> None:
        pass
