"""Which steps `train` prints a line of."""

from types import SimpleNamespace
from typing import Any

import pytest

from mopexec.run import metrics
from mopexec.run.metrics import EVERY, Display, StepMetrics

STEP: dict[str, Any] = {
    "since": 1, "strategy": "x", "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "step_time_s": 1.0,
    "tokens_per_s": 1.0, "tokens_per_s_per_device": 1.0, "peak_memory_bytes": 1, "host_memory_bytes": 1,
    "memory_step": 2, "memory_percent": 1.0, "predicted_step_time_s": None,
}  # fmt: skip


def printed(seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch, **said: dict[str, Any]) -> list[int]:
    """The steps of a run that have a line. said: of a step, what it has besides."""
    clock = iter(seconds * step for step in range(1, steps + 1))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = list[str]()
    display = Display(visible=True, stderr=False, steps=steps)
    monkeypatch.setattr(display, "say", lines.append)
    for step in range(1, steps + 1):
        display.step(StepMetrics(**{**STEP, "step": step, **said.get(f"step_{step}", {})}))
    return [int(line.split()[1]) for line in lines]


def test_fast_steps_have_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 60 steps had one."""
    assert printed(EVERY / 10, 25, monkeypatch) == [1, 11, 21, 25]


def test_slow_steps_have_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(2 * EVERY, 4, monkeypatch) == [1, 2, 3, 4]


def test_a_step_with_more_to_say_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"step_2": {"eval_loss": 1.0}, "step_4": {"targets": 0}, "step_6": {"loss": float("nan")}}
    assert printed(EVERY / 100, 8, monkeypatch, **said) == [1, 2, 4, 6, 8]
