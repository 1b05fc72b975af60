"""`python -m tests.untouched COMMIT [COMMIT]`: are the suites that judge a restructuring the same in both, but
for their imports?

Compares syntax trees, so that comments and line breaks do not count. Without a second commit it is the working tree.
Ends with 1 where a file is gone or touched in more than its imports, and prints how its tree differs. Names new files.
"""

from __future__ import annotations

import ast
import difflib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITES = (
    "tests/blocks", "tests/native", "tests/stores", "tests/transfer", "tests/e2e",
    "test_lower_machine.py", "test_lower_whole.py", "test_leader.py", "test_hybrid.py", "peers/test_whole.py",
    "corrupt.py", "crash.py",
)  # fmt: skip
"""Folders by their path. Files by their name, or the end of their path: they move with what they test."""


def belongs(path: str) -> str | None:
    """By what name a file belongs to the suites: its path in a folder of them, or its entry."""
    if not path.endswith(".py") or path == "tests/build/test_leader.py":  # that is a new one, of the composition root
        return None
    if any(path.startswith(f"{suite}/") for suite in SUITES):
        return path
    return next((suite for suite in SUITES if suite.endswith(".py") and path.endswith(f"/{suite}")), None)


def without_imports(text: str) -> list[str]:
    """The syntax tree of a file, without its imports, wherever they are."""

    class Without(ast.NodeTransformer):
        def visit_Import(self, _: ast.Import) -> None:
            return None

        def visit_ImportFrom(self, _: ast.ImportFrom) -> None:
            return None

    tree = Without().visit(ast.parse(text))
    return ast.dump(tree, indent=1).splitlines()


def suites(commit: str | None) -> dict[str, tuple[str, str]]:
    """Path and text of each file of the suites in a commit, or in the working tree."""
    command = ["ls-files", "--", "tests"] if commit is None else ["ls-tree", "-r", "--name-only", commit, "--", "tests"]
    found: dict[str, tuple[str, str]] = {}
    for path in _git(*command).splitlines():
        if (name := belongs(path)) is not None and (commit is not None or (ROOT / path).exists()):
            text = (ROOT / path).read_text() if commit is None else _git("show", f"{commit}:{path}")
            found[name] = path, text
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main(before: str, after: str | None = None) -> int:
    """See the module."""
    old, new = suites(before), suites(after)
    wrong = sorted(old.keys() - new.keys())
    for name in sorted(old.keys() ^ new.keys()):
        print(f"{name} is {'gone' if name in old else 'new'}")
    for name in sorted(old.keys() & new.keys()):
        (path, text), (_, other) = old[name], new[name]
        if text != other and (trees := (without_imports(text), without_imports(other)))[0] != trees[1]:
            wrong.append(name)
            print("\n".join([path, *difflib.unified_diff(*trees, before, after or "now", lineterm="", n=2)]))
    print(f"{len(old)} files, {len(wrong)} of them touched in more than their imports")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
