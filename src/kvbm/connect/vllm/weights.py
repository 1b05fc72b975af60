"""Which files vLLM's loaders read of a model, or why nobody can say. Their content is the identity of its weights.

Rather too many than too few: what vLLM, transformers or a model's class may read beside the weights counts by name and
content (`counts`), except, where safetensors are loaded, the same weights in other formats.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from vllm import envs

from kvbm.stores.content import Chosen
from kvbm.stores.stamps import Changed, absolute

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

_PATTERNS: dict[str, tuple[str, ...]] = {
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "bitsandbytes": ("*.safetensors", "*.bin", "*.pt"),
    "mistral": ("consolidated*.safetensors",),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
    "sharded_state": ("*.safetensors",),
    "gguf": ("*.gguf",),
}
"""Load formats that read files of a folder. The first pattern that finds any counts; "auto" is mistral or hf."""
_STREAMED = ("runai_streamer", "runai_streamer_sharded", "tensorizer", "modelexpress", "ipc_cache")
_TENSORS = {".safetensors", ".bin", ".pt", ".gguf"}
_BY_CODE = _TENSORS | {".pth", ".ckpt", ".npy", ".npz", ".json", ".yaml", ".yml", ".py"}
"""What a model's own code may read: nobody knows which of them."""
_BY_NAME = {"modules.json", "params.json", "weight_names.json", "added_tokens.json"}
"""What vLLM reads besides configurations and indexes."""
_UNRELATED = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "tekken.json",
    "generation_config.json", "chat_template.json", "trainer_state.json", "all_results.json", "train_results.json",
    "eval_results.json", "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt",
}  # fmt: skip
"""Files of such names that change no KV. (Of some models a tokenizer does: `_tokenizer`.)"""
_TOKENIZER = (
    "tokenizer*", "*vocab*", "merges.txt", "tekken.json", "special_tokens_map.json", "*.model", "*.tiktoken",
)  # fmt: skip
_SPEED_ONLY = {"enable_multithread_load", "num_threads", "enable_weights_track"}
"""Loader arguments that change no value."""
_ELSEWHERE = ("original", "onnx", "openvino", "coreml", "metal", "checkpoint-[0-9]*", "global_step[0-9]*")
"""Folders with the same weights for other programs, and with those that training had before."""
_OTHER_FORMATS = ("*.bin", "*.pth", "pytorch_model.bin.index.json", "consolidated*.safetensors*")
"""The same weights once more, where a folder's safetensors are loaded."""


def chooser(config: VllmConfig, *, fixed_dummies: bool) -> Callable[[], Sequence[Chosen]]:
    """What says which files count, of the target model and of a draft model. It looks at the disk, and raises Changed
    with the reason where the content is not known."""
    models = [(config.model_config, config.load_config)]
    speculative = config.speculative_config
    if speculative is not None and speculative.method == "draft_model":
        load = getattr(speculative, "draft_load_config", None) or config.load_config
        models.append((speculative.draft_model_config, load))
    return lambda: [_chosen(model, load, fixed_dummies) for model, load in models]


def counts(name: str, *, code: bool = False) -> bool:
    """Whether a file of this name, which is not one of the weights, counts. Where a model's own `code` may run it may
    read anything; else vLLM and transformers read configurations, indexes, and tensors whose names are in their code.
    Of what they do not have in their code, all tensors and whatever is called a configuration count."""
    suffix = os.path.splitext(name)[1]
    if name in _UNRELATED:
        return False
    if code:
        return suffix in _BY_CODE
    json_of_theirs = suffix == ".json" and ("config" in name or name.endswith(".index.json") or name in _BY_NAME)
    return suffix in _TENSORS or json_of_theirs


def _chosen(model: ModelConfig, load: LoadConfig, fixed_dummies: bool) -> Chosen:
    load_format, name = str(load.load_format), str(model.model)
    if load_format == "dummy":
        if not fixed_dummies:
            raise Changed(
                "they are dummies, which training may replace (dummy_weights_fixed=true says that they are for tests)"
            )
        return Chosen(tuple(_elsewhere(model)), facts=(f"dummy seed {model.seed}",))
    _refuse(model, load)
    watched: list[str] = []
    folder = _folder(name, model, load, watched)
    files, folders = ([("", folder)], []) if os.path.isfile(folder) else _files(folder, load_format, model)
    code, code_folders = _code(model, load, folder, watched)
    words, word_folders = _tokenizer(model, watched)
    return Chosen(
        tuple(files + code + words + _elsewhere(model)),
        tuple(dict.fromkeys(folders + code_folders + word_folders)),
        tuple(watched),
        _facts(load),
    )


def _refuse(model: ModelConfig, load: LoadConfig) -> None:
    """Raises Changed where files do not say what is loaded."""
    load_format = str(load.load_format)
    if getattr(model, "model_weights", "") or "://" in str(model.model):
        raise Changed("they are streamed from object storage")
    if load_format in _STREAMED:
        raise Changed(f"they are loaded by {load_format}, and not from files that KVBM can read")
    if load_format != "auto" and load_format not in _PATTERNS:
        raise Changed(f"load format {load_format} is not one that KVBM knows")
    # A plugin that has replaced a loader has imported this.
    loaders = getattr(sys.modules.get("vllm.model_executor.model_loader"), "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    loader = loaders.get(load_format)
    if loader is not None and not loader.__module__.startswith("vllm."):
        raise Changed(f"load format {load_format} is loaded by {loader.__module__}.{loader.__qualname__}")
    extra = load.model_loader_extra_config
    if not isinstance(extra, dict) or extra.keys() & {"pattern", "qlora_adapter_name_or_path"}:
        raise Changed("loader arguments name other files (model_loader_extra_config)")
    others = [name for name in ("text_model_id", "audio_model_id") if getattr(model.hf_config, name, None)]
    if others:
        raise Changed(f"parts of them are another repository's ({', '.join(others)} in its configuration)")


def _facts(load: LoadConfig) -> tuple[str, ...]:
    """What says how files become weights."""
    ignore = load.ignore_patterns
    extra = {name: value for name, value in load.model_loader_extra_config.items() if name not in _SPEED_ONLY}
    return (
        str(load.load_format),
        json.dumps(extra, sort_keys=True, default=str),
        json.dumps([ignore] if isinstance(ignore, str) else list(ignore)),
        "torchao" if getattr(load, "safetensors_load_strategy", None) == "torchao" else "",
    )


def _folder(name: str, model: ModelConfig, load: LoadConfig, watched: list[str]) -> str:
    """Where a model's files are."""
    if os.path.isdir(name) or os.path.isfile(name):
        return absolute(name)
    folder = _snapshot(name, model.revision, load.download_dir, watched)
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is not None and os.path.basename(folder) != commit:
        raise Changed(f"{name} has moved from commit {commit} to {os.path.basename(folder)} since it was loaded")
    return folder


def _snapshot(repository: str, revision: str | None, cache: str | None, watched: list[str]) -> str:
    """The folder of a hub's repository in the local cache."""
    if envs.VLLM_USE_MODELSCOPE:
        raise Changed("ModelScope's cache does not say which files belong together")
    try:
        folder = str(snapshot_download(repository, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception as error:  # what the hub's library raises depends on its version
        raise Changed(f"{repository} is not in the hub's local cache ({type(error).__name__})") from error
    root = Path(folder).parent.parent
    watched += [str(ref) for ref in (root / "refs" / str(revision or "main"),) if ref.is_file()]
    return folder


def _files(folder: str, load_format: str, model: ModelConfig) -> tuple[list[tuple[str, str]], list[str]]:
    """The weights in their order, and what else counts, by name; and the folders that were looked into."""
    top = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
    if load_format == "auto":
        mistral = any(fnmatch(os.path.basename(path), "consolidated*.safetensors") for path in top)
        load_format = "mistral" if mistral else "hf"
    weights: list[str] = []
    for pattern in _PATTERNS[load_format]:
        weights = [path for path in top if fnmatch(os.path.basename(path), pattern)]
        weights = [path for path in weights if os.path.basename(path) not in _UNRELATED]
        if weights:
            break
    safe = any(path.endswith(".safetensors") for path in weights)
    if safe and load_format != "sharded_state":
        index = "consolidated" if load_format == "mistral" else "model"
        weights = _indexed(weights, os.path.join(folder, f"{index}.safetensors.index.json"))
    chosen, folders = set(weights), [folder]
    named = []
    for path in _walk(folder, folders):
        name, base = os.path.relpath(path, folder), os.path.basename(path)
        if path in chosen:
            continue
        again = safe and name == base and any(fnmatch(base, pattern) for pattern in _OTHER_FORMATS)
        if again and not (load_format == "mistral" and base.endswith(".index.json")):
            continue
        if counts(base, code=model.trust_remote_code) or (load_format == "npcache" and name.startswith("np/")):
            named.append((name, path))
    by_name = load_format == "sharded_state"  # the name says the rank
    ordered = [(os.path.basename(path) if by_name else "", path) for path in sorted(weights, key=_natural)]
    return ordered + named, folders


def _walk(folder: str, folders: list[str]) -> Iterator[str]:
    """The files below a folder that may belong to the model; folders are added to `folders`."""
    seen: set[tuple[int, int]] = set()
    for at, names, files in os.walk(folder, followlinks=True):
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        elsewhere = _ELSEWHERE if at == folder else ()
        names[:] = sorted(
            name for name in names if not name.startswith(".") and not any(fnmatch(name, each) for each in elsewhere)
        )
        if at != folder:
            folders.append(at)
        yield from (os.path.join(at, name) for name in sorted(files) if not name.startswith("."))


def _indexed(weights: list[str], index: str) -> list[str]:
    """Those that an index names, as vLLM does it; all where there is none."""
    if not os.path.isfile(index):
        return weights
    try:
        names = json.loads(Path(index).read_text())["weight_map"].values()
        wanted = {os.path.join(os.path.dirname(index), name) for name in names}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Changed(f"{index} cannot be understood") from error
    return [path for path in weights if path in wanted]


def _natural(path: str) -> list[Any]:
    """vLLM's order of files: model-2 before model-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", os.path.basename(path))]


def _code(
    model: ModelConfig, load: LoadConfig, folder: str, watched: list[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Remote code that is not in the model's folder."""
    if not model.trust_remote_code:
        return [], []
    own = str(model.model)
    sources = {}
    for reference in _references(getattr(model.hf_config, "auto_map", None)):
        repository, separator, _ = reference.partition("--")
        if separator:
            sources[repository] = model.code_revision or (model.revision if repository == own else None)
    if not os.path.isdir(own) and (model.code_revision is not None or load.download_dir is not None):
        sources.setdefault(own, model.code_revision or model.revision)
    if model.hf_config_path and model.hf_config_path != model.model:
        sources[str(model.hf_config_path)] = None
    files, folders = [], []
    for name, revision in sources.items():
        # Only weights are in `download_dir`.
        at = absolute(name) if os.path.isdir(name) else _snapshot(name, revision, None, watched)
        if at == folder:
            continue
        folders.append(at)
        label = name if at != absolute(name) else "code"
        files += [(f"{label} {os.path.relpath(path, at)}", path) for path in _walk(at, folders) if path.endswith(".py")]
    return files, folders


def _references(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _references(each)


def _tokenizer(model: ModelConfig, watched: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Of a model whose class reads its tokenizer, which then changes what tokens mean (Engram's tables) or what a sound
    or a video does (Voxtral's spectra, the times between frames)."""
    ngrams = bool(getattr(model.hf_text_config, "engram_layer_ids", None))
    if not ngrams and (model.multimodal_config is None or model.skip_tokenizer_init):
        return [], []
    name = str(model.tokenizer)
    if not os.path.exists(at := absolute(name)):
        at = _snapshot(name, model.revision if ngrams else model.tokenizer_revision, None, watched)
    if os.path.isfile(at):
        return [("tokenizer", at)], []
    names = [each for each in sorted(os.listdir(at)) if any(fnmatch(each, pattern) for pattern in _TOKENIZER)]
    return [(f"tokenizer {each}", os.path.join(at, each)) for each in names], [at]


def _elsewhere(model: ModelConfig) -> list[tuple[str, str]]:
    """Files that options name."""
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    named = {
        "quantization config": overrides.get("quantization_config_file"),
        "encoder scales": getattr(model.multimodal_config, "mm_encoder_fp8_scale_path", None),
    }
    return [(name, absolute(str(path))) for name, path in named.items() if path]
