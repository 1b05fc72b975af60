import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvbm.cli import serve
from kvbm.cli.main import app
from kvbm.transfer.nixl import agent
from tests.cli.conftest import Engine


def findings(*options: str) -> dict[str, tuple[bool, str]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *options])
    assert result.exit_code == 0, result.output
    return {finding["what"]: (finding["ok"], finding["says"]) for finding in json.loads(result.output)}


def test_what_is_missing_is_a_finding_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "WHEEL", "no-such-wheel")
    found = findings()
    assert "pip install --no-deps nixl-cu12" in found["NIXL"][1]
    assert not found["NIXL"][0]
    assert "io_uring" in found


def test_the_folder_of_the_disk_tier_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "WHEEL", "no-such-wheel")
    monkeypatch.setenv("KVBM_G3_DIR", str(tmp_path))
    assert f"direct I/O in {tmp_path}" in findings()


@pytest.mark.e2e  # no engine, but a process for each backend
def test_backends_are_tried() -> None:
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    found = findings()
    assert found["NIXL UCX: memory of other instances"][0]
    assert "B/s" in found["NIXL UCX: memory of other instances"][1]


@pytest.mark.e2e
def test_people_get_a_table() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "io_uring" in result.output


def test_engines_say_what_is_wrong_with_them(
    kvbm: Callable[..., Result], engine: Callable[..., Engine], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "WHEEL", "no-such-wheel")
    monkeypatch.setenv("KVBM_RUN_DIR", str(run_dir))
    assert findings()["engines"] == (True, f"none answers in {run_dir}")
    health = {"healthy": True, "problems": [], "degraded": {}, "paused": False}
    for name, said in {
        "good": health,
        "paused": health | {"paused": True},
        "ill": health | {"healthy": False, "problems": ["rank 0: a copy thread died"]},
        "poor": health | {"degraded": {"g3": "disk full"}},
        "small": health | {"smaller": {"g2": "G2 stays at 1.00 GB of 6.00 GB"}},
        "alone": health | {"namesakes": ["on disk, x: hash.seed is 1 there, 0 here"]},
    }.items():
        engine(name, lambda _, said=said: {"ok": True, "result": said})
    engine("odd", lambda _: {"ok": False, "error": "it is busy"})
    found = findings()
    assert {name: found[f"engine {name}"] for name in ("good", "paused", "ill", "poor", "small", "odd")} == {
        "good": (True, "healthy"),
        "paused": (True, "paused"),
        "ill": (False, "rank 0: a copy thread died"),
        "poor": (False, "G3 is not used: disk full"),
        "small": (False, "G2 stays at 1.00 GB of 6.00 GB"),
        "odd": (False, "it is busy"),
    }
    assert found["engine alone"] == (True, "healthy")
    assert found["namespace of alone"] == (False, "on disk, x: hash.seed is 1 there, 0 here")


def test_what_serve_would_be_given_is_looked_at(
    kvbm: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "WHEEL", "no-such-wheel")
    monkeypatch.setattr(serve, "installed_engine", lambda: ("0.32.0", "cpu"))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").touch()
    told = findings(str(tmp_path), "--block-size", "32")[f"model {tmp_path}"]
    assert told == (True, "nothing that shows before the start is wrong")
    wrong = kvbm("doctor", str(tmp_path), "--pipeline-parallel-size", "2")
    assert (wrong.exit_code, wrong.stdout, wrong.stderr) == (1, "", kvbm("serve", str(tmp_path), "-pp", "2").stderr)
    assert "KVBM does not serve pipeline parallelism" in wrong.stderr
