"""Parameters that stay gathered from the forward to the backward, as their next use is near."""

from mopsim.program.context import Context
from mopsim.program.units import vocabulary_matrix

HEAD = ("head", "final")
"""Units whose backward comes right after their forward."""


def near(context: Context) -> frozenset[int | str]:
    """Decoder and MTP layers, and units beside them, whose full parameters outlive their forward
    (Sharding.reuse_distance).

    Of layers the last ones, ahead of whose backward fewer parameters are used: the head's twice, and twice
    more after each MTP layer; those of each later layer in its forward, its backward and, if it is
    recomputed, once more (DeepSpeed, runtime/zero/partitioned_param_coordinator.py, __params_to_release).
    """
    distance, model, edges = context.stack.sharding.reuse_distance, context.model, context.edges
    if not distance or not context.shards_params:
        return frozenset()
    found = set[int | str](HEAD)
    tied = model.tie_word_embeddings
    matrix = vocabulary_matrix(edges["embedding"]) if tied else edges["head"].numel
    head = 2 * (matrix + edges["final"].numel)
    ahead = head
    for layer in reversed(range(model.num_hidden_layers + model.num_nextn_predict_layers)):
        if ahead >= distance:
            break
        found.add(layer)
        uses = 2 + context.recomputes(layer)
        ahead += uses * sum(unit.numel for unit in context.layers[layer])
        ahead += head * (layer >= model.num_hidden_layers)
    return frozenset(found)
