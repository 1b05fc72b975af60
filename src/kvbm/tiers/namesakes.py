"""Other namespaces of what seems to be the same model: which facts keep their blocks from being found here.

An engine that finds nothing after a restart is the silent failure of every cache. So what lies on disk, or is shared by
living instances, is compared fact by fact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kvbm.core.keys import Namespace

_ALIKE: Final = 0.75
"""The part of all facts that two namespaces of the same model share, at least."""
_SAYS, _FACTS, _LONGEST, _BEFORE = 2, 4, 60, 20
"""Namespaces that are spoken of, facts of each, characters of a fact, and how many of these are before what differs."""


NAME: Final = "model"
"""What people call a namespace's model: told with the facts of one on disk, and none of them."""


def unnamed(facts: Mapping[str, object]) -> dict[str, object]:
    """Those that two namespaces can differ in."""
    return {fact: value for fact, value in facts.items() if fact != NAME}


class Namesake(NamedTuple):
    """Another namespace: where it is, in words, and its facts."""

    where: str
    facts: Mapping[str, object]


def facts_of(namespace: Namespace) -> dict[str, object]:
    """All that two namespaces can differ in."""
    return {**namespace.facts, "weights": namespace.weights}


def told(mine: Mapping[str, object], others: Iterable[Namesake]) -> list[str]:
    """A sentence about each of the likest of `others` that are of the same model: why its blocks are not found here."""
    alike = []
    for other in others:
        names = mine.keys() | other.facts.keys()
        differ = sorted(
            name
            for name in names
            if (name in mine, str(mine.get(name))) != (name in other.facts, str(other.facts.get(name)))
        )
        if differ and 1 - len(differ) / len(names) >= _ALIKE:
            alike.append((len(differ), other, differ))
    alike.sort(key=lambda each: each[0])
    sentences = [
        f"{other.where}: blocks of what seems to be this model, not found here: {_differences(mine, other, differ)}"
        for _, other, differ in alike[:_SAYS]
    ]
    if sentences and len(alike) > _SAYS:
        sentences[-1] += f" ({len(alike) - _SAYS} more such namespaces)"
    return sentences


def _differences(mine: Mapping[str, object], other: Namesake, names: list[str]) -> str:
    said = [_apart(name, _of(other.facts, name), _of(mine, name)) for name in names[:_FACTS]]
    more = len(names) - _FACTS
    return "; ".join(said) + (f"; and {more} more" if more > 0 else "")


def _apart(name: str, there: str, here: str) -> str:
    """How two facts differ, as far as it is shown: from shortly before the first character that does."""
    pairs = enumerate(zip(there, here, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(there), len(here)))
    first = max(0, same - _BEFORE) if max(len(there), len(here)) > _LONGEST else 0
    return f"{name} is {_shown(there, first)} there, {_shown(here, first)} here"


def _shown(text: str, first: int) -> str:
    part = text[first : first + _LONGEST]
    return ("..." if first else "") + part + ("..." if first + _LONGEST < len(text) else "")


def _of(facts: Mapping[str, object], name: str) -> str:
    """A fact in one line: what others wrote is not trusted to be that."""
    if name not in facts:
        return "not there"
    return "".join(each if each.isprintable() else "?" for each in str(facts[name]))
