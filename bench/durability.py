"""What `sync` and encryption cost: writes and reads through the store, against the same store without them.

python -m bench.durability [--strict]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench.disk import FOLDER, IO_URING, MOVED_BYTES, Store
from bench.harness import Bench, medians_of
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.shard import Sync

BLOCK, ROUNDS = 1 << 20, 7


def bed(stack: ExitStack, sync: Sync, cipher: Cipher | None = None) -> Callable[[bool], float]:
    """A store of its own, written once (the first time, the file system notes what is written): write or read it."""
    store = Store(stack, BLOCK, cipher.id if cipher else "")
    disk, order = store.disk(stack, IO_URING, sync, cipher), store.order(scattered=False)
    store.run(disk, order, write=True)
    return lambda write: store.run(disk, order, write=write, sums=store.sums)


def main() -> int:
    bench = Bench("durability")
    FOLDER.mkdir(exist_ok=True)
    syncs: tuple[Sync, ...] = ("never", "batch", "always")
    with ExitStack() as stack:
        beds = {f"sync={sync}": bed(stack, sync) for sync in syncs}
        beds["again"] = bed(stack, "never")
        beds["encrypted"] = bed(stack, "never", Cipher(bytes(32)))
        for what, write in (("writes", True), ("reads", False)):
            seconds = medians_of(ROUNDS, {name: partial(run, write) for name, run in beds.items()})
            bench.info(f"{what}, sync=never, MB/s", round(MOVED_BYTES / seconds["sync=never"] / 1e6))
            for name in beds:
                if name != "sync=never" and (write or not name.startswith("sync")):
                    bench.row(f"{what}, {name}", "sync=never", seconds["sync=never"] / seconds[name])
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
