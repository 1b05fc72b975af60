"""What `kvbm serve` and `kvbm demo` start: arguments, environment, and the end of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import Result

from kvbm.cli import launch, preflight, serve
from kvbm.cli.demo.run import Plan
from kvbm.core.errors import KvbmError
from kvbm.observe import last_words
from kvbm.stores import stamps
from tests.marks import apart


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the CPU build of vLLM, a compiler and an old processor, whatever is here."""
    monkeypatch.setattr(serve, "engine_build", lambda: "cpu")
    monkeypatch.setattr(serve, "fast_dtype", lambda: "float32")
    monkeypatch.setattr(serve.shutil, "which", lambda _: "/usr/bin/c++")
    monkeypatch.setattr(serve, "free_port", lambda _host, first, _tries=100: first + 7)
    monkeypatch.setattr(preflight, "check_hub", lambda *_: None)


def test_defaults(tmp_path: Path) -> None:
    planned = serve.plan("smollm2", [], str(tmp_path))
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    own = "--host 127.0.0.1 --port 8007 --served-model-name smollm2 --block-size 32 --dtype float32"
    assert planned.command[:-1] == [*server, *own.split(), "--kv-transfer-config"]
    assert json.loads(planned.command[-1]) == launch.CONNECTOR | {"engine_id": planned.engine}
    assert planned.url == "http://127.0.0.1:8007"
    assert planned.environment["HF_HUB_OFFLINE"] == "1"
    assert planned.environment["VLLM_CPU_KVCACHE_SPACE"] == "4"


def test_on_a_gpu_the_engine_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "engine_build", lambda: "gpu")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    planned = serve.plan("org/model", ["--tensor-parallel-size", "2"], "org/model")
    expected = "--host 127.0.0.1 --port 8007 --tensor-parallel-size 2"
    assert planned.arguments == expected.split()
    assert "VLLM_CPU_KVCACHE_SPACE" not in planned.environment
    assert planned.served_name == "org/model"


def test_a_vllm_for_gpus_wants_one(kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "engine_build", lambda: "gpu")
    monkeypatch.setattr(serve, "run", lambda _: 0)
    monkeypatch.setitem(preflight.check_gpu.__kwdefaults__, "library", "/nowhere/libcuda.so.1")
    monkeypatch.setattr(serve, "installed_engine", lambda: ("0.32.0", "gpu"))
    refused = kvbm("serve", "org/model")
    assert refused.exit_code == 1
    assert "their driver cannot be used: /nowhere/libcuda.so.1" in refused.stderr.replace("\n", " ")
    asleep = kvbm("serve", "org/model", "--enable-sleep-mode")
    assert "sleep mode on GPUs before vLLM 0.33 (this is 0.32.0)" in asleep.stderr.replace("\n", " ")
    drafts = ["--speculative-config", '{"method": "draft_model", "model": "org/small"}']
    assert "model runner V2" not in kvbm("serve", "org/model", *drafts).stderr
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    for given in (drafts, ["--speculative-config.method=draft_model"]):
        said = kvbm("serve", "org/model", *given).stderr.replace("\n", " ")
        assert "a draft model under vLLM's model runner V2" in said
    monkeypatch.setenv("KVBM_ONBOARD", "sync")
    assert "sync cannot be used on a GPU" in kvbm("serve", "org/model").stderr.replace("\n", " ")


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.shutil, "which", lambda _: None)
    assert "--enforce-eager" in serve.plan("m", [], "m").arguments
    assert serve.plan("m", ["--enforce-eager"], "m").arguments.count("--enforce-eager") == 1
    assert "--enforce-eager" not in serve.plan("m", ["--compilation-config.mode", "0"], "m").arguments


@pytest.mark.parametrize(
    "given",
    [
        "--host 0.0.0.0 --port 9000 --dtype bfloat16 --block-size 64 --served-model-name a b",
        "--host=0.0.0.0 --port=9000 --dtype=bfloat16 --block_size=64 --served_model_name=a",
        "--host 1.2.3.4 --port 1 --dtype half --block_size 96 --served-model-name a --host 0.0.0.0 --port 9000",
    ],
)
def test_what_the_user_gave_is_left_alone(given: str) -> None:
    planned = serve.plan("smollm2", given.split(), "/models/smollm2")
    assert planned.arguments == given.split()
    assert (planned.host, planned.port, planned.served_name) == ("0.0.0.0", 9000, "a")
    assert planned.url == "http://127.0.0.1:9000"


def test_what_stands_in_vllms_own_file_counts_as_given(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\nport: 9000\nblock_size: 64\nenforce-eager: true\n")
    planned = serve.plan("smollm2", ["--config", str(file), "--port", "9001"], "/m")
    own = "--served-model-name smollm2 --dtype float32"
    assert planned.arguments == [*own.split(), "--config", str(file), "--port", "9001"]
    assert (planned.host, planned.port) == ("0.0.0.0", 9001)
    file.write_text("kv_transfer_config: {kv_connector: Other}")
    with pytest.raises(KvbmError, match="kv-transfer-config"):
        serve.plan("m", ["--config", str(file)], "m")
    file.write_text("[")
    for wrong in (file, tmp_path / "missing"):
        with pytest.raises(KvbmError, match="cannot be read"):
            serve.plan("m", ["--config", str(wrong)], "m")


@pytest.mark.parametrize(
    "given",
    ["--kv-transfer-config {}", "--kv-transfer-config={}", "--kv_transfer_config {}", "--kv-transfer-config.kv_role x"],
)
def test_a_connector_of_the_users_own_is_refused(kvbm: Callable[..., Result], given: str) -> None:
    result = kvbm("serve", "org/model", *given.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbm: --kv-transfer-config is what `kvbm serve` sets itself.")


def test_port_that_is_none(kvbm: Callable[..., Result]) -> None:
    result = kvbm("serve", "org/model", "--port", "http")
    assert (result.exit_code, result.stderr) == (2, "kvbm: --port must be a number of 1 to 65535, not 'http'\n")


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        ("--port 70000", 2, "--port must be a number of 1 to 65535, not '70000'"),
        ("--port 0", 2, "--port must be a number of 1 to 65535, not '0'"),
        ("--port TAKEN", 2, "--port TAKEN: somebody listens there on 127.0.0.1 already"),
        ("--port 8000 --host 203.0.113.9", 2, "--host 203.0.113.9: nobody can listen there: Cannot assign requested"),
        ("--block-size big", 2, "--block-size must be a number, not 'big'"),
        ("--block-size", 2, "--block-size must be a number, not ''"),
        ("-tp two", 2, "-tp must be a number, not 'two'"),
        ("--config YAML", 2, "--config YAML cannot be read: while parsing a flow node expected the"),
        ("--speculative-config {method", 2, "--speculative-config is not valid JSON: Expecting property name"),
        ("--pipeline-parallel-size 2", 1, "KVBM does not serve pipeline parallelism. Start the engine without `kvbm"),
        ("--pipeline-parallel-size=1 -dcp 2", 1, "KVBM does not serve decode context parallelism."),
    ],
)
def test_what_the_engines_options_show_ends_before_anything_is_started(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    given: str, status: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(serve, "run", lambda _: pytest.fail("it was started"))
    (tmp_path / "vllm.yaml").write_text("[")
    with socket.create_server(("127.0.0.1", 0)) as other:
        places = {"TAKEN": str(other.getsockname()[1]), "YAML": str(tmp_path / "vllm.yaml")}
        for name, place in places.items():
            given, sentence = given.replace(name, place), sentence.replace(name, place)
        for command in ("serve", "doctor"):
            result = kvbm(command, "org/model", *given.split())
            assert result.exit_code == status
            assert result.stderr.startswith(f"kvbm: {sentence}")
            assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"KVBM_G2_GB": "-1"}, "setting g2_gb (from environment KVBM_G2_GB): '-1' is not allowed"),
        ({"KVBM_G2_GB": "99999"}, "setting g2_gb (from environment KVBM_G2_GB): G2 of 99999 GB does not fit: only"),
        ({"KVBM_G2_ORDER": "best"}, "setting g2_order (from environment KVBM_G2_ORDER): there is no 'best'; there are"),
        ({"KVBM_G3_ORDER": "best"}, "setting g3_order (from environment KVBM_G3_ORDER): there is no 'best'"),
        ({"KVBM_PLACEMENT": "best"}, "setting placement (from environment KVBM_PLACEMENT): there is no 'best'"),
        ({"KVBM_G3_ADMISSION": "best"}, "setting g3_admission (from environment KVBM_G3_ADMISSION): there is no"),
        ({"KVBM_G3_DIR": "/dev/null/g3"}, "setting g3_dir (from environment KVBM_G3_DIR): /dev/null is not a folder."),
        ({"KVBM_RUN_DIR": "/dev/null"}, "setting run_dir (from environment KVBM_RUN_DIR): /dev/null is not a folder."),
        ({"KVBM_CACHE_DIR": "/dev/null"}, "setting cache_dir (from environment KVBM_CACHE_DIR): /dev/null is not a"),
        ({"KVBM_RUN_DIR": f"/tmp/{'d' * 90}"}, "setting run_dir (from environment KVBM_RUN_DIR): /tmp/ddd"),
        (
            {"KVBM_G3_GB": "1", "KVBM_G3_KEY_FILE": "/no/key"},
            "setting g3_key_file (from environment KVBM_G3_KEY_FILE): /no/key cannot be read",
        ),
        ({"KVBM_DIRECTORY": "valkey://h:1/0"}, "setting peer_secret_file: instances that share blocks need a secret"),
        (
            {"KVBM_DIRECTORY": "valkey://u:p@h:99999/0"},
            "setting directory (from environment KVBM_DIRECTORY): its port must be a number of 1 to 65,535",
        ),
    ],
)
def test_wrong_setting_ends_before_anything_is_started(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    monkeypatch.setattr(serve, "run", lambda _: pytest.fail("it was started"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for command in (("serve", "org/model"), ("doctor",)):
        result = kvbm(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"kvbm: {sentence}")
        assert result.stderr.count("\n") == 1


CAUSAL = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("content", "options", "status", "sentence"),
    [
        (None, (), 2, "has no config.json"),
        ("{", (), 2, "config.json cannot be read: Expecting property name"),
        ("[]", (), 2, "it is no JSON object"),
        ({}, (), 2, "config.json is not a model's configuration: it has neither architectures nor a model_type"),
        ({"architectures": ["BertModel"]}, (), 1, "KVBM does not serve encoder models"),
        (
            {"architectures": ["T5ForAnything"], "is_encoder_decoder": True},
            (),
            1,
            "encoder-decoder models",
        ),
        (CAUSAL, ("--max-model-len", "2049"), 2, "--max-model-len 2049: the model has 2,048 positions"),
        (CAUSAL | {"rope_parameters": {"rope_type": "default"}}, ("--max_model_len=4096",), 2, "has 2,048 positions"),
        (CAUSAL, ("--max-model-len", "2048"), 0, ""),
        (CAUSAL | {"rope_scaling": {"type": "yarn"}}, ("--max-model-len", "9999"), 0, ""),
        ({"architectures": ["BertLMHeadModel"], "is_decoder": True}, (), 0, ""),
    ],
)
def test_what_a_models_files_show_ends_before_anything_is_started(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    content: object, options: tuple[str, ...], status: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(serve, "run", lambda _: 0 if status == 0 else pytest.fail("it was started"))
    (tmp_path / "model.safetensors").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    result = kvbm("serve", str(tmp_path), *options)
    assert result.exit_code == status, result.stderr
    assert sentence in result.stderr.splitlines()[-1]


def test_weights_that_are_not_there(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve, "run", lambda _: 0)
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    assert f"kvbm: there are no weights in {tmp_path}: no file ends in" in kvbm("serve", str(tmp_path)).stderr
    assert kvbm("serve", str(tmp_path), "--load-format", "dummy").exit_code == 0
    names = [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    (tmp_path / names[0]).touch()
    result = kvbm("serve", str(tmp_path))
    assert result.stderr.endswith(f"kvbm: the weights in {tmp_path} are not whole: {names[1]} and 1 more is missing\n")
    assert result.exit_code == 2
    for name in names[1:]:
        (tmp_path / name).touch()
    assert kvbm("serve", str(tmp_path)).exit_code == 0


@apart
def test_options_that_vllm_does_not_have(kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs vLLM's sources")
    monkeypatch.setattr(serve, "run", lambda _: 0)
    for given, sentence in (
        ("--enfore-eager", "--enfore-eager. Did you mean --enforce-eager?"),
        ("--max_modl_len=32", "--max_modl_len. Did you mean --max-model-len?"),
        ("--no-such-thing-at-all 3", "--no-such-thing-at-all"),
    ):
        result = kvbm("serve", "org/model", *given.split())
        assert (result.exit_code, result.stderr) == (2, f"kvbm: vLLM has no option {sentence}\n")
    # As argparse and vLLM take them: the start of a name, underscores, what is no more, keys of an object, a list's.
    for given in (
        "--enforce-eag", "--max_model_len=32", "--no-enable-prefix-caching", "--compilation-config.mode 0",
        "--compilation-config.custom_ops+ none", "-O2",
    ):  # fmt: skip
        assert kvbm("serve", "org/model", *given.split()).exit_code == 0
    monkeypatch.setattr(preflight, "entry_points", lambda group: [EntryPoint("own", "own.platform:register", group)])
    assert kvbm("serve", "org/model", "--of-a-platform", "3").exit_code == 0


def test_an_architecture_that_nobody_knows(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs vLLM's sources")
    monkeypatch.setattr(serve, "run", lambda _: 0)
    (tmp_path / "model.safetensors").touch()

    def status(content: dict[str, object], *options: str) -> int:
        (tmp_path / "config.json").write_text(json.dumps(content))
        return kvbm("serve", str(tmp_path), *options).exit_code

    odd = {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}
    assert status(odd) == 1
    assert status(odd | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}) == 0
    assert status(odd, "--hf-overrides", '{"architectures": ["LlamaForCausalLM"]}') == 0
    assert status({"architectures": ["Qwen2ForCausalLM"]}) == 0
    assert status({"architectures": ["BartForCausalLM"]}) == 0  # transformers alone has it


@pytest.mark.parametrize(
    ("model", "variables", "sentence"),
    [
        ("models/mine/llama", {}, "there is no model models/mine/llama: neither a folder nor a file has that path"),
        (
            "org/none",
            {"HF_HUB_OFFLINE": "1"},
            "there is no model org/none: it is neither a path nor in the hub's cache",
        ),
        ("org/none", {"HF_HUB_OFFLINE": "0"}, ""),
        ("org/none", {"HF_HUB_OFFLINE": "1", "VLLM_USE_MODELSCOPE": "true"}, ""),
        ("s3://bucket/a/model", {}, ""),
    ],
)
def test_a_model_that_cannot_be_had(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, model: str, variables: dict[str, str], sentence: str
) -> None:
    monkeypatch.setattr(serve, "run", lambda _: 0)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    result = kvbm("serve", model)
    assert (result.exit_code, sentence in result.stderr) == (2 if sentence else 0, True)


LLAMA = CAUSAL | {
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 1024,
    "sliding_window": None, "layer_types": ["full_attention"] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, "--block-size 32 --dtype float32", 2 * 4 * 2 * 64 * 32 * 4),
        ({}, "--block-size 16", 2 * 4 * 2 * 64 * 16 * 2),
        ({"head_dim": 128, "num_key_value_heads": None}, "--block-size 16", 2 * 4 * 16 * 128 * 16 * 2),
        ({}, "--block-size 16 --dtype float32 --kv-cache-dtype fp8_e4m3", 2 * 4 * 2 * 64 * 16),
        ({"sliding_window": 128, "use_sliding_window": False}, "--block-size 16", 2 * 4 * 2 * 64 * 16 * 2),
        ({}, "", None),
        ({}, "--block-size 16 --kv-cache-dtype int4", None),
        ({}, "--block-size 16 --hf-overrides {}", None),
        ({"sliding_window": 128}, "--block-size 16", None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "--block-size 16", None),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "--block-size 16", None),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "--block-size 16", None),
        ({"num_hidden_layers": None}, "--block-size 16", None),
        ({"num_hidden_layers": "4", "layer_types": 5}, "--block-size 16", None),
    ],
)
def test_how_large_a_block_is_where_that_is_plain(
    changes: dict[str, object], options: str, expected: int | None
) -> None:
    assert preflight.least_block_bytes(LLAMA | changes, serve.options(options.split())) == expected


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"KVBM_G2_BLOCKS": "100000000"},
            "g2_blocks (from environment KVBM_G2_BLOCKS): G2 of 100,000,000 blocks",
        ),
        (
            {"KVBM_G2_GB": "0.0001"},
            "g2_gb (from environment KVBM_G2_GB): G2 would be smaller than one block of",
        ),
        ({"KVBM_G2_BLOCKS": "10"}, ""),
    ],
)
def test_a_g2_that_cannot_be_with_this_model_ends_before_anything_is_started(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    variables: dict[str, str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(serve, "run", lambda _: pytest.fail("it was started") if sentence else 0)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").touch()
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    for command in ("serve", "doctor") if sentence else ("serve",):
        result = kvbm(command, str(tmp_path))
        assert result.exit_code == (2 if sentence else 0), result.stderr
        assert result.stderr.startswith(f"kvbm: setting {sentence}" if sentence else "")


def test_a_disk_tier_that_cannot_be_is_said_and_ends_nothing(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve, "run", lambda _: 0)
    monkeypatch.setenv("KVBM_G3_GB", "900000")
    monkeypatch.setenv("KVBM_G3_DIR", str(tmp_path / "disk"))
    monkeypatch.setenv("KVBM_G2_BLOCKS", "5")
    monkeypatch.setenv("KVBM_G2_GB", "1")
    result = kvbm("serve", "org/model")
    assert result.exit_code == 0
    assert f"Warning: there is no disk tier: {tmp_path / 'disk'}: " in result.stderr
    assert "and g3_gb asks for 900 TB" in result.stderr
    monkeypatch.setenv("KVBM_STRICT", "true")
    strict = kvbm("serve", "org/model")
    assert (strict.exit_code, strict.stderr.count("\n")) == (2, 1)
    assert strict.stderr.startswith(f"kvbm: there is no disk tier, and strict is set: {tmp_path / 'disk'}: ")
    assert "Warning: g2_gb from environment KVBM_G2_GB has no effect: g2_blocks is set and wins." in result.stderr


@apart
def test_a_path_without_a_model_ends_at_once_and_imports_no_engine(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom kvbm.cli.main import app\ntry:\n app()\nfinally:\n"
        " print({'vllm', 'torch', 'transformers'} & {*sys.modules})"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, "serve", str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout) == (2, "set()\n")
    assert shown.stderr.splitlines()[-1].startswith(f"kvbm: there is no model {tmp_path / 'none'}: neither")


class Hub(BaseHTTPRequestHandler):
    """Says of every model what the hub of Hugging Face says of one that is not there, private or gated."""

    def do_GET(self) -> None:
        status, code = {"/api/models/org/gated": (403, "GatedRepo"), "/api/models/org/hidden": (401, "")}.get(
            self.path, (404, "RepoNotFound")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@apart
def test_a_model_that_the_hub_does_not_have_ends_at_once() -> None:
    pytest.importorskip("huggingface_hub")
    code = "import sys\nfrom kvbm.cli import preflight\npreflight.check_hub(sys.argv[1], None)"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def said(model: str, endpoint: str = address) -> str:
            environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
            done = subprocess.run(
                [sys.executable, "-c", code, model], capture_output=True, text=True, check=False, env=environment
            )
            return done.stderr.splitlines()[-1] if done.stderr else ""

        for model in ("org/none", "org/hidden", "not a name"):
            assert f"there is no model {model}: it is neither a path nor a model that {address} shows" in said(model)
        assert said("org/gated") == ""
        assert said("org/none", "http://127.0.0.1:9") == ""
        server.shutdown()


def test_environment_of_the_user_wins_over_defaults_and_the_demos_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert serve.plan("m", [], "m").environment["VLLM_CPU_KVCACHE_SPACE"] == "9"
    forced = serve.plan("m", [], "m", environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert forced.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize(
    ("variables", "given", "cores"),
    [
        ({}, "", "1"),
        ({}, "--tensor-parallel-size 2", "2"),
        ({}, "-tp 4 --dtype half", "4"),
        ({}, "-tp=2", "2"),
        ({serve.RESERVED: "0"}, "", "0"),
        ({serve.RESERVED: "3"}, "-tp 2", "3"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "auto"}, "", "1"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-3"}, "", None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, "", None),
    ],
)
def test_cores_kept_free_are_those_without_kvbm_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], given: str, cores: str | None
) -> None:
    for name in (serve.RESERVED, "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    assert serve.plan("m", given.split(), "m", environment=variables).environment.get(serve.RESERVED) == cores
    alone = serve.plan("m", given.split(), "m", environment=variables, with_kvbm=False).environment
    assert alone.get(serve.RESERVED) == variables.get(serve.RESERVED)
    monkeypatch.setattr(serve, "engine_build", lambda: "gpu")
    on_a_gpu = serve.plan("m", given.split(), "m", environment=variables).environment
    assert on_a_gpu.get(serve.RESERVED) == variables.get(serve.RESERVED)


@pytest.mark.parametrize("own", [None, "0"])
def test_what_is_set_for_the_cores_is_said(
    kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.delenv(serve.RESERVED, raising=False)
    monkeypatch.setattr(serve, "run", lambda _: 0)
    if own is not None:
        monkeypatch.setenv(serve.RESERVED, own)
    said = [line for line in kvbm("serve", "org/model").stderr.splitlines() if serve.RESERVED in line]
    assert len(said) == (own is None)


@pytest.mark.parametrize(
    ("variables", "given", "seconds"),
    [
        ({}, "", None),
        ({"KVBM_G3_GB": "20"}, "", "15"),
        ({"DYN_KVBM_DISK_CACHE_GB": "20", "KVBM_G3_DRAIN_S": "2.5"}, "", "8"),
        ({"KVBM_G3_BLOCKS": "9", "KVBM_G3_DRAIN_S": "0"}, "", None),
        ({"KVBM_G3_BLOCKS": "9"}, "--shutdown_timeout 3", "3"),
    ],
)
def test_the_engine_may_write_to_disk_at_its_end(variables: dict[str, str], given: str, seconds: str | None) -> None:
    planned = serve.plan("m", given.split(), "m", environment=variables)
    assert serve.value(planned.arguments, "--shutdown-timeout") == seconds
    assert "--shutdown-timeout" not in serve.plan("m", [], "m", environment=variables, with_kvbm=False).arguments


def test_the_demos_two_engines_differ_in_the_connector_only() -> None:
    arguments = Plan(users=4, turns=3, document_tokens=1400, answer_tokens=24).arguments()
    alone = serve.plan("smollm2", arguments, "/m", with_kvbm=False).command
    assert serve.plan("smollm2", arguments, "/m").command[:-2] == alone
    assert alone[alone.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("users", [2, 4, 8])
def test_the_demos_device_cache_holds_one_conversation(users: int) -> None:
    plan = Plan(users=users, turns=3, document_tokens=1400, answer_tokens=24)
    assert plan.max_model_len % 32 == 0
    assert plan.max_model_len == (plan.device_blocks - 1) * 32
    assert plan.max_model_len > 1400 + 3 * 24


def test_ipv6_is_written_as_urls_want_it() -> None:
    assert serve.plan("m", ["--host", "::", "--port", "1"], "m").url == "http://[::1]:1"


@pytest.mark.parametrize(("chats", "path"), [(True, "/v1/chat/completions"), (False, "/v1/completions")])
def test_curl_line_is_one_command(monkeypatch: pytest.MonkeyPatch, chats: bool, path: str) -> None:
    monkeypatch.setattr(serve, "_chats", lambda *_: chats)
    planned = serve.plan("it's", ["--api-key", "secret"], "m")
    words = shlex.split(serve.curl(planned))
    assert words[:2] == ["curl", f"http://127.0.0.1:8007{path}"]
    assert json.loads(words[-1])["model"] == "it's"
    assert "secret" not in serve.curl(planned)


def test_sockets_of_a_killed_engine_are_removed(
    kvbm: Callable[..., Result], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run_dir / "other.sock"
    other.touch()

    def run(planned: launch.Launch) -> int:
        for name in (planned.engine, f"{planned.engine}_dp1"):
            (run_dir / f"{name}.sock").touch()
        return 5

    monkeypatch.setattr(serve, "run", run)
    assert kvbm("serve", "org/model").exit_code == 5
    assert list(run_dir.iterdir()) == [other]


def test_next_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < serve.free_port("127.0.0.1", port) <= port + 100
        with pytest.raises(KvbmError, match=f"no free port on 127.0.0.1 from {port} to {port}"):
            serve.free_port("127.0.0.1", port, tries=1)


STUBBORN = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', {STUBBORN + "time.sleep(60)"!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


@apart
def test_nothing_of_the_group_outlives_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launch, "command", property(lambda _: [sys.executable, "-c", PARENT]))
    log = tmp_path / "log"
    with log.open("wb") as file, launch.Server(serve.plan("m", [], "m"), file) as server:
        while len(log.read_text().split()) < 2:
            time.sleep(0.01)
        assert server.exit_code() is None
        assert not server.is_healthy()
        server.stop(patience_s=0.3)
        assert server.exit_code() == 128 + signal.SIGTERM
    child = int(next(word for word in log.read_text().split() if word.isdigit()))
    assert _gone(child)


def _gone(pid: int) -> bool:
    """Dead, or a zombie that nobody has waited for."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


RUNNING = '''
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # a shell may have made us ignore some, and what is ignored stays so
from kvbm.cli import launch, serve
launch.Server.is_healthy = lambda _: sys.argv[1] == "up"
serve.curl = lambda _: "curl"
serve.engine_build = lambda: "cpu"
server = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("up", flush=True)
time.sleep(60)
"""
launch.Launch.command = property(lambda _: [sys.executable, "-c", server])
sys.exit(serve.run(serve.plan("m", [], "m")))
'''


@pytest.mark.e2e  # no engine, but processes and seconds of waiting
@pytest.mark.parametrize("state", ["up", "starting"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_the_server_too(number: signal.Signals, state: str) -> None:
    kvbm = subprocess.Popen([sys.executable, "-c", RUNNING, state], stdout=subprocess.PIPE, text=True)
    assert kvbm.stdout is not None
    with kvbm:
        missing = {"up\n", "  curl\n"} if state == "up" else {"up\n"}
        while missing:
            line = kvbm.stdout.readline()
            assert line, "it ended before it was up"
            missing.discard(line)
        os.kill(kvbm.pid, number)
        handed_on = number == signal.SIGTERM and state == "up"
        assert kvbm.wait(20) == (3 if handed_on else 128 + number)


def test_what_the_model_is_before_the_engine_starts_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, a draft model, and a name in the hub's cache; privately."""
    for name in ("model", "draft", "hub/models--org--name/blobs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(name)
    run_dir, draft = tmp_path / "run", json.dumps({"method": "draft_model", "model": str(tmp_path / "draft")})
    planned = serve.plan("m", ["--speculative-config", draft], str(tmp_path / "model"))
    serve.witness(planned, run_dir)
    file = run_dir / f"{planned.engine}.weights"
    assert planned.environment["KVBM_WEIGHTS_SEEN"] == str(file)
    assert (file.stat().st_mode & 0o777, run_dir.stat().st_mode & 0o777) == (0o600, 0o700)
    seen = stamps.recorded(file, 1)
    assert seen.folders == (str(tmp_path / "model"), str(tmp_path / "draft"))
    assert str(tmp_path / "draft" / "weights") in seen.seen

    planned = serve.plan("m", ["--download-dir", str(tmp_path / "hub")], "org/name")
    serve.witness(planned, run_dir)
    seen = stamps.recorded(run_dir / f"{planned.engine}.weights", 1)
    assert seen.folders == (str(tmp_path / "hub" / "models--org--name"),)

    for arguments in (["--speculative-config", "{"], ["--speculative-config", "[]"]):
        planned = serve.plan("m", arguments, "org/absent")
        serve.witness(planned, run_dir)
        assert stamps.recorded(run_dir / f"{planned.engine}.weights", 1) == stamps.Start(1)


def test_where_nothing_can_be_handed_over_the_engine_starts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    planned = serve.plan("m", [], str(tmp_path))
    serve.witness(planned, tmp_path / "file" / "run")
    assert "KVBM_WEIGHTS_SEEN" not in planned.environment


ALONE = """
import sys
from kvbm.cli import launch, serve
serve.engine_build = lambda: "cpu"
serve.PATIENCE_S = 0.5
launch.Launch.command = property(lambda _: [sys.executable, "-c", sys.argv[1]])
sys.exit(serve.run(serve.plan("m", [], "m")))
"""


@apart
def test_killed_outright_it_takes_everything_along(tmp_path: Path) -> None:
    """Also what does not want to end."""
    with (tmp_path / "log").open("w") as log:
        kvbm = subprocess.Popen([sys.executable, "-c", ALONE, PARENT], stdout=log)
    while len(said := (tmp_path / "log").read_text().split()) < 2:
        assert kvbm.poll() is None
        time.sleep(0.01)
    (server,) = (int(pid) for pid in _children(kvbm.pid) if "time.sleep(60)" in _command(pid))
    stubborn = int(next(word for word in said if word.isdigit()))
    kvbm.kill()
    kvbm.wait()
    assert _gone(server)
    assert _gone(stubborn)


KILLED = """
import os, random, signal, sys, time
from kvbm.cli import launch, serve
serve.engine_build = lambda: "cpu"
launch.Launch.command = property(lambda _: ["/bin/sh", "-c", 'echo >> "$STARTED"; exec sleep 60'])
planned, dice = serve.plan("m", [], "m", environment={"STARTED": sys.argv[1]}), random.Random(5)
for _ in range(int(sys.argv[2])):
    if not (owner := os.fork()):
        if sys.argv[3] == "begun":
            launch.Tail.follow = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        launch.Server(planned, patience_s=0.5)
        signal.pause()
    if sys.argv[3] == "random":
        time.sleep(dice.random() ** 2 / 5)
        os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
"""


@pytest.mark.parametrize(
    ("moment", "times"), [("begun", 3), pytest.param("random", 60, marks=pytest.mark.e2e)], ids=["begun", "random"]
)
def test_killed_while_it_starts_its_server_it_leaves_none(tmp_path: Path, moment: str, times: int) -> None:
    """In its first 200 ms, sooner rather than later; and in the instant in which the server has begun."""
    started = tmp_path / "started"
    started.touch()
    subprocess.run([sys.executable, "-c", KILLED, str(started), str(times), moment], timeout=60, check=True)
    deadline = time.monotonic() + 10
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and str(started) in _environment(pid)]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)
    assert moment == "begun" or times / 4 < len(started.read_text()) < times


def _environment(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize(("way", "status"), [("sys.exit(0)", 1), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
@apart
def test_a_server_that_ends_by_itself_has_failed(way: str, status: int) -> None:
    command = [sys.executable, "-c", ALONE, f"import os, sys; {way}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    said = f"kvbm: the server ended by itself, with status {0 if way == 'sys.exit(0)' else status}"
    assert done.stderr.splitlines()[-1] == said


def test_why_the_start_ended_is_the_last_line(
    kvbm: Callable[..., Result], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(planned: launch.Launch) -> int:
        last_words.leave(run_dir, "another", "no")
        last_words.leave(run_dir, planned.engine, "KVBM does not serve\n this")
        last_words.leave(run_dir, planned.engine, "nor that")
        return 7

    monkeypatch.setattr(serve, "run", run)
    result = kvbm("serve", "org/model")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "kvbm: KVBM does not serve this"
    assert list(run_dir.iterdir()) == []


def test_notes_of_the_killed_do_not_pile_up(tmp_path: Path) -> None:
    for name, age in (("old", 100_000), ("young", 3600)):
        note = last_words.expect(tmp_path, name)
        assert note is not None
        os.utime(note, (time.time() - age,) * 2)
    last_words.expect(tmp_path, "new")
    assert {path.stem for path in tmp_path.iterdir()} == {"young", "new"}


def test_without_a_folder_for_it_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert last_words.expect(tmp_path / "file", "e") is None
    last_words.leave(tmp_path / "file", "e", "lost")
    assert last_words.heard(None) == last_words.heard(tmp_path / "none") == ""


def test_a_group_whose_leader_is_gone_ends_with_its_owner() -> None:
    """The server died, something of it hangs, and then `kvbm serve` is killed."""
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert shell.stdout is not None
    left = int(shell.stdout.readline())
    shell.wait(10)
    shell.stdout.close()
    watcher = [sys.executable, str(Path(launch.__file__).parent / "watcher.py"), "watch", "0.2"]
    subprocess.run(watcher, input=f"{shell.pid}\n", text=True, timeout=20, check=True)
    deadline = time.monotonic() + 5
    while (state := Path(f"/proc/{left}/stat")).exists() and " Z " not in state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
