"""The streamed optimizer beside the next forward: what is hidden, what is left, and who plays it."""

import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.program import lower
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop

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
