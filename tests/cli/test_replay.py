"""`kvbm replay`: its figures against a model that shares nothing with it, what it writes, what it refuses."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import Result as Shown

from kvbm.cli.replay import bounds, command, sample
from kvbm.cli.replay.run import Result, replay
from kvbm.cli.replay.trace import BadLine, Line, Prompt, Trace, Workload, find, interleave, read
from kvbm.core import config
from kvbm.core.errors import KvbmError
from kvbm.policy import EVICTION_ORDERS, eviction_order, placement
from tests.cli.naive import Cache, Prompts, min_hits
from tests.marks import apart

Kvbm = Callable[..., Shown]

GOOD = '{"timestamp":0,"input_length":100,"output_length":1,"hash_ids":[1,2]}'


def ignore(_: int) -> None:
    pass


def prompts_of(workload: Workload) -> list[list[int]]:
    return [prompt.blocks.tolist() for prompt in workload.prompts]


def workload_of(prompts: Prompts) -> Workload:
    """Of blocks of ten tokens, all of them full."""
    lines = [Line(at, 10 * len(ids), 1, list(ids)) for at, ids in enumerate(prompts)]
    return interleave([Trace("made", lines, 10, 0)])


def run(workload: Workload, capacities: dict[str, int], policy: str = "lru", placed: str = "write-through") -> Result:
    return replay(workload, capacities, policy, partial(eviction_order, policy), placement(placed), ignore)


@cache
def shipped() -> Workload:
    return interleave([read(find("sample", None))])


def write(folder: Path, text: str | bytes, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- figures --


def test_the_sample_is_what_its_script_makes() -> None:
    assert find("sample", None).read_bytes() == sample.text()
    workload = shipped()
    assert (len(workload.prompts), workload.references, workload.unique) == (316, 5170, 2152)
    assert workload.traces[0].block_tokens == sample.BLOCK_TOKENS


@pytest.mark.parametrize(
    ("capacity", "lru", "minimum", "leaf_first"),
    [(10, 291, 597, 869), (50, 882, 1725, 2122), (100, 1593, 2662, 2815), (200, 2549, 3018, 3018)],
)
def test_known_hits_of_the_sample(capacity: int, lru: int, minimum: int, leaf_first: int) -> None:
    workload, best = shipped(), bounds.Min(shipped())
    prompts = prompts_of(workload)
    result, model = run(workload, {"g2": capacity}), Cache([capacity]).replay(prompts)
    (tier,) = result.tiers
    assert result.hit_blocks == tier.hit_blocks == model.top.hits == lru
    assert (tier.evictions, tier.written) == (model.top.evictions, model.top.written)
    for is_leaf_first, hits in ((False, minimum), (True, leaf_first)):
        assert best.hits(capacity, leaf_first=is_leaf_first, advance=ignore).blocks == hits
        assert min_hits(prompts, capacity, leaf_first=is_leaf_first) == hits
    assert bounds.everything_fits(workload).blocks == 5170 - 2152


@st.composite
def trees(draw: st.DrawFn) -> list[list[int]]:
    """Prompts as they are: an id is a block and all blocks before it."""
    names: dict[tuple[int, ...], int] = {}
    paths = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=25))
    return [[names.setdefault(tuple(path[:end]), len(names)) for end in range(1, len(path) + 1)] for path in paths]


@settings(deadline=None)
@given(
    trees(),
    st.lists(st.integers(1, 12), min_size=1, max_size=2),
    st.sampled_from(["lru", "fifo"]),
    st.sampled_from(["write-through", "exclusive"]),
)
def test_any_trace_comes_out_as_the_model_says(
    prompts: list[list[int]], sizes: list[int], policy: str, placed: str
) -> None:
    result = run(workload_of(prompts), dict(zip(("g2", "g3"), sizes, strict=False)), policy, placed)
    model = Cache(sizes, policy, placed).replay(prompts)
    for tier, expected in zip(result.tiers, model.tiers, strict=True):
        assert (tier.hit_blocks, tier.written, tier.evictions) == (expected.hits, expected.written, expected.evictions)
        assert tier.hit_tokens == 10 * tier.hit_blocks
    assert result.cut == sum(len(prompt) > sizes[0] for prompt in prompts)


@settings(deadline=None)
@given(trees(), st.integers(1, 12))
def test_bounds_come_out_as_the_model_says(prompts: list[list[int]], capacity: int) -> None:
    workload = workload_of(prompts)
    best = bounds.Min(workload)
    plain, leaf_first = (best.hits(capacity, leaf_first=choice, advance=ignore) for choice in (False, True))
    assert plain.blocks == min_hits(prompts, capacity, leaf_first=False)
    assert leaf_first.blocks == min_hits(prompts, capacity, leaf_first=True)
    assert run(workload, {"g2": capacity}).hit_blocks <= leaf_first.blocks
    assert plain.blocks <= leaf_first.blocks <= bounds.everything_fits(workload).blocks
    assert best.hits(workload.unique, leaf_first=False, advance=ignore) == bounds.everything_fits(workload)


@pytest.mark.parametrize("policy", EVICTION_ORDERS)
@pytest.mark.parametrize("placed", ["write-through", "exclusive"])
@pytest.mark.parametrize("capacities", [{"g2": 60}, {"g2": 30, "g3": 60}, {"g2": 20, "g3": 40, "g4": 80}])
def test_every_policy_stays_below_the_bound(policy: str, placed: str, capacities: dict[str, int]) -> None:
    result = run(shipped(), capacities, policy, placed)
    best = bounds.Min(shipped()).hits(sum(capacities.values()), leaf_first=True, advance=ignore)
    assert 0 < result.hit_blocks <= best.blocks
    for tier in result.tiers:
        assert 0 <= tier.written - tier.evictions <= tier.capacity


def test_tokens_end_with_the_prompt() -> None:
    prompt = Prompt(np.arange(3, dtype=np.int32), 25, 10)
    assert [prompt.tokens_of(*part) for part in ((0, 3), (0, 2), (2, 3), (1, 3), (0, 0))] == [25, 20, 5, 15, 0]
    workload = interleave([Trace("made", [Line(0, 25, 1, [1, 2, 3])] * 2, 10, 0)])
    assert run(workload, {"g2": 9}).hit_tokens == bounds.everything_fits(workload).tokens == 25


def test_a_capacity_beyond_everything_takes_no_memory() -> None:
    assert run(shipped(), {"g2": 10**15}).hit_blocks == 3018


# -- published figures, where the traces are --


@cache
def published(name: str) -> Workload:
    folder = config.load().settings.traces
    if folder is None or not (folder / name).is_file():
        pytest.skip(f"{name} is not there: give the folder it lies in with KVBM_TRACES=DIR")
    return interleave([read(folder / name)])


@pytest.mark.parametrize(("percent", "ratio"), [(1, 0.052), (5, 0.195), (10, 0.278), (25, 0.353), (50, 0.363)])
def test_lru_on_the_conversation_trace(percent: int, ratio: float) -> None:
    workload = published("mooncake_conversation.jsonl.gz")
    assert (workload.references, workload.unique) == (288_500, 182_790)
    capacity = command.Size(percent, is_share=True).blocks(workload.unique)
    assert run(workload, {"g2": capacity}).hit_blocks / workload.references == pytest.approx(ratio, abs=0.004)


@pytest.mark.parametrize(
    ("capacity", "lru", "minimum"),
    [(1000, 0.0445, 0.1792), (3000, 0.0653, None), (10_000, 0.2116, 0.3664), (30_000, 0.3257, 0.3664)],
)
def test_table_of_the_conversation_trace(capacity: int, lru: float, minimum: float | None) -> None:
    workload = published("mooncake_conversation.jsonl.gz")
    assert round(run(workload, {"g2": capacity}).hit_blocks / workload.references, 4) == lru
    if minimum is not None:
        hits = bounds.Min(workload).hits(capacity, leaf_first=False, advance=ignore)
        assert round(hits.blocks / workload.references, 4) == minimum


# -- traces --


def test_plain_and_gzip_are_the_same(tmp_path: Path) -> None:
    plain = find("sample", None).read_bytes()
    zipped = write(tmp_path, gzip.compress(plain), "any.name")
    assert read(zipped).lines == read(find("sample", None)).lines


def test_traces_are_interleaved_by_time_and_share_nothing() -> None:
    one = Trace("one", [Line(5, 20, 1, [1, 2]), Line(9, 20, 1, [1, 2])], 10, 0)
    two = Trace("two", [Line(1, 30, 1, [1, 2, 3]), Line(5, 30, 1, [1, 2, 3])], 10, 0)
    workload = interleave([one, two])
    assert [prompt.tokens for prompt in workload.prompts] == [30, 20, 30, 20]
    assert workload.unique == len(set(workload.keys)) == 5
    assert {len(key) for key in workload.keys} == {32}
    assert run(workload, {"g2": 5}).hit_blocks == 5


def test_requests_are_put_in_time_order(tmp_path: Path) -> None:
    later = GOOD.replace('"timestamp":0', '"timestamp":7.5')
    assert [line.timestamp for line in read(write(tmp_path, f"{later}\n\n{GOOD}")).lines] == [0, 7.5]


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([(6758, 14), (512, 1), (41_319, 81)], 512),  # the last block counts, full or not
        ([(700, 10), (640, 10), (127, 1)], 64),  # only full blocks count
        ([(100, 10), (99, 10), (21, 3)], 10),  # no power of two
        ([(40, 1)], 64),
        ([(0, 0)], 1),
    ],
)
def test_the_block_size_is_inferred(tmp_path: Path, lengths: list[tuple[int, int]], size: int) -> None:
    lines = [Line(0, tokens, 1, list(range(count))) for tokens, count in lengths]
    text = b"\n".join(msgspec.json.encode(line) for line in lines)
    assert read(write(tmp_path, text)).block_tokens == size


def test_a_block_size_that_cannot_be_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}\n" + GOOD.replace("100", "100000"))
    with pytest.raises(KvbmError, match=r"no block size explains .* give --block-size"):
        read(path)
    assert read(path, block_tokens=64).block_tokens == 64


BROKEN = [
    ("{", "it is not valid JSON: Input data was truncated"),
    (GOOD[:-3], "it is not valid JSON: Input data was truncated"),
    ("hello", "it is not valid JSON: invalid character (byte 0)"),
    (GOOD + " 7", "it is not valid JSON: trailing characters"),
    ("[]", "the line must be an object, not a list"),
    ("{}", "timestamp is missing"),
    (GOOD.replace('"hash_ids":[1,2]', '"x":1'), "hash_ids is missing"),
    (GOOD.replace("100", "-1"), "input_length must not be negative"),
    (GOOD.replace('"timestamp":0', '"timestamp":-0.5'), "timestamp must not be negative"),
    (GOOD.replace("100", "1.5"), "input_length must be a whole number, not a number"),
    (GOOD.replace("100", '"100"'), "input_length must be a whole number, not a text"),
    (GOOD.replace("100", "true"), "input_length must be a whole number, not true or false"),
    (GOOD.replace("100", "null"), "input_length must be a whole number, not null"),
    (GOOD.replace("[1,2]", "7"), "hash_ids must be a list, not a whole number"),
    (GOOD.replace("[1,2]", '[1,"a"]'), "hash_ids[1] must be a whole number, not a text"),
    (GOOD.replace("[1,2]", "[1,-2]"), "hash_ids[1] must not be negative"),
    (GOOD.replace("[1,2]", "[1,2,1]"), "hash_ids has an id twice, but no block of a prompt has the prefix of another"),
    (GOOD[:-1] + ',"session_id":[]}', "session_id must be a whole number or a text or null, not a list"),
    (GOOD.replace('"timestamp":0', '"timestamp":1e999'), "timestamp: number out of range"),
    (GOOD.encode()[:-1] + b',"session_id":"\xff"}', "it is not valid JSON: "),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, line: str | bytes, problem: str) -> None:
    good = GOOD.encode()
    broken = line.encode() if isinstance(line, str) else line
    path = write(tmp_path, good + b"\n\n" + broken + b"\n" + good)
    with pytest.raises(BadLine) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: {problem}")
    trace = read(path, skip_bad=True)
    assert (len(trace.lines), trace.skipped) == (2, 1)


def test_a_gzip_file_that_ends_too_early(tmp_path: Path) -> None:
    whole = gzip.compress(find("sample", None).read_bytes())
    path = write(tmp_path, whole[: len(whole) // 2])
    with pytest.raises(BadLine, match=r"trace.jsonl, line \d+: the gzip file ends too early"):
        read(path)
    trace = read(path, skip_bad=True)
    assert trace.skipped == 1
    assert 0 < len(trace.lines) < 316


def test_a_gzip_file_that_is_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(find("sample", None).read_bytes())
    for damaged in (whole[:-6] + b"\0" + whole[-5:], whole[:200] + b"\xff" * 300 + whole[500:]):
        with pytest.raises(BadLine, match=r"trace.jsonl, line \d+: damaged gzip data"):
            read(write(tmp_path, damaged))


@pytest.mark.parametrize(("text", "problem"), [("", ""), ("\n \n", ""), ("{\n[]\n", ": all 2 lines are broken")])
def test_a_trace_without_requests(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(KvbmError) as caught:
        read(path, skip_bad=True)
    assert str(caught.value) == f"{path} holds no request{problem}"


# -- the command --


def figures(shown: Shown) -> dict[str, Any]:
    assert shown.exit_code == 0, shown.output
    record: dict[str, Any] = json.loads(shown.stdout)
    return record


def test_without_anything_it_replays_the_sample(kvbm: Kvbm) -> None:
    shown = kvbm("replay")
    assert shown.exit_code == 0
    for text in ("sample.jsonl: 316 requests, 5,170 blocks of 64 tokens", "g2=108", "MIN, leaf first", "0.5838"):
        assert text in shown.stdout
    assert "skipped" not in shown.stdout


def test_many_policies_capacities_and_tiers_in_one_run(kvbm: Kvbm, tmp_path: Path) -> None:
    shown = kvbm(
        *("replay", "sample", "--policy", "lru,fifo", "--policy", "lru", "--capacity", "50,100", "--capacity", "10%"),
        *("--capacity", "215", "--tiers", "g2=50,g3=10%", "--placement", "exclusive", "--json"),
    )
    record = figures(shown)
    sizes = [[tier["capacity"] for tier in run["tiers"]] for run in record["runs"]]
    assert sizes == [[50], [50], [100], [100], [215], [215], [50, 215], [50, 215]]
    assert [run["policy"] for run in record["runs"]] == ["lru", "fifo"] * 4
    assert [bound["capacity"] for bound in record["bounds"]] == [50, 100, 215, 265]
    first, last = record["runs"][0], record["runs"][-2]
    assert first["hit_blocks"] == 882
    assert first["block_hit_ratio"] == pytest.approx(882 / 5170)
    assert sum(tier["hit_blocks"] for tier in last["tiers"]) == last["hit_blocks"]
    assert 0 < first["p50_us"] <= first["p99_us"]
    assert first["references_per_s"] > 0
    plain = kvbm("replay", "sample", "--policy", "lru", "--capacity", "50").stdout
    assert "0.1706" in plain
    assert f"{first['tiers'][0]['evictions']:,}" in plain


def test_an_admission_keeps_from_a_lower_tier_what_is_asked_for_once(kvbm: Kvbm, tmp_path: Path) -> None:
    written = {}
    for name in ("all", "presence", "frequency"):
        shown = kvbm("replay", "sample", "--tiers", "g2=50,g3=10%", "--admission", name, "--json")
        record = figures(shown)
        assert record["admission"] == name
        written[name] = [tier["written_blocks"] for tier in record["runs"][0]["tiers"]]
    assert written["all"] == written["presence"]
    assert 0 < written["frequency"][1] < written["all"][1] / 2


def test_several_traces_from_a_folder(kvbm: Kvbm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD, "one.jsonl")
    two = write(tmp_path, GOOD, "two.jsonl")
    given = ("replay", "one.jsonl", str(two), "--capacity", "9", "--json")
    record = figures(kvbm(*given, "--traces", str(tmp_path)))
    assert [trace["name"] for trace in record["traces"]] == ["one.jsonl", "two.jsonl"]
    assert (record["references"], record["unique_blocks"]) == (4, 4)
    monkeypatch.setenv("KVBM_TRACES", str(tmp_path))
    assert figures(kvbm(*given))["references"] == 4


def test_skipped_lines_and_cut_requests_are_reported(kvbm: Kvbm, tmp_path: Path) -> None:
    trace = write(tmp_path, f"{GOOD}\nnothing\n{GOOD}\n")
    given = ("replay", str(trace), "--skip-bad", "--capacity", "1", "--block-size", "50")
    record = figures(kvbm(*given, "--json"))
    assert (record["skipped_lines"], record["traces"][0]["skipped_lines"]) == (1, 1)
    assert (record["runs"][0]["cut_requests"], record["runs"][0]["hit_blocks"]) == (2, 1)
    assert record["traces"][0]["block_tokens"] == 50
    plain = " ".join(kvbm(*given).stdout.split())
    assert "1 broken line skipped" in plain
    assert "2 requests are longer" in plain


@apart
def test_from_standard_input_into_a_pipe() -> None:
    command = [sys.executable, "-m", "kvbm.cli.main", "replay", "-", "--capacity", "2", "--json"]
    shown = subprocess.run(command, input=f"{GOOD}\n{GOOD}\n", capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["runs"][0]["hit_blocks"] == 2
    broken = subprocess.run(command, input=f"{GOOD}\nx", capture_output=True, text=True)
    assert broken.stderr.startswith("kvbm: /dev/stdin, line 2: it is not valid JSON")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@apart
def test_plot(kvbm: Kvbm, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    path = tmp_path / f"plot{suffix}"
    shown = kvbm("replay", "--policy", "lru,arc", "--tiers", "g2=20,g3=50", "--capacity", "20,300", "--plot", str(path))
    assert shown.exit_code == 0, shown.output
    assert f"Plot in {path}" in shown.stdout.replace("\n", "")
    content = path.read_bytes()
    assert len(content) > 5000
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def refused(shown: Shown, status: int = 2) -> str:
    """The sentence; nothing else came out."""
    assert (shown.exit_code, shown.stdout) == (status, "")
    assert shown.stderr.startswith("kvbm: ")
    assert shown.stderr.count("\n") == 1
    return shown.stderr


@pytest.fixture
def not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may run."""
    monkeypatch.setattr(command, "_measure", None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--capacity", "0"), "--capacity: '0' is no capacity; it must be a number of blocks, at least 1, or"),
        (("--capacity", "-5"), "'-5' is no capacity"),
        (("--capacity", "0%"), "'0%' is no capacity"),
        (("--capacity", "many"), "'many' is no capacity"),
        (("--capacity", "10,,20"), "a name or number is missing beside a comma"),
        (("--tiers", "g2"), "'g2' is no tier; write it like g2=10000,g3=5%"),
        (("--tiers", "g2=10,g2=20"), "g2 is there twice"),
        (("--tiers", "g2=10,g3=0"), "--tiers: '0' is no capacity"),
        (("--tiers", "=10"), "'=10' is no tier"),
        (("--policy", "best"), "there is no 'best'; there are fifo, lru,"),
        (("--policy", "lru,"), "a name or number is missing beside a comma"),
        (("--admission", "nobody"), "there is no 'nobody'; there are all, presence, frequency"),
        (("--placement", "anywhere"), "there is no 'anywhere'; there are write-through, exclusive"),
        (("--plot", "plot.jpg"), "the name must end in .png or .svg"),
        (("--plot", "/nowhere/plot.svg"), "it cannot be written: No such file or directory"),
        (("--traces", "/nowhere"), "the folder of traces, /nowhere, is not there"),
        (("missing.jsonl",), "there is no trace 'missing.jsonl': it is no file"),
    ],
)
@pytest.mark.usefixtures("not_reached")
def test_refused_before_anything_runs(kvbm: Kvbm, arguments: Sequence[str], problem: str) -> None:
    assert problem in refused(kvbm("replay", *arguments))


@pytest.mark.usefixtures("not_reached")
def test_a_trace_that_is_not_there_says_where_it_was_looked_for(kvbm: Kvbm, tmp_path: Path) -> None:
    assert f"nor is it in {tmp_path}" in refused(kvbm("replay", "missing.jsonl", "--traces", str(tmp_path)))


@pytest.mark.usefixtures("not_reached")
def test_a_plot_needs_its_extra(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert "pip install 'matplotlib>=" in refused(kvbm("replay", "--plot", "plot.png"), 1)


@pytest.mark.usefixtures("not_reached")
def test_a_broken_trace_ends_with_its_line(kvbm: Kvbm, tmp_path: Path) -> None:
    path, plot = write(tmp_path, GOOD + "\n{}"), tmp_path / "plot.svg"
    sentence = refused(kvbm("replay", str(path), "--plot", str(plot)), 1)
    assert f"{path}, line 2: timestamp is missing" in sentence
    assert not plot.exists()


@pytest.mark.usefixtures("not_reached")
def test_nothing_to_replay(kvbm: Kvbm, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("[1,2]", "[]"))
    assert "no request has a block" in refused(kvbm("replay", str(path), "--block-size", "1"), 1)


def test_every_field_of_the_file_is_documented(kvbm: Kvbm, tmp_path: Path) -> None:
    record = figures(kvbm("replay", "--tiers", "g2=20,g3=50", "--json"))
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name in fields(record):
        assert name in rows, name
    assert set(rows) - set(fields(record)) <= {"write-through", "exclusive"}


@apart
def test_the_page_runs_as_written(kvbm: Kvbm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("kvbm replay")]
    assert len(commands) > 3
    for arguments in commands:
        if "~/traces" not in arguments:
            given = arguments[: arguments.index(">")] if ">" in arguments else arguments
            assert kvbm(*given[1:]).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"hits.svg"}


def fields(value: object, path: str = "") -> list[str]:
    """Dotted names of everything in it; of a list its first element."""
    if isinstance(value, list):
        return fields(value[0], f"{path}[]")
    if isinstance(value, dict):
        return [name for key, part in value.items() for name in fields(part, f"{path}.{key}" if path else key)]
    return [path]
