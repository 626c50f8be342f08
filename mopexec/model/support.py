"""Which model specs the executor can run; the others are refused by name."""

from mopsim.spec.errors import require
from mopsim.spec.model import ModelSpec

_ONLY: tuple[tuple[str, object], ...] = (
    ("attention", "gqa"),
    ("attention_bias", "none"),
    ("attention_sinks", False),
    ("sliding_window", 0),
    ("expert_bias", False),
    ("router_bias", False),
    ("ffn_matrices", 3),
    ("ffn_bias", False),
    ("norm", "rmsnorm"),
    ("learned_positions", 0),
    ("num_nextn_predict_layers", 0),
    ("tie_word_embeddings", False),
    ("shared_expert_gate", False),
)


def check_model(spec: ModelSpec) -> None:
    """Raise SpecError naming the first field of `spec` that the executor does not run."""
    for field, supported in _ONLY:
        value = getattr(spec, field)
        require(value == supported, f"model.{field}", value, f"is not run by mopexec, only {supported!r} is")
    require(
        spec.qk_norm in ("none", "head"), "model.qk_norm", spec.qk_norm,
        "is not run by mopexec, only 'none' and 'head' are",
    )  # fmt: skip
    require(spec.head_dim % 2 == 0, "model.head_dim", spec.head_dim, "must be even for rotary positions")
