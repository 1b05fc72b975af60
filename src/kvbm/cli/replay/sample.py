"""Makes the sample trace: ``python -m kvbm.cli.replay.sample > src/kvbm/cli/replay/sample.jsonl``.

Conversations with assistants that share their instructions, and single questions that nobody asks again: a cache has
to keep the first although the second keep coming. The same bytes every time, on every Python.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from kvbm.cli.replay.trace import Line

BLOCK_TOKENS = 64
_SEED = 20
_ASSISTANTS = (6, 9, 4)
_CONVERSATIONS = 48
_SINGLES = 110


@dataclass(slots=True)
class _Sampler:
    """Draws with `random.random` only: its numbers are the same in every version of Python."""

    source: random.Random = field(default_factory=lambda: random.Random(_SEED))
    blocks: int = 0

    def between(self, least: int, most: int) -> int:
        return least + int(self.source.random() * (most - least + 1))

    def new(self, count: int) -> list[int]:
        """Ids that no prompt has had."""
        self.blocks += count
        return list(range(self.blocks - count, self.blocks))

    def request(self, timestamp: int, ids: list[int], session: int | None) -> Line:
        # The last block of a prompt is not always full.
        tokens = len(ids) * BLOCK_TOKENS - self.between(0, BLOCK_TOKENS - 1)
        return Line(timestamp, tokens, self.between(20, 400), ids, session)


def requests() -> list[Line]:
    """All requests, in time order."""
    sampler = _Sampler()
    instructions = [sampler.new(count) for count in _ASSISTANTS]
    drawn = [request for number in range(_CONVERSATIONS) for request in _conversation(sampler, number, instructions)]
    for _ in range(_SINGLES):
        drawn.append(sampler.request(sampler.between(0, 1_800_000), sampler.new(sampler.between(2, 24)), None))
    return sorted(drawn, key=lambda request: request.timestamp)


def _conversation(sampler: _Sampler, number: int, instructions: list[list[int]]) -> Iterator[Line]:
    """Each turn's prompt is the one before, the answer to it and the next question."""
    now = sampler.between(0, 1_500_000)
    ids = list(instructions[sampler.between(0, len(instructions) - 1)])
    for _ in range(sampler.between(1, 8)):
        ids = ids + sampler.new(sampler.between(1, 6))
        yield sampler.request(now, ids, number)
        now += sampler.between(5_000, 120_000)


def text() -> bytes:
    """The file's content."""
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(request) + b"\n" for request in requests())


if __name__ == "__main__":
    sys.stdout.buffer.write(text())
