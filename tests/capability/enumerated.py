"""Every field of the specs, and values of each: Literals wholly, numbers and names at representative values.

Found by introspection, so that a new field is in what every test of the capability table walks through.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from mopsim.common.io import Spec
from mopsim.spec import stack, strategy
from mopsim.spec.model import ModelSpec
from mopsim.spec.training import TrainSpec

ROOTS: dict[str, type[Spec]] = {
    "strategy": strategy.Strategy,
    "model": ModelSpec,
    "training": TrainSpec,
    "stack": stack.Stack,
}

REPRESENTATIVE: dict[str, tuple[Any, ...]] = {
    "stack.sharding.buckets": (0.0, 1e9),
    "stack.hides.grad_reduce": (False, True, "zero3"),
    "strategy.activations.modules": (("core_attn",), ("layernorm", "moe"), ("mlp",), ("moe_act",)),
    "strategy.activations.save_ops": (("q_proj",), ("attention_core", "dispatch")),
    "strategy.activations.host_budget": (0, 1 << 14),
    "strategy.activations.recompute_num_layers": (0, 1),
    "strategy.pipeline.layers": ((1, 3), (2, 2), (1, 1, 1, 1)),
    "strategy.optimizer.host_fraction": (0.0, 0.5, 1.0),
    "strategy.optimizer.bucket_params": (100_000, 100_000_000),
    "strategy.experts.capacity": (1.0, 1.5),
    "strategy.experts.threshold": (1.0, 50.0),
    "strategy.experts.min_rows": (1, 100_000),
    "strategy.stack": ("mopexec-flat", "mopexec-fsdp2", "mopexec-split", "megatron-core"),
    "model.dropout": (0.0, 0.1),
    "model.rms_norm_eps": (1e-6, 1e-5),
    "model.mlp_only_layers": ((), (2,), (1, 3)),
    "model.sliding_window": (0, 16),
    "model.attention_chunk_size": (0, 16),
    "model.layer_types": ((), ("full_attention", "sliding_attention") * 2, ("linear_attention",) * 4),
    "model.layers_without_ffn": ((), (1,)),
    "model.linear_attention.num_value_heads": (0, 8, 16),
    "model.linear_attention.chunk": (0, 16, 32),
    "model.partial_rotary_factor": (1.0, 0.5),
    "model.learned_positions": (0, 256),
    "model.total_params": (None, 1e6),
    "model.active_params": (None, 1e6),
    "training.routing": ("balanced", "forced", "70/2", "zipf:1"),
    "training.beta1": (0.9, 0.8),
    "training.beta2": (0.95, 0.99),
    "training.bias_update_rate": (1e-3, 0.0),
    "stack.kernels.attention": ({"default": "profile"}, {"default": "scores"}, {"blackwell": "flash2"}),
    "stack.cpu": (None, stack.Kernels(norm="composed")),
    "stack.sharding.update_group": (0.0, 2.0),
    "stack.sharding.bucket": (0.0, 1e12),
    "stack.communication_share": ({}, {"blackwell": 0.9}),
    "stack.sources": ({}, {"kernels.norm": "a test"}),
    "stack.recompute.kept": ((), ("attention_core",)),
    "stack.recompute.selective": ((), ("core_attn",)),
    "stack.host.graphs": ((), ("attention",), ("step",)),
    "stack.host.queues": ({"default": "each"}, {"default": "one"}, {"blackwell": "split"}),
}  # fmt: skip
"""Where the type alone says too little."""


def leaves(root: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, type) of every field that holds a value and no struct."""
    yield from _leaves(root, ROOTS[root])


def _leaves(path: str, spec: type[Spec]) -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(spec).items():
        if name.startswith("__"):
            continue
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _leaves(f"{path}.{name}", kind)
        else:
            yield f"{path}.{name}", kind


def values(path: str, kind: Any) -> tuple[Any, ...]:
    """Values to try for a field of this type."""
    if path in REPRESENTATIVE:
        return REPRESENTATIVE[path]
    literals = _literals(kind)
    if get_origin(kind) is tuple:
        return ((), *((value,) for value in literals), literals) if literals else ((), ("a",))
    if literals:
        return literals
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        return (False, True)
    if int in kinds:
        return (0, 1, 2, 4)
    if float in kinds:
        return (0.0, 1e-3, 0.5, 2.0)
    assert str in kinds, f"{path}: no values known for {kind}"
    return ("a", "b")


def _literals(kind: Any) -> tuple[Any, ...]:
    """The members of a Literal, wherever in the type it stands (a union, a tuple)."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for inner in get_args(kind) for value in _literals(inner))


def at(spec: Any, path: str) -> Any:
    """The value at a dotted path below `spec`."""
    for step in path.split("."):
        spec = getattr(spec, step)
    return spec


def changed(spec: Any, path: str, value: Any) -> Any:
    """`spec` with another value at a dotted path. Raises MopError where the spec itself refuses it."""
    name, _, rest = path.partition(".")
    inner = changed(getattr(spec, name), rest, value) if rest else value
    return msgspec.structs.replace(spec, **{name: inner})
