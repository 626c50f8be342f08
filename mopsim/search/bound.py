"""Closed-form lower bounds on a candidate's step time, device and host memory, for a whole space at once.

Each is at most what the simulator finds (tests/sim/test_search.py holds them against each other): peak
rates instead
of curves, no dependencies between streams, no transients but those that any schedule needs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mopsim.common.units import DTYPE_BYTES
from mopsim.cost.compute import matmul_curve
from mopsim.layers.flops import flops_per_token
from mopsim.layers.shapes import attention_widths
from mopsim.layers.tensors import tensors
from mopsim.search.space import DEVICE, HOST, RING, STREAMED, ULYSSES, Space, offloaded
from mopsim.spec.categories import RUNTIMES

Reals = NDArray[np.float64]
BLOCK = 1 << 16
"""Rows bounded at a time: what is in between fits the cache, and little memory."""
Message = tuple[str, Reals, Reals, Reals]
"""(kind of collective, bytes of the full buffer, ranks, times in a step)."""


@dataclass(frozen=True)
class Bounds:
    """Lower bounds per row of a space. guess: a time that adds what the bound lets overlap; it orders,
    never rejects.

    parts: what the bound on `device` is made of, by category.
    """

    time: Reals
    guess: Reals
    device: Reals
    host: Reals
    parts: dict[str, Reals]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model by how they are sharded."""

    dense: int
    experts: int
    head: int
    largest_expert_unit: int
    moe_layers: int

    @staticmethod
    def of(space: Space) -> "Sizes":
        found = tensors(space.problem.model)
        routed: dict[int, int] = {}
        for tensor in found:
            if tensor.routed:
                routed[tensor.layer] = routed.get(tensor.layer, 0) + tensor.numel
        head = sum(tensor.numel for tensor in found if tensor.name == "head.weight")
        experts = sum(routed.values())
        dense = sum(tensor.numel for tensor in found) - experts - head
        return Sizes(dense, experts, head, max(routed.values(), default=0), len(routed))


def bound(space: Space) -> Bounds:
    """Lower bounds of every candidate of a space."""
    if not len(space):
        empty = np.zeros(0)
        return Bounds(empty, empty, empty, empty, {})
    sizes = Sizes.of(space)
    starts = range(0, len(space), BLOCK)
    blocks = [_Bounder(space.part(start, start + BLOCK), sizes).all() for start in starts]
    if len(blocks) == 1:
        return blocks[0]

    def joined(name: str) -> Reals:
        return np.concatenate([getattr(one, name) for one in blocks])

    parts = {name: np.concatenate([one.parts[name] for one in blocks]) for name in blocks[0].parts}
    return Bounds(joined("time"), joined("guess"), joined("device"), joined("host"), parts)


class _Bounder:
    def __init__(self, space: Space, sizes: Sizes) -> None:
        self.space, self.problem, self.sizes = space, space.problem, sizes
        self.c = {name: column.astype(np.float64) for name, column in space.columns.items()}
        self.model, self.hardware = self.problem.model, self.problem.hardware
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
        self.tokens = space.tokens().astype(np.float64)
        world, c = self.problem.world_size, self.c
        self.stage = world / c["pipeline"]
        self.microbatches = self.problem.training.global_batch / (
            c["micro_batch"] * self.stage / (c["tensor"] * c["sequence"])
        )
        self.ring = c["loss"] == RING
        layers = self.model.num_hidden_layers
        self.away = c["boundary_host"] * offloaded(layers, space.columns["boundary_parts"]) / layers
        """Share of the layer inputs that goes to the host."""

    def all(self) -> Bounds:
        device, parts = self.device_memory()
        time, guess = self.times()
        return Bounds(time, guess, device, self.host_memory(), parts)

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

    def boundary(self) -> Reals:
        """Bytes of the layer inputs that wait for the backward; without recompute, of one more value as
        wide."""
        m, c = self.model, self.c
        kept = (
            np.where(c["recompute"] == 1, 0, m.hidden_size)
            if self.fully_shard
            else np.zeros_like(self.tokens)
        )
        width = m.hidden_size + kept
        return np.asarray(
            m.num_hidden_layers / c["pipeline"] * self.tokens / c["tensor"] * width * self.compute
        )

    def moved(self) -> Reals:
        """Bytes of the layer inputs of a microbatch that go to the host: in staged programs (ZeRO below 3)
        not the last layer's, whose backward may come next."""
        layers = self.model.num_hidden_layers / self.c["pipeline"]
        last = np.where(self.c["zero"] == 3, 0, np.minimum(1 / layers, 1))
        return np.asarray(self.away * self.boundary() * (1 - last))

    def device_memory(self) -> tuple[Reals, dict[str, Reals]]:
        c, on_device = self.c, self.c["state"] == DEVICE
        weights, state = self.held()
        params = np.where(c["offload"] == 1, 0, weights * self.param)
        grads = np.where(c["offload"] == 1, 0, weights * self.grad)
        optimizer = np.where(on_device, state * (self.master() + self.moments), 0)
        early = np.zeros_like(grads) if self.fully_shard else grads
        boundaries = (1 - self.away) * self.boundary()
        vocabulary = self.model.vocab_size / np.maximum(c["vocabulary"], c["tensor"])
        logits = self.tokens / c["loss_slices"] * vocabulary * self.compute
        resident = params + optimizer
        peak = np.maximum(resident + early + boundaries + logits, resident + grads)
        parts = {
            "params": params,
            "grads": grads,
            "optimizer": optimizer,
            "boundaries": boundaries,
            "logits": logits,
        }
        return peak, parts

    def host_memory(self) -> Reals:
        weights, state = self.held()
        off = np.where(self.c["state"] == DEVICE, 0, state * (self.master() + self.moments))
        off = off + np.where(self.c["offload"] == 1, weights * (self.param + self.grad), 0)
        return off + self.moved()

    def times(self) -> tuple[Reals, Reals]:
        """(bound: the slowest stream, then the optimizer; guess: the streams one after the other).

        Compute loses `communication_share` beside a busy fabric.
        """
        up, out = self.wire_times(self.messages())
        wires, compute, copies = np.maximum(up, out), self.compute_time(), self.copy_time()
        after = self.optimizer_time() + self.constant()
        slowest = np.maximum.reduce([compute + self.hardware.communication_share * wires, wires, copies])
        likely = sum(self.wire_times(self.likely()))
        return np.asarray(slowest + after), np.asarray(compute + up + out + likely + after)

    def constant(self) -> float:
        """Calibrated seconds per step: what any runtime needs at least."""
        return min(self.hardware.step_overhead(runtime) for runtime in RUNTIMES)

    def scale(self, kind: str) -> float:
        """What calibration multiplies a kind of work by; 0 where a negative overhead could undo any of it."""
        correction = self.hardware.corrections.get(kind)
        if correction is None:
            return 1.0
        return correction.scale if correction.overhead >= 0 else 0.0

    def compute_time(self) -> Reals:
        """Products of forward, backward (twice) and recompute at the best rate of the curve, and kernel
        launches.

        Every degree splits the work of a step over ranks, so the mean rank does 1/W of it and the
        slowest no less.
        """
        training, device = self.problem.training, self.hardware.device
        flops = flops_per_token(self.model, training.seq_len)
        share = training.seq_len * training.global_batch / self.problem.world_size
        curve = matmul_curve(self.hardware, self.dtype)
        grouped_curves = [one for one in device.grouped_matmul if one.dtype == self.dtype] or [curve]
        again = self.c["recompute"]
        core, experts, head = (flops.get(name, 0.0) for name in ("attention_core", "experts", "vocabulary"))
        rest = sum(flops.values()) - core - experts - head
        matmul = (3 + again) * rest + 3 * head
        grouped = (3 + again * 2 / 3) * experts
        seconds = share * matmul / (curve.peak.si * curve.efficiency) * self.scale("matmul")
        rate = max(one.peak.si * one.efficiency for one in grouped_curves)
        seconds = seconds + share * grouped / rate * self.scale("grouped_matmul")
        attention = (1 + again) / device.attention.forward + 2.5 / device.attention.backward
        seconds = seconds + share * core / curve.peak.si * attention * self.scale("attention")
        chunks = np.maximum(self.c["chunks"], 1) * self.sizes.moe_layers
        launches = self.microbatches * 20 * (self.model.num_hidden_layers + chunks) / self.c["pipeline"]
        return np.asarray(
            seconds + launches * device.launch_overhead.si * min(self.scale("memory_bound"), 1.0)
        )

    def wire_times(self, messages: list[Message]) -> list[Reals]:
        """Seconds of each fabric that messages keep busy."""
        fabric = {"scale_up": np.zeros(len(self.space)), "scale_out": np.zeros(len(self.space))}
        for kind, size, ranks, count in messages:
            domain = np.minimum(ranks, self.hardware.scale_up_size)
            crosses = ranks > domain
            live = np.where(ranks > 1, count, 0) * self.scale(kind)
            for name, chosen in (("scale_up", ~crosses), ("scale_out", crosses)):
                fabric[name] += np.where(chosen, live * self.message_time(kind, size, ranks, domain, name), 0)
        return list(fabric.values())

    def message_time(self, kind: str, size: Reals, ranks: Reals, domain: Reals, name: str) -> Reals:
        """Seconds of one collective over `size` bytes; mopsim.cost.communication without its half sizes.

        Inside a domain: over the links of a mesh that lead to the group, or over NICs where those are faster
        (the ranks may lie in as many domains).
        """
        curve = getattr(self.hardware, name).collectives[kind]
        rate: Reals | float = curve.bandwidth.si
        if name == "scale_up":
            peers = np.asarray(1 if kind == "send_recv" else np.maximum(ranks - 1, 1))
            nics = self.hardware.scale_out.collectives[kind].bandwidth.si
            rate = np.maximum(rate * np.minimum(1, peers * self.hardware.peer_share), min(rate, nics))
        if kind == "send_recv":
            part = size
        elif name == "scale_up":
            part = size * (ranks - 1) / ranks
        elif kind == "all_to_all":
            part = size * (ranks - domain) / ranks
        else:
            part = size / domain * (1 - domain / ranks)
        return np.asarray(curve.latency.si + part / rate)

    def messages(self) -> list[Message]:
        """The collectives that no schedule avoids: gathers and reductions of weights, sequence and expert
        exchanges, the ring."""
        c, m = self.c, self.model
        layers = float(m.num_hidden_layers)
        found: list[Message] = []
        if (c["zero"] == 3).all():
            dense = (self.sizes.dense - m.vocab_size * m.hidden_size) / layers / c["tensor"]
            gathers = np.maximum(c["recompute"], c["reshard"]) + 1
            found.append(
                (
                    "all_gather",
                    dense * self.compute,
                    c["dense_shard"],
                    layers * self.microbatches * gathers,
                )
            )
            found.append(
                ("reduce_scatter", dense * self.reduce, c["dense_shard"], layers * self.microbatches)
            )
            unit = self.sizes.largest_expert_unit / c["experts"]
            times = self.sizes.moe_layers * self.microbatches
            found.append(("all_gather", unit * self.compute, c["expert_shard"], times * gathers))
            found.append(("reduce_scatter", unit * self.reduce, c["expert_shard"], times))
            found += self.exchanges()
        if (self.ring & (c["vocabulary"] > 1)).any():
            rows = m.vocab_size / c["vocabulary"]
            block = np.minimum(self.tokens, rows) * m.hidden_size * self.compute
            found.append(("send_recv", block, c["vocabulary"], 2 * (c["vocabulary"] - 1) * self.microbatches))
        return found

    def likely(self) -> list[Message]:
        """Collectives of a usual schedule, for the guess: rows gathered and scattered around the two tensor
        regions of a layer (arXiv 2205.05198), keys and values gathered over a sequence not split by heads."""
        c, m = self.c, self.model
        passes = self.microbatches * (2 + c["recompute"]) * m.num_hidden_layers / c["pipeline"]
        rows = self.tokens * m.hidden_size * self.compute
        qk, v = attention_widths(m)
        heads = m.num_key_value_heads if m.attention == "gqa" else m.num_attention_heads
        keys = self.tokens * c["sequence"] * heads / c["tensor"] * (qk + v) * self.compute
        split = np.where(c["exchange"] == ULYSSES, 1, c["sequence"])
        return [("all_gather", rows, c["tensor"], 4 * passes), ("all_gather", keys, split, passes)]

    def exchanges(self) -> list[Message]:
        """Sequence and expert all-to-alls of forward, recompute and backward."""
        c, m = self.c, self.model
        tokens = self.tokens / c["tensor"]
        qk, v = attention_widths(m)
        passes = self.microbatches * (2 + c["recompute"]) * m.num_hidden_layers
        sent = tokens * m.num_attention_heads * min(qk, v) * self.compute
        routes = tokens / np.maximum(c["chunks"], 1) * m.num_experts_per_tok * m.hidden_size * self.compute
        times = self.microbatches * self.sizes.moe_layers * np.maximum(c["chunks"], 1) * (4 + c["recompute"])
        heads = np.where(c["exchange"] == ULYSSES, c["sequence"], 1)
        return [("all_to_all", sent, heads, 2 * passes), ("all_to_all", routes, c["experts"], times)]

    def copy_time(self) -> Reals:
        """Boundaries out and back over the host link."""
        host = self.hardware.host
        moved = self.moved() * self.microbatches
        scale = max(self.scale("h2d") / host.link_h2d.si, self.scale("d2h") / host.link_d2h.si)
        return moved * scale * self.hardware.host.link_sharing

    def optimizer_time(self) -> Reals:
        _, state = self.held()
        device, host = self.hardware.device, self.hardware.host
        on_device = state / device.adam_rate.si * self.scale("optimizer")
        streamed = (
            state * (self.wide + self.moments) / host.link_h2d.si * host.link_sharing * self.scale("h2d")
        )
        on_host = state / host.adam_rate.si * self.scale("host_optimizer")
        code = self.c["state"]
        return np.asarray(np.where(code == DEVICE, on_device, np.where(code == HOST, on_host, streamed)))
