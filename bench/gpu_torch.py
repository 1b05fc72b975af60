"""torch on the first GPU, as the engine that computes beside copies (see `bench.gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

SIDE: Final = 8192
CYCLES_PER_S: Final = 1.7e9
"""Of a current GPU's clock, about: what `pause` takes is no figure."""


class Torch:
    """See `bench.gpu.Engine`."""

    library = "libcuda.so.1"

    def __init__(self) -> None:
        torch.cuda.init()
        torch.cuda.set_device(0)
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)

    def current(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def tensor(self, nbytes: int) -> Any:
        return torch.zeros(nbytes, dtype=torch.int8, device="cuda:0")

    def pause(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_S))

    def products(self) -> Callable[[], None]:
        a, out = (torch.randn(SIDE, SIDE, device="cuda:0", dtype=torch.bfloat16) for _ in range(2))

        def work() -> None:
            for _ in range(4):
                torch.mm(a, a, out=out)

        return work

    def graph(self) -> Callable[[], None]:
        """Of thin products, as when a model decodes."""
        x, a = (torch.randn(rows, SIDE, device="cuda:0", dtype=torch.bfloat16) for rows in (16, SIDE))
        for _ in range(3):
            x @ a
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            for _ in range(40):
                x @ a

        def replay() -> None:
            assert x is not None  # the graph reads it, and keeps nothing alive
            assert a is not None
            graph.replay()

        return replay

    def capture(self) -> bool:
        x = torch.ones(256, 256, device="cuda:0")  # a graph that was spoiled leaves nothing random to this process
        x @ x
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="global"):
                for _ in range(500):
                    x @ x
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


engine = Torch
