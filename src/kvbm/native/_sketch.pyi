from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

Int64s: TypeAlias = npt.NDArray[np.int64] | Buffer

class Sketch:
    """How often each tag was added lately, up to 15, in 8 bytes per tag of `capacity`: never too low, rarely too high.

    Tags are a contiguous buffer of int64, or `bytes` that hold int64. After every 10 * `capacity` additions all counts
    are halved, which looks at all of it; an addition that was halved counts half, so it is every 5 * `capacity` after
    the first time. (A count-min sketch of four rows of 4-bit counters with conservative update; TinyLFU, Einziger,
    Friedman and Manes, ACM Transactions on Storage 13(4), 2017.)
    """

    def __init__(self, capacity: int, /) -> None: ...
    def add(self, tags: Int64s, /) -> None:
        """Count each once more."""

    def estimate(self, tags: Int64s, /) -> bytes:
        """The count of each, a byte per tag."""

class Ghosts:
    """Which of the last `capacity` tags added, of one of two kinds each, were not taken since. 32 bytes per tag.

    Lossy: about a ninth are forgotten early, displaced by a tag with the same place; and one in some 2^31 look-ups of a
    tag that was never added finds it.
    """

    def __init__(self, capacity: int, /) -> None: ...
    def add(self, tags: Int64s, kinds: bytes, /) -> None:
        """Remember those whose kind, a byte per tag, is 0 or 1."""

    def take(self, tags: Int64s, /) -> bytes:
        """One more than the kind of each, a byte per tag, 0 where it is not remembered; and forget them."""
