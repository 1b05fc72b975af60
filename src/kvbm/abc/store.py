"""Storage that many instances share: objects by name. Implementations pass `kvbm.testing.objects`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from typing_extensions import Buffer

from kvbm.core.errors import Broken


class Absent(Broken):
    """There is no object of this name, or none that may be read."""


class Denied(Broken):
    """The storage does not let us: wrong credentials, a right that is missing, a bucket that does not exist."""


class Full(Broken):
    """The storage has no room for what was to be written. What is there can be read."""


class Damaged(Broken):
    """An object is not what its name says: cut, changed, another's, of another version, or longer than it may be."""


MOST_BYTES: Final = 1 << 30
"""Bytes of an object that is read, where its reader does not know better."""


class Listed(NamedTuple):
    """One object, as the storage lists it. `modified` is when it was written: Unix seconds by the storage's clock."""

    name: str
    size: int
    modified: float


class ObjectStore(ABC):
    """Objects by name in storage that many share. An object appears whole or not at all, and is never written twice.

    Names are parts of letters, digits and ``._-`` with ``/`` between them, at most 200 characters; no part is ``.`` or
    ``..``. They are relative to where the store was opened.

    Any thread, several at once. A call waits for the storage, and is to end within the deadline that the store was
    opened with; one that does not (a mounted file system hangs) is written off by its caller. Buffers that a
    call was given may be read until it has returned or raised, whatever became of the storage meanwhile. No call
    follows links, or reads or deletes what is no ordinary object.

    Every method raises `Denied` where the storage refuses us, `Full` where it has no room, and `Broken` for what goes
    wrong otherwise.
    """

    @abstractmethod
    def put(self, name: str, data: Buffer) -> bool:
        """Write an object that appears whole or not at all; False where the storage says that it has one of this name.
        Others who looked for it before may see it some seconds later.

        False does not say whose it is, nor that anything is there: a retry after an answer that was lost says it, too.
        Where several write one at once, more than one may hear True, and the bytes of any of them may be there.
        """

    @abstractmethod
    def claim(self, name: str, data: Buffer) -> bool:
        """Write an object that only one of those who write it at once may have written; False as with `put`.

        A reader may see a part of it for a moment.
        """

    @abstractmethod
    def get(self, name: str, most: int = MOST_BYTES) -> Buffer:
        """The bytes of an object. Raises Absent; Damaged, before anything is allocated for it, where it has more than
        `most` bytes."""

    @abstractmethod
    def get_range(self, name: str, start: int, length: int) -> Buffer:
        """`length` bytes from `start` on, or as many as there are. Raises Absent."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Sequence[Listed]]:
        """Objects whose names begin with `prefix`, which ends with ``/`` or is empty, page by page; at any depth.

        What was written or deleted while the listing runs may or may not be among them. Each page waits.
        """

    @abstractmethod
    def stat(self, name: str) -> Listed:
        """What a listing would say of this object. Raises Absent."""

    @abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Delete objects. One that is not there is deleted already."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. No call runs."""
