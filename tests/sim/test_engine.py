"""Streams, contention, ledger, deadlock, and properties of whole simulations."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mopsim.cost import seconds
from mopsim.engine import run, simulate
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record
from mopsim.program import lower
from mopsim.program.builder import Builder
from mopsim.program.workload import CommGroup, Op, Program, Work, Workload
from mopsim.spec.hardware import COMPUTE_KINDS, WORK_KINDS, Correction, HardwareProfile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload
from tests.called import SIMULATE_KEYS
from tests.sim.toys import machine, play, quantity, small

MODEL = small()
GROUPS = {"pair": CommGroup(2, 2)}


def _play(builder: Builder, share: float, durations: list[float]) -> tuple[float, Record]:
    program, record = Program(tuple(builder.ops)), Record(True)
    end = play([program], [durations], [Ledger((), False)], [record], share)
    return end, record


def _overlap() -> Builder:
    """A collective of 2 s beside compute of 3 s, then compute of 1 s that waits for both."""
    builder = Builder(GROUPS)
    talk = builder.add(
        "talk", "tensor scale_up", "other", "forward", [Work("all_gather", bytes=1, group=GROUPS["pair"])]
    )
    builder.add("long", "compute", "other", "forward", [Work("memory_bound", bytes=1)])
    builder.add("after", "compute", "other", "forward", [Work("memory_bound", bytes=1)], deps=[talk])
    return builder


@pytest.mark.parametrize(("share", "end"), [(0.0, 4.0), (0.5, 5.0), (1.0, 6.0)])
def test_a_collective_slows_compute_beside_it(share: float, end: float) -> None:
    """Compute loses `share` of its rate for the 2 s of the collective; at 1 nothing overlaps."""
    assert _play(_overlap(), share, [2.0, 3.0, 1.0])[0] == pytest.approx(end)


def test_exposed_time_is_waiting_and_what_was_taken() -> None:
    _, record = _play(_overlap(), 0.0, [5.0, 3.0, 1.0])
    assert record.tallies[0].exposed["all_gather"] == pytest.approx(2.0)
    _, record = _play(_overlap(), 0.5, [2.0, 3.0, 1.0])
    assert record.tallies[0].exposed["all_gather"] == pytest.approx(1.0)
    # 3 s of compute last 6 beside a collective of 10, of which it takes 3; then 4 s of waiting
    _, record = _play(_overlap(), 0.5, [10.0, 3.0, 1.0])
    assert record.tallies[0].exposed["all_gather"] == pytest.approx(7.0)


def test_ledger_holds_the_height_of_an_op() -> None:
    builder = Builder({})
    builder.make("a", 10)
    builder.spike(100)
    builder.make("b", 5, "logits")
    builder.add("one", "compute", "router", "forward")
    builder.drop("a", "b")
    builder.flush("router", "forward")
    program = Program(tuple(builder.ops), resident=(("params", 7),))
    ledger = Ledger(program.resident, True)
    play([program], [[1.0, 0.0]], [ledger], [Record(False)], 0.0)
    assert (ledger.peak, ledger.peak_time) == (117, 0.0)
    assert ledger.now == ledger.resident


def test_deadlock_names_the_ops() -> None:
    def op(index: int, stream: str, deps: tuple[int, ...]) -> Op:
        return Op(index, f"op{index}", stream, "other", "forward", -1, (), deps)

    program = Program((op(0, "compute", (1,)), op(1, "h2d", (0,))))
    with pytest.raises(AssertionError, match=r"deadlock: 2 ops left, first 0:op0, 0:op1"):
        play([program], [[1.0, 1.0]], [Ledger((), False)], [Record(False)], 0.0)


def test_rendezvous_starts_both_sides_together() -> None:
    def program(stage: int, before: bool) -> Program:
        builder = Builder({})
        if before:
            builder.add("work", "compute", "other", "forward", [Work("memory_bound", bytes=1)])
        builder.add(
            "hop",
            "tensor scale_up",
            "other",
            "forward",
            [Work("send_recv", bytes=1)],
            deps=[0] if before else [],
            rendezvous="x",
        )
        return Program(tuple(builder.ops), stage)

    records = [Record(True), Record(True)]
    ledgers = [Ledger((), False), Ledger((), False)]
    end = play([program(0, True), program(1, False)], [[3.0, 1.0], [1.0]], ledgers, records, 0.0)
    assert end == 4.0
    assert records[1].spans is not None
    assert records[1].spans[0].start == 3.0


STRATEGIES = st.one_of(
    st.builds(
        mop,
        st.just(8),
        context_parallel=st.sampled_from([1, 2, 8]),
        expert_parallel=st.sampled_from([1, 2, 8]),
        vocab_parallel=st.sampled_from([1, 4]),
        expert_chunk_tokens=st.sampled_from([0, 64, 500]),
        fsdp=st.sampled_from([1, 4, 8]),
        optimizer=st.sampled_from(["device", "host", "host_streamed"]),
        offload_inputs=st.sampled_from([False, True]),
        prefetch=st.integers(0, 2),
        ffn_chunk_tokens=st.sampled_from([0, 100]),
        optimizer_bucket_params=st.sampled_from([1000, 10**8]),
        dtype=st.sampled_from(["bfloat16", "float32"]),
    ),
    st.builds(
        fsdp2,
        st.just(8),
        context_parallel=st.sampled_from([1, 2]),
        expert_parallel=st.sampled_from([1, 8]),
        recompute=st.sampled_from(["none", "full"]),
        loss=st.sampled_from(["full", "chunked"]),
        offload=st.booleans(),
        prefetch=st.integers(0, 2),
        dtype=st.sampled_from(["bfloat16", "float32"]),
    ),
    st.builds(
        zero_offload,
        st.just(8),
        expert_parallel=st.sampled_from([1, 8]),
        loss=st.sampled_from(["full", "chunked"]),
    ),
)
ROUTINGS = st.sampled_from(["balanced", "90/2", "50/4"])
CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _training(strategy: Strategy, batches: int, routing: str) -> TrainSpec:
    return TrainSpec(seq_len=512, global_batch=batches * strategy.data_groups, routing=routing)


def _bounds(workload: Workload, profile: HardwareProfile) -> tuple[float, float]:
    """(critical path, serial sum) of the only program."""
    (program,) = workload.programs
    ends: list[float] = []
    stream: dict[str, float] = {}
    total = 0.0
    for op in program.ops:
        spent = sum(seconds(work, profile) for work in op.work)
        start = max([ends[dep] for dep in op.deps], default=0.0)
        ends.append(start + spent)
        stream[op.stream] = stream.get(op.stream, 0.0) + spent
        total += spent
    return max(max(ends), *stream.values()), total


@CASES
@given(STRATEGIES, ROUTINGS)
def test_between_critical_path_and_serial_sum(strategy: Strategy, routing: str) -> None:
    training = _training(strategy, 1, routing)
    workload = lower(MODEL, strategy, training, 8)
    low, high = _bounds(workload, machine())
    step = run(workload, MODEL, machine(), strategy, training).step_time
    assert low * (1 - 1e-9) <= step <= high * (1 + 1e-9)
    slowed = run(workload, MODEL, machine(share=1.0), strategy, training).step_time
    assert step * (1 - 1e-9) <= slowed <= high * (1 + 1e-9)


@CASES
@given(STRATEGIES, ROUTINGS)
def test_more_bandwidth_is_never_slower(strategy: Strategy, routing: str) -> None:
    training = _training(strategy, 2, routing)
    slow = simulate(MODEL, machine(), 1, strategy, training)
    fast = simulate(MODEL, machine(scale_up=200, scale_out=20, link=100), 1, strategy, training)
    assert fast.step_time <= slow.step_time * (1 + 1e-9)
    assert fast.peak_memory == slow.peak_memory


@CASES
@given(STRATEGIES, ROUTINGS, st.floats(0.001, 1.0))
def test_more_memory_never_turns_fits_into_not(strategy: Strategy, routing: str, memory: float) -> None:
    training = _training(strategy, 1, routing)
    less = simulate(MODEL, machine(memory=memory), 1, strategy, training)
    more = simulate(MODEL, machine(memory=memory * 2), 1, strategy, training)
    assert more.fits or not less.fits
    assert less.fits == (less.over is None)
    assert sum(less.memory_by_category.values()) == less.peak_memory
    assert less.resident_memory <= less.peak_memory


@CASES
@given(STRATEGIES, st.integers(4, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_composed_microbatches_equal_expanded_ones(strategy: Strategy, batches: int, share: float) -> None:
    training = _training(strategy, batches, "balanced")
    profile = machine(share=share, products=min(1.0, 2 * share))
    composed = run(lower(MODEL, strategy, training, 8), MODEL, profile, strategy, training)
    expanded = run(lower(MODEL, strategy, training, 8, expand=True), MODEL, profile, strategy, training)
    assert composed.step_time == pytest.approx(expanded.step_time, rel=1e-9)
    assert composed.peak_memory == expanded.peak_memory
    assert composed.num_ops == expanded.num_ops
    assert composed.flops == pytest.approx(expanded.flops)
    for kind, busy in expanded.busy.items():
        assert composed.busy[kind] == pytest.approx(busy)


@CASES
@given(STRATEGIES, ROUTINGS)
def test_components_add_up_to_the_step(strategy: Strategy, routing: str) -> None:
    result = simulate(MODEL, machine(), 1, strategy, _training(strategy, 2, routing))
    parts, kernels = result.time_by_component, sum(result.busy.get(kind, 0.0) for kind in COMPUTE_KINDS)
    assert sum(parts.values()) == pytest.approx(result.step_time, rel=1e-6)
    waits = sum(result.exposed.values())
    assert parts.get("waiting", 0.0) <= waits * (1 + 1e-6) + 1e-12
    assert sum(parts.values()) - parts.get("waiting", 0.0) >= kernels * (1 - 1e-6) or strategy.name == "fsdp2"
    assert set(result.to_json()) >= SIMULATE_KEYS


def test_timeline_peaks_where_the_table_says() -> None:
    strategy = mop(8, context_parallel=2, expert_parallel=8, vocab_parallel=4)
    training = _training(strategy, 2, "balanced")
    result = simulate(MODEL, machine(), 1, strategy, training, timeline=True)
    assert max(size for _, size in result.memory_curve) == result.peak_memory
    assert max(span.end for span in result.spans) == pytest.approx(result.step_time)
    assert all(span.start < span.end for span in result.spans)
    assert simulate(MODEL, machine(), 1, strategy, training).spans == []


def test_step_constant_and_launches_are_paid() -> None:
    strategy = mop(8, expert_parallel=8)
    training = _training(strategy, 1, "balanced")
    device = msgspec.structs.replace(machine().device, launch_overhead=quantity(10, "us"))
    slower = msgspec.structs.replace(machine(), device=device)
    fast, slow = (simulate(MODEL, profile, 1, strategy, training) for profile in (machine(), slower))
    launched = sum(
        fast.num_ops.get(kind, 0)
        for kind in ("matmul", "grouped_matmul", "attention", "memory_bound", "optimizer")
    )
    assert slow.busy["memory_bound"] > fast.busy["memory_bound"]
    assert slow.step_time <= fast.step_time + launched * 10e-6 * 1.01


def test_skew_costs_time_and_memory() -> None:
    strategy = fsdp2(8, expert_parallel=8)
    even = simulate(MODEL, machine(), 1, strategy, _training(strategy, 1, "balanced"))
    skewed = simulate(MODEL, machine(), 1, strategy, _training(strategy, 1, "90/2"))
    assert skewed.step_time > even.step_time
    assert skewed.peak_memory > even.peak_memory
    assert even.guarantee_memory > 0


def _eager(microseconds: float) -> HardwareProfile:
    host = msgspec.structs.replace(machine().host, cpu_launch_time=quantity(microseconds, "us"))
    return msgspec.structs.replace(machine(), host=host)


def _kernels(index: int, launches: int) -> Op:
    work = (Work("memory_bound", bytes=1, launches=launches),)
    return Op(index, str(index), "compute", "other", "forward", -1, work)


def _ends(ops: list[Op], durations: list[float], issue: float) -> dict[str, float]:
    program = Program(tuple(ops))
    record = Record(keep_spans=True)
    play([program], [durations], [Ledger((), False)], [record], 0.0, issue)
    return {span.name: span.end for span in record.spans or []}


def test_a_slow_host_holds_the_device_back() -> None:
    ops = [_kernels(i, 4) for i in range(3)]
    durations = [4.0, 0.4, 4.0]
    # four launches an op, one second each: the first op runs behind its launches, the second waits for its
    # own, the last kernel of each runs when it is issued
    assert _ends(ops, durations, 1.0) == pytest.approx({"0": 5.0, "1": 8.1, "2": 13.0})
    assert _ends(ops, durations, 0.0) == pytest.approx({"0": 4.0, "1": 4.4, "2": 8.4})


def test_the_host_loses_its_lead_where_it_waits() -> None:
    # ten seconds of kernels, issued in four: a wait after the second exposes the launch of the third
    free = [_kernels(i, 1) for i in range(4)]
    assert _ends(free, [2.5] * 4, 1.0)["3"] == pytest.approx(11.0)
    held = [msgspec.structs.replace(one, awaited=one.index == 1) for one in free]
    assert _ends(held, [2.5] * 4, 1.0)["3"] == pytest.approx(12.0)


def test_a_graph_is_one_launch_and_a_graph_of_the_step_none() -> None:
    program = Program(tuple(_kernels(i, 4) for i in range(3)))

    def end(graphs: tuple[str, ...]) -> float:
        record = Record(keep_spans=False)
        ledgers = [Ledger((), False)]
        return play([replace(program, graphs=graphs)], [[4.0, 0.4, 4.0]], ledgers, [record], 0.0, 3.0)

    assert end(()) == pytest.approx(37.0)
    assert end(("other",)) == pytest.approx(13.0)  # three launches, then the last op
    assert end(("attention",)) == end(())
    assert end(("step",)) == pytest.approx(8.4)


@pytest.mark.parametrize("experts", [1, 8])
def test_time_scales_with_host_and_device_together(experts: int) -> None:
    """What calibration relies on: twice the seconds of everything are twice the step."""
    strategy = fsdp2(8, expert_parallel=experts)
    training = _training(strategy, 2, "balanced")
    once = simulate(MODEL, _eager(10), 1, strategy, training)
    corrections = {kind: Correction(scale=2.0) for kind in WORK_KINDS}
    slower = msgspec.structs.replace(_eager(20), corrections=corrections)
    twice = simulate(MODEL, slower, 1, strategy, training)
    assert twice.step_time == pytest.approx(2 * once.step_time, rel=1e-9)
    assert once.exposed["host"] > 0
    assert once.step_time > simulate(MODEL, machine(), 1, strategy, training).step_time
    assert sum(once.time_by_component.values()) == pytest.approx(once.step_time, rel=1e-6)


def test_a_component_takes_what_its_ops_take_and_waits_apart() -> None:
    """Two stages of a pipeline: while the first waits for gradients the optimizer takes no longer."""
    strategy = megatron(8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2)
    training = TrainSpec(seq_len=512, global_batch=8)
    result = simulate(small(), machine(), 1, strategy, training)
    parts = result.time_by_component
    assert parts["waiting"] == pytest.approx(sum(result.exposed.values()), rel=1e-6)
    assert parts["waiting"] > 0.3 * result.step_time
    assert parts["optimizer"] <= 1.01 * result.busy["optimizer"] + result.busy.get("memory_bound", 0.0)
    alone = simulate(small(), machine(), 1, megatron(4, tensor_parallel=2, expert_parallel=2), training)
    assert parts["embedding"] <= alone.time_by_component["embedding"] * 1.01


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["mop", "fsdp2", "megatron", "pipeline"]),
    st.floats(1.0, 400.0),
    st.floats(0.0, 0.5),
    st.integers(1, 4),
    st.floats(0.0, 40.0),
)
def test_nothing_is_exposed_longer_than_it_is_busy(
    name: str, wire: float, share: float, batches: int, issue: float
) -> None:
    """Waits are booked on what ran meanwhile: a collective is not blamed for what it queued behind. A step is
    the undisturbed kernels, and what is exposed."""
    strategy = {
        "mop": mop(
            8,
            context_parallel=2,
            expert_parallel=4,
            vocab_parallel=8,
            offload_inputs=True,
            expert_chunk_tokens=128,
        ),
        "fsdp2": fsdp2(8, context_parallel=2, expert_parallel=4, recompute="full"),
        "megatron": megatron(8, tensor_parallel=2, expert_parallel=4),
        "pipeline": megatron(8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2),
    }[name]
    toy = machine(scale_up=wire, share=share)
    host = msgspec.structs.replace(toy.host, cpu_launch_time=quantity(issue, "us"))
    training = TrainSpec(seq_len=512, global_batch=8 * batches)
    result = simulate(small(), msgspec.structs.replace(toy, host=host), 1, strategy, training)
    assert set(result.exposed) <= {*result.busy, "host", "peers"}
    for kind, waited in result.exposed.items():
        if kind not in ("host", "peers"):
            assert waited <= result.busy[kind] * (1 + 1e-6) + 1e-12
    kernels = sum(result.busy.get(kind, 0.0) for kind in COMPUTE_KINDS)
    parts = kernels + sum(result.exposed.values())
    assert parts >= result.step_time * (1 - 1e-6)
    if name != "fsdp2":  # whose copies into and out of its collectives run beside compute
        assert parts == pytest.approx(result.step_time, rel=1e-6)
