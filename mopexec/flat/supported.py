"""Which strategies the flat_units runtime runs; the others are refused by field, before a launch."""

from typing import Any

from mopsim.common.errors import require
from mopsim.spec import layout
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy

_ONLY: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("pipeline.degree", (1,)),
    ("dense.tensor", (1,)),
    ("dense.zero", (3,)),
    ("dense.reshard_after_forward", (True,)),
    ("dense.param_tier", ("device",)),
    ("dense.grad_tier", ("device",)),
    ("attention.exchange", ("ulysses",)),
    ("attention.flash", (True,)),
    ("experts.tensor", (1,)),
    ("experts.balance", ("none",)),
    ("experts.plain", (False,)),
    ("activations.kept", ((),)),
    ("experts.param_tier", ("device",)),
    ("experts.grad_tier", ("device",)),
    ("vocabulary.loss", ("full", "chunked", "ring")),
    ("activations.recompute", ("full",)),
    ("precision.attention", ("compute",)),
    ("precision.vocabulary", ("compute",)),
    ("graphs", ((),)),
    ("unfused", ((),)),
    ("precision.compute", ("float64", "float32", "bfloat16")),
    ("precision.param", ("float64", "float32", "bfloat16")),
    ("precision.reduce", ("float64", "float32", "bfloat16")),
    ("precision.grad", ("float64", "float32", "bfloat16")),
    ("precision.moments", ("float64", "float32", "bfloat16")),
)


def check_flat_units(model: ModelSpec, strategy: Strategy) -> None:
    """Raise SpecError where the runtime flat_units does not run `strategy` on `model`."""
    for field, supported in _ONLY:
        value = _at(strategy, field)
        names = " or ".join(repr(name) for name in supported)
        _require(value in supported, field, value, f"is not run by flat_units, only {names}")
    precision, optimizer = strategy.precision, strategy.optimizer
    _require(
        precision.matmul in ("compute", precision.compute), "precision.matmul", precision.matmul,
        f"is not run by flat_units, only precision.compute {precision.compute}",
    )  # fmt: skip
    _require(
        optimizer.state_tier == "device" or optimizer.host_fraction == 1, "optimizer.host_fraction",
        optimizer.host_fraction, "is not run by flat_units: all of the state is on the host, or none",
    )  # fmt: skip
    _require(
        optimizer.update_on == "device" or precision.master != "param", "precision.master", precision.master,
        "leaves no master weights on the host, where optimizer.update_on is host",
    )  # fmt: skip
    _check_groups(model, strategy)


def _check_groups(model: ModelSpec, strategy: Strategy) -> None:
    degree, heads = strategy.attention.sequence, model.num_key_value_heads
    _require(
        heads % degree == 0 or degree % heads == 0, "attention.sequence", degree,
        f"and num_key_value_heads {heads}: neither divides the other",
    )  # fmt: skip
    if strategy.vocabulary.loss == "ring":
        ring = strategy.vocabulary.degree
        start, stop = layout.interval(model.vocab_size, ring, ring - 1)
        _require(
            start < stop,
            "vocabulary.degree",
            ring,
            f"leaves the last rank no rows of vocab_size {model.vocab_size}",
        )


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
    require(condition, f"strategy.{field}", value, rule)


def _at(strategy: Strategy, field: str) -> Any:
    value: Any = strategy
    for step in field.split("."):
        value = getattr(value, step)
    return value
