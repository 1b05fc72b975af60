"""No class grows without bound, and no two public classes share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "kvbm"
ATTRIBUTES, PARAMETERS = 12, 8
RECORDS = {"BaseModel", "BaseSettings", "NamedTuple", "Protocol", "Struct", "TypedDict"}
LARGE: dict[str, tuple[int, int]] = {
    "blocks.pool.Pool": (1, 9),
    "blocks.transitions.Transitions": (18, 9),
    "connect.vllm.translate.SchedulerSide": (17, 3),
    "observe.totals.Totals": (16, 0),
    "stores.disk.disk.Disk": (16, 8),
    "stores.disk.jobs.DiskJob": (20, 6),
    "stores.disk.shard.Shard": (18, 6),
    "transfer.lanes.LaneTransport": (15, 5),
    "transfer.nixl.transport.NixlTransport": (22, 5),
}
"""Class -> its attributes and the parameters of its constructor. Only to be made smaller."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """All classes of the package, by module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                yield module, node


def is_record(node: ast.ClassDef) -> bool:
    """Settings, records, messages and contracts: what they have is what they are for."""
    words = {
        word for each in [*node.bases, *node.decorator_list] for word in ast.unparse(each).replace("(", ".").split(".")
    }
    return bool(words & (RECORDS | {"dataclass"}))


def size(node: ast.ClassDef) -> tuple[int, int]:
    """Attributes of an object, and parameters of its constructor."""
    attributes, parameters = set[str](), 0
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            if isinstance(each.value, ast.Name) and each.value.id == "self":
                attributes.add(each.attr)
        elif isinstance(each, ast.FunctionDef) and each.name == "__init__":
            given = each.args
            parameters = len(given.posonlyargs + given.args + given.kwonlyargs) - 1
    return len(attributes), parameters


def test_classes_are_small() -> None:
    found = {}
    for module, node in classes():
        attributes, parameters = size(node)
        if not is_record(node) and (attributes > ATTRIBUTES or parameters > PARAMETERS):
            found[f"{module}.{node.name}"] = attributes, parameters
    assert found == LARGE
    assert not [name for name in found if name.startswith(("leader.", "tiers.", "worker.", "build."))]


def test_no_two_public_classes_share_a_name() -> None:
    where = defaultdict[str, list[str]](list)
    for module, node in classes():
        if not node.name.startswith("_") and not module.startswith(("cli.", "testing.")):
            where[node.name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}
