"""The leader, with all that stands beside it, put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

from kvbm import __version__
from kvbm.blocks import LayerGroup, Pool
from kvbm.build.memory import allot, free_bytes, gather, one_at_a_time, size, too_large
from kvbm.build.parts import Ground, Part
from kvbm.build.place import Place, channel_path
from kvbm.build.stack import Below, Choose, Look
from kvbm.build.tiers import TIERS, needs, wanted
from kvbm.control import http
from kvbm.control.socket import About, Control
from kvbm.core.config import Resolved, Settings
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.folders import check_folder
from kvbm.core.keys import Namespace
from kvbm.leader.core import Core, Limits
from kvbm.leader.coverage import Prefix
from kvbm.leader.groups import Groups
from kvbm.leader.growing import Growing
from kvbm.leader.health import Health
from kvbm.leader.leader import Leader
from kvbm.leader.lower import LowerTiers
from kvbm.leader.observers import Observers
from kvbm.leader.reports import Reports
from kvbm.link.channel import Link
from kvbm.link.messages import Allot, Touched
from kvbm.observe.totals import Totals
from kvbm.policy import eviction_order
from kvbm.tiers.gate import Gate
from kvbm.tiers.host import Host

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoreSide:
    """A core whose ranks have their memory, and what lies below it. `tick` it a few times a second."""

    core: Core
    gate: Gate
    below: Below

    def close(self) -> None:
        """Stops threads and says goodbye to the workers."""
        self.below.close()
        if (stack := self.core.lower.stack) is not None:
            stack.stop()
        self.core.close()


@dataclass(frozen=True, slots=True)
class LeaderSide:
    """Everything that lives beside the scheduler."""

    leader: Leader
    totals: Totals
    control: Control
    stop_metrics: Callable[[], None] | None
    below: Below

    def drain(self, seconds: float) -> None:
        """Writes to disk what only G2 has, the hottest first, for so long at most. Any thread but the engine's."""
        self.leader.core.drain(seconds)

    def close(self) -> None:
        """Stops threads and says goodbye to the workers."""
        self.below.close()
        self.control.close()
        if (stack := self.leader.core.lower.stack) is not None:
            stack.stop()
        if self.stop_metrics is not None:
            self.stop_metrics()
        self.leader.core.close()


def check(resolved: Resolved, engine: str = "", tiers: Sequence[Part] = TIERS) -> None:
    """Raises ConfigError for what cannot be used: names of policies, folders, keys, secrets, more memory than there is.
    Waits for nothing, and touches nothing. `engine` is an id like that of the engine that will be."""
    try:
        _check(resolved, tiers)
        channel_path(resolved.settings, engine)
    except ConfigError as error:
        given = {name: source for name, source in resolved.sources.items() if source != "default"}
        raise ConfigError(
            error.setting, error.problem, source=error.source or given.get(error.setting, ""), remedy=error.remedy
        ) from None


def _check(resolved: Resolved, parts: Sequence[Part]) -> None:
    settings = resolved.settings
    for name in ("run_dir", "cache_dir", "g3_dir", "traces"):
        if resolved.sources[name] != "default":
            check_folder(name, getattr(settings, name))
    eviction_order(settings.g2_order, 1, "g2_order")
    if settings.g2_gb is not None and settings.g2_blocks is None:
        free = free_bytes()
        if settings.g2_gb * 1e9 > free:
            raise too_large("g2_gb", f"{settings.g2_gb:g} GB", free, resolved)
    for part in parts:
        part.check(settings)


def check_size(resolved: Resolved, block_bytes: int) -> None:
    """Raises ConfigError for a G2 that somebody gave a size which cannot be, with blocks of `block_bytes` or more."""
    with suppress(Broken):  # a size that nobody gave
        size(resolved, Place("", 1), block_bytes)


@dataclass(frozen=True, slots=True)
class _Made:
    """A core whose ranks have their memory, and with what its tiers are put in place."""

    core: Core
    gate: Gate
    growing: Growing
    totals: Totals
    storing: Mapping[int, Link]
    slot_bytes: int
    namespace: Namespace
    look: Look | None

    def below(
        self, settings: Settings, place: Place, tiers: Sequence[Part], expects: Callable[[bytes, int], bool],
        *, grouped: bool = False,
    ) -> Below:  # fmt: skip
        ground = Ground(settings, place, self.core, self.gate, self.storing, self.slot_bytes, expects, grouped)
        below = Below(ground, tiers, self.namespace, self.gate.block_tokens)
        below.begin(self.look)
        return below


def _make(
    resolved: Resolved, place: Place, namespace: Namespace, block_tokens: int, choose: Choose | None,
    tiers: Sequence[Part], undo: ExitStack,
) -> _Made:  # fmt: skip
    settings = resolved.settings
    check(resolved, tiers=tiers)
    for note in resolved.notes:
        log.warning("KVBM: %s", note)
    links, slot_bytes, namespace, began = gather(settings, place, namespace, undo)
    lasting = [part.name for part in wanted(settings, tiers)]
    look = Look(settings, choose, began) if choose is not None and lasting else None
    if look is not None:
        undo.callback(look.close)
    parts = len(place.storing)
    block_bytes = slot_bytes * parts
    with one_at_a_time(settings):
        slots, why = size(resolved, place, block_bytes, tiers)
        log.info(
            "KVBM: G2 holds %d blocks of %d tokens, %.2f GB over %d rank(s): %s",
            slots, block_tokens, slots * block_bytes / 1e9, parts, why,
        )  # fmt: skip
        begun = time.monotonic()
        usable = allot(settings, place, links, Allot(slots, **asdict(needs(settings, tiers, slot_bytes))))
    totals, order = Totals(), eviction_order(settings.g2_order, slots)
    pool = Pool(slots, order=order, tier="g2", most_doubted=settings.answers_share)
    core = Core(
        Host(pool), links, LowerTiers(lasting), Health(paused=not settings.enabled, clock=time.monotonic),
        Observers([totals]), Limits.of(settings, block_bytes),
    )  # fmt: skip
    growing = Growing(pool, usable, links.values(), block_bytes, begun)
    core.hears((Touched,), growing.take)
    known = choose is None or lasting
    return _Made(
        core, Gate(block_tokens), growing, totals, {rank: links[rank] for rank in place.storing}, slot_bytes,
        namespace if known else namespace.private(), look,
    )  # fmt: skip


def build_core(
    resolved: Resolved, place: Place, namespace: Namespace, *, block_tokens: int, tiers: Sequence[Part] = TIERS
) -> CoreSide:
    """For an engine that keeps a tree of its own: blocks by key, without requests and steps. See `build_leader`."""
    with ExitStack() as undo:
        made = _make(resolved, place, namespace, block_tokens, None, tiers, undo)
        below = made.below(resolved.settings, place, tiers, lambda key, at: False)
        undo.pop_all()
    return CoreSide(made.core, made.gate, below)


def build_leader(
    resolved: Resolved, place: Place, namespace: Namespace, *, block_tokens: int, shares_device_blocks: bool,
    groups: Sequence[LayerGroup] = (), choose: Choose | None = None, tiers: Sequence[Part] = TIERS,
) -> LeaderSide:  # fmt: skip
    """The leader, once every rank's worker has its arena. `groups` are the engine's layer groups, where there are
    several, or one that does not need all blocks. `choose` says which files the engine loaded; without it the namespace
    is known as it is. `tiers` are those that settings may ask for, the nearest first. Raises ConfigError for a size
    that cannot be, Broken if a worker does not come or cannot get its memory."""
    settings = resolved.settings
    with ExitStack() as undo:
        made = _make(resolved, place, namespace, block_tokens, choose, tiers, undo)
        core = made.core
        leader = Leader(
            settings, core, Groups(core.pool, groups, settings.checkpoint_tokens) if groups else Prefix(core.pool),
            made.gate, shares_device_blocks=shares_device_blocks,
            reports=Reports((settings.cache_dir or settings.run_dir) / "reports", place.engine),
        )  # fmt: skip
        below = made.below(settings, place, tiers, leader.expects, grouped=bool(groups))
        undo.pop_all()
    about = About(
        place.engine, __version__, place.ranks, made.slot_bytes * len(made.storing), block_tokens, place.model
    )  # fmt: skip
    control = Control(
        leader, made.totals, about, settings.run_dir, lambda: below.namespace.fingerprint, made.growing.shortage
    )
    stop = None
    if settings.metrics:
        port = settings.metrics_port + place.dp_rank
        stop = http.serve(settings.metrics_host, port, control.sources(), control.health)
    return LeaderSide(leader, made.totals, control, stop, below)
