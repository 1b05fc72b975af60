"""Reads and writes of a tier that some rank has not answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvbm.link.tally import Tally

CANCELLED = "cancelled"
"""The error of a move that was given up."""


@dataclass(slots=True, kw_only=True)
class Move(Tally):
    """Blocks between host memory and somewhere below it. `ended` is called once every rank has answered."""

    down: bool
    ended: Callable[[Move], None]
    wanted: bool = True
    """False once its failure says nothing of where it went: it was given up."""
