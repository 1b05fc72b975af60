"""The transport's contract over NIXL: within a process, to and from another agent's memory, to and from files."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from kvbm.abc.transport import Transport
from kvbm.core.region import Region
from kvbm.testing.transport import FileTransportSuite, HostMemory, Memory, TransportSuite

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from kvbm.transfer.nixl import NixlTransport, RemoteMemory


class TestWithinAProcess(TransportSuite):
    def make_transport(self) -> Transport:
        return NixlTransport()

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        return HostMemory(row_bytes, slots), HostMemory(row_bytes, slots)


class PeerSide:
    """Another agent's memory, in this process, so that the suite can see it."""

    def __init__(self, memory: HostMemory, owner: RemoteMemory) -> None:
        self.region: Region = replace(memory.region, kind="peer", owner=owner)
        self.get, self.put, self.guards_intact = memory.get, memory.put, memory.guards_intact


class PeerSuite(TransportSuite):
    write = False

    @pytest.fixture(autouse=True)
    def _peer(self) -> Iterator[None]:
        self.peer = NixlTransport()
        yield
        self.peer.close()

    def make_transport(self) -> Transport:
        self.transport_ = NixlTransport()
        return self.transport_

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        here, there = HostMemory(row_bytes, slots), HostMemory(row_bytes, slots)
        self.peer.register(there.region)
        far = PeerSide(there, RemoteMemory(self.transport_.connect(self.peer.metadata())))
        return (here, far) if self.write else (far, here)


class TestFromPeer(PeerSuite):
    pass


class TestToPeer(PeerSuite):
    write = True


class FileSuite(FileTransportSuite):
    def make_transport(self) -> Transport:
        return NixlTransport("POSIX")


class TestFileReads(FileSuite):
    pass


class TestFileWrites(FileSuite):
    write = True
