"""The engine that the benchmarks measure: SmolLM2, its scheduler in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kvbm.cli import models, serve
from kvbm.core import config
from tests.e2e.engine import Engine


def engine(kvbm: Mapping[str, Any] | None, **options: Any) -> Engine:
    """`kvbm` None: vLLM alone. In the dtype that this processor is fast in, and with all of G2 there from the start."""
    folder = Path(models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True)))
    return Engine(
        folder, kvbm and {"strict": True, **kvbm}, dtype=serve.fast_dtype(), max_num_batched_tokens=4096, **options
    )
