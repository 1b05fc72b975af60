from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

HARDWARE: Final[bool]
"""Whether this processor has instructions for SHA-256 that `chain` uses."""

def chain(
    parent: bytes,
    tokens: Sequence[int] | npt.NDArray[np.integer] | Buffer,
    block_tokens: int,
    extras: tuple[bytes, ...],
    portable: bool = False,
    /,
) -> list[bytes]:
    """A key of 32 bytes for every whole block of `tokens`, each chained to the one before, the first to `parent`.

    A key is SHA-256 over: the key before it, the block's tokens as little-endian uint32, and the block's entry of
    `extras`, which may be shorter than the prompt. `parent` has 32 bytes. `tokens` is a sequence, or a contiguous
    one-dimensional buffer of native 32- or 64-bit integers; each is in 0..4294967295, also behind the last whole block.

    `portable` leaves the processor's SHA-256 instructions alone, for tests; the result is the same. `ValueError` and
    `TypeError` for arguments that are not that. The GIL is not held while 128 KiB or more are hashed; what is hashed
    then is a copy.
    """
