"""`python -m tests.cuda.plants [WORD ...]`: does an engine on a simulated GPU notice mistakes of the connector's?

Each plant is a change of KVBM's code in the processes of one engine. The same conversations are asked three times, with
device memory for a few of them. A plant is found where the fake driver saw a copy and the engine's work overlap, where
answers are others than without KVBM, or where KVBM turned itself off; and each run without its plant finds nothing.
Prints which run found what, for docs/gpu.md; ends with 1 where one was not found.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

from kvbm.leader.leader import Leader
from kvbm.tiers.gate import Gate
from tests.cuda import pretend
from tests.cuda.plugin import PACE, on_a_gpu
from tests.e2e.engine import TINY, Engine, asynchronous_scheduling, write_tiny

SIZES: Final[dict[str, Any]] = {"num_gpu_blocks_override": 24, "max_model_len": 512}


def write_lfm2(folder: Path) -> Path:
    """Short convolutions beside full attention: the engine zeroes blocks before it uses them."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        **(TINY | {"num_hidden_layers": 4}), full_attn_idxs=[1, 3], conv_dim=128, conv_dim_out=128, conv_L_cache=3,
        block_auto_adjust_ff_dim=False, block_dim=128, pad_token_id=0,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


def conversations(seed: int) -> list[list[int]]:
    """More than the engine's memory holds, with beginnings in common."""
    dice = random.Random(seed)
    begun = [[dice.randrange(3, 1000) for _ in range(dice.choice((150, 250, 330)))] for _ in range(4)]
    return [
        first + [dice.randrange(3, 1000) for _ in range(dice.randrange(20, 90))] for first in begun for _ in range(4)
    ]


def asked(engine: Engine, prompts: list[list[int]], tokens: int = 12) -> list[list[int]]:
    return [done.tokens for done in engine.run(prompts, tokens)]


@dataclass(frozen=True)
class Plant:
    """A mistake on a rank (that of `pretend.PLANTS` with this name) or of the leader; the run that is to find it."""

    name: str
    leader: Callable[[Leader, Iterable[int]], Iterable[int]] | None = None
    """What of the blocks that a step writes the leader hears of."""
    pace: str = PACE
    options: Mapping[str, object] = field(default_factory=dict)
    """Of `pretend`, of which v2 alone may be a mistake."""
    settings: Mapping[str, object] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path], Path] = write_tiny
    scheduling: Callable[[], AbstractContextManager[None]] = nullcontext
    prompts: int = 16
    overlaps: bool = True
    """Whether an overlap is a mistake: what was given up may go on."""
    same: bool = True
    """Whether answers are to be those without KVBM. vLLM's own for such a model depend on how much memory it has."""


LAGS: Final[dict[str, object]] = {"most_ms": 50}
"""The engine's work takes long, and copies do not."""
SLOW: Final = "latency_us=150000"
"""Copies take long, and the engine's work does not."""
STUCK: Final = "latency_us=600000"
"""Copies take so long that a fence gives them up before they have read anything."""
HANGS: Final = "latency_us=50,linger_us=1000000"
"""Some copies take a second."""

PLANTED: Final = (
    Plant("marks are of stream 0", options=LAGS),
    Plant("marks are taken before the forward pass", options=LAGS),
    Plant("marks are of the step before", options=LAGS),
    Plant(
        "loads do not wait for their mark", pace="latency_us=50", options=LAGS | {"ahead": 1},
        scheduling=asynchronous_scheduling,
    ),
    Plant("loads have no mark"),
    Plant("no fence", pace=SLOW),
    Plant("a fence by an event", pace=SLOW),
    Plant("the fence comes after the forward pass", pace=SLOW),
    Plant("a condemned store is published", pace=STUCK, settings={"fence_ms": 1}, overlaps=False, prompts=6),
    Plant("a load that hangs is reported", pace=HANGS, settings={"load_deadline_s": 0.05}),
    Plant("the leader hears of no block that a step writes", lambda leader, blocks: (), pace=SLOW),
    Plant("the leader does not hear of a request's first new block", lambda leader, blocks: [*blocks][1:], pace=SLOW),
    Plant("the leader hears of every other block of a step", lambda leader, blocks: [*blocks][1::2], pace=SLOW),
    Plant("the fence comes after zeroing", pace=SLOW, options={"v2": 1}, write=write_lfm2, same=False),
)  # fmt: skip


def ran(plant: Plant, folder: Path, *, planted: bool) -> str:
    """What the run found, empty for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, options = conversations(2)[: plant.prompts], dict(plant.options)
    expected = _alone(plant.write)[: plant.prompts]
    if planted and plant.name in pretend.PLANTS:
        options["plant"] = plant.name
    if not planted:
        options.pop("v2", None)
    reuse, heard = Leader.reuse, plant.leader if planted else None

    def partly(leader: Leader, blocks: Iterable[int]) -> None:
        reuse(leader, blocks if heard is None else heard(leader, blocks))

    with on_a_gpu(folder, plant.pace, **options), plant.scheduling(), _served(partly):
        settings: dict[str, Any] = {"onboard": "async", "load_deadline_s": 30, "store_deadline_s": 30} | dict(
            plant.settings
        )
        with closing(Engine(_model(plant.write), settings, **(SIZES | dict(plant.sizes)))) as engine:
            answers = []
            for _ in range(3):
                answers.append(asked(engine, prompts, 40))
                if not engine.status()["problems"]:  # what turned itself off may have copies that never end
                    engine.settle(60)
            said = engine.status()
    found = []
    (seen,) = pretend.seen(folder)
    if plant.overlaps and seen["mistakes"]:
        found.append(f"{seen['mistakes']} overlaps ({seen['last']})")
    if plant.same and (differ := sum(a != b for each in answers for a, b in zip(each, expected, strict=True))):
        found.append(f"{differ} answers differ")
    found += said["problems"]
    if not planted and not said["onboard"]["blocks"]:
        found.append("no hits")
    return "; ".join(found)


@contextmanager
def _served(partly: Callable[[Leader, Iterable[int]], None]) -> Iterator[None]:
    with (
        mock.patch.object(Leader, "reuse", partly),
        mock.patch.object(Gate, "computing_s", return_value=None),  # computing would always be faster
    ):
        yield


@cache
def _model(write: Callable[[Path], Path]) -> Path:
    return write(Path(tempfile.mkdtemp(prefix="kvbm-plants")))


@cache
def _alone(write: Callable[[Path], Path]) -> list[list[int]]:
    """The answers without KVBM."""
    with closing(Engine(_model(write), **(SIZES | {"num_gpu_blocks_override": 128}))) as engine:
        return asked(engine, conversations(2), 40)


def found(plant: Plant, folder: Path) -> str:
    """What found it, empty for nothing."""
    try:
        return ran(plant, folder / "planted", planted=True)
    except Exception as error:  # noqa: BLE001  whatever the engine died of
        return f"the engine ended: {error!r}"


def main() -> int:
    words, missed, wrong = sys.argv[1:], 0, 0
    chosen = [plant for plant in PLANTED if all(word in plant.name for word in words)]
    for plant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            without = ran(plant, Path(folder) / "without", planted=False)
            by = found(plant, Path(folder))
        print(f"{'found ' if by else 'MISSED'} {plant.name}: {by}", flush=True)
        if without:
            print(f"WRONG  without it: {without}", flush=True)
        missed, wrong = missed + (not by), wrong + bool(without)
    print(f"{len(chosen) - missed} of {len(chosen)} were found; {wrong} runs without a plant found something")
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
