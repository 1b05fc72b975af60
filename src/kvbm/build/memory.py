"""Host memory, before there is a leader: which ranks there are, how large G2 is, and that each rank has its part."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import msgspec

from kvbm.build.parts import Part
from kvbm.build.place import Place, channel_path
from kvbm.build.tiers import TIERS, wanted
from kvbm.core.config import Resolved, Settings
from kvbm.core.errors import Broken, ConfigError, Unsupported
from kvbm.core.keys import Namespace
from kvbm.link.channel import Link, listen, readable
from kvbm.link.messages import Allot, Hello, Ready, Refused
from kvbm.stores.available import available_memory
from kvbm.stores.memory import RESERVE_BYTES, promised

log = logging.getLogger(__name__)

_BOUNCE_BYTES = 1 << 30
"""Size of G2 where it need only pass blocks on (`Part.large`) and nothing says how large it is."""


def gather(
    settings: Settings, place: Place, namespace: Namespace, undo: ExitStack
) -> tuple[dict[int, Link], int, Namespace, int]:
    """Waits until every rank's worker has connected and said the same as the leader knows; returns last when the first
    of their processes began, 0 if one does not say. If the start fails after all, `undo` closes the links."""
    path = channel_path(settings, place.engine)
    links: dict[int, Link] = {}
    facts: dict[int, dict[str, str]] = {}
    sizes: set[int] = set()
    began: list[int] = []
    deadline = time.monotonic() + settings.init_timeout_s
    with listen(path) as sock:
        undo.callback(path.unlink, missing_ok=True)
        while len(links) < place.ranks:
            if not readable([sock], deadline - time.monotonic()):
                raise Broken(f"only {len(links)} of {place.ranks} workers came within {settings.init_timeout_s:.0f} s")
            link = Link(sock.accept()[0])
            undo.callback(link.close)
            try:
                hello = link.wait(10.0)
            except Broken as error:  # an engine with the same id that looks whether this one lives, say
                log.debug("KVBM: %s", error)
                hello = None
            if not isinstance(hello, Hello):
                link.close()
                continue
            if (hello.fingerprint, hello.world) != (namespace.rank_fingerprint, place.ranks):
                raise Broken(f"the worker of rank {hello.rank} runs another configuration than the scheduler")
            links[hello.rank], facts[hello.rank] = link, hello.facts
            sizes.add(hello.slot_bytes)
            began.append(hello.began)
    path.unlink(missing_ok=True)
    if len(sizes) != 1:
        raise Broken(f"ranks hold blocks of different sizes ({sorted(sizes)} bytes): not supported")
    return links, sizes.pop(), replace(namespace, facts={**namespace.facts, **_over_ranks(facts)}), min(began)


def _over_ranks(facts: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
    """What the ranks say: once where all say the same."""
    joined = {}
    for name in sorted({name for theirs in facts.values() for name in theirs}):
        values = [facts[rank].get(name, "") for rank in sorted(facts)]
        joined[name] = values[0] if len(set(values)) == 1 else json.dumps(values)
    return joined


@contextmanager
def one_at_a_time(settings: Settings) -> Iterator[None]:
    """Engines that start together size their memory one after the other: the second sees what the first took, and will
    take (`promised`). (A data-parallel engine of a dense model is not even told how many there are.) The lock dies with
    its holder."""
    folder = os.open(settings.run_dir, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + settings.init_timeout_s
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Broken(f"another engine has been starting for {settings.init_timeout_s:.0f} s") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)


def size(resolved: Resolved, place: Place, block_bytes: int, parts: Sequence[Part] = TIERS) -> tuple[int, str]:
    """How many blocks G2 gets above the tiers of `parts` that settings ask for, and why. Raises ConfigError for a size
    that somebody set and that cannot be, Broken where nobody did: then this machine has too little memory."""
    settings, sources = resolved.settings, resolved.sources
    free = free_bytes()
    bounce = any(part.large for part in wanted(settings, parts)) and sources["g2_share"] == "default"
    if settings.g2_blocks is not None:
        name, slots, why = "g2_blocks", settings.g2_blocks, f"{sources['g2_blocks']}"
    elif settings.g2_gb is not None:
        name, slots = "g2_gb", int(settings.g2_gb * 1e9) // block_bytes
        why = f"{sources['g2_gb']}, {settings.g2_gb:g} GB"
    elif bounce:
        name, slots, why = "g2_gb", max(1, _BOUNCE_BYTES // block_bytes), "default, only to pass blocks on"
    else:
        name, slots = "g2_share", int(max(0, free) * settings.g2_share / place.dp_local) // block_bytes
        why = f"{settings.g2_share:.0%} of {free / 1e9:.1f} GB that are available, for {place.dp_local} engine(s)"
    if sources[name] == "default" and not 1 <= slots <= free // block_bytes:
        raise Broken(f"only {max(0, free) / 1e9:.2f} GB of memory are available for G2 ({name} says how much to take)")
    if slots < 1:
        raise ConfigError(
            name, f"G2 would be smaller than one block of {block_bytes:,} bytes", source=sources[name],
            remedy=f"Give it at least {block_bytes / 1e9:.3g} GB.",
        )  # fmt: skip
    if slots * block_bytes > free:
        raise too_large(name, f"{slots:,} blocks, {slots * block_bytes / 1e9:.2f} GB,", free, resolved)
    return slots, why


def free_bytes() -> int:
    """What G2 can have: not what the arenas of other engines are being touched for."""
    taken = promised()  # first: what is touched in between counts twice, not never
    return available_memory() - taken - RESERVE_BYTES


def too_large(name: str, asked: str, free: int, resolved: Resolved) -> ConfigError:
    others = f", {taken / 1e9:.2f} GB for engines that are starting" if (taken := promised()) else ""
    return ConfigError(
        name,
        f"G2 of {asked} does not fit: only {max(0, free) / 1e9:.2f} GB of memory are available (1.07 GB kept for the "
        f"engine{others})",
        source=resolved.sources[name], remedy="Make it smaller.",
    )  # fmt: skip


def allot(settings: Settings, place: Place, links: dict[int, Link], arena: Allot) -> dict[int, int]:
    """Has every rank that stores make its arena, then the others map that. Returns how many slots each of the
    former can use at once."""
    deadline = time.monotonic() + settings.init_timeout_s
    for rank in place.storing:
        links[rank].send(msgspec.structs.replace(arena, shared=place.replicated))
    usable = {rank: _ready(rank, links[rank], deadline) for rank in place.storing}
    if others := [rank for rank in links if rank not in place.storing]:
        file = links[0].take_file()
        try:
            for rank in others:
                links[rank].send(Allot(arena.num_slots, stride=arena.stride), file)
        finally:
            os.close(file)
        for rank in others:
            _ready(rank, links[rank], deadline)
    return usable


def _ready(rank: int, link: Link, deadline: float) -> int:
    """Waits for one rank's memory; returns how many slots it can use at once."""
    match link.wait(max(0.0, deadline - time.monotonic())):
        case Ready(slots=usable):
            return usable
        case Refused(problem=refusal, ends=ends):
            raise (Unsupported if ends else Broken)(f"rank {rank} cannot get its host memory: {refusal}")
        case message:
            raise Broken(f"rank {rank} did not prepare its host memory in time ({message!r})")
