"""Units, routes, pipeline orders and the guarantee of dispatch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.engine import simulate
from mopsim.graph import total_params
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.spec import pipeline_order as pipeline
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import routing_counts
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.sim.toys import small

MODEL = small()


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 8]))
def test_units_hold_every_parameter_once(shard: int, experts: int, vocabulary: int) -> None:
    strategy = mop(8, expert_parallel=experts, fsdp=shard, vocab_parallel=vocabulary)
    units = make_context(MODEL, strategy, TrainSpec(seq_len=64, global_batch=8), 8).units()
    held = 0.0
    for unit in units:
        split = experts if unit.component == "experts" else vocabulary if unit.name == "head" else 1
        held += unit.numel * split
        assert unit.padded - unit.numel < unit.shard
    assert held == total_params(MODEL)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 6),
    st.sampled_from(["balanced", "90/2", "30/5"]),
    st.sampled_from([1, 2, 8]),
)
def test_routes_are_those_of_the_layout(tokens: int, chunks: int, routing: str, degree: int) -> None:
    """The most loaded rank's rows: `degree` senders that all route alike."""
    strategy = mop(
        8, expert_parallel=degree, expert_chunk_tokens=max(1, tokens // chunks), max_expert_chunks=chunks
    )
    context = make_context(MODEL, strategy, TrainSpec(seq_len=tokens, global_batch=8, routing=routing), 8)
    for index in range(context.chunks):
        counts = routing_counts(routing, tokens, context.chunks, index, 8, 2)
        local = 8 // degree
        most = max((counts[i * local : (i + 1) * local] for i in range(degree)), key=sum)
        assert sum(context.routes(index)) == degree * sum(most)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(["1f1b", "zero_bubble"]))
def test_pipeline_orders_do_everything_once(stages: int, microbatches: int, name: str) -> None:
    for stage in range(stages):
        order = pipeline.order(name, stages, 1, microbatches, stage)
        assert len(set(order)) == len(order)
        forwards = [m for phase, m, _ in order if phase == "forward"]
        assert forwards == list(range(microbatches))
        for phase in {p for p, _, _ in order} - {"forward"}:
            assert [m for p, m, _ in order if p == phase] == list(range(microbatches))
        alive = peak = 0
        for phase, _, _ in order:
            alive += (phase == "forward") - (phase in ("backward", "input_grad"))
            peak = max(peak, alive)
        assert peak <= stages - stage


@pytest.mark.parametrize(("stages", "virtual", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_interleaved_orders_can_be_played(stages: int, virtual: int, microbatches: int) -> None:
    """Every slot runs once its predecessor on the ring of model chunks has run: no deadlock."""
    orders = [pipeline.order("interleaved", stages, virtual, microbatches, stage) for stage in range(stages)]
    places, done = [0] * stages, set()
    last = stages * virtual - 1

    def ready(stage: int, phase: str, microbatch: int, chunk: int) -> bool:
        place = chunk * stages + stage
        if phase == "forward":
            return place == 0 or ("forward", microbatch, place - 1) in done
        before = ("forward", microbatch, place) if place == last else ("backward", microbatch, place + 1)
        return before in done

    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while places[stage] < len(order) and ready(stage, *order[places[stage]]):
                phase, microbatch, chunk = order[places[stage]]
                done.add((phase, microbatch, chunk * stages + stage))
                places[stage] += 1
                moved = True
    assert places == [len(order) for order in orders]
    assert len(done) == 2 * stages * virtual * microbatches


def test_dispatch_guarantee_is_the_papers_figure() -> None:
    """2 Ep k c_eff H b at W=96, H=7168, k=8, N=65,536, K=10 is 134 GiB (arXiv 2607.01844)."""
    model = small(hidden_size=7168, num_local_experts=96, num_experts_per_tok=8, first_k_dense_replace=0)
    strategy = mop(96, expert_parallel=96, expert_chunk_tokens=1000, max_expert_chunks=10)
    workload = lower(model, strategy, TrainSpec(seq_len=65536, global_batch=96), 8)
    assert workload.guarantee / 1024**3 == pytest.approx(134, abs=0.5)


def test_identical_microbatches_are_not_expanded() -> None:
    workload = lower(MODEL, fsdp2(8), TrainSpec(seq_len=64, global_batch=80), 8)
    assert (workload.microbatches, workload.expanded) == (10, 3)


def test_the_number_of_chunks_hardly_moves_a_step() -> None:
    """Mixtral has 8 experts: chunks 2, 4, 6 and 8 share a factor with them, and are as even as the others."""
    model, hardware = load_model("mixtral_8x7b"), load_profile("h100-sxm-80g")
    training = TrainSpec(seq_len=32768, global_batch=8)
    steps = [
        simulate(
            model, hardware, 1, mop(8, expert_parallel=8, expert_chunk_tokens=-(-32768 // chunks)), training
        ).step_time
        for chunks in range(1, 9)
    ]
    assert max(steps) <= 1.05 * min(steps)
