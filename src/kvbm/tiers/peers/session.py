"""An authenticated connection between two instances that share a secret.

Each side sends a random number first. From both numbers and the secret each derives two keys, one per direction; every
frame then carries an HMAC over its place in the stream and its body. So a frame cannot be forged, changed, left out,
or sent again, in this connection or another. Nothing is decoded before its HMAC was checked.

    first frame of each side:  "KVBM" + protocol (1 byte) + random number (32 bytes)
    every other frame:         length (4 bytes, little-endian) + body (msgpack) + HMAC-SHA256 (32 bytes)

It is not encrypted, and neither are the blocks: both need a network that others cannot read.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import struct
from contextlib import suppress
from typing import Final

import msgspec

from kvbm.core.errors import Broken
from kvbm.tiers.peers.messages import PROTOCOL, Said, decode, encode

_MAGIC: Final = b"KVBM"
_NONCE, _MAC = 32, 32
_HEAD = struct.Struct("<I")
_COUNTER = struct.Struct("<Q")
MAX_FRAME: Final = 4 << 20
"""Bytes; a prompt of 8,000 blocks asks with 272 kB."""
MAX_FIRST: Final = 4096
"""The same, before the other side has shown that it knows the secret."""


class Session:
    """One side of a connection that is set up. `say` may be called by several tasks, `hear` by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keys: tuple[bytes, bytes]) -> None:
        self._reader, self.writer = reader, writer
        self.out, self._in = keys
        self._said = self._heard = 0

    @classmethod
    async def open(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, *, client: bool
    ) -> Session:
        """Exchange the first frames. That the other side knows the secret shows in its first message.

        Raises Broken: it is not a KVBM instance, or one of another version.
        """
        _watch(writer)
        ours = os.urandom(_NONCE)
        writer.write(_MAGIC + bytes([PROTOCOL]) + ours)
        try:
            head = await reader.readexactly(len(_MAGIC) + 1)
            theirs = await reader.readexactly(_NONCE) if head[: len(_MAGIC)] == _MAGIC else b""
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken("the connection ended before it began") from error
        if not theirs:
            raise Broken("what answers is not a KVBM instance")
        if head[-1] != PROTOCOL:
            raise Broken(f"it speaks version {head[-1]} of the protocol between instances, this one {PROTOCOL}")
        nonces = ours + theirs if client else theirs + ours
        keys = [hmac.digest(secret, name + nonces, "sha256") for name in (b"client", b"server")]
        return cls(reader, writer, (keys[0], keys[1]) if client else (keys[1], keys[0]))

    async def say(self, message: Said) -> None:
        """Send a message. Raises Broken: the other side is gone."""
        body = encode(message)
        # No await between the number and the write: frames leave in the order of their numbers.
        mac = hmac.digest(self.out, _COUNTER.pack(self._said) + body, "sha256")
        self._said += 1
        try:
            self.writer.write(_HEAD.pack(len(body)) + body + mac)
            await self.writer.drain()
        except OSError as error:
            raise Broken("the connection ended") from error

    async def hear(self) -> Said:
        """The next message. Raises Broken: the other side is gone, or does not know the secret."""
        try:
            (size,) = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            if size > (MAX_FRAME if self._heard else MAX_FIRST):
                raise Broken("a message is longer than any of KVBM's")
            frame = await self._reader.readexactly(size + _MAC)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken("the connection ended") from error
        body, mac = frame[:size], frame[size:]
        if not hmac.compare_digest(mac, hmac.digest(self._in, _COUNTER.pack(self._heard) + body, "sha256")):
            raise Broken("a message is not authentic: the two instances do not have the same secret")
        self._heard += 1
        try:
            message: Said = decode(body)
            return message
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise Broken("a message cannot be read") from error

    async def close(self) -> None:
        """End the connection. What is not sent yet is not sent: the other side may never take it."""
        self.writer.transport.abort()
        try:
            await self.writer.wait_closed()
        except OSError:
            return


def _watch(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end the connection when the other machine is gone without a word."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError, AttributeError):  # no TCP
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
