"""What mopexec runs today, as data: the search plans only this by default."""

from collections.abc import Iterator
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.spec.layout import interval
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import EAGERS, Strategy

#: Model fields and the values that the executor's Transformer implements.
MODEL: dict[str, tuple[Any, ...]] = {
    "attention": ("gqa",),
    "attention_bias": ("none",),
    "attention_sinks": (False,),
    "qk_norm": ("none", "head"),
    "sliding_window": (0,),
    "expert_bias": (False,),
    "router_bias": (False,),
    "ffn_matrices": (3,),
    "ffn_bias": (False,),
    "norm": ("rmsnorm",),
    "learned_positions": (0,),
    "num_nextn_predict_layers": (0,),
    "shared_expert_gate": (False,),
    "tie_word_embeddings": (False,),
    "dropout": (0.0,),
}

#: Strategy fields that both runtimes hold to these values.
COMMON: dict[str, tuple[Any, ...]] = {
    "pipeline.degree": (1,),
    "dense.tensor": (1,),
    "attention.exchange": ("ulysses",),
    "attention.flash": (True,),
    "experts.tensor": (1,),
    "experts.balance": ("none",),
    "experts.plain": (False,),
    "activations.kept": ((),),
    "activations.layers_on_host": (0,),
    "experts.checkpoint": ("redispatch",),
    "experts.dispatch": ("all_to_all",),
    "vocabulary.fused": (False,),
    "overlap.grad_reduce": (False,),
    "overlap.param_gather": (False,),
    "overlap.pipeline": (False,),
    "overlap.tensor": (False,),
    "overlap.experts": (False,),
    "optimizer.host_fraction": (1.0,),
    "precision.matmul": ("compute",),
}

RUNTIMES: dict[str, dict[str, tuple[Any, ...]]] = {
    "flat_units": {
        "dense.zero": (3,),
        "dense.reshard_after_forward": (True,),
        "dense.param_tier": ("device",),
        "dense.grad_tier": ("device",),
        "experts.param_tier": ("device",),
        "experts.grad_tier": ("device",),
        "vocabulary.loss": ("full", "chunked", "ring"),
        "activations.recompute": ("full",),
        "unfused": ((),),
    },
    "fully_shard": {
        "dense.chunk_tokens": (0,),
        "experts.chunk_tokens": (0,),
        "vocabulary.loss": ("full", "chunked"),
        "vocabulary.degree": (1,),
        "activations.recompute": ("none", "full"),
        "precision.master": ("param",),
        "unfused": EAGERS,
    },
}


def unsupported(strategy: Strategy, model: ModelSpec) -> Iterator[SpecError]:
    """Every field of the strategy or the model that mopexec does not run yet, as the error that names it."""
    yield from unsupported_model(model)
    yield from _outside(strategy, COMMON | RUNTIMES[strategy.runtime], "strategy")
    if strategy.runtime == "fully_shard":
        yield from _fully_shard(strategy)
    else:
        yield from _flat_units(strategy, model)


def unsupported_model(model: ModelSpec) -> Iterator[SpecError]:
    """Every field of the model that mopexec does not run yet."""
    yield from _outside(model, MODEL, "model")


def runnable(strategy: Strategy, model: ModelSpec) -> SpecError | None:
    """None where mopexec runs this strategy on this model, else the first reason against it."""
    return next(unsupported(strategy, model), None)


def _outside(spec: Any, allowed: dict[str, tuple[Any, ...]], prefix: str) -> Iterator[SpecError]:
    for path, values in allowed.items():
        value = spec
        for step in path.split("."):
            value = getattr(value, step)
        if value not in values:
            names = " or ".join(repr(item) for item in values)
            yield SpecError(f"{prefix}.{path}", value, f"is not run by mopexec yet, only {names}")


def _flat_units(strategy: Strategy, model: ModelSpec) -> Iterator[SpecError]:
    """Relations between two fields: heads over ranks, rows of the ring, a master to update on the host."""
    degree, heads = strategy.attention.sequence, model.num_key_value_heads
    if heads % degree and degree % heads:
        rule = f"and num_key_value_heads {heads}: neither divides the other"
        yield SpecError("strategy.attention.sequence", degree, rule)
    if strategy.vocabulary.loss == "ring":
        ring = strategy.vocabulary.degree
        start, stop = interval(model.vocab_size, ring, ring - 1)
        if start >= stop:
            rule = f"leaves the last rank no rows of vocab_size {model.vocab_size}"
            yield SpecError("strategy.vocabulary.degree", ring, rule)
    if strategy.optimizer.update_on == "host" and strategy.precision.master == "param":
        rule = "leaves no master weights on the host, where optimizer.update_on is host"
        yield SpecError("strategy.precision.master", "param", rule)


def _fully_shard(strategy: Strategy) -> Iterator[SpecError]:
    """FSDP2's offload policy moves all state together, and the host updates it."""
    tiers = {
        "dense.param_tier": strategy.dense.param_tier,
        "dense.grad_tier": strategy.dense.grad_tier,
        "experts.param_tier": strategy.experts.param_tier,
        "experts.grad_tier": strategy.experts.grad_tier,
        "optimizer.update_on": strategy.optimizer.update_on,
    }
    for field, tier in tiers.items():
        if tier != strategy.optimizer.state_tier:
            yield SpecError(
                f"strategy.{field}",
                tier,
                f"differs from optimizer.state_tier {strategy.optimizer.state_tier}: "
                "fully_shard offloads all or nothing",
            )
    if strategy.experts.shard != strategy.expert_replicas:
        yield SpecError(
            "strategy.experts.shard",
            strategy.experts.shard,
            f"must be the {strategy.expert_replicas} replicas of an expert under fully_shard",
        )
