"""Streaming sessions: requests that go on with another piece of their prompt, and with the blocks that they have.

vLLM takes back the token that it sampled last, whose KV was not computed or will be computed again, and asks for
nothing to be loaded. What it computed of the session before is of the tokens that it keeps, with two exceptions: a
piece may begin behind a draft's token that came true after the end, whose KV stands in its place, and a recurrent state
may have taken in the token that is taken back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbm.connect.vllm import geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class Sessions:
    """Which requests go on in the step that is being described: `resumed`."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        self.certain = config.speculative_config is None and all(
            group.kind != "state" for group in geometry.layer_groups(kv)
        )
        """Whether neither exception is possible."""
        self.resumed: set[str] = set()
        self._reached: dict[str, int] = {}
        """Request -> tokens that are computed after the last step with the blocks that it has."""

    def resumes(self, request: Request) -> bool:
        """vLLM gives a request its blocks: whether these are those that it computed all of its tokens with that count
        as computed, or found them when it began. Where another connector loaded some of them they are not."""
        resumes: bool = 0 < request.num_computed_tokens <= self._reached.get(request.request_id, 0)
        if resumes:
            self.resumed.add(request.request_id)
        return resumes

    def computes(self, request_id: str, tokens: int) -> None:
        """After this step so many tokens of the request are computed."""
        self._reached[request_id] = tokens

    def forget(self, request_id: str) -> None:
        """The request has no blocks: it asks what can be loaded, or is over."""
        self._reached.pop(request_id, None)
