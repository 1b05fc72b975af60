"""The suite of stores over a real S3 server, and what only object stores do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvbm.abc.store import Denied, ObjectStore
from kvbm.cli.demo.seaweed import Seaweed
from kvbm.core.errors import Broken
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.probe import probe
from kvbm.testing.objects import ObjectStoreSuite
from tests.seaweed import client

NUMBERS = itertools.count()


@pytest.fixture
def in_weed(weed_user: Seaweed) -> Callable[..., CloudStore]:
    own = f"test-{next(NUMBERS)}"  # this server sets much space aside for each bucket
    return lambda prefix="some/prefix": client(weed_user, f"{own}/{prefix}")


class TestS3(ObjectStoreSuite):
    @pytest.fixture
    def open(self, in_weed: Callable[..., CloudStore]) -> Callable[[], ObjectStore]:
        return in_weed


def test_wrong_credentials_are_said(in_weed: Callable[..., CloudStore], monkeypatch: pytest.MonkeyPatch) -> None:
    right = in_weed()
    right.put("name", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    wrong = in_weed()
    for call in (lambda: wrong.get("name"), lambda: wrong.put("other", b"y"), lambda: wrong.stat("name")):
        with pytest.raises(Denied) as error:
            call()
        assert "not-the-secret" not in str(error.value)
    assert bytes(memoryview(right.get("name"))) == b"x"
    assert probe(right, "0123456789abcdef", itertools.count(), 100_000).refusal is None
    with pytest.raises(Denied):
        probe(wrong, "0123456789abcdef", itertools.count(), 100_000)


def test_two_prefixes_of_a_bucket_are_apart(in_weed: Callable[..., CloudStore]) -> None:
    one, other = in_weed(prefix="one"), in_weed(prefix="one/other")
    one.put("name", b"1")
    other.put("name", b"2")
    assert bytes(memoryview(one.get("name"))) == b"1"
    assert [each.name for page in one.list("other/") for each in page] == ["other/name"]
    assert [each.name for page in other.list("") for each in page] == ["name"]


@pytest.mark.parametrize("address", ["minio:9000", "http://me:hun/ter2@127.0.0.1:1", "http://me:hun ter2@h:1"])
def test_an_address_that_makes_the_library_panic(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    store = CloudStore("s3", "bucket", "", Access(1.0, region="us-east-1"))
    with pytest.raises(Broken, match=r"obstore broke off .*AWS_ENDPOINT_URL") as error:
        probe(store, "0123456789abcdef", itertools.count(), 100)
    assert "ter2" not in str(error.value)


def test_nobody_listens() -> None:
    store = CloudStore("s3", "bucket", "", Access(1.0, "http://127.0.0.1:9", "us-east-1", path_style=True))
    with pytest.raises(Broken):
        store.get("name")
