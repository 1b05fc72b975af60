"""The warning about NVIDIA's package of the same import name."""

from __future__ import annotations

from importlib import metadata

import pytest

from kvbm.core import identity


def test_silent_when_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert identity.clash() is None


def test_says_which_one_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"kvbm": "1.6.1"}[name])
    sentence = identity.clash()
    assert sentence is not None
    assert "kvbm 1.6.1" in sentence
    assert "Running: pykvbm, from " in sentence
