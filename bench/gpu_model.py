"""A small Llama in plain torch with random weights, whose KV lies in blocks, for `bench.gpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from bench.gpu import Engine

BLOCK: Final = 16
"""Tokens."""
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD = 256, 4, 4, 2, 64


class Llama:
    """`compute` writes the KV of tokens into the blocks of a table, and reads what lies there of those before. A block
    of one layer is [tokens, KV heads, K and V]."""

    vocabulary, blocks = 1000, 64

    def __init__(self, engine: Engine) -> None:
        torch.manual_seed(1)
        self._page = BLOCK * KV_HEADS * 2 * HEAD * 4
        self._memory = engine.tensor(LAYERS * self.blocks * self._page)
        self._kv = self._memory.view(torch.float32).view(LAYERS, self.blocks, BLOCK, KV_HEADS, 2 * HEAD)
        self._where = self._memory.device
        inner = HEADS * HEAD
        self._embed = self._weights(self.vocabulary, WIDTH)
        self._layers = [
            {
                "qkv": self._weights(WIDTH, inner + 2 * KV_HEADS * HEAD),
                "out": self._weights(inner, WIDTH),
                "gate": self._weights(WIDTH, 2 * WIDTH),
                "up": self._weights(WIDTH, 2 * WIDTH),
                "down": self._weights(2 * WIDTH, WIDTH),
            }
            for _ in range(LAYERS)
        ]

    def planes(self) -> list[tuple[int, int, int]]:
        """Address, stride and bytes of each layer's blocks."""
        first = int(self._memory.data_ptr())
        return [(first + layer * self.blocks * self._page, self._page, self._page) for layer in range(LAYERS)]

    def forget(self) -> None:
        """All KV is zeros."""
        self._memory.zero_()

    def compute(self, tokens: npt.NDArray[np.int64], begin: int, table: list[int]) -> list[bytes]:
        """The logits of these tokens, the first of which is at `begin`, as bytes."""
        at = torch.arange(begin, begin + len(tokens), device=self._where)
        places = torch.tensor(table, device=self._where)
        x = self._embed[torch.from_numpy(tokens).to(self._where)]
        mask = torch.arange(begin + len(tokens), device=self._where)[None, :] <= at[:, None]
        for layer, weights in enumerate(self._layers):
            q, k, v = (_norm(x) @ weights["qkv"]).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=-1)
            q, k = (_rotated(each.view(len(tokens), -1, HEAD), at) for each in (q, k))
            fused = torch.cat([k, v.view(len(tokens), KV_HEADS, HEAD)], dim=-1)
            self._kv[layer, places[at // BLOCK], at % BLOCK] = fused
            past = self._kv[layer, places].reshape(-1, KV_HEADS, 2 * HEAD)[: begin + len(tokens)]
            keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in past.split(HEAD, dim=-1))
            scores = torch.einsum("qhd,khd->hqk", q, keys) / HEAD**0.5
            attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
            x = x + attended.reshape(len(tokens), -1) @ weights["out"]
            y = _norm(x)
            x = x + (torch.nn.functional.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"]
        logits = _norm(x) @ self._embed.T
        return [row.tobytes() for row in logits.cpu().numpy()]

    def _weights(self, rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns) / rows**0.5).to(self._where)


def _norm(x: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _rotated(x: Any, at: Any) -> Any:
    """With its place in it, as a Llama does."""
    angles = at[:, None] * 10_000 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
