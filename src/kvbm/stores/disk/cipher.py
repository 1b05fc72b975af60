"""Encryption at rest: AES-256-GCM, the block's key and namespace bound in, a fresh nonce for every write."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from kvbm.core.errors import ConfigError
from kvbm.core.extras import installing

if TYPE_CHECKING:
    from kvbm.stores.disk.format import Records

TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
_SETTING: Final = "g3_key_file"


@final
class Cipher:
    """Encrypts and decrypts blocks with one key. Threads: any."""

    def __init__(self, key: bytes) -> None:
        """Use these 32 bytes.

        Raises:
            ConfigError: the package that does it is missing.
        """
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigError(
                _SETTING,
                f"encryption needs a package that cannot be imported ({error})",
                remedy=f"Do: {installing('encryption')}",
            ) from None
        self._aes, self._invalid = AESGCM(key), InvalidTag
        self.id = hashlib.sha256(b"kvbm" + key).hexdigest()[:16]
        """Tells keys apart and says nothing else about them: it is written down with what is encrypted."""

    @classmethod
    def from_file(cls, path: Path) -> Cipher:
        """The key in a file that only its owner can read: 32 bytes, or 64 hexadecimal digits.

        Raises:
            ConfigError: the file is not so, or the package is missing.
        """
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(1024)
        except OSError as error:
            raise ConfigError(_SETTING, f"{path} cannot be read: {error.strerror}") from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(_SETTING, f"others than its owner may use {path}", remedy=f"Do: chmod 600 {path}")
        if len(text) != 32:
            try:
                text = bytes.fromhex(text.decode())
            except ValueError:
                text = b""
        if len(text) != 32:
            raise ConfigError(
                _SETTING,
                f"{path} has neither 32 bytes nor 64 hexadecimal digits",
                remedy=f"Make one: (umask 077; openssl rand -hex 32 > {path})",
            )
        return cls(text)

    def encrypt(self, plain: memoryview, into: memoryview, record: Records, fingerprint: str) -> None:
        """Encrypt a block into as many bytes and `TAG_BYTES` more, and write nonce and tag into its `record` (an
        array of one)."""
        nonce = os.urandom(NONCE_BYTES)
        self._aes.encrypt_into(nonce, plain, _bound(record, fingerprint), into)
        record["nonce"] = tuple(nonce)
        record["tag"] = tuple(into[len(plain) :])

    def decrypt(self, block: memoryview, into: memoryview, record: Records, fingerprint: str) -> bool:
        """Decrypt what `encrypt` has made, with room for the tag behind it; False if it is not that."""
        block[len(into) :] = record["tag"].tobytes()
        try:
            self._aes.decrypt_into(record["nonce"].tobytes(), block, _bound(record, fingerprint), into)
        except self._invalid:
            return False
        return True


def _bound(record: Records, fingerprint: str) -> bytes:
    """What a block belongs to: any other key, generation or namespace than at encryption fails."""
    return b"".join(record[of].tobytes() for of in ("key", "key_tail", "generation")) + fingerprint.encode()
