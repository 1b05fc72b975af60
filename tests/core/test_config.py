"""Precedence, sources, names and ranges of the settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.config import UPSTREAM, Settings, allowed, child_environment, load, set_for_library, shown
from kvbm.core.errors import ConfigError


def resolve(environ: dict[str, str] | None = None, **kwargs: Any) -> Any:
    return load(environ=environ or {}, **kwargs)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvbm.toml"
    path.write_text(text)
    return path


def test_defaults_need_nothing() -> None:
    resolved = resolve()
    assert set(resolved.sources.values()) == {"default"}
    assert resolved.notes == []
    settings = resolved.settings
    assert settings.g2_gb is None
    assert settings.g2_blocks is None
    assert settings.onboard == "async"
    assert settings.cache_dir == Path("~/.cache/kvbm").expanduser()
    assert settings.run_dir == Path(f"/tmp/kvbm-{os.getuid()}")


def test_run_dir_follows_the_login_session() -> None:
    assert resolve({"XDG_RUNTIME_DIR": "/run/user/7"}).settings.run_dir == Path("/run/user/7/kvbm")


def test_settings_alone_never_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2_GB", "3")
    monkeypatch.setenv("KVBM_G2_GB", "3")
    assert Settings().g2_gb is None
    assert load().settings.g2_gb == 3


def test_every_setting_has_a_meaning_and_a_range() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert allowed(name), name


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve().settings.g2_gb = 1.0


def test_each_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    file = toml(tmp_path, "g2_gb = 1")
    upstream = {"DYN_KVBM_CPU_CACHE_GB": "2"}
    own = {"KVBM_G2_GB": "3"}
    layers: list[tuple[dict[str, Any], float, str]] = [
        ({"file": file}, 1, f"file {file}"),
        ({"file": file, "environ": upstream}, 2, "environment DYN_KVBM_CPU_CACHE_GB"),
        ({"file": file, "environ": upstream | own}, 3, "environment KVBM_G2_GB"),
        ({"file": file, "environ": upstream | own, "extra": {"kvbm.g2_gb": 4}}, 4, "extra config"),
        ({"environ": own, "extra": {"g2_gb": 4}, "options": {"g2_gb": 5}}, 5, "option --g2-gb"),
    ]
    for arguments, value, source in layers:
        resolved = resolve(**arguments)
        assert (resolved.settings.g2_gb, resolved.sources["g2_gb"]) == (value, source)


def test_the_file_is_named_by_the_environment(tmp_path: Path) -> None:
    path = toml(tmp_path, 'onboard = "sync"\nmetrics = true\ncache_dir = "~/models"')
    resolved = resolve({"KVBM_CONFIG": str(path)})
    assert resolved.settings.onboard == "sync"
    assert resolved.settings.metrics is True
    assert resolved.settings.cache_dir == Path("~/models").expanduser()
    assert resolved.sources["metrics"] == f"file {path}"


@pytest.mark.parametrize(("text", "problem"), [("g2_gb = ", "not valid TOML"), (None, "No such file")])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "absent.toml" if text is None else toml(tmp_path, text)
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve({"KVBM_CONFIG": str(path)})
    assert str(path) in str(caught.value)


def test_upstream_variables_mean_our_settings() -> None:
    values = {
        "DYN_KVBM_CPU_CACHE_GB": "1.5",
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "200",
        "DYN_KVBM_DISK_CACHE_GB": "20",
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "0",
        "DYN_KVBM_DISK_CACHE_DIR": "/somewhere",
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "false",
        "DYN_KVBM_DISK_ZEROFILL_FALLBACK": "true",
        "DYN_KVBM_DISK_DISABLE_O_DIRECT": "1",
        "DYN_KVBM_METRICS": "true",
        "DYN_KVBM_METRICS_PORT": "7000",
        "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "1800",
    }
    assert values.keys() == {name for name in UPSTREAM if "_OBJECT_" not in name}
    resolved = resolve(values)
    settings = resolved.settings
    assert (settings.g2_gb, settings.g2_blocks, settings.metrics, settings.metrics_port) == (1.5, 200, True, 7000)
    assert settings.init_timeout_s == 1800
    assert (settings.g3_gb, settings.g3_blocks, settings.g3_dir) == (20, None, Path("/somewhere"))
    assert (settings.g3_admission, settings.g3_zerofill, settings.g3_direct) == ("frequency", True, False)
    assert resolved.notes == ["g2_gb from environment DYN_KVBM_CPU_CACHE_GB has no effect: g2_blocks is set and wins."]


def test_upstreams_filter_can_be_off_and_has_to_be_yes_or_no() -> None:
    name = "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER"
    assert resolve({name: "true"}).settings.g3_admission == "all"
    with pytest.raises(ConfigError, match=f"setting {name} .from environment {name}.: 'maybe' is not allowed"):
        resolve({name: "maybe"})


def test_upstream_reads_no_blocks_as_unset() -> None:
    resolved = resolve({"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "0", "DYN_KVBM_CPU_CACHE_GB": "1"})
    assert resolved.settings.g2_blocks is None
    assert resolved.notes == []
    with pytest.raises(ConfigError, match="g2_blocks"):
        resolve({"KVBM_G2_BLOCKS": "0"})


def test_empty_variables_are_unset() -> None:
    assert resolve({"KVBM_G2_GB": "", "KVBM_NO_SUCH": "", "KVBM_CONFIG": ""}).sources["g2_gb"] == "default"


@pytest.mark.parametrize(
    "variable",
    [
        "DISK_ALLOCATOR_TYPE",
        "OBJECT_BUCKET",
        "ENABLE_NUMA",
        "LEADER_ZMQ_PUB_PORT",
        "NIXL_BACKEND_UCX",
        "G2PB_ADMISSION_POLICY",
    ],
)
def test_upstream_variables_without_effect_are_noted(variable: str) -> None:
    (note,) = resolve({f"DYN_KVBM_{variable}": "1"}).notes
    assert note.startswith(f"DYN_KVBM_{variable} has no effect: ")


def test_variables_of_others_are_left_alone() -> None:
    links = {
        "KVBM_SERVICE_HOST": "10.0.0.1",
        "KVBM_PORT": "tcp://10.0.0.1:80",
        "KVBM_PORT_80_TCP_PORT": "80",
        "KVBM_WEB_SERVICE_PORT_HTTP": "80",
    }
    assert resolve(links | {"MY_KVBM_G2_GB": "1"}).notes == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"environ": {"KVBM_G2GB": "1"}}, ("KVBM_G2GB", "environment KVBM_G2GB", "Did you mean KVBM_G2_GB?")),
        (
            {"environ": {"DYN_KVBM_CPU_CACHE_GBS": "1"}},
            ("DYN_KVBM_CPU_CACHE_GBS", "Did you mean DYN_KVBM_CPU_CACHE_GB?"),
        ),
        ({"extra": {"g2-blocks": 1}}, ("g2-blocks", "extra config", "Did you mean g2_blocks?")),
        ({"extra": {"kvbm.onbord": "sync"}}, ("onbord", "extra config", "Did you mean onboard?")),
        ({"options": {"metric": True}}, ("metric", "option --metric", "Did you mean metrics?")),
        ({"environ": {"KVBM_ZZZZZZZZZZZZZZZZ": "1"}}, ("KVBM_ZZZZZZZZZZZZZZZZ", "kvbm config")),
    ],
)
def test_unknown_names_end_the_start(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no such setting") as caught:
        resolve(**arguments)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_keys_of_the_file_are_named(tmp_path: Path) -> None:
    path = toml(tmp_path, "[kvbm]\ng2_gb = 1")
    with pytest.raises(ConfigError, match="no such setting") as caught:
        resolve(file=path)
    assert f"setting kvbm (from file {path})" in str(caught.value)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        resolve(extra={"g2_gb": 1, "kvbm.g2_gb": 2})


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("g2_gb", "-1", "a number, more than 0 and at most 1,000,000"),
        ("g2_gb", "0", "more than 0"),
        ("g2_gb", "1e12", "at most 1,000,000"),
        ("g2_gb", "nan", "a number"),
        ("g2_gb", "inf", "a number"),
        ("g2_gb", "4GB", "a number"),
        ("g2_gb", True, "a number"),
        ("g2_gb", [4], "a number"),
        ("g2_blocks", "-5", "a whole number, at least 1"),
        ("g2_blocks", "1.5", "a whole number"),
        ("g2_share", "0.95", "more than 0 and at most 0.9"),
        ("onboard", "intra", "'async' or 'sync'"),
        ("enabled", "maybe", "true or false"),
        ("strict", 2, "true or false"),
        ("metrics_port", "0", "at least 1 and at most 65,535"),
        ("metrics_port", "70000", "at most 65,535"),
        ("metrics_host", 7, "a text"),
        ("run_dir", 7, "a path"),
        ("copy_threads", "-1", "at least 0"),
        ("store_inflight_mb", "0", "at least 1"),
        ("held_share", "1.5", "at most 1"),
        ("load_deadline_s", "0", "more than 0"),
        ("init_timeout_s", "-3", "more than 0"),
        ("idle_wait_ms", "-1", "at least 0"),
        ("explain_requests", "many", "a whole number"),
        ("transport_wrapper", "slow", "module:function?query"),
    ],
)
def test_bad_values_say_what_is_allowed(name: str, value: Any, must: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(extra={name: value})
    message = str(caught.value)
    assert message.startswith(f"setting {name} (from extra config): {value!r} is not allowed, it must be ")
    assert must in message
    assert "\n" not in message
    assert caught.value.__cause__ is None


def test_a_bad_value_names_its_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="environment DYN_KVBM_METRICS_PORT"):
        resolve({"DYN_KVBM_METRICS_PORT": "http"})
    path = toml(tmp_path, "g2_share = 2.0")
    with pytest.raises(ConfigError, match=str(path)):
        resolve(file=path)
    with pytest.raises(ConfigError, match="option --copy-threads"):
        resolve(options={"copy_threads": 999})


def test_a_bad_value_that_is_overridden_does_not_matter() -> None:
    assert resolve({"KVBM_G2_GB": "x"}, options={"g2_gb": 1.0}).settings.g2_gb == 1


def test_options_that_were_not_given_do_not_count() -> None:
    assert resolve({"KVBM_G2_GB": "2"}, options={"g2_gb": None}).sources["g2_gb"] == "environment KVBM_G2_GB"


def test_the_transport_wrapper_takes_a_query() -> None:
    assert resolve(extra={"transport_wrapper": "kvbm.testing.faults:slow?ms=200"}).sources["transport_wrapper"]


def test_a_child_gets_this_environment_and_defaults_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "given")
    monkeypatch.delenv("TWO", raising=False)
    child = child_environment(ONE="default", TWO="default")
    assert (child["ONE"], child["TWO"]) == ("given", "default")
    assert "TWO" not in os.environ


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("valkey://user:pass@host:6379/0", "valkey://***@host:6379/0"),
        ("valkey://:pass@host:6379/0", "valkey://***@host:6379/0"),
        ("http://user:pass@host", "http://***@host"),
        ("user:pass@host/x", "***@host/x"),
        ("http://user:p@ss@host:1", "http://***@host:1"),
        ("valkey://user:pa/ss@host/0", "valkey://***@host/0"),
        ("/mnt/a@b", "/mnt/a@b"),
        ("valkey://host:6379/0", "valkey://host:6379/0"),
        ("unix:///a@b/c", "unix:///a@b/c"),
        (7, 7),
    ],
)
def test_passwords_of_addresses_are_not_shown(given: Any, seen: Any) -> None:
    assert shown(given) == seen
    if given != seen:
        with pytest.raises(ConfigError) as caught:
            load(environ={}, extra={"directory": given.replace("valkey", "ftp")})
        assert "pass" not in str(caught.value)


def test_what_somebody_has_set_for_a_library_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_LIBRARY", "theirs")
    monkeypatch.delenv("OTHER_LIBRARY", raising=False)
    for name in ("SOME_LIBRARY", "OTHER_LIBRARY"):
        set_for_library(name, "ours")
    assert (os.environ["SOME_LIBRARY"], os.environ.pop("OTHER_LIBRARY")) == ("theirs", "ours")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with any user id: no HOME, and nobody knows the user."""

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_only_what_names_it_is_wrong() -> None:
    assert resolve().settings.cache_dir is None
    assert resolve({"KVBM_CACHE_DIR": "/somewhere"}).settings.cache_dir == Path("/somewhere")
    with pytest.raises(ConfigError, match=r"g3_dir \(from environment KVBM_G3_DIR\): ~/disk cannot be found.*no home"):
        resolve({"KVBM_G3_DIR": "~/disk"})
    with pytest.raises(ConfigError, match=r"KVBM_CONFIG: ~/kvbm.toml cannot be found.*no home"):
        resolve({"KVBM_CONFIG": "~/kvbm.toml"})


@pytest.mark.parametrize(("found", "folder"), [("/elsewhere", "/elsewhere"), (None, "/tmp")])
def test_a_read_only_root_has_another_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, found: str | None, folder: str
) -> None:
    """Or none at all: then who needs it says so."""

    def gettempdir() -> str:
        if found is None:
            raise FileNotFoundError
        return found

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", gettempdir)
    assert resolve().settings.run_dir == Path(folder, f"kvbm-{os.getuid()}")


def test_an_address_is_shown_without_what_it_should_not_contain() -> None:
    assert shown("s3://user:pass@bucket/x?sig=secret") == "s3://***@bucket/x?***"
    assert shown("valkey://user:pa\nss@host/x?a=\nb") == "valkey://***@host/x?***"
    assert shown("s3://bucket/x?sig=se://cret") == "s3://bucket/x?***"
    assert shown("module:function?delay=1") == "module:function?delay=1"


def test_upstreams_bucket_counts_where_it_is_enabled() -> None:
    given = {
        "DYN_KVBM_OBJECT_BUCKET": "my-bucket", "DYN_KVBM_OBJECT_ENDPOINT": "http://host:9000",
        "DYN_KVBM_OBJECT_REGION": "eu", "DYN_KVBM_OBJECT_ACCESS_KEY": "a", "DYN_KVBM_OBJECT_SECRET_KEY": "b-secret",
        "DYN_KVBM_OBJECT_WRITE_THROUGH": "0", "DYN_KVBM_OBJECT_NUM_BLOCKS": "5",
    }  # fmt: skip
    off = load(environ=given)
    assert off.settings.g4_url is None
    assert [note for note in off.notes if "BUCKET" in note]
    on = load(environ=given | {"DYN_KVBM_OBJECT_ENABLED": "true"})
    settings = on.settings
    assert (settings.g4_url, settings.g4_endpoint, settings.g4_region) == ("s3://my-bucket", "http://host:9000", "eu")
    assert settings.g4_admission == "evicted"
    assert settings.g4_secret_key is not None
    assert settings.g4_secret_key.get_secret_value() == "b-secret"
    assert "b-secret" not in repr(on)
    assert on.sources["g4_url"] == "environment DYN_KVBM_OBJECT_BUCKET"
    assert any("NUM_BLOCKS has no effect" in note for note in on.notes)
    own = load(environ=given | {"DYN_KVBM_OBJECT_ENABLED": "1", "KVBM_G4_URL": "file:///mnt/kv"})
    assert own.settings.g4_url == "file:///mnt/kv"
    with pytest.raises(ConfigError, match="DYN_KVBM_OBJECT_ENABLED"):
        load(environ={"DYN_KVBM_OBJECT_ENABLED": "perhaps"})
