"""Closed-form lower bounds on a candidate's step time, device and host memory, for a whole space at once.

Each is at most what the simulator finds (tests/sim/test_search.py holds them against each other): peak rates
instead of curves, no dependencies between streams, no transients but those that any schedule needs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mopsim.common.units import DTYPE_BYTES
from mopsim.cost.compute import matmul_curve
from mopsim.graph.flops import flops_per_token, layer_kinds
from mopsim.graph.shapes import attention_widths
from mopsim.search.facts import SpaceFacts
from mopsim.search.layer import recomputed
from mopsim.search.problem import DEVICE, HOST, PARTS, RING, STREAMED, ULYSSES, offloaded
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds, load
from mopsim.search.wires import Message, Reals, Wires
from mopsim.spec.categories import RUNTIMES

BLOCK = 1 << 16
"""Rows bounded at a time: what is in between fits the cache, and little memory."""


@dataclass(frozen=True)
class Bounds:
    """Lower bounds per row of a space, seconds and bytes; parts: what that on `device` is made of.

    gathered: bytes of weights that a device gathers for use, not a bound.
    """

    time: Reals
    device: Reals
    host: Reals
    gathered: Reals
    parts: dict[str, Reals]


def bound(space: Space) -> Bounds:
    """Lower bounds of every candidate of a space."""
    if not len(space):
        empty = np.zeros(0)
        return Bounds(empty, empty, empty, empty, {})
    blocks = [one.all() for one in bounders(space)]
    if len(blocks) == 1:
        return blocks[0]

    def joined(name: str) -> Reals:
        return np.concatenate([getattr(one, name) for one in blocks])

    parts = {name: np.concatenate([one.parts[name] for one in blocks]) for name in blocks[0].parts}
    return Bounds(joined("time"), joined("device"), joined("host"), joined("gathered"), parts)


def bounders(space: Space) -> Iterator["Bounder"]:
    """What bounds the rows of a space, block by block."""
    given = SpaceFacts.of(space) if len(space) else None
    for start in range(0, len(space), BLOCK):
        assert given is not None
        yield Bounder(space.part(start, start + BLOCK), given)


class Bounder:
    def __init__(self, space: Space, given: SpaceFacts) -> None:
        self.space, self.problem, self.given = space, space.problem, given
        self.sizes, self.hardware, self.layer = given.sizes, given.hardware, given.layer
        self.c = {name: column.astype(np.float64) for name, column in space.columns.items()}
        self.model = self.problem.model
        first = space.build(0)
        precision = first.precision
        self.separate_master = precision.master != "param"
        self.fully_shard = space.stack.sharding.fsdp
        self.compute = DTYPE_BYTES[precision.compute]
        self.param, self.grad = DTYPE_BYTES[precision.param], DTYPE_BYTES[precision.grad]
        self.reduce = DTYPE_BYTES[precision.reduce]
        self.moments = 2 * DTYPE_BYTES[precision.moments]
        self.wide = DTYPE_BYTES[precision.moments]
        self.dtype = precision.compute if precision.matmul == "compute" else precision.matmul
        self.wires = Wires(self.hardware, self.problem.world_size)
        self.tokens = space.tokens().astype(np.float64)
        world, c = self.problem.world_size, self.c
        self.stage = world / c["pipeline"]
        self.microbatches = self.problem.training.global_batch / (
            c["micro_batch"] * self.stage / (c["tensor"] * c["sequence"])
        )
        self.ring = c["loss"] == RING
        layers = self.model.num_hidden_layers
        self.again = recomputed(space.columns["recompute"], space.columns["modules"])
        self.away = c["boundary_host"] * offloaded(layers, space.columns["boundary_parts"]) / layers
        """Share of the layer inputs that goes to the host."""
        self.state_away = np.where(c["state"] == DEVICE, 0.0, c["state_parts"] / PARTS)
        """Share of the optimizer state that is on the host."""

    def all(self) -> Bounds:
        device, parts = self.device_memory()
        return Bounds(self.time(), device, self.host_memory(), self.gathered(), parts)

    def held(self) -> tuple[Reals, Reals]:
        """Parameters per rank: (that the weights take, that the optimizer state takes). Ceilings left out."""
        c, split, zero3 = self.c, self.c["pipeline"] * self.c["tensor"], self.c["zero"] == 3
        dense_shard = np.where(zero3, c["dense_shard"], self.stage / c["tensor"])
        replicas = self.stage / (c["experts"] * c["expert_tensor"])
        sharded = self.sizes.dense / (split * dense_shard)
        sharded = sharded + self.sizes.head / np.where(self.ring, self.stage, split * dense_shard)
        experts = self.sizes.experts / (c["pipeline"] * c["experts"] * c["expert_tensor"])
        state = sharded + experts / np.where(zero3, c["expert_shard"], replicas)
        whole = (self.sizes.dense + self.sizes.head) / split + experts
        return np.where(zero3, state, whole), state

    def master(self) -> Reals:
        """Bytes of master weights per parameter: none where the parameter shard is the master."""
        streamed = self.c["state"] == STREAMED
        return np.asarray(np.where(streamed | self.separate_master, self.wide, 0.0))

    def inputs(self) -> Reals:
        """Bytes of the layer inputs that wait for the backward."""
        rows = self.model.num_hidden_layers / self.c["pipeline"] * self.tokens / self.c["tensor"]
        return np.asarray(rows * self.model.hidden_size * self.compute)

    def waiting(self) -> Reals:
        """Bytes of one microbatch on the device that wait for the backward: the layer inputs that do not go
        to the host, and what the layers keep beside them."""
        rows = self.model.num_hidden_layers / self.c["pipeline"] * self.tokens / self.c["tensor"]
        return np.asarray(rows * self.layer.kept[self.again] + (1 - self.away) * self.inputs())

    def in_backward(self) -> Reals:
        """Bytes that the backward of a layer takes above its start."""
        return np.asarray(self.tokens / self.c["tensor"] * self.layer.height[self.again])

    def moved(self) -> Reals:
        """Bytes of the layer inputs of a microbatch that go to the host: in staged programs (ZeRO below 3)
        not the last layer's, whose backward may come next."""
        layers = self.model.num_hidden_layers / self.c["pipeline"]
        last = np.where(self.c["zero"] == 3, 0, np.minimum(1 / layers, 1))
        return np.asarray(self.away * self.inputs() * (1 - last))

    def device_memory(self) -> tuple[Reals, dict[str, Reals]]:
        c = self.c
        weights, state = self.held()
        params = np.where(c["offload"] == 1, 0, weights * self.param)
        grads = np.where(c["offload"] == 1, 0, weights * self.grad)
        optimizer = (1 - self.state_away) * state * (self.master() + self.moments)
        early = np.zeros_like(grads) if self.fully_shard else grads
        boundaries = self.waiting()
        vocabulary = self.model.vocab_size / np.maximum(c["vocabulary"], c["tensor"])
        logits = self.tokens / c["loss_slices"] * vocabulary * self.compute
        logits = np.where(c["pipeline"] == 1, logits, 0.0)  # of a stage with fewer layers, it may be
        resident = params + optimizer
        last = np.maximum(logits, self.in_backward())
        peak = np.maximum(resident + early + boundaries + last, resident + grads)
        peak = np.maximum(peak, self.first_stage(boundaries))
        parts = {
            "params": params,
            "grads": grads,
            "optimizer": optimizer,
            "boundaries": boundaries,
            "logits": logits,
        }
        return peak, parts

    def first_stage(self, boundaries: Reals) -> Reals:
        """Bytes of the first stage of a pipeline: what it keeps of the microbatches under way; below ZeRO-3
        its layers' weights, gradients and optimizer state."""
        c, layers = self.c, self.model.num_hidden_layers
        under_way = np.minimum(np.minimum(c["pipeline"], self.microbatches), np.maximum(self.microbatches, 1))
        even = layers // c["pipeline"] * c["pipeline"] / layers
        counts = kinds(self.model)
        dense, routed = (
            sum(self.sizes.layers[kind][at] * many for kind, many in counts.items()) for at in (0, 1)
        )
        below = np.where(c["zero"] == 3, 0.0, self.replicated(dense, routed) / c["pipeline"])
        return np.asarray(even * (under_way * boundaries + below))

    def replicated(self, dense: Reals | float, routed: Reals | float) -> Reals:
        """Bytes of weights and gradients, and the share of optimizer state on the device, below ZeRO-3, of
        parameters of one stage that ranks of `tensor`, or of experts, split."""
        c = self.c
        each = (1 - self.state_away) * (self.master() + self.moments)
        whole = dense / c["tensor"] + routed / (c["experts"] * c["expert_tensor"])
        return np.asarray(whole * (self.param + self.grad) + (dense + routed) / self.stage * each)

    def host_memory(self) -> Reals:
        weights, state = self.held()
        off = self.state_away * state * (self.master() + self.moments)
        off = off + np.where(self.c["offload"] == 1, weights * (self.param + self.grad), 0)
        return off + self.moved()

    def gathered(self) -> Reals:
        """Bytes of weights gathered for a layer and the next, or of all that stay until the backward."""
        c, layers = self.c, float(self.model.num_hidden_layers)
        experts = self.sizes.experts / (c["experts"] * c["expert_tensor"])
        whole = (self.sizes.dense / c["tensor"] + experts) * self.compute
        each = np.minimum(whole, 2 * whole / layers)
        held = np.where(c["reshard"] == 1, each, whole)
        return np.asarray(np.where(c["zero"] == 3, held, 0.0))

    def time(self) -> Reals:
        """The slowest stream, then the optimizer. Compute loses `communication_share` to a busy fabric."""
        talks = self.talks()
        computes = self.slowest_stage(self.layer_seconds(), self.head_seconds())
        busy = computes + self.hardware.communication_share * talks
        slowest = np.maximum.reduce([busy, talks, self.copy_time()])
        return np.asarray(slowest + self.optimizer_time() + self.constant())

    def talks(self) -> Reals:
        """Seconds in which the busier fabric is busy."""
        return np.maximum(*self.busy([*self.weights(), *self.exchanges(), *self.ring_blocks()]))

    def constant(self) -> float:
        """Calibrated seconds per step: what any runtime needs at least."""
        return min(self.hardware.step_overhead(runtime) for runtime in RUNTIMES)

    def scale(self, kind: str) -> float:
        return self.wires.scale(kind)

    def layer_seconds(self) -> list[Reals]:
        """Of each kind of layer, on the rank that has one: products of forward, backward (twice) and
        recompute of all microbatches at the best rate of the curve, traffic of other kernels, launches."""
        training, device, c = self.problem.training, self.hardware.device, self.c
        share = training.seq_len * training.global_batch / self.problem.world_size * c["pipeline"]
        scale = self.scale("memory_bound") / device.memory_bandwidth.si
        launch = self.microbatches * 20 * device.launch_overhead.si * min(self.scale("memory_bound"), 1.0)
        chunks, found = np.maximum(c["chunks"], 1), []
        for (_, has_experts), flops in layer_kinds(self.model, training.seq_len).items():
            traffic = self.layer.attention_traffic * (1 + c["recompute"] / 2)
            traffic = traffic + has_experts * self.layer.experts_traffic
            seconds = self.work(flops) * c["pipeline"] + share * traffic * scale
            found.append(np.asarray(seconds + launch * (1 + has_experts * chunks)))
        return found

    def head_seconds(self) -> Reals:
        """The same of what is beside the decoder layers: vocabulary and MTP layers, on the stage that has
        it."""
        seq_len = self.problem.training.seq_len
        flops = flops_per_token(self.model, seq_len)
        counts = kinds(self.model)
        for kind, layer in layer_kinds(self.model, seq_len).items():
            for name, each in layer.items():
                flops[name] -= counts[kind] * each
        return np.asarray(self.work(flops) * self.c["pipeline"])

    def slowest_stage(self, layers: Sequence[Reals], head: Reals) -> Reals:
        """Seconds of the slowest rank: of the mean stage, or, in a layout, of the stage whose layers (of the
        last, with the loss) and what a microbatch takes on the way there and back are most. layers, head: as
        `layer_seconds` and `head_seconds`."""
        c, counts = self.c, list(kinds(self.model).values())
        mean = head + sum(count * each for count, each in zip(counts, layers, strict=True))
        found = np.asarray(mean / c["pipeline"])
        chosen = (c["pipeline"] > 1) & (c["layout"] != IDEAL)
        if not chosen.any():
            return found
        every = np.stack(layers, axis=1)
        laid = (c["pipeline"] * 1000 + c["virtual_stages"]) * 10 + c["layout"]
        for code in np.unique(laid[chosen]).astype(np.int64).tolist():
            rows = np.flatnonzero(laid == code)
            stage = load(self.model, code // 10000, code // 10 % 1000, code % 10)
            each = every[rows] @ stage.layers.T
            each += every[rows] / self.microbatches[rows, None] @ stage.before.T
            each[:, -1] += head[rows]
            found[rows] = np.maximum(found[rows], each.max(axis=1))
        return found

    def work(self, flops: Mapping[str, float]) -> Reals:
        """Seconds of a rank's share of forward FLOP by component, with backward and recompute."""
        training, device = self.problem.training, self.hardware.device
        share = training.seq_len * training.global_batch / self.problem.world_size
        curve = matmul_curve(self.hardware, self.dtype)
        grouped_curves = [one for one in device.grouped_matmul if one.dtype == self.dtype] or [curve]
        again = self.c["recompute"]
        core, experts, head = (flops.get(name, 0.0) for name in ("attention_core", "experts", "vocabulary"))
        rest = sum(flops.values()) - core - experts - head
        length = training.seq_len
        matmul = (3 + again) * rest + 3 * head
        grouped = (3 + again * 2 / 3) * experts
        rate = curve.peak.si * min(curve.efficiency, curve.held)
        seconds = share * matmul / rate * self.scale("matmul")
        rate = max(one.peak.si * min(one.efficiency, one.held) for one in grouped_curves)
        seconds = seconds + share * grouped / rate * self.scale("grouped_matmul")
        shape = self.hardware.device.attention
        attention = ((1 + again) / shape.forward + 2.5 / shape.backward) * (length + shape.seq_half) / length
        return np.asarray(seconds + share * core / curve.peak.si * attention * self.scale("attention"))

    def busy(self, messages: Iterable[Message]) -> tuple[Reals, Reals]:
        """Seconds in which messages keep (scale-up, scale-out) busy."""
        up, out = np.zeros(len(self.space)), np.zeros(len(self.space))
        for message in messages:
            inside, across = self.wires.seconds(message)
            up, out = up + inside, out + across
        return up, out

    def weights(self) -> list[Message]:
        """Gathers and reductions of weights that no schedule of ZeRO-3 avoids."""
        c, m = self.c, self.model
        if not (c["zero"] == 3).all():
            return []
        layers = float(m.num_hidden_layers)
        dense = (self.sizes.dense - m.vocab_size * m.hidden_size) / layers / c["tensor"]
        gathers = c["reshard"] + 1
        unit = self.sizes.largest_expert_unit / c["experts"]
        times, experts = layers * self.microbatches, self.sizes.moe_layers * self.microbatches
        shard, copies = c["dense_shard"], c["expert_shard"]
        apart = np.where(c["strided"] == 1, 1, c["experts"] * c["expert_tensor"])
        return [
            Message("all_gather", dense * self.compute, shard, times * gathers, c["tensor"]),
            Message("reduce_scatter", dense * self.reduce, shard, times, c["tensor"]),
            Message("all_gather", unit * self.compute, copies, experts * gathers, apart),
            Message("reduce_scatter", unit * self.reduce, copies, experts, apart),
        ]

    def ring_blocks(self) -> list[Message]:
        """Blocks of the output projection or of the tokens that go round the vocabulary ring."""
        c, m = self.c, self.model
        if not (self.ring & (c["vocabulary"] > 1)).any():
            return []
        rows = m.vocab_size / c["vocabulary"]
        block = np.minimum(self.tokens, rows) * m.hidden_size * self.compute
        return [Message("send_recv", block, c["vocabulary"], 2 * (c["vocabulary"] - 1) * self.microbatches)]

    def exchanges(self) -> list[Message]:
        """Sequence and expert all-to-alls of forward, recompute and backward."""
        c, m = self.c, self.model
        tokens = self.tokens / c["tensor"]
        qk, v = attention_widths(m)
        passes = self.microbatches * (2 + c["recompute"]) * m.num_hidden_layers / c["pipeline"]
        sent = tokens * m.num_attention_heads * min(qk, v) * self.compute
        routes = tokens / np.maximum(c["chunks"], 1) * m.num_experts_per_tok * m.hidden_size * self.compute
        moe_layers = self.sizes.moe_layers / c["pipeline"] * np.maximum(c["chunks"], 1)
        times = self.microbatches * moe_layers * (4 + c["recompute"])
        heads = np.where(c["exchange"] == ULYSSES, c["sequence"], 1)
        far = np.where(c["strided"] == 1, self.stage / c["experts"], c["expert_tensor"])
        once = np.where(c["dispatcher"] > 0, m.num_experts_per_tok, 0)
        return [
            Message("all_to_all", sent, heads, 2 * passes, c["tensor"]),
            Message("all_to_all", routes, c["experts"], times, far, once),
        ]

    def copy_time(self) -> Reals:
        """Layer inputs out and back over the host link, the slower way; with offload the weights up for each
        use and their gradients down."""
        c, host = self.c, self.hardware.host
        moved, offload = self.moved() * self.microbatches, c["offload"] * self.held()[0] * self.microbatches
        uses = c["reshard"] + 1
        up = (moved + offload * uses * self.param) * self.scale("h2d") / host.link_h2d.si
        down = (moved + offload * self.grad) * self.scale("d2h") / host.link_d2h.si
        return np.asarray(np.maximum(up, down) * host.link_sharing)

    def optimizer_time(self) -> Reals:
        _, state = self.held()
        device, host = self.hardware.device, self.hardware.host
        on_device = (1 - self.state_away) * state / device.adam_rate.si * self.scale("optimizer")
        each = self.scale("h2d") / host.link_h2d.si * host.link_sharing
        streamed = self.state_away * state * (self.wide + self.moments) * each
        on_host = self.state_away * state / host.adam_rate.si * self.scale("host_optimizer")
        away = np.where(self.c["state"] == HOST, on_host, streamed)
        return np.asarray(np.maximum(on_device, away))
