"""Objects in S3 and what speaks like it, Azure Blob Storage and Google Cloud Storage, by obstore.

Every PUT is one request (no parts that could be left behind) and creates only. Credentials come from the usual places:
variables, files, the machine's role; obstore renews them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import Buffer

from kvbm.abc.store import MOST_BYTES, Absent, Damaged, Denied, Full, Listed, ObjectStore
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.extras import installing
from kvbm.core.folders import read_small

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_PAGE: Final = 1_000
_CERTIFICATES_BYTES: Final = 10_000_000
_ATTEMPT: Final = 0.5
"""One attempt takes this part of the deadline at most, and none begins after as much again."""
_CONNECT: Final = 0.25
_SHOWN: Final = 200
_FULL: Final = re.compile(r"\b507 Insufficient|InsufficientStorage|StorageFull|QuotaExceeded")
"""What servers say that have no room: WebDAV's status, MinIO's code, Ceph's and Google's."""
_GONE: Final = re.compile(r"\b404 Not Found|NoSuchBucket|ContainerNotFound")
"""What is said where a bucket is listed that does not exist."""
_NO_BUCKET: Final = "there is no such bucket or container"
_SILENT: Final = re.compile(r"Error performing \w+ (https?://)(?:[^/\s]*@)?([^/\s?@]+).* HTTP error", re.DOTALL)
"""What is said where no answer came; `_CAUSE` says why, further down."""
_CAUSE: Final = re.compile(r'(?:message|error): "([^"]+)"')
_CERTIFICATE: Final = re.compile(r"InvalidCertificate\(\s*(\w+)")
_ROLE: Final = "169.254.169.254"
"""Where a machine in a cloud asks for its role."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a storage service is reached. What is None comes from where obstore looks for it."""

    deadline_s: float
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    """Whether the bucket is part of the path, and not of the host's name; None: where there is an `endpoint`."""
    ca_file: Path | None = None
    proxy: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)


class CloudStore(ObjectStore):
    """A bucket or container, below `prefix` if there is one. `scheme` is s3, az or gs.

    Make it in the process that uses it: after a fork obstore hangs.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str, access: Access) -> None:
        """Connects to nothing.

        Raises:
            ConfigError: the package that does it is missing, or it refuses what it was given.
        """
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError as error:
            raise ConfigError(
                "g4_url",
                f"{scheme}:// needs a package that cannot be imported ({error})",
                remedy=f"Do: {installing('objects')}",
            ) from None
        self._obstore = obstore
        self._said = exceptions
        if (access.access_key is None) != (access.secret_key is None):
            missing = "g4_access_key" if access.access_key is None else "g4_secret_key"
            raise ConfigError(missing, "one of g4_access_key and g4_secret_key is set, and the other one is not")
        given: dict[str, Any] = {"client_options": _client(access), "retry_config": _retries(access)}
        if prefix:
            given["prefix"] = prefix
        try:
            if scheme == "s3":
                endpoint = access.endpoint
                in_path = endpoint is not None if access.path_style is None else access.path_style
                if endpoint is not None and not in_path:  # the client takes it as it is
                    scheme_, host = endpoint.split("://", 1)
                    endpoint = f"{scheme_}://{bucket}.{host}"
                own: dict[str, Any] = {
                    "endpoint": endpoint, "region": access.region, "unsigned_payload": True,
                    "virtual_hosted_style_request": not in_path, "access_key_id": access.access_key,
                    "secret_access_key": access.secret_key,
                }  # fmt: skip
                make: Callable[..., Any] = S3Store
            elif scheme == "az":
                own, make = {"endpoint": access.endpoint}, AzureStore
            else:
                own, make = {"base_url": access.endpoint}, GCSStore
            given |= {name: value for name, value in own.items() if value is not None}
            self._store = make(bucket, **given)
        except (exceptions.BaseError, ValueError, TypeError) as error:
            if "root_certificate" in str(error):
                raise ConfigError("g4_ca_file", f"{access.ca_file} has no certificates (PEM)") from None
            raise ConfigError(
                "g4_url", f"it cannot be used: {_short(error)}",
                remedy="Account and credentials come from the variables AWS_*, AZURE_STORAGE_* or GOOGLE_*.",
            ) from None  # fmt: skip

    def put(self, name: str, data: Buffer) -> bool:
        with self._told(name, absent=Denied):
            try:
                whole = memoryview(data).cast("B")
                self._obstore.put(self._store, name, whole, mode="create", use_multipart=False)
            except (self._said.AlreadyExistsError, self._said.PreconditionError):
                return False
        return True

    def claim(self, name: str, data: Buffer) -> bool:
        return self.put(name, data)

    def get(self, name: str, most: int = MOST_BYTES) -> Buffer:
        with self._told(name):
            found = self._obstore.get(self._store, name)
            if (length := found.meta["size"]) <= most:
                return found.buffer()
        raise Damaged(f"it has {length} bytes")

    def get_range(self, name: str, start: int, length: int) -> Buffer:
        with self._told(name):
            return self._obstore.get_range(self._store, name, start=start, length=length)

    def list(self, prefix: str) -> Iterator[Sequence[Listed]]:
        with self._told(prefix or "the bucket", absent=Denied):
            for page in self._obstore.list(self._store, prefix or None, chunk_size=_PAGE):
                yield [Listed(each["path"], each["size"], each["last_modified"].timestamp()) for each in page]

    def stat(self, name: str) -> Listed:
        with self._told(name):
            found = self._obstore.head(self._store, name)
        return Listed(name, found["size"], found["last_modified"].timestamp())

    def delete(self, names: Sequence[str]) -> None:
        try:
            with self._told("what is to be deleted"):
                self._obstore.delete(self._store, list(names))
        except Absent:  # some services say so, and leave the rest
            for name in names if len(names) > 1 else ():
                self.delete([name])

    def close(self) -> None:
        """Connections are the library's."""

    @contextmanager
    def _told(self, what: str, absent: type[Broken] = Absent) -> Iterator[None]:
        """What the library says, in our words, without addresses: they may contain signatures."""
        try:
            yield
        except FileNotFoundError:
            raise absent(_NO_BUCKET if absent is Denied else f"there is no {what}") from None
        except (self._said.BaseError, OSError, ValueError) as error:
            if _FULL.search(str(error)):
                raise Full(f"{what}: {_short(error)}") from None
            if absent is Denied and _GONE.search(str(error)):
                raise Denied(_NO_BUCKET) from None
            if isinstance(error, (self._said.PermissionDeniedError, self._said.UnauthenticatedError)):
                raise Denied(f"{what} is refused: {_short(error)}") from None
            raise Broken(f"{what}: {_short(error)}") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise Broken(
                f"{what}: obstore broke off ({_short(error)}); it does that where an address is none, g4_endpoint's or "
                "that of a variable (AWS_ENDPOINT_URL, HTTPS_PROXY)"
            ) from None


def _client(access: Access) -> ClientConfig:
    options: ClientConfig = {
        "timeout": timedelta(seconds=access.deadline_s * _ATTEMPT),
        "connect_timeout": timedelta(seconds=access.deadline_s * _CONNECT),
        "allow_http": True,
    }
    if access.proxy is not None:
        options["proxy_url"] = access.proxy
    if access.ca_file is not None:
        options["root_certificate"], _ = read_small("g4_ca_file", access.ca_file, _CERTIFICATES_BYTES)
    return options


def _retries(access: Access) -> RetryConfig:
    left = access.deadline_s * (1 - _ATTEMPT)
    return {
        "max_retries": 2,
        "retry_timeout": timedelta(seconds=left * 0.8),
        "backoff": {
            "init_backoff": timedelta(seconds=0.05),
            "max_backoff": timedelta(seconds=max(0.05, left * 0.1)),
            "base": 2,
        },
    }


def _short(error: BaseException) -> str:
    """What a library said, on one line, without addresses' queries, user names and keys."""
    text = " ".join(str(error).split()).partition(" Debug source: ")[0]
    if (silent := _SILENT.search(str(error).partition("Debug source:")[0])) is not None and _ROLE not in text:
        if (bad := _CERTIFICATE.search(str(error))) is not None:
            return f"{silent[1]}{silent[2]} has a certificate that is not trusted: {bad[1]} (see g4_ca_file)"
        cause = _CAUSE.search(str(error))
        return f"{silent[1]}{silent[2]} does not answer{'' if cause is None else f': {cause[1]}'}"
    if _ROLE in text:
        return "no credentials are in the environment or in files, and nothing says which role this machine has"
    text = re.sub(r"(?<=://)\S*@", "***@", text)
    text = re.sub(r"(?<=[\w/%])\?[^\s\"')]*", "?***", text)
    text = re.sub(r"Error performing .*?(?=Server returned)", "", text)
    return text[:_SHOWN].rstrip(".") or type(error).__name__
