"""``kvbm disk``: what is in the disk tier's folder, whether it is whole, and away with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvbm.cli.render import duration, size
from kvbm.core.errors import Broken, KvbmError
from kvbm.stores.audit import audit
from kvbm.stores.cipher import Cipher
from kvbm.stores.files import reported
from kvbm.stores.lock import Lock, holder_of
from kvbm.stores.meta import Listing, delete, listed, place_of
from kvbm.stores.recovery import recover

_out = Console(highlight=False)
_err = Console(stderr=True)

app = typer.Typer(no_args_is_help=True, help="Look into the disk tier's folder, check it, empty it.")

_Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The folder, as in the setting disk_dir.")]
_Namespace = Annotated[
    str, typer.Option("--namespace", metavar="PREFIX", help="Only namespaces whose folder begins with this.")
]


@dataclass(frozen=True, slots=True)
class Part:
    """The folder of one engine: DIR, or DIR/dp<rank> of a data-parallel one."""

    path: Path
    namespaces: list[Listing]


@app.command()
def inspect(
    folder: _Dir,
    namespace: _Namespace = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show every namespace: model, blocks, bytes, ages, bad blocks. Also while an engine uses it."""
    found = [_described(part, one) for part in _parts(folder, namespace) for one in part.namespaces]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("namespace", "model", "blocks", "bytes", "oldest", "newest", "last used", "bad", header_style="bold")
    for one in found:
        table.add_row(*(one[of] for of in ("folder", "model")), *map(str, _columns(one)))
    _out.print(table)
    for one in found:
        if one["used_by"]:
            _out.print(f"{one['folder']} is in use by {one['used_by']}", markup=False, soft_wrap=True)


@app.command()
def verify(
    folder: _Dir,
    namespace: _Namespace = "",
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is bad.")] = False,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="The key of encrypted namespaces.")
    ] = None,
) -> None:
    """Read every block and compare it with its checksum. Ends with 1 if one is bad."""
    cipher, bad, unread = (Cipher.from_file(key_file) if key_file else None), 0, 0
    for part in _parts(folder, namespace):
        with _locked(part.path, "kvbm disk verify"):
            for one in part.namespaces:
                name = str(one.path.relative_to(folder))
                key = cipher.id if cipher else ""
                if one.meta is None or (one.meta.encryption and one.meta.encryption != key):
                    why = "it is encrypted: give its --key-file" if one.meta else _why(one)
                    _out.print(f"{name}: not checked, {why}", markup=False, soft_wrap=True)
                    unread += 1
                    continue
                bad += _verified(name, one, cipher if one.meta.encryption else None, repair)
    if bad and repair:
        _out.print(f"Dropped {bad:,} bad blocks and records.")
    if bad or unread:
        raise typer.Exit(1)


@app.command()
def purge(
    folder: _Dir,
    namespace: _Namespace = "",
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="Only what was last used before then.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete namespaces, all or some, with all their blocks."""
    before = time.time() - older_than * 86400 if older_than is not None else float("inf")
    chosen = [
        Part(part.path, [one for one in part.namespaces if one.last_used <= before])
        for part in _parts(folder, namespace)
    ]
    doomed = [one for part in chosen for one in part.namespaces]
    if not doomed:
        _out.print("There is nothing to delete.")
        return
    for one in doomed:
        _out.print(f"{one.path.relative_to(folder)}: {_model(one)}, {size(one.allocated)}", markup=False)
    if not yes and not typer.confirm("Delete these?"):
        raise typer.Exit(1)
    for part in chosen:
        if part.namespaces:
            with _locked(part.path, "kvbm disk purge"), reported(f"delete what is in {part.path}"):
                for one in part.namespaces:
                    delete(one.path)
    _out.print(f"Deleted {size(sum(one.allocated for one in doomed))}.")


def _parts(folder: Path, namespace: str) -> list[Part]:
    """What is in DIR and in its folders of data-parallel engines.

    Raises:
        KvbmError: nothing, or no such folder.
    """
    if not folder.is_dir():
        raise KvbmError(f"there is no folder {folder}")
    parts = [Part(path, listed(path)) for path in (folder, *sorted(folder.glob("dp[0-9]*")))]
    if not any(part.namespaces for part in parts):
        raise KvbmError(f"there are no blocks of KVBM's in {folder}")
    parts = [Part(part.path, [one for one in part.namespaces if one.path.name.startswith(namespace)]) for part in parts]
    if not any(part.namespaces for part in parts):
        raise KvbmError(f"no namespace in {folder} begins with {namespace!r}")
    return [part for part in parts if part.namespaces]


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    lock = Lock(path, what)
    try:
        yield
    finally:
        lock.release()


def _described(part: Part, one: Listing) -> dict[str, Any]:
    name = str(one.path.relative_to(part.path.parent if part.path.name.startswith("dp") else part.path))
    used_by = holder_of(part.path)
    about: dict[str, Any] = {"folder": name, "model": _model(one), "bytes": one.allocated, "used_by": used_by}
    if (meta := one.meta) is None:
        return about | {"problem": _why(one)}
    found = recover(place_of(one.path, meta), time.time())
    return about | {
        "fingerprint": meta.fingerprint,
        "facts": meta.facts,
        "encrypted": bool(meta.encryption),
        "generation": meta.generation,
        "ranks": meta.ranks,
        "slots": meta.num_slots,
        "block_bytes": meta.block_bytes,
        "blocks": len(found.slots),
        "oldest": float(found.written_at.min()) if len(found.slots) else None,
        "newest": float(found.written_at.max()) if len(found.slots) else None,
        "created": meta.created,
        "last_used": meta.last_used,
        "bad": found.bad + found.damaged,
    }


def _columns(one: dict[str, Any]) -> tuple[str, ...]:
    if "problem" in one:
        return ("", size(one["bytes"]), "", "", "", one["problem"])
    ages = [_age(one[of]) for of in ("oldest", "newest", "last_used")]
    return (f"{one['blocks']:,} of {one['slots']:,}", size(one["bytes"]), *ages, str(one["bad"]))


def _verified(name: str, one: Listing, cipher: Cipher | None, repair: bool) -> int:
    """How many blocks and records of a namespace are bad."""
    if one.meta is None:
        raise Broken(f"{one.path} says nothing about itself")
    place, bad = place_of(one.path, one.meta), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        for rank in range(place.ranks):
            task = progress.add_task(f"{name}, rank {rank}", total=place.num_slots)
            result = audit(place, rank, cipher, repair=repair, progress=lambda n, t=task: progress.advance(t, n))  # type: ignore[misc]
            bad += len(result.bad) + len(result.damaged)
            text = f"{name}, rank {rank}: {result.whole:,} blocks are whole"
            if result.bad:
                text += f", {len(result.bad):,} are not (slots {_some(result.bad)})"
            if result.damaged:
                text += f", {len(result.damaged):,} records are damaged (slots {_some(result.damaged)})"
            _out.print(text, markup=False, soft_wrap=True)
    return bad


def _some(slots: tuple[int, ...]) -> str:
    return ", ".join(map(str, slots[:10])) + (", ..." if len(slots) > 10 else "")


def _model(one: Listing) -> str:
    return str(one.meta.facts.get("model", "?")) if one.meta else "?"


def _why(one: Listing) -> str:
    return "a later version of KVBM wrote it" if one.newer else "damaged, or in an older format"


def _age(when: float | None) -> str:
    return "" if when is None else duration(max(0.0, time.time() - when))
