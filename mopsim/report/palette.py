"""Colours of what figures and pages draw, by its name."""

from collections.abc import Iterable

COLOURS = {
    "params": "#1b4f72", "grads": "#2e86c1", "optimizer": "#85c1e9", "gathered": "#117864",
    "gathered_grads": "#48c9b0", "boundaries": "#b7950b", "activations": "#f4d03f", "dispatch": "#ca6f1e",
    "logits": "#922b21", "staging": "#8e44ad", "framework": "#909497",
    "embedding": "#a9c97b", "attention": "#1b4f72", "dense_ffn": "#2e86c1", "router": "#f4d03f",
    "experts": "#ca6f1e", "shared_experts": "#f0b27a", "vocabulary": "#922b21", "other": "#bfc9ca",
    "runtime": "#566573", "waiting": "#d5d8dc",
    "forward": "#2e86c1", "recompute": "#f4d03f", "backward": "#ca6f1e", "step": "#8e44ad",
    "matmul": "#1b4f72", "grouped_matmul": "#ca6f1e", "memory_bound": "#909497", "all_gather": "#117864",
    "reduce_scatter": "#48c9b0", "all_reduce": "#45b8d8", "all_to_all": "#b7950b", "send_recv": "#7d6608",
    "h2d": "#8e44ad", "d2h": "#bb8fce", "host_optimizer": "#e59866", "host_memory": "#d98880",
    "host": "#34495e", "other stages": "#922b21",
}  # fmt: skip
"""Of memory by category, components, phases, and kinds of work with what compute waits for."""
SERIES = ("#ca6f1e", "#1b4f72", "#117864", "#922b21", "#8e44ad", "#7d6608", "#2e86c1", "#515a5a")
"""Of contenders and machines."""
UNKNOWN = "#515a5a"


def colour(name: str) -> str:
    return COLOURS.get(name, UNKNOWN)


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of COLOURS, then the unknown: legends of two figures agree."""
    places = {name: place for place, name in enumerate(COLOURS)}
    return sorted(dict.fromkeys(names), key=lambda name: places.get(name, len(places)))
