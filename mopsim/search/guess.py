"""A guess of each candidate's step time, closer than its lower bound: it orders the work, never rejects."""

import numpy as np

from mopsim.graph.shapes import attention_widths
from mopsim.search.bound import Bounder, bounders
from mopsim.search.problem import ULYSSES
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL
from mopsim.search.wires import Message, Reals

OVERLAP = 0.85
"""Share of the shorter of two streams that the longer one hides: gathers and copies beside compute."""
USUAL_VIRTUAL = 4
"""Virtual stages where they are not chosen yet."""


def guess(space: Space) -> Reals:
    """Seconds of every row of a space."""
    blocks = [_guess(one) for one in bounders(space)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def _guess(one: Bounder) -> Reals:
    """Compute and the exchanges that it waits for, on the slowest stage; beside them gathers, reductions and
    copies, mostly hidden; then the reduction over replicas and the optimizer."""
    sequence, experts = one.exchanges()
    waits = sum(one.busy([sequence, *_regions(one)])) * (1 + _bubble(one))
    waits = waits + sum(one.busy([experts])) * (1 - OVERLAP * one.c["overlap"])
    chain = (
        one.slowest_stage(one.layer_seconds(), one.head_seconds()) * (1 + _bubble(one)) + waits + _sends(one)
    )
    beside = np.maximum(sum(one.busy(one.weights())), one.copy_time())
    ring = np.maximum.reduce(one.busy(one.ring_blocks()))
    step = np.maximum(chain, beside) + (1 - OVERLAP) * np.minimum(chain, beside + ring)
    return np.asarray(step + sum(one.busy(_replicas(one))) + one.optimizer_time() + one.constant())


def _bubble(one: Bounder) -> Reals:
    """Share of a pipeline's step that its stages wait for the first and the last microbatch."""
    virtual = np.where(one.c["layout"] == IDEAL, USUAL_VIRTUAL, one.c["virtual_stages"])
    return np.asarray((one.c["pipeline"] - 1) / (virtual * one.microbatches))


def _sends(one: Bounder) -> Reals:
    """Seconds of activations and gradients between stages, of which one microbatch's are waited for."""
    rate = one.hardware.scale_out.collectives["send_recv"].bandwidth.si
    each = one.tokens / one.c["tensor"] * one.model.hidden_size * one.compute / rate
    return np.asarray(2 * (one.c["pipeline"] - 1) * each)


def _replicas(one: Bounder) -> list[Message]:
    """Gradients and weights of replicas, once a step: of ZeRO below 3 all that a rank holds; of ZeRO-3 its
    shard, over as many copies as there are."""
    c, sizes = one.c, one.sizes
    zero3 = c["zero"] == 3
    dense = (sizes.dense + sizes.head) / c["pipeline"] / c["tensor"]
    experts = sizes.experts / (c["pipeline"] * c["experts"] * c["expert_tensor"])
    ranks, homes = one.stage / c["tensor"], one.stage / (c["experts"] * c["expert_tensor"])
    copies, spare = ranks / c["dense_shard"], homes / c["expert_shard"]
    apart = c["experts"] * c["expert_tensor"]
    below = np.where(zero3, 1, ranks), np.where(zero3, 1, homes)
    return [
        Message("reduce_scatter", dense * one.reduce, below[0], 1, c["tensor"]),
        Message("all_gather", dense * one.compute, below[0], 1, c["tensor"]),
        Message("reduce_scatter", experts * one.reduce, below[1], 1, apart),
        Message("all_gather", experts * one.compute, below[1], 1, apart),
        Message(
            "all_reduce", dense / c["dense_shard"] * one.reduce, np.where(zero3, copies, 1), 1,
            c["tensor"] * c["dense_shard"],
        ),
        Message(
            "all_reduce", experts / c["expert_shard"] * one.reduce, np.where(zero3, spare, 1), 1,
            apart * c["expert_shard"],
        ),
    ]  # fmt: skip


def _regions(one: Bounder) -> list[Message]:
    """Rows gathered and scattered around the two tensor regions of a layer (arXiv 2205.05198), keys and
    values gathered over a sequence that is not split by heads."""
    c, m = one.c, one.model
    passes = one.microbatches * (2 + c["recompute"]) * m.num_hidden_layers / c["pipeline"]
    rows = one.tokens * m.hidden_size * one.compute
    qk, v = attention_widths(m)
    heads = m.num_key_value_heads if m.attention == "gqa" else m.num_attention_heads
    keys = one.tokens * c["sequence"] * heads / c["tensor"] * (qk + v) * one.compute
    split = np.where(c["exchange"] == ULYSSES, 1, c["sequence"])
    return [
        Message("all_gather", rows, c["tensor"], 4 * passes),
        Message("all_gather", keys, split, passes, c["tensor"]),
    ]
