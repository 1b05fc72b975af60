"""What lies below host memory, put in place: at the start, or while the engine serves, once it is known what the
weights contain."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvbm.build import disk as build_disk
from kvbm.build import peers as build_peers
from kvbm.core.config import Settings
from kvbm.core.errors import Broken, KvbmError
from kvbm.core.folders import NO_HOME
from kvbm.core.keys import Namespace
from kvbm.leader.earlier import Earlier
from kvbm.leader.leader import Leader
from kvbm.stores.content import Chosen, Contents
from kvbm.stores.disk.folder import Folder
from kvbm.stores.stamps import recorded
from kvbm.tiers.disk.orders import to_open
from kvbm.tiers.stack import Lower

if TYPE_CHECKING:
    from kvbm.build.place import Place

log = logging.getLogger(__name__)

Choose = Callable[[], Sequence[Chosen]]
"""Says which files the engine loaded; raises Changed where nobody can say."""
AT_ONCE_S: Final = 1.0
"""How long a start waits for the digest of the weights, from when it began."""
_TICK_S: Final = 0.005
_OPENING: Final = "what the weights contain is still being found out: until then host memory works alone"


class Look:
    """Finds out, on a thread of its own, what the engine's weights contain. `began` is when the first process that
    loaded them did."""

    def __init__(self, settings: Settings, choose: Choose, began: int) -> None:
        self._stop, self._over = threading.Event(), threading.Event()
        self._contents = Contents(settings.cache_dir or settings.run_dir, stop=self._stop)
        self._choose, self._start = choose, recorded(settings.weights_seen, began)
        self._begun = time.monotonic()
        self.digest: str | None = None
        self.why: str | None = None
        """Why nobody knows."""
        threading.Thread(target=self._run, name="kvbm-weights", daemon=True).start()

    def _run(self) -> None:
        try:
            self.digest = self._contents.identify(self._choose, self._start)
        except KvbmError as error:
            self.why = str(error)
        except Exception as error:
            log.exception("KVBM: the weights could not be digested")
            self.why = f"{type(error).__name__}: {error}"
        finally:
            self._over.set()

    def known(self, seconds: float | None = None) -> bool:
        """Whether it is over, so many seconds after its beginning; None: waits for its end."""
        left = None if seconds is None else max(0.0, self._begun + seconds - time.monotonic())
        return self._over.wait(left)

    @property
    def stopped(self) -> bool:
        """Whether nobody wants to know any more."""
        return self._stop.is_set()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self._stop.set()


class Below:
    """Of one engine. `namespace`, `folder` and `namesakes` are what is known so far; `told` is called when that changes
    later."""

    def __init__(
        self, settings: Settings, place: Place, namespace: Namespace, leader: Leader, slot_bytes: int, block_tokens: int
    ) -> None:
        self._settings, self._place, self._leader = settings, place, leader
        self._slot_bytes, self._block_tokens = slot_bytes, block_tokens
        self.namespace = namespace
        self.folder: Path | None = None
        self.namesakes: tuple[str, ...] = ()
        self.told: Callable[[], None] = lambda: None
        self._look: Look | None = None
        self._claimed: Folder | None = None
        """The disk tier's, until that is there."""

    def begin(self, look: Look | None) -> None:
        """Without `look` the namespace is known as it is. Where it is not known soon, the rest is done later. Raises
        Broken where `strict` is set and something cannot be had, ConfigError for what cannot be used."""
        self._look, strict = look, self._settings.strict
        if build_disk.wanted(self._settings):
            with self._without_disk(strict):
                self._claimed = Folder.claim(disk_folder(self._settings, self._place), self._place.engine)
        if look is None:
            self._attach(strict=strict)
        elif look.known(AT_ONCE_S):
            self._conclude(look, strict=strict)
        else:
            log.warning("KVBM: %s", _OPENING)
            self._leader.absent = dict.fromkeys(self._leader.shared, _OPENING) | self._leader.absent
            self._leader.earlier = Earlier(self._leader.pool, len(self._place.storing))
            threading.Thread(target=self._later, args=(look,), name="kvbm-attach", daemon=True).start()

    def close(self) -> None:
        """The process is about to end."""
        if self._look is not None:
            self._look.close()

    def _later(self, look: Look) -> None:
        look.known()
        if look.stopped:
            return
        try:
            self._conclude(look, strict=False)
            self.told()
            while self._leader.tell_earlier() and not look.stopped:
                time.sleep(_TICK_S)
        except Exception as error:  # the engine serves, and goes on doing so
            log.exception("KVBM: what is below host memory could not be put in place")
            self._leader.isolate(f"it could not be put in place ({type(error).__name__}: {error})")

    def _conclude(self, look: Look, *, strict: bool) -> None:
        if look.digest is None:
            self.namespace = self.namespace.private()
            self._leader.isolate(f"it is not known what the weights contain: {look.why}")
            self._let_go()
            return
        self.namespace = replace(self.namespace, weights=look.digest)
        self._attach(strict=strict)

    def _attach(self, *, strict: bool) -> None:
        """Puts in place what there is to be, or lets go of all of it."""
        with ExitStack() as undo:
            undo.callback(self._let_go)
            found = self._find(strict)
            if found is None and not build_peers.wanted(self._settings):
                return
            lower = self._lower(found, strict)
            undo.callback(lower.close)
            if lower.peers is not None:
                undo.callback(lower.peers.network.close)
            if self._leader.attach(lower):
                if found is not None:
                    self.folder, self.namesakes = found.folder.path, found.namesakes
                undo.pop_all()

    def _let_go(self) -> None:
        if self._claimed is not None:
            self._claimed.close()

    def _lower(self, found: build_disk.Found | None, strict: bool) -> Lower:
        settings, leader = self._settings, self._leader
        links = {rank: leader.links[rank] for rank in self._place.storing}
        block_bytes = self._slot_bytes * len(links)
        disk = build_disk.disk_side(settings, leader, links, found, block_bytes) if found is not None else None
        promotion = build_disk.promotion(settings, leader, disk, block_bytes)
        lower = Lower(promotion, self._block_tokens, disk)
        if build_peers.wanted(settings):
            name = peer_name(settings, self._place)
            try:
                lower.peers = build_peers.peers(
                    settings, leader, links, promotion, disk, self.namespace, name, self._place.dp_rank
                )
                leader.absent.pop("peers", None)
            except Broken as error:
                log.error("KVBM: no blocks are shared with other instances: %s", error)
                if strict:
                    raise
                leader.absent["peers"] = str(error)
        return lower

    def _find(self, strict: bool) -> build_disk.Found | None:
        """The disk tier's folder, with the file of each rank open."""
        if self._claimed is None:
            return None
        with self._without_disk(strict):
            found = build_disk.find(
                self._settings,
                self._claimed,
                len(self._place.storing),
                self.namespace,
                self._slot_bytes,
                self._place.model,
            )
            self._open(found)
            self._leader.absent.pop("g3", None)
            return found
        self._let_go()
        return None

    @contextmanager
    def _without_disk(self, strict: bool) -> Iterator[None]:
        """What cannot be had is done without, and why is said; where `strict` is set it is raised."""
        try:
            yield
        except Broken as error:
            log.error("KVBM: there is no disk tier (G3): %s", error)
            if strict:
                raise
            self._leader.absent["g3"] = str(error)

    def _open(self, found: build_disk.Found) -> None:
        """Has every rank that stores open its file. Raises Broken."""
        leader, ranks = self._leader, self._place.storing
        leader.opened.clear()
        for rank in ranks:
            leader.links[rank].send(to_open(found.folder.place))
        deadline = time.monotonic() + self._settings.init_timeout_s
        while len(leader.opened) < len(ranks):
            leader.tick()
            if time.monotonic() > deadline or not all(leader.links[rank].open for rank in ranks):
                raise Broken("not every rank said whether its file is open")
            time.sleep(_TICK_S)
        if problem := next((each.problem for each in leader.opened.values() if each.problem), None):
            raise Broken(problem)


def peer_name(settings: Settings, place: Place) -> str:
    """What other instances call this one."""
    if settings.peer_name is None:
        return place.engine
    return f"{settings.peer_name}_dp{place.dp_rank}" if place.data_parallel else settings.peer_name


def disk_folder(settings: Settings, place: Place) -> Path:
    """The folder of one engine's disk tier. Raises Broken: nothing says where it could be."""
    folder = settings.g3_dir or (settings.cache_dir and settings.cache_dir / "g3")
    if folder is None:
        raise Broken(f"{NO_HOME}: say with g3_dir (KVBM_G3_DIR) where the disk tier is to be")
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise Broken(f"the name of the folder {os.fsencode(folder)!r} is not UTF-8") from None
    return folder / f"dp{place.dp_rank}" if place.data_parallel else folder
