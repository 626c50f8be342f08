"""What the `fully_shard` runtime runs, and what it refuses by name."""

from mopsim.common.errors import SpecError
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import EAGERS, Strategy

_RUNTIME = "the fully_shard runtime"


def check_supported(plan: Plan) -> None:
    """Raise SpecError naming the first strategy field that this runtime does not run."""
    for field, value, wanted in _fixed_fields(plan.strategy):
        if value not in wanted:
            allowed = " or ".join(repr(item) for item in wanted)
            raise SpecError(f"strategy.{field}", value, f"is not run by {_RUNTIME}: needs {allowed}")
    _check_offload(plan.strategy)
    degree, kv_heads = plan.strategy.attention.sequence, plan.model.num_key_value_heads
    if kv_heads % degree and degree % kv_heads:
        rule = f"and num_key_value_heads {kv_heads} do not divide each other"
        raise SpecError("strategy.attention.sequence", degree, rule)


def _fixed_fields(strategy: Strategy) -> list[tuple[str, object, tuple[object, ...]]]:
    """(field, its value, the values that are run)."""
    dense, experts, precision = strategy.dense, strategy.experts, strategy.precision
    return [
        ("runtime", strategy.runtime, ("fully_shard",)),
        ("pipeline.degree", strategy.pipeline.degree, (1,)),
        ("dense.tensor", dense.tensor, (1,)),
        ("dense.chunk_tokens", dense.chunk_tokens, (0,)),
        ("attention.exchange", strategy.attention.exchange, ("ulysses",)),
        ("attention.flash", strategy.attention.flash, (True,)),
        ("experts.tensor", experts.tensor, (1,)),
        ("experts.chunk_tokens", experts.chunk_tokens, (0,)),
        ("experts.balance", experts.balance, ("none",)),
        ("experts.plain", experts.plain, (False,)),
        ("activations.kept", strategy.activations.kept, ((),)),
        ("vocabulary.loss", strategy.vocabulary.loss, ("full", "chunked")),
        ("activations.recompute", strategy.activations.recompute, ("none", "full")),
        ("precision.grad", precision.grad, (precision.param,)),
        ("precision.moments", precision.moments, (precision.param,)),
        ("precision.master", precision.master, tuple(dict.fromkeys(("param", precision.param)))),
        ("precision.matmul", precision.matmul, ("compute", precision.compute)),
        ("precision.attention", precision.attention, ("compute",)),
        ("precision.vocabulary", precision.vocabulary, ("compute",)),
        ("graphs", strategy.graphs, ((),)),
        ("unfused", strategy.unfused, EAGERS),
    ]


def _check_offload(strategy: Strategy) -> None:
    """CPUOffloadPolicy moves parameters, gradients and optimizer state together, and the host updates
    them."""
    tier = strategy.optimizer.state_tier
    together = {
        "optimizer.update_on": strategy.optimizer.update_on,
        "dense.param_tier": strategy.dense.param_tier,
        "dense.grad_tier": strategy.dense.grad_tier,
        "experts.param_tier": strategy.experts.param_tier,
        "experts.grad_tier": strategy.experts.grad_tier,
    }
    for field, value in together.items():
        if value != tier:
            rule = f"is not run by {_RUNTIME}: offload moves all state together, so it must equal "
            rule += f"optimizer.state_tier {tier}"
            raise SpecError(f"strategy.{field}", value, rule)
    if tier == "host" and strategy.optimizer.host_fraction != 1.0:
        raise SpecError(
            "strategy.optimizer.host_fraction",
            strategy.optimizer.host_fraction,
            f"is not run by {_RUNTIME}: needs 1",
        )
    recompute, boundary = strategy.activations.recompute, strategy.activations.boundary_tier
    if boundary == "host" and recompute != "full":
        raise SpecError(
            "strategy.activations.boundary_tier",
            boundary,
            "needs activations.recompute full: nothing else has boundaries",
        )
