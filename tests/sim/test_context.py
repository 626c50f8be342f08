"""Context length against throughput: rules that hold, curves that nest, and a small report."""

import json
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mopsim.cli import COMMANDS, main
from mopsim.common.errors import SpecError
from mopsim.common.units import format_count
from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import ContextCase, Curve, Task, _alike, curve, nested, sweep
from mopsim.engine import simulate
from mopsim.report.context import ratio, reach
from mopsim.search.bound import Bounds, bound
from mopsim.search.problem import CHUNKED, DEVICE, HOST
from mopsim.search.space import Space
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.strategies import fsdp2
from reports.context_throughput.make import main as make
from reports.context_throughput.variants import OFFLOADED, VARIANTS
from reports.context_throughput.words import Study, summary
from tests.sim.spaces import generate

K = 1024
NAMES = {one.name: one for one in contenders()}


def case(tokens: int = 128 * K) -> ContextCase:
    return ContextCase(load_model("mop_120b"), load_profile("h200-sxm-141g"), 2, tokens)


@pytest.mark.parametrize("contender", contenders(), ids=lambda one: one.name)
def test_what_is_searched_keeps_the_rules(contender: Contender) -> None:
    problem = case().problem(contender, 128 * K, 16)
    space = generate(problem, contender.family, contender.axes)
    c = space.columns
    assert len(space)
    if contender.within:
        assert (c["tensor"] * c["sequence"]).max() == 8 * contender.within
    elif contender.family == "fsdp2":
        assert (c["tensor"] * c["sequence"]).max() == 16
    assert contender.family == "mop" or (c["loss"] == CHUNKED).any() == contender.chunked
    if contender.family == "fsdp2":
        tiers = {"device": DEVICE, "host": HOST}
        assert set(np.unique(c["state"])) == {tiers[tier] for tier in contender.offload}


@cache
def bounded() -> tuple[Space, Bounds]:
    """What FSDP2 may do on 16 devices, and what bounds each row."""
    space = generate(case().problem(NAMES["fsdp2"], 128 * K, 16), "fsdp2", NAMES["fsdp2"].axes)
    return space, bound(space)


@pytest.mark.xdist_group("context spaces")
@pytest.mark.parametrize("place", range(12))
def test_the_bound_holds_with_tensor_and_context_parallelism(place: int) -> None:
    space, bounds = bounded()
    problem = space.problem
    index = place * len(space) // 12 + 7
    strategy = space.build(index)
    strategy.check_model(problem.model)
    problem.training.check_strategy(strategy)
    found = simulate(problem.model, problem.hardware, problem.num_nodes, strategy, problem.training)
    assert bounds.time[index] <= found.step_time * (1 + 1e-9)
    assert bounds.device[index] <= found.peak_memory + 1
    assert bounds.host[index] <= found.host_memory + 1


def test_offloaded_parameters_travel_under_tensor_parallelism_too() -> None:
    """FSDP2's CPU offload with TP or gathered keys: shards go up before each gather, gradients come down."""
    problem = case().problem(NAMES["fsdp2"], 128 * K, 2)
    space = generate(problem, "fsdp2", NAMES["fsdp2"].axes)
    c = space.columns
    alike = (c["tensor"] == 2) & (c["sequence"] == 4) & (c["recompute"] == 1) & (c["micro_batch"] == 1)
    alike &= (c["experts"] == 16) & (c["dense_shard"] == 8) & (c["reshard"] == 1)
    rows = {state: int(np.flatnonzero(alike & (c["state"] == state))[0]) for state in (DEVICE, HOST)}
    results = {
        state: simulate(problem.model, problem.hardware, 2, space.build(row), problem.training)
        for state, row in rows.items()
    }
    assert results[HOST].busy["h2d"] > 0
    assert results[HOST].busy["d2h"] > 0
    assert "h2d" not in results[DEVICE].busy
    assert results[HOST].host_memory > 100e9
    assert results[HOST].resident_memory < 0.1 * results[DEVICE].resident_memory


def test_one_sequence_is_split_as_far_as_the_rules_allow() -> None:
    def most(name: str, asked: ContextCase) -> int:
        return NAMES[name].most_split(asked.problem(NAMES[name], 1024 * K, 16))

    assert most("mop", case()) == 16
    assert most("fsdp2", case()) == 16
    assert most("fsdp2_node", case()) == 8
    heads = VARIANTS[4].change(case())
    assert heads.model.num_attention_heads == 56
    assert most("mop", heads) == 8
    assert most("fsdp2", heads) == 16


def test_looser_contenders_contain_stricter_ones() -> None:
    free, full, node = NAMES["fsdp2"], NAMES["fsdp2_full"], NAMES["fsdp2_node"]
    assert free.contains(full)
    assert full.contains(node)
    assert full.contains(OFFLOADED)
    assert not node.contains(full)
    assert not full.contains(free)
    assert not free.contains(NAMES["mop"])


@cache
def on_device() -> Curve:
    return curve(Task(("x",), case(), NAMES["fsdp2_device"], (128 * K, 256 * K, 512 * K), 1))


@pytest.mark.xdist_group("context spaces")
def test_the_reach_is_not_of_the_size_of_the_step() -> None:
    """With all logits and nothing on the host, FSDP2 runs 128K on 16 devices in steps of 128K tokens a
    device; one sequence a step, without accumulated gradients, fits at 256K, too. Then logits stop it."""
    found = on_device()
    assert [(point.fits, point.small) for point in found.points] == [
        (True, False), (True, True), (False, True),
    ]  # fmt: skip
    assert found.whole is found.points[0]
    assert found.end.stopped_by == "logits"
    assert reach(found) == "256K*\u2020"
    assert found.points[0].fits
    assert not found.points[0].sure
    assert found.points[1].global_batch == 1
    tiny = curve(Task(("x",), case(8 * K), NAMES["fsdp2_device"], (256 * K, 512 * K), 1))
    assert (tiny.longest.seq_len, tiny.longest.small) == (256 * K, False)


@pytest.mark.xdist_group("context spaces")
def test_a_ratio_compares_whole_steps_only() -> None:
    whole, small = curve(Task(("x",), case(), NAMES["fsdp2_node"], (256 * K,), 1)), on_device()
    assert whole.points[0].throughput
    assert small.points[1].throughput
    assert ratio(whole, small, 256 * K) is None
    page = summary(Study([case()], [{"mop": whole, "fsdp2": small}], [], (256 * K,), ()))
    said = "In some cases only the smallest legal step fits at the end: FSDP2, full logits, no offload."
    assert said in page


def test_a_curve_takes_what_a_stricter_one_found() -> None:
    lengths = (128 * K,)
    tasks = [Task((name,), case(), NAMES[name], lengths, 2) for name in ("fsdp2", "fsdp2_full", "fsdp2_node")]
    curves = nested({key[0]: one for key, one in sweep(tasks, 1)})
    rates = [curves[name].points[0].throughput or 0.0 for name in ("fsdp2", "fsdp2_full", "fsdp2_node")]
    assert rates == sorted(rates, reverse=True)
    assert (ratio(curves["fsdp2"], curves["fsdp2_node"], 128 * K) or 0) >= 1


def test_a_step_of_one_sequence_and_one_microbatch() -> None:
    small = curve(Task(("x",), case(8 * K), OFFLOADED, (128 * K,), 1)).points[0]
    assert small.global_batch == 1
    at_once = curve(
        Task(("x",), replace(case(), accumulate=False), NAMES["fsdp2_node"], (128 * K,), 1)
    ).points[0]
    assert at_once.result.training.num_microbatches(at_once.result.strategy) == 1


def test_what_is_best_elsewhere_stays_legal() -> None:
    """As many tokens a rank for another length, only where tensor x sequence still divides the ranks."""
    wide = fsdp2(16, tensor_parallel=8, context_parallel=2, context_exchange="all_gather", micro_batch=2)
    assert {one.attention.context_parallel for one in _alike(wide, 2.0)} == {2}
    assert {one.micro_batch for one in _alike(wide, 2.0)} == {2, 1}
    assert {(one.attention.context_parallel, one.micro_batch) for one in _alike(wide, 0.5)} == {
        (2, 2),
        (1, 2),
        (2, 4),
    }


def test_a_refusal_crosses_processes() -> None:
    error = SpecError("field", 3, "is odd")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_names_of_lengths() -> None:
    assert [format_count(n) for n in (131072, 1 << 20, 1000)] == ["128K", "1M", "1,000"]


def code_of(command: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """With which a command ends."""
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_writes_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    command = (
        "mopsim context --model mop_120b --nodes 2 --seq-len 128K,1M --budget 1 --jobs 1 "
        f"--contender fsdp2_device --out {out} --json {tmp_path / 'x.json'}"
    )
    assert code_of(command, monkeypatch) in (0, None)
    printed = " ".join(capsys.readouterr().out.split())
    written = printed.partition("Written: ")[2]
    assumed = "fsdp2-any-context is an assumption, no one program"
    for said in (printed, *((out / f"index.{kind}").read_text() for kind in ("md", "html"))):
        for told in ("mopexec-flat", assumed, "plan and software together"):
            assert told in " ".join(said.split())
    assert all(path.name in written for path in [*out.iterdir(), tmp_path / "x.json"])
    made = json.loads((out / "context.json").read_text())
    assert made == json.loads((tmp_path / "x.json").read_text())
    assert made["contenders"]["mop"]["stack"] == "mopexec-flat"
    assert made["contenders"]["fsdp2"]["stack_assumed"]
    curves = made["cases"][0]["curves"]
    assert set(curves) == {"mop", "fsdp2", "fsdp2_device"}
    assert curves["fsdp2_device"]["stopped_by"] == "logits"
    assert curves["mop"]["strategy_at_longest"]["world_size"] == 16
    (first, *_) = made["cases"][0]["ratios"]["fsdp2_device"]
    assert first["ratio_interval"][0] < first["ratio"] < first["ratio_interval"][1]
    assert 0 < first["p_faster"] < 1
    assert curves["mop"]["points"][0]["step_time_interval_s"][0] < curves["mop"]["points"][0]["step_time_s"]
    page = (out / "index.md").read_text()
    assert "probability that MoP is faster" in page
    assert "FSDP2, full logits, no offload" in page
    assert "Reach, of the lengths asked: " in page
    assert "FSDP2, full logits, no offload: 128K*, stopped at 1M by logits" in page
    assert "*: fits with a probability below 0.9" in page
    assert "\n\n\n" not in page


def test_the_help_names_the_contenders() -> None:
    choices, always = COMMANDS["context"].options["contender"].help.split("; ")[:2]
    assert choices.rpartition(": ")[2].split(", ") == list(NAMES)
    assert always == f"{' and '.join(one.name for one in contenders() if one.always)} always run"


def test_a_sweep_where_nothing_fits_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (
        "mopsim context --model mixtral_8x7b --hardware cpu-2core --nodes 1 --seq-len 1K --budget 1 --jobs 1 "
        f"--out {tmp_path / 'report'}"
    )
    assert code_of(command, monkeypatch) == 3
    curves = json.loads((tmp_path / "report" / "context.json").read_text())["cases"][0]["curves"]
    assert {one["longest"] for one in curves.values()} == {None}


def test_the_report_of_the_papers_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one network, one length, three contenders and two assumptions here."""
    place = "reports.context_throughput.make"
    some = [NAMES[name] for name in ("mop", "fsdp2", "fsdp2_device")]
    monkeypatch.setattr(f"{place}.PAPERS", (("mop_120b", 2),))
    monkeypatch.setattr(f"{place}.LENGTHS", (128 * K,))
    monkeypatch.setattr(f"{place}.VARIANTS", (VARIANTS[0], VARIANTS[4]))
    monkeypatch.setattr(f"{place}.contenders", lambda: some)
    monkeypatch.setattr("sys.argv", f"make --budget 1 --jobs 1 --out {tmp_path}".split())
    make()
    made = json.loads((tmp_path / "context.json").read_text())
    assert [one["name"] for one in made["variants"]] == ["base", "heads_56"]
    assert "published" in (tmp_path / "index.md").read_text()
    for picture in ("throughput.png", "ratio.png", "reach.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--model mop_241b", "--nodes: 1 given for 2 of --model, one each is needed"),
        ("--model mop_120b --nodes 2", "--model: 'mop_120b on 2 nodes' is given twice"),
        ("--contender fsdp3", "--contender: 'fsdp3' is not one of"),
        ("--seq-len ,", "--seq-len: ',' has an empty value"),
        ("--seq-len 12Q", "--seq-len"),
        ("--seq-len 128K,64K,131072", "--seq-len: '128K,64K,131072' has 131072 twice"),
        ("--routing 120/3", "routing"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "sys.argv", f"mopsim context --model mop_120b --nodes 2 --out {tmp_path / 'r'} {arguments}".split()
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "r").exists()
