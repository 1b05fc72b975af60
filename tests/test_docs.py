"""The documentation names what there is."""

from __future__ import annotations

import ast
import doctest
import gc
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from prometheus_client import CollectorRegistry

from kvbm.blocks import Pool
from kvbm.cli.main import app
from kvbm.core.config import UPSTREAM, Settings
from kvbm.observe.prometheus import KvbmCollector, Sources
from kvbm.observe.totals import Totals
from kvbm.policy.lru import LRU
from tests.marks import apart

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def default_of(name: str) -> str:
    """As it stands in docs/settings.md."""
    if name == "run_dir":  # depends on the environment
        return "$XDG_RUNTIME_DIR/kvbm"
    if name == "cache_dir":
        return "~/.cache/kvbm"
    default = Settings.model_fields[name].default
    if default in (None, ""):
        return "unset" if default is None else "empty"
    return str(default).lower() if isinstance(default, bool) else str(default)


def code(page: Path) -> list[str]:
    """What stands in code blocks and between backticks."""
    blocks = page.read_text().split("```")
    return [line for block in blocks[1::2] for line in block.splitlines()] + re.findall(
        r"`([^`]+)`", "".join(blocks[::2])
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_row(name: str) -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    row = re.search(rf"\n\| `{name}` \| `{re.escape(default_of(name))}` \| [^|]+ \| (.+) \|\n", page)
    assert row
    description = Settings.model_fields[name].description
    assert description
    assert row[1].replace("`", "").startswith(description.replace("`", ""))


def test_every_upstream_variable_has_its_row() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for variable, name in UPSTREAM.items():
        assert f"\n| `{variable}` | `{name}` |" in page


def test_every_metric_has_its_row() -> None:
    page, pool = (ROOT / "docs" / "metrics.md").read_text(), Pool(1, order=LRU(1))
    registry = CollectorRegistry()
    pools = {"g2": vars_of(pool)}
    sources = Sources(totals=Totals(), block_tokens=32, healthy=bool, tiers=dict, pools=lambda: pools, lower=dict)
    registry.register(KvbmCollector(sources))
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = {"unknown": "untyped"}.get(family.type, family.type)
        assert f"\n| `{name}` | {kind} | " in page, name


def vars_of(pool: Pool) -> dict[str, int]:
    now = pool.statistics()
    return {name: getattr(now, name) for name in now.__slots__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_targets_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    commands = set(group.commands)  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in code(page):
        if match := re.match(r"kvbm ([a-z]\w*)", text):
            assert match[1] in commands, text
        for target in re.findall(r"\bmake ([a-z][\w-]*)", text):
            assert any(fnmatch(target, known.replace("%", "*")) for known in targets), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_way_of_a_block_names_what_there_is() -> None:
    """docs/architecture.md follows a block by file and function."""
    members: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "kvbm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                defined = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                members.setdefault(node.name, set()).update(defined)
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", page)
    assert len(named) > 20
    assert [f"{cls}.{name}" for cls, name in named if name not in members.get(cls, ())] == []


OPENINGS = re.compile(r"(?:^|[.:] |[\"'|(]|- )Who |\b(?:[Ww]hoever|for who|[Oo]f so many)\b", re.MULTILINE)
"""Of sentences, and within them, that leave open who does something."""


@pytest.mark.parametrize("folder", ["docs", "src/kvbm", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_sentences_say_who(folder: str) -> None:
    root = ROOT / folder
    for page in [root] if root.is_file() else [each for end in ("md", "py", "svg") for each in root.rglob(f"*.{end}")]:
        found = [page.read_text()[match.start() : match.end() + 40] for match in OPENINGS.finditer(page.read_text())]
        assert not found, page


# -- code on the pages --

CODE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = [ROOT / "docs" / "tutorial.md"]


def run(text: str, folder: Path, name: str) -> int:
    """Run the code blocks of a page in order, as a reader does who types them; returns how many.

    A block that begins with `# NAME.py` is a file, one of prompts is an interactive session, `sh` is a command.
    """
    names: dict[str, object] = {"__name__": name}
    blocks = list(CODE.finditer(text))
    for block in blocks:
        language, source, line = block[1], block[2], text.count("\n", 0, block.start(2))
        if language == "sh":
            command = [sys.executable if word == "python" else word for word in source.split()]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
        elif file := re.match(r"# (\w+\.py)\n", source):
            (folder / file[1]).write_text(source)
        elif source.startswith(">>> "):
            session = doctest.DocTestParser().get_doctest(source, {}, name, name, line)
            session.globs = names
            doctest.DebugRunner(optionflags=doctest.ELLIPSIS).run(session, clear_globs=False)
        else:
            exec(compile("\n" * line + source, name, "exec"), names)
    return len(blocks)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader saves files and starts Python."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mru", raising=False)
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
@apart
def test_code_runs(page: Path, folder: Path) -> None:
    text = page.read_text()
    assert run(text, folder, page.name) == text.count("```python") + text.count("```sh\n") > 0


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("\n[4]\n", "\n[3]\n", doctest.DocTestFailure),  # another output
        (">>> weak.upgrade() is None", ">>> weak.oops", doctest.UnexpectedException),  # an error nobody announced
        ("there is no 'newest'", "there is no 'oldest'", doctest.DocTestFailure),  # another error
        ("return MRU(self._num_slots)", "return self", AssertionError),  # a policy that breaks the contract
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@apart
def test_wrong_code_is_found(old: str, new: str, error: type[Exception], folder: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    assert text.count(old) == 1, old
    with pytest.raises(error):
        run(text.replace(old, new), folder, "tutorial.md")
    gc.collect()  # what the page held when it stopped is forgotten here, where that is expected


# -- the reference --


def modules(*names: str) -> Iterator[ModuleType]:
    """These, and what is public in them."""
    for name in names:
        module = importlib.import_module(name)
        yield module
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not found.name.startswith("_"):
                yield from modules(f"{name}.{found.name}")


def undocumented(module: ModuleType) -> Iterator[str]:
    """What is public, defined here, and has no docstring, nor overrides anything that has one."""
    if not module.__doc__:
        yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            if not value.__dict__.get("__doc__"):
                yield f"{module.__name__}.{name}"
            for member, attribute in vars(value).items():
                described = inspect.isroutine(attribute) or isinstance(attribute, property)
                if described and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                    yield f"{module.__name__}.{name}.{member}"
        elif inspect.isfunction(value) and not value.__doc__:
            yield f"{module.__name__}.{name}"


def test_everything_public_has_a_docstring() -> None:
    found = list(modules("kvbm.blocks", "kvbm.policy", "kvbm.abc.policy"))
    assert len(found) > 15
    assert [name for module in found for name in undocumented(module)] == []


BARE = """
class C:
    def f(self): "says"
    def g(self): pass
class D(C):
    "says"
    def f(self): pass
def h(): pass
"""


def test_a_missing_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bare")
    monkeypatch.setitem(sys.modules, "bare", module)
    exec(BARE, vars(module))
    assert list(undocumented(module)) == ["bare", "bare.C", "bare.C.g", "bare.h"]


@apart
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    match = re.search(r"^REFERENCE := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match
    command = [sys.executable, "-W", "error", "-m", "pdoc", "--output-directory", str(tmp_path), *match[1].split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "Hold the longest prefix" in (tmp_path / "kvbm" / "blocks.html").read_text()
