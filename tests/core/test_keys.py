"""Fingerprints change with everything that changes a block's bytes."""

from __future__ import annotations

import pytest

from kvbm.core import keys
from kvbm.core.keys import Namespace, group_key, group_of, variant_keys

FACTS: dict[str, object] = {
    "architecture": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "quantization": None,
    "block": 32,
    "layers": ["layers.0", "layers.1"],
    "tensor_parallel": 1,
}


def test_equal_configurations_share_a_fingerprint() -> None:
    namespace = Namespace(FACTS, "w")
    assert len(namespace.fingerprint) == 64
    assert namespace.fingerprint == Namespace(dict(reversed(FACTS.items())), "w").fingerprint


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_counts(name: str) -> None:
    fingerprint = Namespace(FACTS, "w").fingerprint
    assert Namespace(FACTS | {name: "other"}, "w").fingerprint != fingerprint
    assert Namespace(FACTS | {name: str(FACTS[name])}, "w").fingerprint != fingerprint or isinstance(FACTS[name], str)
    assert Namespace({n: fact for n, fact in FACTS.items() if n != name}, "w").fingerprint != fingerprint


def test_ranks_agree_on_what_loading_the_model_does_not_alter() -> None:
    def of(config: str, model: str = "m") -> Namespace:
        return Namespace({"config": config, "model": model}, "w", altered=frozenset({"config", "absent"}))

    assert of("a").rank_fingerprint == of("b").rank_fingerprint != of("a", "other").rank_fingerprint
    assert of("a").fingerprint != of("b").fingerprint == Namespace({"config": "b", "model": "m"}, "w").fingerprint


def test_weights_and_format_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = Namespace(FACTS, "w").fingerprint
    assert Namespace(FACTS, "v").fingerprint != fingerprint
    monkeypatch.setattr(keys, "FORMAT_VERSION", keys.FORMAT_VERSION + 1)
    assert Namespace(FACTS, "w").fingerprint != fingerprint


def test_a_private_namespace_is_nobody_elses() -> None:
    namespace = Namespace(FACTS, "w", altered=frozenset({"dtype"}))
    once, again = namespace.private(), namespace.private()
    assert len({each.fingerprint for each in (namespace, once, again)}) == 3
    assert once.facts == FACTS


def test_variants_of_keys() -> None:
    plain = [b"a", b"b"]
    first, second = variant_keys(plain, b"1 adapter"), variant_keys(plain, b"2 adapter")
    assert len({*plain, *first, *second}) == 6
    assert first == variant_keys(plain, b"1 adapter")


def test_keys_of_layer_groups() -> None:
    """The first group's are the engine's; no two are the same, and each says what it is of."""
    engines = [bytes(range(32)), bytes(range(1, 33))]
    pairs = [(key, group) for key in engines for group in (0, 1, 7)]
    named = [group_key(key, group) for key, group in pairs]
    assert len(set(named)) == len(named)
    assert [named[0], named[3]] == engines
    assert [group_of(key) for key in named] == pairs
