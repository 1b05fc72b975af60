"""The suite of stores over Google Cloud Storage as obstore speaks to it (`tests/gcs.py`). Never run on Google's own."""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from kvbm.abc.store import Denied, ObjectStore
from kvbm.core.errors import Broken
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.places import locate, open_store
from kvbm.stores.objects.probe import probe
from kvbm.testing.objects import ObjectStoreSuite
from tests.gcs import ACCOUNT, Gcs

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def google() -> Iterator[Gcs]:
    server = Gcs()
    yield server
    server.close()


@pytest.fixture
def access(google: Gcs, monkeypatch: pytest.MonkeyPatch) -> Access:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", ACCOUNT)
    return Access(10.0, google.endpoint)


class TestGcs(ObjectStoreSuite):
    @pytest.fixture
    def open(self, access: Access) -> Callable[[], ObjectStore]:
        prefix = f"test-{next(NUMBERS)}/kv"
        return lambda: CloudStore("gs", "bucket", prefix, access)


def test_an_address_leads_there(access: Access, google: Gcs) -> None:
    store = open_store(locate("gs://bucket/some/prefix"), access)
    assert probe(store, "0123456789abcdef", itertools.count(), 100_000).refusal is None
    store.put("kv1/x", b"1")
    assert "some/prefix/kv1/x" in google.objects


def test_a_bucket_that_is_not_there(access: Access) -> None:
    store = open_store(locate("gs://another"), access)
    with pytest.raises(Denied, match="no such bucket"):
        probe(store, "0123456789abcdef", itertools.count(), 1_000)


@pytest.fixture
def certified(google: Gcs, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that answers as that one does, by TLS, and a file with who vouches for it."""
    ours, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    who, host = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("tests", "127.0.0.1"))
    now, address = datetime.now(UTC), x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])

    def made(subject: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        number, end = x509.random_serial_number(), now + timedelta(1)
        builder = x509.CertificateBuilder(who, subject, key, number, now - timedelta(1), end)
        return builder.add_extension(extension, critical=True).sign(ours, SHA256()).public_bytes(Encoding.PEM)

    ca, own, private = tmp_path / "ca.pem", tmp_path / "own.pem", tmp_path / "key.pem"
    ca.write_bytes(made(who, ours.public_key(), x509.BasicConstraints(ca=True, path_length=None)))
    own.write_bytes(made(host, theirs.public_key(), address))
    private.write_bytes(theirs.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(own, private)
    with closing(Gcs(tls=context)) as server:
        yield server.endpoint, ca


def test_a_certificate_of_ones_own(certified: tuple[str, Path], access: Access) -> None:
    endpoint, ca = certified
    assert endpoint.startswith("https://")
    store = CloudStore("gs", "bucket", "", replace(access, endpoint=endpoint, ca_file=ca))
    assert probe(store, "0123456789abcdef", itertools.count(), 1_000).refusal is None
    with pytest.raises(Broken, match="certificate"):
        CloudStore("gs", "bucket", "", replace(access, endpoint=endpoint, deadline_s=2.0)).put("a", b"1")


def test_by_way_of_a_proxy(google: Gcs, access: Access) -> None:
    """Nobody but the proxy knows the way."""
    there = replace(access, endpoint="http://storage.invalid", deadline_s=2.0)
    store = CloudStore("gs", "bucket", "proxied", replace(there, proxy=google.endpoint))
    assert store.put("a", b"1")
    assert google.objects["proxied/a"][0] == b"1"
    with pytest.raises(Broken, match="does not answer"):
        CloudStore("gs", "bucket", "", there).put("b", b"1")
