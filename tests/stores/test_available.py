from pathlib import Path

import pytest

from kvbm.core.errors import Broken
from kvbm.stores.available import available_memory

GIB = 1 << 30
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHERS = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


class Machine:
    """A /proc and /sys with 64 GiB available."""

    def __init__(self, root: Path, *, cgroup: str, mounts: str) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   67108864 kB\n")
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", OTHERS + mounts)

    def write(self, path: str, text: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(str(text))

    def v2(self, path: str, limit: object, current: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", current)
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive_file}\nactive_file 9")

    def v1(self, path: str, limit: int, usage: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        self.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive_file}")


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cgroup="0::/user.slice/a", mounts=V2.format(root="/"))
    assert available_memory(tmp_path) == 64 * GIB
    machine.v2("user.slice/a", "max", GIB)
    assert available_memory(tmp_path) == 64 * GIB


def test_every_enclosing_group_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cgroup="0::/pod/container/job", mounts=V2.format(root="/"))
    machine.v2("pod/container/job", "max", GIB)
    machine.v2("pod/container", 40 * GIB, 10 * GIB, 2 * GIB)
    assert available_memory(tmp_path) == 32 * GIB
    machine.v2("pod", 20 * GIB, 15 * GIB)
    assert available_memory(tmp_path) == 5 * GIB
    machine.v2("", 10 * GIB, 8 * GIB)
    assert available_memory(tmp_path) == 2 * GIB


def test_a_throttling_limit_counts_and_an_exceeded_one_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cgroup="0::/a", mounts=V2.format(root="/"))
    machine.v2("a", 40 * GIB, 10 * GIB)
    machine.write("sys/fs/cgroup/a/memory.high", 12 * GIB)
    assert available_memory(tmp_path) == 2 * GIB
    machine.write("sys/fs/cgroup/a/memory.high", 9 * GIB)
    assert available_memory(tmp_path) == 0


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    mounts = V1.format(root="/") + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    machine = Machine(tmp_path, cgroup="5:cpu:/x\n4:memory:/a/b\n0::/", mounts=mounts)
    machine.v1("", 0x7FFFFFFFFFFFF000, 50 * GIB)
    machine.v1("a/b", 0x7FFFFFFFFFFFF000, GIB)
    assert available_memory(tmp_path) == 64 * GIB
    machine.v1("a", 8 * GIB, 4 * GIB, 3 * GIB)
    assert available_memory(tmp_path) == 7 * GIB


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/docker/abc/sub", "/docker/abc"), ("/docker/abc", "/docker/abc"), ("/../../elsewhere", "/"), ("/", "/")],
)
def test_a_container_sees_only_its_own_part(tmp_path: Path, path: str, shown: str) -> None:
    machine = Machine(tmp_path, cgroup=f"4:memory:{path}", mounts=V1.format(root=shown))
    machine.v1("", 6 * GIB, GIB)
    assert available_memory(tmp_path) == 5 * GIB


def test_unreadable_statistics_mean_that_nothing_is_reclaimable(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cgroup="0::/a", mounts=V2.format(root="/"))
    machine.v2("a", 4 * GIB, GIB)
    machine.write("sys/fs/cgroup/a/memory.stat", "nonsense")
    assert available_memory(tmp_path) == 3 * GIB


def test_a_machine_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="how much memory"):
        available_memory(tmp_path)
    machine = Machine(tmp_path, cgroup="0::/a", mounts="")
    machine.write("proc/meminfo", "MemTotal: 1 kB")
    with pytest.raises(Broken, match="how much memory"):
        available_memory(tmp_path)


def test_this_machine() -> None:
    assert available_memory() > 1 << 20
