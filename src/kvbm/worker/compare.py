"""Whether what an engine computed is what was stored, although no two runs of it give the same bits.

An engine that batches a prompt another way, or cuts it into other chunks, rounds in another order. So blocks are
compared as numbers: of each row (a layer, or its K or V) the distance ``2 |a - b| / (|a| + |b|)`` of its values as one
vector, 0 for equal ones and about 1.4 for any two that have nothing to do with each other; the worst row counts.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.abc.transport import Completion
from kvbm.core import cpus
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, Slots
from kvbm.link.messages import Compare, Result, unpack

Floats = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

BOUNDS: Final = {
    "float32": 1e-3,
    "float16": 0.05,
    "bfloat16": 0.15,
    "float8_e4m3fn": 0.3,
    "float8_e5m2": 0.4,
}
"""The largest distance of two blocks that count as the same, by what they are made of. docs/trust.md says how far apart
blocks were that are, and are not, the same."""
AT_ONCE: Final = 1 << 18
"""Bytes of each side that are looked at together: with more the processor's caches are too small, and it takes up to
seven times as long."""


class Unknown(ValueError):
    """These rows are not made of numbers that can be compared."""


def distances(memory: Region, ours: Slots, stored: Slots, dtype: str) -> Floats:
    """How far each block in the slots `ours` is from the one in `stored`, both of this host memory; infinite where one
    has a value that is not finite and the other does not have the same bits. Raises Unknown."""
    if dtype not in BOUNDS:
        raise Unknown(f"blocks of {dtype or 'an unknown kind of numbers'} cannot be compared")
    worst = np.zeros(len(ours), np.float32)
    for plane in memory.planes:
        span = (memory.num_slots - 1) * plane.stride + plane.row_bytes
        flat = np.frombuffer(memoryview((ctypes.c_uint8 * span).from_address(plane.address)).cast("B"), np.uint8)
        rows = np.lib.stride_tricks.as_strided(flat, (memory.num_slots, plane.row_bytes), (plane.stride, 1))
        step = max(1, AT_ONCE // plane.row_bytes)
        for first in range(0, len(ours), step):
            part = slice(first, first + step)
            np.maximum(worst[part], _apart(rows[ours[part]], rows[stored[part]], dtype), out=worst[part])
    return worst


def _apart(a: Raw, b: Raw, dtype: str) -> Floats:
    """The distance of each pair of rows."""
    x, y = decoded(a, dtype), decoded(b, dtype)
    with np.errstate(all="ignore"):
        sizes = _norm(x) + _norm(y)
        sizes[sizes == 0] = 1
        apart: Floats = 2 * _norm(x - y) / sizes
    odd: npt.NDArray[np.bool_] = ~np.isfinite(apart)
    if odd.any():
        apart[odd] = np.where((a[odd] == b[odd]).all(axis=1), 0, np.inf)
    return apart


def _norm(rows: Floats) -> Floats:
    norm: Floats = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norm


def decoded(rows: Raw, dtype: str) -> Floats:
    """Bytes as numbers."""
    match dtype:
        case "float32":
            numbers: Floats = rows.view(np.float32)
        case "float16":
            numbers = rows.view(np.float16).astype(np.float32)
        case "bfloat16":
            numbers = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            numbers = _EIGHT_BITS[dtype][rows]
    return numbers


def _eight_bits(exponent_bits: int, *, infinite: bool) -> Floats:
    """What each byte is, of the OCP's 8-bit floating-point formats: with infinities, or with one NaN for each sign."""
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent, mantissa = codes >> mantissa_bits & (1 << exponent_bits) - 1, codes & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if infinite:
        values[exponent == exponent.max()] = np.nan
        values[(exponent == exponent.max()) & (mantissa == 0)] = np.inf
    else:
        values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


_EIGHT_BITS: Final = {"float8_e4m3fn": _eight_bits(4, infinite=False), "float8_e5m2": _eight_bits(5, infinite=True)}


class Comparisons:
    """One rank's, on a thread of their own, one after the other. Any thread. `tell` takes what each found out."""

    def __init__(self, rank: int, dtype: str, tell: Callable[[Result], None]) -> None:
        self._rank, self.dtype, self._tell = rank, dtype, tell
        self._thread: ThreadPoolExecutor | None = None

    def start(self, wanted: Compare, memory: Region, copied: Completion) -> None:
        """Compare what was `copied` to the scratch slots of this memory."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "kvbm-compare", initializer=partial(cpus.spread, "kvbm-compare"))
        with suppress(RuntimeError):  # closed: nobody waits for it any more
            self._thread.submit(self._compare, wanted, memory, copied)

    def _compare(self, wanted: Compare, memory: Region, copied: Completion) -> None:
        outcomes, begun, problem = copied.outcomes.astype(np.uint8), time.monotonic(), copied.error
        errors = np.zeros(len(outcomes), np.float32)
        there = np.flatnonzero(outcomes == Outcome.DONE)
        try:
            ours, stored = unpack(wanted.scratch)[there], unpack(wanted.stored)[there]
            errors[there] = distances(memory, ours, stored, self.dtype)
            outcomes[there[errors[there] > BOUNDS[self.dtype]]] = Outcome.CORRUPT
        except Exception as error:  # the waiting side has to hear of it
            log.exception("KVBM: blocks could not be compared")
            outcomes[there], problem = Outcome.FAILED, str(error)
        seconds = time.monotonic() - begun
        self._tell(Result(wanted.job, self._rank, outcomes.tobytes(), 0, seconds, problem, errors=errors.tobytes()))

    def close(self) -> None:
        """Wait for the one at hand; the others are not made."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
