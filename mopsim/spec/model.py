"""ModelSpec: the dimensions of a transformer, in Hugging Face field names."""

from typing import Literal

from mopsim.common.errors import require, require_name
from mopsim.common.io import Spec


class ModelSpec(Spec, frozen=True, kw_only=True):
    """A decoder-only transformer, in the field names of Hugging Face configs. 0 means none.

    name: one line of text, as it appears in tables. hidden_size: width of the residual stream.
    num_hidden_layers: decoder layers, MTP layers not counted. num_attention_heads: query heads.
    num_key_value_heads: key and value heads (GQA). head_dim: of queries and keys; of MLA, its two parts
    together. vocab_size: rows of the embedding. intermediate_size: columns of a dense FFN.
    first_k_dense_replace: leading layers that are dense; the others route to experts. num_local_experts:
    routed experts of a layer. num_experts_per_tok: of them, how many a token chooses. moe_intermediate_size:
    columns of one expert. shared_expert_intermediate_size: columns of all shared experts together.
    shared_expert_gate: a sigmoid gate scales their output. tie_word_embeddings: the output projection is the
    embedding. attention: grouped-query or multi-head latent attention. q_lora_rank, kv_lora_rank,
    qk_nope_head_dim, qk_rope_head_dim, v_head_dim: the sizes of MLA, as in DeepSeek's configs.
    attention_bias: which projections have a bias. attention_sinks: each head has a learned logit that takes
    attention away. qk_norm: queries and keys are normalised in each head, or over the full projection.
    sliding_window: tokens that a windowed layer attends to. sliding_window_period: every so many layers one
    is windowed, from the first. learned_positions: rows of a learned table of positions; without it, rotary.
    expert_bias, router_bias, ffn_bias: whether these products have a bias. ffn_matrices: 3 with a gate, 2
    without. norm: the kind of norm in the layers. num_nextn_predict_layers: MTP layers (DeepSeek-V3).
    scoring_func: what turns the router's logits into weights. norm_topk_prob: the weights of the chosen
    experts are normalised. routed_scaling_factor: what these weights are multiplied by. rms_norm_eps: what a
    norm adds to the mean of squares. rope_theta: base of rotary angles. dropout: rate for the outputs of
    attention and FFN, and for the attention weights where they are kept. total_params, active_params: the
    published counts, which are checked against and never used in a calculation. source: where the numbers are
    from. assumptions: what the source does not say.
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
    qk_norm: Literal["none", "head", "full"] = "none"
    sliding_window: int = 0
    sliding_window_period: int = 1
    expert_bias: bool = False
    router_bias: bool = False
    ffn_matrices: Literal[2, 3] = 3
    ffn_bias: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    learned_positions: int = 0
    num_nextn_predict_layers: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    dropout: float = 0.0
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    total_params: float | None = None
    active_params: float | None = None
    source: str = ""
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size",
        ):  # fmt: skip
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
            require(getattr(self, field) <= 2**40, field, getattr(self, field), "must be at most 2^40")
        layers = self.num_hidden_layers
        require(layers <= 10_000, "num_hidden_layers", layers, "must be at most 10000")
        for field in (
            "intermediate_size", "first_k_dense_replace", "num_local_experts", "num_experts_per_tok",
            "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
            "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "sliding_window", "learned_positions",
            "num_nextn_predict_layers",
        ):  # fmt: skip
            require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative")
            require(getattr(self, field) <= 2**40, field, getattr(self, field), "must be at most 2^40")
        require_name(self.name)
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads", self.num_key_value_heads,
            f"does not divide num_attention_heads {self.num_attention_heads}",
        )  # fmt: skip
        require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace", self.first_k_dense_replace,
            f"is more than num_hidden_layers {self.num_hidden_layers}",
        )  # fmt: skip
        require(
            self.num_dense_layers == 0 or self.intermediate_size >= 1,
            "intermediate_size", self.intermediate_size, "must be at least 1 where a layer is dense",
        )  # fmt: skip
        if self.num_local_experts:
            require(
                1 <= self.num_experts_per_tok <= self.num_local_experts,
                "num_experts_per_tok", self.num_experts_per_tok,
                f"must lie between 1 and num_local_experts {self.num_local_experts}",
            )  # fmt: skip
            require(
                self.moe_intermediate_size >= 1,
                "moe_intermediate_size",
                self.moe_intermediate_size,
                "must be at least 1 where there are experts",
            )
        else:
            for field in ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
                value = getattr(self, field)
                require(
                    value == 0,
                    field,
                    value,
                    "must be 0 where num_local_experts is 0: there are no MoE layers",
                )
        for field in ("total_params", "active_params"):
            value = getattr(self, field)
            require(value is None or 1 <= value <= 1e18, field, value, "must lie between 1 and 1e18")
        rotated = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
        require(
            bool(self.learned_positions) or getattr(self, rotated) % 2 == 0,
            rotated, getattr(self, rotated), "must be even: rotary positions turn pairs of elements",
        )  # fmt: skip
        if self.attention == "mla":
            for field in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1 for mla")
            require(
                self.head_dim == self.qk_nope_head_dim + self.qk_rope_head_dim,
                "head_dim", self.head_dim, "must be qk_nope_head_dim + qk_rope_head_dim for mla",
            )  # fmt: skip
        else:
            for field in (
                "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            ):  # fmt: skip
                require(getattr(self, field) == 0, field, getattr(self, field), "must be 0 for gqa")
        for field, low, high in (
            ("rms_norm_eps", 1e-12, 0.1), ("routed_scaling_factor", 1e-3, 1e3), ("rope_theta", 1.0, 1e12),
            ("sliding_window_period", 1, 10_000), ("num_local_experts", 0, 2**16),
            ("num_nextn_predict_layers", 0, 100),
        ):  # fmt: skip
            value = getattr(self, field)
            require(low <= value <= high, field, value, f"must lie between {low:g} and {high:g}")
        require(
            self.shared_expert_intermediate_size >= 1 or not self.shared_expert_gate,
            "shared_expert_gate",
            self.shared_expert_gate,
            "gates nothing: shared_expert_intermediate_size is 0",
        )  # fmt: skip
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must lie in [0, 1)")

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense FFN: the leading ones, or all where there are no experts."""
        return self.first_k_dense_replace if self.num_local_experts else self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) routes to experts."""
        return layer >= self.num_dense_layers

    def window(self, layer: int) -> int:
        """Sliding-window width of `layer` in tokens; 0 is full causal attention."""
        return self.sliding_window if self.sliding_window and layer % self.sliding_window_period == 0 else 0
