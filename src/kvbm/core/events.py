"""What happened to blocks: frozen values, for any number of observers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks became matchable in `tier`. `parent` is the key before `keys[0]` in its prompt, if known."""

    tier: str
    keys: tuple[bytes, ...]
    parent: bytes | None
    group: int = 0


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks can no longer be matched in `tier` (evicted, un-published or expired)."""

    tier: str
    keys: tuple[bytes, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Cleared:
    """Everything in `tier` is gone: a new `generation` begins."""

    tier: str
    generation: int


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A copy from the engine's memory to host memory ended on every rank; bytes and seconds of the slowest rank."""

    blocks: int
    failed: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Onboarded:
    """A copy from host memory to the engine's memory ended on every rank; bytes and seconds of the slowest rank."""

    blocks: int
    failed: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request got its blocks: so many tokens of its prompt, held by the engine itself, promised from host memory."""

    prompt_tokens: int
    device_tokens: int
    g2_tokens: int


Event = Stored | Removed | Cleared | Offloaded | Onboarded | Admitted
