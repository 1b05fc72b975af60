"""The suite of stores over a folder, what only a folder does, and addresses."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.abc.store import Absent, Damaged, Denied, ObjectStore
from kvbm.core.errors import Broken, ConfigError
from kvbm.stores.objects.cloud import Access
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import parse
from kvbm.stores.objects.places import locate, open_store
from kvbm.testing.objects import ObjectStoreSuite

_NOBODY = 65534


class TestFolder(ObjectStoreSuite):
    @pytest.fixture
    def open(self, tmp_path: Path) -> Callable[[], ObjectStore]:
        return lambda: FolderStore(tmp_path / "kv")


# ---------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    (tmp_path / "deep").mkdir()
    return FolderStore(tmp_path / "deep" / "kv")


def test_rights_are_those_of_the_setting(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        FolderStore(tmp_path / "kv", mode=0o664).put("a/b", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kv/a/b").stat().st_mode) == 0o664
    assert stat.S_IMODE((tmp_path / "kv/a").stat().st_mode) == 0o775
    FolderStore(tmp_path / "own").put("a/b", b"x")
    assert stat.S_IMODE((tmp_path / "own/a/b").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "own/a").stat().st_mode) == 0o700


def test_folders_that_are_there_keep_their_mode(tmp_path: Path) -> None:
    """And those below one that passes its group on do so, too."""
    (tmp_path / "kv/kv1").mkdir(parents=True)
    (tmp_path / "kv").chmod(0o2770)
    (tmp_path / "kv/kv1").chmod(0o2775)
    FolderStore(tmp_path / "kv", mode=0o660).put("kv1/a/b/x", b"1")
    modes = [stat.S_IMODE((tmp_path / f"kv/{at}").stat().st_mode) for at in (".", "kv1", "kv1/a", "kv1/a/b")]
    assert modes == [0o2770, 0o2775, 0o2770, 0o2770]


def test_a_folder_that_is_deleted_while_it_is_made_is_made_again(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, left = os.mkdir, [1]

    def mkdir(name: str, *args: int, **more: int) -> None:
        made(name, *args, **more)
        if name == "probe" and left[0]:
            left[0] -= 1
            os.rmdir(name, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert folder.put("kv1/probe/x", b"1")
    left[0] = 100
    folder.delete(["kv1/probe/x"])
    with pytest.raises(Broken, match="again and again"):
        folder.put("kv1/probe/x", b"1")


def test_what_is_no_file_is_absent(folder: FolderStore, tmp_path: Path) -> None:
    """And nobody waits for it, or follows it."""
    folder.put("a/real", b"secret")
    here = tmp_path / "deep/kv/a"
    (tmp_path / "elsewhere").write_bytes(b"of somebody else")
    os.mkfifo(here / "fifo")
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (here / "dangling").symlink_to(tmp_path / "nowhere")
    (here / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(here / "socket"))
        names = ["fifo", "link", "dangling", "folder", "socket"]
        for name in names:
            with pytest.raises(Absent):
                folder.get(f"a/{name}")
            with pytest.raises(Absent):
                folder.stat(f"a/{name}")
            assert not folder.put(f"a/{name}", b"x")
            assert not folder.claim(f"a/{name}", b"x")
        assert [each.name for page in folder.list("") for each in page] == ["a/real"]
        folder.delete([f"a/{name}" for name in names])
        assert sorted(each.name for each in here.iterdir()) == sorted([*names, "real"])
    assert (tmp_path / "elsewhere").read_bytes() == b"of somebody else"


def test_a_folder_that_is_a_link_is_not_listed(folder: FolderStore, tmp_path: Path) -> None:
    folder.put("kv1/x", b"1")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file").write_bytes(b"2")
    (tmp_path / "deep/kv/kv1/way-out").symlink_to(tmp_path / "others")
    assert [each.name for page in folder.list("") for each in page] == ["kv1/x"]


@pytest.mark.parametrize("at", ["kv1", "kv1/space", "kv1/space/ab"])
def test_no_link_leads_to_anything(at: str, folder: FolderStore, tmp_path: Path) -> None:
    """Wherever it is in the name."""
    name, others = "kv1/space/ab/x", FolderStore(tmp_path / "others")
    below = name.removeprefix(f"{at}/")
    others.put(below, b"of somebody else")
    folder.put("a", b"1")
    here = tmp_path / "deep/kv" / at
    here.parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(tmp_path / "others")
    for prefix in ("", "kv1/", "kv1/space/", "kv1/space/ab/"):
        assert "x" not in str([*folder.list(prefix)])
    with pytest.raises(Absent):
        folder.get(name)
    assert not folder.put(f"{name}y", b"1")
    assert not folder.claim(f"{name}y", b"1")
    folder.delete([name])
    assert [each.name for page in others.list("") for each in page] == [below]


def test_a_hostile_length_allocates_nothing(folder: FolderStore, tmp_path: Path) -> None:
    folder.put("a", b"1")
    os.truncate(tmp_path / "deep/kv/a", 1 << 42)
    for most in (10_000,), ():
        with pytest.raises(Damaged):
            folder.get("a", *most)


def test_what_lies_too_deep_is_not_listed(folder: FolderStore, tmp_path: Path) -> None:
    folder.put("kv1/x", b"1")
    here = os.open(tmp_path / "deep/kv/kv1", os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    assert [each.name for page in folder.list("") for each in page] == ["kv1/x"]
    while (tmp_path / "deep/kv/kv1/d").exists():  # deeper than `rmtree` goes
        subprocess.run(["rm", "-rf", tmp_path / "deep/kv/kv1/d"], check=True)


def test_folders_that_are_empty_are_deleted(folder: FolderStore, tmp_path: Path) -> None:
    folder.put("feed/1/a", b"1")
    folder.put("feed/1/b", b"1")
    folder.put("feed/2/a", b"1")
    folder.delete(["feed/1/a", "feed/2/a"])
    assert [each.name for each in (tmp_path / "deep/kv/feed").iterdir()] == ["1"]
    assert folder.put("feed/2/c", b"1")


def test_a_folder_that_hangs_or_is_broken_says_so_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it touches nothing."""

    def broken(*_: object, **__: object) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    for call in ("stat", "open", "lstat", "mkdir"):
        monkeypatch.setattr(os, call, broken)
    store = FolderStore(Path("/mnt/kv"))
    for touch in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: [*store.list("")], store.check):
        with pytest.raises(Broken, match="not connected"):
            touch()
    monkeypatch.undo()


@pytest.fixture
def ordinary() -> Iterator[Path]:
    """A folder below one that may be entered and not read, by somebody who is not root: who that is may do all."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name) / "parent"
        (parent / "kv").mkdir(parents=True)
        Path(name).chmod(0o711)
        parent.chmod(0o311)
        root = os.geteuid() == 0
        try:
            if root:
                os.chown(parent / "kv", _NOBODY, _NOBODY)
                os.seteuid(_NOBODY)
            yield parent / "kv"
        finally:
            if root:
                os.seteuid(0)
            parent.chmod(0o700)


def test_a_file_that_may_not_be_read_is_absent(ordinary: Path) -> None:
    folder = FolderStore(ordinary)
    folder.put("a/x", b"1")
    (ordinary / "a/x").chmod(0)
    with pytest.raises(Absent):
        folder.get("a/x")


def test_a_folder_that_may_not_be_written_is_denied(ordinary: Path) -> None:
    folder = FolderStore(ordinary)
    folder.put("a/x", b"1")
    (ordinary / "a").chmod(0o500)
    with pytest.raises(Denied):
        folder.put("a/y", b"1")


def test_a_parent_that_may_be_entered_alone_is_enough(ordinary: Path) -> None:
    folder = FolderStore(ordinary)
    assert folder.put("a/x", b"1")
    assert bytes(memoryview(folder.get("a/x"))) == b"1"


def test_a_full_disk_leaves_nothing_behind(
    folder: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put("a/x", b"1")

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Broken, match="No space left"):
        folder.put("a/y", b"1")
    monkeypatch.undo()
    assert [each.name for each in (tmp_path / "deep/kv/a").iterdir()] == ["x"]
    assert folder.put("a/y", b"1")


def test_what_a_killed_writer_left_is_ours() -> None:
    assert parse("kv1/0123456789abcdef/01/.part-0123456789abcdef") is not None
    assert parse("kv1/0123456789abcdef/01/.part-0123456789abcde") is None
    assert parse("elsewhere/.part-0123456789abcdef") is None


# ---------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:pass-word@bucket/x", "s3://user:pass-word/x@bucket", "s3://bucket/x?sig=pass-word",
        "file://pass-word@host/x", "file:///", "file://x",
        "file://host/x", "s3://", "s3:///x", "s3://B_ucket!/x", "s3://bucket/../x", "nothing", "ftp://host/x",
        "s3://bucket/a b", "s3://bucket/x#pass-word",
    ],
)  # fmt: skip
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        locate(url)
    assert "pass-word" not in str(error.value)
    assert error.value.setting == "g4_url"


def test_addresses() -> None:
    assert locate("s3://bucket").url == "s3://bucket"
    assert locate("s3://bucket/a//b/").url == "s3://bucket/a/b"
    assert locate("file:///mnt/kv/").path == "/mnt/kv"
    assert locate("file:///mnt/k%20v").path == "/mnt/k v"
    assert isinstance(open_store(locate("file:///mnt/kv"), Access(1.0)), FolderStore)
