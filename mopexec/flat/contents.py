"""What the flat units hold: parameter names, shapes and order, from the model spec."""

from mopexec.flat.units import Contents, Shape
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
    if spec.shared_expert_intermediate_size:
        names += _swiglu("moe.shared", spec.hidden_size, spec.shared_expert_intermediate_size)
    local, inner = spec.num_local_experts // degree, spec.moe_intermediate_size
    experts: Named = [
        ("moe.experts.gate_proj", (spec.hidden_size, inner)),
        ("moe.experts.up_proj", (spec.hidden_size, inner)),
        ("moe.experts.down_proj", (inner, spec.hidden_size)),
    ]
    stacked = _with_prefix(prefix, "experts", experts, local, place * local, spec.num_local_experts)
    return _with_prefix(prefix, "dense", names), stacked


def _with_prefix(
    prefix: str, key: str, names: Named, stack: int = 0, first: int = 0, total: int = 0
) -> Contents:
    full = tuple((prefix + name, shape) for name, shape in names)
    return Contents(prefix + key, full, prefix, stack=stack, first=first, total_stack=total)


def _attention(spec: ModelSpec) -> Named:
    hidden, size = spec.hidden_size, spec.head_dim
    width, kv_width = spec.num_attention_heads * size, spec.num_key_value_heads * size
    names: Named = [
        ("attention_norm.weight", (hidden,)),
        ("attention.q_proj.weight", (width, hidden)),
        ("attention.k_proj.weight", (kv_width, hidden)),
        ("attention.v_proj.weight", (kv_width, hidden)),
        ("attention.o_proj.weight", (hidden, width)),
    ]
    if spec.qk_norm == "head":
        names += [("attention.q_norm.weight", (size,)), ("attention.k_norm.weight", (size,))]
    return [*names, ("ffn_norm.weight", (hidden,))]


def _swiglu(prefix: str, hidden: int, inner: int) -> Named:
    return [
        (f"{prefix}.gate_proj.weight", (inner, hidden)),
        (f"{prefix}.up_proj.weight", (inner, hidden)),
        (f"{prefix}.down_proj.weight", (hidden, inner)),
    ]
