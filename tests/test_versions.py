"""The command that runs the end-to-end tests with every version of vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import versions
from tests.versions import Run, main, read

REPORT = """<testsuites><testsuite tests="4" time="12.5">
<testcase classname="tests.e2e.test_a" name="test_one" time="1"/>
<testcase classname="tests.e2e.test_a" name="test_two" time="1"><failure message="no"/></testcase>
<testcase classname="tests.e2e.test_a" name="test_three" time="1"><error message="no engine"/></testcase>
<testcase classname="tests.e2e.test_a" name="test_four" time="1"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    run = read(report, "0.30.1")
    assert run == Run("0.30.1", 1, 2, 1, 12.5, ["tests.e2e.test_a.test_two", "tests.e2e.test_a.test_three"])
    assert not run.good


@pytest.mark.parametrize(("run", "code"), [(Run("x", 3, 0, 1, 1.0, []), 0), (Run("x", 0, 0, 0, 0.0, []), 1)])
def test_the_exit_code_says_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, code: int
) -> None:
    """No test at all is not well either."""
    asked: list[tuple[str, list[str]]] = []

    def fake(minor: str, arguments: list[str]) -> Run:
        asked.append((minor, arguments))
        return run

    monkeypatch.setattr(versions, "run", fake)
    monkeypatch.setattr(versions, "BUILD", tmp_path)
    assert main(["0.31", "--", "-k", "onboard"]) == code
    assert asked == [("0.31", ["-k", "onboard"])]
    assert '"pytest": [\n  "-k",\n  "onboard"\n ]' in (tmp_path / "versions.json").read_text()


def test_a_version_that_is_not_served_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["0.28"]) == 2
    assert "0.28" in capsys.readouterr().err
