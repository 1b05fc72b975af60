"""What `kvbm doctor` says of GPUs, over a driver that is simulated (`tests/cuda`)."""

import re
from pathlib import Path

import pytest

from kvbm.cli import gpu
from tests.cuda.fake import Fake


@pytest.fixture(scope="module")
def fake() -> Fake:
    fake = Fake()
    fake.call.fake_devices(2, 1)
    return fake


def test_without_a_driver_that_is_what_is_said() -> None:
    ((what, ok, says),) = gpu.tried("/nowhere/libcuda.so.1")
    assert (what, ok) == ("NVIDIA's driver", False)
    assert says.startswith("/nowhere/libcuda.so.1")
    assert says.endswith("engines on CPUs only")


def test_a_device_is_copied_to_and_back(fake: Fake, tmp_path: Path) -> None:
    here = tmp_path / "0000:0a:00.0"
    here.mkdir()
    for name, text in {"current_link_speed": "32.0 GT/s PCIe", "current_link_width": "16", "numa_node": "1"}.items():
        (here / name).write_text(f"{text}\n")
    fake.pace(bytes_per_s=2e9)
    driver, first, second = gpu.tried(fake.path, 64 << 20, tmp_path)
    fake.pace()
    assert driver == ("NVIDIA's driver", True, "CUDA 13.0, devices: 2; copies by cuMemcpyBatchAsync_v2")
    assert first[:2] == ("GPU 0, Fake GPU 0", True)
    rates = r"host memory is pinned and copied there at [\d.]+ [MG]B/s, back at [\d.]+ [MG]B/s"
    assert re.fullmatch(f"PCIe 32.0 GT/s x16; NUMA node 1; {rates}", first[2])
    assert second[2].startswith("its PCIe link is not known; its NUMA node is not known; ")
    assert fake.counts().mistakes == 0


@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuMemHostRegister_v2", "cuMemcpyBatchAsync_v2"])
def test_what_is_refused_is_a_finding_and_nothing_is_kept(fake: Fake, function: str, tmp_path: Path) -> None:
    fake.fail(function)
    _, first, second = gpu.tried(fake.path, 1 << 20, tmp_path)
    assert first[:2] == ("GPU 0", False)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in first[2]
    assert second[1]
    assert [ok for _, ok, _ in gpu.tried(fake.path, 1 << 20, tmp_path)] == [True] * 3


def test_memory_that_is_shared_with_the_host_is_said(fake: Fake, tmp_path: Path) -> None:
    fake.call.fake_integrated(1)
    _, first, _ = gpu.tried(fake.path, 1 << 20, tmp_path)
    fake.call.fake_integrated(0)
    assert "shares memory with the host" in first[2]
