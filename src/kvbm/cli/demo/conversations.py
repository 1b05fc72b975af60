"""What the users of the demo talk about: long real text that every Python ships."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from kvbm.core.errors import KvbmError

QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Which part of it matters most to a beginner, and why?",
    "Give one example of its use.",
    "What is easily misunderstood in it?",
    "Sum it up in five words.",
    "What should one read next?",
)

CountTokens = Callable[[str], int]

_CHARACTERS_PER_TOKEN = 5
"""More than any tokenizer needs for this text, so that a slice is cut down and never too short."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user: a document of their own, and a question for each turn."""

    user: int
    document: str
    questions: tuple[str, ...]

    def says(self, turn: int) -> str:
        """The user's message of turn 0, 1, ...: the document comes with the first."""
        question = self.questions[turn]
        return f"{self.document}\n\n{question}" if turn == 0 else question


def conversations(users: int, turns: int, tokens: int, count: CountTokens) -> list[Conversation]:
    """`users` conversations of `turns` turns, each about a text of about `tokens` tokens, as `count` counts them.

    No two begin alike, so that no user finds another's blocks. Raises KvbmError when there is not enough of it.
    """
    slices = list(itertools.islice(_slices(tokens * _CHARACTERS_PER_TOKEN), users))
    if len(slices) < users:
        raise KvbmError(f"there is text for {len(slices)} users only: give fewer --users or fewer --document-tokens")
    questions = tuple(itertools.islice(itertools.cycle(QUESTIONS), turns))
    return [Conversation(user, cut(text, tokens, count), questions) for user, text in enumerate(slices)]


def cut(text: str, tokens: int, count: CountTokens) -> str:
    """The beginning of `text` that has about `tokens` tokens."""
    return text[: min(len(text), len(text) * tokens // max(1, count(text)))]


def _slices(width: int) -> Iterator[str]:
    """Pieces of `width` characters that do not overlap: the first of every long topic, then the second ..."""
    for start in itertools.count(step=width):
        long_enough = [topics[name] for name in sorted(topics) if len(topics[name]) >= start + width]
        if not long_enough:
            return
        for text in long_enough:
            yield text[start : start + width]
