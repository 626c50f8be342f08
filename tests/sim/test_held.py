"""Tensors that a program's own variables hold longer than autograd needs them."""

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.engine.result import SimResult
from mopsim.graph.attention import attention
from mopsim.graph.layer import decoder_layer
from mopsim.graph.rewrites.projections import heads_apart
from mopsim.graph.rewrites.recompute import plan, saved_to_router
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Tape
from mopsim.spec.stack import Kernels, Recompute
from mopsim.spec.strategy import Exchange
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, zero_offload
from tests.sim.toys import machine, small
from tests.software import changed

MODEL = small(num_hidden_layers=12, vocab_size=64)
TRAINING = TrainSpec(seq_len=256, global_batch=8)
PLAN = fsdp2(8, recompute="full")


def held(microbatches: int = 1, vocabulary: int = 64, **sections: dict[str, object]) -> SimResult:
    training = replace(TRAINING, global_batch=8 * microbatches)
    model = replace(MODEL, vocab_size=vocabulary)
    return simulate(model, machine(), 1, PLAN, training, changed("kempnerforge", **sections))


def routed() -> Tape:
    routes = (128,) * MODEL.num_local_experts
    return decoder_layer(MODEL, Shapes(tokens=256, seq_len=256, fused=True), 1, routes)


def test_a_recomputation_saves_attention_and_norms_on_the_way_to_its_router() -> None:
    tape = routed()
    found = saved_to_router(tape, plan(tape, "full", ()))
    assert {"h", "qr", "kr", "v0", "o", "u"} <= found
    assert not {"rows", "act", "x"} & found
    assert not saved_to_router(tape, plan(tape, "none", ()))


def test_the_graph_to_a_router_outlives_its_layer_in_all_layers() -> None:
    """So that the first layer's backward has those of all others beside it."""
    freed, kept = (held(recompute={"router_graph": how}) for how in ("freed", "held"))
    hidden = 256 * MODEL.hidden_size * 2
    layers = MODEL.num_hidden_layers - 1
    assert MODEL.num_moe_layers >= layers
    assert kept.peak_memory - freed.peak_memory > 10 * hidden * layers
    twice = held(2, recompute={"router_graph": "held"})
    batch = 2 * 8 * 256
    more = twice.highest_by_category["activations"] - kept.highest_by_category["activations"]
    assert more == batch, "of one more microbatch, tokens and labels"


def test_a_loop_that_keeps_the_logits_has_them_through_the_backward_of_all_layers() -> None:
    loss, whole = (
        held(microbatches, 512, kernels={"logits_until": until})
        for microbatches, until in ((1, "backward"), (1, "next"))
    )
    assert whole.peak_memory - loss.peak_memory == 256 * 512 * 2
    assert held(2, 512).highest_by_category["logits"] == whole.highest_by_category["logits"]


def test_shared_keys_and_values_are_repeated_and_the_output_laid_out_again() -> None:
    kernels = routed().kernels
    values = {value.name: value.bytes for value in routed().values.values()}
    found = {kernel.name: kernel for kernel in heads_apart(kernels, repeated=True, laid_out=(1, 0))}
    core = found["attention_core"]
    assert core.reads == ("qr", "kr_all", "v0_all")
    assert "kr" not in core.saves
    assert {value.bytes for value in found["heads_repeated"].writes} == {values["qr"]}
    assert found["o_proj"].saves == ("o_laid",)
    assert heads_apart(kernels, repeated=False, laid_out=(0, 0)) == kernels


@pytest.mark.parametrize(("exchange", "name"), [("all_gather", "gather_kv_blocks"), ("ring", "ring")])
def test_repeated_heads_travel_to_the_ranks_of_a_sequence(exchange: Exchange, name: str) -> None:
    shapes = Shapes(tokens=64, seq_len=256, sequence=4, exchange=exchange, fused=True)
    kernels = attention(small(), shapes, 0).kernels
    plain = next(kernel for kernel in kernels if kernel.name == name)
    repeated = heads_apart(kernels, repeated=True, laid_out=(0, 0))
    found = {kernel.name: kernel for kernel in repeated}
    assert [kernel.name for kernel in repeated].index("heads_repeated") == kernels.index(plain)
    assert found[name].bytes == 2 * plain.bytes
    core = found["attention_core"]
    assert core.saves == ("qr", "kr_all", "v0_all", "o", "lse")
    own = plain.bytes / (4 if name == "gather_kv_blocks" else 3)
    before = next(kernel for kernel in kernels if kernel.name == "attention_core").back_scratch[-1][1]
    assert core.back_scratch[-1][1] - before == own * (5 if name == "gather_kv_blocks" else 2)
    if name == "gather_kv_blocks":
        assert found["gather_kv_again"].back_bytes == found[name].bytes


def test_repeated_heads_are_exchanged_for_slices_of_a_sequence() -> None:
    shapes = Shapes(tokens=64, seq_len=256, sequence=4, exchange="ulysses", fused=True)
    kernels = attention(small(), shapes, 0).kernels
    found = {one.name: one for one in heads_apart(kernels, repeated=True, laid_out=(0, 0))}
    sent = found["sequence_to_heads"]
    assert len({value.bytes for value in sent.writes}) == 1
    assert sent.bytes == 3 * sent.writes[0].bytes
    assert sent.reads[1:] == tuple(value.name for value in found["heads_repeated"].writes)


def test_programs_hold_nothing_unless_they_say_so() -> None:
    assert (Kernels().logits_until, Recompute().router_graph) == ("backward", "freed")


def test_streams_of_zero_3_have_pools_for_what_is_gathered_and_the_copy_that_is_sent() -> None:
    small_buffer, large = (
        simulate(
            MODEL, machine(), 1, zero_offload(8), TRAINING,
            changed("deepspeed", sharding={"reduce_buffer": size}),
        )
        for size in (1e6, 3e6)
    )  # fmt: skip
    assert large.peak_memory - small_buffer.peak_memory == 2_000_000
    less, more = (one.reserved_memory - one.peak_memory for one in (small_buffer, large))
    assert more - less == 2_000_000
    assert less >= 1_000_000
    assert (small_buffer.above_peak["copies"], large.above_peak["copies"]) == (1_000_000, 3_000_000)


def test_zero_2_fills_a_second_buffer_while_the_first_is_reduced() -> None:
    def peak(size: float, hidden: bool) -> int:
        plan = zero_offload(8)
        dense = replace(plan.dense, zero=2, reshard_after_forward=False, prefetch=0)
        plan = replace(plan, dense=dense, overlap=replace(plan.overlap, grad_reduce=hidden))
        software = changed("deepspeed", sharding={"reduce_buffer": size})
        return simulate(MODEL, machine(), 1, plan, TRAINING, software).peak_memory

    for hidden, buffers in ((False, 1), (True, 2)):
        assert peak(3e6, hidden) - peak(1e6, hidden) == buffers * 2_000_000
