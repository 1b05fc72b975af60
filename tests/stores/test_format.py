"""Records, their checks, and damage to them."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvbm.core.errors import Misuse
from kvbm.core.region import Plane, Region
from kvbm.stores.checksum import checksums
from kvbm.stores.disk.format import PAGE, RECORD, Records, Seal, header, pack, packed_keys, padded, parse
from kvbm.testing.store import HostBlocks, key_of, labels, slots

SEAL = Seal("a" * 64)
COUNT = 20


def some() -> Records:
    """Records of slots 100 to 119."""
    numbers = np.arange(100, 100 + COUNT)
    text = labels([key_of(i) for i in range(COUNT)], sequence=5, generation=3)
    records = pack(numbers, text, np.arange(COUNT, dtype=np.uint64), 4096, 1e9)
    SEAL.close(records)
    return records


def blocks_of(records: Records, seal: Seal = SEAL, first: int = 100, generation: int = 3, length: int = 4096) -> int:
    return int(parse(records, first, seal, generation, length).blocks.sum())


def test_records_say_what_was_packed() -> None:
    records = some()
    assert blocks_of(records) == COUNT
    assert records["key"][7].tobytes() == key_of(7)
    assert records["sequence"].tolist() == list(range(5, 25))[::-1]
    assert (records["key_tail"] == 32).all()
    assert np.isinf(records["expires"]).all()


def test_the_layout_is_the_documented_one() -> None:
    offsets = {name: RECORD.fields[name][1] for name in RECORD.names} if RECORD.fields and RECORD.names else {}
    assert offsets == {
        "key": 0,
        "parent": 32,
        "checksum": 40,
        "sequence": 48,
        "written_at": 56,
        "expires": 64,
        "length": 72,
        "key_tail": 76,
        "nonce": 80,
        "tag": 92,
        "priority": 108,
        "generation": 112,
        "slot": 116,
        "check": 120,
    }


def test_records_of_another_namespace_place_generation_or_length_are_none() -> None:
    records = some()
    assert blocks_of(records, Seal("b" * 64)) == 0
    assert blocks_of(records, first=101) == 0
    assert blocks_of(records, generation=4) == 0
    assert blocks_of(records, length=8192) == 0
    assert blocks_of(np.roll(records, 1)) == 0
    assert parse(np.zeros(4, dtype=RECORD), 0, SEAL, 0, 4096).empty.all()


@given(st.integers(0, 127), st.integers(1, 255), st.integers(0, COUNT - 1))
def test_a_changed_byte_is_noticed(at: int, change: int, victim: int) -> None:
    records = some()
    records.view(np.uint8).reshape(COUNT, 128)[victim, at] ^= change
    parsed = parse(records, 100, SEAL, 3, 4096)
    assert np.flatnonzero(~parsed.blocks).tolist() == [victim]
    assert np.flatnonzero(parsed.damaged).tolist() == [victim]


@given(st.binary(min_size=128, max_size=128), st.integers(0, COUNT - 1))
def test_noise_is_no_record(noise: bytes, victim: int) -> None:
    records = some()
    records.view(np.uint8).reshape(COUNT, 128)[victim] = np.frombuffer(noise, dtype=np.uint8)
    parsed = parse(records, 100, SEAL, 3, 4096)
    assert not parsed.blocks[victim]
    assert parsed.empty[victim] == (noise == bytes(128))


def test_words_that_change_places_are_noticed() -> None:
    records = some()
    words = records.view("<u8").reshape(COUNT, 16)
    words[0, [0, 5]] = words[0, [5, 0]]
    assert blocks_of(records) == COUNT - 1


@pytest.mark.parametrize("keys", [[b""], [bytes(34)], [bytes(32), b""]])
def test_keys_have_1_to_33_bytes(keys: list[bytes]) -> None:
    with pytest.raises(Misuse, match="1 to 33 bytes"):
        packed_keys(keys)


def test_short_keys_are_padded_and_told_apart_by_their_length() -> None:
    words, lengths = packed_keys([b"a", b"a\0"])
    assert (words[0] == words[1]).all()
    assert lengths.tolist() == [1, 2]


def test_the_header_fills_its_page_and_covers_everything() -> None:
    pages = {header("a" * 64, *facts) for facts in ((0, 1, 4096), (1, 1, 4096), (0, 2, 4096), (0, 1, 8192))}
    pages.add(header("b" * 64, 0, 1, 4096))
    assert len(pages) == 5
    assert {len(page) for page in pages} == {PAGE}


def test_padded() -> None:
    assert [padded(n) for n in (1, 4095, 4096, 4097)] == [4096, 4096, 4096, 8192]


def test_checksums_are_those_of_the_block_without_padding() -> None:
    memory = HostBlocks(3, 4096)
    memory.put(2, b"x" * 4000 + b"y" * 96)
    sums = checksums(memory.region, slots(2, 0), 4000)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(b"x" * 4000), xxhash.xxh3_64_intdigest(bytes(4000))]


def test_checksums_want_memory_that_is_there_and_contiguous() -> None:
    memory = HostBlocks(3, 4096)
    two = Region("two", "host", 2, (Plane(0, 64, 32), Plane(4096, 64, 32)))
    for region, slot, length in (
        (memory.region, 3, 4096),
        (memory.region, -1, 4096),
        (memory.region, 0, 4097),
        (two, 0, 64),
        (Region("file", "file", 3, memory.region.planes), 0, 1),
    ):
        with pytest.raises(Misuse):
            checksums(region, slots(slot), length)
