"""How one block's transfer ended. There is no default: only `DONE` publishes."""

from __future__ import annotations

import enum


class Outcome(enum.IntEnum):
    """Per block, in the order of a transfer's blocks; one byte each on the wire."""

    DONE = 0
    """Every byte is in place."""
    MISSING = 1
    """The source does not have the block."""
    CORRUPT = 2
    """The bytes are there but are not the block's."""
    FAILED = 3
    """The copy did not happen or did not finish; the completion carries the reason."""
