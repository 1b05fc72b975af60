"""The suite of stores over Ceph: its S3 server (RGW), and CephFS mounted twice. Needs root, /dev/fuse, and Debian's
ceph-mon ceph-mgr ceph-osd radosgw ceph-mds ceph-fuse ceph-common.

    python -m pytest tests/stores/objects/ceph.py
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.abc.store import Denied, ObjectStore
from kvbm.cli import serve
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.probe import probe
from kvbm.testing.objects import ObjectStoreSuite

NUMBERS = itertools.count()
USER, SECRET = "kvbm", "kvbm-kvbm"
CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mds", "allow *", "mgr", "allow *"),
    "mgr.x": ("mon", "allow profile mgr", "osd", "allow *", "mds", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd"),
    "mds.a": ("mon", "allow profile mds", "osd", "allow *", "mds", "allow", "mgr", "allow profile mds"),
    "client.rgw.a": ("mon", "allow rwx", "osd", "allow rwx", "mgr", "allow rw"),
}


class Ceph:
    """One daemon of each kind on loopback, its disk a sparse file. Its own words are in `folder`/log."""

    def __init__(self, folder: Path) -> None:
        self.folder, first = folder, 21_000
        ports = []
        while len(ports) < 3:
            ports.append(serve.free_port("127.0.0.1", first))
            first = ports[-1] + 1
        self.port, *mon = ports
        self.keyring, self.fsid = folder / "keyring", str(uuid.uuid4())
        for name in ("mon", "mgr", "osd", "mds", "rgw", "run", "log"):
            (folder / name).mkdir()
        addresses = f"[v2:127.0.0.1:{mon[0]},v1:127.0.0.1:{mon[1]}]"
        self.environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}
        (folder / "ceph.conf").write_text(self._configuration(addresses))
        for at, (entity, caps) in enumerate(CAPS.items()):
            words = itertools.chain.from_iterable(("--cap", *pair) for pair in zip(caps[::2], caps[1::2], strict=True))
            self.run("ceph-authtool", *(["-C"] if not at else []), self.keyring, "--gen-key", "-n", entity, *words)
        self.run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", addresses, folder / "monmap")
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", self.keyring)
        self.run("ceph-mon", "-i", "a")
        self.run("ceph-mgr", "-i", "x")
        disk = str(uuid.uuid4())
        self.run("ceph", "osd", "new", disk)
        self.run("ceph", "auth", "import", "-i", self.keyring)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk, "--keyring", self.keyring)
        self.run("ceph-osd", "-i", "0")
        self.run("radosgw", "-n", "client.rgw.a")
        new = (
            "user",
            "create",
            f"--uid={USER}",
            f"--display-name={USER}",
            f"--access-key={USER}",
            f"--secret={SECRET}",
        )
        self.run("radosgw-admin", *new)
        self.run("ceph-mds", "-i", "a")
        for pool in ("meta", "data"):
            self.run("ceph", "osd", "pool", "create", pool, "8")
        self.run("ceph", "fs", "new", "kv", "meta", "data")

    def _configuration(self, addresses: str) -> str:
        folder = self.folder
        daemons = "".join(f"{name} data = {folder}/{name}\n" for name in ("mon", "mgr", "osd", "mds", "rgw"))
        return f"""[global]
fsid = {self.fsid}
mon host = {addresses}
public network = 127.0.0.0/8
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
osd memory target = 1073741824
bluestore block size = 12884901888
bluestore block create = true
keyring = {self.keyring}
admin socket = {folder}/run/$name.asok
run dir = {folder}/run
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
mgr initial modules =
rgw frontends = beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1
{daemons}"""

    def run(self, *command: object) -> None:
        """To its end, a minute at most."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr[-2000:]}"

    def mount(self, point: Path) -> None:
        """CephFS there."""
        point.mkdir()
        run = self.folder / "run"
        own = (f"--pid-file={run}/{point.name}.pid", f"--admin-socket={run}/{point.name}.asok")
        self.run("ceph-fuse", "-n", "client.admin", *own, point)

    def close(self) -> None:
        for path in (self.folder / "run").glob("*.pid"):
            subprocess.run(["kill", "-9", path.read_text().strip()], check=False)


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    if shutil.which("radosgw") is None:
        pytest.skip("Ceph is not installed")
    folder = tmp_path_factory.mktemp("ceph")
    # Paths of sockets have 107 bytes.
    short = Path("/tmp") / f"kvbm-ceph-{os.getpid()}"
    short.symlink_to(folder)
    server = Ceph(short)
    yield server
    server.close()
    short.unlink()


@pytest.fixture(scope="module")
def mounts(ceph: Ceph) -> Iterator[list[Path]]:
    points = [ceph.folder / name for name in ("one", "other")]
    for point in points:
        ceph.mount(point)
    yield points
    for point in points:
        subprocess.run(["umount", "-l", point], check=False)


@pytest.fixture
def access(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Access:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return Access(20.0, f"http://127.0.0.1:{ceph.port}", "us-east-1")


@pytest.fixture
def bucket(access: Access) -> str:
    """Made by hand: this server makes none by itself."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name="us-east-1",
        aws_access_key_id=USER,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket="bucket")
    return "bucket"


class TestRgw(ObjectStoreSuite):
    @pytest.fixture
    def open(self, access: Access, bucket: str) -> Callable[[], ObjectStore]:
        prefix = f"test-{next(NUMBERS)}/kv"
        return lambda: CloudStore("s3", bucket, prefix, access)


def test_a_bucket_that_is_not_there(access: Access) -> None:
    with pytest.raises(Denied, match="no such bucket"):
        probe(CloudStore("s3", "nowhere", "", access), "0123456789abcdef", itertools.count(), 1_000)


def test_it_is_fit(access: Access, bucket: str) -> None:
    assert probe(CloudStore("s3", bucket, "", access), "0123456789abcdef", itertools.count(), 1_000_000).refusal is None


class TestCephFs(ObjectStoreSuite):
    """Each that is opened is on the other mount."""

    @pytest.fixture
    def open(self, mounts: list[Path]) -> Callable[[], ObjectStore]:
        folder, turn = f"test-{next(NUMBERS)}", itertools.cycle(mounts)
        return lambda: FolderStore(next(turn) / folder)


def test_the_file_system_is_fit(mounts: list[Path]) -> None:
    fitness = probe(FolderStore(mounts[0] / "kv"), "0123456789abcdef", itertools.count(), 1_000_000)
    assert fitness.refusal is None
    assert fitness.ahead_s is not None
    assert abs(fitness.ahead_s) < 5.0


def test_what_one_mount_writes_the_other_lists(mounts: list[Path]) -> None:
    one, other = (FolderStore(mount / "listed") for mount in mounts)
    for at in range(20):
        one.put(f"kv1/{at}", b"x")
        deadline = time.monotonic() + 10
        while f"kv1/{at}" not in {each.name for page in other.list("") for each in page}:
            assert time.monotonic() < deadline
