from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

Int64s: TypeAlias = npt.NDArray[np.int64] | Buffer

class Lists:
    """Several doubly linked lists over the slots below `num_slots`, each slot in at most one.

    A slot belongs to a list (its *level*, 0 at first) whether it is in it or not. It has a number of uses, and reasons
    why it must not go: it is held, or is the parent of others. A blocked slot whose turn comes waits outside its list
    and returns to the front when it is unblocked, so nothing is passed over twice.

    Slots are a contiguous buffer of int64, or `bytes` that hold int64. `ValueError` for a slot that does not exist,
    before anything changes; and for one whose state does not allow it, after those before it in the run were done.
    """

    num_slots: Final[int]

    def __init__(self, num_slots: int, num_lists: int = 1, /) -> None: ...
    def __len__(self) -> int:
        """How many slots are in lists; those that wait outside are not."""

    def size(self, list: int, /) -> int:
        """How many slots are in this list."""

    def append(self, slots: Int64s, /) -> None:
        """To the tail of the list of each; the last one (a prompt's leaf) before the first. They must be in no list.

        A slot that was popped is no longer on its way out: it blocks its parent again.
        """

    def remove(self, slots: Int64s, /) -> None:
        """Out of their lists, or no longer waiting to return."""

    def hold(self, slots: Int64s, /) -> None:
        """Block; each stays where it is until its turn comes."""

    def release(self, slots: Int64s, /) -> None:
        """Unblock. What is in no list then goes to the front of its list, the last slot first of all.

        For a popped slot instead: it is no longer on its way out.
        """

    def place(self, slots: Int64s, levels: bytes, /) -> None:
        """Give each the level that stands in `levels`, a byte per slot. They must be in no list."""

    def climb(self, slots: Int64s, /) -> None:
        """To the next higher level, if there is one. They must be in no list."""

    def use(self, slots: Int64s, most: int, /) -> None:
        """One more use, up to `most` (at most 254)."""

    def adopt(self, slots: Int64s, parents: Int64s, /) -> None:
        """Forget what was in these slots; from now on each blocks the slot in `parents`, -1 for none.

        It does so until it is popped or forgotten, or its parent is forgotten.
        """

    def forget(self, slots: Int64s, /) -> bytes:
        """Reset all that is known of them, and take them out. A byte per slot: its level if it was popped, else 255."""

    def pop(self, list: int, n: int, above: int = 255, to: int = 0, /) -> bytes:
        """Take out up to `n` slots from the head of a list; int64s. What is popped no longer blocks its parent.

        A slot with more than `above` uses gets a second chance: it moves to the tail of the list `to`, there with no
        uses, or with one use less where `to` is this list. After 4096 + n second chances it gives fewer than `n`.
        """

    def halve(self) -> None:
        """Every level becomes half of itself: a list is joined to the tail of the one half as high. Looks at all."""

    def resize(self, num_slots: int, /) -> None:
        """More slots, in no list, which may copy what is known of all; raises MemoryError and changes nothing."""
