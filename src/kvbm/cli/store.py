"""``kvbm store``: what KVBM keeps in shared storage, whether it is whole, and away with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from kvbm.abc.store import Absent, Damaged, Listed, ObjectStore
from kvbm.build import objects as build
from kvbm.cli.engines import Json
from kvbm.cli.render import console, duration, progress, size
from kvbm.core import config
from kvbm.core.errors import ConfigError, KvbmError, UsageError
from kvbm.stores.objects.blocks import address_of, sums_at
from kvbm.stores.objects.collector import delete_runs
from kvbm.stores.objects.collector import purge as purge_all
from kvbm.stores.objects.envelope import PLAIN_AT, Envelope, Locked, OtherVersion
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import ROOT, parse
from kvbm.stores.objects.probe import together
from kvbm.stores.objects.runs import parse as parse_run

app = typer.Typer(no_args_is_help=True, help="Inspect, verify or purge what KVBM keeps in shared storage.")

_DEADLINE_S: Final = 60.0
_PATIENCE_S: Final = 10.0
_FIRST_BYTES: Final = 1 << 16

_Url = Annotated[str, typer.Argument(metavar="[URL]", help="The storage. Default: the setting g4_url.")]
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


@dataclass(slots=True)
class Checked:
    """What was found of runs. `damaged`, `other` and `unknown` say of each why; other are those of another version,
    unknown those of namespaces of which no run could be opened: another secret seals them, or none."""

    whole: int = 0
    gone: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    locked: dict[str, str] = field(default_factory=dict)
    """Those of which it is not known yet which of both they are."""

    def settle(self, opened: set[str]) -> None:
        """Runs of these namespaces could be opened, so one of theirs that cannot be is damaged."""
        for name, why in self.locked.items():
            (self.damaged if _space(name) in opened else self.unknown)[name] = why


@app.command()
def inspect(url: _Url = "", namespace: _Namespace = "", as_json: Json = False) -> None:
    """Show every namespace: model, runs, bytes, ages. Also while engines use it."""
    _, store, envelope = _opened(url)
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
        table.add_row(each.namespace, escape(model), f"{each.runs:,}", blocks, size(each.bytes), *ages)
    console().print(table)
    console().print(f"{other['objects']:,} other objects of KVBM's, {size(other['bytes'])}")


@app.command()
def verify(
    url: _Url = "", namespace: _Namespace = "",
    repair: Annotated[bool, typer.Option("--repair", help="Delete damaged runs.")] = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Read every run and compare its blocks with their checksums. Ends with 1 if one is damaged."""
    where, store, envelope = _opened(url)
    checked, opened = Checked(), set[str]()
    with progress() as bar:
        task = bar.add_task("runs", total=None)
        for name in _runs(store, namespace):
            try:
                _check(store, envelope, name)
                checked.whole += 1
                opened.add(_space(name))
            except Absent:
                checked.gone += 1
            except Locked as error:
                checked.locked[name] = str(error)
            except OtherVersion as error:
                checked.other[name] = str(error)
            except Damaged as error:
                checked.damaged[name] = str(error)
            bar.advance(task)
    checked.settle(opened)
    damaged, other, unknown = checked.damaged, checked.other, checked.unknown
    if repair:
        deleted = delete_runs(store, (name for name in damaged if not _whole_by_now(store, envelope, name)))
        damaged = {name: damaged[name] for name in deleted}
    counts = {
        "whole": checked.whole, "damaged": len(damaged), "unknown": len(unknown), "other_version": len(other),
        "gone": checked.gone, "deleted": len(damaged) if repair else 0,
    }  # fmt: skip
    if as_json:
        print(json.dumps(counts, indent=2))
    else:
        for name, problem in damaged.items():
            console().print(f"{name}: {problem}", markup=False, soft_wrap=True)
        console().print(f"whole runs: {checked.whole:,}, damaged: {len(damaged):,}{', deleted' if repair else ''}")
        if other:
            why = next(iter(other.values()))
            console().print(f"not checked: {len(other):,}, of another version ({why})", markup=False, soft_wrap=True)
        if unknown:
            console().print(
                f"not checked: {len(unknown):,}, of {len({_space(name) for name in unknown})} namespaces of which no "
                f"run can be opened ({next(iter(unknown.values()))}; see g4_secret_file)",
                markup=False,
                soft_wrap=True,
            )
    if damaged and not repair:
        raise KvbmError(f"{where}: {len(damaged):,} damaged. kvbm store verify --repair deletes them.")


@app.command()
def purge(
    url: _Url = "", namespace: _Namespace = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Delete what KVBM keeps there, all or some namespaces. KVBM deletes nothing else in the storage."""
    if as_json and not yes:
        raise UsageError("--json does not ask before it deletes: it needs --yes")
    where, store, _ = _opened(url)
    spaces, other = _spaces(store, namespace)
    objects, nbytes = sum(each.runs for each in spaces.values()), sum(each.bytes for each in spaces.values())
    if not namespace:
        objects, nbytes = objects + other["objects"], nbytes + other["bytes"]
    if not as_json:
        console().print(f"{where}: {objects:,} objects, {size(nbytes)}", markup=False)
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


def _opened(url: str) -> tuple[str, ObjectStore, Envelope]:
    """The storage's address, the storage, and how objects there are sealed, by the settings that an engine would have
    here."""
    try:
        settings = config.load(options={"g4_url": url or None}).settings
        if settings.g4_url is None:
            raise UsageError("no storage is given. Give an address, or set g4_url (KVBM_G4_URL)")
        where, store, envelope = build.open_storage(settings.model_copy(update={"g4_deadline_s": _DEADLINE_S}))
    except ConfigError as error:
        if error.setting != "g4_url" or not url:
            raise
        raise ConfigError("URL", error.problem, remedy=error.remedy) from None
    if isinstance(store, FolderStore):
        together([store.check], _PATIENCE_S)
    return where, store, envelope


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


def _space(name: str) -> str:
    """The namespace of a run."""
    return name.removeprefix(ROOT).partition("/")[0]


def _whole_by_now(store: ObjectStore, envelope: Envelope, name: str) -> bool:
    """Whether an engine has replaced a run that was damaged, or deleted it."""
    try:
        _check(store, envelope, name)
    except (Absent, OtherVersion):
        return True
    except Damaged:
        return False
    return True


def _check(store: ObjectStore, envelope: Envelope, name: str) -> None:
    """Raises Damaged, Absent."""
    whole = memoryview(store.get(name)).cast("B")
    plain = envelope.open(name, whole)
    header = parse_run(plain)
    shape, run, names = header.shape, header.run, header.names(envelope)
    if names.run(names.digest(run.keys[-1])) != name:
        raise Damaged("it is another run than its name says")
    at = len(plain) - shape.data_bytes
    if at < PLAIN_AT:
        raise Damaged(f"it has {len(whole)} bytes")
    sums = sums_at(address_of(plain) + at, shape.block_bytes, shape.ranks * shape.blocks)
    if bad := int((sums != run.sums.reshape(-1)).sum()):
        raise Damaged(f"damaged blocks: {bad}")
