"""What a start finds: after every possible kill, and after any damage to any file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvbm.core.errors import KvbmError
from kvbm.stores.disk import disk as disk_module
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.stores.disk.meta import read_meta
from kvbm.stores.disk.shard import Shard
from kvbm.testing.store import DONE, HostBlocks, Result, bytes_of, key_of, labels, slots
from kvbm.transfer.executor import Executor
from tests.stores.plain import PlainTransport

FINGERPRINT = "fedcba9876543210" * 4
BLOCK = 4096
BOUND = 300_000
NOW = 2e9


def keys(*blocks: int) -> list[bytes]:
    return [key_of(block) for block in blocks]


def opened(path: Path, ranks: int, bound: int = BOUND) -> tuple[Folder, NamespaceFolder]:
    folder = Folder.claim(path, "test", clock=lambda: NOW)
    try:
        return folder, folder.namespace(FINGERPRINT, {}, ranks=ranks, block_bytes=BLOCK, bound_bytes=bound)
    except BaseException:
        folder.close()
        raise


@dataclass
class Rank:
    """One rank's shard, and what reads and writes it."""

    shard: Shard
    memory: HostBlocks
    disk: Disk

    @classmethod
    def open(cls, namespace: NamespaceFolder, rank: int) -> Rank:
        shard = Shard(namespace.place, rank, sync="never", direct=False, clock=lambda: NOW)
        memory, executor = HostBlocks(16, BLOCK), Executor([PlainTransport()])
        return cls(shard, memory, Disk(shard, memory.region, executor.submit, executor.cancel, threads=1))

    def write(
        self, blocks: list[int], places: list[int], sequence: int, expires: float = np.inf, generation: int = 0
    ) -> None:
        for slot, block in enumerate(blocks):
            self.memory.put(slot, self.contents(key_of(block)))
        text, result = labels(keys(*blocks), sequence, generation, expires), Result()
        self.disk.write(1, slots(*range(len(blocks))), slots(*places), text, None, 10, result)
        assert set(result.outcomes) <= {DONE}
        assert self.disk.wait([1], 10)

    def read(self, key: bytes, place: int) -> bool:
        """Whether a block is there; if it is, its bytes are right."""
        return self.read_any([key], place) == 1

    def read_any(self, wanted: list[bytes], place: int) -> int:
        """How many of these blocks one slot holds; what it holds is right."""
        result, count = Result(), len(wanted)
        self.disk.read(1, slots(*[place] * count), slots(*range(count)), wanted, 10, result)
        assert self.disk.wait([1], 10)
        for i, (key, outcome) in enumerate(zip(wanted, result.outcomes, strict=True)):
            assert outcome is not DONE or self.memory.get(i, BLOCK) == self.contents(key)
        return result.outcomes.count(DONE)

    def contents(self, key: bytes) -> bytes:
        return bytes_of(bytes([self.shard.rank]) + key, BLOCK)


def write(path: Path, ranks: int, *writes: Any) -> list[bytes]:
    """Write on all ranks or, where a write names them, on some; returns the keys that a restart finds."""
    folder, namespace = opened(path, ranks)
    shards = [Rank.open(namespace, rank) for rank in range(ranks)]
    for only, *what in writes:
        for rank in range(ranks) if only is None else only:
            shards[rank].write(*what)
    for rank in shards:
        rank.disk.close(1)
    namespace.close()
    folder.close()
    return found(path, ranks)


def found(path: Path, ranks: int) -> list[bytes]:
    """The keys of a restart; all can be read."""
    folder, namespace = opened(path, ranks)
    recovered = namespace.recover()
    for rank in range(ranks):
        one = Rank.open(namespace, rank)
        for key, slot in zip(recovered.key_list(), recovered.slots.tolist(), strict=True):
            assert one.read(key, slot)
        one.disk.close(1)
    namespace.close()
    folder.close()
    return recovered.key_list()


def test_the_oldest_write_comes_first_and_in_a_prompt_its_leaf(tmp_path: Path) -> None:
    writes = [(None, [1, 2], [9, 3], 5), (None, [3], [0], 1), (None, [4], [1], 9)]
    assert write(tmp_path, 1, *writes) == keys(3, 2, 1, 4)


def test_only_blocks_that_all_ranks_have(tmp_path: Path) -> None:
    both, first, second = (None, [1, 2, 3], [0, 1, 2], 1), ([0], [4], [1], 10), ([1], [5], [5], 11)
    assert write(tmp_path, 2, both, first, second) == keys(3, 1)


def test_a_block_of_two_different_writes_on_two_ranks_is_none(tmp_path: Path) -> None:
    """Rank 1 missed the second write of the same block."""
    assert write(tmp_path, 2, (None, [1, 2], [0, 1], 1), ([0], [1], [0], 7)) == keys(2)


def test_the_last_write_of_a_key_wins(tmp_path: Path) -> None:
    assert write(tmp_path, 1, (None, [1, 2], [0, 1], 1), (None, [1], [5], 8)) == keys(2, 1)
    folder, namespace = opened(tmp_path, 1)
    recovered = namespace.recover()
    assert recovered.slots.tolist() == [1, 5]
    assert recovered.next_sequence == 9
    folder.close()


def test_expired_blocks_are_gone(tmp_path: Path) -> None:
    assert write(tmp_path, 1, (None, [1], [0], 1, NOW - 1), (None, [2], [1], 2, NOW + 1)) == keys(2)


def test_numbers_go_on_after_those_of_blocks_that_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 2, ([1], [1], [0], 100))
    folder, namespace = opened(tmp_path, 2)
    assert namespace.recover().next_sequence == 101
    folder.close()


def test_labels_come_back(tmp_path: Path) -> None:
    folder, namespace = opened(tmp_path, 1)
    shard = Shard(namespace.place, 0, sync="never")
    text = labels([b"short", key_of(2)], 3)
    text.priorities[1], text.expires[1] = -7, NOW + 5
    object.__setattr__(text, "parents", [b"", key_of(1)])
    shard.commit(shard.records(slots(4, 2), text, np.array([8, 9], dtype=np.uint64)), shard.region)
    recovered = namespace.recover()
    assert recovered.key_list() == [key_of(2), b"short"]
    assert recovered.parents.tolist() == [int.from_bytes(key_of(1)[:8], "little"), 0]
    assert recovered.priorities.tolist() == [-7, 0]
    assert recovered.expires.tolist() == [NOW + 5, np.inf]
    shard.close()
    folder.close()


@pytest.mark.usefixtures("rows_by_pwrite")
def test_after_a_kill_at_any_instant_what_was_done_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of files is noted; then each prefix of them, and half of the next one, is what a kill left."""
    writes = [([1, 2, 3], [5, 6, 9]), ([4, 5], [6, 7]), ([6, 1], [9, 5]), ([7, 8, 9], [1, 2, 3])]
    log: list[Any] = []
    folder, namespace = opened(tmp_path / "real", 1)
    rank = Rank.open(namespace, 0)
    shutil.copytree(tmp_path / "real", tmp_path / "before")

    def noting(real: Callable[..., int], joined: Callable[[Any], bytes]) -> Callable[..., int]:
        def write(fd: int, data: Any, offset: int) -> int:
            log.append((os.readlink(f"/proc/self/fd/{fd}"), joined(data), offset))
            return real(fd, data, offset)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", noting(os.pwrite, bytes))
        patch.setattr(os, "pwritev", noting(os.pwritev, b"".join))
        sequence = 1
        for blocks, places in writes:
            log.append(("begin", places))
            rank.write(blocks, places, sequence)
            log.append(("done", dict(zip(places, blocks, strict=True))))
            sequence += len(blocks)
    rank.disk.close(1)
    folder.close()
    assert len(log) > 20

    there: dict[int, int] = {}
    for event, now in enumerate(log):
        if now[0] == "begin":
            for place in now[1]:
                there.pop(place, None)
        elif now[0] == "done":
            there |= now[1]
        elif len(now[1]):
            for part in {0, 8, len(now[1]) // 2, len(now[1]) - 1}:
                copy = tmp_path / "after"
                shutil.copytree(tmp_path / "before", copy)
                for path, data, offset in [entry for entry in log[:event] if len(entry) == 3] + [
                    (now[0], now[1][:part], now[2])
                ]:
                    with (copy / Path(path).relative_to(tmp_path / "real")).open("r+b") as file:
                        file.seek(offset)
                        file.write(data)
                assert set(found(copy, 1)) >= set(keys(*there.values()))
                shutil.rmtree(copy)


# -- damage --

OFFSET = st.integers(0, 1 << 17)
FILES = ("lock", "meta.json", "rank0.data", "rank0.index", "rank1.data", "rank1.index")
FILE = st.sampled_from(FILES)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), FILE, OFFSET, st.integers(1, 255)),
    st.tuples(st.just("truncate"), FILE, OFFSET),
    st.tuples(st.just("overwrite"), FILE, OFFSET, st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("swap"), FILE, st.integers(0, 30), st.integers(0, 30), st.sampled_from([128, 4096])),
    st.tuples(st.just("exchange"), FILE, FILE),
    st.tuples(st.just("delete"), FILE),
    st.tuples(st.just("folder"), FILE),
    st.tuples(st.just("append"), FILE, st.binary(min_size=1, max_size=5000)),
    st.tuples(st.just("edit"), st.sampled_from(["ranks", "block_bytes", "num_slots", "generation", "format"]), OFFSET),
)


def hurt(folder: Path, what: str, *how: Any) -> None:
    def path(name: str) -> Path:
        return folder / name if name == "lock" else folder / FINGERPRINT[:16] / name

    if what == "edit":
        name, value = how
        with suppress(ValueError, KvbmError):
            if meta := read_meta(path("meta.json").parent):
                replace(meta, **{name: value}).write(path("meta.json").parent)
        return None
    file = path(how[0])
    if not file.is_file():
        return None
    data = bytearray(file.read_bytes())
    if what == "delete":
        return file.unlink()
    if what == "folder":
        file.unlink()
        return file.mkdir()
    if what == "exchange":
        if (other := path(how[1])).is_file():
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
        return None
    if what == "truncate":
        del data[how[1] :]
    elif what == "append":
        data += how[1]
    elif what == "swap":
        first, second = (slice(n * how[3], (n + 1) * how[3]) for n in how[1:3])
        data[first], data[second] = data[second], data[first]
    elif data:
        at = how[1] % len(data)
        if what == "flip":
            data[at] ^= how[2]
        else:
            data[at : at + len(how[2])] = how[2]
    file.write_bytes(data)
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    writes = [(None, [1, 2, 3, 4, 5], [0, 1, 2, 6, 7], 1), (None, [6, 2], [0, 9], 9), ([1], [8], [3], 20)]
    assert set(write(path, 2, *writes)) == set(keys(2, 3, 4, 5, 6))
    return path


@pytest.fixture
def unexpected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error that nobody foresaw is one too many, even where it ends as an outcome."""
    seen: list[Any] = []
    monkeypatch.setattr(disk_module.logger, "exception", lambda *text: seen.append(text))
    yield
    assert seen == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DAMAGE, min_size=1, max_size=4))
def test_no_damage_is_ever_served_or_an_unknown_error(
    whole: Path, tmp_path: Path, unexpected: None, damages: list[Any]
) -> None:
    path = tmp_path / "hurt"
    shutil.copytree(whole, path)
    for damage in damages:
        hurt(path, *damage)
    for _ in range(2):  # the second finds what the first has put right
        with suppress(KvbmError):  # it may say that this cannot be used
            attempt(path)
    shutil.rmtree(path)


def attempt(path: Path) -> None:
    folder, namespace = opened(path, 2)
    ranks: list[Rank] = []
    try:
        recovered = namespace.recover()
        for rank in range(2):
            ranks.append(Rank.open(namespace, rank))
            for key, slot in zip(recovered.key_list(), recovered.slots.tolist(), strict=True):
                ranks[-1].read(key, slot)
            for slot in range(10):
                ranks[-1].read_any(keys(*range(10)), slot)
            ranks[-1].write([11], [4], 1000, generation=namespace.generation)
            assert ranks[-1].read(key_of(11), 4)
            ranks[-1].shard.probe()
    finally:
        for one in ranks:
            one.disk.close(1)
        folder.close()
