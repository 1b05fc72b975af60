"""One NIXL agent with one backend, as little of it as a transport needs.

What bites in NIXL (1.5.1, found by running it), and how it is kept away from the rest:

- Its wrapper lets the progress thread of UCX spin, which takes a whole core. Here it sleeps in the kernel and is woken
  by what arrives.
- Its default for threads crashes with more than one. Here the agent locks, and one thread calls it besides.
- Releasing a transfer does not end it: its bytes still land. Here only ended transfers are released; memory of others
  is quiet only once the agent is gone.
- Before 1.5.0 a file that is too short reads as if it were not: those versions are refused.
- Where the system has RDMA libraries too, UCX's module for RDMA has two of them in one process, which crashes at exit.
  Where there is no RDMA device it is not loaded.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from kvbm.core.config import set_for_library
from kvbm.core.errors import Broken
from kvbm.core.extras import installing
from kvbm.core.region import Region, Slots
from kvbm.transfer.plan import coalesce

WHEEL: Final = "nixl-cu12"
OLDEST: Final = (1, 5, 0)
MEMORY: Final = {"host": "DRAM", "peer": "DRAM", "cuda": "VRAM", "file": "FILE", "object": "OBJ"}
"""NIXL's name for each kind of region."""
_RDMA: Final = Path("/sys/class/infiniband")
_NAP_US: Final = 100_000
"""The longest that UCX's progress thread sleeps when nothing wakes it: a thousandth of a core."""

Op = Literal["READ", "WRITE"]


@dataclass(frozen=True, slots=True)
class RemoteMemory:
    """Owner of a region of kind "peer": the name of the agent that has this memory, as `Agent.connect` returned it.

    The region's planes have the addresses they have in that process.
    """

    agent: str


@dataclass(frozen=True, slots=True)
class Objects:
    """Owner of a region of kind "object", whose slots are objects of a bucket, by these keys. It has one plane."""

    keys: Sequence[str]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A pair of regions made ready: which way the bytes go, seen from here, and the two lists of all slots' rows."""

    source: Region
    destination: Region
    op: Op
    remote_agent: str
    local: Any
    remote: Any
    rows: int

    def indices(self, source: Slots, destination: Slots) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Where the rows of these slots are in the local list, and in the remote one."""
        spread = [
            (np.arange(self.rows)[:, None] * region.num_slots + slots).astype(np.int32).ravel()
            for region, slots in ((self.source, source), (self.destination, destination))
        ]
        return (spread[1], spread[0]) if self.op == "READ" else (spread[0], spread[1])


class Lost(Broken):
    """The agent on the other side is gone: nothing reaches it before it is connected anew."""


class Agent:
    """Registers, connects, prepares and transfers. One thread at a time calls it; what NIXL raises becomes `Broken`."""

    def __init__(self, name: str, backend: str, options: dict[str, str] | None = None) -> None:
        """Start an agent; its `name` has to be unlike any other's, a restarted process's included.

        Raises:
            Broken: NIXL is not there, too old, or its backend does not start here.
        """
        api = _load()
        self.name, self.backend = name, backend
        kinds = [kind for kind in vars(api.nixlBind).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self._errors: tuple[type[Exception], ...] = (*kinds, ValueError)
        self._disconnected: type[Exception] = api.nixlBind.nixlRemoteDisconnectError
        mode = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
        with self._reported(f"backend {backend} does not start"):
            wrapper = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=mode))
            config = api.nixlBind.nixlAgentConfig()
            config.useProgThread, config.pthrDelay = backend == "UCX", _NAP_US
            config.useListenThread, config.syncMode = False, mode.value
            wrapper.agent = api.nixlBind.nixlAgent(name, config)  # in place of one that has the wrapper's settings
            if backend not in wrapper.get_plugin_list():
                raise Broken(f"NIXL has no backend {backend} here")
            wrapper.create_backend(backend, options or {})
        self._nixl: Any = wrapper
        self.memory_types = frozenset(
            str(memory).removesuffix("_SEG") for memory in wrapper.get_backend_mem_types(backend)
        )
        self._registered: dict[int, tuple[Region, Any]] = {}
        self._prepared: dict[tuple[int, int], Prepared] = {}

    # ------------------------------------------------------------------ memory and peers

    def register(self, region: Region) -> None:
        """Make a region known to the backend, once. A peer's is known already."""
        if region.kind == "peer" or id(region) in self._registered:
            return
        if region.kind == "object":
            descriptors = [(0, region.slot_bytes, slot, key) for slot, key in enumerate(region.owner.keys)]
        else:
            descriptors = [(address, size, device_of(region), "") for address, size in spans(region)]
        with self._reported(f"region {region.name!r} cannot be registered"):
            self._registered[id(region)] = region, self._nixl.register_memory(descriptors, MEMORY[region.kind])

    def forget(self, region: Region) -> None:
        """The region is not used any more."""
        with self._reported(f"region {region.name!r} cannot be taken back"):
            self._drop(lambda pair: region is pair.source or region is pair.destination)
            if (known := self._registered.pop(id(region), None)) is not None:
                self._nixl.deregister_memory(known[1])

    def metadata(self) -> bytes:
        """What another agent needs in order to reach what is registered here: it is sent there and `connect`ed."""
        metadata: bytes = self._nixl.get_agent_metadata()
        return metadata

    def connect(self, metadata: bytes) -> str:
        """Make another agent's memory reachable; returns its name. One that is connected already has to be disconnected
        first."""
        with self._reported("a peer cannot be connected"):
            name = self._nixl.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def disconnect(self, name: str) -> None:
        """Forget an agent and everything that was prepared with its memory."""
        with self._reported("a peer cannot be disconnected"):
            self._drop(lambda pair: pair.remote_agent == name)
            self._nixl.remove_remote_agent(name)

    def prepare(self, source: Region, destination: Region) -> Prepared:
        """A pair of regions, made ready once."""
        key = id(source), id(destination)
        if (known := self._prepared.get(key)) is not None:
            return known
        self.register(source)
        self.register(destination)
        rows = coalesce(source, destination)
        pulls = source.kind in ("peer", "file", "object")
        near, far = (destination, source) if pulls else (source, destination)
        sides = {
            id(source): (rows.source_address, rows.source_stride),
            id(destination): (rows.destination_address, rows.destination_stride),
        }
        op: Op = "READ" if pulls else "WRITE"
        with self._reported(f"nothing moves from region {source.name!r} to {destination.name!r}"):
            local, remote = (
                self._nixl.prep_xfer_dlist(
                    agent, listed(region, *sides[id(region)], rows.row_bytes), MEMORY[region.kind]
                )
                for region, agent in ((near, "NIXL_INIT_AGENT"), (far, self._owner_of(far)))
            )
        prepared = Prepared(source, destination, op, self._owner_of(far), local, remote, len(rows.row_bytes))
        self._prepared[key] = prepared
        return prepared

    def _owner_of(self, region: Region) -> str:
        return region.owner.agent if isinstance(region.owner, RemoteMemory) else self.name

    # ------------------------------------------------------------------ transfers

    def make(self, pair: Prepared, source: Slots, destination: Slots) -> Any:
        """A transfer that has not begun: its handle. Raises Broken."""
        local, remote = pair.indices(source, destination)
        with self._reported("a transfer cannot be made"):
            return self._nixl.make_prepped_xfer(pair.op, pair.local, local, pair.remote, remote)

    def begin(self, handle: Any) -> bool:
        """Start a transfer; whether it has ended already.

        Raises:
            Lost: the other side is gone.
            Broken: it cannot be started. With UCX a part of it may have been, and be on its way.
        """
        with self._reported("a transfer failed"):
            return bool(self._nixl.transfer(handle) == "DONE")

    def ended(self, handle: Any) -> bool:
        """Whether a transfer has ended well. Raises as `begin` where it did not."""
        with self._reported("a transfer failed"):
            return bool(self._nixl.check_xfer_state(handle) == "DONE")

    def release(self, handle: Any) -> None:
        """Give a transfer that has ended back."""
        try:
            handle.release()
        except self._errors:
            self.abandon(handle)

    @staticmethod
    def abandon(handle: Any) -> None:
        """Leave a transfer or a list to the agent's end: it does not try to release itself when it is collected.

        It holds the agent: drop it before `close`.
        """
        handle._released = True

    def close(self) -> None:
        """Destroy the agent; with UCX nothing is read or written afterwards, not even by abandoned transfers."""
        for pair in self._prepared.values():
            self.abandon(pair.local)
            self.abandon(pair.remote)
        self._prepared.clear()
        self._registered.clear()
        self._nixl = None
        gc.collect()

    def _drop(self, gone: Callable[[Prepared], bool]) -> None:
        for key, pair in list(self._prepared.items()):
            if gone(pair):
                del self._prepared[key]
                pair.local.release()
                pair.remote.release()

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._disconnected as error:
            raise Lost(f"NIXL: {what}: {error}") from error
        except self._errors as error:
            raise Broken(f"NIXL: {what}: {error}") from error


def installed() -> str:
    """NIXL's version. Raises Broken: it is not there, or one that cannot be used."""
    try:
        version = importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise Broken(f"NIXL is not installed ({installing('nixl').replace('install', 'install --no-deps')})") from None
    if tuple(map(int, version.split(".")[:3])) < OLDEST:
        raise Broken(f"NIXL {version} reports short reads as complete: {'.'.join(map(str, OLDEST))} is needed")
    return version


def _load() -> Any:
    installed()
    set_for_library("NIXL_LOG_LEVEL", "WARN")  # its other levels write to stdout; read once, at import
    if not any(_RDMA.glob("*")):
        set_for_library("UCX_MODULES", "^ib,rdmacm")
    try:
        return importlib.import_module("nixl_cu12._api")
    except ImportError as error:
        raise Broken(f"NIXL cannot be loaded: {error}") from error


def device_of(region: Region) -> int:
    """NIXL's device number: a GPU's, a file's descriptor, 0 for host memory."""
    if region.kind == "file":
        return int(region.owner.fd)
    return int(region.owner.device) if region.kind == "cuda" else 0


def spans(region: Region) -> list[tuple[int, int]]:
    """The region's memory as few ranges (address, bytes): planes that overlap or follow each other are one."""
    merged: list[tuple[int, int]] = []
    last = region.num_slots - 1
    for begin, end in sorted((p.address, p.address + last * p.stride + p.row_bytes) for p in region.planes):
        if merged and begin <= sum(merged[-1]):
            merged[-1] = merged[-1][0], max(end, sum(merged[-1])) - merged[-1][0]
        else:
            merged.append((begin, end - begin))
    return merged


def listed(region: Region, address: Slots, stride: Slots, row_bytes: Slots) -> npt.NDArray[np.uint64]:
    """All rows of all slots, as NIXL takes them: an entry per row of a slot (address, bytes, device, stride, slots), or
    per object (address, bytes, device)."""
    if region.kind == "object":
        objects = np.zeros((region.num_slots, 3), dtype=np.uint64)
        objects[:, 1], objects[:, 2] = row_bytes[0], np.arange(region.num_slots)
        return objects
    table = np.empty((len(address), 5), dtype=np.uint64)
    table[:, 0], table[:, 1], table[:, 2] = address, row_bytes, device_of(region)
    table[:, 3], table[:, 4] = stride, region.num_slots
    return table
