"""The suite of stores over Azure Blob Storage as Azurite speaks it (npm's `azurite`, which this installs below build/):

python -m pytest tests/stores/objects/azure.py
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from kvbm.abc.store import Denied, ObjectStore
from kvbm.cli import serve
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.places import locate, open_store
from kvbm.stores.objects.probe import probe
from kvbm.testing.objects import ObjectStoreSuite

NUMBERS = itertools.count()
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, which is public."""
PACKAGE = Path("build/azurite")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = PACKAGE / "node_modules/.bin/azurite-blob"
    if not program.exists():
        PACKAGE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", PACKAGE, "azurite"], check=True)
    port, folder = serve.free_port("127.0.0.1", 21_000), tmp_path_factory.mktemp("azurite")
    options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1"]
    server = subprocess.Popen([program.absolute(), *options, "--blobPort", str(port), "--location", folder])
    try:
        where = f"http://127.0.0.1:{port}/{ACCOUNT}"
        deadline = time.monotonic() + 30
        while not _made(where, "bucket"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield where
    finally:
        server.kill()
        server.wait()


def _made(endpoint: str, container: str) -> bool:
    """Makes a container, signed by the account's key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    text = (
        "PUT"
        + "\n" * 12
        + f"x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    )
    signed = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signed}"}
    headers["Content-Length"] = "0"
    request = urllib.request.Request(f"{endpoint}/{container}?restype=container", method="PUT", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 201)
    except urllib.error.HTTPError:
        raise
    except OSError:
        return False


@pytest.fixture
def access(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Access:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    return Access(10.0, endpoint)


class TestAzure(ObjectStoreSuite):
    @pytest.fixture
    def open(self, access: Access) -> Callable[[], ObjectStore]:
        prefix = f"test-{next(NUMBERS)}/kv"
        return lambda: CloudStore("az", "bucket", prefix, access)


def test_an_address_leads_there(access: Access) -> None:
    store = open_store(locate("az://bucket/some/prefix"), access)
    assert probe(store, "0123456789abcdef", itertools.count(), 100_000).refusal is None


def test_a_container_that_is_not_there(access: Access) -> None:
    store = open_store(locate("az://another"), access)
    with pytest.raises(Denied):
        probe(store, "0123456789abcdef", itertools.count(), 1_000)


def test_wrong_credentials_are_said(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = base64.b64encode(b"another key").decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    store = open_store(locate("az://bucket/some/prefix"), access)
    with pytest.raises(Denied) as error:
        probe(store, "0123456789abcdef", itertools.count(), 1_000)
    assert wrong not in str(error.value)
