"""What tiers say over the channel, without the envelope it travels in."""

from __future__ import annotations

from typing import Any

from kvbm.link.messages import FromTier, Message, ToTier
from kvbm.tiers.disk import orders as disk
from kvbm.tiers.peers import orders as peers

TIERS = {module.TIER: module for module in (disk, peers)}


def off_channel(message: Message) -> Any:
    """A message of a tier as that means it; others as they are."""
    match message:
        case ToTier(tier=tier, body=body) if tier in TIERS:
            return TIERS[tier].decode_order(body)
        case FromTier(tier=tier, body=body) if tier in TIERS:
            return TIERS[tier].decode_answer(body)
    return message


def on_channel(message: Any) -> Message:
    """The other way round."""
    match message:
        case disk.Probed():
            return disk.to_leader(message)
        case peers.Shared():
            return peers.to_leader(message)
        case disk.Write() | disk.Read() | disk.Forget() | disk.Generation() | disk.Probe():
            return disk.to_rank(message)
        case peers.Attach() | peers.Detach() | peers.Pull():
            return peers.to_rank(message)
    sent: Message = message
    return sent
