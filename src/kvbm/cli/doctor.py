"""``kvbm doctor``: what is wrong with the engines here, and what this machine has of what KVBM can use: each thing is
tried and not looked up."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from kvbm import __version__
from kvbm.build import leader as build
from kvbm.build import memory
from kvbm.build.place import Place
from kvbm.cli import gpu, preflight, serve
from kvbm.cli.control import ask_all
from kvbm.cli.engines import Json
from kvbm.cli.render import console, size
from kvbm.core import config, cpus, identity
from kvbm.core.errors import Broken, KvbmError
from kvbm.native import Ring
from kvbm.transfer.file import REFUSALS
from kvbm.transfer.nixl import BACKENDS, probe
from kvbm.transfer.nixl.agent import installed

_USED_FOR: Final = {
    "UCX": "memory of other instances",
    "POSIX": "files, as io_uring without NIXL does it",
    "GDS": "between GPU memory and files",
    "GDS_MT": "between GPU memory and files, several threads",
    "OBJ": "object storage",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried."""

    what: str
    ok: bool
    says: str


def doctor(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Check this command line of `kvbm serve`, too."),
    ] = None,
    as_json: Json = False,
    bucket: Annotated[str, typer.Option(help="Test object storage in this bucket. Small objects stay there.")] = "",
    endpoint: Annotated[str, typer.Option(metavar="URL", help="Connect to this endpoint instead of AWS.")] = "",
) -> None:
    """Ask the engines that run here what is wrong with them, and try what KVBM can use on this machine.

    KVBM works without each of these parts; each line says what is lost. Ends with status 0 unless a setting is wrong,
    or MODEL could not be served: then with the sentence that `kvbm serve` would end with. Object storage is
    tried where a bucket is given; credentials are found where AWS's tools find them.
    """
    resolved = config.load()
    settings = resolved.settings
    build.check(resolved, serve.ENGINE)
    launch = serve.prepare(model, context.args, resolved) if model is not None else None
    disk = preflight.disk_folder(settings)
    folder = disk if disk is not None and disk.is_dir() else None
    findings = []
    table = Table("", "what", "finding", header_style="bold", title=f"KVBM {__version__}", title_justify="left")
    objects = {"bucket": bucket} if bucket else {}
    objects |= {"endpoint_override": endpoint} if endpoint else {}
    for finding in (
        *_engines(settings.run_dir),
        *_installation(resolved),
        *([] if launch is None else [Finding(f"model {model}", True, "nothing that shows before the start is wrong")]),
        Finding("disk tier (G3)", *preflight.disk(settings)),
        Finding("shared storage (G4)", *preflight.storage(settings)),
        *_findings(folder, objects),
    ):
        findings.append(finding)
        table.add_row("[green]yes[/]" if finding.ok else "[yellow]no[/]", Text(finding.what), Text(finding.says))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console().print(table)


def _engines(run_dir: Path) -> Iterator[Finding]:
    """Those that run here, and what is wrong with each."""
    try:
        answers = ask_all(run_dir, "health")
    except KvbmError:
        yield Finding("engines", True, f"none answers in {run_dir}")
        return
    for answer in answers:
        said = answer.result or {}
        wrong = [str(answer.error)] if answer.result is None else list(said["problems"])
        wrong += [f"{tier.upper()} is not used: {why}" for tier, why in said.get("degraded", {}).items()]
        wrong += said.get("smaller", {}).values()
        paused = "paused" if said.get("paused") else "healthy"
        yield Finding(f"engine {answer.engine}", not wrong, "; ".join(wrong) or paused)
        for sentence in said.get("namesakes", ()):
            yield Finding(f"namespace of {answer.engine}", False, sentence)


def _installation(resolved: config.Resolved) -> Iterator[Finding]:
    """What an engine that is started from here would have."""
    given = [f"{name} ({source})" for name, source in resolved.sources.items() if source != "default"]
    yield Finding("settings", True, "; ".join([", ".join(given) or "none is set", *resolved.notes]))
    try:
        version, kind = serve.installed_engine()
        served = version.startswith(tuple(f"{each}." for each in identity.VLLM))
        says = f"{version} for {'CPUs' if kind == 'cpu' else 'GPUs, on which vLLM with KVBM is untested'}"
        says += "" if served else f": KVBM serves {', '.join(identity.VLLM)}"
        yield Finding("vLLM", served, says)
    except KvbmError as error:
        yield Finding("vLLM", False, str(error))
    if (kept := config.child_environment().get(serve.RESERVED)) is not None:
        yield Finding("cores", True, f"vLLM keeps {kept} free for its scheduler: environment {serve.RESERVED}")
    else:
        yield Finding("cores", True, "`kvbm serve` has vLLM keep one free for each rank, as it does without KVBM")
    if resolved.settings.g2_blocks is not None:
        yield Finding(
            "host memory (G2)", True, f"{resolved.settings.g2_blocks:,} blocks of the engine's size: g2_blocks"
        )
        return
    try:
        megabytes, why = memory.size(resolved, Place("doctor", 1), 1_000_000)
        yield Finding("host memory (G2)", True, f"an engine would take {size(megabytes * 1e6)}: {why}")
    except KvbmError as error:
        yield Finding("host memory (G2)", False, str(error))


def _findings(folder: Path | None, objects: dict[str, str]) -> Iterator[Finding]:
    yield Finding(
        "machine",
        True,
        f"Linux {platform.release()}, {len(cpus.given())} of {os.cpu_count()} processors, {platform.machine()}",
    )
    try:
        Ring(1)
        yield Finding("io_uring", True, "the disk tier uses it")
    except OSError as error:
        reason = REFUSALS.get(error.errno or 0, str(error))
        yield Finding("io_uring", False, f"{reason}: the disk tier uses threads")
    yield _direct(folder or Path(tempfile.gettempdir()))
    yield from (Finding(*finding) for finding in gpu.tried())
    try:
        yield Finding("NIXL", True, f"version {installed()}")
    except Broken as error:
        yield Finding("NIXL", False, f"{error}: nothing is shared between instances")
        return
    for backend in BACKENDS:
        if backend == "OBJ" and "bucket" not in objects:
            yield Finding(f"NIXL OBJ: {_USED_FOR['OBJ']}", False, "not tried: --bucket says where")
            continue
        report = probe(backend, folder, objects if backend == "OBJ" else None)
        fast = f"{size(report.gb_s * 1e9)}/s in small transfers" if report.gb_s is not None else ""
        yield Finding(f"NIXL {backend}: {_USED_FOR[backend]}", report.problem is None, report.problem or fast)


def _direct(folder: Path) -> Finding:
    try:
        os.close(os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600))
    except OSError as error:
        return Finding(f"direct I/O in {folder}", False, f"{error.strerror}: the disk tier goes through the page cache")
    free = os.statvfs(folder)
    return Finding(f"direct I/O in {folder}", True, f"{size(free.f_bavail * free.f_frsize)} are free there")
