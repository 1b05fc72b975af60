"""Tests judge what is public: how many of them use a private name of the package, and where."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.untouched import belongs

ROOT = Path(__file__).parent.parent
INNER = {"leader", "worker", "tiers", "link", "control", "build"}
MOST = 36
"""Uses outside of `INNER`. Only to be made fewer."""
NOT_OURS = {
    ("tests/build/whole.py", "_disk"),  # given to a worker for suites that judge a restructuring
    ("tests/connect/test_guard.py", "_end"),  # of connect/
    ("tests/decisions/history.py", "_leases"), ("tests/decisions/history.py", "_said"),  # its own
    ("tests/tiers/peers/test_promises.py", "_BACKOFF_S"),  # so named for tests/corrupt.py, a suite that judges
    ("tests/tiers/peers/test_session.py", "_transport"),  # asyncio's
}  # fmt: skip
"""Names that the inner packages have, too."""


def name_of(node: ast.AST) -> str | None:
    """The name that a node gives something: an attribute, a class, a function, a module's constant."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
        return node.attr if isinstance(node, ast.Attribute) else node.id
    return None


def private(name: str) -> bool:
    return len(name) > 1 and name.startswith("_") and not name.startswith("__")


def names() -> dict[str, set[str]]:
    """Private names of the package -> the folders in which they are."""
    found = defaultdict[str, set[str]](set)
    package = ROOT / "src" / "kvbm"
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (name := name_of(node)) is not None and private(name):
                found[name].add(path.relative_to(package).parts[0])
    return found


def uses(tree: ast.AST) -> Iterator[str]:
    """Private names that are taken from something but `self` and `cls`, imported, or said in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvbm"):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"([\w.]+\.)?_\w+", str(node.value)):
            yield str(node.value).rpartition(".")[2]


def test_no_private_name_of_the_inner_packages() -> None:
    """Suites that judge a restructuring are left as they are, and reach old names through `tests.before`."""
    known, inner, others = names(), list[tuple[str, str]](), 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if belongs(where) or where in ("tests/before.py", "tests/test_private.py"):
            continue
        for name in uses(ast.parse(path.read_text())):
            if private(name) and name in known and (where, name) not in NOT_OURS:
                if known[name] & INNER:
                    inner.append((where, name))
                else:
                    others += 1
    assert inner == []
    assert others <= MOST


def test_a_private_name_is_seen() -> None:
    tree = ast.parse('from kvbm.x import _a\nb._c = self._d\nsetattr(e, "_f", 1)\npatch("kvbm.x._g")\n')
    assert [name for name in uses(tree) if private(name)] == ["_a", "_c", "_f", "_g"]
