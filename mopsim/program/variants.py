"""Layers that run otherwise than the others of their network: in another precision, or not recomputed."""

import dataclasses

from msgspec.structs import replace

from mopsim.program.context import Context

Usual = tuple[bool, bool]
"""Whether a layer's products have the strategy's recipe, and whether it is recomputed as is asked."""


def usual(context: Context, layer: int) -> Usual:
    """Both of a layer."""
    return context.precision(layer) is context.strategy.precision, layer not in context.not_recomputed


def context_of(context: Context, recipe: bool, recomputed: bool) -> Context:
    """As of layers whose products have no recipe, or that are not recomputed though others are."""
    given = strategy = context.strategy
    if not recipe:
        strategy = replace(strategy, precision=given.precision.without_recipe)
    if not recomputed:
        kept = replace(given.activations, recompute="none", save_ops=(), recompute_num_layers=0)
        strategy = replace(strategy, activations=kept)
    return dataclasses.replace(context, strategy=strategy)
