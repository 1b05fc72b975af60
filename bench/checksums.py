"""What checksums cost: time to first token with and without them, at hits in G2 and on disk, and while computing.

In one engine, which makes them or not from one request to the next; blocks come back the way they were stored.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from bench.g3 import FOLDER, LENGTH, forget_memory, prompt_of, settle
from bench.harness import Bench, medians_of
from bench.model import engine
from bench.ttft import first_token
from kvbm.abc.transport import Completion, Plan, Transport
from kvbm.core.region import Region, Slots
from kvbm.stores.checksum import Words, checksums
from kvbm.tiers.gate import Gate
from tests.checksums import nothing
from tests.checksums import replace as replace_checksums
from tests.e2e.engine import Engine

ROUNDS, COLD_ROUNDS, PROMPTS = 25, 9, 2
KINDS = {"with": True, "without": False, "with again": True}
BAR = 1.03


def switched(inner: Transport, rank: int, query: str) -> Transport:
    """No product has this: while the file `query` is there, checksums in this process say nothing and cost nothing."""
    off, submit = Path(query).exists, inner.submit

    def submitting(plan: Plan, done: Callable[[Completion], None]) -> int:
        return submit(replace(plan, sums=plan.sums and not off()), done)

    def making(region: Region, slots: Slots, length: int) -> Words:
        return (nothing if off() else checksums)(region, slots, length)

    inner.submit = submitting  # type: ignore[method-assign]
    replace_checksums(making)
    return inner


class Measured:
    """An engine in `folder`."""

    def __init__(self, bench: Bench, folder: Path, *, verify: bool) -> None:
        folder.mkdir()
        self.bench, self.off, self.what = bench, folder / "off", ", g2_verify" if verify else ""
        settings = {
            "g2_gb": 1, "g3_gb": 2, "g3_dir": str(folder / "g3"), "g2_verify": verify,
            "transport_wrapper": f"bench.checksums:switched?{self.off}",
        }  # fmt: skip
        self.vllm = engine(settings, max_model_len=4096, num_gpu_blocks_override=300)
        first_token(self.vllm, prompt_of(random.Random(0), 64))
        self.prompts = {kind: [prompt_of(random.Random(f"{kind} {at}")) for at in range(PROMPTS)] for kind in KINDS}
        for kind, prompts in self.prompts.items():
            for prompt in prompts:
                self.ask(kind, prompt)

    def ask(self, kind: str, prompt: list[int]) -> float:
        self.off.unlink(missing_ok=True) if KINDS[kind] else self.off.touch()
        seconds = first_token(self.vllm, prompt)
        settle(self.vllm)
        return seconds

    def hits(self, what: str, before: Callable[[Engine], None]) -> None:
        """They come from where `before` leaves the blocks."""

        def hit(kind: str) -> float:
            seconds = []
            for prompt in self.prompts[kind]:
                before(self.vllm)
                seconds.append(self.ask(kind, prompt))
            return statistics.median(seconds)

        self.tell(what, medians_of(ROUNDS, {kind: partial(hit, kind) for kind in KINDS}))

    def cold(self) -> None:
        """Prompts that nobody has seen, whose blocks get their checksums meanwhile."""
        dice = random.Random(9)
        asks = {kind: lambda kind=kind: self.ask(kind, prompt_of(dice)) for kind in KINDS}
        self.tell("computed", medians_of(COLD_ROUNDS, asks))

    def tell(self, what: str, median: dict[str, float]) -> None:
        what = f"{what}, {LENGTH} tokens{self.what}"
        self.bench.info(f"{what}, ms", {name: round(value * 1e3, 1) for name, value in median.items()})
        self.bench.row(what, "without checksums", median["with"] / median["without"], "<=", BAR)
        self.bench.row(f"A/A: {what}", "with checksums", median["with again"] / median["with"])


def main() -> int:
    bench = Bench("checksums")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name, mock.patch.object(Gate, "objection", return_value=None):
        for verify in (False, True):
            measured = Measured(bench, Path(name).resolve() / str(verify), verify=verify)
            with closing(measured.vllm) as vllm:
                measured.hits("G2 hit", Engine.forget_device)
                measured.hits("G3 hit", forget_memory)
                assert vllm.status()["tokens"]["g3"] > 0
                assert vllm.status()["promote"]["corrupt"] == 0
                if not verify:
                    measured.cold()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
