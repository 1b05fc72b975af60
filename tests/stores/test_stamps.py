"""What was the same before and after was the same in between, and what was not is noticed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbm.stores import stamps
from kvbm.stores.stamps import Changed, Start, lasting, local, now, process_start, record, recorded, survey

Change = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`current` leads over a link to a folder with one file, which is a link, too."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(b"weights")
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "one" / "model").symlink_to("../../blobs/a")
    (tmp_path / "current").symlink_to("models/one")
    return tmp_path


def later() -> None:
    """Until the clock that stamps files is past all that was stamped: a file that somebody has just looked at gets the
    exact time of its next change, which that clock may be behind."""
    then = now()
    while now() <= then + 2 * stamps._TICK_NS:
        time.sleep(0.001)


def rename_in(root: Path) -> None:
    """Another folder with old files takes the place of the old one."""
    other = root / "models" / "other"
    other.mkdir()
    (other / "model").symlink_to("../../blobs/a")
    later()


def swap_folder(root: Path) -> None:
    (root / "models" / "one").rename(root / "models" / "old")
    (root / "models" / "other").rename(root / "models" / "one")


def swap_link(root: Path) -> None:
    (root / "new").symlink_to("models/other")
    (root / "new").rename(root / "current")


def swap_parent(root: Path) -> None:
    """A folder far above: nothing of what is in it has a new time."""
    (root / "models").rename(root / "away")
    (root / "elsewhere").rename(root / "models")


def rewrite(root: Path) -> None:
    (root / "blobs" / "a").write_bytes(b"WEIGHTS")
    os.utime(root / "blobs" / "a", ns=(1, 1))


def replace_file(root: Path) -> None:
    (root / "blobs" / "b").write_bytes(b"weights")
    (root / "blobs" / "b").rename(root / "blobs" / "a")


@pytest.mark.parametrize("seen", [False, True], ids=["by time", "by what was seen"])
@pytest.mark.parametrize(
    "change",
    [
        swap_folder, swap_link, swap_parent, rewrite, replace_file,
        lambda root: (root / "models" / "one" / "index").touch(),
        lambda root: os.utime(root / "blobs" / "a"),
    ],
    ids=["folder", "link", "parent", "content", "file", "entry", "time"],
)  # fmt: skip
def test_a_change_is_noticed(root: Path, change: Change, seen: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    rename_in(root)
    elsewhere = root / "elsewhere" / "one"
    elsewhere.mkdir(parents=True)
    (elsewhere / "model").symlink_to("../../blobs/a")
    path, folder = str(root / "current" / "model"), str(root / "models" / "one")
    later()
    start = Start(now())
    if seen:
        file = tmp_path_factory.mktemp("run") / "seen"
        record([str(root / "current")], file)
        start = recorded(file, 0)
    start.check(survey([path]), [folder])
    change(root)
    with pytest.raises(Changed):
        start.check(survey([path]), [folder])


@pytest.mark.parametrize("seen", [False, True], ids=["by time", "by what was seen"])
def test_what_happens_beside_it_does_not_matter(
    root: Path, seen: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = str(root / "current" / "model")
    later()
    start = Start(now())
    if seen:
        file = tmp_path_factory.mktemp("run") / "seen"
        record([str(root / "current")], file)
        start = recorded(file, 0)
    later()
    (root / "notes").write_text("other things")
    (root / "models" / "two").mkdir()
    (root / "blobs" / "b").touch()
    start.check(survey([path]), [str(root / "models" / "one")])


def test_without_a_time_nothing_is_known(root: Path) -> None:
    with pytest.raises(Changed, match="nobody knows"):
        Start(0).check(survey([str(root / "current" / "model")]), [])


def test_other_machines_clocks_may_be_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = survey([str(root / "current" / "model")])
    later()
    Start(now()).check(there, [])
    monkeypatch.setattr(stamps, "local", lambda _: False)
    with pytest.raises(Changed, match="network file system"):
        Start(now()).check(there, [])
    Start(now() + 301 * 10**9).check(there, [])


def test_a_file_that_came_after_it_was_written_down(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("run") / "seen"
    record([str(root / "models" / "one")], file)
    (root / "models" / "one" / "more").touch()
    with pytest.raises(Changed, match="was not there"):
        recorded(file, now() + 10**12).check(survey([str(root / "models" / "one" / "more")]), [])


def test_what_is_written_down_is_private_and_believed_only_if_it_is(root: Path) -> None:
    file = root / "seen"
    record([str(root / "current"), str(root / "blobs" / "a")], file)
    assert file.stat().st_mode & 0o777 == 0o600
    good = recorded(file, 7)
    assert good.folders == (str(root / "models" / "one"),)
    assert good.seen[str(root / "blobs" / "a")] == survey([str(root / "blobs" / "a")])[str(root / "blobs" / "a")]
    file.chmod(0o620)
    assert recorded(file, 7) == Start(7)
    for text in ("", "[]", "{}", json.dumps({"folders": [], "seen": {"/a": ["f", 1]}}), '{"folders":1,"seen":{}}'):
        file.chmod(0o600)
        file.write_text(text)
        assert recorded(file, 7) == Start(7)
    assert recorded(root / "absent", 7) == recorded(None, 7) == Start(7)


def test_a_folder_above_is_that_above_where_a_link_leads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "current2").symlink_to("models/one")
    (root / "two").write_bytes(b"not it")
    (root / "models" / "two").write_bytes(b"weights")
    path = str(root / "current2" / ".." / "two")
    assert Path(path).read_bytes() == b"weights"
    assert stamps.ends(path, survey([path])) == str(root / "models" / "two")
    monkeypatch.chdir(root)
    assert stamps.ends("current2/../two", survey(["current2/../two"])) == str(root / "models" / "two")


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="too many links"):
        survey([str(tmp_path / "a")])


def test_which_file_systems_are_local(tmp_path: Path) -> None:
    assert local(str(tmp_path))
    assert not local("/proc")
    assert not local(str(tmp_path / "absent"))


def test_where_the_same_stamp_is_the_same_content() -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is no tmpfs here")
    assert local("/dev/shm")
    assert not lasting("/dev/shm"), "what is written through a mapping has no new ctime there"
    assert not lasting("/proc")


def test_a_process_knows_when_it_began() -> None:
    began = process_start()
    assert 0 < began < now()
    assert abs(began - process_start()) < 10_000_000
