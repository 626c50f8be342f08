"""Every parameter of a model: name, shape, component. The executor's `state_dict` has the same names and
shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Precision

OUTPUTS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "sinks")
INPUTS = ("o_proj.weight", "down_proj.weight")
_TABLES = ("embedding.weight", "head.weight")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter. layer: decoder layer, -1 outside of one, layer count + i for MTP layer i. routed: split
    over experts. whole: a matrix that every rank of a tensor group holds all of, as Megatron-Core holds
    routers, gates of shared experts, products around latent experts, MLA's down-projections (TELinear,
    "duplicated") and position tables.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    layer: int = -1
    routed: bool = False
    whole: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@lru_cache(maxsize=256)
def tensors(model: ModelSpec) -> tuple[Tensor, ...]:
    """All parameters in the order of the forward pass."""
    H = model.hidden_size
    found = [Tensor("embedding.weight", (model.vocab_size, H), "embedding")]
    if model.learned_positions:
        found.append(Tensor("embedding.positions", (model.learned_positions, H), "embedding", whole=True))
    for layer in range(model.num_hidden_layers):
        found += layer_tensors(model, layer, f"layers.{layer}", model.is_moe_layer(layer))
    found += _norm(model, "final_norm", H, "vocabulary")
    if not model.tie_word_embeddings:
        found.append(Tensor("head.weight", (model.vocab_size, H), "vocabulary"))
    for i in range(model.num_nextn_predict_layers):
        found += _mtp(model, i)
    return tuple(found)


def layer_tensors(model: ModelSpec, layer: int, prefix: str, moe: bool) -> list[Tensor]:
    """Parameters of one decoder layer, `layers.{i}.…`."""
    H = model.hidden_size
    found = _norm(model, f"{prefix}.attention_norm", H, "attention", layer)
    found += _mixer(model, layer)(model, f"{prefix}.attention", layer)
    if model.layer_kind(layer).bare:
        return found
    found += _norm(model, f"{prefix}.ffn_norm", H, "router" if moe else "dense_ffn", layer)
    if not moe:
        return found + _ffn(
            model, f"{prefix}.ffn", model.intermediate_size, "dense_ffn", layer, model.ffn_bias
        )
    experts, bias = model.num_local_experts, model.router_bias
    found += _linear(f"{prefix}.moe.router", experts, H, "router", layer, bias, whole=True)
    latent = model.moe_latent_size
    if latent:
        found += _linear(f"{prefix}.moe.latent_down", latent, H, "experts", layer, whole=True)
    found += _experts(model, f"{prefix}.moe.experts", layer)
    if latent:
        found += _linear(f"{prefix}.moe.latent_up", H, latent, "experts", layer, whole=True)
    if model.shared_expert_intermediate_size:
        found += _ffn(
            model, f"{prefix}.moe.shared", model.shared_expert_intermediate_size, "shared_experts", layer,
            False,
        )  # fmt: skip
        if model.shared_expert_gate:
            found += _linear(f"{prefix}.moe.shared_gate", 1, H, "shared_experts", layer, whole=True)
    return found


def split_dim(name: str) -> int | None:
    """The dimension of a dense parameter that the ranks of a tensor group split in mopexec; None: each has it
    whole. Vectors of the outputs of a split product, or of heads, are split with them."""
    if name in _TABLES:
        return 0
    if "shared_gate" in name or "router" in name:
        return None
    if name.endswith(INPUTS):
        return 1
    return 0 if any(part in OUTPUTS for part in name.split(".")) else None


def parameters(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter (buffers apart)."""
    return {tensor.name: tensor.shape for tensor in tensors(model)}


def buffers(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every buffer: the routers' balancing biases, fp32."""
    names = [f"layers.{i}" for i in model.moe_layers]
    if model.num_local_experts:
        names += [f"mtp.{i}.layer" for i in range(model.num_nextn_predict_layers)]
    return {f"{name}.moe.router.balance_bias": (model.num_local_experts,) for name in names}


def total_params(model: ModelSpec) -> int:
    """Parameters as published totals count them: all but the MTP layers, which serve training only."""
    return sum(tensor.numel for tensor in tensors(model) if not tensor.name.startswith("mtp."))


def checkpoint_bytes(model: ModelSpec, precision: Precision) -> float:
    """Bytes of a checkpoint: of every parameter, also MTP's, the master (or the weight itself) and both of
    AdamW's moments. A dtype left to the stack counts as float32."""
    kept = (precision.masters, precision.moments, precision.moments)
    return sum(tensor.numel for tensor in tensors(model)) * sum(DTYPE_BYTES.get(one, 4.0) for one in kept)


def active_params(model: ModelSpec) -> int:
    """Parameters that one token meets: as `total_params`, but top-k of the routed experts."""
    share = model.num_experts_per_tok / model.num_local_experts if model.num_local_experts else 0.0
    counted = (tensor for tensor in tensors(model) if not tensor.name.startswith("mtp."))
    return round(sum(tensor.numel * (share if tensor.routed else 1.0) for tensor in counted))


def _norm(model: ModelSpec, name: str, size: int, component: str, layer: int = -1) -> list[Tensor]:
    found = [Tensor(f"{name}.weight", (size,), component, layer)]
    biased = model.norm == "layernorm" and model.norm_bias
    return found + [Tensor(f"{name}.bias", (size,), component, layer)] * biased


def _linear(
    name: str, out: int, inp: int, component: str, layer: int, bias: bool = False, whole: bool = False
) -> list[Tensor]:
    found = [Tensor(f"{name}.weight", (out, inp), component, layer, whole=whole)]
    return found + [Tensor(f"{name}.bias", (out,), component, layer)] * bias


def _mixer(model: ModelSpec, layer: int) -> Callable[[ModelSpec, str, int], list[Tensor]]:
    if model.is_linear(layer):
        return _linear_attention
    return _mla if model.attention == "mla" else _gqa


def _linear_attention(model: ModelSpec, prefix: str, layer: int) -> list[Tensor]:
    """One projection, the convolution, the decay, step and skip of each head, the gated norm, the output.
    Mamba-2's convolution has a bias, and its norm a weight for each element (mamba_ssm, mamba2.py); a gated
    delta rule has no such bias, and one norm for all heads (transformers, Qwen3NextGatedDeltaNet)."""
    how, H, C = model.linear_attention, model.hidden_size, "attention"
    state_space = how.kind == "mamba2"
    found = _linear(f"{prefix}.in_proj", how.projected, H, C, layer)
    found += _linear(f"{prefix}.conv", how.mixed, how.conv_kernel_dim, C, layer, bias=state_space)
    scalars = ("decay", "step_bias", "skip") if state_space else ("decay", "step_bias")
    found += [Tensor(f"{prefix}.{name}", (how.num_value_heads,), C, layer) for name in scalars]
    normed = how.values if state_space else how.value_head_dim
    found.append(Tensor(f"{prefix}.norm.weight", (normed,), C, layer))
    return found + _linear(f"{prefix}.o_proj", H, how.values, C, layer)


def _gqa(model: ModelSpec, prefix: str, layer: int) -> list[Tensor]:
    H, d = model.hidden_size, model.head_dim
    q, kv = model.num_attention_heads * d, model.num_key_value_heads * d
    bias = model.attention_bias != "none"
    found = (
        _linear(f"{prefix}.output_gate_proj", q, H, "attention", layer) if model.attention_output_gate else []
    )
    for name, out in (("q", q), ("k", kv), ("v", kv)):
        found += _linear(f"{prefix}.{name}_proj", out, H, "attention", layer, bias)
    if model.qk_norm in ("head", "full"):
        sizes = (d, d) if model.qk_norm == "head" else (q, kv)
        found += [
            Tensor(f"{prefix}.{n}_norm.weight", (s,), "attention", layer)
            for n, s in zip("qk", sizes, strict=True)
        ]
    found += _linear(f"{prefix}.o_proj", H, q, "attention", layer, model.attention_bias == "qkvo")
    if model.attention_sinks:
        found.append(Tensor(f"{prefix}.sinks", (model.num_attention_heads,), "attention", layer))
    return found


def _mla(model: ModelSpec, prefix: str, layer: int) -> list[Tensor]:
    H, heads = model.hidden_size, model.num_attention_heads
    q = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    found = []
    if model.q_lora_rank:
        found += _linear(f"{prefix}.q_a_proj", model.q_lora_rank, H, "attention", layer, whole=True)
        found.append(Tensor(f"{prefix}.q_a_norm.weight", (model.q_lora_rank,), "attention", layer))
        found += _linear(f"{prefix}.q_b_proj", q, model.q_lora_rank, "attention", layer)
    else:
        found += _linear(f"{prefix}.q_proj", q, H, "attention", layer)
    down = model.kv_lora_rank + model.qk_rope_head_dim
    found += _linear(f"{prefix}.kv_a_proj", down, H, "attention", layer, whole=True)
    found.append(Tensor(f"{prefix}.kv_a_norm.weight", (model.kv_lora_rank,), "attention", layer))
    out = heads * (model.qk_nope_head_dim + model.v_head_dim)
    found += _linear(f"{prefix}.kv_b_proj", out, model.kv_lora_rank, "attention", layer)
    found += _indexer(model, prefix, layer) if model.chooses(layer) else []
    return found + _linear(f"{prefix}.o_proj", H, heads * model.v_head_dim, "attention", layer)


def _indexer(model: ModelSpec, prefix: str, layer: int) -> list[Tensor]:
    """Queries of all its heads, a key that they share, its LayerNorm, a weight of each head
    (DeepSeek-V3.2-Exp, inference/model.py, Indexer). Every tensor-parallel rank has them whole (Megatron-LM,
    transformer/experimental_attention_variant/dsa.py: parallel_mode duplicated)."""
    how, C = model.sparse_attention, "attention"
    width = how.index_n_heads * how.index_head_dim
    found = _linear(f"{prefix}.index_q_proj", width, model.q_lora_rank, C, layer, whole=True)
    found += _linear(f"{prefix}.index_k_proj", how.index_head_dim, model.hidden_size, C, layer, whole=True)
    found += [
        Tensor(f"{prefix}.index_k_norm.{name}", (how.index_head_dim,), C, layer)
        for name in ("weight", "bias")
    ]
    return found + _linear(
        f"{prefix}.index_weights", how.index_n_heads, model.hidden_size, C, layer, whole=True
    )


def _ffn(model: ModelSpec, prefix: str, width: int, component: str, layer: int, bias: bool) -> list[Tensor]:
    H = model.hidden_size
    found = []
    for name in ("gate_proj", "up_proj") if model.ffn_matrices == 3 else ("up_proj",):
        found += _linear(f"{prefix}.{name}", width, H, component, layer, bias)
    return found + _linear(f"{prefix}.down_proj", H, width, component, layer, bias)


def _experts(model: ModelSpec, prefix: str, layer: int) -> list[Tensor]:
    E, H, width = model.num_local_experts, model.expert_width, model.moe_intermediate_size
    found = []
    gated = ("gate_proj",) if model.ffn_matrices == 3 else ()
    for name in (*gated, "up_proj", "down_proj"):
        shape = (E, H, width) if name != "down_proj" else (E, width, H)
        found.append(Tensor(f"{prefix}.{name}", shape, "experts", layer, routed=True))
        if model.expert_bias:
            found.append(Tensor(f"{prefix}.{name}_bias", (E, shape[2]), "experts", layer, routed=True))
    return found


def _mtp(model: ModelSpec, i: int) -> list[Tensor]:
    """One multi-token-prediction module (DeepSeek-V3, arXiv 2412.19437 2.2): norms, a 2H -> H projection
    and a layer."""
    layer, prefix, H = model.num_hidden_layers + i, f"mtp.{i}", model.hidden_size
    found = _norm(model, f"{prefix}.embedding_norm", H, "vocabulary", layer)
    found += _norm(model, f"{prefix}.hidden_norm", H, "vocabulary", layer)
    found += _linear(f"{prefix}.projection", H, 2 * H, "vocabulary", layer)
    found += layer_tensors(model, layer, f"{prefix}.layer", bool(model.num_local_experts))
    return found + _norm(model, f"{prefix}.final_norm", H, "vocabulary", layer)
