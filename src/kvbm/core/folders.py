"""Where KVBM's files lie unless a setting says otherwise."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kvbm.core.errors import ConfigError

NO_HOME = "this user has no home folder (HOME is not set, and the system does not know the user)"


def expanded(path: Path) -> Path:
    """With the home folder for ~, and absolute. Raises ValueError: there is no home folder."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:  # as in containers that are given any user id
        raise ValueError(f"{path} cannot be found, because {NO_HOME}") from None


def check_folder(setting: str, path: Path) -> None:
    """Raises ConfigError where what `setting` names cannot be a folder. Makes nothing."""
    first = next((place for place in (path, *path.parents) if os.path.exists(place)), path)
    if os.path.exists(first) and not os.path.isdir(first):
        raise ConfigError(setting, f"{first} is not a folder", remedy="Name a folder, or one that can be made.")


def default_run_dir(environ: Mapping[str, str]) -> Path:
    """Engines and commands have to find the same folder, whatever TMPDIR each of them has."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "kvbm")
    folder = "/tmp"
    if not os.access(folder, os.W_OK):
        with suppress(FileNotFoundError):  # nothing can be written anywhere: who needs the folder will say so
            folder = tempfile.gettempdir()
    return Path(folder, f"kvbm-{os.getuid()}")


def default_cache_dir() -> Path | None:
    """None where there is no home folder: most engines need none."""
    try:
        return expanded(Path("~/.cache/kvbm"))
    except ValueError:
        return None


def read_small(setting: str, path: Path, most: int) -> tuple[bytes, int]:
    """The first `most` bytes of an ordinary file, and its mode. Waits for nobody. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(setting, f"{path} is no ordinary file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(most), mode
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(setting, f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(setting, f"{str(path)!r} cannot be the name of a file: {error}") from None
