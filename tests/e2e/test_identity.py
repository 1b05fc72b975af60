"""What is part of the namespace and what is not, by vLLM's own configuration. No engine runs."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.core.keys import Namespace
from tests.e2e.engine import BLOCK, environment

Facts = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def config(tiny: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    with environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1"):
        return EngineArgs(
            model=str(tiny), skip_tokenizer_init=True, block_size=BLOCK, enforce_eager=True, dtype="float32"
        ).create_engine_config()


def _kv(*layers: str, **changes: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        **({"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32} | changes)
    )
    return KVCacheConfig(64, [], [KVCacheGroupSpec(list(layers or ("model.layers.0",)), spec)])


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with these fields, each `a.b.c`, set."""
    config = copy.copy(config)
    for path, value in changes.items():
        *parts, name = path.split(".")
        part = config
        for step in parts:
            inner = copy.copy(getattr(part, step))
            object.__setattr__(part, step, inner)
            part = inner
        object.__setattr__(part, name, value)
    return config


def _namespace(config: Any, **changes: Any) -> Namespace:
    from kvbm.connect.vllm import identity

    return identity.namespace(_changed(config, changes), _kv())


def test_every_field_and_variable_of_this_version_is_known() -> None:
    """What is new in a version is part of the namespace until somebody has looked at it."""
    import vllm.config
    from vllm import envs

    from kvbm.connect.vllm.inputs import CONFIGS, OTHER_VARIABLES, VARIABLES

    for name, known in CONFIGS.items():
        there = {field.name for field in fields(getattr(vllm.config, name))}
        assert there - known.included - known.left_out == set(), f"{name}: in or out? See docs/identity.md"
        assert not known.included & known.left_out
    assert envs.environment_variables.keys() - VARIABLES - OTHER_VARIABLES == set()
    assert not VARIABLES & OTHER_VARIABLES
    page = (Path(__file__).parents[2] / "docs" / "identity.md").read_text()
    fields_of = {name for known in CONFIGS.values() for name in known.included | known.left_out}
    assert {name for name in fields_of | VARIABLES | OTHER_VARIABLES if f"`{name}`" not in page} == set()


class _Other:
    """Some class of a model, or of a quantisation."""

    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config.model_impl": "transformers"},
        {"model_config.hf_overrides": {"rope_theta": 5}},
        {"model_config.hf_overrides": lambda config: config},
        {"model_config.model_class_overrides": {"LlamaForCausalLM": "a.b:C"}},
        {"model_config.quantization_config": {"ignore": ["lm_head"]}},
        {"model_config.quantization_config": {"ignore": ["lm_head", "re:.*mlp.*"]}},
        {"model_config.convert": "embed"},
        {"model_config.pooler_config": SimpleNamespace(pooling_type="LAST")},
        {"model_config.disable_sliding_window": True},
        {"quant_config": _Other(ignored_layers=["a"], activation_scheme="static")},
        {"quant_config": _Other(ignored_layers=["a", "b"], activation_scheme="static")},
        {"cache_config.kv_cache_dtype_skip_layers": ["1"]},
        {"cache_config.kv_cache_dtype_skip_layers": ["2"]},
        {"cache_config.mamba_ssm_cache_dtype": "float16"},
        {"cache_config.kv_sharing_fast_prefill": True},
        {"attention_config.use_non_causal": True},
        {"attention_config.use_prefill_query_quantization": True},
        {"attention_config.indexer_kv_dtype": "fp8"},
        {"kernel_config.moe_backend": "marlin"},
        {"mamba_config.enable_stochastic_rounding": True},
        {"parallel_config.worker_extension_cls": "a.B"},
        {"parallel_config.decode_context_parallel_size": 2},
        {"additional_config": {"plugin": 1}},
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_changes_values_is_another_namespace(config: Any, changes: dict[str, Any]) -> None:
    plain, other = _namespace(config), _namespace(config, **changes)
    assert plain.fingerprint != other.fingerprint
    differ = {name for name in plain.facts.keys() | other.facts if plain.facts.get(name) != other.facts.get(name)}
    assert len(differ) == 1, "the fact that is named is the one that was changed"
    assert next(iter(changes)).rsplit(".", 1)[-1].removesuffix("_config") in differ.pop()
    assert other.rank_fingerprint == plain.rank_fingerprint, "a worker that sees it otherwise does not end the start"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config.seed": 7}, {"model_config.enforce_eager": False}, {"model_config.tokenizer": "/x"},
        {"model_config.served_model_name": "x"}, {"model_config.hf_token": "secret"},
        {"model_config.generation_config": "vllm"}, {"cache_config.gpu_memory_utilization": 0.5},
        {"cache_config.num_gpu_blocks": 7}, {"parallel_config.data_parallel_size": 2},
        {"parallel_config.enable_expert_parallel": True}, {"scheduler_config.max_num_batched_tokens": 99},
        {"compilation_config.cudagraph_capture_sizes": [1]}, {"attention_config.flash_attn_version": 2},
        {"instance_id": "x"},
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_does_not_is_not(config: Any, changes: dict[str, Any]) -> None:
    assert _namespace(config).fingerprint == _namespace(config, **changes).fingerprint


def test_adapters_keep_the_base_model_where_it_was(config: Any) -> None:
    import torch
    from vllm.config import LoRAConfig

    def of(dtype: torch.dtype, **given: Any) -> str:
        lora = LoRAConfig(**given)
        object.__setattr__(lora, "lora_dtype", dtype)
        return _namespace(config, lora_config=lora).fingerprint

    plain = _namespace(config).fingerprint
    assert of(torch.float32) == of(torch.float32, max_lora_rank=64) == plain
    assert len({plain, of(torch.float16), of(torch.float32, target_modules=["q_proj"])}) == 3


def test_every_value_of_a_models_configuration_counts(config: Any) -> None:
    from transformers import LlamaConfig

    def of(**values: Any) -> Namespace:
        return _namespace(config, **{"model_config.hf_config": LlamaConfig(**values)})

    ignoring = {"quant_method": "compressed-tensors", "ignore": ["a" * 50] * 9}
    more = ignoring | {"ignore": ["a" * 50] * 8 + ["b" * 50]}
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    seen = [of(), of(quantization_config=ignoring), of(quantization_config=more), of(rope_parameters=rope)]
    assert len({each.fingerprint for each in seen}) == len(seen)
    assert seen[3].facts["model.hf.rope_parameters.factor"] == "4.0"
    assert seen[1].facts["model.hf.quantization_config.ignore"] != seen[2].facts["model.hf.quantization_config.ignore"]
    assert of(name_or_path="/elsewhere", _commit_hash="1").fingerprint == seen[0].fingerprint
    assert all(isinstance(fact, str) and len(fact) < 700 for each in seen for fact in each.facts.values())


@pytest.mark.parametrize(
    ("variable", "value", "counts"),
    [
        ("VLLM_MARLIN_INPUT_DTYPE", "int8", True),
        ("VLLM_CPU_INT4_W4A8", "0", True),
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random", True),
        ("VLLM_ROCM_QUICK_REDUCE_QUANTIZATION", "INT4", True),
        ("VLLM_BATCH_INVARIANT", "1", False),
        ("VLLM_FLOAT32_MATMUL_PRECISION", "medium", True),
        ("VLLM_API_KEY", "secret", False),
        ("VLLM_HOST_IP", "10.0.0.7", False),
    ],
)
def test_variables(config: Any, variable: str, value: str, counts: bool) -> None:
    plain = _namespace(config)
    with environment(**{variable: value}):
        assert (_namespace(config).fingerprint != plain.fingerprint) == counts


def test_what_nobody_has_looked_at_counts_and_is_not_shown(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    from kvbm.connect.vllm import identity, inputs

    plain = _namespace(config)
    monkeypatch.setitem(envs.environment_variables, "VLLM_NEW", lambda: "a secret")
    assert _namespace(config).fingerprint == plain.fingerprint, "it is not set"
    with environment(VLLM_NEW="a secret"):
        facts = _namespace(config).facts
    assert facts.keys() - plain.facts.keys() == {"env.VLLM_NEW"}
    assert "secret" not in str(facts)
    known = inputs.CONFIGS["CacheConfig"]
    unknown = known._replace(left_out=known.left_out - {"num_gpu_blocks"})
    monkeypatch.setitem(identity.CONFIGS, "CacheConfig", unknown)
    assert _namespace(config, **{"cache_config.num_gpu_blocks": 3}).facts["cache.num_gpu_blocks"] == "3"


def test_a_file_of_scales_counts_by_its_content(config: Any, tmp_path: Path) -> None:
    from vllm.config import MultiModalConfig

    def of(path: Path) -> str:
        images = MultiModalConfig()
        object.__setattr__(images, "mm_encoder_fp8_scale_path", str(path))
        return _namespace(config, **{"model_config.multimodal_config": images}).fingerprint

    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for path, text in ((one, "1"), (same, "1"), (other, "2")):
        path.write_text(text)
    assert of(one) == of(same) != of(other)
    assert len({of(tmp_path / "gone"), of(tmp_path / "gone")}) == 2, "unknown: no other process has it"


def test_where_a_quantisation_is_written_down_says_nothing(config: Any) -> None:
    """What it says counts with the weights; it is copied into the model's configuration."""

    def of(path: str) -> Namespace:
        overrides = {"quantization_config_file": path, "rope_theta": 5.0}
        model = copy.deepcopy(config.model_config.hf_config)
        model.update(overrides)
        return _namespace(config, **{"model_config.hf_overrides": overrides, "model_config.hf_config": model})

    assert of("/one/quant.json").facts == of("/two/quant.json").facts
    assert of("/one/quant.json").facts["model.hf_overrides"] == '{"rope_theta": 5.0}'


def test_the_seed_of_block_hashes(
    config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.core import kv_cache_utils

    def of(seed: str | None) -> str:
        with environment(PYTHONHASHSEED=seed):
            return str(_namespace(config).facts["hash.seed"])

    assert of(None) == of(None)
    assert len({of(None), of("0"), of("1")}) == 3
    dice = iter(range(9))
    monkeypatch.setattr(
        kv_cache_utils, "init_none_hash", lambda _: setattr(kv_cache_utils, "NONE_HASH", bytes([next(dice)] * 32))
    )
    with caplog.at_level(logging.WARNING):
        assert of(None) != of(None), "nobody else can find what is stored"
    assert "Set PYTHONHASHSEED" in caplog.text


# ---------------------------------------------------------------------- layers


class _Layer:
    """What is read of a layer of vLLM."""

    kv_sharing_target_layer_name: str | None = None

    def __init__(self, **values: Any) -> None:
        self.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
        self.kv_cache_dtype, self._k_scale, self.isa = "auto", 1.0, "amx"
        self.__dict__ |= values


def _layers(blocks: int = 64, *, caches: Any = None, kv: Any = None, **changed: dict[str, Any]) -> dict[str, str]:
    """Three layers, each changed as said under its number."""
    import torch

    from kvbm.connect.vllm import identity

    names = [f"model.layers.{number}.attn" for number in (0, 1, 10)]
    loaded = {name: _Layer(**changed.get(f"l{number}", {})) for number, name in enumerate(names)}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=loaded))
    kv = kv or _kv(*names)
    kv.num_blocks = blocks
    return identity.layers(config, kv, caches or {name: torch.zeros(blocks, 2, BLOCK, 64) for name in names})


def test_a_class_under_the_name_of_another(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts put their own in the place of vLLM's: by name, and by the file that they are in, wherever that is."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    from kvbm.connect.vllm import identity

    def of(text: str, cls: str = "Mine") -> dict[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "kvbm_tried.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.setitem(ModelRegistry.models, "LlamaForCausalLM", _LazyRegisteredModel("kvbm_tried", cls))
            return identity.others(config)

    assert identity.others(config) == {}
    seen = [of("a = 1"), of("a = 2"), of("a = 1", "Other")]
    assert len({each["model.class"] for each in seen}) == 3
    assert of("a = 1") == seen[0], "not where it lies"

    monkeypatch.setitem(op_registry_oot, "RMSNorm", _Other)
    facts = identity.others(config)
    assert facts.keys() == {"engine.layer.RMSNorm"}
    assert facts["engine.layer.RMSNorm"].startswith(f"{__name__}._Other ")
    monkeypatch.setitem(op_registry_oot, "RMSNorm", type("Typed", (), {"__module__": "nowhere"}))
    assert identity.others(config) != identity.others(config), "nobody knows what it does"
    backend = type("Mine", (), {"get_name": staticmethod(lambda: "CPU_ATTN")})
    assert _layers(l1={"attn_backend": backend})["kv.backend"] != _layers()["kv.backend"]


def test_every_layer_counts() -> None:
    import torch

    plain = _layers()
    assert _layers() == _layers(blocks=48) == plain, "not the number of blocks, nor addresses"
    swapped = {name: torch.zeros(64, BLOCK, 2, 64).transpose(1, 2) for name in json.loads(plain["kv.layers"])}
    whole = torch.zeros(3, 64, 2, BLOCK, 64)
    joined, turned = (
        {name: whole[at] for name, at in zip(swapped, order, strict=True)} for order in ((0, 1, 2), (2, 1, 0))
    )
    seen = [
        plain,
        _layers(l1={"kv_cache_dtype": "fp8"}),
        _layers(l2={"kv_cache_dtype": "fp8"}),
        _layers(l2={"_k_scale": torch.tensor(0.5)}),
        _layers(l2={"_k_scale": torch.tensor([0.5, 0.25])}),
        _layers(l0={"_v_scale": 2.0}),
        _layers(l0={"isa": "vec"}),
        _layers(l2={"kv_sharing_target_layer_name": "model.layers.0.attn"}),
        _layers(caches=swapped),
        _layers(caches=joined),
        _layers(caches=turned),
        _layers(caches={name: torch.zeros(64, 2, BLOCK, 32) for name in swapped}),
        _layers(caches={name: torch.zeros(64, 2, BLOCK, 64, dtype=torch.float16) for name in swapped}),
        _layers(kv=_kv(*swapped, sliding_window=64)),
        _layers(kv=_kv(*swapped, head_size_v=16)),
    ]
    assert len({json.dumps(each, sort_keys=True) for each in seen}) == len(seen)
    assert seen[1]["kv.dtype"] == "layers 0 2: auto; layers 1: fp8"
    assert seen[3]["kv.scales"].endswith("layers 2: [[0.5], null, null, null]")


def test_layers_of_one_group_that_differ_in_size() -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    kv = _kv("a.0", "a.1")
    (group,) = kv.kv_cache_groups
    one, other = group.kv_cache_spec, replace(group.kv_cache_spec, num_kv_heads=4)
    seen = []
    for specs in ({"a.0": one, "a.1": other}, {"a.0": other, "a.1": one}, {"a.0": one, "a.1": one}):
        group.kv_cache_spec = UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=specs)
        from kvbm.connect.vllm import identity

        loaded = {name: _Layer() for name in specs}
        config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=loaded))
        seen.append(identity.layers(config, kv, {})["kv.spec"])
    assert len(set(seen)) == 3
