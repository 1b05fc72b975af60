"""``kvbm disk``: what is in the disk tier's folder, whether it is whole, and away with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvbm.cli.engines import Json, RunDir, sockets
from kvbm.cli.online import Owner, owner_of
from kvbm.cli.render import console, duration, progress, size
from kvbm.core.errors import KvbmError, UsageError
from kvbm.stores.disk.audit import audit
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.files import reported
from kvbm.stores.disk.lock import Lock, holder_of
from kvbm.stores.disk.meta import Listing, delete, listed, place_of
from kvbm.stores.disk.recovery import recover

_err = Console(stderr=True)

app = typer.Typer(no_args_is_help=True, help="Inspect, verify or purge the folder of the disk tier.")

_Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The folder, as in the setting g3_dir.")]
_Namespace = Annotated[
    str, typer.Option("--namespace", metavar="PREFIX", help="Select only namespaces whose folder begins with this.")
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
    as_json: Json = False,
    run_dir: RunDir = None,
) -> None:
    """Show every namespace: model, blocks, bytes, ages, bad blocks. Also while an engine uses it."""
    owners = {part.path: owner_of(part.path, sockets(run_dir)) for part in _parts(folder, namespace)}
    found = [_described(part, one, owners[part.path]) for part in _parts(folder, namespace) for one in part.namespaces]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("namespace", "model", "blocks", "bytes", "oldest", "newest", "last used", "bad", header_style="bold")
    for one in found:
        table.add_row(*(one[of] for of in ("folder", "model")), *map(str, _columns(one)))
    console().print(table)
    for one in found:
        if one["used_by"]:
            problem = one.get("engine", {}).get("problem")
            state = f", which leaves it alone: {problem}" if problem else ""
            console().print(f"{one['folder']} is in use by {one['used_by']}{state}", markup=False, soft_wrap=True)


@app.command()
def verify(
    folder: _Dir,
    namespace: _Namespace = "",
    repair: Annotated[bool, typer.Option("--repair", help="Remove bad blocks.")] = False,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="Read the key of encryption from this file."),
    ] = None,
    as_json: Json = False,
    run_dir: RunDir = None,
) -> None:
    """Read every block and compare it with its checksum. Ends with 1 if one is bad.

    An engine that uses the folder reads its own blocks itself, while it serves, and drops what is bad.
    """
    cipher = Cipher.from_file(key_file) if key_file else None
    found = []
    for part in _parts(folder, namespace):
        owner = owner_of(part.path, sockets(run_dir))
        if owner is not None and repair:
            note = f"Only what {owner.engine} uses is repaired while it runs."
            (_err if as_json else console()).print(note, markup=False, soft_wrap=True)
        with _locked(part.path, "kvbm disk verify", owner):
            for one in part.namespaces:
                result = _verified(str(one.path.relative_to(folder)), one, owner, cipher, repair)
                for sentence in _report(result) if not as_json else ():
                    console().print(sentence, markup=False, soft_wrap=True)
                found.append(result)
    if as_json:
        print(json.dumps(found, indent=2))
    elif dropped := sum(one["dropped"] for one in found if one["by"] is None):
        console().print(f"Dropped {dropped:,} bad blocks and records.")
    if bad := sum(one["bad"] + one["unread"] for one in found):
        raise KvbmError(f"{folder}: {bad:,} blocks or records are bad or could not be read")


@app.command()
def purge(
    folder: _Dir,
    namespace: _Namespace = "",
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            metavar="DAYS",
            min=0,
            help="Select only namespaces unused for so long.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
    run_dir: RunDir = None,
) -> None:
    """Delete namespaces, all or some, with all their blocks. KVBM empties a namespace that an engine uses."""
    if as_json and not yes:
        raise UsageError("--json does not ask before it deletes: it needs --yes")
    before = time.time() - older_than * 86400 if older_than is not None else float("inf")
    parts = _parts(folder, namespace)
    owners = {part.path: owner_of(part.path, sockets(run_dir)) for part in parts}
    used = {part.path / owner.namespace for part in parts if (owner := owners[part.path]) is not None}
    chosen = [
        Part(
            part.path,
            [one for one in part.namespaces if (time.time() if one.path in used else one.last_used) <= before],
        )
        for part in parts
    ]
    doomed = [one for part in chosen for one in part.namespaces]
    found: list[dict[str, Any]] = [
        {
            "folder": str(one.path.relative_to(folder)),
            "model": _model(one),
            "bytes": one.allocated,
            "outcome": "emptied" if one.path in used else "deleted",
        }
        for one in doomed
    ]
    for each in found if not as_json else []:
        console().print(f"{each['folder']}: {each['model']}, {size(each['bytes'])}", markup=False)
    if found and not yes:
        typer.confirm("Delete these?", abort=True)
    for part in chosen:
        if not part.namespaces:
            continue
        if (owner := owners[part.path]) is not None:
            owner.purge([one.path.name for one in part.namespaces])
        else:
            with _locked(part.path, "kvbm disk purge"), reported(f"delete what is in {part.path}"):
                for one in part.namespaces:
                    delete(one.path)
    if as_json:
        print(json.dumps(found, indent=2))
    elif not found:
        console().print("There is nothing to delete.")
    else:
        for each in found:
            if each["outcome"] == "emptied":
                console().print(f"{each['folder']} is empty; its space stays with the engine that uses it.")
        console().print(f"Deleted {size(sum(each['bytes'] for each in found if each['outcome'] == 'deleted'))}.")


def _parts(folder: Path, namespace: str) -> list[Part]:
    """What is in DIR and in its folders of data-parallel engines.

    Raises:
        UsageError: nothing, or no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    parts = [Part(path, listed(path)) for path in (folder, *sorted(folder.glob("dp[0-9]*")))]
    if not any(part.namespaces for part in parts):
        raise UsageError(f"there are no blocks of KVBM's in {folder}")
    parts = [Part(part.path, [one for one in part.namespaces if one.path.name.startswith(namespace)]) for part in parts]
    if not any(part.namespaces for part in parts):
        raise UsageError(f"no namespace in {folder} begins with {namespace!r}")
    return [part for part in parts if part.namespaces]


@contextmanager
def _locked(path: Path, what: str, owner: Owner | None = None) -> Iterator[None]:
    """Nobody else changes the folder; with an `owner` it is that engine that sees to it."""
    if owner is not None:
        yield
        return
    lock = Lock(path, what)
    try:
        yield
    finally:
        lock.release()


def _described(part: Part, one: Listing, owner: Owner | None) -> dict[str, Any]:
    name = str(one.path.relative_to(part.path.parent if part.path.name.startswith("dp") else part.path))
    holder = holder_of(part.path)
    used_by = str(holder) if holder is not None else None
    about: dict[str, Any] = {"folder": name, "model": _model(one), "bytes": one.allocated, "used_by": used_by}
    if (meta := one.meta) is None:
        return about | {"problem": _why(one)}
    found = recover(place_of(one.path, meta), time.time())
    about |= {
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
    if owner is not None and owner.namespace == one.path.name:
        now = owner.ask("disk.inspect")
        about |= {"blocks": now["blocks"], "engine": {name: now[name] for name in ("corrupt", "problem")}}
    return about


def _columns(one: dict[str, Any]) -> tuple[str, ...]:
    if "problem" in one:
        return ("", size(one["bytes"]), "", "", "", one["problem"])
    ages = [_age(one[of]) for of in ("oldest", "newest", "last_used")]
    return (f"{one['blocks']:,} of {one['slots']:,}", size(one["bytes"]), *ages, str(one["bad"]))


def _verified(
    name: str, one: Listing, owner: Owner | None, cipher: Cipher | None, repair: bool
) -> dict[str, Any]:  # fmt: skip
    """What is whole in a namespace, and what is not. `unread` are blocks, or 1 where nothing can be read."""
    about: dict[str, Any] = {"folder": name, "model": _model(one), "by": None, "problem": None, "ranks": []}
    with progress() as bar:
        if owner is not None and owner.namespace == one.path.name:
            task = bar.add_task(f"{name}, by {owner.engine}")
            counts = owner.verify(lambda looked, slots: bar.update(task, completed=looked, total=slots))
            kept = {count: counts[count] for count in ("whole", "bad", "unread")}
            return about | kept | {"by": owner.engine, "dropped": counts["bad"]}
        if one.meta is None or (one.meta.encryption and one.meta.encryption != (cipher.id if cipher else "")):
            why = "it is encrypted: give its --key-file" if one.meta else _why(one)
            return about | {"whole": 0, "bad": 0, "unread": 1, "dropped": 0, "problem": why}
        place, repair = place_of(one.path, one.meta), repair and owner is None
        for rank in range(place.ranks):
            task = bar.add_task(f"{name}, rank {rank}", total=place.num_slots)
            result = audit(
                place, rank, cipher if one.meta.encryption else None, repair=repair,
                progress=lambda count, at=task: bar.advance(at, count),  # type: ignore[misc]
            )  # fmt: skip
            about["ranks"].append(asdict(result))
    bad = sum(len(rank["bad"]) + len(rank["damaged"]) for rank in about["ranks"])
    whole = sum(rank["whole"] for rank in about["ranks"])
    return about | {"whole": whole, "bad": bad, "unread": 0, "dropped": bad if repair else 0}


def _report(result: dict[str, Any]) -> Iterator[str]:
    """What was found in a namespace, in sentences."""
    name = result["folder"]
    if result["problem"]:
        yield f"{name}: not checked, {result['problem']}"
    elif result["by"] is not None:
        text = f"{name}, read by engine {result['by']}: {result['whole']:,} blocks are whole"
        text += f", {result['bad']:,} were not and are dropped" if result["bad"] else ""
        yield text + (f", {result['unread']:,} could not be read" if result["unread"] else "")
    for number, rank in enumerate(result["ranks"]):
        text = f"{name}, rank {number}: {rank['whole']:,} blocks are whole"
        if bad := rank["bad"]:
            text += f", {len(bad):,} are not (slots {_some(bad)})"
        if damaged := rank["damaged"]:
            text += f", {len(damaged):,} records are damaged (slots {_some(damaged)})"
        yield text


def _some(slots: Sequence[int]) -> str:
    return ", ".join(map(str, slots[:10])) + (", ..." if len(slots) > 10 else "")


def _model(one: Listing) -> str:
    facts = one.meta.facts if one.meta else {}
    kind = str(facts.get("model.architectures", "?"))
    return f"{facts['model']} ({kind})" if "model" in facts and kind != "?" else str(facts.get("model", kind))


def _why(one: Listing) -> str:
    return "a later version of KVBM wrote it" if one.newer else "damaged, or in an older format"


def _age(when: float | None) -> str:
    return "" if when is None else duration(max(0.0, time.time() - when))
