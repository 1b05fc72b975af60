"""The two copies of a request, and the keys of its prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Self

from xxhash import xxh3_64_intdigest

PIECE: Final = 256
"""Bytes of a prompt's text that have one key. What is left over at its end has none."""
MOST_PIECES: Final = 4096
"""Of a prompt; what comes after these does not decide where it goes."""

_ONE_TOKEN: Final = {"max_tokens": 1, "n": 1, "stream": False}
_NOT_FOR_PREFILL: Final = frozenset(
    {"best_of", "echo", "logprobs", "max_completion_tokens", "min_tokens", "prompt_logprobs", "stream_options"}
    | {"top_logprobs", "use_beam_search"}
)
_ROOT: Final = ("model", "cache_salt", "chat_template", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that both engines can have."""

    body: dict[str, Any]
    keys: list[int]
    """One for each complete piece of the prompt, which stands for all before it, too."""
    for_prefill: bytes
    """It asks for one token of the same prompt."""

    @classmethod
    def parse(cls, raw: bytes) -> Self | None:
        """None where there is nothing that we could change: only an engine can say what is wrong with it."""
        try:
            body = json.loads(raw)  # as vLLM reads it, also what is not JSON in the strict sense
            if not isinstance(body, dict) or not _takes_parameters(body):
                return None
            return cls(body, _keys(body), _for_prefill(body))
        except (ValueError, RecursionError):
            return None

    def for_decode(self, name: str) -> bytes:
        """The request as it came, and the instance to pull its blocks from."""
        return _with(self.body, _ours(self.body) | {"pull_from": name})


def _takes_parameters(body: dict[str, Any]) -> bool:
    params = body.get("kv_transfer_params")
    return params is None or (isinstance(params, dict) and isinstance(params.get("kvbm"), dict | None))


def _for_prefill(body: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in body.items() if name not in _NOT_FOR_PREFILL} | _ONE_TOKEN
    if "max_completion_tokens" in body:
        kept["max_completion_tokens"] = 1  # it goes before max_tokens
    ours = {"load": True} | _ours(body)
    ours.pop("pull_from", None)
    ours.pop("save_tokens", None)  # what is not kept there cannot be pulled
    return _with(kept, ours)


def _keys(body: dict[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if prompt is None:
        # Tools first: templates put them there, and conversations grow at the end.
        text = _canonical(body.get("tools")) + _canonical(body.get("messages"))
    else:
        text = prompt if isinstance(prompt, str) else _canonical(prompt)
    data = text.encode("utf-8", "surrogatepass")
    # An adapter needs no place of its own: vLLM serves it as a model.
    root = _canonical([body.get(name) for name in _ROOT])
    keys, key = [], xxh3_64_intdigest(root.encode("utf-8", "surrogatepass"))
    for start in range(0, min(len(data) // PIECE, MOST_PIECES) * PIECE, PIECE):
        key = xxh3_64_intdigest(data[start : start + PIECE], seed=key)
        keys.append(key)
    return keys


def _ours(body: dict[str, Any]) -> dict[str, Any]:
    return dict((body.get("kv_transfer_params") or {}).get("kvbm") or {})


def _with(body: dict[str, Any], ours: dict[str, Any]) -> bytes:
    params = (body.get("kv_transfer_params") or {}) | {"kvbm": ours}
    return json.dumps(body | {"kv_transfer_params": params}).encode()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
