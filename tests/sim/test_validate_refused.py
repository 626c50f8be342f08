"""Tables of published runs: cells, columns and rows that are refused, one line each."""

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from mopsim.cli import app
from mopsim.common.command_line import run_app
from mopsim.common.errors import MistakesError, MopError, SpecError
from mopsim.report.validation_tables import tables
from mopsim.validate.case import Measured, least_time, read_cases, write_cases
from mopsim.validate.components import predict_components
from mopsim.validate.output import to_json
from mopsim.validate.rows import read_case
from mopsim.validate.run import Validation, cases_of, validate
from mopsim.validate.tables import UnsupportedError, count, number, read_runs
from tests.sim.test_validate import MODELS, row, validate_runs

EXPERTS = {"model": "qwen3_30b_a3b", "num_layers": "48", "ep": "8", "routing": "natural"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("zzz", ""), ("qwen3_30b", "; near: qwen3_30b_a3b, "), ("", "not stated by the source")],
)
def test_an_unknown_network_is_told_once(name: str, said: str) -> None:
    _, refused = cases_of([row(model=name)], MODELS)
    (told,) = [one for one in refused[0].told if one.startswith("model: ")]
    whole = f"model: {name!r} is neither in the models CSV nor a preset{said}" if name else f"model: {said}"
    assert told.startswith(whole)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recompute": "unknown"}, "recompute"),
        ({"step_time_s": "0.01"}, "step_time_s"),
        ({"micro_batch": ""}, "micro_batch"),
        ({"global_batch": ""}, "global_batch"),
        ({"pp": "2", "dp": "4", "vp": "", "sharding": "zero1"}, "vp"),
        ({"gpu": "abacus"}, "gpu"),
        ({"model": "nobody"}, "model"),
        ({"stack": "nobody"}, "stack"),
        ({"stack.kernels.norm": "melted"}, "stack"),
        ({"strategy.experts.expert_parallel": "3"}, "experts.expert_parallel"),
        ({"precision": "int3"}, "precision"),
        ({"sharding": "zero9"}, "sharding"),
        ({"recompute": "the_good_parts"}, "recompute"),
        ({"model": "qwen3_30b_a3b", "num_layers": "48", "routing": "unknown"}, "routing"),
        ({"global_batch": "17"}, "training.global_batch"),
        ({"ep": "dp", "model": "qwen3_30b_a3b", "num_layers": "48", "routing": "balanced"}, "ep"),
        ({"step_time_s": "soon"}, "step_time_s"),
        ({"strategy.overlap.experts": "[1"}, "strategy.overlap.experts"),
        ({"fits": "no"}, "fits"),
        ({"fits": "oom"}, "fits"),
        ({"routing": "even"}, "routing"),
        *(
            (EXPERTS | {"loads": loads}, "loads")
            for loads in ("n/a", "1,1", "0 " * 128, "1 1", "nan " * 128, "-1 3 " * 64)
        ),
        (EXPERTS | {"routing": "balanced", "loads": "1 " * 128}, "loads"),
        *(
            (EXPERTS | {"routing": how, "load_balancing_loss": loss, "sharding": "zero1"}
             | {"stack": "megatron-core"}, "load_balancing_loss")
            for how, loss in (("natural", "0.9"), ("natural", "15"), ("natural", "16"), ("balanced", "1.02"))
        ),
        *(
            (EXPERTS | {"load_balancing_loss": "1.02"} | more, "load_balancing_loss")
            for more in ({"loads": "1 " * 128}, {"filler_tokens": "9"},
                         {"model": "deepseek_v3", "num_layers": "61"})
        ),
        ({"loss": "sparse"}, "loss"),
        ({"dispatcher": "flex"}, "dispatcher"),
        ({"overlap": "dp+xx"}, "overlap"),
        ({"overlap": "none+dp"}, "overlap"),
        ({"sequence_parallel": "False"}, "sequence_parallel"),
        ({"activation_offload": "1.5", "recompute": "none"}, "activation_offload"),
        ({"quality": "D"}, "quality"),
        ({"dp": "é"}, "dp"),
        ({"dp": "-1"}, "dp"),
        ({"dp": "4"}, "dp"),
        ({"tp": "8", "dp": "8", "sharding": "zero1"}, "dp"),
        ({"dp": "8.5"}, "dp"),
        ({"gpus_per_node": "é"}, "gpus_per_node"),
        ({"gpus_per_node": "1e308"}, "gpus_per_node"),
        ({"gpus_per_node": "16"}, "gpus_per_node"),
        ({"nic_gbit_per_s": "0"}, "nic_gbit_per_s"),
        ({"nic_gbit_per_s": "1e9"}, "nic_gbit_per_s"),
        ({"scale_up_gb_per_s": "fast"}, "scale_up_gb_per_s"),
        ({"ep": "é"}, "ep"),
        ({"etp": "2"}, "etp"),
        ({"peak_memory_gib": "1e9"}, "peak_memory_gib"),
        ({"peak_memory_gib": "1e-9"}, "peak_memory_gib"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_names_the_field(changes: dict[str, str], field: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_case({**row(), **changes}, MODELS)
    assert caught.value.field == field


def test_nodes_of_fewer_devices_are_simulated_as_such() -> None:
    """Four of the eight devices of a node: twice the nodes, and tensor-parallel ranks on two of them."""
    split = {"tp": "8", "dp": "1", "sharding": "zero1"}
    whole, half = (read_case(row(**split, gpus_per_node=one), MODELS) for one in ("8", "4"))
    assert (whole.num_nodes, half.num_nodes, half.profile().scale_up_size) == (1, 2, 4)
    slow, fast = (validate([one], 1).scored[0].simulated.step_time for one in (half, whole))
    assert slow > 1.1 * fast
    assert read_case(row(gpus_per_node="unknown", dp=""), MODELS).hardware_changes == {}
    domain = {"gpu": "gb200-186g", "gpus_per_node": "72"}
    assert read_case(row(**domain), MODELS).num_nodes == 2
    one_node = read_case(row(**domain | {"gpus_per_node": "4"}), MODELS)
    assert (one_node.num_nodes, one_node.profile().scale_up_size) == (2, 4)
    assert "a scale-up domain of 4 devices (gpus_per_node), not the profile's" in one_node.assumptions


def test_networks_of_other_speeds_are_simulated_as_such() -> None:
    """Eight tensor-parallel ranks, on one node and on two."""
    split = {"tp": "8", "dp": "1", "sharding": "zero1"}
    near, far = ({**split, "gpus_per_node": one} for one in ("8", "4"))
    for fixed, column in ((far, "nic_gbit_per_s"), (near, "scale_up_gb_per_s")):
        cases = [read_case(row(**fixed, **{column: one}), MODELS) for one in ("unknown", "100", "200")]
        usual, slow, fast = (validate([one], 1).scored[0].simulated.step_time for one in cases)
        assert slow > 1.05 * fast > fast > usual
        assert len(cases[1].hardware_changes) == len(cases[0].hardware_changes) + 1


def test_what_follows_a_figure_of_a_case_follows_it() -> None:
    power = {"value": 500.0, "unit": "W", "tag": "datasheet", "source": "a sheet"}
    usual = read_case(row(), MODELS)
    limited = msgspec.structs.replace(usual, hardware_changes={"power": power})
    more, less = (one.profile().node_power for one in (usual, limited))
    assert more.si - less.si == pytest.approx(8 * (700 - 500))


def test_a_name_is_read_however_it_is_written() -> None:
    """Case, - and _ tell no two values of a column apart."""
    written = {"dispatcher": "Deep-EP", "overlap": "DP + ep", "loss": "vocab-parallel", "routing": "Balanced",
               "precision": "BF16", "sharding": "ZeRO-1", "fits": "Yes", "quality": "b"}  # fmt: skip
    plain = {"dispatcher": "deepep", "overlap": "dp+ep", "loss": "vocab_parallel", "routing": "balanced",
             "precision": "bf16", "sharding": "zero1", "fits": "yes", "quality": "B"}  # fmt: skip
    job = {"model": "qwen3_30b_a3b", "num_layers": "48", "ep": "8", "tp": "2", "dp": "4"}
    assert read_case(row(**job, **written), MODELS) == read_case(row(**job, **plain), MODELS)


@pytest.mark.parametrize(
    ("column", "near"),
    [
        ("optimiser_offload", "optimizer_offload"),
        ("step_time_ms", "step_time_s"),
        ("Fits", "fits"),
        ("tpp", "tp"),
        ("recomputation", "recompute"),
    ],
)
def test_a_misspelt_column_is_refused(column: str, near: str, tmp_path: Path) -> None:
    path, cells = tmp_path / "runs.csv", row("a")
    value = cells.pop(near)
    path.write_text(f"{','.join(cells)},{column}\n{','.join(cells.values())},{value}\n")
    with pytest.raises(MopError, match=f"column {column!r} is unknown, near {near}, which is missing"):
        read_runs(path)


def test_a_column_of_ones_own_is_told_and_not_read(tmp_path: Path) -> None:
    path, out = tmp_path / "runs.csv", tmp_path / "json"
    own = {"url": "a", "system": "b", "step_time_s_std": "c", "tokens_per_s": "d", "cuda_graphs": "e",
           "source_url": "f", "date": "g"}  # fmt: skip
    cells = row("a") | own
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    result = CliRunner().invoke(app, f"validate --runs {path} --json {out} --jobs 1".split())
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"not read: {', '.join(own)}" in said


def test_a_table_of_which_nothing_is_predicted_is_no_success(tmp_path: Path) -> None:
    path, out = tmp_path / "runs.csv", tmp_path / "json"
    cells = row("a", sharding="zero9")
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    command = f"validate --runs {path} --json {out} --jobs 1".split()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert "nothing is predicted: refused the only row: sharding: 'zero9' is not one of" in result.output
    assert json.loads(out.read_text())["runs"][0]["field"] == "sharding"
    path.write_text(path.read_text() + ",".join(row("b").values()) + "\n")
    assert CliRunner().invoke(app, command).exit_code == 0


def test_all_that_is_wrong_of_a_row_is_named(tmp_path: Path) -> None:
    """Cells that are missing, none of their column's words or no number, a line each."""
    path, out = tmp_path / "runs.csv", tmp_path / "json"
    cells = row("a", sharding="zero9", tp="", seq_len="4k", step_time_s="soon", overlap="xx")
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    command = f"validate --runs {path} --json {out} --jobs 1".split()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    lines = result.stderr.splitlines()
    assert "seq_len" not in result.stdout  # a table would say it twice
    assert lines[0].startswith("mopsim: nothing is predicted: refused the only row: seq_len: '4k' is not a")
    assert [line.split(": ")[1] for line in lines[1:]] == ["sharding", "overlap", "step_time_s", "tp"]
    (run,) = json.loads(out.read_text())["runs"]
    assert run["field"] == "seq_len"
    assert "; tp: not stated by the source" in run["reason"]
    moe = {"model": "qwen3_30b_a3b", "num_layers": "48", "ep": "", "etp": "", "routing": "unknown", "vp": ""}
    with pytest.raises(UnsupportedError) as caught:
        read_case(row("a", **{**moe, "pp": "2", "dp": "4"}), MODELS)
    assert [one.field for one in (caught.value, *caught.value.more)] == ["vp", "ep", "etp", "routing"]
    path.write_text(
        path.read_text() + "".join(f"{','.join({**cells, 'run_id': one}.values())}\n" for one in "bc")
    )
    lines = CliRunner().invoke(app, command).stderr.splitlines()
    assert lines[0].startswith("mopsim: nothing is predicted: refused all 3 rows, the first: seq_len: ")
    assert lines[5].startswith("mopsim: b: seq_len: ")
    assert lines[10:] == ["mopsim: and 5 more"]


def test_all_that_is_wrong_of_a_table_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: columns that are missing, repeat or are misspelt, then names of rows."""
    path = tmp_path / "runs.csv"
    path.write_text("run_id,source,source,optimiser_offload\na,b,b,0\n")
    with pytest.raises(SystemExit) as ended:
        run_app(app, "mopsim", ["validate", "--runs", str(path)])
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert all(line.startswith(f"mopsim: runs: {path}: ") for line in lines)
    assert "column 'optimiser_offload' is unknown, near optimizer_offload" in lines[0]
    assert "has no column 'model', 'gpu'" in lines[1]
    assert lines[-1].endswith("column 'source' appears twice")
    names = ("", "a", "a", "", *(f"{digit}" * 201 for digit in range(10)))
    rows = [{**row("x"), "run_id": one} for one in names]
    path.write_text("\n".join([",".join(rows[0]), *(",".join(one.values()) for one in rows)]))
    with pytest.raises(MistakesError) as refused:
        read_runs(path)
    assert len(refused.value.lines) == 12
    assert str(refused.value).endswith("; and 2 more")


def test_malformed_tables_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run_id,source\na,b\n")
    with pytest.raises(MopError, match=r"has no column .*'model'"):
        read_runs(path)


def test_a_row_with_too_many_cells_is_refused_alone(tmp_path: Path) -> None:
    path, cells = tmp_path / "runs.csv", row("a")
    wide = [*row("b").values(), "more"]
    path.write_text("\n".join(",".join(line) for line in (cells, cells.values(), wide)))
    known, refused = cases_of(read_runs(path), MODELS)
    assert [case.id for case in known] == ["a"]
    assert [one.complaints for one in refused] == [[("row", "'line 3' has more cells than the header")]]


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e30", "abc", "1_0"])
def test_a_cell_that_is_no_measure_is_one_line_that_names_it(text: str) -> None:
    for read in (number, count):
        with pytest.raises(SpecError, match="step_time_s: "):
            read({"run_id": "r1", "step_time_s": text}, "step_time_s")


def test_a_time_that_beats_the_hardware_is_refused_in_a_line(tmp_path: Path) -> None:
    case = read_case(row(), MODELS)
    least = least_time(case)
    flops = 3 * 2 * 8.03e9 * 16 * 4096
    assert least == pytest.approx(flops / (8 * 989.4e12), rel=0.15)
    fast = msgspec.structs.replace(case, measured=Measured(step_time=0.99 * least))
    write_cases(tmp_path / "cases.jsonl", [fast])
    with pytest.raises(
        MopError, match=r"case 1: measured\.step_time: .* seconds beat the limit: .* s is what"
    ):
        read_cases(tmp_path / "cases.jsonl")
    write_cases(tmp_path / "cases.jsonl", [case])
    assert read_cases(tmp_path / "cases.jsonl") == [case]


def test_a_peak_that_no_device_has_is_refused_in_a_line(tmp_path: Path) -> None:
    case = read_case(row(), MODELS)
    more = r"bytes are more than the 8.552e\+10 that a h100-sxm-80g has"
    less = r"bytes are less than the 3.355e\+07 that the hidden states of a microbatch take"
    for peak, rule in ((1e30, more), (81 * 2**30, more), (1e-300, less), (3e7, less)):
        large = msgspec.structs.replace(case, measured=Measured(peak_memory=peak))
        write_cases(tmp_path / "cases.jsonl", [large])
        rule = rf"case 1: measured\.peak_memory: .* {rule}"
        with pytest.raises(MopError, match=rule):
            read_cases(tmp_path / "cases.jsonl")


@pytest.mark.parametrize("field", ["step_time_s", "peak_memory_gib"])
def test_a_measured_nothing_is_refused_in_a_line(field: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{field}: '0' must be above 0: leave it empty"):
        read_case(row("a", **{field: "0"}), MODELS)
    for time in (0.0, 1e-300, 1e9):
        with pytest.raises(MopError, match=r"^step_time: .* must be"):
            Measured(step_time=time)


def test_a_refusal_names_its_field_once() -> None:
    strange = {"ep": "3", "model": "qwen3_30b_a3b", "num_layers": "48", "routing": "balanced"}
    rows = [row("a", recompute="unknown"), row("b", sharding="zero1", **strange)]
    found = to_json(validate_runs(rows), [])
    assert [one["status"] for one in found["runs"]] == ["unsupported"] * 2
    for one in found["runs"]:
        assert one["reason"].startswith(f"{one['field']}: ")
        assert one["reason"].count(f"{one['field']}:") == 1


def test_a_row_says_all_that_is_wrong_of_it_names_and_sizes() -> None:
    wrong = {
        "tp": "x", "gpu": "abacus", "stack": "nobody", "model": "nobody", "strategy.dense.fsd": "1",
        "strategy.micro_batch": "[1", "sharding": "zero9",
    }  # fmt: skip
    with pytest.raises(UnsupportedError) as caught:
        read_case(row(**wrong), MODELS)
    assert sorted(one.field for one in caught.value.each) == sorted(wrong)
    with pytest.raises(UnsupportedError) as caught:
        read_case(
            row(**{"stack.kernels.norm": "melted", "stack": "torchtitan", "gpus_per_node": "16"}), MODELS
        )
    assert [one.field for one in caught.value.each] == ["gpus_per_node", "stack"]


def test_rows_of_models_and_components_say_all_that_is_wrong() -> None:
    name = "mine"
    sizes = {"model": name, "hidden": "abc", "num_layers": "x", "vocab_size": "", "attention": "zzz"}
    with pytest.raises(UnsupportedError) as caught:
        read_case(row(model=name, gpu="abacus"), {name: sizes})
    text = " ".join(str(one) for one in caught.value.each)
    assert all(f"{name}.{one}: " in text for one in ("hidden", "num_layers", "vocab_size", "attention"))
    assert "'abacus'" in text
    part = {"component": "gemm", "gpu": "abacus", "params": "{", "metric": "speed", "value": "x"}
    (found,) = predict_components([part])
    assert {found.field, *(field for field, _ in found.more)} == {"params", "value", "metric", "gpu"}


def test_all_tables_that_are_wrong_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("runs", "models", "components")
    for one in names:
        (tmp_path / one).write_text(f"{one}\n1\n")
    given = [text for one in names for text in (f"--{one}", str(tmp_path / one))]
    with pytest.raises(SystemExit):
        run_app(app, "mopsim", ["validate", *given])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [*names]


def test_each_misspelt_column_is_told_once_and_cut_lists_end_at_a_name(tmp_path: Path) -> None:
    path, cells = tmp_path / "runs.csv", row("a")
    cells = {"seqlen" if name == "seq_len" else name: cell for name, cell in cells.items() if name != "gpu"}
    cells |= {"strategy.": "1"}
    path.write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    with pytest.raises(MistakesError) as caught:
        read_runs(path)
    near, bare, missing = caught.value.lines
    assert near.endswith("column 'seqlen' is unknown, near seq_len, which is missing")
    assert bare.endswith("column 'strategy.' names no field")
    assert "has no column 'gpu'; columns found: " in missing
    assert missing.endswith(", ...")
    assert missing.removesuffix(", ...").rpartition(", ")[2] in cells


def test_rows_without_a_name_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    lines = [",".join(row(name).values()) for name in ("a", "", "")]
    path.write_text("\n".join([",".join(row("a")), *lines]))
    with pytest.raises(MopError, match=r"line 3: a row has no run_id \(and 1 more\)$"):
        read_runs(path)


def test_the_table_of_refusals_is_bounded_and_its_reasons_are_whole() -> None:
    _, refused = cases_of([row(str(i), gpu=f"{i}{'x' * 100}") for i in range(12)], MODELS)
    (grid,) = (one for one in tables(Validation([], refused), []) if "unsupported" in one.title)
    assert grid.title == "12 rows unsupported"
    assert len(grid.rows) == 11
    assert grid.rows[-1][1] == "and 2 more"
    assert "x" * 100 in grid.rows[0][1]
    assert tables(Validation([], refused[:1]), [])[0].title == "1 row unsupported"
