"""A server between a client and a real S3 server, which spoils what passes in the way that a test says."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["good", "refused", "silent", "cut", "drip", "page", "stored", "full"]
"""As it is; 503; no answer; half an answer; an answer that takes for ever; an error page with status 200; a write is
made and answered by 500; nothing can be written, for want of room."""
PAGE = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are sorry</Message></Error>"


class Faulty(ThreadingHTTPServer):
    """In front of `port`, on a port of its own, from now on until `close`."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.theirs, self.mode = port, "good"
        self.requests = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def set(self, mode: Mode) -> None:
        self.mode = mode

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are what is tested here."""

    def close(self) -> None:
        self.mode = "refused"
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def _pass(self) -> None:
        self.server.requests += 1
        mode, length = self.server.mode, int(self.headers.get("Content-Length") or 0)
        if mode == "silent":
            time.sleep(20)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if mode == "refused":
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return
        if mode == "full" and self.command == "PUT":
            self._answer(507, b"<Error><Code>XMinioStorageFull</Code></Error>")
            return
        if mode == "page" and self.command == "GET":
            self._answer(200, PAGE)
            return
        status, headers, said = self._theirs(body)
        if mode == "stored" and self.command == "PUT":
            self._answer(500, PAGE)
        elif mode in ("cut", "drip") and self.command == "GET" and status == 200 and len(said) > 1000:
            self._head(status, headers, len(said))
            if mode == "cut":
                self.wfile.write(said[: len(said) // 2])
            else:
                for at in range(0, len(said), 100):
                    self.wfile.write(said[at : at + 100])
                    time.sleep(0.2)
            self.close_connection = True
        else:
            self._head(status, headers, len(said))
            if self.command != "HEAD":
                self.wfile.write(said)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

    def _theirs(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.theirs, timeout=20)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)  # the host among them: it is signed
            connection.endheaders(body)
            response = connection.getresponse()
            said = response.read()
            length = response.getheader("Content-Length")
            if self.command == "HEAD" and length is not None:
                said = bytes(int(length))
            return response.status, response.getheaders(), said
        except OSError:
            return 502, [], b""
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes) -> None:
        self._head(status, [], len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
