"""Tables of measured components: cells that are refused, one line each."""

import json
from pathlib import Path

import pytest

from mopsim.validate.components import predict_components
from mopsim.validate.tables import read_components


@pytest.mark.parametrize(("name", "value"), [("ng", 0), ("k", 0), ("m", 0.5)])
def test_a_component_of_nothing_is_refused_in_a_line(name: str, value: float) -> None:
    sizes = {"m": 4096, "n": 4096, "k": 4096, "ng": 8}
    params = {"op": "grouped matmul", "precision": "bf16", **sizes, name: value}
    gemm = {
        "component": "gemm", "system": "x", "gpu": "h100-sxm-80g", "num_gpus": "1",
        "params": json.dumps(params), "metric": "flops_per_s", "value": "6e14",
    }  # fmt: skip
    (refused,) = predict_components([gemm])
    assert (refused.predicted, refused.field) == (None, name)
    assert refused.reason == f"{value} is not a positive whole number"
    nothing, well = predict_components([{**gemm, "value": "0"}, {**gemm, "params": "[1]"}])
    assert (nothing.field, nothing.reason[:21]) == ("value", "'0' must be above 0: ")
    assert (well.field, well.reason) == ("params", "'[1]' is not a JSON object")


@pytest.mark.parametrize(
    ("cells", "params", "field"),
    [
        ({"metric": "latency_ms"}, {}, "metric"),
        ({"value": "soon"}, {}, "value"),
        ({"value": "1e-320"}, {}, "value"),
        ({"outcome": "oom"}, {}, "outcome"),
        ({"outcome": "no"}, {}, "outcome"),
        ({"params": "["}, {}, "params"),
        ({}, {"op": "Grouped"}, "op"),
        ({}, {"precision": "int4"}, "precision"),
        ({}, {"m": "many"}, "m"),
        ({}, {"m": None}, "m"),
        ({"component": "expert_dispatch"}, {"precision": "fp8"}, "precision"),
        ({"component": "expert_dispatch"}, {"pass": "backward"}, "pass"),
        ({"component": "all_to_all"}, {"op": "gather"}, "op"),
        ({"component": "attention_kernel"}, {"op": "decode"}, "op"),
        ({"component": "attention_kernel"}, {"batch": "x", "op": "attention forward"}, "batch"),
        ({"component": "optimizer_step", "num_gpus": "x"}, {"model": "gpt_oss_20b"}, "num_gpus"),
    ],
)
def test_a_component_of_another_kind_is_refused_and_named(
    cells: dict[str, str], params: dict[str, object], field: str
) -> None:
    """Never taken for the usual one, and the other rows go on."""
    sizes = {"m": 512, "n": 512, "k": 512, "precision": "bf16", "ep": 8, "top_k": 2, "hidden": 512,
             "expert_hidden": 512, "num_experts": 8, "tokens_per_rank": 512, "routing": "balanced",
             "seq_len": 512, "heads": 8, "qk_head_dim": 64, "v_head_dim": 64}  # fmt: skip
    row = {"component": "gemm", "system": "x", "gpu": "h100-sxm-80g", "num_gpus": "8", "metric": "latency_s",
           "value": "1e-4", "params": json.dumps({**sizes, **params}), "outcome": "OK"}  # fmt: skip
    usual = {**row, "params": json.dumps(sizes)}
    refused, predicted = predict_components([{**row, **cells}, usual])
    assert (refused.predicted, refused.field) == (None, field), refused.reason
    assert predicted.predicted


def test_a_component_with_too_many_cells_is_refused_alone(tmp_path: Path) -> None:
    params = '"{""m"": 512, ""n"": 512, ""k"": 512, ""precision"": ""bf16""}"'
    line = f"gemm,h100-sxm-80g,{params},latency_s,1e-4"
    (tmp_path / "c.csv").write_text(f"component,gpu,params,metric,value\n{line},x\n{line}\n")
    wide, well = predict_components(read_components(tmp_path / "c.csv"))
    assert (wide.field, wide.reason) == ("row", "'line 2' has more cells than the header")
    assert well.predicted
