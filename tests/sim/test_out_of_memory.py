"""Where plans run out of memory, or may: a sweep's figure and words, and what is said of one plan."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mopsim.common.units import format_probability
from mopsim.engine import SimResult, simulate
from mopsim.report.style import legend_below
from mopsim.report.sweep import over
from mopsim.report.tables import comparison
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop
from tests.sim.test_report import drawn, swept


@pytest.fixture(scope="module")
def one() -> SimResult:
    training = TrainSpec(seq_len=256, global_batch=4)
    plan = mop(2, expert_parallel=2, dtype="float32")
    return simulate(load_model("tiny"), load_profile("cpu-2core"), 1, plan, training)


def test_a_strategy_that_fits_everywhere_leaves_the_layout(
    one: SimResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside one that ran out it was drawn with a mark of no points, which has an infinite extent: the legend
    was gone, and the title was cut."""
    sweep = swept("nodes", {1: {"a": one, "b": one}, 2: {"a": one, "b": replace(one, fits=False)}})
    axis = drawn(monkeypatch, tmp_path, sweep)
    legend_below(axis, 5)
    whole = axis.get_figure(root=True)
    whole.draw_without_rendering()
    legend = axis.get_legend()
    box = legend.get_window_extent()
    assert 0 <= box.y0 < box.y1 <= whole.bbox.height
    assert axis.title.get_window_extent().y1 <= whole.bbox.height


def test_a_point_that_may_not_fit_is_hollow(
    one: SimResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ "a is the only one that fits at 4", with P(fits) 0.75."""
    tight = replace(one, memory_limit=one.peak_memory + 1)
    odds = format_probability(tight.p_fits)
    assert one.p_fits >= 0.9 > tight.p_fits
    out = replace(one, fits=False)
    sweep = swept("nodes", {1: {"a": one, "b": one}, 2: {"a": one, "b": out}, 4: {"a": tight, "b": out}})
    aside = f"(may not fit: P {odds})"
    assert over(sweep) == f"Over nodes: a and b tie at 1; a is the only one that fits at 2, 4 {aside}"
    axis = drawn(monkeypatch, tmp_path, sweep)
    assert axis.get_title("left") == f"a reaches 4 nodes {aside}"
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    rims, entry = (np.asarray(line.get_ydata(), float) for line in hollow)
    assert entry.size == 0
    assert np.isnan(rims).tolist() == [True, True, False]
    assert rims[2] == tight.tokens_per_second_per_device
    assert "may not fit: P(fits) below 0.9" in axis.get_legend_handles_labels()[1]
    both = {"a": tight, "b": replace(one, step_time=2 * one.step_time)}
    assert over(swept("nodes", {1: both})).endswith(f"; a may not fit: P {odds})")
    nothing = over(swept("nodes", {1: {"a": one}, 2: {"a": replace(one, fits=False)}}))
    assert nothing.endswith("; no strategy fits at 2"), "within a sentence"
    assert over(swept("nodes", {1: {"a": tight}})) == f"Over nodes: a fits at 1 (may not fit: P {odds})"


def test_what_does_not_fit_is_said_in_words(one: SimResult) -> None:
    """ "grads is 187.55 GiB over"."""
    out = replace(one, fits=False, over="grads", memory_limit=one.peak_memory - 2**30)
    assert out.excess == "gradients are 1.00 GiB over"
    assert replace(out, over="framework").excess == "framework is 1.00 GiB over"


def test_a_cpu_sets_memory_aside_for_its_own_process(one: SimResult) -> None:
    """It was said to be for driver and framework."""
    shown = StringIO()
    Console(file=shown, width=300).print(comparison([one], "tiny"))
    assert "512.00 MiB are for the process and its host tier)" in shown.getvalue()
