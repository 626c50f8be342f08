"""Collectives of different communicators: streams of their own, and links that they share."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim.cost.communication import use
from mopsim.engine.beside import Beside
from mopsim.engine.links import Use
from mopsim.engine.queue import Order, order
from mopsim.engine.record import Record
from mopsim.engine.streams import play
from mopsim.program import lower
from mopsim.program.builder import Builder
from mopsim.program.workload import TALKS, CommGroup, Program, Work, queued
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import small

GROUPS = {"pair": CommGroup(2, 2)}
TALKING = tuple(TALKS)


def _played(
    sent: Sequence[tuple[str, float, float]],
    uses: Use,
    *,
    waits: int = -1,
    share: float = 0.0,
    queues: str = "each",
) -> tuple[Program, Record]:
    """Collectives (stream, start, seconds alone), each after a copy that ends as it starts; a kernel of 1 s
    that waits for one of them."""
    builder, durations, last = Builder(GROUPS), list[float](), 0
    for place, (stream, start, seconds) in enumerate(sent):
        before = builder.add("copy", STARTS[place], "other", "forward", [Work("h2d", bytes=1)])
        work = [Work("all_gather", bytes=1, group=GROUPS["pair"])]
        found = builder.add(f"sent {place}", stream, "other", "forward", work, deps=[before])
        last = found if place == waits else last
        durations += [start, seconds]
    kernel = [Work("memory_bound", bytes=1)]
    builder.add("kernel", "compute", "other", "forward", kernel, deps=[last] if waits >= 0 else [])
    program, record = Program(tuple(builder.ops)), Record(True)
    shifted = {2 * place + 1: used for place, used in uses.items()}
    orders = [Order(queued(program))] if queues == "one" else []
    play([program], [[*durations, 1.0]], [record], [Beside.even(program, share)], [shifted], orders=orders)
    return program, record


STARTS = tuple(f"copy {place}" for place in range(8))


def test_an_exchange_does_not_queue_behind_a_gather_of_another_communicator() -> None:
    """A gather of 10 s, and after 1 s an exchange of 2 s that a kernel waits for: each has half of the link
    until the exchange is over, at 5 s. On one stream it would have begun at 10 s."""
    sent = [("state scale_up", 0.0, 10.0), ("tensor scale_up", 1.0, 2.0)]
    _, record = _played(sent, {}, waits=1)
    assert record.ends[3] == pytest.approx(5.0)
    assert record.ends[1] == pytest.approx(12.0), "nothing of the link's time is lost"
    waited = dict(record.tallies[0].exposed)
    assert waited["all_gather"] == pytest.approx(4.0)
    queued = [("state scale_up", 0.0, 10.0), ("state scale_up", 1.0, 2.0)]
    assert _played(queued, {}, waits=1)[1].ends[3] == pytest.approx(12.0)


def test_one_queue_starts_collectives_in_turn() -> None:
    """Those that run do so side by side; one that has to wait, for a kernel or for what its communicator
    sends, holds up those behind it, on both fabrics. Who waits for these waits for the same."""
    running = [("state scale_up", 0.0, 10.0), ("tensor scale_up", 1.0, 2.0), ("world scale_out", 1.0, 2.0)]
    for queues in ("each", "one"):
        _, record = _played(running, {}, waits=1, queues=queues)
        assert [record.ends[place] for place in (1, 3, 5)] == pytest.approx([12.0, 5.0, 3.0])
    late = [("state scale_up", 5.0, 10.0), ("tensor scale_up", 1.0, 2.0), ("world scale_out", 1.0, 2.0)]
    _, record = _played(late, {}, queues="one")
    assert [record.starts[place] for place in (1, 3, 5)] == [5.0] * 3
    behind = [("state scale_up", 0.0, 10.0), ("state scale_up", 0.0, 1.0), ("world scale_out", 1.0, 2.0)]
    _, record = _played(behind, {}, waits=2, queues="one")
    assert [record.starts[place] for place in (1, 3, 5)] == [0.0, 10.0, 10.0]
    assert sum(dict(record.tallies[0].exposed).values()) == pytest.approx(12.0)


def test_back_to_back_collectives_hold_up_the_kernels_behind_them() -> None:
    """A collective runs beside the kernel issued after it, which a second of its communicator holds up until
    the first is over (Megatron-Core, partition_buckets). Parts of one are one."""
    for second, starts in (
        ([], 0.0),
        ([("state scale_up", 0.0, 1.0)], 10.0),
        ([("tensor scale_up", 0.0, 1.0)], 0.0),
    ):
        _, record = _played([("state scale_up", 0.0, 10.0), *second], {}, queues="one")
        assert record.starts[-1] == starts
        assert sum(dict(record.tallies[0].exposed).values()) == pytest.approx(starts)
    builder, sent = Builder(GROUPS), [Work("all_gather", bytes=1, group=GROUPS["pair"])]
    for part in ("attention", "experts"):
        builder.add("gather", "state scale_up", part, "forward", sent)
    builder.add("copy", "h2d", "other", "forward", [Work("h2d", bytes=1)])
    builder.compute("kernel", "other", "forward", -1, [Work("memory_bound", bytes=1)])
    assert queued(Program(tuple(builder.ops))) == {0: -1, 3: 0}


def test_a_queue_is_free_once_the_last_kernel_of_an_op_has_started() -> None:
    """A gather issued after an op of a kernel of 2 s and of two in one piece of work of 8 s starts with the
    last, at 6 s; one that begins with a product, in blocks, with the first."""
    for waits, starts in ((False, 6.0), (True, 0.0)):
        builder = Builder(GROUPS)
        first = builder.add("copy", "h2d", "other", "forward", [Work("h2d", bytes=1)])
        kernels = [Work("memory_bound", bytes=1), Work("memory_bound", bytes=1, launches=2)]
        sent = [Work("all_gather", bytes=1, group=GROUPS["pair"])]
        builder.compute("kernels", "other", "forward", -1, kernels, first)
        builder.add("sent", "tensor scale_up", "other", "forward", sent, [first] if waits else [])
        program, record, durations = Program(tuple(builder.ops)), Record(True), [0.0, 10.0, 1.0]
        prices = {id(work): (work, seconds) for work, seconds in zip(kernels, (2.0, 8.0), strict=True)}
        found = order(program, durations, prices)
        assert found.lasts == ({} if waits else {1: 4.0})
        play([program], [durations], [record], [Beside.even(program, 0.0)], [{}], orders=[found])
        assert record.starts[2] == starts
        assert record.ends == [0.0, 10.0, starts + 1.0]


def test_hidden_sums_of_tensor_groups_need_one_queue_before_blackwell() -> None:
    strategy = megatron(8, tensor_parallel=2)
    hidden = replace(strategy, overlap=replace(strategy.overlap, experts=True))
    for name, asked, turns in (
        ("megatron-core", strategy, ["beside", "beside"]),
        ("megatron-core", hidden, ["in_turn", "beside"]),
        ("megatron-fsdp", strategy, ["in_turn", "beside"]),
        ("megatron-bridge-library", strategy, ["in_turn", "beside"]),
        ("torchtitan", strategy, ["in_turn", "in_turn"]),
    ):
        found = [
            load_stack(name).ordered(on, asked).kernels.region_backward for on in ("hopper", "blackwell")
        ]
        assert found == turns, name


def _gathers(**pipeline: int) -> list[list[tuple[int, int]]]:
    """Of each stage: what runs (layer) and which bucket is gathered, in the order of issue, until each was
    asked for."""
    strategy = megatron(16, expert_parallel=2, **pipeline)
    strategy = replace(strategy, overlap=replace(strategy.overlap, param_gather=True))
    workload = lower(small(num_hidden_layers=8), strategy, TrainSpec(seq_len=512, global_batch=64), 8)
    found = []
    for program in workload.programs:
        asked = [op.index for op in program.ops if op.name == "gather parameters"]
        seen = {op.layer: op.index for op in reversed(program.ops[: asked[-1] + 1]) if op.stream == "compute"}
        order = [(index, RUNS, layer) for layer, index in seen.items() if layer >= 0]
        buckets = {program.ops[index].layer: index for index in reversed(asked)}
        order += [(index, ASKED, bucket) for bucket, index in buckets.items()]
        found.append([(kind, which) for _, kind, which in sorted(order)])
    return found


def test_updated_parameters_are_asked_for_a_bucket_ahead() -> None:
    """A layer's on the first stage; a stage's on others, at the start; those of a chunk ahead where it has
    several."""
    (one,) = _gathers()
    begins = [(ASKED, 0), (ASKED, 1)]
    assert one == [*begins, *((kind, layer + 2 * kind) for layer in range(7) for kind in (1, 0)), (ASKED, 9)]
    first, second = _gathers(pipeline_parallel=2)
    assert first == [*begins, (ASKED, 2), (RUNS, 0), (ASKED, 3), (RUNS, 1), (ASKED, 4)]
    assert second == [(ASKED, 0)]
    _, second = _gathers(pipeline_parallel=2, virtual_stages=4)
    assert second == [*begins, (RUNS, 1), (ASKED, 2), (RUNS, 3), (ASKED, 3)]


RUNS, ASKED = 0, 1


def test_who_has_one_queue() -> None:
    found = {name: [load_stack(name).queue(on, fsdp2(8)) for on in ("hopper", "cdna4")] for name in STACKS}
    assert found == {
        "megatron-lm": ["one", "each"], "megatron-fsdp": ["each"] * 2, "torchtitan": ["each"] * 2,
        "bionemo-te": ["each"] * 2, "halo": ["one"] * 2, "primus-2026": ["one", "each"],
    }  # fmt: skip


STACKS = ("megatron-lm", "megatron-fsdp", "torchtitan", "bionemo-te", "halo", "primus-2026")


@pytest.mark.parametrize(
    ("tensor", "context", "hidden"), [(1, 1, False), (2, 1, False), (1, 2, False), (2, 1, True)]
)
def test_recipes_queue_where_ranks_split_layers_up_to_hopper(tensor: int, context: int, hidden: bool) -> None:
    strategy = megatron(8, tensor_parallel=tensor, context_parallel=context, expert_parallel=4)
    strategy = replace(strategy, overlap=replace(strategy.overlap, experts=hidden))
    found = [load_stack("megatron-bridge").queue(on, strategy) for on in ("ampere", "hopper", "blackwell")]
    split = tensor * context > 1 and not hidden
    assert found == ["one" if split else "each"] * 2 + ["each"]
    found = [load_stack("megatron-core").queue(on, strategy) for on in ("hopper", "blackwell")]
    assert found == ["each" if hidden else "one"] * 2


def test_links_that_have_room_are_not_shared() -> None:
    sent = [("state scale_up", 0.0, 10.0), ("tensor scale_up", 1.0, 2.0)]
    assert _played(sent, {0: (0.25, 0.0), 1: (0.75, 0.0)})[1].ends[3] == pytest.approx(3.0)
    apart = [("state scale_out", 0.0, 10.0), ("tensor scale_up", 1.0, 2.0)]
    assert _played(apart, {})[1].ends[3] == pytest.approx(3.0)
    _, record = _played(apart, {0: (0.5, 1.0)})  # what a gather over NICs moves inside of domains
    assert record.ends[3] == pytest.approx(4.0)
    assert record.ends[1] == pytest.approx(11.0)


SENT = st.tuples(
    st.sampled_from(TALKING), st.floats(0.0, 10.0), st.floats(0.01, 10.0), st.floats(0.1, 1.0), st.booleans()
)


@settings(max_examples=100, deadline=None)
@given(st.lists(SENT, min_size=1, max_size=8), st.floats(0.0, 0.5), st.sampled_from(["each", "one"]))
def test_no_link_moves_more_than_its_rate(
    sent: list[tuple[str, float, float, float, bool]], share: float, queues: str
) -> None:
    """By any time what was moved over a fabric is at most what it moves in that time; collectives of one
    stream run one after the other; none is faster than alone. In one queue they start in the order of issue,
    each as soon as it may."""
    uses = {}
    for place, (stream, _, _, used, both) in enumerate(sent):
        up = TALKS[stream] == "scale_up"
        uses[place] = (used, 0.0) if up else (used if both else 0.0, 1.0)
    program, record = _played([one[:3] for one in sent], uses, share=share, queues=queues)
    spans = [
        (record.starts[2 * place + 1], record.ends[2 * place + 1], one[2]) for place, one in enumerate(sent)
    ]
    for (start, end, alone), (stream, begins, *_) in zip(spans, sent, strict=True):
        assert start >= begins
        assert end - start >= alone * (1 - 1e-9)
        mine = [span for span, one in zip(spans, sent, strict=True) if one[0] == stream]
        assert all(other[0] >= end - 1e-9 or other[1] <= start + 1e-9 for other in mine if other[0] != start)
    for place, (start, *_) in enumerate(spans):
        same = [spans[one][1] for one in range(place) if sent[one][0] == sent[place][0]]
        ahead = [spans[place - 1][0]] if queues == "one" and place else []
        assert start == pytest.approx(max([sent[place][1], *same, *ahead]), abs=1e-9)
    for fabric in (0, 1):
        for first, *_ in spans:
            for _, last, _ in spans:
                inside = [
                    uses[place][fabric] * one[2]
                    for place, one in enumerate(spans)
                    if one[0] >= first and one[1] <= last
                ]
                assert sum(inside) <= max(last - first, 0.0) * (1 + 1e-9) + 1e-12
    assert program.ops[-1].stream == "compute"


def test_a_collective_over_nics_uses_links_inside_of_domains_too() -> None:
    card = load_profile("h100-sxm-80g")
    inside, across = (Work("all_gather", bytes=8e9, group=CommGroup(*size)) for size in ((8, 8), (64, 8)))
    assert use(inside, card) == (1.0, 0.0)
    up, out = use(across, card)
    assert (out, 0.5 < up < 1.0) == (1.0, True), "a ring brings 7 of 8 parts over links"
    assert use(Work("all_gather", bytes=8e9, group=CommGroup(8, 1)), card) == (0.0, 1.0)
    few = Work("all_gather", bytes=8e9, group=CommGroup(8, 8), channels=8)
    assert use(few, load_profile("gb300-288g"))[0] < 0.7
    rows = Work("all_to_all", bytes=8e9, group=CommGroup(8, 8, choices=4.0))
    assert use(rows, card) == (1.0, 0.0)
    assert use(Work("memory_bound", bytes=8e9), card) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["fsdp2", "megatron"])
def test_each_communicator_has_a_stream(name: str) -> None:
    strategy = fsdp2(8, context_parallel=2, expert_parallel=4)
    if name == "megatron":
        strategy = megatron(8, tensor_parallel=2, expert_parallel=4)
        hidden = replace(strategy.overlap, grad_reduce=True, param_gather=True)
        strategy = replace(strategy, overlap=hidden)
    program = lower(small(), strategy, TrainSpec(seq_len=512, global_batch=8), 8).programs[0]
    streams = {op.stream for op in program.ops if op.stream in TALKS}
    own = {"tensor scale_up"} if name == "megatron" else {"sequence scale_up"}
    assert streams >= {"state scale_up", "experts scale_up", *own}
