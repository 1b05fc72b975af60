"""The suite of stores over Google Cloud Storage as obstore speaks to it (`tests/gcs.py`). Never run on Google's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from kvbm.abc.store import Denied, ObjectStore
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
