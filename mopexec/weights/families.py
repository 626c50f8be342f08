"""The tensors of Hugging Face checkpoints by architecture: tables of name patterns, no code.

Left: a parameter of `mopexec.model`, `*` for the layer. Right: the tensor that holds it; {layer}: the layer,
{expert}: one file tensor for each expert. Our expert stacks are [E, inputs, outputs].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TensorPlace:
    """Where a parameter (of a stack: one expert's matrix) lies. transposed: the file has [outputs, inputs].
    first, step: it is every step-th element of the last dimension, from the first on. part, parts: it is one
    of so many equal parts of the last dimension. row: the file has it as a matrix of one row.
    """

    tensor: str
    row: bool = False
    transposed: bool = False
    first: int = 0
    step: int = 1
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """One architecture. copies: tensors that may be in a file beside the one that they equal; written where
    `writes_copies`. balance_bias: whether it has a place for the routers' balance bias.
    """

    architecture: str
    table: Mapping[str, TensorPlace]
    copies: Mapping[str, str] = field(default_factory=dict)
    writes_copies: bool = False

    @property
    def balance_bias(self) -> bool:
        return BALANCE_BIAS in self.table


BALANCE_BIAS = "layers.*.moe.router.balance_bias"
_LAYER = "model.layers.{layer}."


def _places(names: Mapping[str, str], prefix: str, ours: str) -> dict[str, TensorPlace]:
    return {f"{ours}{mine}": TensorPlace(f"{prefix}{theirs}") for mine, theirs in names.items()}


def _with_bias(names: Mapping[str, str]) -> dict[str, str]:
    """The weight of each linear, and its bias where the model has one."""
    return {
        f"{mine}.{part}": f"{theirs}.{part}" for mine, theirs in names.items() for part in ("weight", "bias")
    }


_OUTER = {
    "embedding.weight": TensorPlace("model.embed_tokens.weight"),
    "final_norm.weight": TensorPlace("model.norm.weight"),
    "head.weight": TensorPlace("lm_head.weight"),
}
_NORMS = _places(
    {
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    },
    _LAYER,
    "layers.*.",
)
_GROUPED = _places(
    {
        **_with_bias({f"{name}_proj": f"{name}_proj" for name in "qkvo"}),
        "q_norm.weight": "q_norm.weight",
        "k_norm.weight": "k_norm.weight",
        "sinks": "sinks",
    },
    f"{_LAYER}self_attn.",
    "layers.*.attention.",
)
_LATENT = _places(
    {
        **{
            f"{name}.weight": f"{name}.weight"
            for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")
        },
        "q_a_norm.weight": "q_a_layernorm.weight",
        "kv_a_proj.weight": "kv_a_proj_with_mqa.weight",
        "kv_a_norm.weight": "kv_a_layernorm.weight",
    },
    f"{_LAYER}self_attn.",
    "layers.*.attention.",
)
_SWIGLU = {f"{name}_proj": f"{name}_proj" for name in ("gate", "up", "down")}
_DENSE = _places(_with_bias(_SWIGLU), f"{_LAYER}mlp.", "layers.*.ffn.")
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def _experts(
    block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, TensorPlace]:
    """A matrix of each expert by itself, [outputs, inputs]."""
    names = {"gate": gate, "up": up, "down": down}
    return {
        f"layers.*.moe.experts.{mine}_proj": TensorPlace(
            f"{_LAYER}{block}.experts.{{expert}}.{theirs}.weight", transposed=True
        )
        for mine, theirs in names.items()
    }


def _router(block: str) -> dict[str, TensorPlace]:
    return {"layers.*.moe.router.weight": TensorPlace(f"{_LAYER}{block}.weight")}


def _shared(block: str) -> dict[str, TensorPlace]:
    names = {f"{name}.weight": f"{name}.weight" for name in _SWIGLU}
    return _places(names, f"{_LAYER}mlp.{block}.", "layers.*.moe.shared.")


_BASE = _OUTER | _NORMS
_EXPERTS = _DENSE | _experts("mlp") | _router("mlp.gate") | _shared("shared_experts")
_DEEPSEEK = _BASE | _LATENT | _EXPERTS
_GROUPED_DEEPSEEK = _BASE | _GROUPED | _EXPERTS
_CORRECTION = {BALANCE_BIAS: TensorPlace(f"{_LAYER}mlp.gate.e_score_correction_bias")}
_MTP = _places(
    {
        "embedding_norm.weight": "enorm.weight",
        "hidden_norm.weight": "hnorm.weight",
        "projection.weight": "eh_proj.weight",
        "final_norm.weight": "shared_head.norm.weight",
    },
    _LAYER,
    "mtp.*.",
)
_MTP_COPIES = {
    f"{_LAYER}embed_tokens.weight": "model.embed_tokens.weight",
    f"{_LAYER}shared_head.head.weight": "lm_head.weight",
}
_GPT_OSS = {
    f"layers.*.moe.experts.{name}_proj{part}": TensorPlace(
        f"{_LAYER}mlp.experts.gate_up_proj{part}", first=first, step=2
    )
    for first, name in enumerate(("gate", "up"))
    for part in ("", "_bias")
} | {
    f"layers.*.moe.experts.down_proj{part}": TensorPlace(f"{_LAYER}mlp.experts.down_proj{part}")
    for part in ("", "_bias")
}
"""All experts in one tensor [E, inputs, outputs], gate and up in turn."""

_LLAMA4_FFN = f"{_LAYER}feed_forward."
_LLAMA4 = {
    **_places(_with_bias(_SWIGLU), _LLAMA4_FFN, "layers.*.ffn."),
    "layers.*.moe.router.weight": TensorPlace(f"{_LLAMA4_FFN}router.weight"),
    **_places(
        {f"{name}.weight": f"{name}.weight" for name in _SWIGLU},
        f"{_LLAMA4_FFN}shared_expert.",
        "layers.*.moe.shared.",
    ),
    **{
        f"layers.*.moe.experts.{name}_proj": TensorPlace(
            f"{_LLAMA4_FFN}experts.gate_up_proj", part=part, parts=2
        )
        for part, name in enumerate(("gate", "up"))
    },
    "layers.*.moe.experts.down_proj": TensorPlace(f"{_LLAMA4_FFN}experts.down_proj"),
}
"""All experts in one tensor [E, inputs, outputs], gate before up."""

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", _BASE | _GROUPED | _DENSE, _TIED),
        Family(
            "MixtralForCausalLM",
            _BASE
            | _GROUPED
            | _experts("block_sparse_moe", "w1", "w3", "w2")
            | _router("block_sparse_moe.gate"),
            _TIED,
        ),
        Family("Qwen3ForCausalLM", _BASE | _GROUPED | _DENSE, _TIED),
        Family(
            "Qwen3MoeForCausalLM", _BASE | _GROUPED | _DENSE | _experts("mlp") | _router("mlp.gate"), _TIED
        ),
        Family(
            "Qwen2MoeForCausalLM",
            _BASE
            | _GROUPED
            | _DENSE
            | _experts("mlp")
            | _router("mlp.gate")
            | _shared("shared_expert")
            | {"layers.*.moe.shared_gate.weight": TensorPlace(f"{_LAYER}mlp.shared_expert_gate.weight")},
            _TIED,
        ),
        Family("OlmoeForCausalLM", _BASE | _GROUPED | _experts("mlp") | _router("mlp.gate"), _TIED),
        Family(
            "GptOssForCausalLM",
            _BASE
            | _GROUPED
            | _GPT_OSS
            | _places({"weight": "weight", "bias": "bias"}, f"{_LAYER}mlp.router.", "layers.*.moe.router."),
            _TIED,
        ),
        Family("DeepseekV2ForCausalLM", _DEEPSEEK, _TIED),
        Family("Llama4ForCausalLM", _BASE | _GROUPED | _LLAMA4, _TIED),
        Family("Dots1ForCausalLM", _GROUPED_DEEPSEEK | _CORRECTION, _TIED),
        Family(
            "Glm4MoeForCausalLM",
            _GROUPED_DEEPSEEK | _MTP | _CORRECTION,
            _TIED | _MTP_COPIES,
            writes_copies=True,
        ),
        Family(
            "Ernie4_5_MoeForCausalLM",
            _GROUPED_DEEPSEEK
            | {BALANCE_BIAS: TensorPlace(f"{_LAYER}mlp.moe_statics.e_score_correction_bias", row=True)},
            _TIED,
        ),
        Family(
            "DeepseekV3ForCausalLM",
            _DEEPSEEK | _MTP | _CORRECTION,
            _TIED | _MTP_COPIES,
            writes_copies=True,
        ),
    )
}
