"""Least recently used: what was let go longest ago goes first."""

from __future__ import annotations

from kvbm.policy.levels import Levels


class LRU(Levels):
    """One list; a prompt's leaf before its root. (Mattson et al., IBM Systems Journal 9(2), 1970.)"""

    levels = 1
