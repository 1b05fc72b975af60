"""``kvbm demo-shared``: an engine is killed, and another one that has nothing of its own goes on with its users."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from kvbm.cli.demo.conversations import conversations
from kvbm.cli.demo.engine import Advance, Engine, Setup
from kvbm.cli.demo.report import Same, Turn, same
from kvbm.cli.demo.run import (
    AnswerTokens,
    DocumentTokens,
    Output,
    Plan,
    Turns,
    Users,
    ask,
    play,
    present,
)  # fmt: skip
from kvbm.cli.demo.seaweed import Seaweed
from kvbm.cli.engines import Json
from kvbm.core.errors import Broken

G2_GB = 2
_STORED_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Shared:
    """The last turn of each user: of an engine alone, and of one that began when the first was dead. `tokens` of their
    prompts came from storage; `before` are the answers that the first engine gave, beside those of an engine alone."""

    where: str
    plain: list[Turn]
    other: list[Turn]
    before: Same
    tokens: int

    @property
    def identical(self) -> Same:
        return same((a.text, b.text) for a, b in zip(self.plain, self.other, strict=True))

    def problem(self) -> str | None:
        """Why the demo failed, in a sentence."""
        for alike in (self.before, self.identical):
            if alike.same < alike.of:
                return f"only {alike} answers are those of an engine alone"
        return None if self.tokens else "nothing came from shared storage"

    def record(self) -> dict[str, Any]:
        """For programs."""
        ours, theirs = (statistics.median(turn.ttft_ms for turn in turns) for turns in (self.other, self.plain))
        return {
            "where": self.where, "identical": asdict(self.identical), "identical_before": asdict(self.before),
            "g4_tokens": self.tokens, "ttft_ratio": ours / theirs, "alone": [asdict(turn) for turn in self.plain],
            "other": [asdict(turn) for turn in self.other],
        }  # fmt: skip

    def table(self) -> Table:
        """For people."""
        table = Table(title=f"An engine is killed, another one goes on, with blocks from {self.where}")
        table.add_column("")
        for column in ("vLLM alone", "another engine with KVBM"):
            table.add_column(column, justify="right")
        table.add_row("time to first token of the next turns, ms", _times(self.plain), _times(self.other))
        prompts = sum(turn.prompt_tokens for turn in self.other)
        table.add_row("tokens of these prompts", *[f"{prompts:,}"] * 2)
        computed = (sum(turn.computed_tokens for turn in turns) for turns in (self.plain, self.other))
        table.add_row("of these computed", *(f"{count:,}" for count in computed))
        table.add_row("of these from shared storage", "", f"{self.tokens:,}")
        table.add_row("identical answers", "", str(self.identical))
        return table


def _times(turns: Sequence[Turn]) -> str:
    return f"{statistics.median(turn.ttft_ms for turn in turns):,.0f}"


def demo_shared(
    where: Annotated[
        Literal["file", "s3"], typer.Argument(help="Share a folder, or a bucket of an S3 server.")
    ] = "file",
    users: Users = 4,
    turns: Turns = 3,
    document_tokens: DocumentTokens = 1400,
    answer_tokens: AnswerTokens = 24,
    output: Output = Path("build/demo-shared.json"),
    as_json: Json = False,
) -> None:
    """Kill an engine, and have another one go on with its users, from shared storage. A few minutes."""
    plan = Plan(users, turns, document_tokens, answer_tokens)
    present(output, as_json, lambda model, logs, advance: measure(plan, model, logs, where, advance))


def measure(plan: Plan, model: str, logs: Path, where: str, advance: Advance) -> Shared:
    """Run all three engines. Raises Broken when something does not start or does not answer."""
    alone = Setup("vLLM alone", model, plan.arguments(), logs / "shared-alone")
    with alone.start(advance) as engine:
        advance("Preparing the documents")
        talks = conversations(plan.users, plan.turns, plan.document_tokens, engine.client.count_tokens)
        plain, _ = play(plan, talks, engine.client, advance, alone.name)
        engine.server.kill()
    with _storage(where, logs, advance) as (settings, environment):
        one = Setup("the first engine", model, plan.arguments(), logs / "shared-first", settings, environment)
        with one.start(advance) as engine:
            first, asked = play(replace(plan, turns=plan.turns - 1), talks, engine.client, advance, one.name)
            _stored(engine)
            engine.server.kill()
        # With host memory of its own, and nothing in it.
        two = Setup("another engine", model, plan.arguments(), logs / "shared-other", settings, environment)
        with two.start(advance) as engine:
            last = asked[-plan.users :]
            other = []
            for talk, (history, said), before in zip(talks, last, first[-plan.users :], strict=True):
                advance(f"{two.name}: user {talk.user + 1} of {plan.users}")
                question = {"role": "user", "content": talk.says(plan.turns - 1)}
                messages = [*history, {"role": "assistant", "content": said}, question]
                known = before.prompt_tokens + plan.answer_tokens
                other.append(ask(talk.user, plan.turns - 1, known, messages, plan, engine.client))
            status = engine.status()
    before_ = same((a.text, b.text) for a, b in zip(plain, first, strict=False))
    tokens = status["tokens"]["g4"] if status else 0
    return Shared("a folder" if where == "file" else "an S3 server", plain[-plan.users :], other, before_, tokens)


def _stored(engine: Engine) -> None:
    """Waits until all that is to be stored is."""
    deadline = time.monotonic() + _STORED_WITHIN_S
    while not (status := engine.status()) or any(status["g4"]["in_flight"].values()) or status["g4"]["waiting"]:
        if time.monotonic() > deadline:
            raise Broken(f"the first engine does not store its blocks: {(status or {}).get('degraded')}")
        time.sleep(0.1)


@contextmanager
def _storage(where: str, logs: Path, advance: Advance) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """An empty storage: KVBM's settings, and the engine's variables."""
    # The other engine reads nothing before it is asked, so that reading is what is measured.
    settings = {"KVBM_G2_GB": str(G2_GB), "KVBM_ENABLED": "true", "KVBM_STRICT": "true", "KVBM_G4_WARM": "0"}
    # Beside the figures: the folder for temporary files is often in memory.
    with tempfile.TemporaryDirectory(prefix="demo-shared-", dir=logs) as folder:
        if where == "file":
            yield settings | {"KVBM_G4_URL": f"file://{Path(folder).resolve()}"}, {}
            return
        advance("Starting the S3 server")
        server = Seaweed(Path(folder).resolve())
        try:
            address = {"KVBM_G4_ENDPOINT": server.endpoint, "KVBM_G4_PATH_STYLE": "true"}
            yield settings | {"KVBM_G4_URL": "s3://kvbm/demo"} | address, server.credentials
        finally:
            server.kill()
