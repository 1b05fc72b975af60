"""``kvbm status``, ``explain``, ``pause`` and ``resume``: what running engines say and do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from kvbm.cli import address, render
from kvbm.cli.control import Answer, ask_all
from kvbm.core import config
from kvbm.core.errors import KvbmError

Engine = Annotated[str, typer.Option("--engine", metavar="PREFIX", help="Show only engines whose id begins with this.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Look for control sockets in this folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_err = Console(stderr=True)
_EVERY_S = 1.0


def status(
    engine: Engine = "",
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print again every second, until Ctrl-C.")] = False,
    run_dir: RunDir = None,
) -> None:
    """Show tiers, hit rates, copies in flight and health of every engine with KVBM on this machine."""
    folder = sockets(run_dir)
    answers = _ask_status(folder, engine)
    if watch:
        _watch(folder, engine, as_json)
    elif as_json:
        _print(answers)
    else:
        render.console(highlight=True).print(_picture(answers))
    _exit_if_any_failed(answers)


def explain(request_id: str, engine: Engine = "", as_json: Json = False, run_dir: RunDir = None) -> None:
    """Say what KVBM did for one of the last requests: what was matched, what was loaded, what was not and why."""
    answers = ask_all(sockets(run_dir), "explain", engine=engine, request_id=request_id)
    known = [answer for answer in answers if answer.result is not None]
    for answer in known:
        if answer.result is not None and not as_json:
            render.console(highlight=True).print(render.explain(answer.engine, answer.result))
    if as_json and known:
        _print(known)
    if not known:
        _exit_if_any_failed(answers)


def check(engine: Engine = "", as_json: Json = False, run_dir: RunDir = None) -> None:
    """Have running engines check their records against their blocks. Exits with 1 if they disagree."""
    answers = ask_all(sockets(run_dir), "check", engine=engine)
    if as_json:
        _print(answers)
    for answer in answers if not as_json else []:
        if (result := answer.result) is not None:
            part = "" if result["complete"] else " (not all blocks were looked at in the time: ask again)"
            said = "; ".join(result["problems"]) or f"nothing is wrong{part}"
            render.console().print(f"{answer.engine}: {said}", markup=False, highlight=False, soft_wrap=True)
    _exit_if_any_failed(answers)
    if wrong := [answer.engine for answer in answers if answer.result is not None and answer.result["problems"]]:
        raise KvbmError(f"KVBM's accounts do not agree with its blocks in {', '.join(wrong)}")


def pause(engine: Engine = "", as_json: Json = False, run_dir: RunDir = None) -> None:
    """Switch KVBM off in running engines. They go on without it until `kvbm resume`."""
    _apply(sockets(run_dir), "pause", "paused: it goes on without KVBM", engine, as_json)


def resume(engine: Engine = "", as_json: Json = False, run_dir: RunDir = None) -> None:
    """Switch KVBM on again after `kvbm pause`."""
    _apply(sockets(run_dir), "resume", "resumed", engine, as_json)


def _apply(folder: Path, command: str, done: str, engine: str, as_json: bool) -> None:
    answers = ask_all(folder, command, engine=engine)
    if as_json:
        _print(answers)
    for answer in answers if not as_json else []:
        if answer.error is None:
            render.console().print(f"{answer.engine} {done}", markup=False, highlight=False, soft_wrap=True)
    if len(answers) > 1 and not as_json:
        render.console().print(f"{command} went to all {len(answers)} engines; --engine PREFIX chooses.", markup=False)
    _exit_if_any_failed(answers)


def _watch(folder: Path, engine: str, as_json: bool) -> None:
    try:
        if as_json:
            while True:
                print(json.dumps([_plain(answer) for answer in _ask_status(folder, engine)]), flush=True)
                time.sleep(_EVERY_S)
        with Live(console=render.console(highlight=True), auto_refresh=False) as live:
            while True:
                live.update(_picture(_ask_status(folder, engine)), refresh=True)
                time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        return


def _picture(answers: list[Answer]) -> Group:
    return Group(
        *(
            f"[red]{escape(_sentence(answer))}[/]" if answer.result is None else render.status(answer.result)
            for answer in answers
        )
    )


def _ask_status(folder: Path, engine: str) -> list[Answer]:
    """What engines say of themselves, and where their servers listen."""
    answers = ask_all(folder, "status", engine=engine)
    for answer in answers:
        if answer.result is not None:
            answer.result["address"] = address.of(answer.result["pid"])
    return answers


def _print(answers: list[Answer]) -> None:
    """For programs."""
    print(json.dumps([_plain(answer) for answer in answers], indent=2))


def _plain(answer: Answer) -> dict[str, object]:
    return {"engine": answer.engine} | (answer.result if answer.result is not None else {"error": answer.error})


def _sentence(answer: Answer) -> str:
    return f"engine {answer.engine}: {answer.error}"


def _exit_if_any_failed(answers: list[Answer]) -> None:
    """Raises KvbmError with what the last of them said; the others stand above it."""
    failed = [_sentence(answer) for answer in answers if answer.error is not None]
    for sentence in failed[:-1]:
        _err.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise KvbmError(failed[-1])


def sockets(run_dir: Path | None) -> Path:
    """Their folder. Raises ConfigError (a KvbmError) for wrong settings."""
    return config.load(options={"run_dir": run_dir}).settings.run_dir
