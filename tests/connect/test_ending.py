"""What an engine does when it is told to end. The module is loaded by itself: its package needs vLLM."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvbm

PATIENCE = 5.0
Watch = Callable[[Callable[[], None]], None]


@pytest.fixture
def ends() -> Iterator[list[float]]:
    """When the process was told to end."""
    told: list[float] = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
    yield told
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def watch(ends: list[float], monkeypatch: pytest.MonkeyPatch) -> Watch:
    path = Path(kvbm.__file__).parent / "connect/vllm/ending.py"
    spec = importlib.util.spec_from_file_location("ending", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_SAME_S", 0.3)
    return module.before_sigterm  # type: ignore[no-any-return]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for(ends: list[float]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ends and time.monotonic() < deadline:
        time.sleep(0.005)
    assert ends


def test_the_last_is_done_before_the_end(watch: Watch, ends: list[float]) -> None:
    done: list[float] = []
    watch(lambda: (time.sleep(0.05), done.append(time.monotonic())))  # type: ignore[arg-type, func-returns-value]
    terminate()
    assert not ends, "the engine goes on meanwhile"
    wait_for(ends)
    assert done[0] <= ends[0]
    terminate()
    assert len(ends) == 2, "afterwards all is as it was"


def test_a_signal_that_comes_twice_is_one_and_a_second_does_not_wait(watch: Watch, ends: list[float]) -> None:
    never = threading.Event()
    watch(lambda: never.wait(PATIENCE) and None)
    terminate()
    terminate()
    assert not ends
    time.sleep(0.35)
    terminate()
    wait_for(ends)
    never.set()
    time.sleep(0.05)
    assert len(ends) == 1, "what was not waited for does not end it once more"


def test_what_goes_wrong_does_not_stop_the_end(
    watch: Watch, ends: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    def wrong() -> None:
        raise OSError("the disk is on fire")

    watch(wrong)
    terminate()
    wait_for(ends)
    assert "the disk is on fire" in caplog.text


def test_only_on_the_main_thread(watch: Watch, ends: list[float]) -> None:
    other = threading.Thread(target=watch, args=(pytest.fail,))
    other.start()
    other.join()
    terminate()
    assert len(ends) == 1
