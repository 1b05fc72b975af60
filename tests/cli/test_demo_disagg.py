"""What the demo of disaggregated serving says of what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvbm.cli.demo.disagg import Disagg
from kvbm.cli.demo.report import Turn
from kvbm.cli.demo.run import show

PLAIN = [Turn(1, turn, 100 * turn, 0, 0, 0, 2000.0, f"answer {turn}", 60.0) for turn in (1, 2, 3)]
SPLIT = [replace(turn, g2_tokens=turn.prompt_tokens - 20, ttft_ms=300.0) for turn in PLAIN]


def test_it_succeeds_when_answers_are_the_same_and_blocks_came() -> None:
    result = Disagg(PLAIN, SPLIT, 9)
    assert result.problem() is None
    assert result.computed == [20, 20, 20]
    assert result.record()["identical"] == {"same": 3, "of": 3}
    console = Console(width=120, record=True)
    console.print(result.table())
    text = console.export_text()
    for shown in ("2,000", "300", "600", "60", "9", "3/3"):
        assert shown in text


@pytest.mark.parametrize("as_json", [False, True])
def test_figures_go_into_a_file_and_to_who_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    result = Disagg(PLAIN, SPLIT, 9)
    show(result.record(), result.table(), tmp_path / "figures.json", as_json)
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == result.record()
    if as_json:
        assert json.loads(out) == result.record()
    else:
        assert "identical answers" in out
        assert str(tmp_path) in out.replace("\n", "")


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (Disagg(PLAIN, [*SPLIT[:2], replace(SPLIT[2], text="another")], 9), "only 2/3 answers"),
        (Disagg(PLAIN, SPLIT, 0), "nothing came"),
        (Disagg(PLAIN, [*SPLIT[:2], replace(SPLIT[2], g2_tokens=260)], 9), "computed 40 tokens"),
    ],
)
def test_it_fails_with_a_sentence(result: Disagg, why: str) -> None:
    assert why in (result.problem() or "")
