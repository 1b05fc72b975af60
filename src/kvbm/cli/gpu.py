"""What `kvbm doctor` finds out about NVIDIA's GPUs: it copies to each of them and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from kvbm.cli.render import size
from kvbm.core.errors import Broken
from kvbm.native import CudaError, Driver
from kvbm.stores.memory import Arena
from kvbm.transfer.cuda import LIBRARY, PCI_DEVICES, TRIAL_BYTES, CudaDevice


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
    device = CudaDevice(driver, ordinal, lambda: 0)
    down, up = _rates(device, nbytes)
    # After the copies: a link that has nothing to do is slower.
    speed, width, node = (_said(here / each) for each in ("current_link_speed", "current_link_width", "numa_node"))
    says = [f"PCIe {speed.removesuffix(' PCIe')} x{width}" if speed and width else "its PCIe link is not known"]
    says.append(f"NUMA node {node}" if node and int(node) >= 0 else "its NUMA node is not known")
    says.append(f"host memory is pinned and copied there at {size(up)}/s, back at {size(down)}/s")
    if device.shares_memory():
        says.append("it shares memory with the host, where keeping blocks in host memory may gain nothing")
    return name, "; ".join(says)


def _rates(device: CudaDevice, nbytes: int) -> tuple[float, float]:
    """Bytes per second from the device and to it. Raises Broken or CudaError."""
    with closing(Arena(nbytes)) as arena, ExitStack() as undo:
        arena.touch()
        device.pin(arena.address, nbytes, nbytes // 64)
        undo.callback(device.unpin, arena.address)
        return device.rates(arena.address, nbytes)


def _said(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
