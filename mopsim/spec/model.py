"""ModelSpec: the dimensions of a transformer, in Hugging Face field names."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import gcd
from typing import Any, Literal, NamedTuple

from mopsim.common.errors import Rules, require_name
from mopsim.common.io import Spec
from mopsim.spec.layer_fields import LINEAR, MOST_TOKENS, WINDOWS, LayerType, window_fields
from mopsim.spec.linear_attention import LinearAttention
from mopsim.spec.model_rules import relations, sizes
from mopsim.spec.rope import RopeScaling
from mopsim.spec.sparse_attention import SparseAttention

DESCRIPTION = ("name", "source", "assumptions", "total_params", "active_params")
"""Fields of a ModelSpec that say something about the network and do not change it."""


class LayerKind(NamedTuple):
    """Of a layer: the window of its attention (0: none), whether it routes to experts, whether its mixer is
    linear attention, whether there is nothing after the mixer, whether an indexer chooses what it attends to.
    """

    window: int
    routed: bool
    linear: bool = False
    bare: bool = False
    chooses: bool = False


class ModelSpec(Spec, frozen=True, kw_only=True):
    """A decoder-only transformer, in the field names of Hugging Face configs. 0 means none.

    name: one line of text, as it appears in tables. hidden_size: width of the residual stream.
    num_hidden_layers: decoder layers, MTP layers not counted. num_attention_heads: query heads.
    num_key_value_heads: key and value heads (GQA). head_dim: width of a head of queries and keys; for MLA, of
    its two parts together. vocab_size: rows of the embedding. intermediate_size: columns of a dense FFN.
    first_k_dense_replace: leading layers that are dense. mlp_only_layers: later layers that are dense too,
    counted from 0; the others route to experts. num_local_experts: routed experts of a layer.
    num_experts_per_tok: routed experts that a token chooses. moe_intermediate_size: columns of one expert.
    moe_latent_size: width of the rows that routed experts work on, between a product before the dispatch and
    one after the combine (LatentMoE, arXiv 2604.12374); 0: hidden_size. Router and shared experts see all.
    shared_expert_intermediate_size: columns of all shared experts together. shared_expert_gate: a sigmoid
    gate scales the shared experts' output. tie_word_embeddings: the output projection is the embedding.
    attention: grouped-query or multi-head latent attention. q_lora_rank, kv_lora_rank, qk_nope_head_dim,
    qk_rope_head_dim, v_head_dim: a size of MLA, as in DeepSeek's configs. attention_bias: which projections
    have a bias. attention_sinks: each head has a learned logit that takes a part of the attention. qk_norm:
    queries and keys are normalised in each head, or over the full projection, or in each head without weights
    where they are rotated, after it (`unweighted`: Llama 4). sliding_window: tokens that a windowed layer
    attends to. attention_chunk_size: tokens of the chunks that these layers attend within, instead of a
    window. sliding_window_period: one layer in this many is windowed, from the first. layer_types: the kind
    of each layer, if no period describes it. layers_without_ffn: layers that have neither a dense FFN nor
    experts after their attention, counted from 0. attention_output_gate: a sigmoid gate, a projection of the
    layer's input, scales the output of attention (arXiv 2505.06708). linear_attention: the mixer of layers
    that are not attention. sparse_attention: the indexer of keys that are attended to. learned_positions:
    rows of a learned table of positions; 0: rotary positions. expert_bias: the experts' products have a bias.
    router_bias: the router's product has a bias. ffn_bias: the products of dense FFNs have a bias.
    ffn_matrices: matrices of an FFN: 3 with a gate (SwiGLU), 2 without. ffn_activation: function between two
    matrices without a gate, in the words of Hugging Face's `hidden_act`. norm: the kind of norm in the
    layers. norm_bias: LayerNorms have a bias. num_nextn_predict_layers: MTP layers (DeepSeek-V3).
    scoring_func: function from the router's logits to weights. norm_topk_prob: the weights of the chosen
    experts are normalised. routed_scaling_factor: factor of these weights. topk_method: `greedy`: experts are
    chosen among all. `group_limited_greedy`: in the groups with the best expert (DeepSeek-V2). `noaux_tc`: in
    the groups with the best two experts together (DeepSeek-V3). n_group: groups of experts. topk_group:
    groups that a token is limited to. swiglu_limit: limit that clamps the gate and up products of experts,
    with up + 1, as in GPT-OSS; 0: plain SwiGLU. swiglu_alpha: factor of the gate in its sigmoid, if there is
    a limit. expert_inputs_weighted: the weights of the chosen experts multiply their inputs, not their
    outputs (Llama 4). rms_norm_eps: term that a norm adds to the mean of squares. rope_theta: base of rotary
    angles. rope_interleave: rotary positions turn neighbouring elements, not elements half a head apart.
    partial_rotary_factor: part of a head that is turned, without MLA. full_attention_rotary: layers without a
    window have rotary positions; False: only windowed ones (arXiv 2501.18795). attn_temperature_tuning:
    queries of layers without them are scaled by their position (Llama 4): log(1 + floor((position + 1) /
    floor_scale)) * attn_scale + 1, positions from 0. floor_scale: positions of one scale. attn_scale: how
    much it grows, at most 10. rope_scaling: scaling of rotary frequencies, for longer sequences than in the
    first training. dropout: rate for the outputs of attention and FFN, and for the attention weights where
    they are kept. total_params: the published count, which is compared and never used in a calculation.
    active_params: the same of active parameters. source: where the numbers are from. assumptions: facts that
    the source does not state.
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
    moe_latent_size: int = 0
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
    layers_without_ffn: tuple[int, ...] = ()
    attention_output_gate: bool = False
    linear_attention: LinearAttention = LinearAttention()
    sparse_attention: SparseAttention = SparseAttention()
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
        yield from sizes(self)
        require_name(self.name)
        yield from relations(self)

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary positions turn."""
        latent = self.attention == "mla"
        return self.qk_rope_head_dim if latent else int(self.head_dim * self.partial_rotary_factor)

    @property
    def expert_width(self) -> int:
        """Elements of a row that routed experts get and give."""
        return self.moe_latent_size or self.hidden_size

    @property
    def composes_projections(self) -> bool:
        """Whether they are more than products, a norm of each head and rotated halves."""
        normed = self.qk_norm in ("full", "unweighted")
        more = self.attention_bias != "none" or normed or self.rope_interleave
        return more or self.attention == "mla"

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense FFN: all that have one where there are no experts."""
        return self.num_hidden_layers - self.num_moe_layers - len(self.layers_without_ffn)

    @property
    def num_moe_layers(self) -> int:
        dense = self.first_k_dense_replace + len(self.mlp_only_layers) + len(self.layers_without_ffn)
        return self.num_hidden_layers - dense if self.num_local_experts else 0

    @property
    def num_routers(self) -> int:
        """Routers: of decoder layers that route, and of MTP layers where the network has experts."""
        return self.num_moe_layers + (self.num_nextn_predict_layers if self.num_local_experts else 0)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts. MTP layers do where the network has any."""
        dense = layer < self.first_k_dense_replace or layer in self.mlp_only_layers
        return self.num_local_experts > 0 and not dense and layer not in self.layers_without_ffn

    def is_linear(self, layer: int) -> bool:
        """Whether the mixer of `layer` is linear attention. That of an MTP layer is not."""
        return layer < len(self.layer_types) and self.layer_types[layer] == LINEAR

    def chooses(self, layer: int) -> bool:
        """Whether an indexer of `layer` chooses the keys that are attended to."""
        sparse = self.sparse_attention
        return sparse.index_topk > 0 and not self.is_linear(layer) and sparse.chooses(layer)

    def shares(self, layer: int) -> bool:
        """Whether `layer` attends to keys that a layer before it chose."""
        return self.sparse_attention.index_topk > 0 and not self.is_linear(layer) and not self.chooses(layer)

    def whole_groups(self, parts: Sequence[int]) -> tuple[int, ...]:
        """Decoder layers of each part of a pipeline, each of which begins at the nearest layer that attends
        to what no layer before it chose; as they are where every layer does."""
        if self.sparse_attention.index_topk_freq == 1:
            return tuple(parts)
        layers = self.num_hidden_layers
        begins = [*(layer for layer in range(layers) if not self.shares(layer)), layers]
        ends = list(accumulate(parts))[:-1]
        places = [0, *(min(begins, key=lambda begin: abs(begin - end)) for end in ends), layers]
        return tuple(after - before for before, after in pairwise(places))

    @property
    def num_blocks(self) -> int:
        """Mixers, FFNs and blocks of experts: layers as networks with linear attention count them."""
        parts = 2 if LINEAR in self.layer_types else 1
        return parts * self.num_hidden_layers - (parts - 1) * len(self.layers_without_ffn)

    @property
    def num_linear_layers(self) -> int:
        """Decoder layers whose mixer is linear attention."""
        return self.layer_types.count(LINEAR)

    @property
    def num_split_heads(self) -> int:
        """What every number of ranks that split the heads of all layers divides."""
        return gcd(self.num_attention_heads, self.linear_attention.num_value_heads)

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
            return width if self.layer_types[layer] in WINDOWS.values() else 0
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
        words: list[LayerType] = [word if width else "full_attention" for width in windowed]
        return [LINEAR if self.is_linear(layer) else word for layer, word in enumerate(words)]

    def layer_kind(self, layer: int) -> LayerKind:
        """Equal for layers that do the same work."""
        bare, linear = layer in self.layers_without_ffn, self.is_linear(layer)
        return LayerKind(self.window(layer), self.is_moe_layer(layer), linear, bare, self.chooses(layer))

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
        for field in ("mlp_only_layers", "layers_without_ffn"):
            if given := getattr(self, field):
                found[field] = tuple(one for one in given if one < layers)
        if LINEAR in self.layer_types:
            words = self.layer_types
            found["layer_types"] = (*words[:layers], *words[-1:] * (layers - len(words)))
        elif self.layer_types:
            windows = [self.window(min(layer, self.num_hidden_layers - 1)) > 0 for layer in range(layers)]
            found |= self.windowed_at(windows)
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
