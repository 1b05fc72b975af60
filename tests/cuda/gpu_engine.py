"""What computes beside copies in tests of `bench.gpu`: nothing, on a stream of the simulated driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from tests.cuda.fake import Fake


class Simulated:
    """See `bench.gpu.Engine`."""

    def __init__(self) -> None:
        self._fake = Fake()
        self._fake.call.fake_devices(1, 1)
        self.library = self._fake.path
        self._stream = self._fake.stream()

    def current(self) -> int:
        return self._stream

    def tensor(self, nbytes: int) -> Any:
        import torch

        address = self._fake.driver.alloc(0, nbytes)
        assert self._fake.call.fake_access(address, nbytes, 1) == 0
        return torch.frombuffer((ctypes.c_int8 * nbytes).from_address(address), dtype=torch.int8)

    def pause(self, seconds: float) -> None:
        self._fake.work(self._stream, [], seconds)

    def products(self) -> Callable[[], None]:
        return lambda: self.pause(1e-3)

    graph = products

    def capture(self) -> bool:
        self._fake.call.fake_capture(1)
        time.sleep(2e-3)
        self._fake.call.fake_capture(0)
        return not self._fake.call.fake_spoiled()


engine = Simulated
