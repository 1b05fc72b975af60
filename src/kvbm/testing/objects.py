"""What storage that many instances share has to pass. Subclass `ObjectStoreSuite` in a test file and supply `open`."""

from __future__ import annotations

import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
from typing_extensions import Buffer

from kvbm.abc.store import Absent, Damaged, Listed, ObjectStore
from kvbm.stores.objects.probe import together

ROUNDS: Final = 6
"""Races for one name."""
LATER_S: Final = 10.0
"""Within this time a reader that looked for an object too early sees it: mounts remember what was not there."""
MANY: Final = 1_100
"""More than a page."""


class ObjectStoreSuite(ABC):
    """The rules of `kvbm.abc.store.ObjectStore`."""

    @pytest.fixture
    @abstractmethod
    def open(self) -> Callable[[], ObjectStore]:
        """Opens the same storage, empty at first for each test, as another process would."""

    @staticmethod
    def listed(store: ObjectStore, prefix: str = "") -> dict[str, Listed]:
        return {each.name: each for page in store.list(prefix) for each in page}

    @pytest.mark.parametrize("size", [1, 4095, 1 << 20, 9_000_001])
    def test_what_is_written_is_read(self, open: Callable[[], ObjectStore], size: int) -> None:
        data = os.urandom(size)
        assert open().put("kv1/a/one", data)
        other = open()
        assert bytes(memoryview(other.get("kv1/a/one"))) == data
        found = other.stat("kv1/a/one")
        assert (found.name, found.size) == ("kv1/a/one", size)

    def test_any_buffer_is_written(self, open: Callable[[], ObjectStore]) -> None:
        store, array = open(), memoryview(np.arange(1000, dtype=np.uint8))  # type: ignore[arg-type]
        buffers: list[Buffer] = [array, array[100:200], bytearray(b"abc"), b"bytes", array.cast("I")]
        for at, buffer in enumerate(buffers):
            assert store.put(f"buffer/{at}", buffer)
            assert bytes(memoryview(store.get(f"buffer/{at}"))) == memoryview(buffer).tobytes()

    def test_parts_are_read(self, open: Callable[[], ObjectStore]) -> None:
        store, data = open(), os.urandom(10_000)
        store.put("part", data)
        for start, length in ((0, 10_000), (0, 1), (9_999, 1), (1234, 4321)):
            assert bytes(memoryview(store.get_range("part", start, length))) == data[start : start + length]
        assert bytes(memoryview(store.get_range("part", 9_990, 100))) == data[9_990:], "as many as there are"

    def test_what_is_not_there_is_absent(self, open: Callable[[], ObjectStore]) -> None:
        store = open()
        for call in (store.get, store.stat, lambda name: store.get_range(name, 0, 1)):
            with pytest.raises(Absent):
                call("kv1/none/here")
        assert self.listed(store) == {}
        assert self.listed(store, "kv1/none/") == {}

    def test_what_is_longer_than_it_may_be_is_not_read(self, open: Callable[[], ObjectStore]) -> None:
        store = open()
        store.put("long", bytes(1_000))
        assert len(memoryview(store.get("long", 1_000))) == 1_000
        with pytest.raises(Damaged):
            store.get("long", 999)

    def test_nothing_is_written_twice(self, open: Callable[[], ObjectStore]) -> None:
        store, other = open(), open()
        assert store.put("name", b"first")
        assert not other.put("name", b"second, and longer")
        assert not store.claim("name", b"third")
        assert bytes(memoryview(other.get("name"))) == b"first"

    def test_one_of_many_gets_what_only_one_may_have(self, open: Callable[[], ObjectStore]) -> None:
        stores = [open() for _ in range(4)]
        for round_ in range(ROUNDS):
            bodies = [secrets.token_bytes(100) for _ in stores]
            won = together([
                lambda store=store, body=body, name=f"gc/{round_}": store.claim(name, body)  # type: ignore[misc]
                for store, body in zip(stores, bodies, strict=True)
            ])  # fmt: skip
            assert won.count(True) == 1, f"round {round_}: {won}"
            assert bytes(memoryview(stores[0].get(f"gc/{round_}"))) == bodies[won.index(True)]

    def test_a_reader_sees_all_or_nothing(self, open: Callable[[], ObjectStore]) -> None:
        """While several write the same run."""
        stores, data = [open() for _ in range(3)], os.urandom(3 << 20)
        reader = open()
        for round_ in range(5):
            name, seen, over = f"whole/{round_}", set[bytes](), threading.Event()

            def read(name: str = name, seen: set[bytes] = seen, over: threading.Event = over) -> None:
                while not over.is_set():
                    try:
                        seen.add(bytes(memoryview(reader.get(name))))
                    except Absent:
                        continue

            thread = threading.Thread(target=read, daemon=True)
            thread.start()
            won = together([lambda store=store, name=name: store.put(name, data) for store in stores])  # type: ignore[misc]
            end = time.monotonic() + LATER_S
            while not seen and time.monotonic() < end:
                time.sleep(0.001)
            over.set()
            thread.join(60)
            assert any(won)
            assert seen == {data}

    def test_a_listing_has_all_below_a_prefix(self, open: Callable[[], ObjectStore]) -> None:
        store = open()
        names = {f"kv1/{space}/{first:02x}/{at}" for space in "ab" for first in range(3) for at in range(4)}
        for name in names | {"kv1/abc", "other/kv1/a/00/0"}:
            store.put(name, name.encode())
        other = open()
        found = self.listed(other, "kv1/a/")
        assert found.keys() == {name for name in names if name.startswith("kv1/a/")}
        assert all(each.size == len(name) and each.name == name for name, each in found.items())
        assert self.listed(other).keys() == names | {"kv1/abc", "other/kv1/a/00/0"}
        times = [each.modified for each in self.listed(other).values()]
        assert max(times) - min(times) < 60

    def test_a_listing_has_many_pages(self, open: Callable[[], ObjectStore]) -> None:
        store = open()
        names = [f"many/{at % 7}/{at:05}" for at in range(MANY)]
        together([
            lambda part=part: [store.put(name, b"x") for name in names[part::8]]  # type: ignore[misc]
            for part in range(8)
        ])  # fmt: skip
        pages = list(store.list("many/"))
        assert len(pages) > 1
        assert sorted(each.name for page in pages for each in page) == sorted(names)
        store.delete(names)
        assert self.listed(store, "many/") == {}

    def test_what_is_deleted_is_gone_and_may_come_again(self, open: Callable[[], ObjectStore]) -> None:
        store, other = open(), open()
        for name in ("one", "two", "three"):
            store.put(name, b"old")
        other.delete(["one", "was/never/there", "two"])
        with pytest.raises(Absent):
            store.get("one")
        assert self.listed(store).keys() == {"three"}
        other.delete(["one"])
        other.delete([])
        assert store.put("one", b"new")
        assert bytes(memoryview(other.get("one"))) == b"new"

    def test_many_at_once(self, open: Callable[[], ObjectStore]) -> None:
        store = open()
        data = {f"at-once/{at}": os.urandom(200_000 + at) for at in range(24)}
        assert all(together([lambda name=name: store.put(name, data[name]) for name in data]))  # type: ignore[misc]
        got = together([lambda name=name: bytes(memoryview(store.get(name))) for name in data])  # type: ignore[misc]
        assert got == list(data.values())

    def test_long_names(self, open: Callable[[], ObjectStore]) -> None:
        store, name = open(), "kv1/" + "/".join(["part.of-a_name"] * 12)
        assert store.put(name, b"long")
        assert self.listed(store).keys() == {name}
        store.close()
