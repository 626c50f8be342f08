"""Fewer values an axis, where a search is one of many (sizing asks at a dozen node counts)."""

from collections.abc import Callable
from typing import Any

from mopsim.search.problem import EXCHANGES, PARTS, RECOMPUTED, Axes, Problem, Values

USUAL = ((), ("layernorm", "moe_act"), ("mla_up_proj", "mlp"), ("moe",))
"""Sets of recomputed modules that are kept."""


def coarse(problem: Problem, axes: Axes) -> Axes:
    """The axes with what moves a step's time by per cents thinned out; degrees stay.

    A ring spans a node or all ranks; loss and dense FFN go slice by slice; one bucket size a state; virtual
    stages are powers of two; sequences are traded in a ring; experts lie side by
    side; half of the optimizer is not tried on the host.
    """
    ring = {problem.hardware.devices_per_node, problem.world_size}
    keep: dict[Any, Callable[[Any], bool]] = {
        "vocabulary": lambda value: value in ring,
        "chunks": lambda value: value in (1, 4, 32),
        "ffn_slices": lambda value: value > 1,
        "loss_slices": lambda value: value > 1,
        ("virtual_stages", "layout"): lambda value: value[0] in (1, 2, 4, 8),
        "modules": lambda value: RECOMPUTED[value] in USUAL,
        "exchange": lambda value: EXCHANGES[value] == "ring",
        "strided": lambda value: value == 0,
        ("state", "state_parts"): lambda value: value[1] != PARTS // 2,
    }
    return {key: _thin(key, values, keep.get(key)) for key, values in axes.items()}


def _thin(key: Any, values: Values, keep: Callable[[Any], bool] | None) -> Any:
    """The values to keep of one axis; all of them where none would be left."""
    if key == ("state", "bucket", "beside"):
        return list({(one[0], one[2]): one for one in values if isinstance(one, tuple)}.values())
    return [value for value in values if keep is None or keep(value)] or list(values)
