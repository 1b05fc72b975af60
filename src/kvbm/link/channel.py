"""The local channel between the leader and its workers: length-prefixed msgpack over Unix sockets.

The engine stops stepping when its last request is done, so results must not wait for a step: workers send them here
the moment they are known, and the leader takes them before it matches. The socket lies in a folder only its owner can
enter; there is one per engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from kvbm.core.errors import Broken, ConfigError
from kvbm.link.messages import Message, decode_message, encode

_HEAD = struct.Struct("<I")
_MAX_FRAME = 16 << 20
_SUN_PATH = 107
_YOUNG = 60.0
_peek = ctypes.PyDLL(None, use_errno=True).recv
"""Keeps the GIL, unlike `socket.recv`: a step of the engine that lets go of it has it back when the engine's other
threads let it, a millisecond later."""
_peek.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_peek.restype = ctypes.c_ssize_t
_BYTE = ctypes.create_string_buffer(1)
_LOOK: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def readable(files: Sequence[_HasDescriptor], timeout: float) -> set[int]:
    """Descriptors of those that have something to read, or an error, within `timeout` seconds, whatever their numbers
    are: with more than 1,024 open files some are larger than `select` takes. Closed ones are ready at once."""
    poll, closed = select.poll(), set[int]()
    for file in files:
        if (descriptor := file.fileno()) >= 0:
            poll.register(descriptor, select.POLLIN)
        else:
            closed.add(descriptor)
    found = poll.poll(0 if closed else max(0.0, timeout) * 1000)
    return closed | {descriptor for descriptor, _ in found}


class Link:
    """One connected socket. `send` may be called from any thread; the receiving methods from one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._files: list[int] = []
        self.open = True

    def fileno(self) -> int:
        """For `readable`; -1 once it is closed."""
        return self._sock.fileno()

    def send(self, message: Message, file: int | None = None) -> None:
        """Sends all of it, and with it an open file, of which the other side gets a descriptor of its own. Raises
        Broken when the other side is gone."""
        body = encode(message)
        try:
            with self._lock:
                data = memoryview(_HEAD.pack(len(body)) + body)
                sent = 0 if file is None else socket.send_fds(self._sock, [data], [file])
                self._sock.sendall(data[sent:])
        except OSError as error:
            self.open = False
            raise Broken(f"the channel between leader and worker broke: {error}") from error

    def take(self) -> list[Message]:
        """What has arrived, without waiting. Sets `open` to False when the other side is gone."""
        while self.open and self._arrived():
            try:
                piece = self._sock.recv(1 << 18, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                self.open = False
                break
            self._buffer += piece
            if len(piece) < 1 << 18:
                break
        return self._frames()

    def _arrived(self) -> bool:
        """Whether there is something to receive, or an error. Waits for nobody, not even for the GIL."""
        found: int = _peek(self._sock.fileno(), _BYTE, 1, _LOOK)
        return found >= 0 or ctypes.get_errno() != errno.EAGAIN

    def wait(self, timeout: float) -> Message | None:
        """The next message; None after `timeout` seconds. Raises Broken when the other side is gone. A file that comes
        with it is kept for `take_file`."""
        deadline = time.monotonic() + timeout
        while True:
            if frames := self._frames(1):
                return frames[0]
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                piece = self._receive() if readable([self._sock], left) else None
            except OSError as error:
                self.open = False
                raise Broken(f"the channel between leader and worker broke: {error}") from error
            if piece:
                self._buffer += piece
            elif piece is not None:
                self.open = False
                raise Broken("the other side of the channel between leader and worker is gone")

    def _receive(self) -> bytes:
        piece, files, _, _ = socket.recv_fds(self._sock, 1 << 16, 1)
        for file in files:
            os.set_inheritable(file, False)
        self._files += files
        return piece

    def take_file(self) -> int:
        """A descriptor that came with a message of `wait`; it is the caller's. Raises Broken: none did."""
        if not self._files:
            raise Broken("a file was to come over the channel between leader and worker")
        return self._files.pop(0)

    def close(self) -> None:
        self.open = False
        while self._files:
            os.close(self._files.pop())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _frames(self, most: int = 1 << 30) -> list[Message]:
        messages: list[Message] = []
        if not self._buffer:
            return messages
        at = 0
        while len(messages) < most and len(self._buffer) - at >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._buffer, at)
            if size > _MAX_FRAME:
                self.open = False
                raise Broken(f"a message of {size} bytes came over the channel: the other side is not a KVBM process")
            if len(self._buffer) - at - _HEAD.size < size:
                break
            try:
                messages.append(decode_message(self._buffer[at + _HEAD.size : at + _HEAD.size + size]))
            except msgspec.MsgspecError as error:
                self.open = False
                raise Broken(f"a message came over the channel that is not KVBM's: {error}") from error
            at += _HEAD.size + size
        del self._buffer[:at]
        return messages


def socket_path(run_dir: Path, engine: str, suffix: str) -> Path:
    """Where an engine's socket lies. Raises ConfigError if the path is too long for a Unix socket."""
    path = run_dir / f"{engine}{suffix}"
    if len(os.fsencode(path)) > _SUN_PATH:
        raise ConfigError("run_dir", f"{path} is longer than {_SUN_PATH} bytes", remedy="Choose a shorter folder.")
    return path


def listen(path: Path) -> socket.socket:
    """A listening socket at `path` (mode 0600, in a folder of mode 0700). What a dead engine left there is replaced.
    Raises ConfigError if the socket cannot be made, Broken if a living engine listens there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _private(path.parent)
        _sweep(path.parent)
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(os.fspath(path)) == 0:
                    raise Broken(f"another engine already listens at {path}: give each engine its own engine_id")
            path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(os.fspath(path))
        path.chmod(0o600)
        sock.listen(64)
    except OSError as error:
        raise ConfigError(
            "run_dir", f"no socket can be made at {path}: {error}", remedy="Choose a folder you can write."
        ) from error
    return sock


def _private(folder: Path) -> None:
    """Raises ConfigError for a folder in which somebody else could put sockets of theirs."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ConfigError(
            "run_dir",
            f"{folder} belongs to another user or others may write in it",
            remedy="Choose a folder of your own.",
        )


def _sweep(folder: Path) -> None:
    """Removes sockets that killed engines left behind; young ones may be just about to listen."""
    for path in [*folder.glob("*.sock"), *folder.glob("*.chan")]:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            old = time.time() - path.stat().st_mtime > _YOUNG
            if old and probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED:
                path.unlink()


def connect(path: Path, timeout: float, stop: Callable[[], bool] = lambda: False) -> Link:
    """Connects to a leader that may not be there yet. Raises Broken after `timeout` seconds or when `stop()`."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            if stop() or time.monotonic() > deadline:
                raise Broken(f"no leader answered at {path} within {timeout:.0f} s: {error}") from error
            time.sleep(0.02)
        else:
            return Link(sock)
