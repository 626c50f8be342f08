"""ModelSpec: the dimensions of a transformer, in Hugging Face field names."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from mopsim.common.errors import Rules, require_name
from mopsim.common.io import Spec
from mopsim.spec.layer_fields import WINDOWS, LayerType, window_fields
from mopsim.spec.rope import RopeScaling

DESCRIPTION = ("name", "source", "assumptions", "total_params", "active_params")
"""Fields of a ModelSpec that say something about the network and do not change it."""


MOST_LAYERS, MOST_TOKENS = 10_000, 2**40


class LayerKind(NamedTuple):
    """Of a layer: the window of its attention (0: none), whether it routes to experts."""

    window: int
    routed: bool


class ModelSpec(Spec, frozen=True, kw_only=True):
    """A decoder-only transformer, in the field names of Hugging Face configs. 0 means none.

    name: one line of text, as it appears in tables. hidden_size: width of the residual stream.
    num_hidden_layers: decoder layers, MTP layers not counted. num_attention_heads: query heads.
    num_key_value_heads: key and value heads (GQA). head_dim: width of a head of queries and keys; for MLA, of
    its two parts together. vocab_size: rows of the embedding. intermediate_size: columns of a dense FFN.
    first_k_dense_replace: leading layers that are dense. mlp_only_layers: later layers that are dense too,
    counted from 0; the others route to experts. num_local_experts: routed experts of a layer.
    num_experts_per_tok: routed experts that a token chooses. moe_intermediate_size: columns of one expert.
    shared_expert_intermediate_size: columns of all shared experts together. shared_expert_gate: a sigmoid
    gate scales the shared experts' output. tie_word_embeddings: the output projection is the embedding.
    attention: grouped-query or multi-head latent attention. q_lora_rank, kv_lora_rank, qk_nope_head_dim,
    qk_rope_head_dim, v_head_dim: a size of MLA, as in DeepSeek's configs. attention_bias: which projections
    have a bias. attention_sinks: each head has a learned logit that takes a part of the attention. qk_norm:
    queries and keys are normalised in each head, or over the full projection, or in each head without
    weights where they are rotated, after it (`unweighted`: Llama 4). sliding_window: tokens that a
    windowed layer attends to. attention_chunk_size: tokens of the chunks that these layers attend within,
    instead of a window. sliding_window_period: one layer in this many is windowed, from the first.
    layer_types: the kind of each layer, if no period describes it. learned_positions: rows of a learned table
    of positions; 0: rotary positions. expert_bias: the experts' products have a bias. router_bias: the
    router's product has a bias. ffn_bias: the products of dense FFNs have a bias.
    ffn_matrices: matrices of an FFN: 3 with a gate (SwiGLU), 2 without. ffn_activation: function between two
    matrices without a gate, in the words of Hugging Face's `hidden_act`. norm: the kind of norm in the
    layers. norm_bias: LayerNorms have a bias.
    num_nextn_predict_layers: MTP layers (DeepSeek-V3). scoring_func: function from the router's logits to
    weights. norm_topk_prob: the weights of the chosen experts are normalised. routed_scaling_factor: factor
    of these weights. topk_method: `greedy`: experts are chosen among all. `group_limited_greedy`: in the
    groups with the best expert (DeepSeek-V2). `noaux_tc`: in the groups with the best two experts together
    (DeepSeek-V3). n_group: groups of experts. topk_group: groups that a token is limited to. swiglu_limit:
    limit that clamps the gate and up products of experts, with up + 1, as in GPT-OSS; 0: plain SwiGLU.
    swiglu_alpha: factor of the gate in its sigmoid, if there is a limit. expert_inputs_weighted: the weights
    of the chosen experts multiply their inputs, not their outputs (Llama 4). rms_norm_eps: term that a norm
    adds to the mean of squares. rope_theta: base of rotary angles. rope_interleave: rotary positions turn
    neighbouring elements, not elements half a head apart. partial_rotary_factor: part of a head that is
    turned, without MLA. full_attention_rotary: layers without a window have rotary positions; False: only
    windowed ones (arXiv 2501.18795). attn_temperature_tuning: queries of layers without them are scaled by
    their position (Llama 4): log(1 + floor((position + 1) / floor_scale)) * attn_scale + 1, positions from 0.
    floor_scale: positions of one scale. attn_scale: how much it grows, at most 10. rope_scaling: scaling of
    rotary frequencies, for longer sequences than in the first training. dropout: rate for the outputs of
    attention and FFN, and for the attention weights where they are kept. total_params: the published count,
    which is compared and never used in a calculation. active_params: the same of active parameters. source:
    where the numbers are from. assumptions: facts that the source does not state.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int = 0
    first_k_dense_replace: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    tie_word_embeddings: bool = False
    attention: Literal["gqa", "mla"] = "gqa"
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    attention_sinks: bool = False
    qk_norm: Literal["none", "head", "full", "unweighted"] = "none"
    sliding_window: int = 0
    attention_chunk_size: int = 0
    sliding_window_period: int = 1
    layer_types: tuple[LayerType, ...] = ()
    expert_bias: bool = False
    router_bias: bool = False
    ffn_matrices: Literal[2, 3] = 3
    ffn_activation: Literal["gelu", "gelu_pytorch_tanh", "relu2", "relu"] = "gelu"
    ffn_bias: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = True
    learned_positions: int = 0
    num_nextn_predict_layers: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    dropout: float = 0.0
    routed_scaling_factor: float = 1.0
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: int = 1
    topk_group: int = 1
    expert_inputs_weighted: bool = False
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = False
    partial_rotary_factor: float = 1.0
    full_attention_rotary: bool = True
    attn_temperature_tuning: bool = False
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rope_scaling: RopeScaling = RopeScaling()
    total_params: float | None = None
    active_params: float | None = None
    source: str = ""
    assumptions: tuple[str, ...] = ()

    def _rules(self) -> Rules:
        yield from _sizes(self)
        require_name(self.name)
        yield from chain(_layers(self), _rotary(self), _attention(self), _numbers(self), _groups(self))

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary positions turn."""
        latent = self.attention == "mla"
        return self.qk_rope_head_dim if latent else int(self.head_dim * self.partial_rotary_factor)

    @property
    def composes_projections(self) -> bool:
        """Whether they are more than products, a norm of each head and rotated halves."""
        normed = self.qk_norm in ("full", "unweighted")
        more = self.attention_bias != "none" or normed or self.rope_interleave
        return more or self.attention == "mla"

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense FFN: all where there are no experts."""
        dense = self.first_k_dense_replace + len(self.mlp_only_layers)
        return dense if self.num_local_experts else self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts. MTP layers do where the network has any."""
        dense = layer < self.first_k_dense_replace or layer in self.mlp_only_layers
        return self.num_local_experts > 0 and not dense

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers that route to experts."""
        return tuple(filter(self.is_moe_layer, range(self.num_hidden_layers)))

    def window(self, layer: int) -> int:
        """Width of the window, or chunk, of `layer` in tokens; 0 is full causal attention. MTP layers, after
        the decoder's, see the whole sequence."""
        if layer >= self.num_hidden_layers:
            return 0
        width = self.sliding_window or self.attention_chunk_size
        if self.layer_types:
            return width if self.layer_types[layer] != "full_attention" else 0
        return width if layer % self.sliding_window_period == 0 else 0

    def rotates(self, layer: int) -> bool:
        """Whether queries and keys of `layer` have rotary positions."""
        return not self.learned_positions and (self.full_attention_rotary or self.window(layer) > 0)

    def tempers(self, layer: int) -> bool:
        """Whether queries of `layer` are scaled by their position."""
        return self.attn_temperature_tuning and not self.rotates(layer)

    @property
    def layer_words(self) -> list[LayerType]:
        """Of each decoder layer its word in the `layer_types` of a Hugging Face config."""
        word = WINDOWS["attention_chunk_size" if self.attention_chunk_size else "sliding_window"]
        windowed = map(self.window, range(self.num_hidden_layers))
        return [word if width else "full_attention" for width in windowed]

    def layer_kind(self, layer: int) -> LayerKind:
        """Equal for layers that do the same work."""
        return LayerKind(self.window(layer), self.is_moe_layer(layer))

    def layer_kinds(self) -> dict[LayerKind, list[int]]:
        """Decoder layers by their kind, in the order of each kind's first."""
        found: dict[LayerKind, list[int]] = {}
        for layer in range(self.num_hidden_layers):
            found.setdefault(self.layer_kind(layer), []).append(layer)
        return found

    def cut(self, layers: int) -> dict[str, Any]:
        """What differs of the network with so many of its layers: its first ones, or more, which have experts
        where the network has any and the window of its last."""
        found: dict[str, Any] = {
            "num_hidden_layers": layers,
            "first_k_dense_replace": min(self.first_k_dense_replace, layers),
        }
        if self.mlp_only_layers:
            found["mlp_only_layers"] = tuple(one for one in self.mlp_only_layers if one < layers)
        if self.layer_types:
            given = [self.window(min(layer, self.num_hidden_layers - 1)) > 0 for layer in range(layers)]
            found |= self.windowed_at(given)
        return found

    def windowed_at(self, layers: Sequence[bool], widest: int = MOST_TOKENS) -> dict[str, Any]:
        """What differs of the network with its windows, at most so wide, at these decoder layers."""
        none = {"sliding_window": 0, "attention_chunk_size": 0, "sliding_window_period": 1, "layer_types": ()}
        field = "attention_chunk_size" if self.attention_chunk_size else "sliding_window"
        return none | window_fields(layers, min(getattr(self, field), widest), field)


@lru_cache(maxsize=64)
def every_kind(model: ModelSpec) -> tuple[LayerKind, ...]:
    """The kinds of all layers, MTP layers after the decoder's."""
    count = model.num_hidden_layers + model.num_nextn_predict_layers
    return tuple(model.layer_kind(layer) for layer in range(count))


_NEEDED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_OPTIONAL = (
    "intermediate_size", "first_k_dense_replace", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "sliding_window", "attention_chunk_size",
    "learned_positions", "num_nextn_predict_layers",
)  # fmt: skip
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
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


def _sizes(m: ModelSpec) -> Rules:
    for field in _NEEDED:
        yield getattr(m, field) >= 1, field, "must be at least 1"
        yield getattr(m, field) <= 2**40, field, "must be at most 2^40"
    rule = f"must be at most {MOST_LAYERS}"
    yield m.num_hidden_layers <= MOST_LAYERS, "num_hidden_layers", rule
    for field in _OPTIONAL:
        yield getattr(m, field) >= 0, field, "must not be negative"
        yield getattr(m, field) <= 2**40, field, "must be at most 2^40"


def _layers(m: ModelSpec) -> Rules:
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


def _apart(m: ModelSpec) -> Rules:
    """Layers that are named one by one."""
    layers, dense = m.num_hidden_layers, m.mlp_only_layers
    rule = "must be empty where num_local_experts is 0: there are no MoE layers"
    yield m.num_local_experts > 0 or not dense, "mlp_only_layers", rule
    rule = f"must name layers after the first_k_dense_replace {m.first_k_dense_replace} leading ones, below "
    inside = all(m.first_k_dense_replace <= layer < layers for layer in dense)
    yield inside, "mlp_only_layers", f"{rule}num_hidden_layers {layers}"
    ascending = all(one < other for one, other in pairwise(dense))
    yield ascending, "mlp_only_layers", "must name each layer once, in ascending order"
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


def _attention(m: ModelSpec) -> Rules:
    for field in ("total_params", "active_params"):
        value = getattr(m, field)
        yield value is None or 1 <= value <= 1e18, field, "must lie between 1 and 1e18"
    latent = m.attention == "mla"
    yield m.full_attention_rotary or not latent, "full_attention_rotary", "must be True for mla"
    windowed = bool(m.sliding_window or m.attention_chunk_size)
    rule = "must be True where no layer has a window: no layer would have rotary positions"
    yield m.full_attention_rotary or windowed, "full_attention_rotary", rule
    tuned = m.attn_temperature_tuning and m.full_attention_rotary
    yield not tuned, "attn_temperature_tuning", "needs full_attention_rotary False: it is of the others"
    for field, usual in _TEMPERATURE.items() if not m.attn_temperature_tuning else ():
        rule = f"must be {usual!r}, the default, where attn_temperature_tuning is False: nothing is scaled"
        yield getattr(m, field) == usual, field, rule
    if not latent:
        for field in _MLA:
            yield getattr(m, field) == 0, field, "must be 0 for gqa"
        return
    for field in _MLA[1:]:
        yield getattr(m, field) >= 1, field, "must be at least 1 for mla"
    parts = m.qk_nope_head_dim + m.qk_rope_head_dim
    yield m.head_dim == parts, "head_dim", "must be qk_nope_head_dim + qk_rope_head_dim for mla"


def _rotary(m: ModelSpec) -> Rules:
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


def _groups(m: ModelSpec) -> Rules:
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


def _numbers(m: ModelSpec) -> Rules:
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
