"""Stacks for tests: a shipped one with some of its entries changed."""

from typing import Any

from msgspec.structs import replace

from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.upgrade import Unfused

WORDS: dict[Unfused, tuple[str, str, Any]] = {
    "norms": ("kernels", "norm", "composed"),
    "rotary": ("kernels", "rotary", "composed"),
    "activation": ("kernels", "activation", "composed"),
    "residual": ("kernels", "residual", "composed"),
    "experts": ("kernels", "expert_rows", "composed"),
    "copies": ("sharding", "copies", True),
    "accumulation": ("kernels", "weight_grads", "composed"),
    "fills": ("kernels", "fills", True),
    "blocks": ("kernels", "ring_blocks", "composed"),
    "modules": ("host", "modules", True),
}


def changed(name: str, **sections: dict[str, Any]) -> Stack:
    """The shipped stack `name` with fields of its sections replaced; its name stays."""
    stack = load_stack(name)
    return replace(stack, **{key: replace(getattr(stack, key), **new) for key, new in sections.items()})


def unfused(*words: Unfused, **sections: dict[str, Any]) -> Stack:
    """A Megatron-Core that composes `words` and fuses all else, its modules included; nothing is sent beside
    rows."""
    fused = {"expert_products": "grouped", "residual": "fused", "qkv_split": "fused", "beside_rows": ()}
    found: dict[str, dict[str, Any]] = {"kernels": fused, "host": {"modules": False}}
    for word in words:
        section, field, value = WORDS[word]
        found.setdefault(section, {})[field] = value
    for section, fields in sections.items():
        found.setdefault(section, {}).update(fields)
    return changed("megatron-core", **found)
