"""What is said about blocks of the same model that are in another namespace."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kvbm.build import disk as build_disk
from kvbm.build.parts import Ground
from kvbm.build.place import Place
from kvbm.core.config import Settings
from kvbm.core.keys import Namespace
from kvbm.tiers.namesakes import Namesake, facts_of, told

FACTS = {f"shape.{number}": str(number) for number in range(20)} | {"hash.seed": "0", "dtype": "bfloat16"}


def test_each_fact_that_differs_is_named() -> None:
    here = facts_of(Namespace(FACTS, "w"))
    assert told(here, [Namesake("on disk, x", here)]) == []
    (sentence,) = told(here, [Namesake("on disk, x", here | {"hash.seed": "1"})])
    assert sentence.endswith("not found here: hash.seed is 1 there, 0 here")
    assert sentence.startswith("on disk, x: ")
    (sentence,) = told(here, [Namesake("x", {name: here[name] for name in here if name != "dtype"} | {"weights": "v"})])
    assert sentence.endswith("dtype is not there there, bfloat16 here; weights is v there, w here")


def test_another_model_is_none_of_its_business() -> None:
    assert told(FACTS, [Namesake("x", dict.fromkeys(FACTS, "another")), Namesake("y", {"model": "m"})]) == []


def test_what_is_said_is_bounded_and_one_line() -> None:
    six = {f"shape.{number}": "x" * 1000 + f"\n{number}" for number in range(5)}
    sentences = told(FACTS, [Namesake(f"n{number}", FACTS | six) for number in range(20)])
    assert len(sentences) == 2
    assert all(len(each) < 800 and each.isprintable() for each in sentences)
    assert "and 1 more" in sentences[0]
    assert sentences[1].endswith("(18 more such namespaces)")


@pytest.mark.parametrize("stored", [False, True])
def test_the_disk_says_it_once_and_only_where_nothing_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    settings = Settings(g3_blocks=64)

    def start(seed: str) -> build_disk.FolderFound:
        namespace = Namespace(FACTS | {"hash.seed": seed}, "w")
        nobody: Any = None
        ground = Ground(settings, Place("e", 1), nobody, nobody, {0: nobody}, 4096)
        found = build_disk.find(ground, build_disk.Folder.claim(tmp_path, "e"), namespace)
        found.folder.close()
        return found

    first = start("0")
    assert first.namesakes == ()
    assert json.loads((first.folder.path / "meta.json").read_text())["facts"]["weights"] == "w"
    if stored:
        recover = build_disk.NamespaceFolder.recover

        def some(folder: build_disk.NamespaceFolder) -> object:
            found = recover(folder)
            return type("Some", (), {"slots": [1], "next_sequence": found.next_sequence})

        monkeypatch.setattr(build_disk.NamespaceFolder, "recover", some)
    with caplog.at_level(logging.WARNING):
        second = start("1")
    if stored:
        assert not [each for each in caplog.messages if each.startswith("KVBM: ")]
        return
    assert second.namesakes == (
        f"on disk, {first.folder.path}: blocks of what seems to be this model, not found here: "
        "hash.seed is 0 there, 1 here",
    )
    assert [each for each in caplog.messages if "not found" in each] == [f"KVBM: {second.namesakes[0]}"]
