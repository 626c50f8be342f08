"""Reports: figures are written, pages name what made them, traces load in a viewer's terms."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from msgspec import structs
from rich.console import Console

from mopsim.common.errors import MopError
from mopsim.common.units import format_probability
from mopsim.engine import SimResult
from mopsim.report import validation
from mopsim.report.compare import memory_figure, write_compare
from mopsim.report.findings import Results, finding, headline, outcome, software, verdict
from mopsim.report.formats import saved_as
from mopsim.report.lanes import named
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.plots import Bar, Compared, loss_lines, memory_bars, predicted_bars, time_bars
from mopsim.report.style import figure, legend_below
from mopsim.report.sweep import Sweep, SweepPoint, over, sweep_figure, swept_rows
from mopsim.report.tables import best_of_others, columns, comparison, describe, row
from mopsim.report.timeline import timeline_plot, timeline_title, to_the_end
from mopsim.report.trace import chrome_trace
from mopsim.search.result import SearchResult
from mopsim.spec.categories import WAITS
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Pipeline
from mopsim.strategies import fsdp2, mop

PNG = b"\x89PNG"


def point(value: int, results: Results) -> SweepPoint:
    return SweepPoint(value, str(value), results)


def swept(setting: str, results: dict[int, Results]) -> Sweep:
    return Sweep(setting, [point(*each) for each in results.items()])


def test_compare_writes_pictures_and_pages(results: list[SimResult], tmp_path: Path) -> None:
    labelled = dict(zip(("mop", "fsdp2"), results, strict=True))
    sweep = swept("seq-len", {256: labelled, 512: labelled | {"mop": None}})
    facts = {"command": "mopsim compare ...", "version": "1"}
    write_compare(tmp_path, labelled, results, sweep, "tiny", facts, "won")
    written = list(tmp_path.iterdir())
    names = {path.name for path in written}
    assert {"memory.png", "time.png", "sweep.png", "timeline-1.png", "index.md", "index.html"} <= names
    assert all(path.read_bytes().startswith(PNG) for path in written if path.suffix == ".png")
    text = (tmp_path / "index.md").read_text()
    assert "mopsim compare ..." in text
    assert all(f"({path.name})" in text for path in written if path.suffix == ".png")
    assert "Lines over the bars: a measured value lies between their ends with probability 90%" in text


def test_a_title_of_memory_is_of_the_device_and_bars_tell_the_hosts(
    results: list[SimResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("mopsim.report.compare.memory_bars", lambda *given: drawn.append(given))
    some = {name: replace(results[0], host_memory=size) for name, size in (("a", 0), ("b", 2**31))}
    memory_figure(tmp_path / "memory.png", some)
    ((_, bars, _, title),) = drawn
    assert title.startswith("Device memory: a needs the least, 100% of the largest")
    assert [" of host memory" in bar.remark for bar in bars] == [False, True]


def test_a_figure_is_saved_in_every_format_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        with saved_as(("svg", "pdf")):
            loss_lines(tmp_path / folder / "loss.png", {"mop": [7.6, 6.5, 6.0]}, "falls")
    for name in ("loss.png", "loss.svg", "loss.pdf"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(MopError, match="format: 'gif' is not one of png, svg, pdf"), saved_as(("gif",)):
        pass


def test_text_of_a_figure_is_no_mathematics_but_on_its_axes(tmp_path: Path) -> None:
    with figure(tmp_path / "f.png", 4, 3) as (axis,):
        axis.loglog([1, 1e6], [1, 1e6], label=r"$\frac{$")
        axis.set_title("$57 k to $120 k")
        legend = axis.legend()
    assert (tmp_path / "f.png").exists()
    assert not any(text.get_parse_math() for text in (axis.title, *legend.get_texts()))
    assert all(label.get_parse_math() for label in axis.get_xticklabels(which="both"))


def drawn(monkeypatch: pytest.MonkeyPatch, folder: Path, sweep: Sweep, where: str = "") -> Axes:
    """The axis of a sweep's figure."""
    axes: list[Axes] = []
    monkeypatch.setattr("mopsim.report.sweep.legend_below", lambda axis, columns: axes.append(axis))
    sweep_figure(folder / "sweep.png", sweep, where=where)
    return axes[0]


def test_a_sweep_says_what_it_holds(
    results: list[SimResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = SweepPoint(256, "256", {"mop": results[0]}, {}, 6, 256)
    second = SweepPoint(768, "768", {"mop": None}, {"mop": "x: 1 is not 2"}, 2, 768)
    sweep = Sweep("seq-len", [first, second], "tokens per step")
    assert sweep.held == "held constant: tokens per step (1,536)"
    other = replace(sweep, points=[replace(first, held=6), replace(second, batch=3, held=2)])
    assert other.held == "held constant: tokens per step (1,536); 768 has 2,304 (+50.0 %)"
    assert [row[1] for row in swept_rows(other).rows] == ["6", "3 (+50.0 %)"]
    assert "no legal strategy: x: 1 is not 2" in str(swept_rows(sweep).rows)
    axis = drawn(monkeypatch, tmp_path, sweep, "tiny on 1 node of cpu-2core")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("sequence length, tokens", "tokens/s per rank")
    title = axis.get_title("left")
    assert {"step, 50 %", "tokens/s per rank"} <= set(swept_rows(sweep, 0.5).columns)
    assert title.splitlines()[0] == "All fit up to 256 tokens"
    assert title.splitlines()[1:] == ["tiny on 1 node of cpu-2core; held constant: tokens per step (1,536)"]


def test_a_sweep_says_how_many_of_the_devices_a_plan_uses(
    results: list[SimResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan of 2 ranks on more nodes was a flat line that was said to be fastest at each."""
    points = [SweepPoint(n, str(n), {"a": results[0]}, devices=2 * n) for n in (1, 2, 4)]
    sweep = Sweep("nodes", points)
    said = "a uses 2 of 4 devices at 2, 2 of 8 devices at 4: numbers per rank are of these"
    assert sweep.part == said
    assert said in over(sweep)
    title = drawn(monkeypatch, tmp_path, sweep).get_title("left")
    assert said in " ".join(title.split())
    assert [row[2] for row in swept_rows(sweep).rows] == ["a", "a (2 of 4 devices)", "a (2 of 8 devices)"]
    two = replace(sweep, points=[replace(one, results=one.results | {"b": results[0]}) for one in points[:2]])
    assert two.part.startswith("a and b use 2 of 4 devices at 2: ")
    assert replace(sweep, points=points[:1]).part == ""


def test_a_tie_is_no_win(results: list[SimResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a search: step times within 0.5 %."""
    fast = min(results, key=lambda one: one.step_time)
    near, far = (replace(fast, step_time=part * fast.step_time) for part in (1.004, 1.2))
    three = {"a": fast, "b": near, "c": far}
    assert outcome(three) == "a and b tie"
    assert outcome({"b": near, "a": fast}) == outcome({"b": fast, "a": near}) == "b and a tie"
    assert headline(three) == "a and b tie within 0.5 %, 1.20x as fast as c"
    assert "probability" in finding(three)[0]
    assert "fastest" not in str(verdict({"a": fast, "b": near}))
    assert "loses" not in str(verdict({"a": fast, "b": near}))
    assert outcome({"a": fast, "b": replace(fast, step_time=1.006 * fast.step_time)}) == "a is fastest"
    elsewhere = replace(near, stack=structs.replace(near.stack, name="other"))
    assert software({"a": fast, "b": elsewhere}).startswith("The tie holds for")
    sweep = swept("nodes", {1: {"a": fast, "b": far}, 2: {"a": fast, "b": near}, 4: {"a": fast, "b": None}})
    sure = format_probability(fast.times_as_fast_as(far).p_faster)
    ahead = f"Over nodes: a is fastest at 1 (probability {sure}); a and b tie at 2"
    assert over(sweep) == f"{ahead}; a is the only one that is legal at 4"
    full = replace(sweep, points=[*sweep.points[:2], point(4, {"a": fast, "b": replace(fast, fits=False)})])
    assert over(full) == f"{ahead}; a is the only one that fits at 4"
    axis = drawn(monkeypatch, tmp_path, replace(sweep, points=sweep.points[:2]))
    assert axis.get_title("left") == "All fit up to 2 nodes; a and b tie there"


def test_a_hole_in_a_sweep_is_not_memory(
    results: list[SimResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 3 nodes no batch divided: the title said that all fit up to 4, and lines ran through 3."""
    one = results[0]
    both, slow = {"a": one, "b": one}, replace(one, step_time=2 * one.step_time)
    sweep = swept("nodes", {1: both, 2: both, 3: both | {"a": None}, 4: both | {"b": slow}})
    axis = drawn(monkeypatch, tmp_path, sweep)
    assert axis.get_title("left").startswith("All fit at 1, 2, 4 nodes; a is fastest at 4 (probability ")
    heights = list(axis.lines[0].get_ydata())
    assert math.isnan(heights[2])
    assert heights[0] == heights[1] == heights[3] == one.tokens_per_second_per_device
    assert axis.get_legend_handles_labels()[1] == ["a", "b", "90% interval", "no legal strategy"]
    scattered = [one for one in axis.collections if isinstance(one, PathCollection)]
    assert [list(place) for one in scattered for place in one.get_offsets()] == [[3, 0]]  # on the axis


def test_memory_is_drawn_to_the_end_of_the_step(results: list[SimResult], tmp_path: Path) -> None:
    assert to_the_end([(0.0, 1.0), (2.0, 3.0)], 5.0) == [(0.0, 1.0), (2.0, 3.0), (5.0, 3.0)]
    assert to_the_end([(0.0, 1.0), (5.0, 3.0)], 5.0) == [(0.0, 1.0), (5.0, 3.0)]
    assert to_the_end([], 5.0) == []
    one = results[0]
    timeline_plot(tmp_path / "t.png", one, "t", one.memory_limit)
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)


def test_every_row_names_its_stack(results: list[SimResult], tmp_path: Path) -> None:
    write_compare(tmp_path, dict(zip("ab", results, strict=True)), [], None, "tiny", {}, "won", level=0.5)
    text, shown = (tmp_path / "index.md").read_text(), StringIO()
    assert "| step, 50 % |" in text
    assert not re.search(r"\b90 ?%", text)
    Console(file=shown, width=200).print(comparison(results, "tiny"))
    for one in results:
        assert f" | {one.stack.name} |" in text
        assert f" on {one.stack.name}" in shown.getvalue()


def test_of_families_that_tie_the_ranked_first_has_no_second_best(results: list[SimResult]) -> None:
    """`search` printed two bests of fsdp2 where mop was faster by less than a tie, and none of mop."""
    faster, first = results[0], replace(results[1], step_time=1.004 * results[0].step_time)
    said = best_of_others({"mop": faster, "fsdp2": replace(first, peak_memory=1)}, first, {}).plain
    assert said.startswith("best of mop: ")
    assert "fsdp2:" not in said
    assert "1.00 times as fast as the first plan" in said


def test_a_family_without_a_plan_says_its_own_reason(results: list[SimResult]) -> None:
    """`search` said "the counts below say why" of each, which were of all families together."""
    over = replace(results[0], peak_memory=results[0].memory_limit + 2**30)
    counted = Counter({"device memory, bound: grads": 9, "bad": 3, "worse": 1})
    lacking = {
        "mop": SearchResult(load_model("tiny"), candidates=13, rejected=counted),
        "fsdp2": SearchResult(load_model("tiny"), candidates=13, rejected=counted, closest=over),
        "megatron": SearchResult(load_model("tiny"), candidates=13, risky=[results[0]], closest=over),
    }
    said = best_of_others(dict.fromkeys(lacking), None, lacking).plain.splitlines()
    reasons = "device memory, bound: grads (9 candidates); bad (3 candidates)"
    assert said[0] == f"best of mop: none of 13 candidates: {reasons}"
    missing = f"1.00 GiB over on the device, stopped by {over.over}"
    assert said[1] == f"best of fsdp2: none: the closest simulated is {missing}"
    assert said[2].startswith("best of megatron: none: the likeliest plan fits, as described, with ")
    closest = replace(over, strategy=structs.replace(over.strategy, name="fsdp2"))
    assert best_of_others(dict.fromkeys(lacking), closest, lacking).plain.splitlines() == [said[0], said[2]]


def test_row_has_a_cell_for_every_column(results: list[SimResult]) -> None:
    assert len(row(results[0])) == len(columns())


def test_describe_names_what_differs() -> None:
    text = describe(mop(4, context_parallel=2, expert_parallel=4, vocab_parallel=2, expert_chunk_tokens=64))
    for part in ("CP=2", "EP=4", "vocab-ring=2", "expert-chunk=64", "offload=inputs,optimizer-streamed"):
        assert part in text
    assert describe(fsdp2(2, save_ops=("q_proj", "combine"))).endswith(" recompute=full save=q_proj+combine")
    halves = fsdp2(2, pipeline_parallel=2)
    halves = structs.replace(halves, pipeline=structs.replace(halves.pipeline, schedule="zero_bubble"))
    assert " PP=2 schedule=zero_bubble " in describe(halves)


def test_trace_has_streams_and_counters(results: list[SimResult]) -> None:
    one = results[0]
    trace = chrome_trace(one, {"version": "1"})
    events = json.loads(json.dumps(trace))["traceEvents"]
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "DP shard (scale-up)"} <= threads
    peak = max(event["args"]["bytes"] for event in events if event["name"] == "device memory")
    assert peak == one.peak_memory
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_timeline_title_says_the_step(results: list[SimResult]) -> None:
    assert "a step" in timeline_title(results[0], "mop")


def test_timeline_title_says_which_stages_are_drawn(results: list[SimResult]) -> None:
    assert "stage" not in timeline_title(results[0], "mop")
    strategy = structs.replace(
        fsdp2(2, dtype="float32"), pipeline=Pipeline(pipeline_parallel=2), world_size=4
    )
    staged = replace(results[0], strategy=strategy, span_stage=1, memory_stage=0)
    assert "of 2 stages: streams of stage 2, memory of stage 1" in timeline_title(staged, "megatron")


def test_a_title_ends_within_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a step's bars was cut where two programs are compared."""
    from mopsim.report import style

    figures: list[Figure] = []
    monkeypatch.setattr(style, "_save", lambda fig, path: figures.append(fig))
    long = "Simulated step: mop 1.4 % ahead of fsdp2, plan and software together, " * 2
    bars = [Bar(name, {"experts": 1.0}, "10,000 tokens/s") for name in ("mop", "fsdp2", "megatron")]
    time_bars(tmp_path / "time.png", bars, bars, (long, "Exposed"))
    figures[0].draw_without_rendering()
    for axis, lines in zip(figures[0].axes, (3, 1), strict=True):
        title = axis.get_title(loc="left")
        drawn = next(one for one in axis.get_children() if isinstance(one, Text) and one.get_text() == title)
        assert drawn.get_window_extent().x1 <= figures[0].bbox.x1
        assert len(title.splitlines()) <= lines


@pytest.mark.parametrize("height", [3.0, 9.0])
def test_a_legend_is_below_the_label_of_its_axis(tmp_path: Path, height: float) -> None:
    with figure(tmp_path / "f.png", 10, height, 2) as axes:
        for axis in axes:
            axis.barh([0, 1], [1, 2], label="part")
            axis.set_xlabel("device memory, GiB")
            legend_below(axis)
        drawn = axes[0].figure
        assert isinstance(drawn, Figure)
        drawn.draw_without_rendering()
        for axis in axes:
            legend = axis.get_legend()
            assert legend.get_window_extent().y1 <= axis.xaxis.label.get_window_extent().y0


def test_points_of_many_sources_keep_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A legend longer than the figure pressed its points flat."""
    drawn: list[Axes] = []

    def draws(axis: Axes, *args: float) -> None:
        drawn.append(axis)

    monkeypatch.setattr(validation, "_diagonal", draws)
    groups = {f"source-{index}": [(1.0 + index, 1.0 + index)] for index in range(65)}
    validation.scatter(tmp_path / "f.png", groups, "seconds", "all of them")
    assert drawn[0].get_position().height > 0.6


def test_an_axis_ends_where_its_bars_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` drew 60 s for bars of 25 s, and what 13 s of them waited for on the same axis."""
    axes: list[Axes] = []
    monkeypatch.setattr("mopsim.report.plots.legend_below", axes.append)
    long = "does not fit: activations, 107.95 GiB over"
    steps = [Bar("a", {"experts": 20.0, "router": 5.0}, long), Bar("b", {"experts": 10.0}, interval=(8, 30))]
    time_bars(tmp_path / "time.png", steps, [Bar("a", {"all_to_all": 0.5}), Bar("b", {})], ("", ""))
    memory_bars(tmp_path / "memory.png", [Bar("a", {"grads": 2.0**33}, long)], 2.0**34, "")
    for axis, end in zip(axes, (30, 500, 16), strict=True):  # s, ms, GiB
        assert end < axis.get_xlim()[1] < 1.05 * end
        remarks = [text for text in axis.texts if long in text.get_text()]
        bars = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        assert all(text.get_position()[1] < min(bar.get_y() for bar in bars) for text in remarks)


def test_losses_and_predictions_are_drawn(tmp_path: Path) -> None:
    loss_lines(tmp_path / "loss.png", {"mop": [7.6, 6.5, 6.0], "fsdp2": [7.6, 6.5, 6.1]}, "falls")
    rows = [Compared("mop", 0.5, 0.45, 0.6, 0.3, 0.52), Compared("held-out", 0.9, 0.8, 1.0, 0.4, None)]
    predicted_bars(tmp_path / "predicted.png", rows, "close")
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_html_is_escaped_and_markdown_is_not(tmp_path: Path) -> None:
    write_page(
        tmp_path, Page("a < b", "s", [Section("t", table=Table(["x"], [["1 < 2"]]))], {"command": "c"})
    )
    assert "1 &lt; 2" in (tmp_path / "index.html").read_text()
    assert "1 < 2" in (tmp_path / "index.md").read_text()


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MopError, match="its parent is a file"):
        loss_lines(tmp_path / "file" / "loss.png", {"a": [1.0, 0.5]}, "t")


def test_legends_have_the_names_of_tables() -> None:
    assert [named(key, "memory") for key in ("boundaries", "dispatch", "logits")] == [
        "layer inputs", "routed tokens", "logits"
    ]  # fmt: skip
    assert (named("h2d", "components"), named("h2d", "waits")) == ("copies to device", "copies from the host")
    assert named("dense_ffn", "components") == "dense ffn"


def test_a_legend_of_all_waits_leaves_the_axes_their_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are sentences: six columns of them were wider than the figure, whose axes collapsed."""
    shown: list[tuple[float, float, float]] = []

    def keep(fig: Figure, path: Path) -> None:
        fig.draw_without_rendering()
        shown.extend(
            (axis.bbox.width / fig.bbox.width, legend.get_window_extent().x0, legend.get_window_extent().x1)
            for axis in fig.axes
            if (legend := axis.get_legend())
        )
        assert all(0 <= left < right <= fig.bbox.x1 for _, left, right in shown)

    monkeypatch.setattr("mopsim.report.style._save", keep)
    bars = [Bar("held-out", dict.fromkeys(WAITS, 0.1), "of the step")]
    time_bars(tmp_path / "time.png", bars, bars, ("a", "b"))
    assert len(shown) == 2
    assert min(width for width, _, _ in shown) > 0.7
