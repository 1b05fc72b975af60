"""Keys of a prompt's blocks, where no engine gives them."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvbm import native
from kvbm.core.errors import Misuse

_TAG = b"kvbm prompt keys 1"


def prompt_keys(
    tokens: Sequence[int] | npt.NDArray[np.integer],
    block_tokens: int,
    *,
    namespace: Sequence[bytes] = (),
    extras: Mapping[int, Sequence[bytes]] | None = None,
    parent: bytes | None = None,
) -> list[bytes]:
    """The keys of a prompt, 32 bytes each, one for every whole block of `block_tokens` tokens.

    A key stands for its block and for all before it: equal keys mean equal tokens from the first on, and equal
    everything else that was given here. Tokens behind the last whole block get no key.

    - `tokens`: a sequence of int, or a one-dimensional numpy array of integers; each in 0..4294967295.
    - `namespace`: all that changes the values of every block: model and weights, dtype, adapter, tenant, cache salt.
      Parts do not run into each other: ``(b"ab", b"c")`` is not ``(b"a", b"bc")``.
    - `extras`: all that changes the values from one block on and is not in its tokens, such as the hash of an image
      and where in the block it begins; parts as in `namespace`, by number of the block among those of this call. A
      last block that is not whole may have parts, which are not used. No parts are the same as no entry.
    - `parent`: to go on after a prompt, the last key of it; `tokens` are then those after that block. `block_tokens`
      must be the same; the namespace is in `parent` already, and must not be given again.

    Raises `Misuse` for anything else. Any thread; what is given is not to be changed meanwhile. One pass in C, about
    10 ns per token; of large prompts the hashing does not hold the GIL.

    What is hashed, so that others can compute the same keys, with ``+`` for concatenation, SHA-256 as in FIPS 180-4,
    ``u32`` and ``u64`` for unsigned little-endian integers of 4 and 8 bytes, and ``parts(p) = u64(len(p[0])) + p[0] +
    u64(len(p[1])) + p[1] + ...``::

        root   = SHA-256("kvbm prompt keys 1" + u64(block_tokens) + parts(namespace))
        key[n] = SHA-256(key[n - 1] + u32(token) of each token of block n + parts(extras[n]))   # key[-1] = root

    So a block of 16 tokens without extras costs one hash of 96 bytes. The size of blocks is in the root and a length
    stands before each part, so two keys are the same for different prompts only if SHA-256 is broken.
    """
    if parent is not None and namespace:
        raise Misuse("a parent has its namespace in it: give one of them")
    try:
        size = operator.index(block_tokens)
        if size < 1:
            raise Misuse(f"a block has at least one token, not {size}")
        plain = _plain(tokens)
        root = _TAG + size.to_bytes(8, "little") + _joined(namespace, "namespace")
        start = hashlib.sha256(root).digest() if parent is None else parent
        extra = _extras(extras, len(plain), size) if extras else ()
        return native.chain(start, plain, size, extra)
    except (TypeError, ValueError, OverflowError) as error:
        raise Misuse(str(error)) from error


def _joined(parts: Sequence[bytes], name: str) -> bytes:
    """Their lengths and themselves, so that no two sequences give the same."""
    parts = tuple(parts)  # an iterator would be empty the second time, and so drop a namespace unseen
    if not all(isinstance(part, bytes) for part in parts):
        raise Misuse(f"{name} must be a sequence of bytes objects")
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _extras(extras: Mapping[int, Sequence[bytes]], tokens: int, size: int) -> tuple[bytes, ...]:
    """As `chain` takes them: one for each of the first blocks, whole ones only."""
    blocks = range(-(-tokens // size))
    for number in extras:
        if number not in blocks:
            raise Misuse(f"extras for block {number}, and there are {len(blocks)}")
    joined = [_joined(extras.get(number, ()), f"extras[{number}]") for number in range(max(extras) + 1)]
    return tuple(joined[: tokens // size])


def _plain(tokens: Sequence[int] | npt.NDArray[np.integer]) -> Sequence[int] | npt.NDArray[np.integer]:
    """Arrays as `chain` takes them: contiguous, of native 32- or 64-bit integers."""
    if not isinstance(tokens, np.ndarray):
        return tokens
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise Misuse(f"tokens must be one-dimensional integers, got {tokens.dtype} of shape {tokens.shape}")
    return np.ascontiguousarray(tokens, np.int32 if tokens.dtype.itemsize < 4 else tokens.dtype.newbyteorder("="))
