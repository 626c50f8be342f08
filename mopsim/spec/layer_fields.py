"""The fields of a ModelSpec that say which layers are dense, and which have a window."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

LayerType = Literal["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]
MOST_LAYERS, MOST_TOKENS = 10_000, 2**40
LINEAR: LayerType = "linear_attention"
WINDOWS: dict[str, LayerType] = {
    "sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"
}  # fmt: skip
"""Fields that say how wide a window is, and the words for layers that have such a one."""


def dense_fields(dense: Iterable[int], layers: int) -> dict[str, Any]:
    """The fields that say which of the decoder layers of a network with experts are dense."""
    found = set(dense)
    leading = next((layer for layer in range(layers) if layer not in found), layers)
    return {"first_k_dense_replace": leading, "mlp_only_layers": tuple(sorted(found - set(range(leading))))}


def window_fields(windowed: Sequence[bool], width: int, field: str = "sliding_window") -> dict[str, Any]:
    """The fields that say which decoder layers have a window of so many tokens; the period where one says
    it."""
    if not any(windowed):
        return {}
    for period in range(1, len(windowed) + 1):
        if all(one == (layer % period == 0) for layer, one in enumerate(windowed)):
            return {field: width, "sliding_window_period": period}
    return {
        field: width,
        "layer_types": tuple(WINDOWS[field] if one else "full_attention" for one in windowed),
    }
