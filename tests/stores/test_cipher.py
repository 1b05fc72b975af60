"""Encryption at rest."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.core.errors import ConfigError
from kvbm.stores.disk.cipher import TAG_BYTES, Cipher
from kvbm.stores.disk.format import Records, pack
from kvbm.testing.store import DONE, MISSING, key_of, labels, slots
from tests.stores.test_disk import BLOCK, DiskRig

PLAIN = b"secret" * 100
KEY = bytes(range(32))


def record(block: int = 1, generation: int = 0) -> Records:
    return pack(slots(4), labels([key_of(block)], 1, generation), np.zeros(1, dtype=np.uint64), len(PLAIN), 0.0)


def encrypted(cipher: Cipher, found: Records, fingerprint: str = "f") -> memoryview:
    room = memoryview(bytearray(len(PLAIN) + TAG_BYTES))
    cipher.encrypt(memoryview(PLAIN), room, found, fingerprint)
    room[len(PLAIN) :] = bytes(TAG_BYTES)  # on disk there is no room for it
    return room


def test_it_comes_back() -> None:
    cipher, found = Cipher(KEY), record()
    block, into = encrypted(cipher, found), memoryview(bytearray(len(PLAIN)))
    assert b"secret" not in bytes(block)
    assert cipher.decrypt(block, into, found, "f")
    assert into == PLAIN


@pytest.mark.parametrize("field", ["key", "key_tail", "generation", "nonce", "tag"])
def test_a_block_belongs_to_its_record(field: str) -> None:
    cipher, found = Cipher(KEY), record()
    block, into = encrypted(cipher, found), memoryview(bytearray(len(PLAIN)))
    found[field].view(np.uint8).reshape(-1)[0] ^= 1
    assert not cipher.decrypt(block, into, found, "f")


def test_another_namespace_key_or_bit_is_refused() -> None:
    cipher, found = Cipher(KEY), record()
    block, into = encrypted(cipher, found), memoryview(bytearray(len(PLAIN)))
    assert not cipher.decrypt(block, into, found, "g")
    assert not Cipher(bytes(32)).decrypt(block, into, found, "f")
    block[5] ^= 1
    assert not cipher.decrypt(block, into, found, "f")


def test_every_write_has_a_nonce_of_its_own() -> None:
    cipher = Cipher(KEY)
    records = [record() for _ in range(100)]
    blocks = {bytes(encrypted(cipher, one)) for one in records}
    assert len(blocks) == len({one["nonce"].tobytes() for one in records}) == 100


def test_the_id_tells_keys_apart() -> None:
    assert Cipher(KEY).id == Cipher(KEY).id != Cipher(bytes(32)).id
    assert KEY.hex()[:8] not in Cipher(KEY).id


@pytest.mark.parametrize("text", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_key_files(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    path.chmod(0o600)
    assert Cipher.from_file(path).id == Cipher(KEY).id


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        (None, 0, "cannot be read: No such file"),
        (KEY, 0o640, r"others than its owner may use .*chmod 600"),
        (KEY, 0o604, "others than its owner may use"),
        (KEY[:-1], 0o600, "neither 32 bytes nor 64 hexadecimal digits"),
        (b"x" * 64, 0o600, "neither"),
        (b"", 0o600, "neither"),
        (KEY.hex().encode()[:-2], 0o600, "neither"),
    ],
)
def test_wrong_key_files_end_the_start(text: bytes | None, mode: int, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_bytes(text)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=sentence) as error:
        Cipher.from_file(path)
    assert KEY.hex()[:-2] not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'cryptography>="):
        Cipher(KEY)


def test_nothing_readable_is_on_disk_and_other_keys_find_nothing(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path, cipher=Cipher(KEY))
    assert rig.write([1, 2, 3, 4, 5], [0, 1, 2, 3, 4]) == [DONE] * 5  # more than fit into a bounce buffer
    data = rig.namespace.place.data(0).read_bytes()
    for slot in range(5):
        assert rig.memory.get(slot, BLOCK)[:64] not in data
    rig.close()
    for cipher in (None, Cipher(bytes(32))):
        other = DiskRig(tmp_path, cipher=cipher)
        assert other.read([1, 2], [0, 1]) == [MISSING] * 2
        other.close()
