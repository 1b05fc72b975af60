"""``kvbm store``: what KVBM keeps in shared storage, whether it is whole, and away with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvbm.abc.store import Absent, Listed, ObjectStore
from kvbm.cli.engines import Json
from kvbm.cli.render import console, duration, progress, size
from kvbm.core.errors import KvbmError, UsageError
from kvbm.stores.objects.blocks import address_of, sums_at
from kvbm.stores.objects.cloud import Access
from kvbm.stores.objects.collector import purge as purge_all
from kvbm.stores.objects.envelope import PLAIN_AT, Damaged, Envelope, read_secret
from kvbm.stores.objects.names import ROOT, parse
from kvbm.stores.objects.places import locate, open_store
from kvbm.stores.objects.runs import parse as parse_run

app = typer.Typer(no_args_is_help=True, help="Inspect, verify or purge what KVBM keeps in shared storage.")

_DEADLINE_S = 60.0
_FIRST_BYTES = 1 << 16

_Url = Annotated[str, typer.Argument(metavar="URL", help="The storage, as in the setting g4_url.")]
_Endpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="Find the service there, as in g4_endpoint.")
]
_Region = Annotated[str | None, typer.Option("--region", metavar="NAME", help="As in g4_region.")]
_PathStyle = Annotated[
    bool | None, typer.Option("--path-style/--host-style", help="Where the bucket is put, as in g4_path_style.")
]
_CaFile = Annotated[Path | None, typer.Option("--ca-file", metavar="FILE", help="As in g4_ca_file.")]
_Secret = Annotated[
    Path | None,
    typer.Option("--secret-file", metavar="FILE", help="Read the secret from this file, as in g4_secret_file."),
]
_Namespace = Annotated[str, typer.Option("--namespace", metavar="PREFIX", help="Select only namespaces that begin so.")]


@dataclass(slots=True)
class Space:
    """One namespace's runs. `model` and `blocks` are what one of them says, if it can be read."""

    namespace: str
    runs: int = 0
    bytes: int = 0
    oldest: float = float("inf")
    newest: float = 0.0
    model: str = ""
    run_blocks: int = 0
    block_bytes: int = 0
    ranks: int = 0
    problem: str | None = None
    sample: str = field(default="", repr=False)

    def add(self, listed: Listed) -> None:
        self.runs += 1
        self.bytes += listed.size
        self.oldest, self.newest = min(self.oldest, listed.modified), max(self.newest, listed.modified)
        self.sample = self.sample or listed.name


@app.command()
def inspect(
    url: _Url, namespace: _Namespace = "", secret_file: _Secret = None, endpoint: _Endpoint = None,
    region: _Region = None, path_style: _PathStyle = None, ca_file: _CaFile = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show every namespace: model, runs, bytes, ages. Also while engines use it."""
    store, envelope = _opened(url, secret_file, endpoint, region, path_style, ca_file)
    spaces, other = _spaces(store, namespace)
    for each in spaces.values():
        _describe(store, envelope, each)
    said = [{name: value for name, value in asdict(each).items() if name != "sample"} for each in spaces.values()]
    if as_json:
        print(json.dumps({"namespaces": said, "other": other}, indent=2))
        return
    table = Table("namespace", "model", "runs", "blocks", "bytes", "oldest", "newest", header_style="bold")
    for each in spaces.values():
        ages = [duration(max(0.0, time.time() - when)) for when in (each.oldest, each.newest)]
        blocks = f"{each.runs * each.run_blocks:,}" if each.run_blocks else "?"
        model = each.model or f"? ({each.problem or 'no name'})"
        table.add_row(each.namespace, model, f"{each.runs:,}", blocks, size(each.bytes), *ages)
    console().print(table)
    console().print(f"{other['objects']:,} other objects of KVBM's, {size(other['bytes'])}")


@app.command()
def verify(
    url: _Url, namespace: _Namespace = "", secret_file: _Secret = None,
    repair: Annotated[bool, typer.Option("--repair", help="Delete damaged runs.")] = False,
    endpoint: _Endpoint = None, region: _Region = None, path_style: _PathStyle = None, ca_file: _CaFile = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Read every run and compare its blocks with their checksums. Ends with 1 if one is damaged."""
    store, envelope = _opened(url, secret_file, endpoint, region, path_style, ca_file)
    counts = {"whole": 0, "damaged": 0, "gone": 0, "deleted": 0}
    with progress() as bar:
        task = bar.add_task("runs", total=None)
        for name in _runs(store, namespace):
            problem = _wrong(store, envelope, name)
            counts[problem if problem in ("gone",) else "damaged" if problem else "whole"] += 1
            if problem not in (None, "gone"):
                if not as_json:
                    console().print(f"{name}: {problem}", markup=False, soft_wrap=True)
                if repair:
                    store.delete([name])
                    counts["deleted"] += 1
            bar.advance(task)
    if as_json:
        print(json.dumps(counts, indent=2))
    else:
        console().print(f"{counts['whole']:,} runs are whole, {counts['damaged']:,} are damaged.")
    if counts["damaged"]:
        raise KvbmError(f"{locate(url).url}: {counts['damaged']:,} runs are damaged")


@app.command()
def purge(
    url: _Url, namespace: _Namespace = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    endpoint: _Endpoint = None, region: _Region = None, path_style: _PathStyle = None, ca_file: _CaFile = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Delete what KVBM keeps there, all or some namespaces. Nothing else is deleted, whatever lies there."""
    if as_json and not yes:
        raise UsageError("--json does not ask before it deletes: it needs --yes")
    store, _ = _opened(url, None, endpoint, region, path_style, ca_file)
    spaces, other = _spaces(store, namespace)
    objects, nbytes = sum(each.runs for each in spaces.values()), sum(each.bytes for each in spaces.values())
    if not namespace:
        objects, nbytes = objects + other["objects"], nbytes + other["bytes"]
    if not as_json:
        console().print(f"{locate(url).url}: {objects:,} objects, {size(nbytes)}", markup=False)
    if objects and not yes:
        typer.confirm("Delete these?", abort=True)
    deleted = freed = 0
    with progress() as bar:
        task = bar.add_task("objects", total=objects)
        for each in [None] if not namespace else [*spaces]:
            so_far = deleted
            more, bytes_ = purge_all(
                store,
                each,
                lambda count, before=so_far: bar.update(task, completed=before + count),  # type: ignore[misc]
            )
            deleted, freed = deleted + more, freed + bytes_
    if as_json:
        print(json.dumps({"deleted": deleted, "bytes": freed}, indent=2))
    else:
        console().print(f"Deleted {deleted:,} objects, {size(freed)}.")


def _opened(
    url: str,
    secret_file: Path | None,
    endpoint: str | None,
    region: str | None,
    path_style: bool | None,
    ca_file: Path | None,
) -> tuple[ObjectStore, Envelope]:
    access = Access(_DEADLINE_S, endpoint, region, path_style, ca_file)
    envelope = Envelope(None if secret_file is None else read_secret(secret_file))
    return open_store(locate(url), access), envelope


def _spaces(store: ObjectStore, prefix: str) -> tuple[dict[str, Space], dict[str, int]]:
    """Namespaces by name, and what else is ours."""
    spaces: dict[str, Space] = {}
    other = {"objects": 0, "bytes": 0}
    with progress() as bar:
        task = bar.add_task("objects", total=None)
        for page in store.list(ROOT):
            for each in page:
                ours = parse(each.name)
                if ours is not None and ours.kind == "run" and ours.space.startswith(prefix):
                    spaces.setdefault(ours.space, Space(ours.space)).add(each)
                elif ours is not None and ours.kind != "run":
                    other["objects"] += 1
                    other["bytes"] += each.size
            bar.advance(task, len(page))
    return spaces, other


def _describe(store: ObjectStore, envelope: Envelope, space: Space) -> None:
    """What one of its runs says."""
    try:
        if envelope.sealed:
            plain = envelope.open(space.sample, memoryview(store.get(space.sample)).cast("B"))
        else:
            whole = memoryview(store.get_range(space.sample, 0, _FIRST_BYTES)).cast("B")
            plain = envelope.open(space.sample, whole)
        shape, _, _, space.model = parse_run(plain)
    except Absent:
        space.problem = "it is being deleted"
    except Damaged as error:
        space.problem = str(error)
    else:
        space.run_blocks, space.ranks, space.block_bytes = shape.blocks, shape.ranks, shape.block_bytes


def _runs(store: ObjectStore, prefix: str) -> Iterator[str]:
    for page in store.list(ROOT):
        for each in page:
            ours = parse(each.name)
            if ours is not None and ours.kind == "run" and ours.space.startswith(prefix):
                yield each.name


def _wrong(store: ObjectStore, envelope: Envelope, name: str) -> str | None:
    """What is wrong with a run: "gone" where it is not there any more."""
    try:
        whole = memoryview(store.get(name)).cast("B")
    except Absent:
        return "gone"
    try:
        plain = envelope.open(name, whole)
        header = parse_run(plain)
    except Damaged as error:
        return str(error)
    shape, run = header.shape, header.run
    names = header.names(envelope)
    if names.run(names.digest(run.keys[-1])) != name:
        return "it is another run than its name says"
    at = len(plain) - shape.data_bytes
    if at < PLAIN_AT:
        return f"it has {len(whole)} bytes"
    sums = sums_at(address_of(plain) + at, shape.block_bytes, shape.ranks * shape.blocks)
    bad = int((sums != run.sums.reshape(-1)).sum())
    return f"{bad} blocks are damaged" if bad else None
