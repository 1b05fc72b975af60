"""The last error of a server, out of all that it wrote."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from kvbm.cli.tail import Tail

CORE = "(EngineCore pid=7) ERROR 11-29 12:00:00 [core.py:946] "
VAGUE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def passed(text: str) -> tuple[str, str]:
    """What came out, and the reason."""
    tail, target = Tail(), io.TextIOWrapper(io.BytesIO())
    out, into = os.pipe()
    tail.follow(os.fdopen(out, "rb"), target)
    with os.fdopen(into, "wb") as pipe:
        pipe.write(text.encode())
    reason = tail.reason()
    assert isinstance(target.buffer, io.BytesIO)
    return target.buffer.getvalue().decode(), reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("INFO all is well\n", ""),
        ('Traceback (most recent call last):\n  File "x"\nValueError: too long\n', "ValueError: too long"),
        (f"{CORE}torch.OutOfMemoryError: none left\nTraceback\n{VAGUE}\n", "OutOfMemoryError: none left"),
        (f"\x1b[0;36m(EngineCore pid=7)\x1b[0;0m ERROR 1-1 [core.py:9] KeyError: 'x'\n{VAGUE}\n", "KeyError: 'x'"),
        ("usage: x\napi_server.py: error: unrecognized arguments: --bogus\n", "unrecognized arguments: --bogus"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Model architectures ['X'] are not supported [type=value_error]\n    For further\n",
            "Model architectures ['X'] are not supported [type=value_error]",
        ),
    ],
)
def test_the_last_error_that_says_something(text: str, reason: str) -> None:
    assert passed(text) == (text, reason)


def test_nobody_who_reads_does_not_stop_the_server(tmp_path: Path) -> None:
    target = (tmp_path / "closed").open("w")
    target.close()
    tail = Tail()
    out, into = os.pipe()
    tail.follow(os.fdopen(out, "rb"), target)
    with os.fdopen(into, "wb") as pipe:
        pipe.write(b"x" * (1 << 20) + b"\nOSError: at the end\n")
    assert tail.reason() == "OSError: at the end"
