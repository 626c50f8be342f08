"""What a program does beside the products of its network: a host that waits for every kernel, sums of each
product's own input gradient, tensors with owners, copies and metrics, lengths that it reads."""

from dataclasses import replace as changed
from typing import Literal, get_args, get_type_hints

import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import simulate
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record
from mopsim.graph.layer import decoder_layer
from mopsim.graph.rewrites.eager import composed
from mopsim.graph.shapes import Shapes
from mopsim.program import lower
from mopsim.program.context import Context, make_context
from mopsim.program.data_parallel import gathering, grad_passes, reduction
from mopsim.program.loss import loss_tape, loss_template
from mopsim.program.passes import Passes
from mopsim.program.stage import Stage
from mopsim.program.workload import Op, Program, Work
from mopsim.program.works import Part, works
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import HostCosts, Kernels, Sharding, Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import machine, play, small


def _op(index: int, launches: int, stream: str = "compute", rendezvous: str = "") -> Op:
    work = (Work("memory_bound", bytes=1, launches=launches),)
    return Op(index, str(index), stream, "other", "forward", -1, work, rendezvous=rendezvous)


def _ends(ops: list[Op], durations: list[float], *, blocking: bool, issue: float = 1.0) -> dict[str, float]:
    record = Record(keep_spans=True)
    ledgers = [Ledger((), False)]
    play([Program(tuple(ops))], [durations], ledgers, [record], 0.0, issue, blocking=blocking)
    return {span.name: span.end for span in record.spans or []}


def test_a_blocked_host_pays_every_launch_between_kernels() -> None:
    ops, durations = [_op(i, 4) for i in range(3)], [4.0, 0.4, 4.0]
    # four launches of a second each before an op's four kernels: nothing is issued ahead
    assert _ends(ops, durations, blocking=True) == pytest.approx({"0": 8.0, "1": 12.4, "2": 20.4})
    assert _ends(ops, durations, blocking=False)["2"] == pytest.approx(13.0)


def test_a_blocked_host_starts_no_compute_beside_a_collective() -> None:
    ops = [_op(0, 1), _op(1, 1, "tensor scale_up"), _op(2, 1)]
    assert _ends(ops, [5.0, 5.0, 5.0], blocking=True)["2"] == pytest.approx(18.0)
    assert _ends(ops, [5.0, 5.0, 5.0], blocking=False)["2"] == pytest.approx(11.0)
    assert _ends(ops, [5.0, 5.0, 5.0], blocking=True, issue=0.0)["2"] == pytest.approx(15.0)


def test_a_blocked_host_leaves_meetings_of_peers_to_the_program() -> None:
    """Two stages that send before they receive: a host that waited for its send would wait forever."""
    programs = [
        Program(tuple(_op(i, 1, ("forward_out", "forward_in")[i], key) for i, key in enumerate(keys)), stage)
        for stage, keys in enumerate((("there", "back"), ("back", "there")))
    ]
    records = [Record(keep_spans=False) for _ in programs]
    ledgers = [Ledger((), False) for _ in programs]
    end = play(programs, [[2.0, 2.0]] * 2, ledgers, records, 0.0, 1.0, blocking=True)
    assert end == pytest.approx(4.0)


def _zero1(fsdp: int, *, owners: bool) -> tuple[Context, Stage]:
    """Of 8 ranks that train the small network under ZeRO-1."""
    stack = Stack(
        name="mine", sharding=Sharding(owners=owners, sums="whole" if owners else "scattered", grad_passes=6)
    )
    strategy = megatron(8)
    dense, experts = replace(strategy.dense, fsdp=fsdp), replace(strategy.experts, expert_fsdp=fsdp)
    strategy = replace(strategy, dense=dense, experts=experts)
    training = TrainSpec(seq_len=32, global_batch=8)
    context = make_context(small(), strategy, training, 4, stack)
    return context, Stage(context, 0)


def test_owners_sum_whole_gradients_and_send_what_they_updated_one_after_the_other() -> None:
    context, stage = _zero1(2, owners=True)
    summed = [work for _, work in reduction(context, stage.units)]
    assert {work.kind for work in summed} == {"all_reduce"}
    assert {work.group.size for work in summed} == {8}, "shards and replicas at once"
    assert sum(work.bytes for work in summed) == sum(unit.numel for unit in stage.units) * context.reduce
    sent = dict(gathering(context, stage.units))
    assert {work.kind for work in sent.values()} == {"all_gather"}
    assert {work.group.size for work in sent.values()} == {2}
    assert sent["attention"].launches == 2, "one for each owner"
    assert sent["embedding"].launches == 1, "one tensor has one owner"
    wire = sum(work.bytes for work in sent.values()) * (2 - 1) / 2
    assert wire == pytest.approx(sum(unit.numel for unit in stage.units) * context.param), "all bytes pass"


def test_an_owner_updates_whole_tensors() -> None:
    even, whole = (_zero1(8, owners=owners)[1] for owners in (False, True))
    total = sum(unit.numel for unit in whole.units)
    largest = max(unit.largest for unit in whole.units)
    assert sum(even.updated) == pytest.approx(total / 8, rel=1e-3)
    assert sum(whole.updated) >= max(total / 8, largest)
    few = _zero1(1, owners=True)[1]
    assert sum(few.updated) == sum(unit.padded for unit in few.units), "one rank owns all"


def test_whole_gradients_pass_before_they_are_reduced() -> None:
    context, stage = _zero1(2, owners=True)
    (work,) = grad_passes(context, stage.units)
    assert work.bytes == 6 * sum(unit.numel for unit in stage.units)


def test_a_norm_on_a_copy_in_fp32_by_hand() -> None:
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 0).kernels
    narrow, wide = 16 * 64 * 2, 16 * 64 * 4
    again, once = (
        next(one for one in composed(kernels, {"norm": way}, 2, 4, 2) if one.name == "attention_norm")
        for way in ("upcast_again", "upcast")
    )
    assert again.bytes == once.bytes == 2 * narrow + 2 * wide
    assert once.back_bytes == 3 * narrow + 4 * wide
    assert again.back_bytes == once.back_bytes + once.bytes
    assert again.saves == ("x",)
    assert once.saves == ("attention_norm_wide",)


def test_a_norm_of_transformers_by_hand() -> None:
    """As torch's saved_tensors_hooks show of LlamaRMSNorm: a copy in fp32, roots, normed rows in bf16."""
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 0).kernels
    found = composed(kernels, {"norm": "rounded"}, 2, 4, 2)
    norm = next(kernel for kernel in found if kernel.name == "attention_norm")
    kept = {value.name: value.bytes for value in norm.writes if value.name in norm.saves}
    assert sorted(kept.values()) == [16 * 4, 16 * 64 * 2, 16 * 64 * 4]


def test_adamw_over_all_tensors_keeps_the_roots_of_its_second_moments() -> None:
    def program(adamw: Literal["fused", "foreach"]) -> Stack:
        return Stack(name="mine", kernels=Kernels(adamw=adamw), sharding=Sharding(fsdp=True))

    training, ways = TrainSpec(seq_len=32, global_batch=8), get_args(Literal["fused", "foreach"])
    plain, foreach = (simulate(small(), machine(), 1, fsdp2(8), training, program(way)) for way in ways)
    at_the_end = foreach.peak_by_phase["optimizer"] - plain.peak_by_phase["optimizer"]
    assert at_the_end == plain.highest_by_category["optimizer"] / 2
    assert foreach.step_time > plain.step_time


def test_a_chunk_of_torchs_cross_entropy_by_hand() -> None:
    """Logits in bf16, log_softmax, the gradient of what is picked from it and its own in fp32; beside them
    the inputs' gradients in fp32. All of it in fp32, the head's weight too: two copies of the inputs, the
    weight's copy, its gradient and what that is cast to."""
    strategy = fsdp2(2, loss="chunked", loss_chunk_tokens=64, dtype="bfloat16")
    found = {}
    for how in get_args(Kernels.__annotations__["loss_chunks"]):
        stack = Stack(name=how, version="1", kernels=Kernels(loss_chunks=how))
        context = make_context(small(), strategy, TrainSpec(seq_len=256, global_batch=2), 8, stack)
        (found[how],) = (
            dict(one[:2]) for one in loss_template(context, "forward", ()).memory if len(one) == 4
        )
    logits, inputs = 64 * context.model.vocab_size, context.hidden
    assert found["fused"] == {"activations": inputs, "logits": logits * 8}
    assert found["composed"] == {"activations": inputs, "logits": logits * 6}
    weight = context.model.vocab_size * context.model.hidden_size
    assert context.reduce == 4  # in which FSDP2 sums the head's gradient until the last chunk
    assert found["autograd"] == {"activations": 2 * inputs + weight * 4, "logits": logits * 14}
    assert found["compiled"] == {"activations": 2 * inputs + weight * 4, "logits": logits * 4}
    assert found["wide"] == {"activations": 2 * inputs + weight * (4 + 4 + 2), "logits": logits * 12}


def test_megatrons_fused_cross_entropy_takes_ten_bytes_of_a_logit() -> None:
    strategy, training = megatron(2), TrainSpec(seq_len=256, global_batch=2)
    peaks = {}
    for kernel in ("fused", "native", "in_place"):
        stack = Stack(name=kernel, version="1", kernels=Kernels(loss=kernel))
        found = simulate(small(vocab_size=65536), machine(), 1, strategy, training, stack)
        peaks[kernel] = found.highest_by_category["logits"] / (256 * 65536)
    assert peaks == pytest.approx({"fused": 2, "native": 10, "in_place": 6}, rel=0.01)


def test_what_is_done_beside_the_loss_is_booked_on_the_forward() -> None:
    context, _ = _zero1(2, owners=True)
    busy = changed(context, stack=replace(context.stack, kernels=Kernels(logit_passes=10.0)))
    (beside,) = (kernel for kernel in loss_tape(busy).kernels if kernel.name == "beside")
    assert beside.bytes == 10.0 * context.tokens * context.model.vocab_size
    assert beside.back_bytes == 0
    assert not [kernel for kernel in loss_tape(context).kernels if kernel.name == "beside"]


def test_a_length_that_the_host_reads_is_waited_for_in_every_forward() -> None:
    strategy = megatron(8)
    training = TrainSpec(seq_len=32, global_batch=8)
    reading = Stack(name="mine", host=HostCosts(reads_lengths="every"))
    larger = TrainSpec(seq_len=32, global_batch=16)
    (program,) = lower(small(), strategy, training, 8, reading).programs
    read = [op for op in program.ops if op.name == "lengths read"]
    assert len(read) == 3, "one a layer"
    assert {op.phase for op in read} == {"forward"}
    assert all(op.awaited for op in read)
    slow = load_profile("a100-sxm-80g")
    free, waits = (
        simulate(small(), slow, 1, strategy, training, Stack(name="mine", host=host)).step_time
        for host in (HostCosts(), reading.host)
    )
    assert waits > free
    single = Stack(name="mine", host=HostCosts(reads_lengths="single"))
    for rows, reads in ((1, 3), (2, 0)):
        (program,) = lower(small(), replace(strategy, micro_batch=rows), larger, 8, single).programs
        assert [op.name for op in program.ops].count(
            "lengths read"
        ) == reads * larger.global_batch // 8 // rows


@pytest.mark.parametrize("expert_parallel", [1, 8])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_host_waits_for_the_rows_of_experts(
    expert_parallel: int, recompute: Literal["none", "full"]
) -> None:
    """Once in every forward of a layer, also in a recomputation: before they are exchanged, or before their
    products; where sizes are known beforehand never."""
    strategy = megatron(8, expert_parallel=expert_parallel, recompute=recompute)
    training = TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    for reads in get_args(get_type_hints(HostCosts)["counts_read"]):
        stack = Stack(name="mine", host=HostCosts(counts_read=reads))
        (program,) = lower(small(), strategy, training, 8, stack, compose=False).programs
        waits = [(op.layer, op.phase) for op in program.ops if op.awaited and op.layer >= 0]
        counted = reads == "always" or (reads == "exchanged" and expert_parallel > 1)
        phases = ("forward", "recompute") if recompute == "full" else ("forward",)
        layers = {op.layer for op in program.ops if any(w.kind == "grouped_matmul" for w in op.work)}
        assert layers
        assert sorted(waits) == sorted((one, phase) for one in layers for phase in phases if counted)


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("heads", [0, 2])
def test_a_loss_that_the_host_reads_is_waited_for_once_a_microbatch(
    loss: Literal["full", "chunked"], heads: int
) -> None:
    """On the last stage, after all that makes it and before its backward."""
    strategy = megatron(8, pipeline_parallel=4)
    strategy = replace(strategy, vocabulary=replace(strategy.vocabulary, loss=loss, chunk_tokens=8))
    training = TrainSpec(seq_len=32, global_batch=16)
    reading = Stack(name="mine", host=HostCosts(loss_read=True))
    network = small(num_hidden_layers=8, num_nextn_predict_layers=heads)
    programs = lower(network, strategy, training, 8, reading, expand=True).programs
    for program in programs:
        ops = program.ops
        read = [op for op in ops if op.name == "loss read"]
        last = program.stage == 3
        assert all(op.awaited for op in read)
        assert [op.microbatch for op in read] == list(range(8)) * last
        for one in read:
            mine = [op for op in ops if op.microbatch == one.microbatch and op.component == "vocabulary"]
            assert {op.phase for op in mine if op.index < one.index} == {"forward"}
            assert {op.phase for op in mine if op.index > one.index} == {"backward"}
    machines = load_profile("a100-sxm-80g")
    free, waits = (
        simulate(network, machines, 1, strategy, training, stack).step_time
        for stack in (Stack(name="mine"), reading)
    )
    assert waits > free


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
def test_rows_of_tokens_are_copied_by_index_where_no_permutation_is_fused(
    dispatcher: Literal["alltoall", "deepep"],
) -> None:
    """Chunks of an expert's rows lie together, so that they are not; rows that a kernel has sent have no
    other permutation."""
    strategy = megatron(8, expert_parallel=4, token_dispatcher=dispatcher)
    training, found = TrainSpec(seq_len=32, global_batch=8, routing="balanced"), {}
    parts: tuple[Part, ...] = ("forward", "backward")
    for sums in ("gathered", "atomic"):
        stack = Stack(name="mine", kernels=Kernels(row_sums=sums))
        context = make_context(small(), strategy, training, 8, stack)
        for kernel in Passes(context).tape(small().num_hidden_layers - 1).kernels:
            if kernel.name in ("permute", "sort", "unsort", "accumulate"):
                for part in parts:
                    work = works(kernel, part, context)
                    found[sums, kernel.name, part] = [(one.indexed, one.sums > 0) for one in work]
    rows, back = ("permute", "accumulate") if dispatcher == "alltoall" else ("sort", "unsort")
    summed = {(rows, "backward"), (back, "forward")}
    for (sums, name, part), flags in found.items():
        copied = sums == "atomic" and name in (rows, back)
        assert flags in ([], [(copied, sums == "atomic" and (name, part) in summed)]), (sums, name, part)
    assert found["atomic", rows, "forward"] == [(True, False)]


def test_gathered_rows_are_kept_or_gathered_again() -> None:
    """Of a dense layer on 4 tensor-parallel ranks: two regions, of attention and of the FFN."""
    strategy = megatron(4, tensor_parallel=4, recompute="none")
    training, network = TrainSpec(seq_len=32, global_batch=1), small(num_hidden_layers=1)
    found = {}
    for rows, turn in (("again", "beside"), ("kept", "beside"), ("again", "in_turn"), ("kept", "in_turn")):
        stack = Stack(name="mine", kernels=Kernels(gathered_rows=rows, region_backward=turn))
        context = make_context(network, strategy, training, 4, stack)
        passes = Passes(context)
        backward = [piece.name for piece in passes.backward(0).pieces]
        gathers = [name for name in backward if name == "gather_h"]
        kept = sum(size for _, size in passes.kept(0))
        (program,) = lower(network, strategy, training, 4, stack).programs
        sent = sum(w.bytes for op in program.ops for w in op.work if w.kind == "all_gather")
        found[rows, turn] = (len(gathers), kept, sent)
    again, kept, whole = found["again", "beside"], found["kept", "beside"], 32 * 64 * 2
    assert (again[0], kept[0]) == (4, 2), "rows again and the gradient scattered, or that alone"
    assert kept[1] - again[1] == 2 * (whole - whole // 4)
    assert again[2] - kept[2] == 3 * whole, "and of the loss"
    assert found["again", "in_turn"] == again
    assert found["kept", "in_turn"] == kept


def test_exchanged_rows_are_put_in_order_and_gathered_in_8_bits() -> None:
    """Two gathers and two scatters of a dense layer, each way, whole rows of several sequences."""
    found = {}
    for rows, batch in (((), 2), (("ordered",), 1), (("ordered",), 2), (("ordered", "cast"), 2)):
        strategy = megatron(4, tensor_parallel=4, recompute="none", micro_batch=batch)
        strategy = replace(strategy, precision=replace(strategy.precision, matmul="fp8"))
        stack = Stack(name="mine", kernels=Kernels(exchanged_rows=rows, casts="again"))
        context = make_context(
            small(num_hidden_layers=1), strategy, TrainSpec(seq_len=32, global_batch=2), 4, stack
        )
        kernels = Passes(context).tape(0).kernels
        copies = [one for one in kernels if one.name.endswith("_order")]
        gathered = sum(one.bytes for one in kernels if one.kind == "all_gather")
        found[rows, batch] = gathered, sum(one.bytes + (one.back_bytes or 0.0) for one in copies)
    whole = 2 * 32 * 64 * 2
    assert found[(), 2] == (2 * whole, 0)
    assert found[("ordered",), 1] == (whole, 0), "a sequence lies in order"
    assert found[("ordered",), 2] == (2 * whole, 2 * 8 * whole)
    assert found[("ordered", "cast"), 2] == (whole, 2 * (4 * whole + 4 * whole / 2))


@pytest.mark.parametrize("options", [{}, {"virtual_stages": 2}], ids=["1f1b", "interleaved"])
def test_a_message_whose_shape_the_host_reads_comes_later(options: dict[str, int]) -> None:
    strategy = megatron(8, pipeline_parallel=4, **options)
    training = TrainSpec(seq_len=32, global_batch=32)
    reading = Stack(name="mine", host=HostCosts(message_reads=9))
    network, machine = small(num_hidden_layers=8), load_profile("a100-sxm-80g")
    programs = lower(network, strategy, training, 8, reading).programs
    for program in programs:
        received = [op for op in program.ops if op.name.startswith("receive")]
        read = [op for op in program.ops if op.name == "shape read"]
        assert len(read) == len(received)
        assert all(op.awaited and op.work[0].launches == 9 for op in read)
        assert all(op.work[0].launches == 3 for op in received)
    free, waits = (
        simulate(network, machine, 1, strategy, training, stack).step_time
        for stack in (Stack(name="mine"), reading)
    )
    assert waits > free


def test_a_host_that_waits_for_every_kernel_has_no_exchanges_beside_another_microbatch() -> None:
    strategy = megatron(
        32, pipeline_parallel=4, tensor_parallel=4, expert_parallel=2, virtual_stages=4, recompute="full"
    )
    training, model = TrainSpec(seq_len=4096, global_batch=128), load_model("deepseek_v2")
    beside = replace(strategy, overlap=replace(strategy.overlap, experts=True))
    for stack, why in (
        (load_stack("megatron-deepspeed-bigscience"), "on the stack megatron-deepspeed-bigscience"),
        (Stack(name="mine", host=HostCosts(blocking=True)), "where the host waits for every kernel"),
    ):
        with pytest.raises(SpecError, match=rf"^strategy.overlap.experts: True is not simulated {why}"):
            simulate(model, load_profile("h100-sxm-80g"), 4, beside, training, stack)
