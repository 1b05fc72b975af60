"""Client of the engines' control sockets: one JSON line to ``<run_dir>/<engine-id>.sock``, one JSON line back."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.core.errors import Broken, KvbmError

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one engine said: a `result`, or an `error` in one sentence."""

    engine: str
    result: dict[str, Any] | None
    error: str | None = None


def ask_all(run_dir: Path, command: str, *, engine: str = "", **arguments: Any) -> list[Answer]:
    """The answer of every running engine whose id starts with `engine`.

    Raises KvbmError when there is none. Sockets that nobody listens on are left over from an engine that died.
    """
    request = {"command": command, **arguments}
    sockets = sorted(run_dir.glob("*.sock"))
    answers = [
        answer for path in sockets if path.stem.startswith(engine) and (answer := _ask(path, request)) is not None
    ]
    if answers:
        return answers
    if others := [path.stem for path in sockets if not path.stem.startswith(engine)]:
        raise KvbmError(f"no running engine's id starts with {engine!r}. There are: {', '.join(others)}")
    raise KvbmError(
        f"no engine with KVBM is running here: nothing answers in {run_dir}."
        " An engine that was started with another KVBM_RUN_DIR is found with --run-dir"
    )


def ask(run_dir: Path, engine: str, command: str, **arguments: Any) -> Answer | None:
    """The answer of the engine with exactly this id; None where it does not run here."""
    return _ask(run_dir / f"{engine}.sock", {"command": command, **arguments})


def _ask(path: Path, request: dict[str, Any]) -> Answer | None:
    """None if nobody listens there."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                reply = _parse(lines.readline())
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except TimeoutError:
        return Answer(path.stem, None, f"it did not answer within {TIMEOUT_S:g} seconds")
    except PermissionError:
        return Answer(path.stem, None, f"it belongs to another user: {path} may not be opened")
    except (OSError, Broken) as error:
        return Answer(path.stem, None, f"it did not answer: {error}")
    if reply["ok"]:
        return Answer(path.stem, reply.get("result") or {})
    return Answer(path.stem, None, str(reply.get("error") or "it gave no reason"))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
        raise Broken("the connection ended early" if not line else "the answer is not KVBM's")
    return reply
