"""What objects are called. Nothing that has not exactly one of these forms is ours.

    kv1/NAMESPACE/NA/NAME                         a run of blocks (`runs.py`); NA: the first two digits of NAME
    kv1/feed/EPOCH/NAMESPACE.INSTANCE.NUMBER.MB   what an instance wrote or found deleted; MB: its bound on all objects
    kv1/touch/EPOCH/NAMESPACE.INSTANCE.NUMBER     what an instance read
    kv1/gc/EPOCH                                  who collects in this epoch
    kv1/probe/INSTANCE.NUMBER                     a trial, deleted when it is over

An epoch is ten minutes by the storage's clock. Names of runs are keyed hashes of block keys: keys are hashes of prompts
that can be guessed, and who may list the storage could confirm one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

ROOT: Final = "kv1/"
FEEDS: Final = f"{ROOT}feed/"
"""Where instances say what they wrote."""
TOUCHES: Final = f"{ROOT}touch/"
"""Where instances say what they read."""
EPOCH_S: Final = 600
NAME_BYTES: Final = 16

Kind = Literal["run", "feed", "touch", "lease", "probe", "part"]

_ID: Final = "[0-9a-f]{16}"
_FORMS: Final = re.compile(
    rf"kv1/(?:(?P<run>(?P<space>{_ID})/(?P<first>[0-9a-f]{{2}})/(?P<name>(?P=first)[0-9a-f]{{30}}))"
    rf"|(?P<feed>feed/(?P<feed_epoch>\d{{1,12}})/(?P<feed_space>{_ID})\.(?P<writer>{_ID})\.\d{{1,9}}\.(?P<mb>\d{{1,12}}))"
    rf"|(?P<touch>touch/(?P<touch_epoch>\d{{1,12}})/(?P<touch_space>{_ID})\.{_ID}\.\d{{1,9}})"
    rf"|(?P<lease>gc/(?P<lease_epoch>\d{{1,12}}))"
    rf"|(?P<probe>probe/{_ID}\.\d{{1,9}})"
    rf"|(?P<part>(?:{_ID}/[0-9a-f]{{2}}|(?:feed|touch)/\d{{1,12}}|gc|probe)/\.part-{_ID}))",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Ours:
    """What a name of ours says. `space` is the namespace, `digest` the run's name, `mb` a feed's bound."""

    kind: Kind
    space: str = ""
    digest: bytes = b""
    epoch: int = 0
    mb: int = 0
    writer: str = ""


def parse(name: str) -> Ours | None:
    """What this is; None: not ours."""
    found = _FORMS.fullmatch(name)
    if found is None:
        return None
    if found["run"]:
        return Ours("run", found["space"], bytes.fromhex(found["name"]))
    if found["feed"]:
        return Ours(
            "feed", found["feed_space"], epoch=int(found["feed_epoch"]), mb=int(found["mb"]), writer=found["writer"]
        )
    if found["touch"]:
        return Ours("touch", found["touch_space"], epoch=int(found["touch_epoch"]))
    if found["lease"]:
        return Ours("lease", epoch=int(found["lease_epoch"]))
    return Ours("probe" if found["probe"] else "part")


class Names:
    """Of one namespace. `key` (at most 64 bytes) keys the hashes."""

    def __init__(self, key: bytes) -> None:
        self._hash = blake2b(key=key, digest_size=NAME_BYTES)
        self.space = self.digest(b"namespace").hex()[:16]
        self.prefix = f"{ROOT}{self.space}/"

    def digest(self, key: bytes) -> bytes:
        """The name of the run that ends with this block."""
        hash_ = self._hash.copy()
        hash_.update(key)
        return hash_.digest()

    def heads(self, keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
        """The first eight bytes of the name of the run that ends with each of these blocks, as a number."""
        copy, digests = self._hash.copy, list[bytes]()
        for key in keys:
            hash_ = copy()
            hash_.update(key)
            digests.append(hash_.digest())
        return np.frombuffer(b"".join(digests), "<u8")[:: NAME_BYTES // 8]

    def run(self, digest: bytes) -> str:
        """Where it lies."""
        name = digest.hex()
        return f"{self.prefix}{name[:2]}/{name}"

    def feed(self, epoch: int, instance: str, number: int, mb: int) -> str:
        """Where an instance says what it wrote."""
        return f"{feed_prefix(epoch)}{self.space}.{instance}.{number}.{mb}"

    def touch(self, epoch: int, instance: str, number: int) -> str:
        """Where an instance says what it read."""
        return f"{TOUCHES}{epoch}/{self.space}.{instance}.{number}"


def feed_prefix(epoch: int) -> str:
    """Where the feed of an epoch lies, of all namespaces."""
    return f"{FEEDS}{epoch}/"


def lease(epoch: int) -> str:
    """Where the collector of an epoch says that it is."""
    return f"{ROOT}gc/{epoch}"


def probe(instance: str, number: int) -> str:
    """Where an instance tries whether the storage works."""
    return f"{ROOT}probe/{instance}.{number}"


def epoch(when: float) -> int:
    """The epoch of a moment by the storage's clock, in Unix seconds."""
    return int(when // EPOCH_S)
