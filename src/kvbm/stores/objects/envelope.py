"""What every object is put into: 64 bytes in front of what it says, and with a secret 16 behind.

    0   8  KVBMOBJ1
    8   2  version, 1
    10  2  1: sealed
    12  4  0
    16 32  salt: random bytes; 0 where it is not sealed
    48 16  0
    64     what the object says, sealed or not
           where it is sealed: the tag

Numbers are little-endian. What is sealed is encrypted by AES-256-GCM under a key of its own, HKDF-SHA256 (RFC 5869) of
the secret, with the salt as salt and the object's name as info, so that a nonce of zeros is used once. The first 64
bytes are bound in as additional data. An instance without the secret can only take objects away.
Whether an object has to be sealed is decided here, by whether there is a secret, and never by what the object says.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import xxhash
from typing_extensions import Buffer

from kvbm.abc.store import Damaged
from kvbm.core.errors import ConfigError
from kvbm.core.extras import installing
from kvbm.core.folders import read_small

PLAIN_AT: Final = 64
TAG_BYTES: Final = 16
_FRONT: Final = struct.Struct("<8sHHI32s16s")
_MAGIC: Final = b"KVBMOBJ1"
_VERSION: Final = 1
_NONCE: Final = bytes(12)
_SECRET_BYTES: Final = 16


class OtherVersion(Damaged):
    """Another version of KVBM wrote it. Under a name of ours (`Envelope.key`) it is damaged."""


class Locked(Damaged):
    """It cannot be opened with what is known: it is sealed with no secret or another one, or not sealed. What was
    sealed and then changed looks the same."""


class Envelope:
    """With `secret` everything is sealed. Threads: any."""

    def __init__(self, secret: bytes | None = None) -> None:
        """Raises ConfigError: the package that seals is missing."""
        self._secret = secret
        if secret is None:
            return
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise ConfigError(
                "g4_secret_file",
                f"sealing needs a package that cannot be imported ({error})",
                remedy=f"Do: {installing('encryption')}",
            ) from None
        self._aes, self._invalid, self._hkdf, self._sha = AESGCM, InvalidTag, HKDF, SHA256

    @property
    def sealed(self) -> bool:
        """Whether it seals."""
        return self._secret is not None

    def size(self, plain: int) -> int:
        """Bytes of an object that says so many."""
        return PLAIN_AT + plain + TAG_BYTES * self.sealed

    def key(self, what: str) -> bytes:
        """A key of 32 bytes for something else than sealing, the same for all of this version who have the secret;
        without one it is no secret either."""
        if self._secret is None:
            return xxhash.xxh3_128_digest(f"kvbm {_VERSION} {what}".encode()) * 2
        return self._derive(bytes(32), what)

    def _derive(self, salt: bytes, info: str) -> bytes:
        assert self._secret is not None
        return self._hkdf(self._sha(), 32, salt, f"kvbm {_VERSION} {info}".encode()).derive(self._secret)

    def close(self, name: str, whole: memoryview, plain: memoryview) -> None:
        """Make an object of this name in `whole`, which has the `size`. Where nothing is sealed `plain` is the part of
        `whole` from `PLAIN_AT` on; else it lies elsewhere, and stays as it is."""
        salt = os.urandom(32) if self.sealed else bytes(32)
        _FRONT.pack_into(whole, 0, _MAGIC, _VERSION, self.sealed, 0, salt, bytes(16))
        if self.sealed:
            aes = self._aes(self._derive(salt, name))
            aes.encrypt_into(_NONCE, plain, whole[:PLAIN_AT], whole[PLAIN_AT:])

    def open(self, name: str, whole: memoryview, room: memoryview | None = None) -> memoryview:
        """What an object of this name says: a part of `whole`, or decrypted, in `room` if that is given and no smaller.

        Raises Damaged.
        """
        if len(whole) < self.size(0):
            raise Damaged(f"it has {len(whole)} bytes")
        magic, version, sealed, zero, salt, zeros = _FRONT.unpack_from(whole)
        if magic != _MAGIC or zero or any(zeros):
            raise Damaged("it was not written by KVBM")
        if version != _VERSION:
            raise OtherVersion(f"its version is {version}, not {_VERSION}")
        if sealed != self.sealed:
            raise Locked("it is sealed, and there is no secret" if sealed == 1 else "it is not sealed")
        if not self.sealed:
            if any(salt):
                raise Damaged("it has a salt and is not sealed")
            return whole[PLAIN_AT:]
        length = len(whole) - self.size(0)
        if room is None or len(room) < length:
            room = memoryview(bytearray(length))
        plain = room[:length]
        try:
            aes = self._aes(self._derive(salt, name))
            aes.decrypt_into(_NONCE, whole[PLAIN_AT:], whole[:PLAIN_AT], plain)
        except self._invalid:
            raise Locked("it was sealed with another secret, for another name, or changed") from None
        return plain

    def wrap(self, name: str, text: bytes) -> bytes:
        """An object of this name that says a few bytes, which check themselves."""
        plain = xxhash.xxh3_64_digest(name.encode() + text) + text
        whole = bytearray(self.size(len(plain)))
        if not self.sealed:
            whole[PLAIN_AT:] = plain
        self.close(name, memoryview(whole), memoryview(plain))
        return bytes(whole)

    def unwrap(self, name: str, whole: Buffer) -> bytes:
        """What `wrap` was given. Raises Damaged."""
        plain = bytes(self.open(name, memoryview(whole).cast("B")))
        if len(plain) < 8 or xxhash.xxh3_64_digest(name.encode() + plain[8:]) != plain[:8]:
            raise Damaged("its checksum is wrong")
        return plain[8:]


def read_secret(path: Path) -> bytes:
    """The secret in a file that only its owner can read. Raises ConfigError, about g4_secret_file."""
    content, mode = read_small("g4_secret_file", path, 4096)
    secret = content.strip()
    if mode & 0o077:
        raise ConfigError("g4_secret_file", f"others than its owner may use {path}", remedy=f"Do: chmod 600 {path}")
    if len(secret) < _SECRET_BYTES:
        raise ConfigError(
            "g4_secret_file", f"{path} has {len(secret)} bytes, at least {_SECRET_BYTES} are needed",
            remedy=f"Make one: (umask 077; openssl rand -hex 32 > {path})",
        )  # fmt: skip
    return secret
