"""What the directory is to be told about our blocks. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvbm.core.events import Cleared, Event, Removed
from kvbm.core.region import Slots
from kvbm.tiers.peers.directory import entry, indexed


class Published:
    """An observer of every pool whose blocks are shared: what left one of them is looked for in all of them, `holds`,
    before its entry goes."""

    def __init__(self, holds: Callable[[bytes], bool]) -> None:
        self.holds = holds
        self._lock = threading.Lock()
        self._keys: dict[bytes, bytes] = {}
        """Entry -> key, of all that is published or about to be."""
        self._added: set[bytes] = set()
        self._gone: list[bytes] = []
        self._removed: set[bytes] = set()
        self._afresh = self._telling = False
        self.written = 0
        """How many entries the directory has once it has been told what `take` gave."""

    def __len__(self) -> int:
        """How many entries there are to be."""
        with self._lock:
            return len(self._keys)

    @property
    def pending(self) -> bool:
        """Whether the directory does not know everything."""
        with self._lock:
            return bool(self._added or self._gone or self._removed or self._afresh or self._telling)

    def stored(self, keys: Sequence[bytes], places: Slots) -> None:
        """These can be had here; `places` are their numbers in their prompt, counted from 0."""
        if not len(places):
            return
        chosen = set(indexed(int(places.min()), int(places.max()) + 1).tolist())
        new = [key for key, place in zip(keys, places.tolist(), strict=True) if place in chosen]
        with self._lock:
            for key in new:
                name = entry(key)
                if name not in self._keys or name in self._removed:
                    self._added.add(name)
                    self._removed.discard(name)
                self._keys[name] = key

    def on_event(self, event: Event) -> None:
        """A pool's event."""
        if isinstance(event, Removed):
            with self._lock:
                self._gone += [key for key in event.keys if entry(key) in self._keys]
        elif isinstance(event, Cleared):
            with self._lock:
                self._gone = list(self._keys.values())

    def take(self) -> tuple[set[bytes], set[bytes], bool]:
        """What to add and what to remove since the last call; and whether everything else is to go. Then comes `told`
        or, where the directory did not take it, `again`."""
        with self._lock:
            gone = {entry(key): key for key in self._gone}
            self._gone = []
            for name in gone:  # what is stored from now on counts as new
                self._keys.pop(name, None)
        held = {name for name, key in gone.items() if self.holds(key)}  # takes the pools' locks
        with self._lock:
            for name, key in gone.items():
                if name in held:
                    self._keys.setdefault(name, key)
                elif name not in self._keys:
                    if name not in self._added:
                        self._removed.add(name)
                    self._added.discard(name)
            added, self._added = self._added, set()
            removed, self._removed = self._removed, set()
            afresh, self._afresh = self._afresh, False
            self.written = len(self._keys)
            self._telling = bool(added or removed or afresh)
            return added, removed, afresh

    def told(self) -> None:
        """The directory knows what `take` gave."""
        with self._lock:
            self._telling = False

    def again(self) -> None:
        """The directory has lost something: tell it everything."""
        with self._lock:
            self._added, self._afresh, self._telling = set(self._keys), True, False
