"""How far apart blocks are that are the same and blocks that are not, as shadow verification measures it.

The same prompts are computed alone in chunks of 256 tokens, alone in one chunk, and all in one batch. A pair of blocks
with one key is honest, whatever its runs; blocks of other prompts, and of prompts that differ in their first token
alone, are not the same.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.harness import Bench
from kvbm.core.region import packed
from kvbm.worker.compare import BOUNDS, distances

PROMPTS, TOKENS = 6, 600
RUNS = {256: ("chunks of 256",), 2048: ("one chunk", "one batch")}
"""By tokens of a step, what an engine runs."""
Blocks = dict[str, npt.NDArray[np.uint8]]


def prompts() -> list[list[int]]:
    """Even ones, and after each of them the same but for its first token."""
    dice = random.Random(0)
    out = []
    for _ in range(PROMPTS):
        prompt = [dice.randrange(300, 40_000) for _ in range(TOKENS)]
        out += [prompt, [prompt[0] + 1, *prompt[1:]]]
    return out


def dump(model: str, dtype: str, kv: str, chunk: int, path: Path) -> None:
    """Computes every prompt and writes down each block's bytes, by run, prompt and place."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from tests.e2e.engine import Engine

    vllm = Engine(
        Path(model), {"g2_blocks": 400, "strict": True}, dtype=dtype, kv_cache_dtype=kv, max_num_batched_tokens=chunk,
        max_num_seqs=16, max_model_len=1024, num_gpu_blocks_override=400, distributed_executor_backend="uni",
    )  # fmt: skip
    texts = [[token % 900 + 50 for token in prompt] if "tiny" in model else prompt for prompt in prompts()]
    begin, keys = vllm.leader.begin, list[list[bytes]]()

    def note(name: str, hashes: Sequence[bytes], *rest: Any) -> None:
        keys.append(list(hashes))
        begin(name, hashes, *rest)

    vllm.leader.begin = note  # type: ignore[method-assign, assignment]
    blocks: Blocks = {}
    for run in RUNS[chunk]:
        vllm.leader.reset()
        vllm.forget_device()
        keys.clear()
        for text in [texts] if run == "one batch" else [[text] for text in texts]:
            vllm.run(text, 1)
            vllm.settle()
        memory = get_kv_transfer_group()._worker.side.worker.memory.g2
        blocks["rows"] = np.array([plane.row_bytes for plane in memory.planes])
        for number, hashes in enumerate(keys):
            for place, key in enumerate(hashes[: TOKENS // 32]):
                address = memory.planes[0].address + vllm.leader.core.pool.look(key).slot * memory.planes[0].stride
                raw = ctypes.string_at(address, int(blocks["rows"].sum()))
                blocks[f"{run}/{number} {place}"] = np.frombuffer(raw, np.uint8)
    np.savez(path, **dict[str, Any](blocks))
    vllm.close()


def apart(a: list[npt.NDArray[np.uint8]], b: list[npt.NDArray[np.uint8]], rows: list[int], dtype: str) -> list[float]:
    """The distance of each pair."""
    memory = np.stack([*a, *b])
    region = packed("both", memory.ctypes.data, rows, len(memory), owner=memory)
    count = np.arange(len(a))
    return [float(each) for each in distances(region, count, count + len(a), dtype)]


def measure(bench: Bench, name: str, model: str, dtype: str, kv: str, made_of: str) -> None:
    found: dict[str, Blocks] = {run: {} for runs in RUNS.values() for run in runs}
    rows: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for chunk in RUNS:
            path = Path(folder) / "run.npz"
            command = [sys.executable, "-m", "bench.shadow", model, dtype, kv, str(chunk), str(path)]
            subprocess.run(command, check=True, timeout=280, capture_output="-v" not in sys.argv)
            with np.load(path) as arrays:
                rows = arrays["rows"].tolist()
                for each in set(arrays) - {"rows"}:
                    run, block = each.split("/")
                    found[run][block] = arrays[each]
    names = list(found["one chunk"])
    for one in ("chunks of 256", "one batch"):
        same = apart([found[one][each] for each in names], [found["one chunk"][each] for each in names], rows, made_of)
        what = f"{name}: {one} against alone in one chunk, largest of {len(same)}"
        bench.row(what, "the bound", max(same), "<=", BOUNDS[made_of])
        bench.info(f"{name}: {one}, median and 99th percentile", [float(np.percentile(same, p)) for p in (50, 99)])
    blocks = found["one chunk"]
    other_prompt = [
        (f"{a} {place}", f"{b} {place}") for a, b in pairwise(range(0, 2 * PROMPTS, 2)) for place in range(TOKENS // 32)
    ]
    near = [(f"{a} {place}", f"{a + 1} {place}") for a in range(0, 2 * PROMPTS, 2) for place in range(TOKENS // 32)]
    for what, pairs in (("another prompt's block", other_prompt), ("only the first token differs", near)):
        far = apart([blocks[a] for a, _ in pairs], [blocks[b] for _, b in pairs], rows, made_of)
        bar = BOUNDS[made_of] if pairs is other_prompt else None
        bench.row(f"{name}: {what}, smallest of {len(far)}", "the bound", min(far), ">=" if bar else None, bar)
        bench.info(f"{name}: {what}, found", f"{sum(each > BOUNDS[made_of] for each in far)} of {len(far)}")


def main() -> int:
    if len(sys.argv) > 5:
        model, dtype, kv, chunk, path = sys.argv[1:6]
        dump(model, dtype, kv, int(chunk), Path(path))
        return 0
    from rich.console import Console

    from kvbm.cli import models
    from kvbm.core import config
    from tests.e2e.engine import write_tiny

    bench = Bench("shadow")
    smollm2 = str(models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True)))
    with tempfile.TemporaryDirectory(prefix="tiny") as folder:
        tiny = str(write_tiny(Path(folder)))
        cases = {
            "random weights, float32": (tiny, "float32", "auto", "float32"),
            "SmolLM2, float32": (smollm2, "float32", "auto", "float32"),
            "SmolLM2, bfloat16": (smollm2, "bfloat16", "auto", "bfloat16"),
            "SmolLM2, bfloat16 with fp8 KV": (smollm2, "bfloat16", "fp8", "float8_e4m3fn"),
            "random weights, bfloat16": (tiny, "bfloat16", "auto", "bfloat16"),
            "SmolLM2, float16": (smollm2, "float16", "auto", "float16"),
        }
        for name, case in cases.items():
            if name in sys.argv or not set(sys.argv) & set(cases):
                try:
                    measure(bench, name, *case)
                except subprocess.CalledProcessError as error:  # a dtype that this processor has not, say
                    said = (error.stderr or b"").decode(errors="replace").splitlines()
                    bench.row(f"{name}: ran", "-", 0.0, ">=", 1.0)
                    bench.info(f"{name}: not run", said[-1] if said else f"status {error.returncode}")
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
