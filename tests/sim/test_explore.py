"""The explorer's page as a file: what is in it, what it may fetch, and what it refuses."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console
from typer.testing import CliRunner

import mopsim
from mopsim.cli import app
from mopsim.common import io
from mopsim.common.units import format_nodes
from mopsim.engine import simulate
from mopsim.report import explore
from mopsim.report.explore.page import html
from mopsim.report.explore.steps import front, timeline
from mopsim.report.explore.views import explorer, kind_of, steps_of
from mopsim.report.palette import COLOURS, in_order
from mopsim.report.tables import ENOUGH, P_FITS, comparison
from mopsim.search.result import promise
from mopsim.spec.categories import COMPONENTS
from mopsim.spec.hardware import COLLECTIVES
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.sim.explored import JOB, results

KINDS = ("simulate", "search", "compare", "size", "context", "validate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return results()


def views(data: dict[str, Any]) -> list[dict[str, Any]]:
    kind = kind_of(data, "x")
    return list(explorer(data, kind, steps_of(data, kind), {}, []).views)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_views(made: dict[str, dict[str, Any]], kind: str) -> None:
    found = views(made[kind])
    assert kind_of(made[kind], "x").name == kind
    assert found[0]["kind"] == ("plot" if kind == "context" else "table")
    assert all(
        len(row) == len(one["columns"]) for one in found if one["kind"] == "table" for row in one["rows"]
    )
    assert {one["kind"] for one in found} >= ({"plot"} if kind != "simulate" else {"bars"})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "validate"])
def test_a_throughput_is_named_by_the_machines_devices(made: dict[str, dict[str, Any]], kind: str) -> None:
    text = json.dumps(views(made[kind]))
    assert "tokens/s per rank" in text
    assert "GPU and step" not in text
    assert "per GPU" not in text


def test_a_page_holds_what_it_needs_and_names_no_address(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    step = mopsim.simulate(**JOB, strategy=mopsim.mop(dtype="float32"))
    assert mopsim.explore(step, path) == []
    text = path.read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not fetched
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src &#39;none&#39;" in policy.group(1)
    assert not re.search(r"unsafe|\*|https?:", policy.group(1))
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    timeline = data["views"][-1]
    assert timeline["kind"] == "timeline"
    assert max(span[2] for span in timeline["spans"]) == pytest.approx(step.step_time_s, rel=1e-5)
    peak = max(map(sum, zip(*timeline["memory"]["categories"].values(), strict=True)))
    assert peak == step.peak_memory_bytes


def test_what_a_timeline_draws_has_colours_of_its_own() -> None:
    """The embedding and kernels bound by memory were one grey, in one legend."""
    moved = (*COLLECTIVES, "memory_bound", "h2d", "d2h", "host_optimizer")
    drawn = [COLOURS[one] for one in (*COMPONENTS, *moved)]
    assert len(set(drawn)) == len(drawn)


def test_timelines_of_two_steps_have_their_legends_in_one_order() -> None:
    legends = []
    for strategy in (mop(2, dtype="float32"), fsdp2(2, dtype="float32")):
        job = TrainSpec(seq_len=256, global_batch=4)
        step = simulate(load_model("tiny"), load_profile("cpu-2core"), 1, strategy, job, timeline=True)
        legends.append(timeline("t", step)["components"])
    first, second = ([name for name in one if name in legends[0] and name in legends[1]] for one in legends)
    assert first == second
    assert in_order(["no such", "experts", "dense_ffn", "router", "experts"]) == [
        "dense_ffn", "router", "experts", "no such",
    ]  # fmt: skip


def test_a_timeline_names_what_is_computed_and_what_is_moved(tmp_path: Path) -> None:
    """FSDP2's gathers were of the component `other`. All have a colour."""
    mopsim.explore(mopsim.simulate(**JOB, strategy=mopsim.fsdp2(dtype="float32")), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    view = json.loads(text.split('id="data">')[1].split("</script>")[0])["views"][-1]
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for stream, _, _, _, component, *_ in view["spans"]:
        named[view["streams"][stream] == "compute"].add(view["components"][component])
    assert {"attention", "experts"} <= named[True] <= set(COMPONENTS)
    assert "all_gather" in named[False]
    assert not named[False] & set(COMPONENTS)
    assert named[False] | named[True] <= set(COLOURS)


def test_text_of_a_result_stays_text(made: dict[str, dict[str, Any]]) -> None:
    data = json.loads(json.dumps(made["compare"]))
    data["strategies"] = {"</script><script>alert(1)</script>": next(iter(data["strategies"].values()))}
    kind = kind_of(data, "x")
    assert "<script>alert" not in html(explorer(data, kind, steps_of(data, kind), {}, ["<b>"]))


def summary(data: dict[str, Any]) -> str:
    kind = kind_of(data, "x")
    return explorer(data, kind, steps_of(data, kind), {}, []).summary


def test_a_page_says_how_far_its_search_is_proven(made: dict[str, dict[str, Any]]) -> None:
    """The sentence of the terminal and of `Ranking.headline`; of a comparison, for each search."""
    data = {**made["search"], "gap": 0.47, "expected_gap": 0.02}
    left = promise(0.47, 0.02)
    proven = "proven: no plan left out is more than 0.5 % faster"
    assert summary(data) == f"{data['verdict']}; {left}"
    assert summary({**data, "gap": 0.003}) == f"{data['verdict']}; {proven}"
    del data["gap"]
    assert summary(data) == data["verdict"]
    assert proven in summary({**made["simulate"], "gap": 0.0, "expected_gap": 0.0})
    compared = json.loads(json.dumps(made["compare"]))
    assert "proven" not in views(compared)[0]["note"]
    compared["strategies"]["mop"] |= {"gap": 0.0, "expected_gap": 0.0}
    compared["strategies"]["fsdp2"] |= {"gap": 0.47, "expected_gap": 0.02}
    compared["findings"] = ["mop is fastest", f"Search of fsdp2: {left}"]
    found = views(compared)[0]
    assert found["note"].startswith(f"mop: {proven}. step at least, at most: ")
    assert summary(compared).splitlines()[:2] == ["mop is fastest.", f"Search of fsdp2: {left}."]
    earlier = {key: value for key, value in compared.items() if key != "findings"}
    assert summary(earlier).startswith(f"{compared['finding']}.")
    assert {"gap", "expected gap"} <= {column["name"] for column in found["columns"]}


def test_a_page_names_all_that_its_steps_were_made_of(made: dict[str, dict[str, Any]]) -> None:
    data = json.loads(json.dumps(made["compare"]))
    data["facts"] = {"command": "mopsim compare --model tiny"}
    data["strategies"]["fsdp2"]["provenance"] |= {"profile": "other", "profile_digest": "0123456789ab"}
    kind = kind_of(data, "x")
    facts = explorer(data, kind, steps_of(data, kind), {}, []).facts
    assert facts["command"] == "mopsim compare --model tiny"
    assert re.fullmatch(r"cpu-2core \(digest \w+\), other \(digest 0123456789ab\)", facts["hardware profile"])
    assert re.fullmatch(r"mopexec-flat \(digest \w+\), mopexec-fsdp2 \(digest \w+\)", facts["stack"])
    assert facts["model"].count("digest") == 1


def test_a_limit_that_was_not_asked_for_has_no_answer(made: dict[str, dict[str, Any]]) -> None:
    """`size` with days alone keeps no budget, and one with a budget alone no deadline."""
    named = {column["name"] for column in views(made["size"])[0]["columns"]}
    assert "in time" in named
    assert "within budget" not in named
    (machine,) = made["size"]["hardware"]
    assert {one["within_budget"] for one in [*machine["tried"], *made["size"]["points"]]} == {None}


def test_what_is_enough_is_told_apart_from_the_interval_of_memory(
    made: dict[str, dict[str, Any]],
) -> None:
    """The table and the tooltip have what is enough with 95 %, the terminal an interval of tensors alone:
    both say what P(fits) is judged by."""
    step = mopsim.simulate(**JOB, strategy=mopsim.mop(dtype="float32"))
    shown = Console(width=1000, record=True, file=StringIO())
    shown.print(comparison([step.result], "tiny"))
    assert f"memory: the peak of tensors.\n{P_FITS}" in shown.export_text()
    table, plot = (
        views(made["compare"])[0],
        next(one for one in views(made["compare"]) if one["title"] == "Step time against memory"),
    )
    assert f"{ENOUGH}: this much is enough, with that probability, for tensors" in table["note"]
    assert P_FITS in table["note"]
    assert ENOUGH in {column["name"] for column in table["columns"]}
    assert ENOUGH in {name for name, *_ in plot["series"][0]["points"][0]["rows"]}


@pytest.mark.parametrize("kind", ["search", "compare", "simulate", "validate"])
def test_verdict_chance_and_time_are_what_a_table_begins_with(
    made: dict[str, dict[str, Any]], kind: str
) -> None:
    """On a page of 1,300 pixels P(fits) stood beyond the edge."""
    names = [one["name"] for one in views(made[kind])[0]["columns"]]
    assert names[1:3] == ["verdict", "P(fits)"]
    assert "step" in names[3]


SWEPT = "Throughput over seq-len, tokens per step held constant: tiny on cpu-2core"


def test_a_family_without_a_strategy_has_its_row(made: dict[str, dict[str, Any]]) -> None:
    found = views({**made["compare"], "refused": {"megatron": "nothing of it is legal"}})[0]
    last = dict(zip((one["name"] for one in found["columns"]), found["rows"][-1], strict=True))
    assert last["label"] == "megatron"
    assert (last["strategy"], last["verdict"]) == ("nothing of it is legal", "no legal strategy")
    assert len(found["rows"]) == len(made["compare"]["strategies"]) + 1 == len(found["marks"])


def test_a_sweep_is_titled_by_what_it_is_of(made: dict[str, dict[str, Any]]) -> None:
    titles = [one["title"] for one in views(made["compare"])]
    assert {SWEPT, SWEPT.replace("Throughput", "Points")} <= set(titles)
    assert views(made["context"])[0]["title"].endswith("tiny on 2 ranks of cpu-2core")


def test_pages_of_several_runs_or_lengths_say_what_they_are_of(made: dict[str, dict[str, Any]]) -> None:
    def shown(kind: str) -> Any:
        return explorer(made[kind], kind_of(made[kind], "x"), [], {}, [])

    assert shown("context").title == "tiny on cpu-2core: context"
    page = shown("validate")
    assert page.title == "6 runs of 2 sources: validate"
    assert page.summary == "Mean error of step time 10.0% (5 of 6 inside their intervals)"
    assert "a probability of 80%" in page.views[0]["note"]


def test_a_page_of_context_lengths_has_the_leads_and_what_each_contender_runs_on(
    made: dict[str, dict[str, Any]],
) -> None:
    """Only context's own report said that a contender's software is an assumption."""
    found = {one["title"]: one.get("rows") for one in views(made["context"])}
    leads = found["mop against the others: tiny on 2 ranks of cpu-2core"]
    assert leads == [["32K", "fsdp2", 1.2, 0.9, 1.5, 0.8]]
    assert ["fsdp2", "fsdp2-any-context (an assumption, no one program)", "any CP"] in found["Contenders"]


def test_a_page_of_clusters_says_how_far_their_searches_are_proven(made: dict[str, dict[str, Any]]) -> None:
    data = json.loads(json.dumps(made["size"]))
    data["hardware"][0]["best"] |= {"gap": 0.47}
    found = next(one for one in views(data) if one["title"].startswith("The step on"))
    nodes = data["hardware"][0]["best"]["nodes"]
    left = "not exhausted: a plan left out is at most 47 % faster"
    assert found["note"].startswith(f"cpu-2core, {format_nodes(nodes)}: {left}. ")
    assert found["title"] == "The step on the best cluster of each machine type"


def test_intervals_become_bands_and_columns(made: dict[str, dict[str, Any]]) -> None:
    data = json.loads(json.dumps(made["compare"]))
    steps = [
        *data["strategies"].values(),
        *(one for row in data["sweep"]["results"].values() for one in row if one),
    ]
    for one in steps:
        one["step_time_interval_s"] = [0.9 * one["step_time_s"], 1.2 * one["step_time_s"]]
        one["p_fits"] = 0.97
    found = {one["title"]: one for one in views(data)}
    names = {column["name"] for column in found["The strategies"]["columns"]}
    assert {"step at least", "step at most", "P(fits)"} <= names
    point = found[SWEPT]["series"][0]["points"][0]
    assert point["yr"] == pytest.approx([point["y"] / 1.2, point["y"] / 0.9])


def test_the_front_is_what_no_other_beats() -> None:
    assert front([(1, 5), (2, 3), (3, 4), (4, 1), (1, 5)]) == [True, True, False, True, True]


def test_a_timeline_on_a_profile_whose_curves_the_step_changes(tmp_path: Path) -> None:
    job = {**JOB, "hardware": "h200-sxm-141g", "global_batch": 8}
    step = mopsim.simulate(**job, strategy=mopsim.fsdp2())
    assert mopsim.explore(dict(step), tmp_path / "page.html") == []


@pytest.mark.parametrize(
    ("name", "why"),
    [("cpu-2core", "differs from the shipped one"), ("amd-epyc-2x", "is neither shipped nor given")],
)
def test_a_timeline_of_a_profile_of_a_file_is_left_out_with_the_option_that_gives_it(
    tmp_path: Path, name: str, why: str
) -> None:
    mine = replace(load_profile("cpu-2core"), name=name, notes="mine")
    step = dict(mopsim.simulate(**{**JOB, "hardware": mine}, strategy=mopsim.mop(dtype="float32")))
    (note,) = mopsim.explore(step, tmp_path / "page.html")
    said = f"the result's profile {name} (digest {io.digest(mine)}) {why}"
    assert note == f"No timeline of mop: {said}; give its file by --hardware"
    assert mopsim.explore(step, tmp_path / "page.html", hardware=[mine]) == []


@pytest.mark.parametrize("key", ["model", "profile", "stack", "stack_digest"])
@pytest.mark.parametrize("wrong", [1, [], {}, None, "a\0b"])
def test_a_step_whose_provenance_is_none_is_shown_without_a_timeline(
    made: dict[str, dict[str, Any]], key: str, wrong: Any, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(made["search"]))
    data["top"][0]["provenance"][key] = wrong
    notes = mopsim.explore(data, tmp_path / "page.html", timelines=1)
    assert [note.partition(":")[0] for note in notes] == [
        f"No timeline of 1, {data['top'][0]['strategy']['name']}"
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is not a result of compare, search, size, validate, context, simulate"),
        ("[]", "must be a mapping of keys"),
        ("{", "is not valid JSON"),
        ('{"step_time_s": 1, "strategy": {}}', "result.strategy.fits: missing, the field is required"),
        ('{"step_time_s": "x", "strategy": 3}', "of mopsim simulate"),
        ('{"top": 3, "candidates": 1}', "of mopsim search"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "result.json"
    io.write_text(path, text)
    with pytest.raises(mopsim.MopError, match=re.escape(says)) as refused:
        mopsim.explore(path, tmp_path / "page.html")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("step_time_s", -1), ("fits", {}), ("step_time_interval_s", 1.0), ("memory_limit_bytes", "x")],
)
def test_a_wrong_entry_of_a_step_is_named(made: dict[str, dict[str, Any]], key: str, value: object) -> None:
    data = json.loads(json.dumps(made["compare"]))
    data["strategies"]["mop"][key] = value
    with pytest.raises(mopsim.MopError, match=rf"result\.mop\.{key}: "):
        steps_of(data, kind_of(data, "x"))


def test_colours_are_okabe_and_itos_and_have_a_shape_beside_them() -> None:
    text = (Path(explore.__file__).parent / "core.js").read_text(encoding="utf-8")
    found = re.search(r"const PALETTE = \[(.*?)\]", text)
    palette = re.findall(r"#[0-9A-F]{6}", found.group(1))
    assert set(palette) == {
        "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
    }  # fmt: skip
    shapes = re.search(r"const SHAPES = \[(.*?)\];", text, re.S)
    assert len(set(re.findall(r'"(M[^"]+)"', shapes.group(1)))) == 8


def test_the_command_says_what_it_wrote_as_json(made: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    result, page, said = tmp_path / "r.json", tmp_path / "page.html", tmp_path / "said.json"
    result.write_text(json.dumps(made["simulate"]))
    done = CliRunner().invoke(app, ["explore", str(result), "--out", str(page), "--json", str(said)])
    assert done.exit_code == 0, done.output
    assert json.loads(said.read_text()) == {"out": str(page), "bytes": page.stat().st_size, "notes": []}
