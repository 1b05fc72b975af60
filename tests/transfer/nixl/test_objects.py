"""Objects of a real S3 server, through the transport and through a probe."""

import itertools
from collections.abc import Iterator, Sequence

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from kvbm.abc.transport import Plan, Transport
from kvbm.core.outcome import Outcome
from kvbm.core.region import packed
from kvbm.testing.transport import HostMemory, Memory, TransportSuite, run

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")

from kvbm.transfer.nixl import NixlTransport, Objects, probe

pytestmark = pytest.mark.e2e  # no engine, but a server
BUCKET = "blocks"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url
        server.stop()


class ObjectMemory:
    """Objects as slots."""

    def __init__(self, endpoint: str, prefix: str, row_bytes: Sequence[int], slots: int) -> None:
        self._s3 = boto3.client("s3", endpoint_url=endpoint)
        keys = Objects([f"{prefix}/{slot}" for slot in range(slots)])
        self.region = packed("objects", 0, row_bytes, slots, kind="object", owner=keys)

    def get(self, slot: int) -> bytes:
        return bytes(self._s3.get_object(Bucket=BUCKET, Key=self.region.owner.keys[slot])["Body"].read())

    def put(self, slot: int, data: bytes) -> None:
        self._s3.put_object(Bucket=BUCKET, Key=self.region.owner.keys[slot], Body=data)

    def guards_intact(self) -> bool:
        return True


class ObjectSuite(TransportSuite):
    row_bytes = (4096,)
    plans = 5
    write = False
    numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def _server(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def make_transport(self) -> Transport:
        return NixlTransport("OBJ", {"bucket": BUCKET, "endpoint_override": self.endpoint})

    def make_regions(self, row_bytes: Sequence[int], slots: int) -> tuple[Memory, Memory]:
        there = ObjectMemory(self.endpoint, f"{type(self).__name__}-{next(self.numbers)}", row_bytes, slots)
        here = HostMemory(row_bytes, slots)
        return (here, there) if self.write else (there, here)


class TestGets(ObjectSuite):
    def test_an_object_that_is_not_there_fails_and_the_others_do_not(
        self, transport: Transport, pair: tuple[Memory, Memory]
    ) -> None:
        source, destination = pair
        absent = packed("absent", 0, [4096], 2, kind="object", owner=Objects([source.region.owner.keys[0], "absent"]))
        plan = Plan(absent, np.arange(2), destination.region, np.array([5, 6]), True, "load")
        completion = run(transport, plan)
        assert completion.outcomes.tolist()[1] == Outcome.FAILED
        assert destination.guards_intact()
        assert run(transport, Plan(absent, np.arange(1), destination.region, np.array([5]), True, "load")).error is None
        assert destination.get(5) == source.get(0)


class TestPuts(ObjectSuite):
    write = True


def test_a_probe_says_what_works_and_what_does_not(endpoint: str) -> None:
    report = probe("OBJ", options={"bucket": BUCKET, "endpoint_override": endpoint})
    assert report.problem is None
    assert report.gb_s is not None
    assert "failed" in str(probe("OBJ", options={"bucket": "nowhere", "endpoint_override": endpoint}).problem)
    with pytest.raises(ClientError):
        boto3.client("s3", endpoint_url=endpoint).head_bucket(Bucket="nowhere")
