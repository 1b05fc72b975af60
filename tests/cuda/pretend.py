"""An engine on a CPU whose KV memory counts as a GPU's: the fake driver's (`fake.c`).

The memory is closed, so that whoever touches it dies, but for the time between the connector's first call in a step and
the end of the forward pass. The engine's stream is one of the fake's, and it lags: each step puts work on it that ends
some random time after the forward pass, and says which blocks it reads and writes, zeroes or copies. So a copy that
does not wait for the engine, or an engine that does not wait for a copy, is a mistake that the fake counts.

`install` is called in every process of the engine, before it allocates its KV memory. `PRETEND_CUDA` says how, as
``seed=1&most_ms=5&v2=0&ahead=0``; `PRETEND_CUDA_COUNTS` is a folder in which each process says what the fake has seen.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl

from kvbm.core.region import Region
from kvbm.transfer.cuda import CudaDevice
from tests.cuda.fake import Fake

SETTINGS, COUNTS = "PRETEND_CUDA", "PRETEND_CUDA_COUNTS"


class Pretend:
    """Of one process. All on the engine's worker thread."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._dice = random.Random(int(options.get("seed", 0)) * 1000 + os.getpid() % 1000)
        self._most_s = float(options.get("most_ms", 5)) / 1e3
        self.v2 = options.get("v2", "0") == "1"
        """Whether the connector is called by what vLLM's model runner V2 calls it by (`ActiveKVConnector`): zeroing and
        copies inside the engine are launched before it hears of the step. It is asked for results before it may store,
        as there with a draft model from 0.33 on."""
        self.deferred = False
        """Whether it is still to be told that it may."""
        self._active: Any = None
        """That of V2, and whether it is what calls."""
        self._calls = False
        self._ahead = options.get("ahead", "0") == "1"
        """Whether the engine gives its stream the next step before this one has ended, as with asynchronous scheduling
        on a GPU."""
        self.fake = Fake()
        self._stepped: list[ctypes.c_void_p] = []
        """Events at the ends of the last steps."""
        self.stream = self.marked = self.fake.stream()
        self._memory: list[tuple[int, int]] = []
        self.region: Region | None = None
        self._tables: dict[str, list[list[int]]] = {}
        self._output: Any = None
        self._counts = os.environ.get(COUNTS)

    # ------------------------------------------------------------------ memory

    def zeros(self, size: int) -> Any:
        """Device memory as a tensor of bytes."""
        import torch

        address = ctypes.c_uint64()
        self.fake.use()
        assert self.fake.call.cuMemAlloc_v2(ctypes.byref(address), size) == 0
        self._memory.append((address.value, size))
        self.access(open_=True)
        return torch.frombuffer((ctypes.c_int8 * size).from_address(address.value), dtype=torch.int8)

    def access(self, *, open_: bool) -> None:
        """Whether the program may touch it."""
        for address, size in self._memory:
            assert self.fake.call.fake_access(address, size, int(open_)) == 0

    def device(self, address: int, keep: object) -> CudaDevice:
        """What the engine's memory lies on."""
        return CudaDevice.of(address, lambda: self.marked, keep=keep, library=self.fake.path)

    # ------------------------------------------------------------------ steps

    def step(self, output: Any) -> None:
        """The engine begins one."""
        self._output = output
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = [list(table) for table in new.block_ids]
        cached = output.scheduled_cached_reqs
        for name, tables in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if tables is not None and name in cached.resumed_req_ids:
                self._tables[name] = [list(table) for table in tables]
            elif tables is not None:
                for table, new_blocks in zip(self._tables[name], tables, strict=True):
                    table.extend(new_blocks)
        for name in output.finished_req_ids:
            if name not in output.num_scheduled_tokens:
                self._tables.pop(name, None)

    def heard(self, hear: Callable[[], None]) -> None:
        """The connector's first call in a step, and what the engine launches around it."""
        there = self._output is not None and self.region is not None
        if self.v2 and not self._calls:  # this is V1, which calls before it zeroes
            if there:
                self._early()
                self.access(open_=True)  # it zeroes next
            return
        hear()
        if not there:
            return
        if not self.v2:
            self._early()
        self._forward()
        self.access(open_=True)

    @contextmanager
    def as_v2(self, output: Any, config: Any, *, deferred: bool) -> Iterator[Any]:
        """Around a forward pass. `deferred`: the engine itself says later that stores may begin."""
        from vllm.v1.outputs import KVConnectorOutput

        said, active = KVConnectorOutput(), self._v2(config)
        with self._called():
            active.pre_forward(output)
        try:
            yield said
        finally:
            active.finish_forward()
            self.deferred = not deferred
            if "defer_finalize" in inspect.signature(active.post_forward).parameters:
                found = active.post_forward(output.finished_req_ids, defer_finalize=True)
            else:
                nothing = {"wait_for_save": lambda: None, "clear_connector_metadata": lambda: None}
                with mock.patch.multiple(active.kv_connector, **nothing):
                    found = active.post_forward(output.finished_req_ids)
            for each in fields(found):
                setattr(said, each.name, getattr(found, each.name))

    def without_forward(self, output: Any, config: Any) -> Any:
        """A step that computes nothing, as V2 has it."""
        with self._called():
            return self._v2(config).no_forward(output)

    def _v2(self, config: Any) -> Any:
        if self._active is None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group
            from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

            with mock.patch.object(get_kv_transfer_group(), "register_kv_caches"):  # V1 has
                self._active = ActiveKVConnector(config, {})
        return self._active

    @contextmanager
    def _called(self) -> Iterator[None]:
        self._calls = True
        try:
            yield
        finally:
            self._calls = False

    def over(self) -> None:
        """The forward pass has been computed; on the engine's stream it takes a while more."""
        if self.region is not None:
            self.access(open_=False)
        self.fake.go(self.stream, self._while())

    def sampled(self) -> None:
        """The engine has waited for its tokens, or, where it runs ahead, for those of the step before."""
        self.fake.use()
        call, event = self.fake.call, ctypes.c_void_p()
        if self._ahead:
            assert call.cuEventCreate(ctypes.byref(event), 2) == call.cuEventRecord(event, self.stream) == 0
            self._stepped.append(event)
            if len(self._stepped) > 1:
                past = self._stepped.pop(0)
                assert call.cuEventSynchronize(past) == call.cuEventDestroy_v2(past) == 0
            return
        assert call.cuStreamSynchronize(self.stream) == 0

    def tell(self) -> None:
        if self._counts:
            said = Path(self._counts) / f"{os.getpid()}.json"
            beside = said.with_suffix(".new")
            beside.write_text(json.dumps(asdict(self.fake.counts())))
            beside.rename(said)

    def _early(self) -> None:
        output = self._output
        if zeroed := output.new_block_ids_to_zero:
            self._work(dict.fromkeys(zeroed, True))
        if copies := getattr(output, "kv_cache_block_copies", None):
            self._work({copy.src_block_id: False for copy in copies} | {copy.dst_block_id: True for copy in copies})

    def _forward(self) -> None:
        output = self._output
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        touched: dict[int, bool] = {}
        for name in output.num_scheduled_tokens:
            for table, (tokens, window) in zip(self._tables[name], self._groups, strict=True):
                # What lies behind a window is not the request's any more, and may be somebody else's.
                first = 0 if window is None else max(0, computed[name] - window) // tokens
                for at, block in enumerate(table[first:], first):
                    touched[block] = touched.get(block, False) or at >= computed[name] // tokens
        touched.pop(0, None)  # the block that stands for none
        if touched:
            self._work(touched, ends=False)

    _groups: list[tuple[int, int | None]]

    def _while(self) -> float:
        return self._dice.random() * self._most_s

    def _work(self, blocks: Mapping[int, bool], *, ends: bool = True) -> None:
        """Work on the engine's stream that reads these blocks, or writes to them."""
        assert self.region is not None
        rows: dict[int, tuple[int, bool]] = {}
        for plane in self.region.planes:
            rows |= {
                plane.address + block * plane.stride: (plane.row_bytes, writes) for block, writes in blocks.items()
            }
        touched = [(address, *rows[address]) for address in sorted(rows)]
        self.fake.work(self.stream, touched, self._while() if ends else None)

    def learns(self, groups: Iterable[Any]) -> None:
        """How many tokens a block of each group has, and how many a step reads before those that it computes: None for
        all; of a state the last."""
        self._groups = []
        for spec in (group.kv_cache_spec for group in groups):
            state = type(spec).__name__ == "MambaSpec"
            window = 1 if state else getattr(spec, "sliding_window", None)
            self._groups.append((spec.block_size, window))


class _Torch:
    """torch, but for memory of zeros, which is the engine's KV cache where vLLM allocates that."""

    def __init__(self, torch: Any, zeros: Any) -> None:
        self._torch, self.zeros = torch, zeros

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def _stream_0(pretend: Pretend) -> None:
    pretend.marked = 0


def _before_the_forward_pass(pretend: Pretend) -> None:
    from kvbm.worker.worker import Worker

    before, after, taken = Worker.before_step, Worker.after_forward, list[Any]()

    def before_step(worker: Worker, step: Any) -> None:
        taken[:] = [worker.copying.mark()]
        before(worker, step)

    def after_forward(worker: Worker, step: Any) -> None:
        with mock.patch.object(worker.copying, "mark", return_value=taken[0]):
            after(worker, step)

    Worker.before_step, Worker.after_forward = before_step, after_forward  # type: ignore[method-assign]


def _of_the_step_before(pretend: Pretend) -> None:
    from kvbm.worker.copying import Copying

    mark, taken = Copying.mark, list[Any]()

    def late(copying: Copying) -> object:
        taken.append(mark(copying))
        return taken[-2] if len(taken) > 1 else taken[-1]

    Copying.mark = late  # type: ignore[method-assign]


def _loads_do_not_wait(pretend: Pretend) -> None:
    from kvbm.worker.copying import Copying

    load, idle = Copying.load, pretend.fake.stream()
    Copying.load = lambda copying, copy, after: load(copying, copy, pretend.fake.driver.mark(0, idle))  # type: ignore


def _no_mark_for_loads(pretend: Pretend) -> None:
    from kvbm.worker.copying import Copying

    load = Copying.load
    Copying.load = lambda copying, copy, after: load(copying, copy, None)  # type: ignore[method-assign]


def _no_fence(pretend: Pretend) -> None:
    from kvbm.worker.fence import Fence

    Fence.wait = lambda fence, jobs: None  # type: ignore[method-assign]


def _fence_by_an_event(pretend: Pretend) -> None:
    """That of a copy is recorded later, by another thread."""
    from kvbm.worker.fence import Fence

    def wait(fence: Fence, jobs: Any) -> None:
        event = ctypes.c_void_p()
        pretend.fake.use()
        assert pretend.fake.call.cuEventCreate(ctypes.byref(event), 2) == 0
        assert pretend.fake.call.cuStreamWaitEvent(ctypes.c_void_p(pretend.stream), event, 0) == 0

    Fence.wait = wait  # type: ignore[method-assign]


def _fence_after_the_forward_pass(pretend: Pretend) -> None:
    from kvbm.worker.fence import Fence
    from kvbm.worker.worker import Worker

    before, wait = Worker.before_step, Fence.wait

    def before_step(worker: Worker, step: Any) -> None:
        with mock.patch.object(Fence, "wait", return_value=None):
            before(worker, step)

    def after_forward(worker: Worker, step: Any) -> None:
        wait(worker.copying.fence, step.fence)
        after(worker, step)

    after = Worker.after_forward
    Worker.before_step, Worker.after_forward = before_step, after_forward  # type: ignore[method-assign]


def _condemned_counts(pretend: Pretend) -> None:
    from kvbm.worker.fence import Fence

    Fence.judged = lambda fence, job, completion: completion  # type: ignore[method-assign]


def _hanging_load_is_reported(pretend: Pretend) -> None:
    from kvbm.abc.transport import Completion
    from kvbm.transfer.executor import Executor

    submit = Executor.submit

    def submitted(executor: Executor, job: int, plan: Any, deadline_s: float, done: Any) -> None:
        once = [done]

        def end(job: int, completion: Completion) -> None:
            if once:
                once.pop()(job, completion)

        if plan.label == "load":
            failed = Completion.failed(0, len(plan.source_slots), "it hangs")
            threading.Timer(deadline_s, end, (job, failed)).start()
        submit(executor, job, plan, deadline_s, end)

    Executor.submit = submitted  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[Pretend], None]] = {
    "marks are of stream 0": _stream_0,
    "marks are taken before the forward pass": _before_the_forward_pass,
    "marks are of the step before": _of_the_step_before,
    "loads do not wait for their mark": _loads_do_not_wait,
    "loads have no mark": _no_mark_for_loads,
    "no fence": _no_fence,
    "a fence by an event": _fence_by_an_event,
    "the fence comes after the forward pass": _fence_after_the_forward_pass,
    "a condemned store is published": _condemned_counts,
    "a load that hangs is reported": _hanging_load_is_reported,
}
"""Mistakes of a rank that a run has to find; see `plants.py`."""
PRETEND: Pretend | None = None


def install() -> None:
    """In this process, once."""
    global PRETEND
    if PRETEND is not None:
        return
    import torch
    from vllm.v1.worker import utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from kvbm.connect.vllm import geometry, support

    options = dict(parse_qsl(os.environ.get(SETTINGS, "")))
    PRETEND = pretend = Pretend(options)
    if "plant" in options:
        PLANTS[options["plant"]](pretend)

    def zeros(size: Any, *args: Any, **options: Any) -> Any:
        if isinstance(size, int) and options.get("dtype") is torch.int8:
            return pretend.zeros(size)
        return torch.zeros(size, *args, **options)

    utils.torch = _Torch(torch, zeros)
    support.runs_on = lambda config: "cuda"  # type: ignore[assignment]
    support.SERVED = ("cpu", "cuda")  # type: ignore[misc]
    geometry.device = lambda caches: pretend.device(*_memory(caches))  # type: ignore[assignment]
    placed = geometry.g1_region

    def g1_region(*args: Any) -> Region:
        pretend.region = placed(*args)
        return pretend.region

    geometry.g1_region = g1_region

    execute, sample, initialize, connected, forward, no_forward = (
        GPUModelRunner.execute_model, GPUModelRunner.sample_tokens, GPUModelRunner.initialize_kv_cache,
        GPUModelRunner.maybe_get_kv_connector_output, GPUModelRunner._model_forward,
        GPUModelRunner.kv_connector_no_forward,
    )  # fmt: skip

    def _model_forward(runner: Any, *args: Any, **options: Any) -> Any:
        try:
            return forward(runner, *args, **options)
        finally:
            pretend.over()

    configs = list[Any]()

    def maybe_get_kv_connector_output(output: Any, defer_finalize: bool = False) -> Any:
        if pretend.v2:
            return pretend.as_v2(output, configs[0], deferred=defer_finalize)
        return connected(output, defer_finalize=defer_finalize)

    def kv_connector_no_forward(output: Any, config: Any) -> Any:
        return pretend.without_forward(output, config) if pretend.v2 else no_forward(output, config)

    @wraps(execute)
    def execute_model(runner: Any, output: Any, *args: Any, **options: Any) -> Any:
        pretend.step(output)
        configs[:] = [runner.vllm_config]
        try:
            return execute(runner, output, *args, **options)
        finally:
            if pretend.deferred:
                pretend.deferred = False
                GPUModelRunner.finalize_kv_connector()
            pretend.over()
            pretend.tell()

    @wraps(sample)
    def sample_tokens(runner: Any, *args: Any, **options: Any) -> Any:
        if runner.speculative_config is not None:  # a draft model computes
            pretend.access(open_=True)
        try:
            return sample(runner, *args, **options)
        finally:
            pretend.over()
            pretend.sampled()

    @wraps(initialize)
    def initialize_kv_cache(runner: Any, config: Any, *args: Any, **options: Any) -> Any:
        pretend.learns(config.kv_cache_groups)
        return initialize(runner, config, *args, **options)

    GPUModelRunner.maybe_get_kv_connector_output = staticmethod(maybe_get_kv_connector_output)
    GPUModelRunner.kv_connector_no_forward = staticmethod(kv_connector_no_forward)
    GPUModelRunner._model_forward = _model_forward
    GPUModelRunner.execute_model = execute_model
    GPUModelRunner.sample_tokens = sample_tokens
    GPUModelRunner.initialize_kv_cache = initialize_kv_cache


def _memory(caches: Mapping[str, Any]) -> tuple[int, object]:
    first = next(iter(caches.values()))
    tensor = first[0] if isinstance(first, list | tuple) else first
    return tensor.untyped_storage().data_ptr(), list(caches.values())


def seen(folder: Path) -> list[dict[str, Any]]:
    """What the processes said that tell counts there."""
    said = []
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):
            said.append(json.loads(path.read_text()))
    return said
