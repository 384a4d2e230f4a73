"""A web server that images come from: right, cut off in the middle, or silent."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web:
    """Serves what `files` has: content by path.  `cut` are paths whose content ends in the middle."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                web.answer(self, True)

            def do_HEAD(self) -> None:
                web.answer(self, False)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def put(self, name: str, content: bytes, cut: bool = False) -> str:
        """The URL where CONTENT is from now on."""
        self.files[f"/{name}"] = content
        if cut:
            self.cut.add(f"/{name}")
        return f"{self.url}/{name}"

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        content = self.files.get(request.path)
        if content is None:
            request.send_response(404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start, end = 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
        request.send_response(206 if wanted else 200)
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        request.send_header("Content-Length", str(end - start))
        request.end_headers()
        if with_body:
            body = content[start:end]
            try:
                if request.path in self.cut:
                    request.wfile.write(body[: len(body) // 2])
                    request.close_connection = True
                else:
                    request.wfile.write(body)
            except OSError:
                pass  # it did not want more

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
