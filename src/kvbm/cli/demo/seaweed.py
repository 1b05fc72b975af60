"""A real S3 server on loopback, with one user: SeaweedFS from its PyPI package."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvbm.cli import serve
from kvbm.core import config
from kvbm.core.errors import Broken
from kvbm.core.extras import installing

_USER, _SECRET = "kvbm", "kvbm-kvbm"
_READY_WITHIN_S: Final = 60.0


class Seaweed:
    """Listens once this returns; its data are in `folder`. It makes a bucket that does not exist.

    Raises:
        Broken: it is not installed, or does not start.
    """

    def __init__(self, folder: Path) -> None:
        others = config.child_environment().get("PATH", "")
        found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{others}")
        if found is None:
            raise Broken(f"this needs the S3 server SeaweedFS. Do: {installing('demo')}")
        self._folder, self._program = folder, found
        # Each of its servers has another port 10,000 above its own; below those that the system gives to others.
        ports, first = list[int](), random.randrange(20_000, 21_900)
        while len(ports) < 4:
            ports.append(serve.free_port("127.0.0.1", first))
            first = ports[-1] + 1
        self.port, *self._ports = ports
        identity = {
            "name": _USER, "credentials": [{"accessKey": _USER, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }  # fmt: skip
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.start()

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        """Variables that clients read."""
        return {
            "AWS_ACCESS_KEY_ID": _USER, "AWS_SECRET_ACCESS_KEY": _SECRET, "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def start(self) -> None:
        """With what is in its folder. Raises Broken."""
        master, volume, filer = self._ports
        command = [
            self._program, "server", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=20", f"-master.port={master}",
            f"-volume.port={volume}", f"-filer.port={filer}", "-filer", "-s3", f"-s3.port={self.port}",
            f"-s3.config={self._folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        deadline = time.monotonic() + _READY_WITHIN_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                if b" 200 " in sock.recv(64):
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                said = (self._folder / "log").read_text(errors="replace").strip().splitlines()
                raise Broken(f"SeaweedFS does not start: {said[-1] if said else 'it says nothing'}")
            time.sleep(0.05)

    def kill(self) -> None:
        """At once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """It answers nothing any more, and keeps its connections."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._process.send_signal(signal.SIGCONT)
