"""The folder: one process at a time, bounded, a part for each namespace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbm.core.errors import Broken, Busy, ConfigError, Newer
from kvbm.stores.disk import files, meta
from kvbm.stores.disk.files import allocated
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.stores.disk.lock import holder_of
from kvbm.stores.disk.meta import listed, read_meta
from kvbm.stores.disk.shard import Shard
from kvbm.testing.store import key_of, labels

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
BLOCK = 4096
BOUND = 4 << 20


class Now:
    """A clock that goes on by a day with every look."""

    def __init__(self) -> None:
        self.time = 1e9

    def __call__(self) -> float:
        self.time += 86400
        return self.time


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder.claim(tmp_path / "deep" / "disk", "engine-1", clock=Now())
    yield folder
    folder.close()


def use(folder: Folder, fingerprint: str, *, ranks: int = 1, bound: int = BOUND, block: int = BLOCK) -> NamespaceFolder:
    return folder.namespace(fingerprint, {"model": "m"}, ranks=ranks, block_bytes=block, bound_bytes=bound)


def fill(namespace: NamespaceFolder) -> None:
    """A block in every slot, on every rank."""
    numbers = np.arange(namespace.num_slots)
    for rank in range(namespace.place.ranks):
        shard = Shard(namespace.place, rank, sync="never")
        text = labels([key_of(i) for i in range(len(numbers))], 1, namespace.generation)
        shard.commit(shard.records(numbers, text, np.zeros(len(numbers), dtype=np.uint64)), shard.region)
        shard.close()


# -- who may use it --

HOLD = """
import os, sys, time
from pathlib import Path
from kvbm.stores.disk.folder import Folder
folder = Folder.claim(Path(sys.argv[1]), "engine-2")
child = os.fork() if sys.argv[2] == "fork" else 0
if sys.argv[2] == "fork" and not child:
    time.sleep(60)
print(child, flush=True)
input()
"""


def holder(path: Path, how: str = "hold") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def child_of(process: subprocess.Popen[str]) -> int:
    """Wait until it has the lock."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        child_of(other)
        with pytest.raises(Busy, match=rf"engine engine-2, process {other.pid} on .* since "):
            Folder.claim(tmp_path, "engine-1")
        found = holder_of(tmp_path)
        assert found is not None
        assert found.engine == "engine-2"
        assert f"engine engine-2, process {other.pid} on" in str(found)
        other.kill()
    assert holder_of(tmp_path) is None
    Folder.claim(tmp_path, "engine-1").close()


def test_the_same_process_may_not_have_it_twice(folder: Folder) -> None:
    with pytest.raises(Busy, match="engine engine-1"):
        Folder.claim(folder.path, "engine-3")


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as parent:
        child = child_of(parent)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 30
        while holder_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)  # the child may not have run at all yet
        assert holder_of(tmp_path) is None
        Folder.claim(tmp_path, "engine-1").close()
        os.kill(child, 0)  # it is still there
        os.kill(child, signal.SIGKILL)


def test_a_deleted_lock_is_noticed_and_made_again(folder: Folder) -> None:
    namespace = use(folder, A)
    shutil.rmtree(folder.path)
    namespace.restore()
    with pytest.raises(Busy):
        Folder.claim(folder.path, "engine-2")
    assert read_meta(namespace.path) is not None


def test_a_lock_that_somebody_else_made_is_theirs(folder: Folder) -> None:
    namespace = use(folder, A)
    shutil.rmtree(folder.path)
    other = Folder.claim(folder.path, "engine-2")
    with pytest.raises(Busy, match="engine-2"):
        namespace.restore()
    other.close()
    namespace.restore()


def test_nobody_else_may_read(folder: Folder) -> None:
    namespace = use(folder, A, ranks=2)
    for path in (folder.path, *folder.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {path.name for path in namespace.path.iterdir()} == {
        "meta.json", "rank0.data", "rank0.index", "rank1.data", "rank1.index",
    }  # fmt: skip


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        Folder.claim(tmp_path / "file", "engine-1")


# -- the bound --


@pytest.mark.parametrize("ranks", [1, 3])
def test_everything_stays_within_the_bound_and_nearly_fills_it(folder: Folder, ranks: int) -> None:
    namespace = use(folder, A, ranks=ranks)
    fill(namespace)
    assert BOUND * 0.93 < allocated(folder.path) <= BOUND


def test_space_is_taken_at_once(folder: Folder) -> None:
    use(folder, A)
    assert allocated(folder.path) > BOUND * 0.93


def test_two_models_share_the_bound(folder: Folder) -> None:
    first = use(folder, A)
    fill(first)
    fill(second := use(folder, B))
    assert allocated(folder.path) <= BOUND
    again = use(folder, A)
    assert first.num_slots > second.num_slots > 0.9 * BOUND / 2 // (BLOCK + 128)
    assert again.num_slots == pytest.approx(second.num_slots, rel=0.05)
    assert len(again.recover().slots) > 0.9 * again.num_slots
    assert len(use(folder, B).recover().slots) > 0.9 * second.num_slots
    assert allocated(folder.path) <= BOUND


def test_the_model_that_was_not_used_for_longest_goes(folder: Folder) -> None:
    for model in (A, B, A, C):
        fill(use(folder, model))
        assert allocated(folder.path) <= BOUND
    assert [one.meta.fingerprint[0] for one in listed(folder.path) if one.meta] == ["c", "a"]


def test_other_folders_are_left_alone(folder: Folder) -> None:
    for name in ("mine", "0123", "lost+found"):
        (folder.path / name).mkdir()
        (folder.path / name / "file").write_bytes(bytes(BOUND))
    use(folder, A)
    use(folder, B)
    assert (folder.path / "mine" / "file").exists()
    assert len(listed(folder.path)) == 2


def test_a_larger_bound_keeps_everything(folder: Folder) -> None:
    fill(small := use(folder, A))
    large = use(folder, A, bound=2 * BOUND)
    assert large.num_slots > 1.9 * small.num_slots
    assert len(large.recover().slots) == small.num_slots
    assert BOUND < allocated(folder.path) <= 2 * BOUND


def test_a_smaller_bound_keeps_what_fits(folder: Folder) -> None:
    fill(use(folder, A, ranks=2))
    small = use(folder, A, ranks=2, bound=BOUND // 2)
    assert len(small.recover().slots) == small.num_slots > 0
    assert allocated(folder.path) <= BOUND // 2
    # What was cut off does not come back.
    assert len(use(folder, A, ranks=2).recover().slots) == small.num_slots


def test_a_bound_that_is_too_small_ends_the_start(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"g3_gb.*too few for one block"):
        use(folder, A, bound=100_000, block=1 << 20)


def test_a_full_disk_says_so_and_leaves_nothing_behind(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, mode: int, offset: int, size: int) -> int:
        if size < BOUND // 2:
            return 0
        files.ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(files._libc, "fallocate", full)
    with pytest.raises(Broken, match=r"No space left on device\. Free some space"):
        use(folder, A)
    assert allocated(folder.path) < 20_000


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_that_cannot_grow_keeps_its_size_and_its_blocks(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ranks: int
) -> None:
    """Whichever rank's file finds no room."""
    fill(small := use(folder, A, ranks=ranks))
    before, grown = allocated(folder.path), []

    def full(fd: int, mode: int, offset: int, size: int) -> int:
        if size > BOUND // ranks:
            grown.append(size)
            if len(grown) == ranks:
                files.ctypes.set_errno(errno.ENOSPC)
                return -1
        os.posix_fallocate(fd, offset, size)
        return 0

    monkeypatch.setattr(files._libc, "fallocate", full)
    same = use(folder, A, ranks=ranks, bound=2 * BOUND)
    assert f"cannot grow from {small.num_slots} to" in caplog.text
    assert same.num_slots == small.num_slots
    assert len(same.recover().slots) == small.num_slots
    assert allocated(folder.path) == before
    monkeypatch.undo()
    assert use(folder, A, ranks=ranks, bound=2 * BOUND).num_slots > 1.9 * small.num_slots


def test_a_full_disk_does_not_close_what_is_there(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be noted any more, and nothing need be."""
    fill(first := use(folder, A))

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(meta, "replace", full)
    assert len(use(folder, A).recover().slots) == first.num_slots
    assert "cannot note when it was used" in caplog.text
    with pytest.raises(Broken, match="No space left on device"):
        use(folder, A, bound=BOUND // 2)  # a smaller size that is not noted would be believed to be the larger
    assert len(use(folder, A).recover().slots) == first.num_slots


def test_others_lose_nothing_for_what_the_disk_cannot_hold(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(first := use(folder, A))
    real = os.statvfs(folder.path)
    none = os.statvfs_result((*real[:3], 0, 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: none)
    with pytest.raises(Broken, match="leaves no room"):
        use(folder, B, bound=3 * BOUND // 2, block=BOUND // 2)
    assert "the disk itself has too little room" in caplog.text
    assert len(use(folder, A).recover().slots) == first.num_slots


@pytest.mark.parametrize("zerofill", [True, False])
def test_a_file_system_that_cannot_reserve(
    folder: Folder, zerofill: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: int) -> int:
        files.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(files._libc, "fallocate", refuse)
    namespace = folder.namespace(A, {}, ranks=1, block_bytes=BLOCK, bound_bytes=BOUND, zerofill=zerofill)
    assert namespace.place.data(0).stat().st_size == namespace.place.data_bytes
    assert (allocated(folder.path) > 0.9 * BOUND) == zerofill
    assert ("cannot reserve space" in caplog.text) != zerofill


# -- namespaces --


def test_it_says_what_it_is(folder: Folder) -> None:
    namespace = use(folder, A)
    assert namespace.path.name == "a" * 16
    text = json.loads((namespace.path / "meta.json").read_text())
    assert (text["fingerprint"], text["facts"], text["format"]) == (A, {"model": "m"}, 1)
    namespace.close()
    assert json.loads((namespace.path / "meta.json").read_text())["last_used"] > text["last_used"]


def test_other_weights_find_nothing(folder: Folder) -> None:
    fill(use(folder, A))
    assert len(use(folder, B).recover().slots) == 0


def test_a_fingerprint_that_only_begins_alike_is_another(folder: Folder) -> None:
    fill(use(folder, A))
    assert len(use(folder, "a" * 63 + "b").recover().slots) == 0
    assert len(listed(folder.path)) == 1


def test_an_encryption_key_has_a_folder_of_its_own(folder: Folder) -> None:
    fill(use(folder, A))
    for key in ("1" * 16, "2" * 16):
        other = folder.namespace(A, {}, ranks=1, block_bytes=BLOCK, bound_bytes=BOUND, encryption=key)
        assert other.path.name == "a" * 16 + "-" + key[:8]
        assert len(other.recover().slots) == 0
    same = folder.namespace(A, {}, ranks=1, block_bytes=BLOCK, bound_bytes=BOUND, encryption="1" * 8 + "3" * 8)
    assert len(same.recover().slots) == 0


def test_cleared_is_cleared_for_good(folder: Folder) -> None:
    fill(namespace := use(folder, A))
    assert namespace.clear() == 1
    assert len(namespace.recover().slots) == 0
    again = use(folder, A)
    assert again.generation == 1
    assert len(again.recover().slots) == 0


def test_a_generation_that_does_not_last_is_found_by_its_process_only(folder: Folder) -> None:
    namespace = use(folder, A)
    first = namespace.clear(lasting=False)
    fill(namespace)
    assert len(namespace.recover().slots) == namespace.num_slots
    assert namespace.clear(lasting=False) == first + 1
    fill(namespace)
    again = use(folder, A)
    assert again.generation == 3
    assert len(again.recover().slots) == 0
    fill(again)
    assert len(use(folder, A).recover().slots) == again.num_slots


@pytest.mark.parametrize(("ranks", "block"), [(2, BLOCK), (1, 2 * BLOCK)])
def test_other_ranks_or_sizes_begin_anew(folder: Folder, ranks: int, block: int) -> None:
    fill(use(folder, A))
    namespace = use(folder, A, ranks=ranks, block=block)
    assert len(namespace.recover().slots) == 0
    fill(namespace)
    assert len(namespace.recover().slots) == namespace.num_slots


def newer(namespace: NamespaceFolder) -> bytes:
    text = json.loads((namespace.path / "meta.json").read_text())
    (namespace.path / "meta.json").write_text(json.dumps({"format": 2, "what": text["facts"]}))
    return (namespace.path / "meta.json").read_bytes()


def test_a_newer_format_is_left_alone(folder: Folder) -> None:
    text = newer(use(folder, A))
    with pytest.raises(Newer, match="format 2"):
        use(folder, A)
    with pytest.raises(Broken, match="leaves no room for a block of this one"):
        use(folder, B)  # it takes all the space, and is not ours to delete
    assert (folder.path / ("a" * 16) / "meta.json").read_bytes() == text


def test_an_older_or_damaged_one_is_made_anew(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    fill(namespace := use(folder, A))
    text = (namespace.path / "meta.json").read_bytes()
    for damaged in (text.replace(b'"format":1', b'"format":0'), text[:-9], b"", text.replace(b'"m"', b'"n"')):
        (namespace.path / "meta.json").write_bytes(damaged)
        again = use(folder, A)
        assert len(again.recover().slots) == 0
    assert caplog.text.count("it begins anew") == 4


def test_a_kill_while_it_is_made_leaves_nothing_that_counts(folder: Folder) -> None:
    namespace = use(folder, A)
    (namespace.path / "meta.json").unlink()
    fill(use(folder, B, bound=BOUND))
    assert allocated(folder.path) <= BOUND
    assert len(use(folder, A).recover().slots) == 0


def test_permission_lost_is_the_environments_fault(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **more: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    namespace = use(folder, A)
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(Broken, match=r"Permission denied\. This user may not"):
        namespace.clear()
    assert namespace.generation == 0
    with pytest.raises(Broken):
        namespace.recover()
    with pytest.raises(Broken):
        use(folder, B)
