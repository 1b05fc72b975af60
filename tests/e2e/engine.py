"""A vLLM engine whose scheduler runs in the test's process, stepped by hand. Its worker is a process of its own."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tests.before  # noqa: F401
from kvbm.cli import serve
from kvbm.leader.leader import Leader
from tests.e2e.start.imported import Imported

CONNECTOR = {
    "kv_connector": "KvbmConnector",
    "kv_connector_module_path": "kvbm.connect.vllm",
    "kv_role": "kv_both",
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # With the usual scale random weights give outputs that hardly notice a wrong prompt. With this one, changing ten of
    # 384 tokens changed the next 24 tokens in 12 of 12 prompts.
    "initializer_range": 0.1,
}
BLOCK = 32


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A Llama with a handful of random weights, whose answers depend on every token of the prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


_WINDOW = 64
"""Tokens that five of `write_gemma`'s six layers see: two blocks."""


def write_gemma(folder: Path) -> Path:
    """A Gemma 3 with random weights: full attention beside sliding windows."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **(TINY | {"num_hidden_layers": 6, "tie_word_embeddings": True}),
        sliding_window=_WINDOW, query_pre_attn_scalar=32, pad_token_id=0,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Done:
    tokens: list[int] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    """Where a request asked for several, by index."""
    cached: int = 0
    reason: str = ""
    handed: dict[str, Any] | None = None
    """What another engine needs in order to go on with it."""


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets variables for a while; None unsets."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def minor() -> int:
    """Of vLLM's version: 32 of 0.32.0."""
    import vllm

    return int(vllm.__version__.split(".")[1])


def tells_hits_apart() -> bool:
    """Whether this version of vLLM says where hits came from."""
    from kvbm.connect.vllm import contract

    return contract.HIT_SOURCE is not None


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """vLLM switches it off on CPUs whatever it is told; it is what runs on GPUs. An engine made in here has it."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def keep(cls: type, config: Any) -> None:
        original.__func__(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keep)  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


def _closes_sockets() -> AbstractContextManager[object]:
    """An engine made in here closes its sockets when it is collected, as vLLM does from 0.32 on."""
    if minor() >= 32:
        return nullcontext()
    import zmq

    class Context(zmq.Context):  # type: ignore[type-arg]
        """Knows its sockets until they are closed. By weak references, which are gone when both are collected at once,
        pyzmq finds none to close, and waits for them forever."""

        def __init__(self) -> None:
            super().__init__()
            self._sockets = set()  # type: ignore[assignment]

        def __del__(self) -> None:
            self.destroy(linger=0)

    return mock.patch("vllm.distributed.device_communicators.shm_broadcast.Context", Context)


_PATHS = (str(Path(__file__).parent / "start"), os.environ.get("PYTHONPATH", ""))
FAST = {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}
"""For the environment of a server that is not itself what is tested."""


class Engine:
    """`kvbm` are settings (None: plain vLLM), those that are None are not given; `options` go to EngineArgs."""

    def __init__(self, model: Path, kvbm: Mapping[str, Any] | None = None, **options: Any) -> None:
        from vllm import envs
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        envs.disable_envs_cache()  # or this process's first engine decides which variables the others see

        tiny = not (model / "tokenizer.json").exists()
        chosen: dict[str, Any] = {
            "model": str(model),
            "enforce_eager": True,
            "dtype": "float32",
            "seed": 0,
            "block_size": BLOCK,
            "max_model_len": 1024,
            "num_gpu_blocks_override": 64,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            # The worker a process of its own, as it is under the server on a CPU.
            "distributed_executor_backend": "mp",
        }
        if tiny:
            chosen |= {"skip_tokenizer_init": True}
        chosen |= options
        self.run_dir = tempfile.TemporaryDirectory(prefix="kvbm")
        if kvbm is not None:
            # Prompts are short and the engine's memory small, and a test says what it expects of them, also where it
            # shares its two cores with another one.
            patient = {"load_min_tokens": 0, "fence_ms": 5000}
            extra = {"g2_blocks": 512, "run_dir": self.run_dir.name, **patient, **kvbm}
            given = {name: value for name, value in extra.items() if value is not None}
            chosen["kv_transfer_config"] = {**CONNECTOR, "kv_connector_extra_config": given}
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        if tiny:
            variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        elif kvbm is not None:
            variables[serve.RESERVED] = "1"  # as `kvbm serve` does, so that both sides compute with as many threads
        with (
            environment(**variables),
            mock.patch("vllm.v1.executor.multiproc_executor.get_mp_context", Imported) if tiny else nullcontext(),
            _closes_sockets(),
        ):
            self.vllm = LLMEngine.from_engine_args(EngineArgs(**chosen), enable_multiprocessing=False)
        self._next = 0
        self.results: dict[str, Done] = {}

    @property
    def core(self) -> Any:
        return self.vllm.engine_core.engine_core

    @property
    def side(self) -> Any:
        return self.core.scheduler.connector._scheduler.side.side

    @property
    def leader(self) -> Leader:
        leader: Leader = self.core.scheduler.connector._scheduler.side.leader
        return leader

    def status(self) -> dict[str, Any]:
        """What `kvbm status` would show."""
        return self.side.control.status()

    def explain(self, request_id: str) -> dict[str, Any]:
        return self.side.control.explain(request_id)

    def add(
        self,
        prompt: Sequence[int],
        tokens: int = 8,
        *,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        transfer: Mapping[str, Any] | None = None,
        salt: str | None = None,
        lora: Any = None,
        priority: int = 0,
        embeds: Any = None,
        **sampling: Any,
    ) -> str:
        from vllm import SamplingParams

        self._next += 1
        request = name or f"r{self._next}"
        body: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if embeds is not None:
            body = {"prompt_embeds": embeds}
        if salt is not None:
            body["cache_salt"] = salt
        passed = dict(transfer or {}) | ({"kvbm": dict(params)} if params is not None else {})
        extra = {"kv_transfer_params": passed} if passed else None
        settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | sampling
        self.vllm.add_request(
            request,
            body,
            SamplingParams(max_tokens=tokens, extra_args=extra, **settings),
            lora_request=lora,
            priority=priority,
        )
        self.results[request] = Done()
        return request

    def step(self) -> None:
        for output in self.vllm.step():
            done = self.results[output.request_id]
            done.cached = output.num_cached_tokens or 0
            done.tokens = list(output.outputs[0].token_ids)
            done.answers |= {out.index: list(out.token_ids) for out in output.outputs}
            if output.finished:
                done.reason = output.outputs[0].finish_reason or ""
                done.handed = output.kv_transfer_params

    def drain(self, seconds: float = 300.0) -> None:
        """Steps until nothing is left."""
        deadline = time.monotonic() + seconds
        while self.vllm.has_unfinished_requests() or self.core.scheduler.has_requests():
            self.step()
            assert time.monotonic() < deadline, "the engine does not finish"

    def run(self, prompts: Sequence[Sequence[int]], tokens: int = 8, **options: Any) -> list[Done]:
        """All at once; their results in order."""
        names = [self.add(prompt, tokens, **options) for prompt in prompts]
        self.drain()
        return [self.results[name] for name in names]

    def settle(self, seconds: float = 20.0) -> None:
        """Waits until no copy is in flight."""
        deadline = time.monotonic() + seconds
        while any(self.leader.in_flight()):
            self.leader.tick()
            time.sleep(0.005)
            assert time.monotonic() < deadline, "copies do not end"
        self.leader.tick()

    def forget_device(self) -> None:
        """Clears the engine's own prefix cache, and nothing else."""
        assert self.vllm.reset_prefix_cache()

    def arena(self) -> Path:
        """What rank 0 keeps in host memory, as its process has it open."""
        (worker, *_) = self.core.model_executor.workers
        descriptors = (Path("/proc") / str(worker.proc.pid) / "fd").iterdir()
        (arena,) = (each for each in descriptors if "kvbm-arena" in str(each.readlink()))
        return arena

    def spoil(self) -> None:
        """Overwrites it, behind KVBM's back."""
        with self.arena().open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(0)
            file.write((random.Random(0).randbytes(1 << 16) * (size // (1 << 16) + 1))[:size])

    def close(self) -> None:
        self.vllm.engine_core.shutdown()
        self.run_dir.cleanup()
