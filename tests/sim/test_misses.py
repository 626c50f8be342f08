"""Rows beyond their tolerance: which, what their prediction is made of, and whose cause they are."""

import json
from dataclasses import replace

import pytest

from mopsim.engine.record import Span
from mopsim.report.validation import MOST, drawn_groups, spread
from mopsim.validate.components import predict_components
from mopsim.validate.run import Validation
from reports.validation import regression
from reports.validation.figures import finding, judged
from reports.validation.makeup import of_spans, of_step, words
from reports.validation.misses import UNKNOWN, Cause, load_causes, markdown, misses, row_of
from tests.sim.test_validate import row, validate_runs

LAYER = {
    "ep": 8, "expert_hidden": 4096, "hidden": 4096, "num_experts": 128, "pass": "forward", "top_k": 4,
    "precision": "bf16", "tokens_per_rank": 32768, "routing": "balanced",
}  # fmt: skip


def _part(value: float, metric: str = "latency_s", system: str = "standard EP") -> dict[str, str]:
    return {
        "component": "expert_dispatch", "system": system, "gpu": "h200-sxm-141g", "num_gpus": "8",
        "params": json.dumps(LAYER), "metric": metric, "value": str(value), "outcome": "ok",
    }  # fmt: skip


def test_only_what_is_beyond_its_tolerance_is_listed() -> None:
    near, far = predict_components([_part(0.036), _part(0.05)])
    assert [miss.measured for miss in misses(Validation([]), [near, far])] == [0.05]
    memory = predict_components([_part(21.5, "peak_memory_gib"), _part(19.0, "peak_memory_gib")])
    (miss,) = misses(Validation([]), memory)
    assert (miss.quantity, miss.measured) == ("component_memory", 19.0)


def test_a_miss_says_what_its_prediction_is_made_of() -> None:
    (miss,) = misses(Validation([]), predict_components([_part(0.1)]))
    assert sum(share for _, share in miss.makeup) == pytest.approx(1.0)
    assert miss.makeup[0][0] == "experts"
    assert sum(share for name, share in miss.makeup if name.endswith("scale_up exposed")) > 0.05
    assert miss.cause == "dispatch-kernels"


def test_makeup_of_a_step_is_its_waits_and_its_kernels() -> None:
    made = dict(of_step(10.0, {"all_to_all": 2.0, "host": 1.0}, {"matmul": 6.0, "memory_bound": 2.0}))
    assert made == pytest.approx(
        {"matmul": 0.525, "memory_bound": 0.175, "all_to_all exposed": 0.2, "host exposed": 0.1}
    )
    spans = [
        Span("compute", "a", "experts", "forward", 0.0, 1.0),
        Span("tensor scale_up", "b", "x", "forward", 0.5, 3.0),
        Span("compute", "c", "experts", "forward", 3.0, 4.0),
    ]  # fmt: skip
    assert dict(of_spans(spans)) == pytest.approx({"experts": 0.5, "tensor scale_up exposed": 0.5})
    assert words((("experts", 0.5), ("wait", 0.001))) == "experts 50%"


def test_causes_are_told_apart_by_pattern_quantity_and_sign() -> None:
    cause = Cause("slow", {"source": "a*", "tp": "[48]"}, "why", "what", ("step_time",), "-")
    row = {"source": "abc", "tp": "8"}
    assert cause.fits("step_time", -0.2, row)
    assert not cause.fits("step_time", 0.2, row)
    assert not cause.fits("peak_memory", -0.2, row)
    assert not cause.fits("step_time", -0.2, row | {"tp": "16"})
    assert not cause.fits("step_time", -0.2, {"source": "abc"})
    memory = Cause("short", {"source": "a*"}, "why", "what", ("peak_memory", "verdict"), "-")
    assert memory.fits("peak_memory", -0.2, row), "too little memory is predicted"
    assert memory.fits("verdict", 0.7, row), "and so a run fits that ran out"
    assert not memory.fits("verdict", -0.7, row)


def test_causes_have_names_of_their_own_and_say_what_is_needed() -> None:
    causes = load_causes()
    assert len({cause.id for cause in causes} | {UNKNOWN}) == len(causes) + 1
    assert all(cause.where and cause.cause.endswith(".") and cause.needed.endswith(".") for cause in causes)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("halo-fixed-time", {"source": "halo-bench", "ep": "8"}),
        ("fabric-of-a-tensor-group", {"source": "vtrain", "tp": "16", "num_gpus": "64"}),
        ("megatron-ci-determinism", {"source": "megatron-ci-golden", "notes": "x; deterministic=True; y"}),
    ],
)
def test_what_makes_a_program_slow_excuses_no_slow_prediction(name: str, row: dict[str, str]) -> None:
    (cause,) = (cause for cause in load_causes() if cause.id == name)
    assert cause.fits("step_time", -0.2, row)
    assert not cause.fits("step_time", 0.2, row)


def test_a_cause_excuses_only_rows_that_have_it() -> None:
    """Deterministic mode no run without it, an exchange between nodes no dense network."""
    causes = {cause.id: cause for cause in load_causes()}
    free = {"source": "megatron-ci-golden", "notes": "deterministic=False"}
    assert not causes["megatron-ci-determinism"].fits("step_time", -0.2, free)
    dense = {"source": "megatron-bridge-cards", "gpu": "h100-sxm-80g", "dispatcher": "none", "ep": "1"}
    assert not causes["exchange-over-nodes"].fits("step_time", -0.2, dense)


def test_what_has_no_cause_is_counted() -> None:
    found = misses(Validation([]), predict_components([_part(0.2) | {"gpu": "h100-sxm-80g"}]))
    page = markdown(found)
    assert page.startswith("# Every row beyond its tolerance\n\n1 misses, 0 of them not explained.")
    assert "latency_s routing=balanced pass=forward" in page
    assert "1 of them not explained" in markdown([replace(miss, cause=UNKNOWN) for miss in found])


def test_a_run_is_matched_by_the_words_of_the_table() -> None:
    one = validate_runs([row(tp="2", dp="4", sharding="zero1", notes="said")]).scored[0]
    found = row_of(one.case)
    for name in (
        "source",
        "model",
        "gpu",
        "tp",
        "pp",
        "ep",
        "seq_len",
        "micro_batch",
        "num_gpus",
        "recompute",
    ):
        assert found[name] == row(tp="2")[name]
    assert found["notes"] == "said"


def test_the_regression_is_fitted_on_no_run_that_the_calibration_may_not_use() -> None:
    def found(quality: str) -> tuple[int, float | None]:
        cut = {"num_layers": "2", "ep": "8", "routing": "balanced", "sharding": "zero1"}
        other = row("other", model="deepseek_v3", quality=quality, **cut)
        scored = validate_runs([row("one"), other]).held["model"]
        return scored[0].fit.runs, regression.of_scored(scored).get("one")

    runs, predicted = found("B")
    assert runs == 1
    assert predicted is not None
    assert found("C") == (0, None)


def test_a_figure_shows_the_runs_that_its_title_speaks_of() -> None:
    """A headline number (grade C) of another card stood in the legend under a title of grades A and B."""
    cut = {"num_layers": "2", "ep": "8", "routing": "balanced", "sharding": "zero1"}
    other = row("other", model="deepseek_v3", quality="C", **cut)
    validation = validate_runs([row("one"), other])
    assert len(validation.scored) == 2
    assert [one.case.quality for one in judged(validation, "step_time")] == ["A"]
    ungraded = validate_runs([other])
    assert judged(ungraded, "step_time") == ungraded.scored


def test_a_figure_is_titled_by_its_finding() -> None:
    groups = {"a": [(1.0, 1.1)], "b": [(2.0, 1.0), (1.0, 1.0)]}
    assert spread("step_time", groups) == "Step time: mean error from 10.0% (a)\nto 25.0% (b)"
    assert finding(Validation([]), "step_time", "gpu", {"a": [(1.0, 1.1)]}).endswith("a 10.0% mean error")


def test_of_many_groups_those_furthest_off_are_named() -> None:
    """157 sources made a legend twice as wide as the plot."""
    groups = {f"s{at:02}": [(1.0, 1.0 + at / 100)] * 2 for at in range(MOST + 6)}
    assert "1 other, less far off" in drawn_groups(dict([*groups.items()][: MOST + 1]))
    found = drawn_groups(groups)
    assert list(found) == [*(f"s{at:02}" for at in range(6, MOST + 6)), "6 others, less far off"]
    assert sum(map(len, found.values())) == 2 * len(groups)
    assert list(drawn_groups({"b": [], "a": []})) == ["a", "b"]
