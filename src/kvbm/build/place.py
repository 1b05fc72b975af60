"""Where an engine stands, and where its processes meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvbm.core.config import Settings
from kvbm.link.channel import socket_path


@dataclass(frozen=True, slots=True)
class Place:
    """Where this engine stands: its id, its tensor-parallel ranks, its place among the data-parallel engines here.

    `dp_local` is 1 for engines that are not told how many there are; that it is one of several says `data_parallel`.
    `replicated`: every rank has the same KV, so that rank 0 stores it for all.
    """

    engine: str
    ranks: int
    data_parallel: bool = False
    dp_rank: int = 0
    dp_local: int = 1
    replicated: bool = False
    model: str = ""
    """What people call the model that it serves."""

    @property
    def storing(self) -> range:
        """The ranks that store: each has its own part of a block."""
        return range(1 if self.replicated else self.ranks)


def channel_path(settings: Settings, engine: str) -> Path:
    """Where leader and workers of an engine meet."""
    return socket_path(settings.run_dir, engine, ".chan")
