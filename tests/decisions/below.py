"""What happens in a history below host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.decisions.engine import TEXTS
from tests.decisions.scene import EPOCH, Scene
from tests.decisions.words import plain
from tests.leader.roles import recovered


class Below(Scene):
    """To the disk and its folder, and among instances."""

    # ------------------------------------------------------------------ the disk

    def _chore(self) -> None:
        while self.chores.run():
            self._log(f"chore {self.stage.folder.calls[-1]}")
            self.stage.tick()
            if self.dice.random() < 0.5:
                return

    def _breaks(self) -> None:
        """The disk breaks, in one way or another, or works again."""
        if not self._disk_there:
            return
        stage, dice = self.stage, self.dice
        match dice.choice(["folder", "probes", "told", "reads", "writes", "well", "well", "well"]):
            case "folder":
                stage.folder.problem = "the folder is gone"
            case "probes":
                self.ranks.probes = "no space left"
            case "told":
                stage.fail_disk("looked at by an operator")
            case "reads":
                self.ranks.broken.add("read")
            case "writes":
                self.ranks.broken.add("write")
            case "well":
                stage.folder.problem = self.ranks.probes = None
                self.ranks.broken -= {"read", "write"}
        stage.folder.found = self._on_disk(dice.choice([0.0, 0.6, 1.0]))
        broken = sorted(self.ranks.broken)
        self._log(f"disk: folder {stage.folder.problem}, probes {self.ranks.probes}, {broken}")

    def _on_disk(self, share: float) -> Any:
        """What a look into the folder would find: some of what is there."""
        disk = self.stage.disk
        blocks = [disk.look(key) for key in disk.keys(0, disk.statistics().total)]
        there = [each for each in blocks if each is not None and self.dice.random() < share]
        return recovered(
            [each.key for each in there], [each.parent for each in there], [each.slot for each in there],
            priorities=np.array([each.priority for each in there], np.int32),
            expires=np.array([np.inf if each.expires is None else EPOCH + each.expires for each in there]),
        )  # fmt: skip

    def _command(self, action: str | None) -> None:
        """`kvbm disk verify`."""
        try:
            self._named(f"verify {action}", lambda: self.stage.disk_commands().verify(action))
        except LookupError as error:
            self._log(f"  -> {error}")

    def _purge(self) -> None:
        """`kvbm disk purge` of the engine's own namespace."""
        if self._disk_there:
            self._named("purge", self.stage.purge)

    # ------------------------------------------------------------------ other instances

    def _promised(self) -> None:
        open_ = [each for each in self.stage.network.searches if not each.ended] if self._shares else []
        if not open_:
            return
        search, dice = self.dice.choice(open_), self.dice
        at = dice.choice([0, 0, 0, dice.randrange(len(search.keys))])
        count = dice.randrange(1, len(search.keys) - at + 1)
        changes: dict[str, Any] = {}
        match dice.randrange(20):
            case 0:
                changes["seconds"] = float("nan")
            case 1:
                changes["slots"] = b"\xff" * 4 * count
            case 2:
                changes["seconds"] = 0.05
            case 3:
                changes["ttls"] = np.full(count, 3.0).tobytes()
        peer = dice.choice(self.stage.network.peers or ("other",))
        wanted = self.stage.promise(search, count, at=at, peer=peer, **changes)
        self._log(f"promise of {peer} {self.words.keys(search.keys[at : at + count])} {sorted(changes)} -> {wanted}")
        if dice.random() < 0.1:
            self._effects()
            self._time()

    def _search_ends(self) -> None:
        if self._shares and (open_ := [each for each in self.stage.network.searches if not each.ended]):
            search = self.dice.choice(open_)
            self._log(
                f"no more of {self.words.keys(search.keys)} {search.start} {search.peer} {plain(search.seconds)} s"
            )
            search.ended = True

    def _some_keys(self) -> tuple[Sequence[bytes], int]:
        at = self.dice.randrange(4)
        return TEXTS[self.dice.choice([*TEXTS])][at : at + self.dice.randrange(1, 6)], at

    def _reserved(self) -> None:
        if self._shares:
            keys, _ = self._some_keys()
            promise = self.stage.reserve(keys)
            self._log(f"reserve {self.words.keys(keys)} -> {promise.count} {self.words.slots(promise.slots)}")
            if promise.lease:
                self._leases.append(promise.lease)

    def _comes(self) -> None:
        if self._shares:
            keys, at = self._some_keys()
            name, expected = self.dice.choice(["s1", "s2"]), self.dice.random() < 0.5
            comes = self.stage.comes(name, keys, at, expected=expected)
            self._log(f"comes {name} {self.words.keys(keys)} {at} {expected} -> {comes}")

    def _released(self) -> None:
        if self._shares and self._leases:
            self._named("release", lambda: self.stage.release(self._leases.pop(self.dice.randrange(len(self._leases)))))
        elif self._shares:
            self._named("searched", lambda: self.stage.searched(self.dice.choice(["s1", "s2"])))

    def _published(self) -> None:
        if self._shares:
            heard = self.dice.random() < 0.85
            added, removed, afresh = self.stage.publish(heard=heard)
            lists = [sorted(each.hex()[:12] for each in entries) for entries in (added, removed)]
            self._log(f"publish {heard}: {lists} {afresh}")

    def _neighbours(self) -> None:
        if self._shares:
            network, dice = self.stage.network, self.dice
            network.peers = dice.choice([(), ("other",), ("other", "third")])
            network.problem = dice.choice([None, None, "the directory is gone"])
            (self.ranks.broken.add if dice.random() < 0.3 else self.ranks.broken.discard)("pull")
            self._log(f"neighbours {network.peers} {network.problem} {sorted(self.ranks.broken)}")
