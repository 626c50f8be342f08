"""The optimizer beside the next forward or under the backward: what is hidden, what is left, who plays it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.engine import SimResult, simulate
from mopsim.program import lower
from mopsim.program.workload import Op
from mopsim.search.axes import _states
from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.pieces import Pieces
from mopsim.search.problem import UNDER_BACKWARD, Problem
from mopsim.search.refined import Refined
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import State, mop
from tests.called import call
from tests.plans import changed
from tests.sim.spaces import spread

MODEL = replace(load_model("qwen3_30b_a3b"), num_hidden_layers=12)
MACHINE = load_profile("h200-sxm-141g")


def strategy(*, overlap: bool) -> Strategy:
    return mop(
        8, expert_parallel=8, vocab_parallel=8, optimizer_bucket_params=20_000_000, optimizer_overlap=overlap
    )


def run(seq_len: int, *, overlap: bool) -> SimResult:
    return simulate(MODEL, MACHINE, 1, strategy(overlap=overlap), TrainSpec(seq_len=seq_len, global_batch=8))


def test_the_update_hides_where_the_state_goes_up_in_less_than_a_forward() -> None:
    """Below 10 % of the optimizer's seconds are exposed: embedding and first bucket, norm and clip."""
    plain, beside = run(65536, overlap=False), run(65536, overlap=True)
    seconds = plain.exposed["h2d"]
    assert seconds > 0.02 * plain.step_time
    assert plain.step_time - beside.step_time > 0.9 * seconds


def test_a_short_forward_is_bound_by_the_copies_of_the_state() -> None:
    plain, beside = run(512, overlap=False), run(512, overlap=True)
    workload = lower(MODEL, strategy(overlap=True), TrainSpec(seq_len=512, global_batch=8), 8)
    state = sum(w.bytes for op in workload.programs[0].ops if op.stream == "h2d" for w in op.work)
    assert plain.step_time > beside.step_time > state / MACHINE.host.link_h2d.si


def test_each_gather_waits_for_the_update_of_what_it_gathers() -> None:
    ops = lower(MODEL, strategy(overlap=True), TrainSpec(seq_len=4096, global_batch=8), 8).programs[0].ops
    updates = [op.index for op in ops if op.stream == "update"]
    gathers = [op for op in ops if op.name.startswith("gather ") and set(op.deps) & set(updates)]
    assert {op.phase for op in gathers} == {"forward"}
    assert len(gathers) == len({op.name for op in gathers}) == 2 + MODEL.num_hidden_layers
    waited = [max(set(op.deps) & set(updates)) for op in gathers]
    assert waited == sorted(waited)


def test_others_refuse_it_by_name() -> None:
    training = TrainSpec(seq_len=4096, global_batch=8)
    changed = strategy(overlap=True)
    with pytest.raises(SpecError, match=r"strategy\.optimizer\.overlap"):
        lower(MODEL, replace(changed, stack="generic-fused"), training, 8)
    with pytest.raises(SpecError, match=r"optimizer\.overlap: .* needs all of the state streamed"):
        replace(changed, optimizer=replace(changed.optimizer, update_on="host"))


EARLY = {"overlap": "backward"}


def early(state: State, seq_len: int, microbatches: int, overlap: str = "backward") -> SimResult:
    chosen = changed(
        mop(8, expert_parallel=8, vocab_parallel=8, optimizer=state), optimizer={"overlap": overlap}
    )
    chosen = changed(chosen, optimizer={"bucket_params": 20_000_000})
    training = TrainSpec(seq_len=seq_len, global_batch=8 * microbatches, clip_norm=0.0)
    return simulate(MODEL, MACHINE, 1, chosen, training)


def test_under_the_backward_the_update_hides_and_gradients_go_as_they_come() -> None:
    """Exposed is what the last layer and the embedding have after their backward."""
    plain, beside = (early("host_streamed", 65536, 1, overlap) for overlap in ("none", "backward"))
    assert plain.step_time - beside.step_time > 0.9 * plain.exposed["h2d"]
    assert beside.peak_memory < plain.peak_memory - 0.8 * plain.memory_by_category["grads"]


def test_gradients_of_several_microbatches_are_all_there() -> None:
    plain, beside = (early("device", 16384, 3, overlap) for overlap in ("none", "backward"))
    assert beside.memory_by_category["grads"] == plain.memory_by_category["grads"]
    assert beside.step_time == pytest.approx(plain.step_time, rel=0.01)


def test_a_unit_is_updated_once_its_gradient_is_summed_and_no_earlier() -> None:
    chosen = changed(strategy(overlap=False), optimizer=EARLY)
    training = TrainSpec(seq_len=4096, global_batch=16, clip_norm=0.0)
    ops = lower(MODEL, chosen, training, 8).programs[0].ops
    updates = [op for op in ops if op.stream == "update"]
    assert {op.microbatch for op in updates} == {1}
    freed = [op for op in ops if op.name == "gradients freed"]
    assert len(freed) == MODEL.num_hidden_layers + 1, "all groups but the embedding's, which ends the step"
    for op in updates:
        norm = next(ops[dep] for dep in op.deps if ops[dep].name == "norm" or ops[dep].stream == "update")
        assert norm.index < op.index
    ups, downs = (
        [op for op in ops if op.name.startswith("state") and op.stream == way] for way in ("h2d", "d2h")
    )
    assert moved(ups) == moved(downs) > 0, (
        "state goes up and down once, the last buckets' beside the next step"
    )


def moved(ops: list[Op]) -> float:
    return sum(work.bytes for op in ops for work in op.work)


def test_clipping_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = mop(2, optimizer_overlap="backward", dtype="float32")
    line = "strategy.optimizer.overlap: 'backward' needs training.clip_norm 0, not 1: the norm to clip by is"
    with pytest.raises(SpecError, match=line):
        TrainSpec(seq_len=64, global_batch=2).check_strategy(chosen)
    path = tmp_path / "early.yaml"
    io.write_yaml(path, chosen)
    given = ["simulate", "--model", "tiny", "--hardware", "cpu-2core", "--strategy", str(path)]
    given += ["--seq-len", "64", "--global-batch", "2"]
    assert call(monkeypatch, *given) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert call(monkeypatch, *given, "--clip-norm", "0") == 0


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("optimizer", {"update_on": "host"}), ("optimizer", {"host_fraction": 0.5}),
        ("dense", {"grad_tier": "host"}), ("experts", {"grad_tier": "host"}),
    ],
)  # fmt: skip
def test_what_it_needs_is_said(part: str, change: dict[str, Any]) -> None:
    chosen = mop(2, optimizer_overlap="backward")
    needs = r"optimizer\.overlap: 'backward' needs gradients and optimizer\.update_on"
    with pytest.raises(MopError, match=needs):
        changed(chosen, **{part: change})


def test_search_has_it_where_nothing_is_clipped() -> None:
    """Its bounds are at most what is simulated."""
    asked = Problem(MODEL, MACHINE, 1, TrainSpec(seq_len=8192, global_batch=16))
    free = Problem(MODEL, MACHINE, 1, TrainSpec(seq_len=8192, global_batch=16, clip_norm=0.0))
    assert {way for _, _, way in _states(asked)} == {0, 1}
    assert {(state, way) for state, _, way in _states(free)} - {(s, w) for s, _, w in _states(asked)} == {
        (0, UNDER_BACKWARD), (1, UNDER_BACKWARD),
    }  # fmt: skip
    space = spread(free, "mop")
    facts, pieces = SpaceFacts.of(space), Pieces(space)
    rows = np.flatnonzero(space.columns["beside"] == UNDER_BACKWARD)
    for index in rows[:: len(rows) // 12]:
        at = np.array([index])
        row, (closer, _) = space.take(at), Refined.of(pieces, facts, [at])
        if closer is None:
            continue
        before = Bounder(row, facts).all()
        found = simulate(MODEL, MACHINE, 1, row.build(0), free.training, space.stack)
        assert found.strategy.optimizer.overlap == "backward"
        assert max(before.time[0], closer.time()[0]) <= found.step_time * (1 + 1e-9)
        assert before.device[0] <= closer.device_memory()[0][0] <= found.peak_memory + 1
        assert before.host[0] <= found.host_memory + 1
