"""An engine in a container as people make them: no HOME, a user who has no name, a root file system that cannot be
written, output in ASCII; and a model and a disk folder whose names have spaces and letters of other languages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Engine

MODEL, DISK = "Größe 模型 \U0001f9ca v1.0", "Blöcke auf Platte 磁盘"
ROOT = Path(__file__).parents[2]
INSIDE = """
mount --bind "$1" "$1" && mount -o remount,bind,ro / || exit 77
shift
exec unshare -U --map-user=1234567 --map-group=0 env -i "$@"
"""


def answers(model: Path, disk: Path | None) -> dict[str, object]:
    """What an engine says to three prompts, twice, and what it had from where the second time."""
    settings = {"g3_dir": str(disk), "g3_blocks": 256, "g2_blocks": 64, "run_dir": None}
    engine = Engine(model, settings if disk is not None else None)
    prompts = [[7 + (17 * at + 31 * which) % 1000 for at in range(200)] for which in range(3)]
    try:
        first = [done.tokens for done in engine.run(prompts, 16)]
        if disk is not None:
            engine.settle()
            while engine.status()["demote"]["in_flight"]:
                engine.leader.tick()
                time.sleep(0.01)
        engine.forget_device()
        again = engine.run(prompts, 16)
        said: dict[str, object] = {"first": first, "again": [done.tokens for done in again]}
        if disk is not None:
            said |= {"cached": [done.cached for done in again], "status": engine.status()}
    finally:
        engine.close()
    return said


def inside(folder: Path, *command: str, locale: str = "C.UTF-8") -> subprocess.CompletedProcess[str]:
    """Runs it where nothing but `folder` can be written. In the locale C torch itself cannot be imported."""
    tmp = folder / "t"
    tmp.mkdir(exist_ok=True)
    tmp.chmod(0o777)
    environment = {
        "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "ascii", "LC_ALL": locale, "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }  # fmt: skip
    variables = [f"{name}={value}" for name, value in environment.items()]
    outer = ["unshare", "-rm", "sh", "-c", INSIDE, "sh", str(folder), *variables, *command]
    return subprocess.run(outer, capture_output=True, check=False, encoding="ascii", errors="backslashreplace")


@pytest.fixture
def place(tiny: Path) -> Iterator[Path]:
    # A short path: vLLM makes sockets below it.
    with tempfile.TemporaryDirectory(prefix="odd") as folder:
        yield prepared(Path(folder), tiny)


def prepared(tmp_path: Path, tiny: Path) -> Path:
    tried = inside(tmp_path, "true")
    if tried.returncode != 0:
        pytest.skip(f"this kernel lets no user make the root file system read-only for itself: {tried.stderr[-200:]}")
    assert inside(tmp_path, "touch", str(ROOT / "written")).returncode != 0
    shutil.copytree(tiny, tmp_path / MODEL)
    (tmp_path / DISK).mkdir()
    return tmp_path


def test_it_serves_and_hits_wherever_it_is(place: Path) -> None:
    said = {}
    for kind, disk in (("plain", None), ("kvbm", place / DISK), ("restarted", place / DISK)):
        arguments = [str(place / MODEL), *([str(disk)] if disk else [])]
        done = inside(place, sys.executable, str(Path(__file__)), str(place / kind), *arguments)
        assert done.returncode == 0, f"{kind}: {(done.stdout + done.stderr)[-5000:]}"
        said[kind] = json.loads((place / kind).read_text())
        # vLLM's own logging cannot write such names, and says so with stack traces.
        assert "/src/kvbm/" not in done.stdout + done.stderr, (done.stdout + done.stderr)[-5000:]
    plain = said.pop("plain")
    for kind, each in said.items():
        assert each["first"] == each["again"] == plain["first"], kind
        assert min(each["cached"]) >= 160, kind
        assert each["status"]["healthy"], each["status"]
    assert said["restarted"]["status"]["tokens"]["g3"] > 0, "from the disk, after a restart"
    for command in (["disk", "inspect", str(place / DISK), "--json"], ["doctor"], ["config"]):
        done = inside(place, sys.executable, "-m", "kvbm.cli.main", *command, locale="C")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr


if __name__ == "__main__":
    result = answers(Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    Path(sys.argv[1]).write_text(json.dumps(result))
