"""What the demo measured: the sums, the table, and the file (fields: docs/demo.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from kvbm.cli.render import size


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. Tokens of the prompt were found on the device, found in G2, or computed; `known_tokens` of them
    had been computed for the same user before. `gap_ms` is the mean time between its pieces."""

    user: int
    turn: int
    prompt_tokens: int
    known_tokens: int
    device_tokens: int
    g2_tokens: int
    ttft_ms: float
    text: str
    gap_ms: float = 0.0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.device_tokens - self.g2_tokens

    @property
    def computed_again_tokens(self) -> int:
        return max(0, self.known_tokens - self.device_tokens - self.g2_tokens)


@dataclass(frozen=True, slots=True)
class Restart:
    """The engine was killed and started again, and `turn`, the last of its user, was asked first. `g3_tokens` of its
    prompt came from disk."""

    turn: Turn
    start_s: float
    g3_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """All turns with one engine, and its restart. `moved` are the bytes that went "down" to G2 and "up" from it, if
    they are known."""

    turns: list[Turn]
    start_s: float
    restart: Restart
    moved: dict[str, int] | None = None

    def restarted_alike(self) -> bool:
        """Whether the answer after the restart is the one from before."""
        again = self.restart.turn
        before = next(turn for turn in self.turns if (turn.user, turn.turn) == (again.user, again.turn))
        return before.text == again.text


@dataclass(frozen=True, slots=True)
class Same:
    """How many of `of` outputs were identical."""

    same: int
    of: int

    def __str__(self) -> str:
        return f"{self.same}/{self.of}"


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything that was measured."""

    settings: dict[str, Any]
    plain: Run
    kvbm: Run
    control: Same
    """Requests asked twice of the engine without KVBM, once of them after its restart."""
    identical: Same = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.plain.turns, self.kvbm.turns, strict=True)
        object.__setattr__(self, "identical", same(((a.text, b.text) for a, b in pairs)))

    def problem(self) -> str | None:
        """Why the demo failed, in a sentence."""
        if self.identical.same < self.identical.of:
            against_itself = f" (the engine against itself: {self.control} identical)" if self.control.of else ""
            return f"only {self.identical} answers with KVBM are those of the engine alone{against_itself}"
        if not any(turn.g2_tokens for turn in self.kvbm.turns if turn.turn > 1):
            return "nothing was found in G2 after the first turn"
        if not self.kvbm.restart.g3_tokens:
            return "nothing came from disk (G3) after the restart"
        if not self.kvbm.restarted_alike():
            return "the answer after the restart is not the one from before"
        return None


def same(pairs: Iterable[tuple[str, str]]) -> Same:
    """Count identical pairs."""
    equal = [a == b for a, b in pairs]
    return Same(sum(equal), len(equal))


def ttft(turns: Sequence[Turn]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds."""
    times = [turn.ttft_ms for turn in turns]
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95))}


def by_turn(run: Run) -> dict[str, list[Turn]]:
    """Turns under "1", "2", ..., and all but the first under "later"."""
    groups: dict[str, list[Turn]] = {}
    for turn in run.turns:
        groups.setdefault(str(turn.turn), []).append(turn)
    return groups | {"later": [turn for turn in run.turns if turn.turn > 1]}


def tokens(run: Run) -> dict[str, int]:
    """Sums over all turns."""
    names = ("prompt", "device", "g2", "computed", "computed_again")
    return {name: sum(getattr(turn, f"{name}_tokens") for turn in run.turns) for name in names}


def record(demo: Demo) -> dict[str, Any]:
    """What is written to the file."""
    later = {name: ttft(by_turn(run)["later"])["median"] for name, run in (("plain", demo.plain), ("kvbm", demo.kvbm))}
    problem = demo.problem()
    return {
        "settings": demo.settings,
        "ok": problem is None,
        "problem": problem,
        "identical": asdict(demo.identical),
        "control": asdict(demo.control),
        "ttft_ratio_later": later["kvbm"] / later["plain"],
        "ttft_ratio_restart": demo.kvbm.restart.turn.ttft_ms / demo.plain.restart.turn.ttft_ms,
        "runs": {"plain": _run(demo.plain), "kvbm": _run(demo.kvbm)},
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "start_s": run.start_s,
        "ttft_ms": {name: ttft(turns) for name, turns in by_turn(run).items()},
        "tokens": tokens(run),
        "bytes": run.moved,
        "restart": {
            "start_s": run.restart.start_s,
            "g3_tokens": run.restart.g3_tokens,
            "identical": run.restarted_alike(),
            "turn": asdict(run.restart.turn),
        },
        "turns": [asdict(turn) for turn in run.turns],
    }


def table(demo: Demo) -> Table:
    """The same for people: without and with KVBM side by side."""
    settings, plain, kvbm = demo.settings, demo.plain, demo.kvbm
    share = settings["device_tokens"] / settings["working_set_tokens"]
    shown = Table(
        title=f"{settings['users']} users taking turns; the device cache holds {share:.0%} of what they talk about",
        title_justify="left",
        title_style="",
    )
    shown.add_column("")
    shown.add_column("vLLM alone", justify="right")
    shown.add_column("vLLM with KVBM", justify="right")
    for name, turns in by_turn(plain).items():
        label = "all later turns" if name == "later" else f"turn {name}"
        with_kvbm = by_turn(kvbm)[name]
        shown.add_row(f"time to first token, {label}: median / p95", _times(turns), _times(with_kvbm))
    counts = (tokens(plain), tokens(kvbm))
    shown.add_section()
    for name, label in (
        ("prompt", "prompt tokens"),
        ("computed_again", "of those computed again"),
        ("device", "found on the device"),
        ("g2", "found in host memory (G2)"),
    ):
        shown.add_row(label, *(f"{count[name]:,}" for count in counts))
    shown.add_row("bytes moved to / from G2", "-", _moved(kvbm))
    shown.add_section()
    after = (plain.restart, kvbm.restart)
    shown.add_row("first request after a crash: time to first token", *(f"{r.turn.ttft_ms:,.0f} ms" for r in after))
    shown.add_row("of its prompt found on disk (G3)", *(f"{r.g3_tokens:,} of {r.turn.prompt_tokens:,}" for r in after))
    shown.add_section()
    shown.add_row("identical answers", f"{demo.control} (asked twice)" if demo.control.of else "-", str(demo.identical))
    shown.add_row("after the crash, as before it", *("yes" if run.restarted_alike() else "no" for run in (plain, kvbm)))
    return shown


def _times(turns: Sequence[Turn]) -> str:
    times = ttft(turns)
    return f"{times['median']:,.0f} / {times['p95']:,.0f} ms"


def _moved(run: Run) -> str:
    return "unknown" if run.moved is None else f"{size(run.moved['down'])} / {size(run.moved['up'])}"
