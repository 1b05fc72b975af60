"""Whether a NIXL backend works here: blocks are written, read back and compared, in a process of its own.

A plugin whose library or hardware is missing may crash or hang instead of saying so. That must not happen in an engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion, Plan
from kvbm.core.errors import Broken
from kvbm.core.outcome import Outcome
from kvbm.core.region import OpenFile, Region, packed
from kvbm.transfer.nixl.agent import Objects, RemoteMemory
from kvbm.transfer.nixl.transport import NixlTransport

BACKENDS: Final = ("UCX", "POSIX", "GDS", "GDS_MT", "OBJ")
"""What there is a probe for."""
_BLOCK, _SLOTS, _ROUNDS = 256 << 10, 64, 4


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a probe: how fast it was (the median of few rounds, so: roughly), or why it does not work."""

    backend: str
    gb_s: float | None = None
    problem: str | None = None


def probe(
    backend: str, folder: Path | None = None, options: Mapping[str, str] | None = None, timeout_s: float = 30.0
) -> Report:
    """Try a backend; file backends in `folder` (default: where temporary files go).

    `options` are NIXL's for the backend, and no secrets: for "OBJ" `bucket` and `endpoint_override` at least; who may
    write there the child finds where AWS's SDK looks. It leaves small objects named kvbm-probe-... behind.
    """
    run = f"from {__name__} import main; main()"
    given = [backend, str(folder or tempfile.gettempdir()), json.dumps(dict(options or {}))]
    try:
        ended = subprocess.run(
            [sys.executable, "-c", run, *given], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Report(backend, problem=f"it does not answer within {timeout_s:.0f} s")
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["without a word"])[-1]
        return Report(backend, problem=f"its process ended with status {ended.returncode}: {last}")
    return Report(**json.loads(ended.stdout.splitlines()[-1]))


def _prove(backend: str, folder: Path, options: dict[str, str]) -> Report:
    try:
        if backend == "UCX":
            return Report(backend, gb_s=_over_memory())
        if backend == "OBJ":
            return Report(backend, gb_s=_over_objects(options))
        return Report(backend, gb_s=_over_file(backend, folder))
    except (Broken, OSError, AssertionError) as error:
        return Report(backend, problem=str(error) or repr(error))


def _over_memory() -> float:
    near, far = NixlTransport(), NixlTransport()
    source, there, back = (_blocks(seed) for seed in range(3))
    far.register(_region(there))
    peer = replace(_region(there), kind="peer", owner=RemoteMemory(near.connect(far.metadata())))
    try:
        return _there_and_back(near, source, peer, back, lambda: there)
    finally:
        near.close()
        far.close()


def _over_file(backend: str, folder: Path) -> float:
    transport = NixlTransport(backend)
    source, back = _blocks(0), _blocks(1)
    fd = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    try:
        file = packed("file", 0, [_BLOCK], _SLOTS + 1, kind="file", owner=OpenFile(fd))
        seconds = _there_and_back(
            transport, source, file, back, lambda: np.frombuffer(os.pread(fd, source.nbytes, 0), np.uint8)
        )
        if _run(transport, file, _region(back), [_SLOTS], [0]).error is None:
            raise Broken("what lies beyond the end of a file reads as if it were there")
        return seconds
    finally:
        transport.close()
        os.close(fd)


def _over_objects(options: dict[str, str]) -> float:
    transport = NixlTransport("OBJ", options)
    keys = Objects([f"kvbm-probe-{slot}" for slot in range(_SLOTS)])
    objects = packed("objects", 0, [_BLOCK], _SLOTS, kind="object", owner=keys)
    source, back = _blocks(0), _blocks(1)
    try:
        return _there_and_back(transport, source, objects, back, lambda: source)
    finally:
        transport.close()


def _there_and_back(
    transport: NixlTransport,
    source: npt.NDArray[np.uint8],
    far: Region,
    back: npt.NDArray[np.uint8],
    seen: Callable[[], npt.NDArray[np.uint8]],
) -> float:
    """GB/s of writing all of `source` to `far` and reading it from there into `back`."""
    here, into, slots, rates = _region(source), _region(back), list(range(_SLOTS)), []
    for turn in range(_ROUNDS):
        source += 1
        begin = time.perf_counter()
        for completion in (
            _run(transport, here, far, slots, slots),
            _run(transport, far, into, slots, slots[turn:] + slots[:turn]),
        ):
            if completion.error is not None:
                raise Broken(completion.error)
        rates.append(2 * source.nbytes / (time.perf_counter() - begin) / 1e9)
        if seen().tobytes() != source.tobytes():
            raise Broken("other bytes were written than were to be")
        if np.roll(back, -turn, axis=0).tobytes() != source.tobytes():
            raise Broken("other bytes were read than were written")
    return float(np.median(rates))


def _run(transport: NixlTransport, source: Region, far: Region, ours: list[int], theirs: list[int]) -> Completion:
    over: Future[Completion] = Future()
    transport.submit(Plan(source, np.array(ours), far, np.array(theirs), True, "probe"), over.set_result)
    completion = over.result()
    assert completion.error is not None or (completion.outcomes == Outcome.DONE).all()
    return completion


def _blocks(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (_SLOTS, _BLOCK), dtype=np.uint8)


def _region(blocks: npt.NDArray[np.uint8]) -> Region:
    return packed("probe", int(blocks.ctypes.data), [_BLOCK], len(blocks), owner=blocks)


def main() -> None:
    """The process of a probe: backend, folder and options are its arguments, the report as JSON its last line."""
    print(json.dumps(asdict(_prove(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))))
