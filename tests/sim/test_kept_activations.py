"""What a layer keeps for its backward, with and without recomputation, against formulas and hand counts."""

import pytest

from mopsim.graph.layer import decoder_layer
from mopsim.graph.liveness import forward
from mopsim.graph.rewrites.quantized import quantized
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.shapes import Shapes
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack


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
