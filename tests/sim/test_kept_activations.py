"""What a layer keeps for its backward, with and without recomputation, against formulas and hand counts."""

from typing import Any, Literal

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.graph.layer import decoder_layer
from mopsim.graph.liveness import forward
from mopsim.graph.rewrites.quantized import quantized
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.shapes import Shapes
from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.program.works import Part, works
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Activations, Experts
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop
from mopsim.validate.rows import read_case
from tests.sim.test_validate import MODELS, row
from tests.sim.toys import machine, small
from tests.software import changed


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_activations_of_a_gpt_layer(tensor: int) -> None:
    """arXiv 2205.05198 equation 4 with selective recomputation: 34 s b h / t, of which 2 are dropout masks.

    Flash attention keeps one fp32 number per row and head instead of the 5 a s / h of the unfused core.
    """
    model = load_model("gpt3_175b")
    s, h, a = 2048, model.hidden_size, model.num_attention_heads
    tape = decoder_layer(model, Shapes(s // tensor, s, tensor=tensor, fused=True), 0)
    kept = sum(size for item in forward(tape, plan(tape, "none", ())) for _, size in item.memory)
    assert kept == (32 * s * h + 4 * s * a) // tensor  # the output counts for the input: a stack of layers

    boundary = sum(size for item in forward(tape, plan(tape, "full", ())) for _, size in item.memory)
    assert boundary == 2 * s * h // tensor


def test_a_kept_product_of_partial_sums_may_stay_scattered() -> None:
    model, s, tensor = load_model("gpt3_175b"), 2048, 2
    tape = decoder_layer(model, Shapes(s // tensor, s, tensor=tensor, fused=True), 0)
    kept = [
        sum(
            size
            for item in forward(tape, plan(tape, "full", (), ("o_proj",), scattered=one))
            for _, size in item.memory
        )
        for one in (False, True)
    ]
    whole = 2 * s * model.hidden_size
    assert kept == [whole // tensor + whole, whole // tensor + whole // tensor]


def test_selective_recomputation_drops_what_it_names() -> None:
    model = load_model("deepseek_v3")
    shapes = Shapes(4096, 4096, fused=True)
    rows = (1024,) * 32
    tape = decoder_layer(model, shapes, 10, rows, True)

    def kept(*modules: str) -> int:
        chosen = plan(tape, "selective", modules)
        return sum(size for item in forward(tape, chosen) for _, size in item.memory)

    heads, n = model.num_attention_heads, 4096
    assert kept() - kept("mla_up_proj") == 2 * n * heads * (192 + 192 + 128)
    assert kept() - kept("moe_act") == 2 * sum(rows) * model.moe_intermediate_size
    assert kept() - kept("layernorm") == 2 * 2 * n * model.hidden_size
    assert kept() - kept("core_attn") == 4 * n * heads
    assert kept("moe") < kept("moe_act")


@pytest.mark.parametrize(
    ("name", "layer", "rows", "dropped"),
    [
        ("qwen3_30b_a3b", 0, (1024,) * 32, 1),  # before the router
        ("llama3_8b", 0, (), 0),
        ("deepseek_v3", 0, (), 1),  # before the down-projections, not before the dense FFN
        ("deepseek_v3", 10, (1024,) * 32, 2),
    ],
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_norm_inside_a_product_is_not_recomputed(
    name: str, layer: int, rows: tuple[int, ...], dropped: int, tensor: int
) -> None:
    """Transformer Engine's LayerNormLinear has its output for the weight gradient; in 8 bits too."""
    model, within = load_model(name), load_stack("megatron-core").kernels.norm_within
    tape = decoder_layer(model, Shapes(4096, 4096, tensor=tensor, fused=True), layer, rows, bool(rows))

    def kept(*modules: str) -> int:
        chosen = plan(tape, "selective", modules, within=within)
        return sum(size for item in forward(tape, chosen) for _, size in item.memory)

    assert kept() - kept("layernorm") == dropped * 2 * 4096 * model.hidden_size
    in_eight = quantized(tape, 0.5, ("layernorm",), within)
    casts = {kernel.name for kernel in in_eight.kernels if f"{kernel.name}_in" in kernel.saves}
    assert ("qkv_proj" in casts) == (model.attention == "gqa")


def _kept(stack: str, recompute: Literal["none", "selective"], tensor: int = 1, **kernels: str) -> list[int]:
    """Bytes that a dense layer and one of experts keep of 32 tokens, one microbatch of a rank."""
    own = changed(stack, kernels=dict(kernels))
    strategy = replace(fsdp2(8, tensor_parallel=tensor), activations=Activations(recompute=recompute))
    training = TrainSpec(seq_len=32 * tensor, global_batch=8 // tensor, routing="balanced")
    passes = Passes(make_context(small(), own.resolve(strategy), training, 8, own))
    return [sum(size for _, size in passes.kept(layer)) for layer in (0, 2)]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_layer_of_experts_keeps_what_its_program_says_whatever_splits_it(tensor: int) -> None:
    """Compiled module by module in a checkpoint: the attention's output and a number a row and head."""
    dense, routed = _kept("torchtitan-compile", "selective", tensor)
    assert routed == 32 * 8 * (16 * 2 + 4) < dense


@pytest.mark.parametrize("stack", ["torchtitan-compile-2026", "torchtitan-2026"])
def test_selective_checkpoints_keep_what_exchanges_bring(stack: str) -> None:
    """torchtitan's SelectiveAC (all_to_all_single is in its list): a recomputation exchanges nothing."""
    own, training = load_stack(stack), TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    strategy = replace(fsdp2(8, expert_parallel=8), activations=Activations(recompute="selective"))
    context = make_context(load_model("qwen3_30b_a3b"), own.resolve(strategy), training, 8, own)
    tape, kept = Passes(context).tape(1), own.recompute.kept_routed
    chosen = plan(tape, "full", (), kept, own.recompute.stops_early)
    again = {tape.kernels[index].name for region in chosen.again for index in region}
    assert any(name.startswith("experts_") for name in again)
    assert not again & {"dispatch", "combine"}
    assert {"sent_arrived", "back_returned"} <= chosen.kept


def test_route_weights_on_a_wide_copy_keep_it_and_where_its_rows_go() -> None:
    fused, wide = (_kept("torchtitan-compile", "none", expert_rows=rows) for rows in ("fused", "wide"))
    assert wide[0] == fused[0]
    assert wide[1] - fused[1] == 32 * 2 * (64 * 4 + 16)


@pytest.mark.parametrize(("stack", "kept"), [("torchtitan-compile-2026", 5), ("torchtitan-2026", 10)])
def test_rows_that_are_weighed_before_they_are_added(stack: str, kept: int) -> None:
    """Tensors of routed rows that gpt_oss's MoE module keeps under autograd (torchtitan 1690e0aea on a CPU,
    torch.autograd.graph.saved_tensors_hooks), compiled: input, gate and up, activation, output; not: the
    gate clamped, its sigmoid, their product, the other half too, and the output in fp32. Each row is added to
    its token, its gradient to the token's, and to its expert's biases', of gate and up and of the output."""
    own, model = changed(stack, kernels={"expert_bias": "added"}), load_model("gpt_oss_20b")
    strategy = replace(fsdp2(8), activations=Activations(recompute="none"))
    training = TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    context = make_context(model, own.resolve(strategy), training, 8, own)
    tape, rows = Passes(context).tape(1), 32 * model.num_experts_per_tok * model.hidden_size
    sizes = [tape.values[name].bytes for name in tape.kept]
    assert sum(size for size in sizes if size >= 2 * rows) == kept * 2 * rows
    parts: tuple[Part, Part] = ("forward", "backward")
    sums = {
        (kernel.name, part): found
        for kernel in tape.kernels
        for part in parts
        if (found := sum(work.sums + work.ordered for work in works(kernel, part, context)))
    }
    assert sums == {
        ("accumulate", "forward"): rows + 32 * model.hidden_size // 2, ("permute", "backward"): rows,
        ("experts_up_bias", "backward"): 2 * rows, ("experts_down_bias", "backward"): rows,
    }  # fmt: skip


@pytest.mark.parametrize("stack", ["torchtitan-compile-2026", "torchtitan-2026"])
def test_rows_that_come_home_summed_are_weighed_before_they_leave(stack: str) -> None:
    """DeepEPTokenDispatcher.combine has no weights (torchtitan 00f6ac29, common/token_dispatcher.py)."""
    own, training = load_stack(stack), TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    for dispatcher, there in (("alltoall", {"weigh"}), ("deepep", set())):
        strategy = fsdp2(8, expert_parallel=8)
        strategy = replace(strategy, experts=replace(strategy.experts, token_dispatcher=dispatcher))
        context = make_context(load_model("qwen3_30b_a3b"), own.resolve(strategy), training, 8, own)
        assert {one.name for one in Passes(context).tape(1).kernels if one.name == "weigh"} == there


def test_sinks_applied_to_what_attention_found_keep_both() -> None:
    """As the graph of gpt_oss's block keeps them (torchtitan 1690e0aea on a CPU)."""
    model = load_model("gpt_oss_20b")
    strategy = replace(fsdp2(8), activations=Activations(recompute="none"))
    training = TrainSpec(seq_len=32, global_batch=8, routing="balanced")
    tapes = [
        Passes(make_context(model, own.resolve(strategy), training, 8, own)).tape(1)
        for sinks in ("fused", "composed")
        if (own := changed("torchtitan-compile-2026", kernels={"sinks": sinks}))
    ]
    kept, more = ({name: tape.values[name].bytes for name in tape.kept} for tape in tapes)
    assert more == kept | {"o_scaled": 32 * 64 * 64 * 2}


@pytest.mark.parametrize(("sequences", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_tables_gathered_by_position_and_an_output_laid_out_anew_are_kept(
    sequences: int, tensor: int
) -> None:
    """Four tables of the head's width for each row, and what the product reads beside what attention wrote
    (Aleph-Alpha/scaling@737f855, core/nn/rotary.py and core/nn/attention/attention.py)."""
    strategy = replace(megatron(8, tensor_parallel=tensor, micro_batch=sequences), stack="aleph-scaling")
    training = TrainSpec(seq_len=32, global_batch=sequences * 8 // tensor, routing="balanced")
    once = changed("aleph-scaling", kernels={"rotary": "halves", "attention_rows": "tokens"})
    tapes = [
        Passes(make_context(small(), own.resolve(strategy), training, 8, own)).tape(0)
        for own in (once, load_stack("aleph-scaling"))
    ]
    plain, kept = ({name: tape.values[name].bytes for name in tape.kept} for tape in tapes)
    rows, laid = 32 * sequences, plain["o"]
    assert laid == rows * 8 * 16 * 2 // tensor
    assert kept == plain | {"rope_tables": 4 * rows * 16 * 2} | ({"o_laid": laid} if sequences > 1 else {})
    if sequences > 1:
        copies = tapes[1].by_name["heads_laid"]
        assert (copies.bytes, copies.back_bytes, copies.launches) == (4 * laid, 4 * laid, 2)


def test_split_experts_route_the_tokens_of_all_their_ranks() -> None:
    """32 tokens of a rank, 64 of two: twice the routes of half of every expert; as many products."""
    found = {}
    for rows in ((), ("routed",)):
        own = changed("torchtitan", kernels={"exchanged_rows": rows})
        strategy = replace(
            fsdp2(8, tensor_parallel=2), experts=Experts(expert_parallel=4, expert_tensor_parallel=2)
        )
        training = TrainSpec(seq_len=64, global_batch=4, routing="balanced")
        kernels = Passes(make_context(small(), strategy, training, 8, own)).tape(2).by_name
        products = sum(one.total_flops for one in kernels.values() if one.kind == "grouped_matmul")
        found[rows] = products, kernels["dispatch"].bytes, kernels
    (flops, sent, apart), (whole_flops, whole_sent, whole) = found.values()
    assert (whole_flops, whole_sent, sent) == (flops, 2 * sent, 32 * 2 * 64 * 2)
    assert {"gather_rows", "scatter_rows"} & set(apart) - set(whole) == {"gather_rows", "scatter_rows"}
    assert (whole["gather_tokens"].bytes, whole["routes_sum"].back_bytes) == (64 * 64 * 2, 64 * 2 * 64 * 2)
    assert whole["gather_tokens"].back_bytes == whole["routes_sum"].bytes == 0


@pytest.mark.parametrize(
    ("activation", "function", "kept"),
    [("composed", "gelu", 4), ("tanh", "gelu", 10), ("tanh_wide", "gelu", 16), ("tanh", "relu2", 4)],
)
def test_gelu_of_operators_keeps_their_results(activation: str, function: Any, kept: int) -> None:
    """Bytes of an element between two products in bf16, as transformers' NewGELUActivation and torch's own
    gelu save them (torch.autograd.graph.saved_tensors_hooks, torch 2.13; of autocast on GPUs the cube is in
    fp32)."""
    model = replace(load_model("gpt3_175b"), num_hidden_layers=2, ffn_activation=function)
    stack, training = (
        changed("generic-eager", kernels={"activation": activation}),
        TrainSpec(seq_len=256, global_batch=1),
    )
    passes = Passes(make_context(model, megatron(1), training, 1, stack))
    held: dict[str, int] = {}
    for item in forward(tape := passes.tape(0), plan(tape, "none", ())):
        held[item.kernel.name] = sum(size for _, size in item.memory)
    assert held["act"] + held["up_proj"] == kept * 256 * model.intermediate_size


@pytest.mark.parametrize("rows", ["composed", "wide"])
def test_gates_of_a_program_with_such_a_gelu_are_composed(rows: str) -> None:
    """Of dense layers and of experts."""
    model, made = replace(load_model("qwen3_30b_a3b"), num_hidden_layers=1), []
    for activation in ("composed", "tanh", "tanh_wide"):
        stack = changed("generic-eager", kernels={"activation": activation, "expert_rows": rows})
        context = make_context(model, megatron(1), TrainSpec(seq_len=256, global_batch=1), 1, stack)
        made.append(Passes(context).tape(0).kernels)
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(("recompute", "layers"), [("none", 2), ("full", 1)])
def test_casts_of_weights_under_autocast_are_kept(recompute: Literal["none", "full"], layers: int) -> None:
    """As a linear layer of torch saves the cast of its weight under torch.autocast, never the weight; where
    layers are made again, those of one."""
    model = replace(load_model("llama3_8b"), num_hidden_layers=2, vocab_size=1000)
    each = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) * 2
    strategy = megatron(1, recompute=recompute)
    for param, casts in (("float32", layers * each + (layers - 1) * 4096 * 1000 * 2), ("bfloat16", 0)):
        precision = replace(strategy.precision, param=param, grad=param, master="param")
        result = simulate(
            model, load_profile("h200-sxm-141g"), 1, replace(strategy, precision=precision),
            TrainSpec(seq_len=256, global_batch=1), load_stack("generic-eager"),
        )  # fmt: skip
        assert result.highest_by_category["gathered"] == casts


def test_a_weight_has_a_cast_of_autocast_and_a_narrow_one_beside_it() -> None:
    """Fp8 products that keep cast weights, of weights that autocast casts first: two values."""
    strategy, kept = megatron(1, recompute="none"), {}
    training = TrainSpec(seq_len=32, global_batch=1)
    precision = replace(strategy.precision, param="float32", grad="float32", master="param", matmul="fp8")
    strategy = replace(strategy, precision=precision, dense=replace(strategy.dense, zero=0))
    for casts in ("kept", "step"):
        software = changed("internlm-2023", kernels={"autocast": True, "weight_casts": casts})
        tape = Passes(make_context(small(), strategy, training, 1, software)).tape(0)
        kept[casts] = {one for one in tape.kept if one.startswith("qkv_proj_")}
    assert {"qkv_proj_cast", "qkv_proj_narrow"} <= kept["kept"]
    assert "qkv_proj_narrow" not in kept["step"]


@pytest.mark.parametrize(
    ("stack", "passes"),
    [("megatron-core", 1), ("torchtitan", 2), ("torchtitan-2026", 2), ("torchtitan-compile", 0)],
)
def test_weights_that_multiply_inputs_keep_what_they_multiply(stack: str, passes: int) -> None:
    """Rows as they came (Megatron-Core), or in fp32 (torchtitan): neither was simulated. A compiler makes
    them anew."""
    network = small(first_k_dense_replace=0, expert_inputs_weighted=True)
    make = megatron if stack == "megatron-core" else fsdp2
    strategy, training = make(4, expert_parallel=2, recompute="none"), TrainSpec(seq_len=32, global_batch=4)
    kept = []
    for way in (load_stack(stack).kernels.weighted_inputs, "tokens"):
        software = changed(stack, kernels={"weighted_inputs": way})
        tape = Passes(make_context(network, strategy, training, 4, software)).tape(0)
        kept.append(sum(tape.values[name].bytes for name in set(tape.kept) - {"weight"}))
        assert [one.name for one in tape.kernels].count("weigh_inputs") == (way != "tokens")
    assert kept[0] - kept[1] == passes * 32 * network.num_experts_per_tok * network.hidden_size * 2


@pytest.mark.parametrize("stack", ["mopexec-flat", "mopexec-flat-nested", "mop-papers"])
def test_weights_that_multiply_inputs_are_gone_when_the_step_ends(stack: str) -> None:
    """Where autograd runs the experts' backward, their gradient was taken for the weights, which were left
    over: a traceback for Llama 4 on mop-papers."""
    network, training = small(expert_inputs_weighted=True), TrainSpec(seq_len=32, global_batch=4)
    result = simulate(network, machine(), 1, mop(4, expert_parallel=2), training, load_stack(stack))
    assert result.fits


@pytest.mark.parametrize(("month", "kept"), [("2026-02", False), ("2026-04", True), ("2026-06", True)])
def test_torchtitan_keeps_products_with_biases_since_its_list_has_them(month: str, kept: bool) -> None:
    cells = {"stack": "", "model": "gpt_oss_20b", "sharding": "zero3", "recompute": "selective"}
    made = read_case(row(**cells, notes=f"torchtitan, {month}"), MODELS).program()
    assert ("q_proj" in made.recompute.kept_routed) == kept
