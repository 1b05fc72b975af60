"""Request traces: Mooncake's JSONL, plain or gzip, one request per line, several of them interleaved by time."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.core.errors import KvbmError, UsageError

SAMPLE = "sample"
STDIN = "-"
"""The trace that comes with KVBM."""

_GZIP = b"\x1f\x8b"
_LARGEST_BLOCK = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=0)]


class Line(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One request as it stands in a trace; fields that are not named here are ignored."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """Milliseconds since the trace began."""
    input_length: Count
    """Tokens of the prompt."""
    output_length: Count
    """Tokens of the answer."""
    hash_ids: list[Count]
    """One per block of the prompt; an equal id is an equal block after an equal prefix."""
    session_id: int | str | None = None


class BadLine(KvbmError):
    """A trace has something in it that is no request: says file, line and what is wrong."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")


@dataclass(frozen=True, slots=True)
class Trace:
    """One file's requests in time order. `skipped` counts what was no request."""

    name: str
    lines: list[Line]
    block_tokens: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a workload: the numbers of its blocks, its length and the size of a block in tokens."""

    blocks: npt.NDArray[np.int32]
    tokens: int
    block_tokens: int

    def tokens_of(self, first: int, end: int) -> int:
        """Tokens in its blocks from `first` to before `end`; the last block may not be full."""
        return min(end * self.block_tokens, self.tokens) - min(first * self.block_tokens, self.tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one or more traces, interleaved by time. Blocks are numbered over all of them; no trace shares a
    block with another. `keys` has for each block what an engine would call it: 32 bytes."""

    traces: Sequence[Trace]
    prompts: Sequence[Prompt]
    keys: Sequence[bytes]

    @property
    def unique(self) -> int:
        """Different blocks."""
        return len(self.keys)

    @property
    def references(self) -> int:
        """Blocks of all prompts."""
        return sum(len(prompt.blocks) for prompt in self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt.tokens for prompt in self.prompts)

    @property
    def longest(self) -> int:
        """Blocks of the longest prompt."""
        return max(len(prompt.blocks) for prompt in self.prompts)


def find(name: str, folder: Path | None) -> Path:
    """The file called `name`: a path, the name of a file in `folder`, the sample, or what comes in (`STDIN`). Raises
    UsageError."""
    if name == STDIN:
        return Path("/dev/stdin")
    if name == SAMPLE:
        return Path(str(resources.files("kvbm.cli.replay") / "sample.jsonl"))
    places = [Path(name).expanduser(), *([folder / name] if folder else [])]
    for place in places:
        if place.is_file():
            return place
    where = f"nor is it in {folder}" if folder else "and neither --traces nor KVBM_TRACES names a folder of traces"
    raise UsageError(f"there is no trace {name!r}: it is no file, {where}. {SAMPLE!r} is the one that comes with KVBM")


def read(path: Path, *, skip_bad: bool = False, block_tokens: int | None = None) -> Trace:
    """All requests of a file. With `skip_bad`, what is no request is counted and left out.

    `block_tokens` None: it is inferred from the lengths. Raises BadLine for the first broken line, KvbmError where the
    file cannot be read, holds no request, or its block size cannot be inferred.
    """
    good: list[Line] = []
    skipped = 0
    for line in _decoded(path):
        if isinstance(line, Line):
            good.append(line)
        elif skip_bad:
            skipped += 1
        else:
            raise line
    if not good:
        raise KvbmError(f"{path} holds no request" + (f": all {skipped} lines are broken" if skipped else ""))
    good.sort(key=lambda line: line.timestamp)
    return Trace(path.name, good, block_tokens or _block_tokens(path, good), skipped)


def interleave(traces: Sequence[Trace]) -> Workload:
    """One workload: by time, requests of the same time in the order of the traces."""
    order = sorted(
        ((line.timestamp, at) for at, trace in enumerate(traces) for line in trace.lines), key=lambda entry: entry[0]
    )
    upcoming = [iter(trace.lines) for trace in traces]
    numbers: list[dict[int, int]] = [{} for _ in traces]
    keys: list[bytes] = []
    prompts = []
    for _, at in order:
        line, known = next(upcoming[at]), numbers[at]
        for name in line.hash_ids:
            if name not in known:
                known[name] = len(keys)
                keys.append(hashlib.sha256(b"%d:%d" % (at, name)).digest())
        blocks = np.array([known[name] for name in line.hash_ids], np.int32)
        prompts.append(Prompt(blocks, line.input_length, traces[at].block_tokens))
    return Workload(traces, prompts, keys)


def _decoded(path: Path) -> Iterator[Line | BadLine]:
    """Each line that is not blank, and a last BadLine where the file ends too early."""
    decoder, number = msgspec.json.Decoder(Line), 0
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(len(_GZIP)).startswith(_GZIP)
            for number, text in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw, 1):
                if not text.isspace():
                    yield _line(decoder, text, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = "the gzip file ends too early" if isinstance(error, EOFError) else f"damaged gzip data: {error}"
        yield BadLine(path, number + 1, problem)
    except OSError as error:
        raise KvbmError(f"cannot read {path}: {error.strerror}") from None


def _line(decoder: msgspec.json.Decoder[Line], text: bytes, path: Path, number: int) -> Line | BadLine:
    try:
        line = decoder.decode(text)
    except msgspec.ValidationError as error:
        return BadLine(path, number, _sentence(str(error)))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return BadLine(path, number, f"it is not valid JSON: {str(error).removeprefix('JSON is malformed: ')}")
    if len(set(line.hash_ids)) < len(line.hash_ids):
        return BadLine(path, number, "hash_ids has an id twice, but no block of a prompt has the prefix of another")
    return line


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


def _sentence(problem: str) -> str:
    """msgspec's message in the words of the trace."""
    if match := re.fullmatch(r"Object missing required field `(\w+)`", problem):
        return f"{match[1]} is missing"
    place = re.search(r" - at `\$\.(.+)`$", problem)
    name = place[1] if place else "the line"
    if match := re.match(r"Expected `([^`]+)`, got `(\w+)`", problem):
        wanted = " or ".join(_KINDS[kind] for kind in match[1].split(" | "))
        return f"{name} must be {wanted}, not {_KINDS[match[2]]}"
    if ">= 0" in problem:
        return f"{name} must not be negative"
    return f"{name}: {problem.split(' - at ')[0].lower()}"


def _block_tokens(path: Path, lines: Sequence[Line]) -> int:
    """The size that explains how many blocks each prompt has: with its last, partial one, or else without it.

    Of several a power of two, or else the smallest. Raises KvbmError where there is none.
    """
    lengths = [(line.input_length, len(line.hash_ids)) for line in lines if line.hash_ids]
    with_partial = [(-(-tokens // n), -(-tokens // (n - 1)) - 1 if n > 1 else _LARGEST_BLOCK) for tokens, n in lengths]
    without = [(tokens // (n + 1) + 1, tokens // n) for tokens, n in lengths]
    possible = []
    for ranges in (with_partial, without):
        smallest = max((least for least, _ in ranges), default=1)
        largest = min((most for _, most in ranges), default=_LARGEST_BLOCK)
        if 1 <= smallest <= largest:
            possible.append(smallest)
            power = 1 << (smallest - 1).bit_length()
            if power <= largest:
                return power
    if not possible:
        raise KvbmError(f"{path}: no block size explains how many blocks each prompt has; give --block-size")
    return possible[0]
