"""Lines of a command that depend on what a result says: which target a plan is for, which interval missed."""

from types import SimpleNamespace
from typing import Any

import pytest

from mopsim.commands.console import human, say_plan
from mopsim.report.explore.views import _recommended
from mopsim.report.validation_tables import _each


@pytest.mark.parametrize(
    ("stack", "target"),
    [
        ("torchtitan-compile-2026", "torchtitan-main"),
        ("torchtitan", "torchtitan"),
        ("generic-eager", "torchtitan"),
    ],
)
def test_a_plan_is_exported_to_the_version_of_its_stack(
    stack: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = SimpleNamespace(
        stack=SimpleNamespace(name=stack), strategy=SimpleNamespace(name="fsdp2"), p_fits=0.8
    )
    gaps: dict[str, list[Any]] = {"torchtitan": [], "torchtitan-main": [], "deepspeed": [None]}
    step: Any = SimpleNamespace(gaps=gaps, fits=True, runnable=False, result=result)
    say_plan(human(None), "plan.yaml", step, "plan 1")
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Written: plan.yaml: plan 1, fsdp2, P(fits) 0.80 (")
    assert f"--to {target};" in said


def test_a_measured_value_outside_its_interval_is_said() -> None:
    def run(measured: float) -> Any:
        case = SimpleNamespace(
            id="one", measured=SimpleNamespace(step_time=measured, peak_memory=None, fits=None)
        )
        return SimpleNamespace(case=case, predicted=lambda _: 4.0, interval=lambda *_: (3.23, 5.0))

    validation: Any = SimpleNamespace(scored=[run(3.22), run(3.3)])
    *each, together = [row[4] for row in _each(validation, 0.9).rows]
    assert each == ["3.23 s to 5 s, outside", "3.23 s to 5 s"]
    assert together == "1 of 2 inside"


def test_a_page_of_clusters_leads_with_the_terminals_odds() -> None:
    best = {"nodes": 2, "result": {"p_fits": 0.999}}
    result = {
        "recommended": {"hardware": "a", "nodes": 2, "p_deadline": 0.97},
        "hardware": [{"name": "b", "best": None}, {"name": "a", "best": best}],
    }
    assert _recommended(result) == "Recommended: 2 nodes of a (probability 0.97 in time, >0.99 that it fits)"
    assert _recommended({**result, "hardware": [], "recommended": {"hardware": "a", "nodes": 2}}) == (
        "Recommended: 2 nodes of a"
    )
