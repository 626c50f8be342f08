"""Layers whose mixer is linear attention, and layers without an FFN: sizes, FLOP, traffic, splits, search."""

from itertools import product

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import MopError
from mopsim.graph.flops import flops_per_token
from mopsim.graph.layer import decoder_layer
from mopsim.graph.linear_attention import linear_attention
from mopsim.graph.shapes import Shapes
from mopsim.spec.capability import Job, refusals
from mopsim.spec.capability.table import RUNTIMES
from mopsim.spec.linear_attention import LinearAttention
from mopsim.spec.model import LayerKind, ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.tensors import active_params, parameters, total_params
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop

MIXER = LinearAttention(
    kind="mamba2", num_key_heads=2, num_value_heads=8, key_head_dim=16, value_head_dim=32, conv_kernel_dim=4,
    chunk=64,
)  # fmt: skip
TINY = load_model("tiny")
HYBRID = replace(
    TINY, layer_types=("linear_attention", "full_attention") * 2, layers_without_ffn=(2,),
    linear_attention=MIXER,
)  # fmt: skip


def test_published_totals_are_counted() -> None:
    """Nemotron 3 Nano 31.6 B (its card: 31,577,937,344), Qwen3.5 35 B, of which a token meets 3 B."""
    nano, qwen = load_model("nemotron_3_nano_30b_a3b"), load_model("qwen35_35b_a3b")
    assert total_params(nano) == 31_577_937_344
    assert active_params(nano) == pytest.approx(3.58e9, rel=0.01)
    assert total_params(qwen) == pytest.approx(34.7e9, rel=0.01)
    assert (nano.num_hidden_layers, nano.num_blocks, nano.num_linear_layers) == (29, 52, 23)
    assert (qwen.num_hidden_layers, qwen.num_blocks, qwen.num_linear_layers) == (40, 80, 30)


def test_kinds_of_layers_and_their_parameters() -> None:
    first = HYBRID.layer_kind(0)
    assert first == LayerKind(0, HYBRID.is_moe_layer(0), linear=True)
    assert HYBRID.layer_kind(2) == LayerKind(0, False, linear=True, bare=True)
    assert not HYBRID.layer_kind(1).linear
    names = [name for name in parameters(HYBRID) if name.startswith("layers.2.")]
    parts = ("in_proj.weight", "conv.weight", "conv.bias", "decay", "step_bias", "skip", "norm.weight")
    expected = [f"attention.{part}" for part in (*parts, "o_proj.weight")]
    assert names == [f"layers.2.{name}" for name in ("attention_norm.weight", *expected)]
    shapes = parameters(HYBRID)
    values, keys, heads = 8 * 32, 2 * 16, 8
    assert shapes["layers.2.attention.in_proj.weight"] == (2 * values + 2 * keys + heads, TINY.hidden_size)
    assert shapes["layers.2.attention.conv.weight"] == (values + 2 * keys, 4)


def test_flops_by_hand() -> None:
    """States made and read, 4 D S a head; within a chunk half of Q (S G + D V) products, 2 FLOP each."""
    seq, values, keys = 256, 256, 32
    scan = 4 * values * 16 + 64 * (keys + values)
    projections = 2 * TINY.hidden_size * (MIXER.projected + values)
    kinds = flops_per_token(replace(HYBRID, num_hidden_layers=1, layer_types=("linear_attention",),
                                    layers_without_ffn=(0,), first_k_dense_replace=0), seq)  # fmt: skip
    assert kinds["attention_core"] == scan
    assert kinds["attention"] == projections
    assert not {"experts", "dense_ffn", "router"} & kinds.keys()


def test_traffic_by_hand() -> None:
    """Each kernel of the scan reads and writes what its docstring says; its backward has three times that."""
    rows, b, Q = 256, 2, 64
    scan = linear_attention(HYBRID, Shapes(rows, rows)).by_name["linear_scan"]
    conv, key, value, decay = rows * 320 * b, rows * 32 * b, rows * 256 * b, rows * 8 * 4
    state, handed, square = rows / Q * 4096 * 4, rows / Q * 4096 * b, rows * 2 * Q * 4
    parts = (
        2 * conv, 3 * decay, key + value + decay + state, state + handed, 2 * key + square,
        square + 2 * decay + key + handed + 3 * value,
    )  # fmt: skip
    assert scan.bytes == sum(parts)
    assert scan.back_moved == 3 * scan.bytes


@pytest.mark.parametrize(("tensor", "sequence"), [*product((1, 2), repeat=2)])
def test_ranks_share_heads(tensor: int, sequence: int) -> None:
    """Work of all ranks is that of one; rows that ranks of a sequence exchange are sequence-parallel's."""
    seq = 512
    shapes = Shapes(seq // (tensor * sequence), seq, sequence=sequence, tensor=tensor)
    mixer = replace(MIXER, num_key_heads=4)
    model = replace(HYBRID, linear_attention=mixer)
    one, mine = linear_attention(model, Shapes(seq, seq)), linear_attention(model, shapes)
    ranks = tensor * sequence
    assert ranks <= mixer.num_key_heads
    for name in ("in_proj", "linear_scan", "o_proj"):
        assert mine.by_name[name].total_flops * ranks == pytest.approx(one.by_name[name].total_flops)
    exchanges = [kernel.name for kernel in mine.kernels if kernel.kind == "all_to_all"]
    if sequence > 1:
        sent, scanned = mine.by_name["sequence_to_heads"], mine.by_name["heads_to_sequence"]
        assert (sent.launches, scanned.launches) == (5, 1)
        assert mine.by_name["order_sequence"].bytes == 3 * 2 * sent.bytes
        assert mine.by_name["order_ranks"].bytes == 2 * 2 * scanned.bytes
    assert exchanges == (["sequence_to_heads", "heads_to_sequence"] if sequence > 1 else [])


def test_rows_by_token_are_copied_for_a_scan_of_several_sequences() -> None:
    """What was projected and what is scanned, both ways, unless one sequence is a view of itself."""
    one, many = Shapes(256, 256), Shapes(512, 256)
    plain, tape = linear_attention(HYBRID, many), linear_attention(HYBRID, replace(many, by_token=True))
    assert linear_attention(HYBRID, replace(one, by_token=True)) == linear_attention(HYBRID, one)
    assert "to_sequences" not in plain.by_name
    turned, back = tape.by_name["to_sequences"], tape.by_name["to_tokens"]
    assert (turned.bytes, turned.back_moved) == (2 * plain.by_name["in_proj"].writes[0].bytes,) * 2
    assert (back.bytes, back.back_moved, back.back_starts) == (2 * 512 * 256 * 2, 0, 0)
    assert tape.by_name["linear_scan"].bytes == plain.by_name["linear_scan"].bytes


def test_a_layer_without_ffn_is_its_mixer() -> None:
    tape = decoder_layer(HYBRID, Shapes(128, 128), 2)
    assert tape.outputs == ("z",)
    assert {kernel.component for kernel in tape.kernels} == {"attention"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ()}, "linear_attention.kind: 'mamba2' must be 'none'"),
        (
            {"linear_attention": LinearAttention()},
            "linear_attention, which needs a linear_attention.kind",
        ),
        ({"layers_without_ffn": (4,)}, r"layers_without_ffn: \[4\] must name layers"),
        ({"layers_without_ffn": (2, 2)}, "layers_without_ffn: .* ascending"),
        ({"mlp_only_layers": (2,)}, "layers_without_ffn: .* dense FFN"),
        ({"attention_output_gate": True, "attention": "mla"}, "attention_output_gate: True must be False"),
    ],
)
def test_what_makes_no_network_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(MopError, match=says):
        replace(HYBRID, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_key_heads": 0}, "num_key_heads: 0 must lie between 1"),
        ({"num_value_heads": 3}, "num_value_heads: 3 must be a multiple of num_key_heads 2"),
        ({"kind": "none"}, "num_key_heads: 2 must be 0 where kind is 'none'"),
    ],
)
def test_what_makes_no_mixer_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(MopError, match=says):
        replace(MIXER, **changes)


def test_no_chunk_is_longer_than_its_sequence() -> None:
    long = replace(HYBRID, linear_attention=replace(MIXER, chunk=1 << 20))
    whole = replace(HYBRID, linear_attention=replace(MIXER, chunk=256))
    assert linear_attention(long, Shapes(256, 256)) == linear_attention(whole, Shapes(256, 256))


def test_ranks_of_a_sequence_have_a_head_of_keys_each() -> None:
    """Four ranks, two heads of keys: each rank has one, as wide as before."""
    tape, values, keys = linear_attention(HYBRID, Shapes(128, 512, sequence=4)), 256 // 4, 16
    exchange, scan = tape.by_name["sequence_to_heads"], tape.by_name["linear_scan"]
    assert exchange.bytes == 512 * (2 * values + 2 * keys + 2) * 2
    assert scan.total_flops == 512 * (4 * values * 16 + 64 * (keys + values))


def test_tensor_ranks_divide_the_heads_of_keys() -> None:
    split = megatron(8, tensor_parallel=4)
    says = "dense.tensor_parallel: 4 does not divide linear_attention.num_key_heads 2"
    with pytest.raises(MopError, match=says):
        mopsim.simulate(HYBRID, "h100-sxm-80g", strategy=split, seq_len=512, global_batch=8)


def test_tensor_ranks_divide_the_heads_of_states() -> None:
    odd = replace(HYBRID, linear_attention=replace(MIXER, num_value_heads=6))
    says = "dense.tensor_parallel: 4 times attention.context_parallel 1 does not divide"
    with pytest.raises(MopError, match=says):
        mopsim.simulate(
            odd, "h100-sxm-80g", strategy=megatron(8, tensor_parallel=4), seq_len=512, global_batch=8
        )


@pytest.mark.parametrize("strategy", [mop(8), fsdp2(8)], ids=["mop", "fsdp2"])
def test_no_runtime_trains_it_yet(strategy: Strategy) -> None:
    hardware = load_profile("h100-sxm-80g")
    job = Job(HYBRID, strategy, TrainSpec(seq_len=512, global_batch=8), load_stack(strategy.stack), hardware)
    for runtime in RUNTIMES:
        fields = {one.field for one in refusals(job, by=runtime)}
        assert {"model.linear_attention.kind", "model.layers_without_ffn"} <= fields


MAMBA2 = ModelSpec(
    name="mamba2_1_3b", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=32, head_dim=64, vocab_size=50288, tie_word_embeddings=True,
    layer_types=("linear_attention",) * 48, layers_without_ffn=tuple(range(48)),
    linear_attention=LinearAttention(
        kind="mamba2", num_key_heads=1, num_value_heads=64, key_head_dim=128, value_head_dim=64,
        conv_kernel_dim=4, chunk=256,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("card", "tflops"), [("a100-sxm-80g", 102.5), ("h200-sxm-141g", 239.2), ("gb200-186g", 360.4)]
)
def test_a_network_of_states_alone_trains_as_fast_as_measured(card: str, tflops: float) -> None:
    """state-spaces/mamba issue 904: a Mamba-2 of this size, 4 sequences of 4,096 in bf16 on one device, in
    TFLOP/s, taken as 6 FLOP a parameter and token. Nothing here was fitted to it."""
    profile = replace(load_profile(card), devices_per_node=1)
    measured = 6 * total_params(MAMBA2) * 16384 / tflops / 1e12
    strategy = fsdp2(1, recompute="none", micro_batch=4)
    found = mopsim.simulate(
        MAMBA2, profile, strategy=strategy, seq_len=4096, global_batch=4, stack="generic-eager"
    )
    assert found["step_time_s"] == pytest.approx(measured, rel=0.1)
