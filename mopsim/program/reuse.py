"""Parameters that stay gathered from the forward to the backward, as their next use is near."""

from mopsim.program.context import Context

HEAD = ("head", "final")
"""Units whose backward comes right after their forward."""


def near(context: Context) -> frozenset[int | str]:
    """Decoder layers, and units beside them, whose full parameters outlive their forward
    (Sharding.reuse_distance).

    Of layers the last ones, ahead of whose backward fewer parameters are used: the head's twice, and those of
    each later layer in its forward, its backward and, if it is recomputed, once more (DeepSpeed,
    runtime/zero/partitioned_param_coordinator.py, __params_to_release).
    """
    distance = context.stack.sharding.reuse_distance
    if not distance or not context.shards_params:
        return frozenset()
    found = set[int | str](HEAD)
    ahead = 2 * sum(context.edges[name].numel for name in HEAD if name in context.edges)
    for layer in reversed(range(context.model.num_hidden_layers)):
        if ahead >= distance:
            break
        found.add(layer)
        uses = 2 + context.recomputes(layer)
        ahead += uses * sum(unit.numel for unit in context.layers[layer])
    return frozenset(found)
