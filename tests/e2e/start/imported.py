"""Processes of vLLM as copies of one that has imported it: a new interpreter takes 15 s for that."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any


class _Process(ForkServerProcess):
    def __init__(self, *, target: Callable[..., None], **kwargs: Any) -> None:
        super().__init__(target=functools.partial(_in_environment, dict(os.environ), target), **kwargs)


def _in_environment(variables: dict[str, str], target: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    os.environ.clear()
    os.environ.update(variables)
    target(*args, **kwargs)


class Imported(ForkServerContext):
    """A context of multiprocessing. What is read from the environment at import has been read by then."""

    Process = _Process  # type: ignore[assignment]

    def __init__(self, *modules: str) -> None:
        self.set_forkserver_preload(
            ["vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "kvbm.connect.vllm", *modules]
        )
