"""The disk tier end to end without an engine: a real leader half, real workers, real files, real bytes."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.blocks import Pool
from kvbm.core.config import Settings
from kvbm.core.outcome import Outcome
from kvbm.link.channel import Link, listen
from kvbm.link.messages import Allot, Cancel, Copy, Hello, Opened, Ready, Result, Step, pack
from kvbm.policy.lru import LRU
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.stores.disk.meta import DiskPlace, bytes_of
from kvbm.stores.disk.shard import Shard
from kvbm.testing.transport import HostMemory
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.disk.orders import Forget, Generation, Probe, Probed, Read, Write, to_open
from kvbm.tiers.disk.rank import DiskRank
from kvbm.tiers.tier import RankSide
from kvbm.transfer.executor import Executor
from kvbm.transfer.file import FileTransport
from kvbm.transfer.memcpy import MemcpyTransport
from kvbm.worker.worker import Worker
from tests.leader.roles import keys_of
from tests.link.orders import off_channel, on_channel

ROWS = (4096, 4096, 640)
BLOCK = sum(ROWS)
G1, G2, G3 = 8, 6, 8
PATIENCE = 30.0
DONE, MISSING, CORRUPT, FAILED = (bytes([outcome]) for outcome in Outcome)


class Rank:
    """One rank's worker over numpy memory and a file, and its leader's end of the channel."""

    def __init__(self, run_dir: Path, place: DiskPlace, rank: int) -> None:
        self.g1 = HostMemory(ROWS, G1, name="g1")
        random = np.random.default_rng(rank)
        for slot in range(G1):
            self.g1.put(slot, random.bytes(BLOCK))
        self.before = [self.g1.get(slot) for slot in range(G1)]
        self.place, self.rank, self.jobs = place, rank, 0
        path = run_dir / f"{rank}.chan"
        with listen(path) as sock:
            self.worker = Worker(
                Settings(),
                self.g1.region,
                Hello(rank, place.ranks, "f", BLOCK),
                path,
                Executor([MemcpyTransport(1), FileTransport(2, 8, "threads")]),
                {"g3": lambda side: DiskRank(side, self.open_disk, Settings().g3_deadline_s)},
            )
            sock.settimeout(PATIENCE)
            self.link = Link(sock.accept()[0])
        assert isinstance(self.hear(), Hello)
        self.link.send(Allot(G2, stride=place.slot_bytes, sums="made"))
        assert self.hear() == Ready(rank, G2)
        self.link.send(to_open(place))
        assert self.hear() == Opened(rank, "g3")

    def open_disk(self, place: DiskPlace, side: RankSide) -> Disk:
        shard = Shard(place, side.rank, sync="never", direct=False)
        return Disk(shard, side.memory("G2 for the disk"), side.executor.submit, side.executor.cancel)

    @property
    def disk(self) -> DiskRank:
        disk = self.worker.tiers["g3"]
        assert isinstance(disk, DiskRank)
        return disk

    def send(self, message: Any) -> None:
        self.link.send(on_channel(message))

    def hear(self) -> Any:
        message = self.link.wait(PATIENCE)
        assert message is not None
        return off_channel(message)

    def result(self) -> Result:
        message = self.hear()
        assert isinstance(message, Result)
        return message

    def job(self) -> int:
        self.jobs += 1
        return self.jobs

    def offload(self, g1: list[int], g2: list[int]) -> None:
        step = Step(stores=[Copy.of(self.job(), "a", g1, g2)])
        self.worker.before_step(step)
        self.worker.before_forward(step)
        self.worker.after_forward(step)
        assert self.result().outcomes == DONE * len(g1)

    def load(self, g2: list[int], g1: list[int]) -> None:
        self.worker.before_step(Step(loads=[Copy.of(self.job(), "a", g1, g2)]))
        assert self.result().outcomes == DONE * len(g1)

    def write(
        self, g2: list[int], g3: list[int], keys: list[bytes], *, sequence: int = 0, generation: int = 0
    ) -> Result:
        parents = [None, *keys[:-1]]
        self.send(
            Write(
                self.job(), pack(g2), pack(g3), keys, parents, np.zeros(len(keys), np.int32).tobytes(),
                np.full(len(keys), np.inf).tobytes(), sequence, generation,
            )
        )  # fmt: skip
        return self.result()

    def read(self, g3: list[int], g2: list[int], keys: list[bytes]) -> Result:
        self.send(Read(self.job(), pack(g3), pack(g2), keys))
        return self.result()

    def probe(self, *, reopen: bool = False) -> str | None:
        self.send(Probe(reopen, 7))
        answer = self.hear()
        assert isinstance(answer, Probed)
        assert (answer.rank, answer.number) == (self.rank, 7)
        return answer.problem

    def spoil_arena(self, slot: int) -> None:
        region = self.worker.memory.extents
        assert region is not None
        plane = region.planes[0]
        ctypes.memset(plane.address + slot * plane.stride + 5000, 0xEE, 1)

    def spoil_file(self, slot: int) -> None:
        with self.place.data(self.rank).open("r+b") as file:
            file.seek(slot * self.place.slot_bytes + 5000)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    def close(self) -> None:
        self.worker.close()
        self.link.close()
        assert self.g1.guards_intact()


class Node:
    """A folder and its ranks, which can end and start again."""

    def __init__(self, path: Path, ranks: int) -> None:
        self.path, self.count = path, ranks
        self.ranks: list[Rank] = []
        self.start()

    def start(self) -> None:
        claimed = Folder.claim(self.path / "g3", "e")
        self.folder: NamespaceFolder = claimed.namespace(
            "f" * 64, {}, ranks=self.count, block_bytes=BLOCK, bound_bytes=bytes_of(G3, self.count, 12288)
        )
        assert self.folder.num_slots == G3
        self.ranks = [Rank(self.path, self.folder.place, rank) for rank in range(self.count)]

    def end(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.ranks = []
        self.folder.close()


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(ranks: int = 1) -> Node:
        nodes.append(Node(tmp_path, ranks))
        return nodes[-1]

    yield make
    for node in nodes:
        if node.ranks:
            node.end()


Make = Callable[..., Node]


def test_bytes_go_down_and_come_up_into_other_slots(make_node: Make) -> None:
    (rank,) = make_node().ranks
    keys = keys_of("a", 3)
    rank.offload([1, 4, 6], [0, 2, 5])
    written = rank.write([0, 2, 5], [7, 0, 3], keys)
    assert (written.outcomes, written.error) == (DONE * 3, None)
    read = rank.read([3, 7, 0], [1, 3, 4], [keys[2], keys[0], keys[1]])
    assert (read.outcomes, read.error) == (DONE * 3, None)
    rank.load([3, 4, 1], [0, 2, 3])
    assert [rank.g1.get(slot) for slot in (0, 2, 3)] == [rank.before[slot] for slot in (1, 4, 6)]
    # What came up can go down again: its checksum came with it.
    assert rank.write([3], [1], keys[:1]).outcomes == DONE
    assert rank.read([1], [0], keys[:1]).outcomes == DONE


def test_a_slot_that_holds_another_key_is_missing(make_node: Make) -> None:
    (rank,) = make_node().ranks
    keys = keys_of("a", 3)
    rank.offload([0, 1], [0, 1])
    rank.write([0, 1], [0, 1], keys[:2])
    assert rank.read([0, 1, 2], [3, 4, 5], [keys[1], keys[1], keys[2]]).outcomes == MISSING + DONE + MISSING


def test_memory_that_changed_after_it_left_the_engine_is_noticed(make_node: Make) -> None:
    (rank,) = make_node().ranks
    keys = keys_of("a", 2)
    rank.offload([0, 1], [0, 1])
    rank.spoil_arena(1)
    assert rank.write([0, 1], [0, 1], keys).outcomes == DONE * 2
    assert rank.read([0, 1], [2, 3], keys).outcomes == DONE + CORRUPT
    assert rank.read([0, 1], [2, 3], keys).outcomes == DONE + MISSING


def test_a_file_that_changed_is_noticed(make_node: Make) -> None:
    (rank,) = make_node().ranks
    keys = keys_of("a", 3)
    rank.offload([0, 1, 2], [0, 1, 2])
    rank.write([0, 1, 2], [0, 1, 2], keys)
    rank.spoil_file(1)
    assert rank.read([0, 1, 2], [3, 4, 5], keys).outcomes == DONE + CORRUPT + DONE
    assert rank.disk.disk.shard.bad_slots() == [1]


def test_what_is_forgotten_is_gone_and_what_was_written_since_stays(make_node: Make) -> None:
    node = make_node()
    (rank,) = node.ranks
    keys = keys_of("a", 3)
    rank.offload([0, 1, 2], [0, 1, 2])
    rank.write([0, 1], [0, 1], keys[:2])
    rank.send(Forget(pack([0, 1]), [keys[0], keys[2]]))
    assert rank.probe() is None  # behind it
    assert rank.read([0, 1], [3, 4], keys[:2]).outcomes == MISSING + DONE
    assert node.folder.recover().key_list() == [keys[1]]


def test_a_block_written_again_into_its_slot_is_not_forgotten(make_node: Make) -> None:
    (rank,) = make_node().ranks
    keys = keys_of("a", 1)
    rank.offload([0], [0])
    rank.write([0], [0], keys)
    rank.disk.chores.submit(time.sleep, 0.2)
    rank.send(Forget(pack([0]), keys))
    assert rank.write([0], [0], keys).outcomes == DONE
    assert rank.probe() is None
    assert rank.read([0], [1], keys).outcomes == DONE


def test_a_new_generation(make_node: Make) -> None:
    node = make_node()
    (rank,) = node.ranks
    keys = keys_of("a", 2)
    rank.offload([0, 1], [0, 1])
    rank.write([0, 1], [0, 1], keys)
    rank.disk.chores.submit(time.sleep, 0.2)
    rank.send(Generation(node.folder.clear()))
    # A write of the new generation does not overtake its beginning.
    assert rank.write([1], [1], keys[1:], generation=1).outcomes == DONE
    assert rank.read([0, 1], [3, 4], keys).outcomes == MISSING + DONE
    old = rank.write([0], [0], keys[:1], generation=0)
    assert (old.outcomes, old.error) == (FAILED, "blocks of generation 0, it is now 1")
    node.end()
    node.start()
    assert node.folder.recover().key_list() == [keys[1]]


def test_cancelling_what_is_over_or_unknown(make_node: Make) -> None:
    (rank,) = make_node().ranks
    rank.send(Cancel([1, 2, 77]))
    assert rank.probe() is None


def test_files_that_were_deleted(make_node: Make) -> None:
    node = make_node()
    (rank,) = node.ranks
    keys = keys_of("a", 1)
    rank.offload([0], [0])
    rank.write([0], [0], keys)
    node.folder.place.data(0).unlink()
    node.folder.place.index(0).unlink()
    problem = rank.probe()
    assert problem is not None
    assert "was deleted" in problem
    node.folder.restore()
    assert rank.probe(reopen=True) is None
    assert rank.read([0], [1], keys).outcomes == MISSING
    assert rank.write([0], [0], keys).outcomes == DONE
    assert rank.read([0], [1], keys).outcomes == DONE


def test_a_disk_that_is_closed_answers(make_node: Make) -> None:
    (rank,) = make_node().ranks
    rank.offload([0], [0])
    rank.disk.close(1.0)
    assert rank.write([0], [0], keys_of("a", 1)).error == "this disk is closed"
    assert rank.read([0], [0], keys_of("a", 1)).outcomes == FAILED
    rank.send(Generation(3))


def test_a_restart_serves_what_all_ranks_have(make_node: Make) -> None:
    node = make_node(2)
    keys = keys_of("a", 4)
    before = [rank.before for rank in node.ranks]
    for rank in node.ranks:
        rank.offload([0, 1, 2, 3], [0, 1, 2, 3])
    for rank in node.ranks:
        rank.write([0, 1], [4, 5], keys[:2])
    node.ranks[0].write([2], [6], keys[2:3], sequence=2)
    node.ranks[1].write([3], [7], keys[3:4], sequence=3)
    for number, rank in enumerate(node.ranks):  # the same slot, but not the same write
        rank.write([3], [0], keys[3:4], sequence=4 + number)
    node.end()
    node.start()
    found = node.folder.recover()
    assert found.next_sequence > 5
    pool = Pool(G3, order=LRU(G3), tier="g3")
    adopt(pool, found)
    assert pool.present(keys).tolist() == [True, True, False, False]
    assert pool.look(keys[1]).parent == keys[0]  # type: ignore[union-attr]
    with pool.match(keys) as hold:
        slots = hold.slots.tolist()
        for rank, old in zip(node.ranks, before, strict=True):
            assert rank.read(slots, [5, 3], keys[:2]).outcomes == DONE * 2
            rank.load([5, 3], [6, 7])
            assert [rank.g1.get(slot) for slot in (6, 7)] == old[:2]
