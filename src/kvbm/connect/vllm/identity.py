"""What decides a block's bytes besides its tokens, in facts that two engines can compare one by one: what vLLM's
configuration says, beside the scheduler, and what its layers are, beside each worker. `docs/identity.md` has the list.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.model_executor import custom_op
from vllm.model_executor.models import ModelRegistry
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from kvbm.connect.vllm import contract, geometry
from kvbm.connect.vllm.inputs import CONFIGS, OTHER_VARIABLES, VARIABLES
from kvbm.core.keys import Namespace

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

Facts = dict[str, str]

_LONGEST = 160
"""Characters of a fact. Of what is longer it has the beginning and a digest."""
_DEEPEST = 16
_ABOUT = {"_commit_hash", "_name_or_path", "id2label", "label2id", "transformers_version"}
"""What a model's configuration says of itself and not of the model."""
_NAMED_FILE = "quantization_config_file"
"""What `hf_overrides` may have, and vLLM copies into the model's configuration: a place. What is there counts by its
content, as the weights do."""
_AGREED = {"engine", "model.dtype", "model.max_model_len", "parallel.tensor_parallel_size", "hash.tokens"}
"""What scheduler and workers see alike: loading a model writes into its configuration, in the process that loads it
(Llama 4, Falcon), and settles what was open."""
_SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


def namespace(config: VllmConfig, kv: KVCacheConfig) -> Namespace:
    """Everything that the configuration says of it. What the layers say is added later, see `layers`; what the weights
    contain, too."""
    model = config.model_config
    facts = {
        "engine": f"vllm {contract.VERSION}",
        "engine.plugins": said(_plugins()),
        # Whatever their defaults are: for people.
        "model.architectures": said(model.architectures),
        "model.dtype": said(model.dtype),
        "model.max_model_len": said(model.max_model_len),
        "cache.cache_dtype": said(config.cache_config.cache_dtype),
        "parallel.tensor_parallel_size": said(config.parallel_config.tensor_parallel_size),
        "kv.layout": said(geometry.inside_blocks(kv)),
        "kv.groups": _by_layer([_spec(geometry.a_spec(group)) for group in kv.kv_cache_groups]),
        "hash.tokens": said(contract.hash_block_tokens(config, kv)),
        **_hashes(config.cache_config.prefix_caching_hash_algo),
        **dict(_settings("", config)),
        **_variables(),
    }
    if geometry.replicated(config, kv):
        facts["parallel.replicated"] = "true"
    if "Transformers" in str(getattr(model, "architecture", "")) or model.multimodal_config is not None:
        # Its code for models is not vLLM's, and vLLM takes encoders of it.
        import transformers

        facts["model.transformers"] = transformers.__version__
    if facts.get("lora.lora_dtype") == facts["model.dtype"]:  # what "auto" is: engines with and without adapters share
        del facts["lora.lora_dtype"]
    return Namespace(facts, "", altered=frozenset(facts.keys() - _AGREED))


def _plugins() -> list[str]:
    """What vLLM loads that is not its own, of which version."""
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    points = [point for group in groups for point in entry_points(group=group)]
    return sorted(f"{each.name} {each.dist.name} {each.dist.version}" for each in points if each.dist is not None)


def keeps_draft(config: VllmConfig) -> bool:
    """Whether a draft model's KV is part of each block."""
    return config.speculative_config is not None and config.speculative_config.method == "draft_model"


def _hashes(name: str) -> Facts:
    """How vLLM makes a request's hashes. Where it starts from another seed in each process, no other process finds
    what this one stores."""
    function = get_hash_fn_by_name(name)
    first, second = (_none_hash(function) for _ in range(2))
    if first != second:
        log.warning(
            "KVBM: vLLM starts its block hashes from a random seed in each process, so nothing on disk or of other "
            "instances can be found. Set PYTHONHASHSEED to the same number for all engines that are to share blocks."
        )
        return {"hash.algorithm": name, "hash.seed": f"random {secrets.token_hex(16)}"}
    resolve = getattr(kv_cache_utils, "resolve_none_hash_seed", None)
    return {"hash.algorithm": name, "hash.seed": said(resolve(function)) if resolve is not None else first.hex()[:32]}


def _none_hash(function: Any) -> bytes:
    """What vLLM starts from; it makes that after the connector, from the same variable."""
    kv_cache_utils.init_none_hash(function)
    return bytes(kv_cache_utils.NONE_HASH)


# ---------------------------------------------------------------------- settings


def _settings(prefix: str, config: Any) -> Iterator[tuple[str, str]]:
    """What is not the default. What another version of vLLM has beside what `inputs.py` knows is in."""
    known = CONFIGS[type(config).__name__]
    for field in fields(config):
        value = getattr(config, field.name, None)
        name = prefix + field.name.removesuffix("_config")
        if field.name in known.left_out:
            continue
        if field.name == "hf_config":
            yield from _flat(f"{prefix}hf", _without_places(value.to_dict() if value is not None else {}))
        elif field.name == "speculative_config" and (value is None or value.method != "draft_model"):
            continue
        elif type(value).__name__ in CONFIGS:
            yield from _settings(f"{name}.", value)
        elif field.name == "mm_encoder_fp8_scale_path" and value:
            yield name, _content(Path(value))
        else:
            value = _without_places(value) if field.name == "hf_overrides" else value
            if not _same(value, _default(field)):
                yield name, said(value)


def _without_places(value: Any) -> Any:
    return {key: each for key, each in value.items() if key != _NAMED_FILE} if isinstance(value, dict) else value


def _default(field: Any) -> Any:
    """Of a dataclass, or of pydantic's."""
    inner = field.default
    if inner is MISSING and field.default_factory is not MISSING:
        return field.default_factory()
    if type(inner).__name__ == "FieldInfo":
        return inner.get_default(call_default_factory=True)
    return inner


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(_plain(value) == _plain(default))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One fact for each value of nested mappings."""
    for key, value in values.items():
        if key in _ABOUT:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}.{key}", {str(name): each for name, each in value.items()})
        else:
            yield f"{prefix}.{key}", said(value)


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError as error:
        log.warning("KVBM: cannot read %s (%s): what is stored is found by this process only", path, error.strerror)
        return f"unknown {secrets.token_hex(16)}"


def _variables() -> Facts:
    """Of those that nobody has looked at yet, only a digest: such a variable may be a secret."""
    facts: Facts = {}
    is_set = getattr(envs, "is_set", lambda _: False)
    for name in envs.environment_variables:
        if name in OTHER_VARIABLES or (name not in VARIABLES and not is_set(name)):
            continue
        try:
            value = getattr(envs, name)
        except ValueError:  # vLLM refuses it where it uses it
            value = "refused"
        if value is not None and value != "":
            facts[f"env.{name}"] = said(value) if name in VARIABLES else _digest(json.dumps(_plain(value)))
    return facts


# ---------------------------------------------------------------------- layers


def layers(config: VllmConfig, kv: KVCacheConfig, caches: Mapping[str, Any]) -> Facts:
    """What one worker's layers say, once the model is loaded and its KV caches are there."""
    specs = geometry.by_layer(kv)
    names = sorted(specs, key=geometry.layer_number)
    loaded = config.compilation_config.static_forward_context
    parts = {name: geometry.parts(caches[name]) for name in names if name in caches}
    aspects: dict[str, Sequence[Any]] = {
        "kv.spec": [_spec(specs[name]) for name in names],
        "kv.tensor": [[_form(part, kv) for part in parts.get(name, [])] for name in names],
        "kv.backend": [_backend(loaded[name]) for name in names],
        "kv.dtype": [_plain(getattr(loaded[name], "kv_cache_dtype", None)) for name in names],
        "kv.scales": [[_numbers(getattr(loaded[name], scale, None)) for scale in _SCALES] for name in names],
        "kv.place": _places([parts.get(name, []) for name in names]),
    }
    # The same layers on another generation of GPUs round otherwise, and may be laid out otherwise.
    generations = sorted({_generation(part) for each in parts.values() for part in each if part.device.type != "cpu"})
    sharing = {name: getattr(layer, "kv_sharing_target_layer_name", None) for name, layer in loaded.items()}
    return {
        "kv.layers": said(names),
        **({"kv.device": said(generations)} if generations else {}),
        "kv.sharing": said({name: target for name, target in sharing.items() if target}),
        **{aspect: _by_layer([_text(value) for value in values]) for aspect, values in aspects.items()},
    }


def _spec(spec: Any) -> str:
    """What vLLM says of a kind of layer's KV; its defaults are those of its version."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    defaults = {field.name: _default(field) for field in fields(spec)}
    said_of = [f"{name}={said(value)}" for name, value in values.items() if not _same(value, defaults[name])]
    return " ".join([type(spec).__name__, *said_of])


def _by_layer(values: Sequence[str]) -> str:
    """One value where all layers have the same, otherwise each and whose it is."""
    by_value: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        by_value.setdefault(value, []).append(str(number))
    if len(by_value) == 1:
        return said(values[0])
    whose = "; ".join(f"layers {' '.join(numbers)}: {_short(value)}" for value, numbers in by_value.items())
    return _short(whose, 4 * _LONGEST)


def _backend(layer: Any) -> str:
    """What computes it and, on a CPU, with which instructions (with AMX it packs keys another way than without)."""
    backend = getattr(layer, "attn_backend", None) or layer.get_attn_backend()
    other = f" {_named(backend)}" if isinstance(backend, type) and not backend.__module__.startswith("vllm.") else ""
    return f"{backend.get_name()} {getattr(layer, 'isa', '')}".rstrip() + other


def _generation(tensor: torch.Tensor) -> str:
    """Of the device that a tensor lies on."""
    import torch

    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"{tensor.device.type} {major}.{minor}"


def _form(tensor: torch.Tensor, kv: KVCacheConfig) -> list[Any]:
    """How a tensor's bytes lie inside a block, whatever number of blocks it has. Which of layers, blocks and heads are
    outermost does not count: a slot has the same bytes."""
    axis = next((axis for axis, length in enumerate(tensor.shape) if length and length % kv.num_blocks == 0), 0)
    shape, strides = list(tensor.shape), list(tensor.stride())
    shape[axis] //= kv.num_blocks
    inside = geometry.inside_blocks(kv)
    if tensor.dim() == _ATTENTION_DIMS and (kv.kv_cache_layout in geometry.OUTERMOST or kv.kv_cache_layout != inside):
        strides = _dense(shape, inside)
    # In front of the blocks (K and V apart, say) a stride counts all blocks.
    strides[:axis] = [-1] * axis
    return [str(tensor.dtype), axis, shape, strides]


_ATTENTION_DIMS = 4
"""Logical [B, H, N, C]; a recurrent layer's states have others."""


def _dense(shape: Sequence[int], inside: str | None) -> list[int]:
    """The strides of logical [B, H, N, C] that lies in this order (LBHNC or LBNHC) without gaps."""
    _, heads, tokens, content = shape
    outer = (tokens * content, content) if inside == "LBHNC" else (content, heads * content)
    return [heads * tokens * content, *outer, 1]


def _places(parts: Sequence[Sequence[torch.Tensor]]) -> list[Any]:
    """Of each layer, which piece of memory it lies in and as which part of that: layers that share memory have one."""
    known: dict[int, int] = {}
    starts: list[list[tuple[int, int]]] = []
    for tensors in parts:
        starts.append(
            [(known.setdefault(each.untyped_storage().data_ptr(), len(known)), each.data_ptr()) for each in tensors]
        )
    order = {start: at for at, start in enumerate(sorted({start for each in starts for start in each}))}
    return [[[memory, order[memory, start]] for memory, start in each] for each in starts]


def _numbers(scale: Any) -> Any:
    """A scale, one number or several."""
    return scale.flatten().tolist() if hasattr(scale, "tolist") else _plain(scale)


def others(config: VllmConfig) -> Facts:
    """Classes that are not vLLM's under names of its: they compute as they like. Scripts put them there, maybe not in
    every process: a worker has to say it."""
    layers = getattr(custom_op, "op_registry_oot", {})
    found = {f"engine.layer.{name}": (each.__module__, each.__qualname__) for name, each in layers.items()}
    models = {"model": config.model_config}
    if keeps_draft(config):
        models["speculative.draft_model"] = config.speculative_config.draft_model_config
    for name, model in models.items():
        known = ModelRegistry.models.get(str(getattr(model, "architecture", "")))
        if (each := getattr(known, "model_cls", None)) is not None:
            found[f"{name}.class"] = each.__module__, each.__qualname__
        elif known is not None:  # nothing is imported for this
            found[f"{name}.class"] = str(known.module_name), str(known.class_name)
    return {
        name: f"{module}.{each} {_content(_file(module))}"
        for name, (module, each) in found.items()
        if not module.startswith("vllm.")
    }


def _file(module: str) -> Path:
    """Where a module's code stands; nowhere where it was typed."""
    try:
        where = sys.modules.get(module) or find_spec(module)
    except (ImportError, ValueError):
        where = None
    return Path(str(getattr(where, "__file__", None) or getattr(where, "origin", None) or module))


# ---------------------------------------------------------------------- words


def said(value: Any) -> str:
    """A value as a fact: the same text for the same value in every process."""
    return _short(_text(_plain(value)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 40]}... {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _named(cls: type) -> str:
    """Remote code's modules are called by where they lie; it counts with the weights."""
    return (
        cls.__name__
        if cls.__module__.startswith(("vllm.", "transformers_modules."))
        else f"{cls.__module__}.{cls.__qualname__}"
    )


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it, without anything that is a process's own (addresses, orders of sets)."""
    deeper = partial(_plain, depth=depth + 1)
    if value is None or isinstance(value, bool | int | float | str):
        return value.name if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return value.name
    if depth > _DEEPEST:
        return type(value).__name__
    if isinstance(value, bytes | Path):
        return value.hex() if isinstance(value, bytes) else str(value)
    if isinstance(value, Mapping):
        return {str(key): deeper(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [deeper(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((deeper(each) for each in value), key=_text)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "torch":  # a dtype, a device; of tensors what they hold
        return [str(value.dtype), _digest(str(value.tolist()))] if hasattr(value, "tolist") else str(value)
    names = [field.name for field in fields(value)] if is_dataclass(value) else sorted(getattr(value, "__dict__", {}))
    if not names and " at 0x" not in (text := repr(value)):  # a pattern, a number of numpy's, a part of a function
        return text
    return {"": _named(type(value)), **{name: deeper(getattr(value, name, None)) for name in names}}
