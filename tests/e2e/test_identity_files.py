"""Which files count for vLLM's loaders, checked against vLLM's own choice; and when nobody can say."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.stores.content import Chosen, Contents
from kvbm.stores.stamps import Changed, Start, now, process_start

FUTURE = Start(now() + 10**15)


def load_config(**more: Any) -> Any:
    return SimpleNamespace(
        **{
            "load_format": "auto", "model_loader_extra_config": {}, "ignore_patterns": ["original/**/*"],
            "download_dir": None, "safetensors_load_strategy": None,
        } | more
    )  # fmt: skip


def model_config(model: object, **more: Any) -> Any:
    return SimpleNamespace(
        **{
            "model": str(model), "model_weights": "", "revision": None, "code_revision": None, "hf_config_path": None,
            "trust_remote_code": False, "hf_config": SimpleNamespace(), "hf_overrides": {}, "multimodal_config": None,
            "seed": 3, "hf_text_config": SimpleNamespace(), "tokenizer": str(model), "tokenizer_revision": None,
            "skip_tokenizer_init": False,
        } | more
    )  # fmt: skip


def chosen(model: Any, load: Any = None, *, draft: Any = None, fixed: bool = False) -> Sequence[Chosen]:
    speculative = None
    if draft is not None:
        speculative = SimpleNamespace(method="draft_model", draft_model_config=draft, draft_load_config=None)
    config: Any = SimpleNamespace(model_config=model, load_config=load or load_config(), speculative_config=speculative)
    from kvbm.connect.vllm import weights

    return weights.chooser(config, fixed_dummies=fixed)()


def names(model: Any, load: Any = None) -> tuple[list[str], set[str]]:
    """The weights in their order, and what else counts."""
    (only,) = chosen(model, load)
    return [os.path.basename(path) for name, path in only.files if not name], {name for name, _ in only.files if name}


def fill(folder: Path, *files: str, content: str = "") -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content or name)
    return folder


UNRELATED = (
    "README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt",
    "special_tokens_map.json", "generation_config.json", "chat_template.jinja", "picture.png", ".gitattributes",
    ".cache/huggingface/model.safetensors", "original/consolidated.00.pth", "onnx/model.bin", "training_args.bin",
    "checkpoint-500/model.safetensors", "global_step9/mp_rank_00_model_states.pt",
)  # fmt: skip
BY_CODE = (
    "notes.json",
    "mergekit_config.yml",
    "recipe.yaml",
    "1_Notes/notes.json",
    "losses.npy",
    "mel.npz",
    "rng.pth",
)
"""What only a model's own code may read."""
SHARDS = [f"model-{number}-of-11.safetensors" for number in (1, 2, 10, 11)]
FOLDERS = {
    "safetensors": ["model.safetensors", "pytorch_model.bin", "config.json"],
    "shards": [*SHARDS, "config.json"],
    "mistral": ["consolidated.safetensors", "model.safetensors", "params.json"],
    "bin": ["pytorch_model-1.bin", "pytorch_model-2.bin", "config.json"],
    "pt": ["model.pt", "config.json"],
}


def test_a_path_that_goes_up_behind_a_link(tmp_path: Path) -> None:
    """It leads where the kernel says, and so vLLM: not to the folder of that name beside the link."""
    read = fill(tmp_path / "disk" / "b", "model.safetensors", content="what vLLM reads")
    fill(tmp_path / "b", "model.safetensors", content="beside it")
    fill(tmp_path / "disk" / "a", "model.safetensors")
    (tmp_path / "current").symlink_to("disk/a")
    over, known = str(tmp_path / "current" / ".." / "b"), Contents(tmp_path / "digests")
    one, other = (known.identify(lambda path=path: chosen(model_config(path)), FUTURE) for path in (over, read))
    assert one == other


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "fastsafetensors", "mistral", "pt", "npcache"])
def test_the_weights_are_those_that_vllm_reads(tmp_path: Path, folder: str, load_format: str) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    fill(tmp_path, *FOLDERS[folder], *UNRELATED)
    loader = DefaultModelLoader(LoadConfig(load_format=load_format))
    try:
        _, theirs, _, _ = loader._prepare_weights(str(tmp_path), None, None, True, None)
    except RuntimeError:  # there are none: it ends
        return
    ours, _ = names(model_config(tmp_path), load_config(load_format=load_format))
    assert sorted(ours) == sorted(map(os.path.basename, theirs))


def test_an_index_says_which(tmp_path: Path) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    fill(tmp_path, *SHARDS, "consolidated.safetensors", "head.safetensors", "config.json")
    index = {"weight_map": {f"w{at}": name for at, name in enumerate(SHARDS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load = load_config(load_format="hf")
    ours, others = names(model_config(tmp_path), load)
    loader = DefaultModelLoader(LoadConfig(load_format="hf"))
    _, theirs, _, _ = loader._prepare_weights(str(tmp_path), None, None, True, None)
    assert sorted(ours) == sorted(map(os.path.basename, theirs))
    assert ours == SHARDS, "in vLLM's order"
    assert others == {"config.json", "model.safetensors.index.json", "head.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(Changed, match="cannot be understood"):
        names(model_config(tmp_path), load)


def test_what_a_models_class_may_read_beside_them(tmp_path: Path) -> None:
    more = {
        "2_Dense/model.safetensors", "sparse_linear.pt", "adapters/x/adapter_model.bin", "hf_quant_config.json",
        "1_Pooling/config.json", "modules.json", "sparse_attention_config.json", "my_quantize_config.json",
        "preprocessor_config.json", "adapters/x/adapter_config.json", "added_tokens.json",
    }  # fmt: skip
    fill(tmp_path, "model.safetensors", "config.json", "modeling.py", *more, *UNRELATED, *BY_CODE)
    assert names(model_config(tmp_path)) == (["model.safetensors"], {"config.json", *more})
    (only,) = chosen(model_config(tmp_path))
    below = {str(tmp_path), *(str(tmp_path / name) for name in ("2_Dense", "1_Pooling", "1_Notes", "adapters"))}
    assert set(only.folders) == below | {str(tmp_path / "adapters/x")}
    by_code = {"config.json", "modeling.py", *more, *BY_CODE} - {"rng.pth"}  # pickles are the same weights once more
    assert names(model_config(tmp_path, trust_remote_code=True))[1] == by_code


def test_notes_beside_the_weights_are_not_identity(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", "model.safetensors", "config.json")
    quiet, code = model_config(folder), model_config(folder, trust_remote_code=True)
    before = identity(tmp_path, quiet), identity(tmp_path, code)
    fill(folder, *BY_CODE, *UNRELATED)
    assert identity(tmp_path, quiet) == before[0]
    assert identity(tmp_path, code) != before[1]
    fill(folder, "quantize_config.json")
    assert identity(tmp_path, quiet) != before[0]


NOT_OF_A_MODEL = {
    "the engine's own: caches, states, plans": (
        "*cache*.json", "pcie_ipc_*.json", "manifest.json", "ready.json", "release.json", "startup_plan_*.json",
        "usage_stats.json", "ray_non_carry_over_env_vars.json", "config.yaml", "version.json", "entry.json",
    ),
    "tokenizers": (
        "tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab.json", "special_tokens_map.json",
        "chat_template.json",
    ),
    "training": (
        "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json",
        "rng_state*.pth", "*_results.json",
    ),
    "looking for mistakes": ("_FULL_TENSORS.json", "_SUMMARY.json", "*report.json", "records_*.json"),
    "sampling, and people": ("generation_config.json", "modelcard.json"),
}  # fmt: skip
"""Files that vLLM and transformers name and that do not count, with what they are for."""


def test_every_file_that_they_read_by_name_counts_or_is_not_of_a_model() -> None:
    """One that another version reads, and this list does not know, is found here."""
    import transformers
    import vllm

    from kvbm.connect.vllm import weights

    roots = [(Path(vllm.__file__).parent, "**/*.py"), (Path(transformers.__file__).parent, "*.py")]
    roots += [(Path(transformers.__file__).parent / name, "*.py") for name in ("utils", "integrations", "quantizers")]
    literal = re.compile(r"""["']([\w./*{}-]*\.(?:json|ya?ml|npy|npz|bin|pt|pth|ckpt|gguf|safetensors))["']""")
    found = {
        re.sub(r"\{[^}]*\}|^\*+", "x", os.path.basename(name))
        for root, pattern in roots
        for path in root.glob(pattern)
        if "benchmarks" not in path.parts
        for name in literal.findall(path.read_text(errors="replace"))
    }
    assert {"config.json", "modules.json", "hf_quant_config.json", "mask_embedding.pt"} <= found
    of_others = [pattern for patterns in NOT_OF_A_MODEL.values() for pattern in patterns]
    unknown = {
        name
        for name in found
        if not weights.counts(name)
        and not name.startswith((".", "x."))  # endings, and whatever has them
        and not any(fnmatch(name, pattern) for pattern in of_others)
    }
    assert unknown == set()


def test_a_tokenizer_counts_where_the_models_class_reads_it(tmp_path: Path) -> None:
    folder = fill(tmp_path, "m/model.safetensors", "m/tokenizer.json") / "m"
    words = fill(tmp_path / "t", "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja", "notes.json")
    plain = model_config(folder, tokenizer=str(words))
    assert names(plain)[1] == set()
    ngrams = model_config(folder, tokenizer=str(words), hf_text_config=SimpleNamespace(engram_layer_ids=[1]))
    (only,) = chosen(ngrams)
    assert names(ngrams)[1] == {"tokenizer tokenizer.json", "tokenizer tokenizer.model.v3"}
    assert only.folders == (str(folder), str(words))
    images = {"multimodal_config": SimpleNamespace(mm_encoder_fp8_scale_path=None)}
    assert names(model_config(folder, **images))[1] == {"tokenizer tokenizer.json"}
    assert names(model_config(folder, skip_tokenizer_init=True, **images))[1] == set()


def test_linked_folders_are_looked_into(tmp_path: Path) -> None:
    fill(tmp_path / "model", "model.safetensors")
    fill(tmp_path / "dense", "model.safetensors")
    (tmp_path / "model" / "2_Dense").symlink_to("../dense")
    (tmp_path / "model" / "loop").symlink_to(".")
    assert names(model_config(tmp_path / "model"))[1] == {"2_Dense/model.safetensors"}


def test_names_count_where_they_say_something(tmp_path: Path) -> None:
    fill(tmp_path, "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors")
    assert names(model_config(tmp_path), load_config(load_format="sharded_state"))[0] == []
    fill(tmp_path / "np", "weight_names.json", "model.norm.weight")
    assert "np/model.norm.weight" in names(model_config(tmp_path), load_config(load_format="npcache"))[1]


def test_one_file(tmp_path: Path) -> None:
    fill(tmp_path, "model.gguf", "README.md")
    assert names(model_config(tmp_path / "model.gguf"), load_config(load_format="gguf")) == (["model.gguf"], set())


# ---------------------------------------------------------------------- when nobody can say


class Loader:
    """Somebody else's."""


@pytest.mark.parametrize(
    ("load", "model", "why"),
    [
        ({"load_format": "dummy"}, {}, "they are dummies"),
        ({"load_format": "runai_streamer"}, {}, "not from files that KVBM can read"),
        ({"load_format": "tensorizer"}, {}, "not from files that KVBM can read"),
        ({"load_format": "modelexpress"}, {}, "not from files that KVBM can read"),
        ({"load_format": "mine"}, {}, "is not one that KVBM knows"),
        (
            {"load_format": "sharded_state", "model_loader_extra_config": {"pattern": "x-{rank}"}},
            {},
            "arguments",
        ),
        ({}, {"model_weights": "s3://bucket/model"}, "object storage"),
        ({}, {"model": "gs://bucket/model"}, "object storage"),
        ({}, {"model": "org/absent"}, "not in the hub's local cache"),
        ({}, {"hf_config": SimpleNamespace(text_model_id="org/other")}, "another repository's"),
        (
            {},
            {"trust_remote_code": True, "hf_config": SimpleNamespace(auto_map={"AutoModel": "org/code--m.Model"})},
            "org/code is not in the hub's local cache",
        ),
    ],
)
def test_what_is_not_known(
    tmp_path: Path, load: dict[str, Any], model: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fill(tmp_path / "m", "model.safetensors")
    values = {"model": tmp_path / "m", **model}
    with pytest.raises(Changed, match=why):
        chosen(model_config(**values), load_config(**load))


def test_a_loader_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.model_executor.model_loader as loaders

    fill(tmp_path, "model.safetensors")
    chosen(model_config(tmp_path))
    monkeypatch.setitem(loaders._LOAD_FORMAT_TO_MODEL_LOADER, "auto", Loader)
    with pytest.raises(Changed, match=r"is loaded by .*test_identity_files\.Loader"):
        chosen(model_config(tmp_path))


def test_every_loader_of_vllms_is_known_to_us() -> None:
    """Read or refused, each for a reason; what a version brings new is refused."""
    import vllm.model_executor.model_loader as loaders
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from kvbm.connect.vllm import weights

    theirs = loaders._LOAD_FORMAT_TO_MODEL_LOADER
    assert theirs.keys() <= {"auto", "dummy", *weights._PATTERNS, *weights._STREAMED}
    read = weights._PATTERNS.keys() & theirs.keys() - {"sharded_state"}
    assert all(theirs[name] is DefaultModelLoader for name in read)


def test_dummies_for_tests_follow_from_their_seed(tmp_path: Path) -> None:
    def facts(seed: int) -> Sequence[Chosen]:
        return chosen(model_config(tmp_path, seed=seed), load_config(load_format="dummy"), fixed=True)

    assert facts(1) == facts(1) != facts(2)
    assert facts(1)[0].files == ()


# ---------------------------------------------------------------------- the identity


def identity(tmp_path: Path, *args: Any, **options: Any) -> str:
    return Contents(tmp_path / "cache").identify(lambda: chosen(*args, **options), FUTURE)


def test_a_draft_model_and_how_weights_are_loaded_count(tmp_path: Path) -> None:
    fill(tmp_path / "a", "model.safetensors", content="a")
    fill(tmp_path / "b", "model.safetensors", content="b")
    fill(tmp_path / "copy of b", "model.safetensors", "README.md", content="b")
    a, b, copy = (model_config(tmp_path / name) for name in ("a", "b", "copy of b"))
    seen = [
        identity(tmp_path, a), identity(tmp_path, b), identity(tmp_path, a, draft=b), identity(tmp_path, a, draft=a),
        identity(tmp_path, b, draft=a), identity(tmp_path, a, load_config(load_format="safetensors")),
        identity(tmp_path, a, load_config(ignore_patterns="x")),
        identity(tmp_path, a, load_config(model_loader_extra_config={"of_a_plugin": 3})),
        identity(tmp_path, a, load_config(safetensors_load_strategy="torchao")),
    ]  # fmt: skip
    assert len(set(seen)) == len(seen)
    assert identity(tmp_path, copy) == seen[1]
    quicker = load_config(model_loader_extra_config={"enable_multithread_load": True, "num_threads": 3})
    assert identity(tmp_path, a, quicker) == seen[0], "it changes no value"
    assert identity(tmp_path, a, draft=copy) == seen[2]
    with pytest.raises(Changed, match="not in the hub's"):
        identity(tmp_path, a, draft=model_config("org/absent"))


def test_a_configuration_or_code_that_changed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", "model.safetensors", "config.json", "modeling.py")
    plain, trusted = model_config(folder), model_config(folder, trust_remote_code=True)
    before = identity(tmp_path, plain), identity(tmp_path, trusted)
    fill(folder, "modeling.py", content="other")
    after = identity(tmp_path, plain), identity(tmp_path, trusted)
    assert before[0] == after[0], "nobody runs it"
    assert before[1] != after[1]
    fill(folder, "config.json", content="other")
    assert identity(tmp_path, plain) != after[0]


def hub(cache: Path, repository: str, commit: str, **files: str) -> Path:
    """A repository in a hub's cache, as its library leaves it."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:064x}"
        blob.write_text(content)
        (snapshot / name.replace("__", ".")).symlink_to(f"../../blobs/{blob.name}")
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot


def test_a_hubs_name_and_its_snapshot_are_one(tmp_path: Path) -> None:
    commit = "c" * 40
    snapshot = hub(tmp_path / "one", "org/name", commit, model__safetensors="weights", config__json="{}")
    there = hub(tmp_path / "two", "org/other", "d" * 40, model__safetensors="weights", config__json="{}")
    load = load_config(download_dir=str(tmp_path / "one"))
    by_name = model_config("org/name", hf_config=SimpleNamespace(_commit_hash=commit))
    (only,) = chosen(by_name, load)
    assert only.watched == (str(tmp_path / "one" / "models--org--name" / "refs" / "main"),)
    assert identity(tmp_path, by_name, load) == identity(tmp_path, model_config(snapshot))
    assert identity(tmp_path, model_config(there)) == identity(tmp_path, model_config(snapshot))
    moved = model_config("org/name", hf_config=SimpleNamespace(_commit_hash="e" * 40))
    with pytest.raises(Changed, match="has moved from commit"):
        chosen(moved, load)


def test_code_of_another_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the hub's own cache, wherever weights are downloaded to."""
    folder = fill(tmp_path / "m", "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub(tmp_path / "hub", "org/code", "c" * 40, modeling__py="one")
    model = model_config(
        folder, trust_remote_code=True, hf_config=SimpleNamespace(auto_map={"AutoModel": "org/code--modeling.Model"})
    )
    load = load_config(download_dir=str(tmp_path / "elsewhere"))
    assert names(model, load)[1] == {"org/code modeling.py"}
    hub(tmp_path / "hub", "org/m", "d" * 40, modeling__py="two")
    hub(tmp_path / "elsewhere", "org/m", "d" * 40, model__safetensors="weights")
    own = model_config("org/m", trust_remote_code=True, hf_config=SimpleNamespace(auto_map={"AutoModel": "modeling.M"}))
    assert names(own, load)[1] == {"org/m modeling.py"}
    model.code_revision = "absent"
    with pytest.raises(Changed, match="org/code is not in the hub's local cache"):
        chosen(model, load)


def test_files_that_options_name(tmp_path: Path) -> None:
    folder = fill(tmp_path / "m", "model.safetensors")
    more = fill(tmp_path, "scales.json", "quant.json")
    model = model_config(
        folder,
        hf_overrides={"quantization_config_file": str(more / "quant.json")},
        multimodal_config=SimpleNamespace(mm_encoder_fp8_scale_path=str(more / "scales.json")),
    )
    named = {"quantization config", "encoder scales"}
    assert names(model)[1] == named
    assert {name for name, _ in chosen(model, load_config(load_format="dummy"), fixed=True)[0].files} == named


# ---------------------------------------------------------------------- when an engine was configured


class VllmConfig:
    """As vLLM looks the connector's class up, while its configuration is made and later."""

    def __init__(self, transfer: Any, *, trust: bool = False) -> None:
        self.kv_transfer_config, self.model_config = transfer, SimpleNamespace(trust_remote_code=trust)
        self.__post_init__()

    def __post_init__(self) -> None:
        look_up(self.kv_transfer_config)


def look_up(kv_transfer_config: Any) -> None:
    assert sys.modules["kvbm.connect.vllm"].KvbmConnector
    assert kv_transfer_config


def test_an_engine_began_when_it_was_configured() -> None:
    from kvbm.connect.vllm import configured

    before = now()
    config = VllmConfig(SimpleNamespace(name="transfer"))
    began = configured.began(config)
    assert process_start() + 100_000_000 < before <= began <= now()
    look_up(config.kv_transfer_config)
    config.__post_init__()
    assert configured.began(config) == began, "the first time counts"
    late = SimpleNamespace(kv_transfer_config=SimpleNamespace(name="t"), model_config=config.model_config)
    look_up(late.kv_transfer_config)
    assert configured.began(late) < before, "not while a configuration was made: it may have been loaded"
    assert configured.began(VllmConfig(SimpleNamespace(name="t"), trust=True)) < before, "code runs before that"
