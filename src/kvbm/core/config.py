"""Every setting, declared once, and where its value came from. Nothing else in KVBM reads the environment.

A later layer wins: default, file (TOML, named by ``KVBM_CONFIG``), environment (``KVBM_*`` over upstream's
``DYN_KVBM_*``), the engine's ``kv_connector_extra_config``, command-line option.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types as at
from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvbm.core.errors import ConfigError
from kvbm.core.folders import default_cache_dir, default_run_dir, expanded

Gigabytes = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65_535)]


class Settings(BaseSettings):
    """What KVBM was told. Built by `load`, never from the environment directly."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    g2_gb: Gigabytes | None = None
    """Use this much host memory for G2, in GB of 10^9 bytes, in total over all ranks of one engine."""
    g2_blocks: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Give G2 this many blocks of the engine's block size. KVBM then ignores g2_gb."""
    g2_share: Annotated[float, Field(gt=0, le=0.9)] = 0.3
    """Give G2 this share of the memory available at the start. It applies if g2_gb and g2_blocks are unset."""
    g2_order: Annotated[str, Field(min_length=1)] = "lru"
    """Evict blocks of G2 by lru, fifo, lfu, multi-lru, s3-fifo, arc, lineage, or an order of your own."""
    g3_gb: Gigabytes | None = None
    """Give G3 this many GB (10^9 bytes) of disk, in total over all ranks. Unset, like g3_blocks: no disk."""
    g3_blocks: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Give G3 of each engine this many blocks of the engine's block size. KVBM then ignores g3_gb."""
    g3_dir: Path | None = None
    """Put the disk tier's files in this folder, each data-parallel engine in a subfolder. Unset: g3 in cache_dir."""
    g3_order: Annotated[str, Field(min_length=1)] = "lru"
    """Evict blocks of G3 by one of the orders that g2_order takes."""
    g3_admission: Annotated[str, Field(min_length=1)] = "all"
    """Write these blocks to disk: all, presence, frequency (asked for twice), or by a policy of your own."""
    placement: Annotated[str, Field(min_length=1)] = "write-through"
    """Write every block of G2 to disk (write-through), or a block when it leaves G2 (exclusive)."""
    g3_sync: Literal["never", "batch", "always"] = "batch"
    """Keep blocks over a loss of power: no promise (never), all but the last second (batch), all (always)."""
    g3_direct: bool = True
    """Read and write the disk without the page cache (direct I/O), where the file system can do that."""
    g3_zerofill: bool = False
    """Write zeros to reserve space, where the file system cannot reserve space otherwise."""
    g3_engine: Literal["auto", "io_uring", "threads"] = "auto"
    """Read and write the disk by io_uring or by threads. auto: io_uring where the kernel has it, else threads."""
    g3_write_mb_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Write at most this many MB per second to disk, averaged over an hour. KVBM then ignores g3_write_gb_day."""
    g3_write_gb_day: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Write at most this many GB per day to disk, averaged over a day."""
    g3_inflight_mb: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Have at most this many MB on the way to disk, and as many on the way from it, over all ranks of one engine."""
    g3_deadline_s: Seconds = 30.0
    """Give up a read or write of the disk after this many seconds. The blocks then count as failed."""
    g3_drain_s: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 10.0
    """After SIGTERM, write what only G2 has to disk for at most this many seconds. 0: write nothing."""
    g3_key_file: Path | None = None
    """Encrypt the disk tier with the key in this file: 32 bytes, or 64 hexadecimal digits. Unset: no encryption."""
    g4_url: Annotated[str, Field(pattern=r"^[a-z0-9+.-]+://.+")] | None = None
    """Keep blocks in storage that many instances share: s3://BUCKET/PREFIX, az://, gs:// or file:///FOLDER."""
    g4_gb: Gigabytes = 100
    """Keep at most this many GB (10^9 bytes) at g4_url for all instances. Of different values the largest counts."""
    g4_admission: Literal["all", "second-use", "evicted"] = "all"
    """Write these blocks to g4_url: all, those asked for twice, or those that are about to leave G2."""
    g4_write_mb_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Write at most this many MB per second to g4_url, averaged over an hour. KVBM then ignores g4_write_gb_day."""
    g4_write_gb_day: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Write at most this many GB per day to g4_url, averaged over a day."""
    g4_inflight_mb: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Have at most this many MB on the way from g4_url, and half as many on the way to it, in buffers beside G2."""
    g4_deadline_s: Annotated[float, Field(ge=0.1, le=600)] = 10.0
    """Give up a read or write at g4_url after this many seconds. The blocks then count as failed."""
    g4_secret_file: Path | None = None
    """Seal what is written to g4_url with the secret in this file, and believe only what was sealed with it."""
    g4_feed_s: Annotated[float, Field(ge=0.1, le=3600)] = 10.0
    """Exchange news with other instances at g4_url at this interval, in seconds."""
    g4_warm: Annotated[float, Field(ge=0, le=1)] = 0.25
    """At the start, fill at most this part of G2 with what was asked for most at g4_url. 0: none."""
    g4_known: Annotated[int, Field(ge=1000, le=1_000_000_000)] = 2_000_000
    """Remember the names of at most this many objects at g4_url. A name takes 16 bytes."""
    g4_endpoint: Annotated[str, Field(pattern=r"^https?://[^@?\s]+$")] | None = None
    """Find the storage service at this address. Unset: where the service's own tools find it."""
    g4_region: Annotated[str, Field(min_length=1)] | None = None
    """Use this region of the storage service. Unset: the one that its own tools use."""
    g4_path_style: bool | None = None
    """Put the bucket into the address's path (true), or into the host's name (false). Unset: true with g4_endpoint."""
    g4_access_key: Annotated[str, Field(min_length=1)] | None = None
    """Use this access key for S3. Unset: where Amazon's tools find one (environment, files, the instance's role)."""
    g4_secret_key: SecretStr | None = None
    """Use this secret key for S3, with g4_access_key. `kvbm config` does not show it."""
    g4_ca_file: Path | None = None
    """Trust the certificate authorities in this PEM file, too, when KVBM connects to the storage service."""
    g4_proxy: Annotated[str, Field(pattern=r"^(https?|socks5h?)://[^\s/]+/?$")] | None = None
    """Connect to the storage service through this proxy. Unset: as HTTPS_PROXY and NO_PROXY say."""
    g4_mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] = "600"
    """Give files below file:///FOLDER these rights (octal). Those who may read files may also enter folders."""
    directory: Annotated[str, Field(pattern=r"^(valkey|valkeys|redis|rediss|unix)://.+")] | None = None
    """Find other instances in the Valkey or Redis server at this address. Unset: this instance shares no blocks."""
    directory_lease_s: Annotated[float, Field(ge=1, le=3600)] = 10.0
    """Count an instance as dead, and remove its entries from the directory, after this many seconds of silence."""
    peer_name: Annotated[str, Field(pattern=r"^[\w.:-]{1,100}$")] | None = None
    """Give this instance a name that no other instance has. Unset: the engine's id."""
    peer_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Listen for other instances on this address. The other instances connect to the same address."""
    peer_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Listen for other instances on this port, plus the data-parallel rank. 0: any free port."""
    peer_secret_file: Path | None = None
    """Prove to other instances that this one belongs to them, with the secret in this file (16 bytes or more)."""
    peer_deadline_s: Annotated[float, Field(ge=0.05, le=60)] = 2.0
    """Let a request wait at most this many seconds for an instance that does not answer."""
    peer_lease_s: Annotated[float, Field(ge=1, le=600)] = 10.0
    """Hold blocks for a reading instance at most this many seconds, if it does not say that it is done."""
    peer_copies: Literal["keep", "drop"] = "keep"
    """Keep blocks from other instances in G2 (keep), or drop them once the request that asked has them (drop)."""
    pull_wait_s: Seconds = 60.0
    """Let a request with pull_from wait at most this many seconds for the instance that computes its prompt."""
    save_answers: bool = True
    """Store blocks with generated tokens. Set false where the next turn's prompt leaves the reasoning out."""
    save_tokens: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """Store only the blocks of this many tokens at the start of each request. Unset: all."""
    answers_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Limit answers that no prompt has contained yet to this share of G2, if prompts rarely contain answers."""
    onboard: Literal["async", "sync"] = "async"
    """Load blocks between engine steps (async), or inside a step, before its forward pass (sync)."""
    g1_layout: Literal["engine", "blocks"] = "engine"
    """On a GPU ask the engine to keep all layers of a block in one piece (blocks), or leave that to it (engine)."""
    shadow_every: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Decline one hit in this many, and compare the recomputed blocks with the stored ones. 0: decline none."""
    prove_first: bool = False
    """Use other processes' blocks only after KVBM compared some of them, for each adapter, and found no difference."""
    g2_verify: bool = False
    """Verify each block's checksum again when KVBM copies the block from host memory to the engine."""
    slow_step_ms: Annotated[float, Field(gt=0, le=1_000_000)] = 100.0
    """Stand aside for a minute after 32 steps in a row in which KVBM took more than this many milliseconds."""
    trust_image_names: bool = False
    """Trust names that clients give images (multi_modal_uuids), where KVBM cannot compare the images' content."""
    checkpoint_tokens: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Store sliding-window layers at every multiple of this many tokens, besides prompt ends. Unset: 4 windows."""
    dummy_weights_fixed: bool = False
    """Treat weights of load format dummy as known: they follow from the seed, and nobody replaces them."""
    weights_seen: Path | None = None
    """Read from this file what `kvbm serve` saw of the model's files before it started the engine."""
    reset: Literal["auto", "own", "follow"] = "auto"
    """Take a reset of the engine's cache for new weights never (own), always (follow), or if they can change (auto)."""
    enabled: bool = True
    """Use KVBM. false: the connector stays in place and does nothing."""
    without_prefix_caching: bool = False
    """Serve an engine whose own prefix caching is switched off. false: KVBM stands aside there, and says so."""
    strict: bool = False
    """End the engine if KVBM cannot start, and serve only once all of G2 is there. false: serve without KVBM."""
    metrics: bool = False
    """Serve Prometheus metrics over HTTP."""
    metrics_port: Port = 6880
    """Serve metrics on this port, plus the data-parallel rank."""
    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Serve metrics on this address."""
    run_dir: Path = Field(default_factory=lambda: default_run_dir(os.environ))
    """Put the control sockets in this folder. Default: $XDG_RUNTIME_DIR/kvbm, else /tmp/kvbm-<uid>."""
    cache_dir: Path | None = Field(default_factory=default_cache_dir)
    """Put converted models and digests of weights in this folder, and the disk tier if g3_dir is unset."""
    traces: Path | None = None
    """Find request traces for `kvbm replay` by file name in this folder."""
    copy_threads: Annotated[int, Field(ge=0, le=256)] = 0
    """Copy blocks with this many threads per rank. 0: KVBM chooses."""
    store_inflight_mb: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Have at most this many MB of offload copies in flight, over all ranks of one engine."""
    held_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Let loads and waiting requests hold at most this share of G2."""
    load_min_tokens: Annotated[int, Field(ge=0, le=100_000_000)] | None = None
    """Load only hits in G2 of at least this many tokens. 0: any. Unset: KVBM decides by measured times."""
    load_deadline_s: Seconds = 10.0
    """Give up a load after this many seconds. The engine then computes its tokens."""
    fence_ms: Annotated[float, Field(ge=0, le=60_000)] = 10.0
    """Let an engine step wait this many milliseconds for copies of blocks that it overwrites, then stop the copies."""
    store_deadline_s: Seconds = 30.0
    """Give up an offload after this many seconds. Its blocks are then not in G2."""
    init_timeout_s: Seconds = 600.0
    """Let leader and workers wait for each other at the start for at most this many seconds."""
    idle_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0
    """Let a step that computes nothing wait at most this many milliseconds for a running copy."""
    explain_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Remember this many recent requests for `kvbm explain`."""
    transport_wrapper: Annotated[str, Field(pattern=r"^([\w.]+:\w+(\?.*)?)?$")] = ""
    """Wrap each worker's transport by this function, given as module:function?query. For tests."""

    @field_validator(
        "run_dir",
        "cache_dir",
        "traces",
        "g3_dir",
        "g3_key_file",
        "peer_secret_file",
        "weights_seen",
        "g4_secret_file",
        "g4_ca_file",
    )
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


UPSTREAM = {
    "DYN_KVBM_CPU_CACHE_GB": "g2_gb",
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "g2_blocks",
    "DYN_KVBM_DISK_CACHE_GB": "g3_gb",
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "g3_blocks",
    "DYN_KVBM_DISK_CACHE_DIR": "g3_dir",
    "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "g3_admission",
    "DYN_KVBM_DISK_ZEROFILL_FALLBACK": "g3_zerofill",
    "DYN_KVBM_DISK_DISABLE_O_DIRECT": "g3_direct",
    "DYN_KVBM_METRICS": "metrics",
    "DYN_KVBM_METRICS_PORT": "metrics_port",
    "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "init_timeout_s",
    "DYN_KVBM_OBJECT_BUCKET": "g4_url",
    "DYN_KVBM_OBJECT_ENDPOINT": "g4_endpoint",
    "DYN_KVBM_OBJECT_REGION": "g4_region",
    "DYN_KVBM_OBJECT_ACCESS_KEY": "g4_access_key",
    "DYN_KVBM_OBJECT_SECRET_KEY": "g4_secret_key",
    "DYN_KVBM_OBJECT_WRITE_THROUGH": "g4_admission",
}
"""Upstream's variables that mean one of our settings."""

_TURNED: dict[str, Callable[[bool], object]] = {
    "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": lambda yes: "all" if yes else "frequency",
    "DYN_KVBM_DISK_DISABLE_O_DIRECT": lambda yes: not yes,
    "DYN_KVBM_OBJECT_WRITE_THROUGH": lambda yes: "all" if yes else "evicted",
}
"""Those that say yes or no, and what our setting is then."""
_OBJECTS_ENABLED = "DYN_KVBM_OBJECT_ENABLED"
"""Says whether the bucket is used at all. Unset: it is not, as upstream has it."""

_WITHOUT_EFFECT = {
    r"DISK_ALLOCATOR_TYPE": "g3_direct says how the disk is read and written",
    r"OBJECT_NUM_BLOCKS": "g4_gb bounds shared storage, over all instances",
    r"NIXL_BACKEND_\w+|TRANSFER_BATCH_SIZE|G[23]PB_\w+": "shared storage has a client of its own",
    r"HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "every complete block is offered to G2",
    r"MAX_CONCURRENT_TRANSFERS|MAX_TRANSFER_BATCH_SIZE": "copies are bounded in bytes, by store_inflight_mb",
    r"DISABLE_WRITE_COMBINED|ENABLE_NUMA": "G2 is ordinary memory where the system places it",
    r"LEADER_ZMQ_(HOST|PUB_PORT|ACK_PORT)": "leader and workers talk over a local socket without ports",
    r"TRTLLM_ZMQ_PORT|KV_EVENTS_ENABLE_CONSOLIDATOR|KV_EVENTS_CONSOLIDATOR_MODE": "events go out with the engine's own",
    r"CACHE_STATS_\w+|ENABLE_RECORD": "see `kvbm status`, `kvbm explain` and the metrics instead",
    r"NCCL_MLA_MODE|NCCL_MAX_CTAS": "blocks are not broadcast between ranks",
}
"""Upstream's other variables (patterns, without DYN_KVBM_) and why they do nothing here."""

_ELSEWHERE = {"KVBM_CONFIG", _OBJECTS_ENABLED}
_WINNERS = {
    "g2_gb": "g2_blocks",
    "g3_gb": "g3_blocks",
    "g3_write_gb_day": "g3_write_mb_s",
    "g4_write_gb_day": "g4_write_mb_s",
}
"""What has no effect beside what."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, the source of each ("default", "environment KVBM_G2_GB", ...) and sentences worth showing once."""

    settings: Settings
    sources: dict[str, str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    source: str


def load(
    *,
    extra: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Resolved:
    """Resolve every setting. `extra` is the engine's extra config; an option that is None was not given.

    Raises ConfigError for the first unknown name or bad value, naming it, its source and what is allowed.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, _Given] = {}
    notes: list[str] = []
    if file is not None or environ.get("KVBM_CONFIG"):
        try:
            given |= _from_file(file if file is not None else expanded(Path(environ["KVBM_CONFIG"])))
        except ValueError as error:
            raise ConfigError("KVBM_CONFIG", str(error)) from None
    given |= _from_environment(environ, notes)
    given |= _from_extra(extra or {})
    for name, value in (options or {}).items():
        if value is not None:
            source = f"option --{name.replace('_', '-')}"
            given |= _from_mapping({name: value}, source)
    for loser, winner in _WINNERS.items():
        if {loser, winner} <= given.keys():
            notes.append(f"{loser} from {given[loser].source} has no effect: {winner} is set and wins.")
    sources = {name: given[name].source if name in given else "default" for name in Settings.model_fields}
    return Resolved(_validated(given, environ), sources, notes)


def child_environment(**defaults: str) -> dict[str, str]:
    """This process's environment for one that it starts, with `defaults` where a variable is unset."""
    return defaults | os.environ


def set_for_library(name: str, value: str) -> None:
    """Set a variable that a library in this process reads, unless somebody has."""
    os.environ.setdefault(name, value)


def _from_file(path: Path) -> dict[str, _Given]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("KVBM_CONFIG", f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError("KVBM_CONFIG", f"{path} is not valid TOML: {error}") from None
    return _from_mapping(content, f"file {path}")


def _from_mapping(values: Mapping[str, Any], source: str) -> dict[str, _Given]:
    for name in values:
        if name not in Settings.model_fields:
            raise _unknown(name, source, Settings.model_fields)
    return {name: _Given(value, source) for name, value in values.items()}


def _from_extra(extra: Mapping[str, Any]) -> dict[str, _Given]:
    values: dict[str, Any] = {}
    for key, value in extra.items():
        name = key.removeprefix("kvbm.")
        if name in values:
            raise ConfigError(name, f"it is given twice, as {name} and kvbm.{name}", source="extra config")
        values[name] = value
    return _from_mapping(values, "extra config")


def _from_environment(environ: Mapping[str, str], notes: list[str]) -> dict[str, _Given]:
    """Ours last, so that it wins. An empty variable counts as unset."""
    ours = {f"KVBM_{name.upper()}": name for name in Settings.model_fields}
    bucket = _yes(_OBJECTS_ENABLED, environ[_OBJECTS_ENABLED]) if environ.get(_OBJECTS_ENABLED) else False
    upstream: dict[str, _Given] = {}
    own: dict[str, _Given] = {}
    for variable, value in sorted(environ.items()):
        if not variable.startswith(("KVBM_", "DYN_KVBM_")) or not value or variable in _ELSEWHERE:
            continue
        if variable == "DYN_KVBM_OBJECT_BUCKET" and not bucket:
            notes.append(f"{variable} has no effect: {_OBJECTS_ENABLED} is not true.")
            continue
        if variable in ours:
            own[ours[variable]] = _Given(value, f"environment {variable}")
        elif variable in UPSTREAM:
            # Upstream reads a count of 0 blocks as "not set".
            if not (variable.endswith("_OVERRIDE_NUM_BLOCKS") and value.strip() == "0"):
                upstream[UPSTREAM[variable]] = _Given(_turned(variable, value), f"environment {variable}")
        elif reason := _without_effect(variable):
            notes.append(f"{variable} has no effect: {reason}.")
        elif not _is_service_link(variable, value):
            raise _unknown(variable, f"environment {variable}", [*ours, *UPSTREAM, *_ELSEWHERE])
    return upstream | own


def _turned(variable: str, value: str) -> object:
    """What our setting is when upstream's variable has this value."""
    if variable == "DYN_KVBM_OBJECT_BUCKET":
        return f"s3://{value}"
    return _TURNED[variable](_yes(variable, value)) if variable in _TURNED else value


def _yes(variable: str, value: str) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value.strip())
    except ValidationError:
        raise ConfigError(
            variable, f"{value!r} is not allowed, it must be true or false", source=f"environment {variable}"
        ) from None


def _without_effect(variable: str) -> str | None:
    name = variable.removeprefix("DYN_KVBM_") if variable.startswith("DYN_") else ""
    return next((reason for pattern, reason in _WITHOUT_EFFECT.items() if re.fullmatch(pattern, name)), None)


def _is_service_link(variable: str, value: str) -> bool:
    """Kubernetes puts KVBM_SERVICE_HOST, KVBM_PORT_80_TCP ... into pods beside a Service called "kvbm"."""
    return bool(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)", variable)) or "://" in value


def _unknown(name: str, source: str, known: Iterable[str]) -> ConfigError:
    # Of what stands behind the prefix: two names that share only that are not alike.
    stems = {_stem(each): each for each in known if each.startswith("DYN_") == name.startswith("DYN_")}
    near = difflib.get_close_matches(_stem(name), stems, n=1, cutoff=0.6)
    remedy = f"Did you mean {stems[near[0]]}?" if near else "`kvbm config` lists the settings."
    return ConfigError(name, "there is no such setting", source=source, remedy=remedy)


def _stem(name: str) -> str:
    return re.sub("^(DYN_)?KVBM_", "", name)


def _validated(given: Mapping[str, _Given], environ: Mapping[str, str]) -> Settings:
    for name, entry in given.items():
        # Pydantic would take true for the number 1.
        if isinstance(entry.value, bool) and Settings.model_fields[name].annotation not in (bool, bool | None):
            raise _bad(name, entry)
    values = {"run_dir": default_run_dir(environ)} | {name: entry.value for name, entry in given.items()}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "value_error":
            raise ConfigError(name, str(first["ctx"]["error"]), source=given[name].source) from None
        raise _bad(name, given[name]) from None


def _bad(name: str, entry: _Given) -> ConfigError:
    hidden = name in _SECRETS or (name in _ADDRESSES and re.search("[@?%]", str(entry.value)))
    what = "a value that may contain a secret" if hidden else repr(shown(entry.value))
    return ConfigError(name, f"{what} is not allowed, it must be {allowed(name)}", source=entry.source)


_SECRETS = ("g4_secret_key",)
_ADDRESSES = ("g4_url", "g4_endpoint", "g4_proxy", "directory")


def shown(value: Any) -> Any:
    """A value as it may be shown: without the user, the password and the query of an address."""
    if not isinstance(value, str):
        return value
    userinfo = r"^([^/]*://)(?!/).*@" if "://" in value else r"^()(?!/).*@"
    value = re.sub(userinfo, r"\1***@", value, flags=re.DOTALL)
    return re.sub(r"(://[^?]*)\?.*", r"\1?***", value, flags=re.DOTALL)


def allowed(name: str) -> str:
    """The values setting `name` takes, in words."""
    field = Settings.model_fields[name]
    annotation, constraints = field.annotation, list(field.metadata)
    if type(None) in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *fields = get_args(annotation)
        constraints += [constraint for part in fields for constraint in part.metadata]
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if annotation is bool:
        return "true or false"
    if annotation is Path:
        return "a path"
    if annotation in (str, SecretStr):
        return _TEXTS.get(name, "a text that is not empty")
    bounds = []
    for constraint in constraints:
        if isinstance(constraint, at.Gt):
            bounds.append(f"more than {constraint.gt:,}")
        elif isinstance(constraint, at.Ge):
            bounds.append(f"at least {constraint.ge:,}")
        elif isinstance(constraint, at.Le):
            bounds.append(f"at most {constraint.le:,}")
    return f"a {'whole number' if annotation is int else 'number'}, " + " and ".join(bounds)


_TEXTS = {
    "transport_wrapper": "module:function?query",
    "directory": "an address: valkey://HOST:PORT/0, valkeys://... for TLS, or unix://PATH",
    "g4_url": "an address: s3://BUCKET/PREFIX, az://CONTAINER/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER",
    "g4_endpoint": "an address: https://HOST:PORT",
    "g4_proxy": "an address: http://HOST:PORT",
    "g4_mode": "three octal digits, as 640",
    "peer_name": "a name of at most 100 letters, digits and .:_-",
}
