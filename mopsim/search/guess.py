"""A guess of each candidate's step time, closer than its lower bound: it orders the work, never rejects."""

import numpy as np

from mopsim.graph.shapes import attention_widths
from mopsim.search.bound import Bounder, bounders
from mopsim.search.problem import ULYSSES
from mopsim.search.refined import Refined
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds
from mopsim.search.wires import Message, Reals

OVERLAP = 0.85
"""Share of the shorter of two streams that the longer one hides: gathers and copies beside compute."""
USUAL_VIRTUAL = 4
"""Virtual stages where they are not chosen yet."""


def guess(space: Space) -> Reals:
    """Seconds of every row of a space."""
    blocks = [_guess(one) for one in bounders(space)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def likely(one: Refined) -> Reals:
    """Seconds of rows whose parts are known."""
    return _step(one, one.chain() * _free(one), one.taken())


def _guess(one: Bounder) -> Reals:
    """Compute and the exchanges that it waits for, on the slowest stage, without those that weaving hides."""
    waits = sum(one.busy([*one.exchanges(), *_regions(one)])) * (1 - one.layer.hidden_at(one.space))
    chain = one.slowest(one.layer_seconds(), one.head_seconds()) * _free(one)
    return _step(one, chain + waits * (1 + _bubble(one)))


def _step(one: Bounder, chain: Reals, taken: Reals | float = 0.0) -> Reals:
    """The slowest rank's passes and sends; beside them gathers, reductions and copies, mostly hidden; then
    what is reduced over copies of shards, and the optimizer. taken: of the compute, by collectives."""
    chain = chain + _sends(one)
    beside = np.maximum(sum(one.busy(one.weights())), one.copy_time())
    ring = np.maximum.reduce(one.busy(one.ring_blocks()))
    taken = np.maximum(1 - OVERLAP, taken)
    step = np.maximum(chain, beside) + taken * np.minimum(chain, beside + ring) + _late(one, chain)
    after = one.optimizer_time() + one.updates() + one.constant()
    return np.asarray(step + sum(one.busy(_copies(one))) + after)


def _free(one: Bounder) -> Reals:
    """How many times as long a stage takes as its passes; a layout says itself where its stages wait."""
    return np.where(one.c["layout"] == IDEAL, 1 + _bubble(one), 1.0)


def _bubble(one: Bounder) -> Reals:
    """Share of a pipeline's step that its stages wait for the first and the last microbatch."""
    return np.asarray((one.c["pipeline"] - 1) / (_virtual(one) * one.microbatches))


def _virtual(one: Bounder) -> Reals:
    """Virtual stages of a rank, the usual ones where no layout is chosen."""
    return np.where(one.c["layout"] == IDEAL, USUAL_VIRTUAL, one.c["virtual_stages"])


def _sends(one: Bounder) -> Reals:
    """Seconds of activations and gradients between stages that are waited for: of one microbatch, and where
    they are not hidden of every pass; those of a forward and a backward travel together where these are
    paired."""
    c, rate = one.c, one.hardware.scale_out.collectives["send_recv"].bandwidth.si
    each = one.tokens / c["tensor"] * one.model.hidden_size * one.compute / rate
    virtual = _virtual(one)
    paired = (virtual > 1) | (c["overlap"] == 1)
    often = np.where(one.sent_beside(virtual), 0.0, one.microbatches * np.where(paired, virtual, 2))
    return np.asarray((c["pipeline"] > 1) * (2 * (c["pipeline"] - 1) + often) * each)


def _late(one: Bounder, chain: Reals) -> Reals:
    """Seconds by which reductions and gathers over replicas outlast the microbatch that they go beside."""
    counts = kinds(one.model).values()
    once = sum(count * (up + out) for count, up, out in zip(counts, *one.hidden, strict=True))
    return np.asarray(np.maximum(once / one.c["pipeline"] - chain / one.microbatches, 0.0))


def _copies(one: Bounder) -> list[Message]:
    """Gradients of ZeRO-3 over as many copies of a rank's shard as there are, once a step."""
    c, sizes = one.c, one.sizes
    apart = c["experts"] * c["expert_tensor"]
    dense = (sizes.dense + sizes.head) / c["pipeline"] / c["tensor"] / c["dense_shard"]
    experts = sizes.experts / (c["pipeline"] * apart) / c["expert_shard"]
    copies, spare = one.stage / c["tensor"] / c["dense_shard"], one.stage / apart / c["expert_shard"]
    split, zero3 = c["tensor"] * c["dense_shard"], c["zero"] == 3
    return [
        Message("all_reduce", dense * one.reduce, np.where(zero3, copies, 1), 1, split),
        Message("all_reduce", experts * one.reduce, np.where(zero3, spare, 1), 1, apart * c["expert_shard"]),
    ]


def _regions(one: Bounder) -> list[Message]:
    """Rows gathered and scattered around the two tensor regions of a layer (arXiv 2205.05198), keys and
    values gathered over a sequence that is not split by heads."""
    c, m = one.c, one.model
    each = one.microbatches * (2 + c["recompute"]) / c["pipeline"]
    regions = 2 * m.num_hidden_layers - len(m.layers_without_ffn)
    rows = one.tokens * m.hidden_size * one.compute
    qk, v = attention_widths(m)
    heads = m.num_key_value_heads if m.attention == "gqa" else m.num_attention_heads
    keys = one.tokens * c["sequence"] * heads / c["tensor"] * (qk + v) * one.compute
    split = np.where(c["exchange"] == ULYSSES, 1, c["sequence"])
    return [
        Message("all_gather", rows, c["tensor"], 2 * each * regions),
        Message("all_gather", keys, split, each * (m.num_hidden_layers - m.num_linear_layers), c["tensor"]),
    ]
