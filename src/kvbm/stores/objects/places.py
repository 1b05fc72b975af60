"""Stores by address: ours, and those that other distributions provide as entry points."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from kvbm.abc.store import ObjectStore
from kvbm.core.errors import ConfigError
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.folder import FolderStore

GROUP: Final = "kvbm.stores"
_CLOUD: Final = {"s3": "s3", "s3a": "s3", "az": "az", "azure": "az", "gs": "gs"}
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_PART: Final = re.compile(r"[A-Za-z0-9._=-]{1,200}")


class Location(NamedTuple):
    """Where objects lie: an address without user, password and query."""

    scheme: str
    host: str
    path: str

    @property
    def url(self) -> str:
        """As it may be shown."""
        return f"{self.scheme}://{self.host}{self.path}"


def locate(url: str) -> Location:
    """The parts of an address. Raises ConfigError, which does not show it where it may contain a secret."""
    try:
        parts = urlsplit(url)
        hostname = parts.netloc
    except ValueError:
        raise _wrong("it is no address") from None
    if "@" in (hostname if parts.scheme.lower() == "file" else url) or parts.query or parts.fragment or "?" in url:
        raise _wrong(
            "an address with a user, a password or a query is not taken",
            "Give credentials by the variables and files that the storage's own tools read.",
        )
    scheme, path = parts.scheme.lower(), unquote(parts.path)
    if scheme == "file":
        if hostname not in ("", "localhost") or not path.startswith("/") or not path.strip("/") or "\0" in path:
            raise _wrong("the address names no folder", "A folder is given as file:///mnt/kv")
        return Location("file", "", path.rstrip("/"))
    if scheme not in _CLOUD and not entry_points(group=GROUP).select(name=scheme):
        known = ", ".join(f"{each}://" for each in ("file", "s3", "az", "gs", *sorted(entry_points(group=GROUP).names)))
        raise _wrong(f"there is no store for {scheme or 'what has no scheme'}; there are {known}")
    prefix = [part for part in path.split("/") if part]
    if scheme in _CLOUD and not _BUCKET.fullmatch(hostname):
        raise _wrong("after :// there has to be the name of a bucket or container")
    if any(not _PART.fullmatch(part) or set(part) == {"."} for part in prefix):
        raise _wrong("what follows the bucket cannot be a prefix", "Use letters, digits and ._=- between slashes.")
    return Location(_CLOUD.get(scheme, scheme), hostname, "".join(f"/{part}" for part in prefix))


def open_store(location: Location, access: Access, mode: int = 0o600) -> ObjectStore:
    """What lies there. Connects to nothing yet. `mode` is that of files in a folder. Raises ConfigError."""
    if location.scheme == "file":
        return FolderStore(Path(location.path), mode=mode)
    if location.scheme in _CLOUD:
        return CloudStore(location.scheme, location.host, location.path.strip("/"), access)
    (entry, *others) = entry_points(group=GROUP).select(name=location.scheme)
    if others:
        raise _wrong(f"several distributions provide {location.scheme}://", "Uninstall all but one.")
    make: Callable[[str, Access], ObjectStore]
    try:
        make = entry.load()
        store = make(location.url, access)
    except Exception as error:
        raise _wrong(f"{entry.value}, which provides {location.scheme}://, cannot be used: {error!r}") from error
    if not isinstance(store, ObjectStore):
        raise _wrong(f"{entry.value}, which provides {location.scheme}://, made a {type(store).__name__}")
    return store


def _wrong(problem: str, remedy: str = "") -> ConfigError:
    return ConfigError("g4_url", problem, remedy=remedy)
