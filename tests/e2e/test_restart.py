"""`kvbm serve` with a disk tier, ended in every way and started again: what was answered once is found on disk."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

from kvbm.cli import models
from kvbm.cli.demo.client import Message, Reply
from kvbm.core import config
from tests.e2e.engine import BLOCK, FAST
from tests.e2e.test_serve import KVBM, SMALL, Served, eventually, served
from tests.ports import free_port

QUESTIONS = ("What is this text about?", "Give one example.")
SHARED = 2 * BLOCK
"""Tokens that every prompt may begin with, by the model's template."""
ENDS_S = 20.0
"""How long vLLM may take to end after KVBM has written."""
WRITTEN = re.compile(r"KVBM: (\d+) of \1 blocks of host memory are on disk")


@contextmanager
def on_disk(folder: Path, disk: Path, **settings: str) -> Iterator[Served]:
    """A server that is there."""
    models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True))
    port = free_port()
    command = [*KVBM, "serve", "smollm2", "--port", str(port), "--enable-prompt-tokens-details", *SMALL]
    command += ["--shutdown-timeout", "90"]
    kvbm = {"KVBM_G2_GB": "0.5", "KVBM_G3_GB": "1", "KVBM_G3_DIR": str(disk), **settings}
    folder.mkdir()
    with served(command, port, folder, **kvbm) as server:
        server.wait_for("\n  curl ")
        yield server


def talk(server: Served, topic: str) -> tuple[list[Reply], list[Message]]:
    """A conversation; also what was asked last."""
    replies: list[Reply] = []
    history: list[Message] = []
    for question in QUESTIONS:
        asked = f"{topics[topic][:2000]}\n\n{question}" if not history else question
        history.append({"role": "user", "content": asked})
        replies.append(server.client.chat(history, 16))
        history.append({"role": "assistant", "content": replies[-1].text})
    return replies, history[:-1]


def written(server: Served) -> int:
    """Blocks that were written to disk, once nothing moves any more."""
    eventually(lambda: not server.status()["offload"]["in_flight"])
    eventually(lambda: not server.status()["demote"]["in_flight"])
    return int(server.status()["demote"]["blocks"])


def check_from_disk(server: Served, asked: list[Message], before: Reply) -> None:
    """The first request is answered as before, out of the disk."""
    reply = server.client.chat(asked, 16)
    assert reply.text == before.text
    could_hit = (reply.prompt_tokens - 1) // BLOCK * BLOCK
    assert could_hit - 2 * BLOCK <= reply.cached_tokens <= could_hit  # the last answer's block was not full
    status = server.status()
    assert status["tokens"]["g3"] == reply.cached_tokens
    assert status["promote"]["blocks"] == reply.cached_tokens // BLOCK
    assert status["promote"]["corrupt"] == 0


@pytest.mark.timeout(900)
def test_what_was_answered_is_found_after_every_end(tmp_path: Path) -> None:
    disk, admission = tmp_path / "disk", {"KVBM_G3_ADMISSION": "frequency"}  # what was asked for once is not written
    # A polite end: what only host memory has is written first. The disk is empty: the negative control of what follows.
    with on_disk(tmp_path / "first", disk, KVBM_G3_DRAIN_S="10", **admission) as server:
        asked = [{"role": "user", "content": topics["strings"][:2000]}]
        reply = server.client.chat(asked, 16)
        assert reply.cached_tokens == 0
        assert server.status()["tokens"]["g3"] == 0
        assert written(server) == 0
        begun = time.monotonic()
        for pid in server.living():  # as systemd does, so that the engine is told twice, and its worker once
            os.kill(int(pid), signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert time.monotonic() - begun < 10 + ENDS_S
        assert WRITTEN.search(server.output())
        assert server.living() == []

    # A crash.
    with on_disk(tmp_path / "second", disk, **FAST) as server:
        check_from_disk(server, asked, reply)
        replies, asked = talk(server, "assignment")
        assert replies[0].cached_tokens <= SHARED < replies[-1].cached_tokens
        assert written(server) >= replies[-1].prompt_tokens // BLOCK
        server.kill()

    # Now the disk is slow to write to: 1.5 s a block. A second SIGTERM does not wait for it.
    slow = {"KVBM_TRANSPORT_WRAPPER": "kvbm.testing.faults:build?disk=1&store_rate=1", "KVBM_G3_DRAIN_S": "60"}
    with on_disk(tmp_path / "third", disk, **slow, **admission, **FAST) as server:
        check_from_disk(server, asked, replies[-1])
        server.client.chat([{"role": "user", "content": topics["try"][:2000]}], 16)
        eventually(lambda: not server.status()["offload"]["in_flight"])
        server.process.terminate()
        time.sleep(3)
        assert len(server.living()) >= 5, "it waits for the disk"
        server.process.terminate()
        begun = time.monotonic()
        server.process.wait(60)
        assert time.monotonic() - begun < ENDS_S
        assert not WRITTEN.search(server.output())
        eventually(lambda: server.living() == [])
