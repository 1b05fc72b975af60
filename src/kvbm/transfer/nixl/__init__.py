"""NIXL, the optional layer under everything that leaves this process: peers' memory, and devices with their own I/O.

Without its wheel (the extra `nixl`) nothing of this is imported and everything local works.
"""

from kvbm.transfer.nixl.agent import Agent, Objects, RemoteMemory
from kvbm.transfer.nixl.probe import BACKENDS, Report, probe
from kvbm.transfer.nixl.transport import NixlTransport

__all__ = ["BACKENDS", "Agent", "NixlTransport", "Objects", "RemoteMemory", "Report", "probe"]
