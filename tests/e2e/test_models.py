"""What is refused at start."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.core.config import load
from kvbm.core.errors import ConfigError, Unsupported
from kvbm.observe import last_words
from tests.e2e.engine import BLOCK, environment


@pytest.fixture(scope="module")
def served(tiny: Path) -> tuple[Any, Any]:
    """A configuration that is served, and its KV caches."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    with environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1"):
        config = EngineArgs(
            model=str(tiny), skip_tokenizer_init=True, block_size=BLOCK, enforce_eager=True, dtype="float32"
        ).create_engine_config()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return config, KVCacheConfig(64, [], [KVCacheGroupSpec(["model.layers.0"], spec)])


Change = Callable[[Any, Any], None]


def _set(path: str, value: Any) -> Change:
    def change(config: Any, _: Any) -> None:
        part, name = path.split(".")
        setattr(config, part, copy.copy(getattr(config, part)))
        object.__setattr__(getattr(config, part), name, value)

    return change


def _groups(*names: str, block: int = BLOCK) -> Change:
    """As many groups, each with a specification of that class; the last with blocks of that size."""

    def change(_: Any, kv: Any) -> None:
        group = kv.kv_cache_groups[0]
        kv.kv_cache_groups = []
        for name in names:
            spec = type(name, (), {})()
            spec.block_size = group.kv_cache_spec.block_size
            spec.sliding_window, spec.mamba_cache_mode, spec.num_prefill_checkpoint_blocks = 64, "none", 0
            kv.kv_cache_groups.append(type(group)(["layer"], spec))
        kv.kv_cache_groups[-1].kv_cache_spec.block_size = block
        kv.hash_block_size = BLOCK

    return change


def _group(**facts: Any) -> Change:
    """One group that says that of itself."""

    def change(_: Any, kv: Any) -> None:
        kv.kv_cache_groups = [copy.copy(kv.kv_cache_groups[0])]
        for name, value in facts.items():
            setattr(kv.kv_cache_groups[0], name, value)

    return change


def _on_a_gpu(path: str, value: Any) -> Change:
    """With this, on a GPU."""

    def change(config: Any, kv: Any) -> None:
        _set("device_config.device_type", "cuda")(config, kv)
        _set(path, value)(config, kv)

    return change


def _drafting(method: str, draft: Path | None = None, **facts: Any) -> Change:
    """With a draft model in that folder."""

    def change(config: Any, _: Any) -> None:
        from vllm.config import SpeculativeConfig

        model = copy.copy(config.model_config)
        object.__setattr__(model, "model", str(draft))
        config.speculative_config = object.__new__(SpeculativeConfig)  # vLLM's own would look for the model
        parts = {"method": method, "model": str(draft), "draft_model_config": model, "draft_load_config": None} | facts
        for name, value in parts.items():
            object.__setattr__(config.speculative_config, name, value)

    return change


def _mla(config: Any, kv: Any) -> None:
    """On a CPU on which vLLM cannot go on from a cached beginning: what is loaded there gives other answers."""
    _set("scheduler_config.enable_chunked_prefill", False)(config, kv)
    group = copy.copy(kv.kv_cache_groups[0])
    group.kv_cache_spec = type("MLAAttentionSpec", (), {"block_size": group.kv_cache_spec.block_size})()
    kv.kv_cache_groups = [group]


def _pooled(pooling: str | None, tokens: str | None = None, **facts: Any) -> Change:
    """With that pooling, of all tokens or per token; `facts` are of the model's own configuration."""

    def change(config: Any, kv: Any) -> None:
        _set("model_config.pooler_config", SimpleNamespace(seq_pooling_type=pooling, tok_pooling_type=tokens))(
            config, kv
        )
        hf_config = copy.copy(config.model_config.hf_config)
        for name, value in facts.items():
            setattr(hf_config, name, value)
        config.model_config.hf_config = hf_config

    return change


def _rswa(config: Any, kv: Any) -> None:
    import dataclasses

    shape = config.model_config.model_arch_config
    if "rswa_window" not in {field.name for field in dataclasses.fields(shape)}:
        pytest.skip("this version of vLLM has none")
    _set("model_config.model_arch_config", dataclasses.replace(shape, rswa_window=64))(config, kv)


def _replayed(_: Any, kv: Any) -> None:
    """As DeepSeek V4.1 has them."""
    _groups("FullAttentionSpec")(None, kv)
    kv.kv_cache_groups[0].kv_cache_spec.prefix_replay_tokens = 128


def _left_out(_: Any, kv: Any) -> None:
    """A group that vLLM leaves out of its prefix cache."""
    _groups("FullAttentionSpec")(None, kv)
    kv.kv_cache_groups[0].kv_cache_spec.prefix_cacheable = False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_pooled("MEAN"), "pooling models"),
        (_pooled("CLS"), "pooling models"),
        (_pooled("LAST", "STEP"), "pooling models"),
        (_pooled("LAST", is_causal=False), "pooling models"),
        (_set("model_config.is_encoder_decoder", True), "encoder-decoder"),
        (_set("model_config.multimodal_config", SimpleNamespace(mm_encoder_only=True)), "multimodal encoder"),
        (_set("model_config.is_diffusion", True), "diffusion"),
        (_rswa, "R-SWA"),
        (lambda _, kv: setattr(kv, "kv_cache_groups", []), "without a KV cache"),
        (lambda _, kv: _spec(non_causal=True)(_, kv), "see the tokens after them"),
        (_replayed, "bounded replay"),
        (_left_out, "KV vLLM does not reuse"),
        (_groups("FullAttentionSpec", "SlidingWindowSpec", block=64), "blocks of different sizes"),
        (_groups("MambaSpec"), "state that is not kept at block boundaries"),
        (_groups("FullAttentionSpec", "MambaSpec"), "state that is not kept at block boundaries"),
        (_groups("CrossAttentionSpec"), "CrossAttentionSpec"),
        (_set("parallel_config.pipeline_parallel_size", 2), "pipeline parallelism"),
        (_set("parallel_config.decode_context_parallel_size", 2), "decode context parallelism"),
        (_set("parallel_config.prefill_context_parallel_size", 2), "prefill context parallelism"),
        (_set("parallel_config.nnodes", 2), "several nodes"),
        (_set("device_config.device_type", "xpu"), "copies to and from xpu memory"),
        (_group(host_resident=True), "HiSparse"),
        (_group(enable_kv_transfer=False), "makes the KV anew after a load"),
        (_on_a_gpu("model_config.enable_sleep_mode", True), "sleep mode"),
        (_mla, "cannot go on from a cached beginning"),
        (_drafting("eagle"), "speculative decoding by eagle"),
        (_drafting("draft_model", parallel_drafting=True), "made at once"),
        (_set("cache_config.calculate_kv_scales", True), "KV scales"),
    ],
)
def test_what_cannot_be_served_is_refused(served: tuple[Any, Any], change: Change, sentence: str) -> None:
    from kvbm.connect.vllm import support

    config, kv = copy.copy(served[0]), copy.copy(served[1])
    support.check(config, kv, load(environ={}))
    change(config, kv)
    with pytest.raises(Unsupported, match=sentence):
        support.check(config, kv, load(environ={}))


def test_on_a_gpu_model_runner_v2_is_served_where_it_writes_nothing_early(
    served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbm.connect.vllm import support

    config, kv = copy.copy(served[0]), copy.copy(served[1])
    _set("device_config.device_type", "cuda")(config, kv)
    monkeypatch.setattr(support, "runs_v2", lambda _: True)
    support.check(config, kv, load(environ={}))
    with monkeypatch.context() as patch:
        patch.setattr(type(kv), "needs_kv_cache_zeroing", property(lambda _: True))
        with pytest.raises(Unsupported, match="zeroes or copies blocks before"):
            support.check(config, kv, load(environ={}))
    with monkeypatch.context() as patch:
        patch.setattr(type(config.model_config), "has_inner_state", property(lambda _: True))
        with pytest.raises(Unsupported, match="zeroes or copies blocks before"):
            support.check_config(config, load(environ={}))
    _drafting("draft_model")(config, kv)
    with pytest.raises(Unsupported, match="a draft model under vLLM's model runner V2"):
        support.check_config(config, load(environ={}))


def test_pooling_by_the_last_token_is_served(served: tuple[Any, Any]) -> None:
    from kvbm.connect.vllm import support

    config = copy.copy(served[0])
    _pooled("LAST")(config, None)
    support.check(config, served[1], load(environ={}))


def test_a_machine_where_vllm_reuses_nothing(served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbm.connect.vllm import support

    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Unsupported, match="RISC-V"):
        support.check_config(served[0], load(environ={}))


def test_a_flag_that_is_off_refuses_nothing(served: tuple[Any, Any]) -> None:
    """KVBM stands aside; what it cannot find again matters to nobody then."""
    from kvbm.connect.vllm import support

    config, kv, told = copy.copy(served[0]), copy.copy(served[1]), load(environ={"KVBM_WITHOUT_PREFIX_CACHING": "1"})
    assert support.stands_aside(config, load(environ={})) is None
    _set("cache_config.enable_prefix_caching", False)(config, kv)
    support.check(config, kv, load(environ={}))
    sentence = support.stands_aside(config, load(environ={}))
    assert sentence is not None
    assert "--no-enable-prefix-caching" in sentence
    assert "without_prefix_caching=true" in sentence
    assert support.stands_aside(config, told) is None
    assert not support.only_watches(config, kv, load(environ={}))
    _groups("MambaSpec")(config, kv)
    support.check(config, kv, load(environ={}))
    assert support.only_watches(config, kv, load(environ={}))
    with pytest.raises(Unsupported, match="state that is not kept at block boundaries"):
        support.check(config, kv, told)


@pytest.mark.parametrize(("rank", "engine"), [(0, "e"), (0, "e_dp0"), (1, "e_dp1")])
def test_the_first_look_says_once_why_the_start_ends(
    served: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, engine: str
) -> None:
    """Of several data-parallel engines the first says it; who waits for it finds it under the name that it gave."""
    from kvbm.connect.vllm import KvbmConnector

    config, note = copy.copy(served[0]), last_words.expect(tmp_path, "e")
    extra = {"run_dir": str(tmp_path)}
    config.kv_transfer_config = SimpleNamespace(engine_id=engine, kv_connector_extra_config=extra)
    assert KvbmConnector.get_required_kvcache_layout(config) is None
    _pooled("MEAN")(config, None)
    _set("parallel_config.data_parallel_index", rank)(config, None)
    with caplog.at_level("ERROR", "kvbm"), pytest.raises(Unsupported):
        KvbmConnector.get_required_kvcache_layout(config)
    assert caplog.text.count("KVBM ends the start: KVBM does not serve pooling models") == (rank == 0)
    assert last_words.heard(note).startswith("KVBM does not serve pooling models") == (rank == 0)
    config.kv_transfer_config.kv_connector_extra_config = extra | {"enabled": False}
    KvbmConnector.get_required_kvcache_layout(config)


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    """Where vLLM asks."""
    from kvbm.connect.vllm import KvbmConnector

    assert KvbmConnector.requires_piecewise_for_cudagraph({"g2_gb": 1}) is False
    with pytest.raises(ConfigError, match=r"g2_gb \(from extra config\)"):
        KvbmConnector.requires_piecewise_for_cudagraph({"g2_gb": -1})


def _spec(**facts: Any) -> Change:
    """Of other blocks."""
    import dataclasses

    def change(_: Any, kv: Any) -> None:
        group = copy.copy(kv.kv_cache_groups[0])
        group.kv_cache_spec = dataclasses.replace(group.kv_cache_spec, **facts)
        kv.kv_cache_groups = [group]

    return change


def _kv(name: str, value: Any) -> Change:
    return lambda _, kv: setattr(kv, name, value)


def _shared(config: Any, kv: Any) -> None:
    """Two ranks with the same KV; they are counted in the parallel size alone where each has its own."""
    _set("parallel_config.tensor_parallel_size", 2)(config, kv)
    kv.kv_tp_replicas = 2


def test_what_changes_a_block_is_another_namespace(
    served: tuple[Any, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbm.connect.vllm import contract, identity

    def fingerprint(*changes: Change) -> str:
        config, kv = copy.copy(served[0]), copy.copy(served[1])
        for change in changes:
            change(config, kv)
        return identity.namespace(config, kv).fingerprint

    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    seen = [fingerprint(*changes) for changes in (
        [],
        [_set("cache_config.cache_dtype", "fp8")],
        [_set("cache_config.prefix_caching_hash_algo", "sha256_cbor")],
        [_set("model_config.dtype", "bfloat16")],
        [_set("model_config.max_model_len", 512)],
        [_set("model_config.quantization", "fp8")],
        [_set("parallel_config.tensor_parallel_size", 2)],
        [_shared],
        [_spec(block_size=64)],
        [_spec(num_kv_heads=4)],
        [_spec(head_size=64)],
        [_kv("kv_cache_layout", "LBNHC")],
        [_kv("hash_block_size", 16)],
        [_drafting("draft_model", tiny)],
    )]  # fmt: skip
    assert len(set(seen)) == len(seen)
    # Where weights lie is not identity; what they contain is known later (tests/e2e/test_identity_files.py).
    assert fingerprint(_set("model_config.model", str(other))) == seen[0]
    assert fingerprint(_drafting("draft_model", other)) == seen[-1]
    assert fingerprint() == seen[0] == fingerprint(_drafting("ngram")), "n-grams keep no KV"
    monkeypatch.setattr(contract, "VERSION", "0.32.99")
    assert fingerprint() not in seen


def test_hashes_that_differ_between_processes_are_refused(served: tuple[Any, Any]) -> None:
    from kvbm.connect.vllm import support

    config = copy.copy(served[0])
    _set("cache_config.prefix_caching_hash_algo", "xxhash")(config, None)
    with pytest.raises(ConfigError, match=r"prefix_caching_hash_algo.*xxhash"):
        support.check(config, served[1], load(environ={}))


def test_loading_inside_the_step_is_refused_where_it_cannot_fail_safely(served: tuple[Any, Any]) -> None:
    from kvbm.connect.vllm import support

    config = copy.copy(served[0])
    resolved = load(environ={"KVBM_ONBOARD": "sync"})
    support.check(config, served[1], resolved)
    _set("scheduler_config.async_scheduling", True)(config, None)
    with pytest.raises(ConfigError, match=r"onboard.*environment KVBM_ONBOARD"):
        support.check(config, served[1], resolved)


@pytest.mark.parametrize("names", [("FullAttentionSpec", "SlidingWindowSpec"), ("SlidingWindowSpec",)])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"KVBM_ONBOARD": "sync"}, r"onboard.*environment KVBM_ONBOARD.*sync cannot be used"),
        ({"KVBM_DIRECTORY": "redis://localhost"}, r"directory.*not shared"),
    ],
)
def test_what_needs_all_blocks_is_refused_where_some_layers_do_not(
    served: tuple[Any, Any], names: tuple[str, ...], settings: dict[str, str], sentence: str
) -> None:
    from kvbm.connect.vllm import support

    kv = copy.copy(served[1])
    support.check(served[0], kv, load(environ=settings))
    _groups(*names)(None, kv)
    support.check(served[0], kv, load(environ={}))
    with pytest.raises(ConfigError, match=sentence) as error:
        support.check(served[0], kv, load(environ=settings))
    assert ("disable-hybrid-kv-cache-manager" in str(error.value)) == (len(names) > 1)
