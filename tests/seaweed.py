"""A real S3 server for tests, with its bucket."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from kvbm.cli.demo.seaweed import Seaweed
from kvbm.stores.objects.cloud import Access, CloudStore

BUCKET = "bucket"


def started(folder: Path) -> Seaweed:
    """A server whose bucket is there: to make one takes this server seconds."""
    folder.mkdir(exist_ok=True)
    server = Seaweed(folder)
    with mock.patch.dict(os.environ, server.credentials):
        client(server, deadline_s=120.0).put("first", b"x")
    return server


def client(server: Seaweed, prefix: str = "", deadline_s: float = 20.0) -> CloudStore:
    """Of its bucket. The environment has the server's credentials."""
    return CloudStore("s3", BUCKET, prefix, Access(deadline_s, server.endpoint))
