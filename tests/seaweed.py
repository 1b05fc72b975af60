"""A real S3 server for tests: SeaweedFS, on loopback, with one user."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.ports import free_port

ACCESS, SECRET = "test", "testtest"
PATIENCE_S = 60.0


class Seaweed:
    """Listens once this returns; its data are in `folder`. It makes a bucket that does not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Each of its servers has another port 10,000 above its own.
        self.port, *self._ports = (free_port() for _ in range(4))
        (folder / "s3.json").write_text(json.dumps({
            "identities": [{
                "name": "test", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }],
        }))  # fmt: skip
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        """Variables that clients read."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def start(self) -> None:
        """With what is in its folder."""
        master, volume, filer = self._ports
        command = [
            Path(sys.executable).with_name("weed"), "server", f"-dir={self._folder}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=20",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-filer", "-s3",
            f"-s3.port={self.port}", f"-s3.config={self._folder / 's3.json'}", "-s3.iam=false",
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, f"SeaweedFS ended: {self._said()}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                if b" 200 " in sock.recv(64):
                    return
            assert time.monotonic() < deadline, f"SeaweedFS does not start: {self._said()}"
            time.sleep(0.05)

    def _said(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)
