"""What the fields of a ModelSpec must be, each by itself and beside each other."""

from itertools import chain, pairwise
from operator import attrgetter
from typing import TYPE_CHECKING

from mopsim.common.errors import Rules
from mopsim.spec.layer_fields import LINEAR, MOST_LAYERS, MOST_TOKENS, WINDOWS

if TYPE_CHECKING:
    from mopsim.spec.model import ModelSpec

_NEEDED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_OPTIONAL = (
    "intermediate_size", "first_k_dense_replace", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "moe_latent_size", "shared_expert_intermediate_size", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "sliding_window",
    "attention_chunk_size", "learned_positions", "num_nextn_predict_layers",
)  # fmt: skip
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = (
    "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size", "shared_expert_intermediate_size",
)  # fmt: skip
_RANGES = (
    ("rms_norm_eps", 1e-12, 0.1), ("routed_scaling_factor", 1e-3, 1e3), ("rope_theta", 1.0, 1e12),
    ("sliding_window_period", 1, 10_000), ("num_local_experts", 0, 2**16),
    ("num_nextn_predict_layers", 0, 100), ("n_group", 1, 2**16), ("topk_group", 1, 2**16),
    ("swiglu_limit", 0.0, 1e6), ("swiglu_alpha", 1e-3, 1e3), ("floor_scale", 1, MOST_TOKENS),
    ("attn_scale", 0.0, 10.0),
)  # fmt: skip

_ROTARY = {
    "rope_theta": 10000.0, "rope_interleave": False, "partial_rotary_factor": 1.0,
    "full_attention_rotary": True, "rope_scaling.rope_type": "default",
}  # fmt: skip
"""Fields of rotary positions, and what they are of a network that has none."""
_TEMPERATURE = {"floor_scale": 8192, "attn_scale": 0.1}
"""Fields of queries scaled by their position, and what they are of a network that scales none."""


def sizes(m: "ModelSpec") -> Rules:
    """Each size by itself."""
    for field in _NEEDED:
        yield getattr(m, field) >= 1, field, "must be at least 1"
        yield getattr(m, field) <= 2**40, field, "must be at most 2^40"
    rule = f"must be at most {MOST_LAYERS}"
    yield m.num_hidden_layers <= MOST_LAYERS, "num_hidden_layers", rule
    for field in _OPTIONAL:
        yield getattr(m, field) >= 0, field, "must not be negative"
        yield getattr(m, field) <= 2**40, field, "must be at most 2^40"


def relations(m: "ModelSpec") -> Rules:
    """Fields beside each other."""
    yield from chain(_layers(m), _linear(m), _rotary(m), _attention(m), _numbers(m), _groups(m))


def _layers(m: "ModelSpec") -> Rules:
    """Dense layers have an FFN; MoE layers have experts to choose from."""
    heads, layers, experts = m.num_attention_heads, m.num_hidden_layers, m.num_local_experts
    grouped = f"does not divide num_attention_heads {heads}"
    yield heads % m.num_key_value_heads == 0, "num_key_value_heads", grouped
    more = f"is more than num_hidden_layers {layers}"
    yield m.first_k_dense_replace <= layers, "first_k_dense_replace", more
    yield from _apart(m)
    dense = "must be at least 1 where a layer is dense"
    yield m.num_dense_layers == 0 or m.intermediate_size >= 1, "intermediate_size", dense
    if experts:
        rule = f"must lie between 1 and num_local_experts {experts}"
        yield 1 <= m.num_experts_per_tok <= experts, "num_experts_per_tok", rule
        rule = "must be at least 1 where there are experts"
        yield m.moe_intermediate_size >= 1, "moe_intermediate_size", rule
    else:
        rule = "must be 0 where num_local_experts is 0: there are no MoE layers"
        for field in _MOE:
            yield getattr(m, field) == 0, field, rule


def _apart(m: "ModelSpec") -> Rules:
    """Layers that are named one by one."""
    layers, dense, bare = m.num_hidden_layers, m.mlp_only_layers, m.layers_without_ffn
    rule = "must be empty where num_local_experts is 0: there are no MoE layers"
    yield m.num_local_experts > 0 or not dense, "mlp_only_layers", rule
    rule = f"must name layers after the first_k_dense_replace {m.first_k_dense_replace} leading ones, below "
    for field, named in (("mlp_only_layers", dense), ("layers_without_ffn", bare)):
        inside = all(m.first_k_dense_replace <= layer < layers for layer in named)
        yield inside, field, f"{rule}num_hidden_layers {layers}"
        ascending = all(one < other for one, other in pairwise(named))
        yield ascending, field, "must name each layer once, in ascending order"
    rule = "must name no layer of mlp_only_layers, which have a dense FFN"
    yield not {*dense} & {*bare}, "layers_without_ffn", rule
    types = m.layer_types
    rule = f"is of {len(types)} layers, not the num_hidden_layers {layers}"
    yield len(types) in (0, layers), "layer_types", rule
    yield not types or m.sliding_window_period == 1, "sliding_window_period", "must be 1 beside layer_types"
    both = m.sliding_window > 0 and m.attention_chunk_size > 0
    yield not both, "attention_chunk_size", "must be 0 beside a sliding_window"
    for field, word in WINDOWS.items():
        yield not types or word in types or getattr(m, field) == 0, field, "is of no layer in layer_types"
        rule = f"has {word}, which needs a {field}"
        yield word not in types or getattr(m, field) > 0, "layer_types", rule


def _linear(m: "ModelSpec") -> Rules:
    """Layers of linear attention have a mixer, and a mixer has layers."""
    kind, there = m.linear_attention.kind, LINEAR in m.layer_types
    yield there or kind == "none", "linear_attention.kind", f"must be 'none': no layer_types are {LINEAR}"
    rule = f"has {LINEAR}, which needs a linear_attention.kind"
    yield not there or kind != "none", "layer_types", rule
    gated = m.attention_output_gate and m.attention == "mla"
    yield not gated, "attention_output_gate", "must be False for mla"


def _attention(m: "ModelSpec") -> Rules:
    for field in ("total_params", "active_params"):
        value = getattr(m, field)
        yield value is None or 1 <= value <= 1e18, field, "must lie between 1 and 1e18"
    latent = m.attention == "mla"
    yield m.full_attention_rotary or not latent, "full_attention_rotary", "must be True for mla"
    ordered = m.sliding_window or m.attention_chunk_size or LINEAR in m.layer_types
    rule = "must be True where no layer has a window: no layer would have rotary positions"
    yield bool(m.full_attention_rotary or ordered), "full_attention_rotary", rule
    tuned = m.attn_temperature_tuning and m.full_attention_rotary
    yield not tuned, "attn_temperature_tuning", "needs full_attention_rotary False: it is of the others"
    for field, usual in _TEMPERATURE.items() if not m.attn_temperature_tuning else ():
        rule = f"must be {usual!r}, the default, where attn_temperature_tuning is False: nothing is scaled"
        yield getattr(m, field) == usual, field, rule
    if m.sparse_attention.index_topk:
        rule = (
            "must be at least 1 beside a sparse_attention.index_topk: the indexer reads the queries' latent"
        )
        yield m.q_lora_rank >= 1, "q_lora_rank", rule
        yield latent, "attention", "must be 'mla' beside a sparse_attention.index_topk"
        field, rule = "sparse_attention.index_skip_topk_offset", "is more than num_hidden_layers"
        leading = m.sparse_attention.index_skip_topk_offset <= m.num_hidden_layers
        yield leading, field, f"{rule} {m.num_hidden_layers}"
    if not latent:
        for field in _MLA:
            yield getattr(m, field) == 0, field, "must be 0 for gqa"
        return
    for field in _MLA[1:]:
        yield getattr(m, field) >= 1, field, "must be at least 1 for mla"
    parts = m.qk_nope_head_dim + m.qk_rope_head_dim
    yield m.head_dim == parts, "head_dim", "must be qk_nope_head_dim + qk_rope_head_dim for mla"


def _rotary(m: "ModelSpec") -> Rules:
    """Positions that are not learned turn pairs of elements."""
    latent, part, pairs = m.attention == "mla", m.partial_rotary_factor, "rotary positions turn pairs"
    yield not (latent and m.learned_positions), "learned_positions", "must be 0 for mla"
    for field, usual in _ROTARY.items() if m.learned_positions else ():
        rule = f"must be {usual!r}, the default, beside learned_positions: nothing is rotated"
        yield attrgetter(field)(m) == usual, field, rule
    unturned = m.qk_norm == "unweighted" and m.learned_positions > 0
    rule = "is of rotated queries and keys, and beside learned_positions nothing is rotated"
    yield not unturned, "qk_norm", rule
    yield 0 < part <= 1, "partial_rotary_factor", "must be above 0 and at most 1"
    yield part == 1 or not latent, "partial_rotary_factor", "must be 1 for mla"
    turned = m.qk_rope_head_dim if latent else m.head_dim * part
    even = m.rotary_dim >= 2 and m.rotary_dim % 2 == 0 and abs(turned - m.rotary_dim) < 1e-6
    name, rule = "qk_rope_head_dim" if latent else "head_dim", f"must be even: {pairs} of elements"
    if part < 1:
        name, rule = "partial_rotary_factor", f"turns {turned:g} of the {m.head_dim} elements of a head, "
        rule += f"which must be an even number: {pairs}"
    yield even or m.learned_positions > 0, name, rule


def _groups(m: "ModelSpec") -> Rules:
    """Experts are chosen from some groups of equal size, which hold enough of them."""
    greedy = m.topk_method == "greedy"
    for field in ("n_group", "topk_group"):
        rule = "must be 1 for topk_method 'greedy'"
        yield not greedy or getattr(m, field) == 1, field, rule
    yield m.topk_group <= m.n_group, "topk_group", f"is more than n_group {m.n_group}"
    if greedy:
        return
    experts = m.num_local_experts
    yield experts % m.n_group == 0, "n_group", f"does not divide num_local_experts {experts}"
    size = experts // m.n_group
    held = f"groups of {size} experts hold fewer than num_experts_per_tok {m.num_experts_per_tok}"
    yield m.topk_group * size >= m.num_experts_per_tok, "topk_group", held
    two = m.topk_method != "noaux_tc" or size >= 2
    yield two, "n_group", "leaves groups of one expert, and 'noaux_tc' takes the best two"


def _numbers(m: "ModelSpec") -> Rules:
    for field, low, high in _RANGES:
        yield low <= getattr(m, field) <= high, field, f"must lie between {low:g} and {high:g}"
    gate, other = m.ffn_matrices == 3, "must be 'gelu', the default, where ffn_matrices is 3: SwiGLU's gate"
    yield gate or not m.swiglu_limit, "swiglu_limit", "must be 0 where ffn_matrices is 2: there is no gate"
    yield m.ffn_activation == "gelu" or not gate, "ffn_activation", other
    biased = m.norm_bias or m.norm == "layernorm"
    yield biased, "norm_bias", f"must be True, the default, where norm is {m.norm!r}, which has no bias"
    gated = "gates nothing: shared_expert_intermediate_size is 0"
    yield m.shared_expert_intermediate_size >= 1 or not m.shared_expert_gate, "shared_expert_gate", gated
    yield 0 <= m.dropout < 1, "dropout", "must lie in [0, 1)"
