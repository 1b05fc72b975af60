"""Engines that share storage and nothing else: leader and ranks as they are built, and every byte is looked at."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Buffer

from kvbm.stores.objects.collector import delete_runs, purge
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import parse
from kvbm.tiers.objects.tier import SharedStorage
from tests.build.whole import Engine
from tests.leader.roles import keys_of

TOKENS, RUN = 128, 4
NUMBERS = itertools.count()


class Sharing(Engine):
    """An engine with nothing but host memory of its own, and a shared folder."""

    def __init__(self, path: Path, shared: str, **settings: Any) -> None:
        own = path / f"e{next(NUMBERS)}"
        own.mkdir()
        given: dict[str, Any] = {
            "g3_blocks": None, "g2_blocks": 48, "g4_url": shared, "g4_feed_s": 0.1, "g4_deadline_s": 2.0,
            "g4_warm": 0.0, "tokens": TOKENS, "strict": False,
        }  # fmt: skip
        super().__init__(own, engine=own.name, **(given | settings))

    @property
    def g4(self) -> SharedStorage:
        assert self.leader.core.lower.stack is not None
        tier = self.leader.core.lower.stack.tiers["g4"]
        assert isinstance(tier, SharedStorage)
        return tier

    def works(self) -> Sharing:
        self.until(lambda: self.g4.problem is None)
        return self

    def stored(self) -> None:
        """All that is to be written is."""
        self.until(lambda: self.g4.uploads.idle)

    def knows(self, keys: Sequence[bytes], blocks: int) -> None:
        """So many of these are known to be in the storage."""
        self.g4.asked(keys)
        self.until(lambda: int(self.g4.covers(keys).sum()) == blocks)


@pytest.fixture
def shared(tmp_path: Path) -> str:
    return f"file://{tmp_path}/shared"


@pytest.fixture
def engine(tmp_path: Path, shared: str) -> Iterator[Callable[..., Sharing]]:
    engines: list[Sharing] = []

    def make(**settings: Any) -> Sharing:
        engines.append(Sharing(tmp_path, settings.pop("shared", shared), **settings))
        return engines[-1]

    yield make
    for each in engines:
        each.close()


def objects(tmp_path: Path) -> list[Path]:
    """Files of runs."""
    root = tmp_path / "shared"
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path for path in files if (ours := parse(path.relative_to(root).as_posix())) and ours.kind == "run")


KINDS: dict[str, dict[str, Any]] = {
    "one rank": {}, "two ranks": {"ranks": 2}, "two ranks, one of which stores": {"ranks": 2, "replicated": True},
    "sealed": {"ranks": 2, "secret": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_engine_computes_another_loads(kind: str, engine: Callable[..., Sharing], tmp_path: Path) -> None:
    settings = {"g4_deadline_s": 10.0} | KINDS[kind]  # one of them loads a library for the first time
    if settings.pop("secret", False):
        (tmp_path / "secret").write_text("sixteen bytes or more of it")
        (tmp_path / "secret").chmod(0o600)
        settings["g4_secret_file"] = str(tmp_path / "secret")
    one, keys = engine(**settings).works(), keys_of("prompt", 14)
    assert one.serve(keys) == 0
    one.stored()
    assert len(objects(tmp_path)) == 3
    other = engine(**settings).works()
    other.knows(keys, 12)
    assert other.serve(keys) == 12
    assert other.serve(keys_of("another", 14)) == 0, "the control"
    other.stored()
    status = other.side.control.status()
    assert status["tokens"]["g4"] == 12 * TOKENS
    assert status["g4"]["in_flight"] == {"put": 0, "get": 0}
    assert status["g4"]["run_blocks"] == RUN
    (g4,) = (each for each in status["tiers"] if each["name"] == "g4")
    assert (g4["problem"], g4["corrupt"], g4["runs"]) == (None, 0, 6)
    third = engine(**settings, model="another model").works()
    third.g4.asked(keys)
    assert third.serve(keys) == 0, "another namespace finds nothing"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("warm", [0.0, 0.5])
def test_priorities_come_back(ranks: int, warm: float, engine: Callable[..., Sharing]) -> None:
    one, first, rest = engine(ranks=ranks).works(), keys_of("prompt", 8), keys_of("another", 8)
    one.serve(first, priority=70)
    one.serve(rest)
    one.stored()
    other = engine(ranks=ranks, g4_warm=warm).works()
    if warm:
        other.until(lambda: other.g4.warmth.warmed == 16)
    for keys, priority in (first, 70), (rest, 0):
        other.knows(keys, 8)
        assert other.serve(keys) == 8
        with other.leader.core.pool.match(keys) as held:
            assert held.terms[0].tolist() == [priority] * 8


def test_what_is_written_while_others_run_is_found(engine: Callable[..., Sharing]) -> None:
    """They hear of it."""
    one, other = engine().works(), engine().works()
    for number in range(3):
        keys = keys_of(f"prompt {number}", 8)
        writer, reader = (one, other) if number % 2 else (other, one)
        assert writer.serve(keys) == 0
        writer.stored()
        reader.knows(keys, 8)
        assert reader.serve(keys) == 8


def test_a_conversation_goes_on_elsewhere(engine: Callable[..., Sharing]) -> None:
    """Turn by turn, each engine in turn: all full runs of what was said before are there."""
    engines, keys = [engine().works(), engine().works()], keys_of("talk", 22)
    for turn, blocks in enumerate((5, 9, 14, 18, 22)):
        before = (5, 9, 14, 18, 22)[turn - 1] // RUN * RUN if turn else 0
        me = engines[turn % 2]
        me.knows(keys[:blocks], before)
        assert me.serve(keys[:blocks]) >= before
        me.stored()


def test_what_an_operator_deletes_is_a_miss(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    one, other, keys = engine().works(), engine().works(), keys_of("prompt", 8)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    for path in objects(tmp_path):
        path.unlink()
    assert other.serve(keys) == 0
    assert other.g4.problem is None, "nothing is wrong with the storage"
    for _ in range(2):  # behind a run that is missing nothing may have been read
        other.stored()
        other.leader.core.pool.discard(keys)
        other.serve(keys)
    other.stored()
    assert len(objects(tmp_path)) == 2


@pytest.mark.parametrize("how", ["everything", "the namespace", "one run, as damaged"])
def test_what_an_operator_purges_is_written_again(how: str, engine: Callable[..., Sharing], tmp_path: Path) -> None:
    """By engines that run and have the blocks in host memory, without having looked for them there."""
    one, other, keys = engine().works(), engine().works(), keys_of("prompt", 8)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    assert other.serve(keys) == 8
    one.until(lambda: any((tmp_path / "shared/kv1/feed").rglob("*.*.*")))
    store, (first, _) = FolderStore(tmp_path / "shared"), objects(tmp_path)
    time.sleep(1.0)  # both have seen the notes
    if how == "one run, as damaged":
        delete_runs(store, [first.relative_to(tmp_path / "shared").as_posix()])
        assert len(objects(tmp_path)) == 1
    else:
        purge(store, first.parts[-3] if how == "the namespace" else None)
        assert objects(tmp_path) == []
    for each in one, other:
        each.until(lambda each=each: not each.g4.known([keys[RUN - 1], keys[2 * RUN - 1]]).all())  # type: ignore[misc]
    assert other.serve(keys) == 8, "from host memory"
    other.until(lambda: len(objects(tmp_path)) == 2)
    third = engine().works()
    third.knows(keys, 8)
    assert third.serve(keys) == 8


def test_after_a_reset_nothing_goes_there_or_comes(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    one, other, keys = engine().works(), engine().works(), keys_of("before", 8)
    one.serve(keys)
    one.stored()
    one.leader.reset()
    assert one.g4.problem == "a reset began a new generation"
    later = keys_of("after", 8)
    one.serve(later)
    assert one.serve(keys) == 0
    assert len(objects(tmp_path)) == 2, "nothing of what it computed later"
    other.knows(keys, 8)
    assert other.serve(keys) == 8, "nothing was deleted"
    other.g4.asked(later)
    assert other.serve(later) == 0


def test_a_reset_in_the_middle_of_an_upload(
    engine: Callable[..., Sharing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun may be there, and is what it was; nothing that waited or came later is. Others go on."""
    goes, put = threading.Event(), FolderStore.put

    def slow(store: FolderStore, name: str, data: Buffer) -> bool:
        ours = parse(name)
        if ours is not None and ours.kind == "run":
            goes.wait(20)
        return put(store, name, data)

    one, other, keys, later = engine(g4_deadline_s=20.0).works(), engine().works(), keys_of("a", 22), keys_of("b", 22)
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "put", slow)
        one.serve(keys)
        one.until(lambda: one.g4.uploads.in_flight and one.g4.uploads.waiting)
        begun = one.g4.uploads.in_flight
        one.leader.reset()
        one.serve(later)
        goes.set()
        one.until(lambda: one.g4.uploads.idle)
    assert len(objects(tmp_path)) <= begun < 5, "what waited was dropped"
    assert one.serve(keys) == 0
    other.g4.asked(later)
    assert other.serve(later) == 0, "nothing that came later is there"
    other.serve(keys)  # looks at every byte
    other.stored()
    third = engine().works()
    third.knows(keys, 20)
    assert third.serve(keys) == 20


def test_a_storage_that_cannot_be_used_is_said_and_the_engine_goes_on(
    engine: Callable[..., Sharing], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    one, keys = engine(shared=f"file://{tmp_path}/file"), keys_of("prompt", 8)
    assert one.serve(keys) == 0
    assert one.serve(keys) == 8, "host memory goes on"
    one.until(lambda: "Not a directory" in (one.g4.problem or ""))
    health = one.side.control.health()
    assert health["problems"] == []
    assert "Not a directory" in health["degraded"]["g4"]


def test_a_folder_whose_parent_is_missing_is_not_made(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    """What is to be mounted may be mounted later."""
    one, keys = engine(shared=f"file://{tmp_path}/mnt/kv"), keys_of("prompt", 8)
    one.until(lambda: "there is no folder" in (one.g4.problem or ""))
    one.serve(keys)
    assert not (tmp_path / "mnt").exists()
    (tmp_path / "mnt").mkdir()
    one.works().serve(keys)
    one.stored()
    assert len([*(tmp_path / "mnt/kv/kv1").glob("*/??/*")]) == 2


def test_strict_ends_the_start(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Exception, match=r"probe|Not a directory"):
        engine(shared=f"file://{tmp_path}/file", strict=True)
