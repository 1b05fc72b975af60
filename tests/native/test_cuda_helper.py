"""The C helper for GPUs, over a driver that is simulated (`tests/cuda`)."""

import re
import subprocess
from pathlib import Path

import nvidia.cu13
import pytest

from tests.cuda.build import NATIVE, run_helper

HEADER = Path(nvidia.cu13.__path__[0]) / "include/cuda.h"
"""NVIDIA's own, of its wheel."""


@pytest.mark.e2e  # no engine, but it measures times
def test_the_helper_keeps_its_contract_under_sanitizers() -> None:
    status, said = run_helper(13000, "address,undefined", 2)
    assert status == 0, said
    assert re.search(r"[1-9]\d{3,} checks, 0 failed", said), said


@pytest.mark.e2e
@pytest.mark.parametrize("version", [12080, 12040])
def test_older_drivers_do(version: int) -> None:
    status, said = run_helper(version, "", 0.5)
    assert status == 0, said
    assert f"CUDA {version}" in said


TYPES = {
    "CUdevice": "int", "CUcontext": "cuda_context", "CUstream": "cuda_stream", "CUevent": "cuda_event",
    "CUdeviceptr": "uint64_t", "CUdevice_attribute": "int", "CUpointer_attribute": "int", "CUresult": "int",
    "CUstreamCaptureStatus": "int", "CUstreamCaptureMode": "int", "unsigned int": "unsigned",
    "CUmemcpyAttributes": "struct cuda_attributes", "const CUDA_MEMCPY2D": "const struct cuda_rectangle",
}  # fmt: skip
"""NVIDIA's names, and what the helper takes for them: an enum is an int."""


def ours() -> dict[str, list[str]]:
    """The functions that the helper opens, and their parameters' types."""
    text = re.sub(r"\s*\\\n\s*", " ", (NATIVE / "cuda.h").read_text())
    found = re.findall(r'CALL\(\w+, "(\w+)", [01], \(([^()]*)\)\)', text)
    assert len(found) == text.count("CALL(")
    return {name: [part.strip() for part in parameters.split(",")] for name, parameters in found}


def theirs(name: str, text: str) -> list[list[str]]:
    """The parameters' types in each declaration of it."""
    declared = re.findall(rf"CUresult CUDAAPI {name}\(([^()]*)\);", text)
    return [[_type(each) for each in parameters.split(",")] for parameters in declared]


def _type(parameter: str) -> str:
    words, stars = re.match(r"\s*((?:const )?(?:\w+\s)+)\s*(\**)", parameter).groups()  # type: ignore[union-attr]
    plain = TYPES.get(words.strip(), words.strip())
    return f"{plain} {stars}" if stars else plain


def test_functions_are_declared_as_nvidia_declares_them() -> None:
    text, functions = HEADER.read_text(), ours()
    assert len(functions) > 25
    for name, parameters in functions.items():
        base = name.removesuffix("_v2")
        found = theirs(base, text)
        assert parameters in found, f"{name}: {parameters}, in cuda.h {found}"
        if name.endswith("_v2"):
            assert re.search(rf"#define {base}\s+(__CUDA_API_PTSZ\()?{name}\b", text), f"{base} is not {name} there"


def test_a_wrong_declaration_would_be_seen() -> None:
    text = HEADER.read_text()
    assert theirs("cuMemHostRegister", text)[0] == ["void *", "size_t", "unsigned"]
    assert ["void *", "size_t"] not in theirs("cuMemHostRegister", text)


def test_constants_and_structures_are_nvidias(tmp_path: Path) -> None:
    pairs = {
        "CUDA_OK": "CUDA_SUCCESS", "CUDA_NOT_READY": "CUDA_ERROR_NOT_READY",
        "STREAM_NON_BLOCKING": "CU_STREAM_NON_BLOCKING",
        "CAPTURE_RELAXED": "CU_STREAM_CAPTURE_MODE_RELAXED", "PIN_PORTABLE": "CU_MEMHOSTREGISTER_PORTABLE",
        "PIN_DEVICEMAP": "CU_MEMHOSTREGISTER_DEVICEMAP", "ORDER_STREAM": "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM",
        "ORDER_ANY": "CU_MEMCPY_SRC_ACCESS_ORDER_ANY", "PREFER_OVERLAP": "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE",
        "POINTER_MEMORY_TYPE": "CU_POINTER_ATTRIBUTE_MEMORY_TYPE", "TYPE_DEVICE": "CU_MEMORYTYPE_DEVICE",
        "POINTER_MANAGED": "CU_POINTER_ATTRIBUTE_IS_MANAGED", "POINTER_ORDINAL": "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL",
        "EVENT_NO_TIMING": "CU_EVENT_DISABLE_TIMING",
        "TYPE_HOST": "CU_MEMORYTYPE_HOST", "sizeof(struct cuda_rectangle)": "sizeof(CUDA_MEMCPY2D)",
        **{
            f"offsetof(struct cuda_rectangle, {ours})": f"offsetof(CUDA_MEMCPY2D, {theirs})" for ours, theirs in {
                "src_x": "srcXInBytes", "src_type": "srcMemoryType", "src_host": "srcHost", "src_device": "srcDevice",
                "src_pitch": "srcPitch", "dst_x": "dstXInBytes", "dst_type": "dstMemoryType", "dst_host": "dstHost",
                "dst_device": "dstDevice", "dst_pitch": "dstPitch", "width": "WidthInBytes", "height": "Height",
            }.items()
        },
        "sizeof(struct cuda_attributes)": "sizeof(CUmemcpyAttributes)",
        "offsetof(struct cuda_attributes, order)": "offsetof(CUmemcpyAttributes, srcAccessOrder)",
        "offsetof(struct cuda_attributes, source)": "offsetof(CUmemcpyAttributes, srcLocHint)",
        "offsetof(struct cuda_attributes, destination)": "offsetof(CUmemcpyAttributes, dstLocHint)",
        "offsetof(struct cuda_attributes, flags)": "offsetof(CUmemcpyAttributes, flags)",
    }  # fmt: skip
    source = tmp_path / "same.c"
    asserts = "\n".join(
        f'_Static_assert((int)({ours}) == (int)({theirs}), "{ours}");' for ours, theirs in pairs.items()
    )
    text = f'#define _GNU_SOURCE\n#include "{HEADER}"\n#include "{NATIVE / "cuda.h"}"\n{asserts}\n'
    source.write_text(text)
    compile_it = ["gcc", "-std=gnu11", "-fsyntax-only", f"-I{HEADER.parent}", source]
    subprocess.run(compile_it, check=True)
    source.write_text(text.replace("CU_MEMCPY_SRC_ACCESS_ORDER_ANY", "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM"))
    assert subprocess.run(compile_it, capture_output=True).returncode != 0
