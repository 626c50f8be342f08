"""What the flat units hold: parameter names, shapes and order, from the model spec."""

from mopexec.flat.units import Contents, Shape
from mopexec.model.attention import value_width
from mopsim.spec.model import ModelSpec

Named = list[tuple[str, Shape]]


def outer_contents(spec: ModelSpec, rows: tuple[int, int] | None) -> tuple[Contents, Contents, Contents]:
    """Embedding, final norm and head; rows: the vocabulary interval where the head is split."""
    table = (spec.vocab_size, spec.hidden_size)
    return (
        Contents("embedding", (("embedding.weight", table),)),
        Contents("final", (("final_norm.weight", (spec.hidden_size,)),)),
        Contents("head", (("head.weight", table),), rows=rows),
    )


def layer_contents(spec: ModelSpec, index: int, degree: int, place: int) -> tuple[Contents, Contents | None]:
    """A layer's dense unit, and its experts unit at `place` of `degree` where it is MoE."""
    prefix = f"layers.{index}."
    names = _attention(spec)
    if not spec.is_moe_layer(index):
        names += _swiglu("ffn", spec.hidden_size, spec.intermediate_size)
        return _with_prefix(prefix, "dense", names), None
    names.append(("moe.router.weight", (spec.num_local_experts, spec.hidden_size)))
    if spec.router_bias:
        names.append(("moe.router.bias", (spec.num_local_experts,)))
    if spec.shared_expert_intermediate_size:
        names += _swiglu("moe.shared", spec.hidden_size, spec.shared_expert_intermediate_size)
    if spec.shared_expert_gate:
        names.append(("moe.shared_gate.weight", (1, spec.hidden_size)))
    local, inner = spec.num_local_experts // degree, spec.moe_intermediate_size
    experts: Named = []
    for name, shape in (
        ("gate_proj", (spec.hidden_size, inner)),
        ("up_proj", (spec.hidden_size, inner)),
        ("down_proj", (inner, spec.hidden_size)),
    ):
        experts.append((f"moe.experts.{name}", shape))
        if spec.expert_bias:
            experts.append((f"moe.experts.{name}_bias", shape[1:]))
    stacked = _with_prefix(prefix, "experts", experts, local, place * local, spec.num_local_experts)
    return _with_prefix(prefix, "dense", names), stacked


def _with_prefix(
    prefix: str, key: str, names: Named, stack: int = 0, first: int = 0, total: int = 0
) -> Contents:
    full = tuple((prefix + name, shape) for name, shape in names)
    return Contents(prefix + key, full, prefix, stack=stack, first=first, total_stack=total)


def _attention(spec: ModelSpec) -> Named:
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    names: Named = [("attention_norm.weight", (hidden,))]
    names += (_latent if spec.attention == "mla" else _grouped)(spec)
    names.append(("attention.o_proj.weight", (hidden, heads * value_width(spec))))
    if spec.attention_bias == "qkvo":
        names.append(("attention.o_proj.bias", (hidden,)))
    if spec.attention_sinks:
        names.append(("attention.sinks", (heads,)))
    return [*names, ("ffn_norm.weight", (hidden,))]


def _grouped(spec: ModelSpec) -> Named:
    size = spec.head_dim
    kv_width = spec.num_key_value_heads * size
    widths = {"q": spec.num_attention_heads * size, "k": kv_width, "v": kv_width}
    names: Named = []
    for name, width in widths.items():
        names.append((f"attention.{name}_proj.weight", (width, spec.hidden_size)))
        if spec.attention_bias != "none":
            names.append((f"attention.{name}_proj.bias", (width,)))
    for name in () if spec.qk_norm == "none" else "qk":
        width = size if spec.qk_norm == "head" else widths[name]
        names.append((f"attention.{name}_norm.weight", (width,)))
    return names


def _latent(spec: ModelSpec) -> Named:
    hidden, heads, rank = spec.hidden_size, spec.num_attention_heads, spec.kv_lora_rank
    names: Named = [("attention.q_proj.weight", (heads * spec.head_dim, hidden))]
    if spec.q_lora_rank:
        names = [
            ("attention.q_a_proj.weight", (spec.q_lora_rank, hidden)),
            ("attention.q_a_norm.weight", (spec.q_lora_rank,)),
            ("attention.q_b_proj.weight", (heads * spec.head_dim, spec.q_lora_rank)),
        ]
    up = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    return [
        *names,
        ("attention.kv_a_proj.weight", (rank + spec.qk_rope_head_dim, hidden)),
        ("attention.kv_a_norm.weight", (rank,)),
        ("attention.kv_b_proj.weight", (up, rank)),
    ]


def _swiglu(prefix: str, hidden: int, inner: int) -> Named:
    return [
        (f"{prefix}.gate_proj.weight", (inner, hidden)),
        (f"{prefix}.up_proj.weight", (inner, hidden)),
        (f"{prefix}.down_proj.weight", (hidden, inner)),
    ]
