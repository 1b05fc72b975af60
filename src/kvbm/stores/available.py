"""How much memory this process can really have: the machine's, and every cgroup's around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvbm.core.errors import Broken


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the kernel kills somebody.

    The least of MemAvailable and, for every enclosing cgroup (v1 or v2) with a limit, the limit less the usage, where
    page cache that can be dropped counts as free. `root` is where /proc and /sys are looked for.

    Raises:
        Broken: /proc cannot be read.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
        machine = next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
        groups = [group for group in _cgroups(root) if (group.exists())]
    except (OSError, StopIteration, ValueError, IndexError) as error:
        raise Broken(f"cannot find out how much memory is available: {error!r}") from error
    return max(0, min([machine, *(room for group in groups if (room := _room(group)) is not None)]))


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's memory cgroup and its parents, in each hierarchy that is mounted."""
    # "4:memory:/a/b" (v1) or "0::/a/b" (v2)
    paths = dict[str, str]()
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    # "35 31 0:32 /a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory": what is mounted there is /a of the hierarchy
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        shown, mountpoint = mount.split(" ")[3:5]
        top = root / mountpoint.lstrip("/")
        inside = paths[kind].removeprefix(shown.rstrip("/")).strip("/")
        folder = top / inside if ".." not in inside.split("/") else top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _room(group: Path) -> int | None:
    """Bytes left in one cgroup, None if it has no limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    usage = next((n for name in ("memory.current", "memory.usage_in_bytes") if (n := _number(group / name))), 0)
    limit = min((limit for limit in limits if limit is not None), default=None)
    return None if limit is None else limit - max(0, usage - _reclaimable(group))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # the root has no such file; "max" is no limit
        return None


def _reclaimable(group: Path) -> int:
    """The page cache in and below a cgroup that nobody has used lately (v1 says "total_" for "and below")."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0
