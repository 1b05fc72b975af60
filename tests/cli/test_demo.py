"""The demo's conversations and its sums."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from kvbm.cli.demo import report
from kvbm.cli.demo.conversations import conversations, cut
from kvbm.core.errors import KvbmError


def count(text: str) -> int:
    return -(-len(text) // 4)


def turn(user: int, number: int, ttft_ms: float, text: str = "same", **tokens: int) -> report.Turn:
    sums = {"prompt_tokens": 100, "known_tokens": 0, "device_tokens": 0, "g2_tokens": 0} | tokens
    return report.Turn(user=user, turn=number, ttft_ms=ttft_ms, text=text, **sums)


SETTINGS = {"users": 2, "device_tokens": 100, "working_set_tokens": 400}


def restart(ttft_ms: float, text: str = "same", g3_tokens: int = 0) -> report.Restart:
    last = turn(1, 2, ttft_ms, text, prompt_tokens=150, known_tokens=110, g2_tokens=g3_tokens)
    return report.Restart(last, 32.0, g3_tokens)


def demo(
    *,
    answer: str = "same",
    g2_tokens: int = 96,
    control: report.Same | None = None,
    restarted: report.Restart | None = None,
) -> report.Demo:
    plain = [
        turn(1, 1, 1000),
        turn(2, 1, 2000),
        turn(1, 2, 1000, prompt_tokens=150, known_tokens=110),
        turn(2, 2, 3000, prompt_tokens=150, known_tokens=110, device_tokens=32),
    ]
    kvbm = [
        turn(1, 1, 1100),
        turn(2, 1, 2100),
        turn(1, 2, 100, prompt_tokens=150, known_tokens=110, g2_tokens=g2_tokens),
        turn(
            2, 2, 300, answer, prompt_tokens=150, known_tokens=110, device_tokens=32, g2_tokens=max(0, g2_tokens - 32)
        ),
    ]
    return report.Demo(
        SETTINGS,
        report.Run(plain, 30.0, restart(1200)),
        report.Run(kvbm, 31.0, restarted or restart(300, g3_tokens=128), {"down": 3_000_000, "up": 2_000_000}),
        control or report.Same(2, 2),
    )


def test_sums() -> None:
    written = json.loads(json.dumps(report.record(demo())))
    assert (written["ok"], written["problem"]) == (True, None)
    assert written["identical"] == {"same": 4, "of": 4}
    assert written["control"] == {"same": 2, "of": 2}
    assert written["ttft_ratio_later"] == pytest.approx(200 / 2000)
    plain, kvbm = written["runs"]["plain"], written["runs"]["kvbm"]
    assert plain["tokens"] == {"prompt": 500, "device": 32, "g2": 0, "computed": 468, "computed_again": 110 + 78}
    assert kvbm["tokens"] == {"prompt": 500, "device": 32, "g2": 160, "computed": 308, "computed_again": 14 + 14}
    assert plain["ttft_ms"]["1"] == {"median": 1500, "p95": 1950}
    assert plain["ttft_ms"]["later"] == plain["ttft_ms"]["2"] == {"median": 2000, "p95": 2900}
    assert (plain["bytes"], kvbm["bytes"]) == (None, {"down": 3_000_000, "up": 2_000_000})
    assert kvbm["turns"][2]["g2_tokens"] == 96
    assert written["ttft_ratio_restart"] == pytest.approx(300 / 1200)
    after = kvbm["restart"]
    assert (after["start_s"], after["g3_tokens"], after["identical"]) == (32.0, 128, True)
    assert (after["turn"]["user"], after["turn"]["turn"], after["turn"]["ttft_ms"]) == (1, 2, 300)
    assert plain["restart"]["g3_tokens"] == 0


def test_more_found_than_known_is_nothing_again() -> None:
    assert turn(1, 1, 1, prompt_tokens=64, known_tokens=30, g2_tokens=32).computed_again_tokens == 0


def test_answers_that_differ_fail() -> None:
    result = demo(answer="other", control=report.Same(1, 2))
    assert result.problem() == (
        "only 3/4 answers with KVBM are those of the engine alone (the engine against itself: 1/2 identical)"
    )
    assert report.record(result)["ok"] is False


def test_no_hit_fails() -> None:
    assert demo(g2_tokens=0).problem() == "nothing was found in G2 after the first turn"


def test_nothing_from_disk_fails() -> None:
    assert demo(restarted=restart(300)).problem() == "nothing came from disk (G3) after the restart"


def test_another_answer_after_the_restart_fails() -> None:
    result = demo(restarted=restart(300, "other", g3_tokens=128))
    assert result.problem() == "the answer after the restart is not the one from before"
    assert report.record(result)["runs"]["kvbm"]["restart"]["identical"] is False


def test_runs_of_different_length_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.Demo(
            SETTINGS, report.Run([turn(1, 1, 1)], 1, restart(1)), report.Run([], 1, restart(1)), report.Same(0, 0)
        )


def test_table() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(report.table(demo()))
    shown = " ".join(out.getvalue().split())
    for text in (
        "2 users taking turns; the device cache holds 25% of what they talk about",
        "turn 1: median / p95 │ 1,500 / 1,950 ms │ 1,600 / 2,050 ms",
        "all later turns: median / p95 │ 2,000 / 2,900 ms │ 200 / 290 ms",
        "of those computed again │ 188 │ 28",
        "found in host memory (G2) │ 0 │ 160",
        "bytes moved to / from G2 │ - │ 3 MB / 2 MB",
        "first request after a crash: time to first token │ 1,200 ms │ 300 ms",
        "of its prompt found on disk (G3) │ 0 of 150 │ 128 of 150",
        "identical answers │ 2/2 (asked twice) │ 4/4",
        "after the crash, as before it │ yes │ yes",
    ):
        assert text in shown


@pytest.mark.parametrize(("users", "tokens"), [(4, 1400), (32, 1400), (32, 200), (4, 6000)])
def test_every_user_has_a_document_of_their_own(users: int, tokens: int) -> None:
    talks = conversations(users, 3, tokens, count)
    assert [talk.user for talk in talks] == list(range(users))
    assert len({talk.document[:100] for talk in talks}) == users
    for talk in talks:
        assert tokens * 0.95 <= count(talk.document) <= tokens
        assert talk.says(0) == f"{talk.document}\n\n{talk.questions[0]}"
        assert talk.says(1) == talk.questions[1]


def test_questions_start_again_when_they_run_out() -> None:
    (talk, _) = conversations(2, 8, 200, count)
    assert talk.questions[6:] == talk.questions[:2]


def test_not_enough_text() -> None:
    with pytest.raises(KvbmError, match=r"text for \d+ users only"):
        conversations(1000, 3, 6000, count)


def test_cut_never_exceeds_the_text() -> None:
    assert cut("short", 1000, count) == "short"
    assert cut("", 10, count) == ""
