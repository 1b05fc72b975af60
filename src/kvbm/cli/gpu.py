"""What `kvbm doctor` finds out about NVIDIA's GPUs: it copies to each of them and back."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import numpy as np

from kvbm.abc.transport import Completion, Plan
from kvbm.cli.render import size
from kvbm.core.errors import Broken
from kvbm.core.region import Plane, Region
from kvbm.native import CudaError, Driver
from kvbm.stores.memory import Arena
from kvbm.transfer.cuda import LIBRARY, PCI_DEVICES, CudaDevice

TRIAL_BYTES: Final = 256 << 20
_SLOTS: Final = 64
_INTEGRATED, _HOST_TABLES = 18, 100
"""Of CUdevice_attribute: the device has no memory of its own, or reaches the host's by the host's own page tables."""


def tried(
    library: str = LIBRARY, nbytes: int = TRIAL_BYTES, folder: Path = PCI_DEVICES
) -> Iterator[tuple[str, bool, str]]:
    """For the driver and each device: what it is, whether KVBM can copy there, and what was found. `folder` is where
    Linux describes PCI devices."""
    try:
        driver = Driver(library)
        devices = driver.devices()
    except CudaError as error:
        yield "NVIDIA's driver", False, f"{error.args[0]}: engines on CPUs only"
        return
    version = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
    yield "NVIDIA's driver", True, f"{version}, devices: {devices}; copies by {driver.call}"
    for ordinal in range(devices):
        try:
            name, says = _device(driver, ordinal, nbytes, folder)
            yield f"GPU {ordinal}, {name}", True, says
        except (Broken, CudaError) as error:
            yield f"GPU {ordinal}", False, str(error.args[0])


def _device(driver: Driver, ordinal: int, nbytes: int, folder: Path) -> tuple[str, str]:
    """Its name, and what was found. Raises Broken or CudaError."""
    name, bus = driver.describe(ordinal)
    here = folder / bus.lower()
    speed, width, node = (_said(here / each) for each in ("current_link_speed", "current_link_width", "numa_node"))
    down, up = _rates(driver, ordinal, nbytes)
    says = [f"PCIe {speed.removesuffix(' PCIe')} x{width}" if speed and width else "its PCIe link is not known"]
    says.append(f"NUMA node {node}" if node and int(node) >= 0 else "its NUMA node is not known")
    says.append(f"host memory is pinned and copied there at {size(up)}/s, back at {size(down)}/s")
    if driver.attribute(ordinal, _INTEGRATED) or driver.attribute(ordinal, _HOST_TABLES):
        says.append("it shares memory with the host, where keeping blocks in host memory may gain nothing")
    return name, "; ".join(says)


def _rates(driver: Driver, ordinal: int, nbytes: int) -> tuple[float, float]:
    """Bytes per second from the device and to it, in rows of `nbytes` / 64. Raises Broken or CudaError."""
    rows, device = nbytes // _SLOTS, CudaDevice(driver, ordinal, lambda: 0)
    with ExitStack() as undo:
        address = driver.alloc(ordinal, nbytes)
        undo.callback(driver.free, ordinal, address)
        arena = Arena(nbytes)
        undo.callback(arena.close)
        arena.touch()
        device.pin(arena.address, nbytes, rows)
        undo.callback(device.unpin, arena.address)
        there = Region("device", "cuda", _SLOTS, (Plane(address, rows, rows),), owner=device)
        here = arena.region([rows], _SLOTS)
        down, up = device.transports()
        undo.callback(down.close)
        undo.callback(up.close)
        ended: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        rates = []
        for transport, source, destination in 2 * (
            (down, there, here),
            (up, here, there),
        ):  # the first ones take longer
            slots = np.arange(_SLOTS)
            transport.submit(Plan(source, slots, destination, slots, True, "trial", after=device.mark()), ended.put)
            completion = ended.get()
            if completion.error is not None:
                raise Broken(completion.error)
            rates.append(completion.nbytes / max(completion.seconds, 1e-9))
    return rates[2], rates[3]


def _said(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
