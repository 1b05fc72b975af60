"""What counts as a change of a suite."""

from __future__ import annotations

import pytest

from tests.untouched import belongs, without_imports

BEFORE = """
from kvbm.manager.leader import Leader
def test_it() -> None:
    from kvbm import manager
    assert Leader(1) == 2  # as it was
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("kvbm.manager.leader import Leader", "kvbm.leader.leader import Leader", True),
        ("from kvbm import manager", "import kvbm.leader", True),
        ("# as it was", "# as it has to be", True),
        ("== 2", "== 3", False),
        ("assert ", "assert not ", False),
        ("test_it", "not_it", False),
    ],
)
def test_only_imports_and_comments_may_be_others(old: str, new: str, same: bool) -> None:
    after = BEFORE.replace(old, new)
    assert after != BEFORE
    assert (without_imports(after) == without_imports(BEFORE)) == same


def test_a_file_belongs_by_its_folder_or_its_name() -> None:
    assert belongs("tests/blocks/test_pool.py") == "tests/blocks/test_pool.py"
    assert belongs("tests/manager/test_leader.py") == belongs("tests/leader/test_leader.py") == "test_leader.py"
    assert belongs("tests/tiers/peers/test_whole.py") == "peers/test_whole.py"
    assert belongs("tests/manager/test_disk.py") is belongs("tests/blocks/README.md") is None
