"""Digests of files: what counts, what is remembered, and what is never believed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from kvbm.stores import content, digest
from kvbm.stores.content import Chosen, Contents, folder_digest
from kvbm.stores.stamps import Changed, Stamp, Start, now, survey

FUTURE = Start(now() + 10**15)


def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is digested has not changed for long."""
    monkeypatch.setattr(content, "_YOUNG_NS", -(10**15))
    monkeypatch.setattr(content, "lasting", lambda _: True)  # /tmp may be an overlay


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, size in (("a", 100), ("b", 3000), ("c", 0)):
        (folder / name).write_bytes(name.encode() * size)
    return [str(folder / name) for name in "abc"]


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "cache", threads=2)


def made(contents: Contents, paths: list[str]) -> dict[str, str]:
    return contents.digests(paths, survey(paths))


def identity(contents: Contents, chosen: Chosen, start: Start = FUTURE) -> str:
    return contents.identify(lambda: [chosen], start)


def test_a_digest_is_that_of_its_segments(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "SEGMENT", 1000)
    data = Path(files[1]).read_bytes()
    parts = b"".join(blake3(data[at : at + 1000]).digest() for at in range(0, 3000, 1000))
    assert made(contents, files)[files[1]] == blake3((3000).to_bytes(8, "little") + parts).hexdigest()


def test_every_byte_counts(files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SEGMENT", 1000)
    seen = {made(contents, files)[files[1]]}
    for at in (0, 999, 1000, 2999):
        data = bytearray(b"b" * 3000)
        data[at] = 0
        Path(files[1]).write_bytes(data)
        os.utime(files[1], ns=(1, 1))
        seen.add(made(contents, files)[files[1]])
    assert len(seen) == 5


def test_what_is_remembered_is_not_read_again(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(monkeypatch)
    before = made(contents, files)
    monkeypatch.setattr(Contents, "_here", lambda *_: pytest.fail("it was read again"))
    assert made(contents, files) == before
    assert (contents._path.stat().st_mode & 0o777, contents._lock.stat().st_mode & 0o777) == (0o600, 0o600)


def _in_place(path: str) -> None:
    status = os.stat(path)
    Path(path).write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _instead(path: str) -> None:
    status = os.stat(path)
    Path(f"{path}.new").write_bytes(b"x" * status.st_size)
    os.utime(f"{path}.new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(f"{path}.new", path)


@pytest.mark.parametrize("change", [_in_place, _instead])
def test_a_file_with_its_old_size_and_time_is_another(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], None]
) -> None:
    old(monkeypatch)
    before = made(contents, files)
    change(files[0])
    after = made(contents, files)
    assert after[files[0]] != before[files[0]]
    assert after[files[1]] == before[files[1]]


def test_young_files_and_network_file_systems_are_not_remembered(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(contents, files)
    assert contents._load() == {}, "they were written just now"
    old(monkeypatch)
    monkeypatch.setattr(content, "lasting", lambda _: False)
    made(contents, files)
    assert contents._load() == {}
    monkeypatch.setattr(content, "lasting", lambda _: True)
    made(contents, files)
    assert set(contents._load()) == set(files)
    monkeypatch.setattr(content, "lasting", lambda _: False)
    monkeypatch.setattr(Contents, "_here", lambda *_: "again")
    assert set(made(contents, files).values()) == {"again"}, "what was remembered counts on local file systems only"


def test_times_that_no_kernel_wrote_are_not_remembered(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of a file system, made at one time: their files have the same inodes, sizes and times."""
    old(monkeypatch)
    of = Stamp.of

    def whole(status: os.stat_result) -> Stamp:
        return of(status)._replace(inode=7, ctime=5 * 10**9, mtime=5 * 10**9)

    monkeypatch.setattr(Stamp, "of", staticmethod(whole))
    before = made(contents, files[:1])
    Path(files[0]).write_bytes(b"x" * 100)
    assert made(contents, files[:1]) != before
    assert contents._load() == {}


def test_a_memory_that_is_damaged_or_not_ours(
    files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(monkeypatch)
    before = made(contents, files)
    good = contents._path.read_bytes()
    for bad in (b"", b"\0" * 100, good[:-10], good.replace(b'"c', b'"d', 1), b"[" * 100_000, b'{"version":1}'):
        contents._path.write_bytes(bad)
        assert contents._load() == {}
        assert made(contents, files) == before
    contents._path.write_bytes(good)
    assert contents._load()
    contents._path.chmod(0o622)
    assert contents._load() == {}, "others may have written it"


def test_the_memory_is_bounded(files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    old(monkeypatch)
    monkeypatch.setattr(content, "_KEPT", 2)
    made(contents, files)
    assert set(contents._load()) == set(files[1:])


def test_a_folder_without_locks(files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    expected = made(contents, files)
    (contents._path).unlink()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert made(contents, files) == expected


def test_without_a_place_to_remember(files: list[str], tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "file").touch()
    assert made(Contents(tmp_path / "file" / "cache"), files) == made(contents, files)


def test_one_digests_and_the_others_wait(
    files: list[str],
    contents: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old(monkeypatch)
    caplog.set_level(logging.INFO)
    contents._lock.parent.mkdir()
    said: list[dict[str, str]] = []
    with open(contents._lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: said.append(made(contents, files)))
        waiting.start()
        time.sleep(0.3)
        assert not said
        assert "waits for its result" in caplog.text
        first = Contents(tmp_path / "cache")
        paths = {path: (path, survey([path])[path]) for path in files}
        result = first._make(paths)
        monkeypatch.setattr(Contents, "_here", lambda *_: pytest.fail("it was digested twice"))
    waiting.join(10)
    assert said == [result]


def test_who_waits_can_be_stopped(files: list[str], tmp_path: Path) -> None:
    stop = threading.Event()
    contents = Contents(tmp_path / "cache", stop=stop)
    contents._lock.parent.mkdir()
    with open(contents._lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.2, stop.set).start()
        with pytest.raises(Changed, match="the engine ended"):
            made(contents, files)


def test_a_change_while_it_is_digested(files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Contents._here

    def changing(self: Contents, path: str, mark: Stamp) -> str:
        done = here(self, path, mark)
        with open(path, "ab") as changed:
            changed.write(b"x")
        return done

    monkeypatch.setattr(Contents, "_here", changing)
    with pytest.raises(Changed, match="while it was digested"):
        made(contents, files)
    assert contents._load() == {}


def test_a_file_that_is_cut(files: list[str], contents: Contents) -> None:
    found = survey(files)
    os.truncate(files[1], 10)
    with pytest.raises(Changed, match="was changed"):
        contents.digests(files, found)


# ---------------------------------------------------------------------- by a process of its own


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_APART", 0)


@pytest.mark.usefixtures("apart")
def test_large_files_have_the_same_digests(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    large = tmp_path / os.fsdecode(b"lar\xe8ge\n1")
    large.write_bytes(os.urandom((32 << 20) + 12345))
    files.append(str(large))
    seen = made(contents, files)
    assert contents.digested == large.stat().st_size + 3100
    monkeypatch.setattr(content, "_APART", 1 << 40)
    assert made(contents, files) == seen


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    "program", ["import os; os.kill(os.getpid(), 7)", "print('+1'); print('=')", "print('=7 aa')", "raise OSError"]
)
def test_a_process_that_dies_ends_nothing_else(
    files: list[str], contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(digest, "__file__", str(tmp_path / "program.py"))
    with pytest.raises((Changed, ValueError, IndexError, OSError)):
        made(contents, files)
    assert contents._load() == {}


@pytest.mark.usefixtures("apart")
def test_a_file_that_is_cut_before_it_is_mapped(files: list[str], contents: Contents) -> None:
    found = survey(files)
    os.truncate(files[1], 10)
    with pytest.raises(Changed, match="was changed"):
        contents.digests(files, found)


@pytest.mark.usefixtures("apart")
def test_it_is_stopped(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    (tmp_path / "program.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(digest, "__file__", str(tmp_path / "program.py"))
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Changed, match="the engine ended"):
        made(Contents(tmp_path / "cache", stop=stop), files)
    assert time.monotonic() - begun < 20


def test_it_ends_with_who_wants_it(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 1 << 40)  # takes for ever
    program = [sys.executable, "-P", digest.__file__, ""]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    order = f"{tmp_path}/large\0{1 << 40}\0".encode()
    child.stdin.write(b"1 0 %d\n" % len(order) + order)
    child.stdin.flush()
    time.sleep(0.3)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(20) == 1


def test_only_files_are_read(tmp_path: Path, contents: Contents) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Changed, match="is not a file"):
        identity(contents, Chosen((("", str(tmp_path / "pipe")),)))


# ---------------------------------------------------------------------- a hub's cache

NAME = "0123456789abcdef" * 4


@pytest.fixture
def hub(tmp_path: Path) -> str:
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / NAME).write_bytes(b"weights")
    (root / "snapshots" / "c0ffee").mkdir(parents=True)
    (root / "snapshots" / "c0ffee" / "model").symlink_to(f"../../blobs/{NAME}")
    return str(root / "snapshots" / "c0ffee" / "model")


def test_a_hubs_cache_and_a_copy_of_its_files_are_the_same(hub: str, contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    assert len({identity(contents, Chosen((("", path),))) for path in (hub, str(tmp_path / "model"))}) == 1


@pytest.mark.parametrize("change", [_in_place, _instead])
def test_a_blob_is_what_it_contains_whatever_it_is_called(
    hub: str, contents: Contents, change: Callable[[str], None], tmp_path: Path
) -> None:
    """Also where the link to it was made later, for another revision, or in a copy of the cache."""
    before = identity(contents, Chosen((("", hub),)))
    change(os.path.realpath(hub))
    later = tmp_path / "models--org--name" / "snapshots" / "later"
    later.mkdir()
    (later / "model").symlink_to(f"../../blobs/{NAME}")
    shutil.copytree(tmp_path / "models--org--name", tmp_path / "copy", symlinks=True)
    for path in (hub, str(later / "model"), str(tmp_path / "copy" / "snapshots" / "later" / "model")):
        assert identity(contents, Chosen((("", path),))) != before


def test_names_that_are_not_utf_8(tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le")
    os.mkdir(folder)
    names = [os.fsdecode(name) for name in (b"\xe8.pt", b"\xe9.pt")]
    for name in names:
        Path(folder, name).write_bytes(b"weights")
    one, two = (Chosen(((name, os.path.join(folder, name)),), (folder,)) for name in names)
    monkeypatch.setattr("kvbm.stores.content._YOUNG_NS", -(10**12))
    first = identity(contents, one), identity(contents, two)
    assert first[0] != first[1]
    monkeypatch.setattr(Contents, "_make", lambda _, left: {} if not left else pytest.fail("it is remembered"))
    assert (identity(contents, one), identity(contents, two)) == first


# ---------------------------------------------------------------------- what an engine has loaded


def test_places_and_times_are_not_identity(files: list[str], tmp_path: Path, contents: Contents) -> None:
    def of(paths: list[str]) -> Chosen:
        return Chosen((("", paths[0]), ("config.json", paths[1])), (os.path.dirname(paths[0]),), facts=("auto",))

    copies = [str(tmp_path / "copy" / name) for name in ("x", "y")]
    (tmp_path / "copy").mkdir()
    for path, copy in zip(files, copies, strict=False):
        Path(copy).write_bytes(Path(path).read_bytes())
    before = identity(contents, of(files))
    assert identity(contents, of(copies)) == before
    assert identity(contents, of(copies[::-1])) != before
    assert identity(contents, Chosen(of(files).files)) != before, "how they are loaded counts"


def test_what_changed_since_the_start(files: list[str], contents: Contents) -> None:
    chosen = Chosen((("", files[0]),), (os.path.dirname(files[0]),))
    with pytest.raises(Changed, match="is not older than"):
        identity(contents, chosen, Start(1))


def test_what_changes_until_the_end(files: list[str], contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, digests = Chosen((("", files[0]),), (os.path.dirname(files[0]),)), Contents.digests

    def adding(self: Contents, *args: object) -> object:
        said = digests(self, *args)  # type: ignore[arg-type]
        Path(files[0]).with_name("more").touch()
        return said

    monkeypatch.setattr(Contents, "digests", adding)
    with pytest.raises(Changed, match="was changed while"):
        identity(contents, chosen)
    other = iter([[chosen], []])
    monkeypatch.setattr(Contents, "digests", digests)
    with pytest.raises(Changed, match="other files are there"):
        contents.identify(lambda: next(other), FUTURE)


def test_files_that_cannot_be_read(tmp_path: Path, contents: Contents) -> None:
    with pytest.raises(Changed, match="cannot be read"):
        identity(contents, Chosen((("", str(tmp_path / "absent")),)))


def test_a_folders_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    seen = {folder_digest(tmp_path)}
    (tmp_path / "a").write_bytes(b"2")
    seen.add(folder_digest(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(folder_digest(tmp_path))
    assert len(seen) == 3
