"""Properties of steps of many programs: bounds of time, bandwidth, and what one stage sends another gets."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mopsim.cost import seconds
from mopsim.engine import run, simulate
from mopsim.program import lower
from mopsim.program.workload import Op
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import machine, small

H100 = load_profile("h100-sxm-80g")
MODEL = small(num_hidden_layers=8)
CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def layouts(draw: st.DrawFn, parts: int) -> tuple[int, ...]:
    """Layers of each part of a pipeline: alike, or any."""
    if draw(st.booleans()):
        return ()
    layers, cuts = MODEL.num_hidden_layers, st.integers(0, MODEL.num_hidden_layers)
    ends = sorted(draw(st.lists(cuts, min_size=parts - 1, max_size=parts - 1)))
    return tuple(b - a for a, b in pairwise([0, *ends, layers]))


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    """Megatron under any split that fits the small model, any schedule, any layers of each stage, any
    recomputation, where layer inputs may be on the host beside each."""
    stages = draw(st.sampled_from([1, 2, 4]))
    schedule = draw(st.sampled_from(["1f1b", "zero_bubble", "interleaved"]))
    several = schedule == "interleaved" and stages > 1
    tensor, sequence = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    parts = stages * (2 if several else 1)
    strategy = megatron(
        8 * stages, pipeline_parallel=stages, virtual_stages=2 if several else 1, tensor_parallel=tensor,
        context_parallel=sequence, stage_layers=draw(layouts(parts)) if stages > 1 else (),
        expert_parallel=draw(st.sampled_from([1, 4])), expert_tensor_parallel=draw(st.sampled_from([1, 2])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
    )  # fmt: skip
    pipeline = msgspec.structs.replace(strategy.pipeline, schedule=schedule if stages > 1 else "1f1b")
    exchange = draw(st.sampled_from(["ring", "all_gather", "ulysses"]))
    attention = msgspec.structs.replace(strategy.attention, cp_comm_type=exchange)
    overlap = msgspec.structs.replace(strategy.overlap, pipeline=draw(st.booleans()))
    tier = draw(st.sampled_from(["device", "host"]))
    activations = msgspec.structs.replace(strategy.activations, layer_inputs=tier)
    return msgspec.structs.replace(
        strategy, stack="generic-fused", pipeline=pipeline, attention=attention, overlap=overlap,
        activations=activations,
    )  # fmt: skip


def step(strategy: Strategy, **bandwidth: float) -> tuple[float, float, float]:
    """(longest stream of any rank or critical path of one, simulated step, serial sum over all programs)."""
    training = TrainSpec(seq_len=256, global_batch=4 * strategy.data_groups)
    profile = machine(**bandwidth)
    workload = lower(MODEL, strategy, training, 8, expand=True)
    found = run(workload, MODEL, profile, strategy, training).step_time
    low = total = 0.0
    for program in workload.programs:
        ends: list[float] = []
        streams: dict[str, float] = {}
        for op in program.ops:
            spent = sum(seconds(work, profile) for work in op.work)
            ends.append(max((ends[dep] for dep in op.deps), default=0.0) + spent)
            streams[op.stream] = streams.get(op.stream, 0.0) + spent
            total += spent
        low = max(low, max(ends), *streams.values())
    return low, found, total


@CASES
@given(strategies())
def test_between_the_longest_rank_and_the_serial_sum(strategy: Strategy) -> None:
    low, found, total = step(strategy)
    assert low * (1 - 1e-9) <= found <= total * (1 + 1e-9)


@CASES
@given(strategies())
def test_more_bandwidth_is_never_slower(strategy: Strategy) -> None:
    assert step(strategy, scale_up=300, scale_out=30)[1] <= step(strategy)[1] * (1 + 1e-9)


@CASES
@given(strategies())
def test_inputs_on_the_host_save_memory_on_every_stage_and_no_time(strategy: Strategy) -> None:
    training = TrainSpec(seq_len=256, global_batch=4 * strategy.data_groups)
    stays, goes = (
        simulate(
            MODEL,
            H100,
            strategy.pipeline.pipeline_parallel,
            msgspec.structs.replace(strategy, activations=one),
            training,
        )
        for one in (
            msgspec.structs.replace(strategy.activations, layer_inputs=tier) for tier in ("device", "host")
        )
    )
    assert stays.step_time <= goes.step_time * (1 + 1e-9)
    assert all(a >= b for a, b in zip(stays.peak_by_stage, goes.peak_by_stage, strict=True))
    assert stays.host_memory == 0 < goes.host_memory


@CASES
@given(strategies())
def test_what_a_stage_sends_another_receives(strategy: Strategy) -> None:
    training = TrainSpec(seq_len=256, global_batch=4 * strategy.data_groups)
    programs = lower(MODEL, strategy, training, 8, expand=True).programs
    met: dict[str, list[tuple[int, Op]]] = {}
    for program in programs:
        for op in program.ops:
            if op.rendezvous and op.name.startswith(("send", "receive")):
                met.setdefault(op.rendezvous, []).append((program.stage, op))
    parts = strategy.pipeline.pipeline_parallel * strategy.pipeline.virtual_stages
    assert len(met) == 2 * training.num_microbatches(strategy) * (parts - 1)
    for ops in met.values():
        (_, one), (_, other) = ops
        assert {one.name.split()[0], other.name.split()[0]} == {"send", "receive"}
        assert one.work == other.work
        assert len({stage for stage, _ in ops}) == 2
    for program in programs:
        left = sum(op.times * size for op in program.ops for name, size in op.net if name == "activations")
        assert left == 0, "what is received and made is freed or sent"


def _waited(seconds: dict[str, float]) -> dict[str, float]:
    """With waits for other stages as one: what of them is the send differs from turn to turn."""
    sends = {"peers": seconds.get("peers", 0.0) + seconds.get("send_recv", 0.0)}
    return {key: value for key, value in seconds.items() if key != "send_recv"} | sends


@CASES
@given(strategies(), st.integers(0, 9), st.sampled_from([0.0, 0.3]))
def test_composed_microbatches_of_a_pipeline_equal_expanded_ones(
    strategy: Strategy, more: int, share: float
) -> None:
    """Time, memory, what the time went into and what was waited for."""
    stages = strategy.pipeline.pipeline_parallel
    batches = 2 * stages + more if strategy.pipeline.virtual_stages == 1 else (3 + more % 2) * stages
    training = TrainSpec(seq_len=8192, global_batch=batches * strategy.data_groups)
    profile = machine(share=share, products=2 * share)
    whole = run(lower(MODEL, strategy, training, 8, expand=True), MODEL, profile, strategy, training)
    brief = run(lower(MODEL, strategy, training, 8), MODEL, profile, strategy, training)
    assert brief.num_events <= whole.num_events
    assert brief.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert brief.peak_by_stage == whole.peak_by_stage
    assert brief.host_memory == whole.host_memory
    if brief.span_stage == whole.span_stage:  # stages may end together
        for found, wanted in (
            (brief.time_by_component, whole.time_by_component),
            (brief.exposed, whole.exposed),
        ):
            assert _waited(found) == pytest.approx(_waited(wanted), abs=2e-3 * whole.step_time)
        assert brief.num_ops == whole.num_ops


@pytest.mark.parametrize(
    ("layers", "batches"),
    [((0, 3, 1, 0, 0, 1, 0, 3), 16), ((0, 4, 0, 0, 0, 0, 1, 3), 16), ((0, 1, 0, 2, 0, 0, 5, 0), 20)],
)
def test_stages_without_layers_are_composed_as_they_run(layers: tuple[int, ...], batches: int) -> None:
    """A rank that computes nothing in some turns, and one that computes longest but is filled first."""
    plain = megatron(
        32, pipeline_parallel=4, virtual_stages=2, stage_layers=layers, expert_parallel=1, recompute="none"
    )
    strategy = msgspec.structs.replace(
        plain, stack="generic-fused", pipeline=msgspec.structs.replace(plain.pipeline, schedule="interleaved")
    )
    training = TrainSpec(seq_len=8192, global_batch=batches * strategy.data_groups)
    whole, brief = (
        run(lower(MODEL, strategy, training, 8, expand=expand), MODEL, machine(), strategy, training)
        for expand in (True, False)
    )
    assert brief.num_events <= whole.num_events
    assert brief.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert brief.num_ops == whole.num_ops
    parts = whole.time_by_component
    assert brief.time_by_component == pytest.approx(parts, abs=2e-3 * whole.step_time)


def test_turns_of_two_lengths_are_no_step_that_all_keep() -> None:
    """Two stages whose sends hide trade turns of 9.05 and 9.00 ms; the last one does not stand for all."""
    plain = megatron(16, pipeline_parallel=2, expert_parallel=1, recompute="none")
    overlap = msgspec.structs.replace(plain.overlap, pipeline=True)
    strategy = msgspec.structs.replace(plain, stack="generic-fused", overlap=overlap)
    training, profile = TrainSpec(seq_len=8192, global_batch=17 * strategy.data_groups), machine()
    whole = run(lower(MODEL, strategy, training, 8, expand=True), MODEL, profile, strategy, training)
    brief = run(lower(MODEL, strategy, training, 8), MODEL, profile, strategy, training)
    assert brief.num_events <= whole.num_events
    assert brief.step_time == pytest.approx(whole.step_time, rel=3e-4)
