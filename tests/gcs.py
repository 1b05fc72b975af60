"""Google Cloud Storage as obstore speaks to it, in memory: the XML API's PUT with a precondition, GET with ranges,
HEAD, DELETE and LIST version 2. What else is asked is answered by 501.

https://cloud.google.com/storage/docs/xml-api/reference-headers, .../get-bucket-list, .../put-object
"""

from __future__ import annotations

import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT = json.dumps({"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""})
"""For the variable GOOGLE_SERVICE_ACCOUNT_KEY: without it obstore asks Google for a token."""
Spoilt = Literal["", "refused", "stored and refused", "missing", "late", "flipped", "cut"]
_LATE_S = 0.8
_PAGE = 1_000


class Gcs(ThreadingHTTPServer):
    """Has the bucket `bucket`, and speaks TLS where it is given one. From now on until `close`."""

    daemon_threads = True

    def __init__(self, bucket: str = "bucket", tls: ssl.SSLContext | None = None) -> None:
        self.bucket, self._tls = bucket, tls
        self.lock = threading.Lock()
        self.objects: dict[str, tuple[bytes, int, float]] = {}
        """Bytes, generation, and when they were written."""
        self.generation = 1_700_000_000_000_000
        self.spoil: Callable[[str, str], Spoilt] = lambda command, name: ""
        """What goes wrong with a request about an object, by its command and name."""
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http{'s' if self._tls is not None else ''}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gcs

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def _name(self) -> str | None:
        """Of the object; "" for the bucket. None where the bucket is another: answered."""
        bucket, _, name = urlsplit(self.path).path.lstrip("/").partition("/")
        if unquote(bucket) != self.server.bucket:
            self._error(404, "NoSuchBucket")
            return None
        return unquote(name)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (name := self._name()) is None:
            return
        if not name:
            self._error(501, "NotImplemented")
            return
        server, wanted = self.server, self.headers.get("x-goog-if-generation-match")
        if (spoilt := self._spoilt(name)) == "refused":
            return
        body = _flipped(body) if spoilt == "flipped" else body
        with server.lock:
            there = server.objects.get(name)
            if wanted is not None and int(wanted) != (there[1] if there is not None else 0):
                self._error(412, "PreconditionFailed")
                return
            server.generation += 1
            server.objects[name] = body, server.generation, time.time()
            generation = server.generation
        if spoilt == "stored and refused":
            self._error(500, "InternalError")
        else:
            self._answer(200, b"", generation)

    def _spoilt(self, name: str) -> Spoilt:
        """How this request goes wrong. Where it is refused, that was answered."""
        spoilt = self.server.spoil(self.command, name)
        if spoilt == "refused":
            self._error(503, "ServiceUnavailable")
        elif spoilt == "late":
            time.sleep(_LATE_S)
        return spoilt

    def do_GET(self) -> None:
        if (name := self._name()) is None:
            return
        if not name:
            self._list()
            return
        if (spoilt := self._spoilt(name)) == "refused":
            return
        with self.server.lock:
            there = self.server.objects.get(name)
        if there is None or spoilt == "missing":
            self._error(404, "NoSuchKey")
            return
        data, generation, written = there
        data = _flipped(data) if spoilt == "flipped" else data
        more = {"Last-Modified": formatdate(written, usegmt=True), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._answer(200, data, generation, more, cut=spoilt == "cut")
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            self._error(416, "InvalidRange")
            return
        more["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], generation, more)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        if (name := self._name()) is None:
            return
        with self.server.lock:
            there = self.server.objects.pop(name, None)
        if there is None:
            self._error(404, "NoSuchKey")
        else:
            self._answer(204, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._error(501, "NotImplemented")

    def _list(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        prefix, after = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
        most = min(_PAGE, int(query.get("max-keys", _PAGE)))
        with self.server.lock:
            found = sorted((name, *there) for name, there in self.server.objects.items())
        found = [each for each in found if each[0].startswith(prefix) and each[0] > after]
        page, more = found[:most], len(found) > most
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Generation>{generation}</Generation>"
            f"<LastModified>{datetime.fromtimestamp(written, UTC).isoformat()}</LastModified>"
            f'<ETag>"{generation}"</ETag><Size>{len(data)}</Size></Contents>'
            for name, data, generation, written in page
        )
        token = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if more else ""
        text = (
            f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult><Name>{self.server.bucket}</Name>"
            f"<Prefix>{escape(prefix)}</Prefix><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"<KeyCount>{len(page)}</KeyCount>{token}{entries}</ListBucketResult>"
        )
        self._answer(200, text.encode(), more={"Content-Type": "application/xml"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    def _answer(
        self, status: int, body: bytes, generation: int | None = None, more: dict[str, str] | None = None, *,
        cut: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if generation is not None:
            self.send_header("ETag", f'"{generation}"')
            self.send_header("x-goog-generation", str(generation))
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut


def _flipped(data: bytes) -> bytes:
    """One bit of it is wrong."""
    changed = bytearray(data)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)
