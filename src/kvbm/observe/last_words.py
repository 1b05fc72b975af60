"""Why an engine's start ended, in a sentence, from the process that knows it to the one that started the engine.

The process that wants to know makes an empty file beforehand; where there is none, nothing is written."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_MOST = 1 << 16
_OLD_S = 86_400


def expect(run_dir: Path, engine: str) -> Path | None:
    """The file that `engine` may write into; None where none can be made."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in run_dir.glob("*.end"):  # of a starter that was killed
            if time.time() - path.stat().st_mtime > _OLD_S:
                path.unlink()
        os.close(os.open(_path(run_dir, engine), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError:
        return None
    return _path(run_dir, engine)


def leave(run_dir: Path, engine: str, sentence: str) -> None:
    """Write the sentence, where somebody expects one and none is there yet."""
    with suppress(OSError):
        file = os.open(_path(run_dir, engine), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not os.fstat(file).st_size:
                os.write(file, sentence.encode("utf-8", "backslashreplace")[:_MOST])
        finally:
            os.close(file)


def heard(path: Path | None) -> str:
    """What was written, empty where nothing was; the file is gone then."""
    if path is None:
        return ""
    try:
        sentence = path.read_bytes()[:_MOST].decode("utf-8", "replace")
        path.unlink()
    except OSError:
        return ""
    return " ".join(sentence.split())


def _path(run_dir: Path, engine: str) -> Path:
    return run_dir / f"{engine}.end"
