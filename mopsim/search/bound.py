"""Closed-form lower bounds on a candidate's step time, device and host memory, for a whole space at once.

Each is at most what the simulator finds (tests/sim/test_search.py holds them against each other): compute as
long as where it is split least, peak rates of communication, no dependencies between streams.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mopsim.cost.communication import host_rate
from mopsim.cost.compute import matmul_curve
from mopsim.graph.flops import flops_per_token
from mopsim.graph.shapes import attention_widths
from mopsim.program.update import moved
from mopsim.search.copies import Copies
from mopsim.search.facts import SpaceFacts
from mopsim.search.problem import DEVICE, HOST, SAVED, STREAMED, ULYSSES, Column
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds, laid, load, parts_of
from mopsim.search.wires import Message, Reals
from mopsim.spec.categories import RUNTIMES

ROUTED = 2
"""Exchanges of experts in a pass, there and back; recomputation repeats one at least, in the backward."""
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


def bound(space: Space, given: SpaceFacts | None = None) -> Bounds:
    """Lower bounds of every candidate of a space; given: of it, or of one with all its shapes."""
    if not len(space):
        empty = np.zeros(0)
        return Bounds(empty, empty, empty, empty, {})
    blocks = [one.all() for one in bounders(space, given)]
    if len(blocks) == 1:
        return blocks[0]
    columns = zip(*((one.time, one.device, one.host, one.gathered) for one in blocks), strict=True)
    time, device, host, gathered = map(np.concatenate, columns)
    parts = {name: np.concatenate([one.parts[name] for one in blocks]) for name in blocks[0].parts}
    return Bounds(time, device, host, gathered, parts)


def bounders(space: Space, given: SpaceFacts | None = None) -> Iterator["Bounder"]:
    """What bounds the rows of a space, block by block."""
    for start in range(0, len(space), BLOCK):
        given = given or SpaceFacts.of(space)
        yield Bounder(space.part(start, start + BLOCK), given)


class Bounder(Copies):
    """Of a step of each row of a space, at least."""

    def all(self) -> Bounds:
        device, parts = self.device_memory()
        return Bounds(self.time(), device, self.host_memory(), self.gathered(), parts)

    def time(self) -> Reals:
        """The slowest stream, or compute with the exchanges that it waits for; then the optimizer. Compute
        loses `communication_share` to a busy fabric."""
        talks, layers, head = self.talks(), self.layer_seconds(), self.head_seconds()
        busy, idle = self.with_copies(layers, head), self.awaited()
        alone = busy + self.updates()
        busy = busy + idle + self.hardware.communication_share * np.maximum(talks - idle, 0.0)
        chain = self.slowest(self.in_turn(), np.where(self.c["overlap"] == 1, 0.0, head))
        slowest = np.maximum.reduce([busy, alone, talks, self.copy_time(), chain])
        return np.asarray(slowest + self.optimizer_time() + self.constant())

    def sent_beside(self, virtual: Reals | None = None) -> Reals:
        """Where sends between stages go beside compute, and the host waits for none. virtual: the stages of a
        rank, where they are not those of the rows."""
        how, parts = self.space.stack.hides.pipeline, self.c["virtual_stages"] if virtual is None else virtual
        own = parts > 1 if how == "interleaved" else bool(self.hides.pipeline)
        return np.broadcast_to(own, len(self.space))

    def talks(self) -> Reals:
        """Seconds in which the busier fabric is busy."""
        sent = [*map(self.wires.seconds, self.weights()), *self._sent_tokens]
        return np.maximum(*_added([*sent, *map(self.wires.seconds, self.ring_blocks())], len(self.space)))

    def constant(self) -> float:
        """Calibrated seconds per step: what any runtime needs at least."""
        return min(self.hardware.step_overhead(runtime) for runtime in RUNTIMES)

    def layer_seconds(self) -> list[Reals]:
        """Of each kind of layer, on the rank that has one, all microbatches."""
        return [*self._busy.sum(axis=1).T]

    @cached_property
    def _busy(self) -> Reals:
        """Seconds of the compute stream of each row, way and kind of layer, all microbatches."""
        return self.layer.busy(self.space) * self.microbatches[:, None, None]

    def head_seconds(self) -> Reals:
        """The same of what is beside the decoder layers: vocabulary and MTP layers, on the stage that has
        it."""
        more, model = self.model.num_nextn_predict_layers, self.model
        head = self.projected() if self.ring.any() else np.zeros(len(self.space))
        if not self.ring.all():
            loss = self.layer.loss_at(self.space) * self.microbatches * (1 + more)
            head = np.where(self.ring, head, loss)
        further, known = model.layer_kind(model.num_hidden_layers), list(kinds(model))
        if more and further in known:
            head = head + more * self.layer_seconds()[known.index(further)]
        return np.asarray(head)

    def projected(self) -> Reals:
        """Seconds of a rank's share of the output projection, forward and backward, at the best rate of the
        curve, on the stage that has it."""
        training, curve = self.problem.training, matmul_curve(self.hardware, self.dtype)
        share = training.seq_len * training.global_batch / self.problem.world_size * self.c["pipeline"]
        flops = 3 * flops_per_token(self.model, training.seq_len)["vocabulary"]
        return np.asarray(
            share * flops / (curve.peak.si * min(curve.efficiency, curve.held)) * self.scale("matmul")
        )

    def slowest(
        self,
        layers: Sequence[Reals],
        head: Reals,
        filled: Reals | float = 1.0,
        also: Sequence[Reals | float] | None = None,
    ) -> Reals:
        """Seconds of the slowest stage with what its replicas exchange once a step, over a busier fabric.
        filled: as in `slowest_stage`; also: of each kind of layer, on the rank that has one."""
        more = also or [0.0] * len(layers)
        busy = [once for once in self.exchanged if any(one.any() for one in once)] or self.exchanged[:1]
        every = ([one + own for one, own in zip(once, more, strict=True)] for once in busy)
        return np.asarray(
            np.maximum.reduce([self.slowest_stage(layers, head, once, filled) for once in every])
        )

    def with_copies(self, layers: Sequence[Reals], head: Reals) -> Reals:
        """Seconds of the slowest stage with what it copies, which of several stages may go while it waits for
        others."""
        stages = self.c["pipeline"] > 1
        if not (self.copied_shards and stages.any()):
            return self.slowest(layers, head) + self.copies(self.layers_dense, self.sizes.experts)
        each = [np.where(stages, self.copies(*self.sizes.layers[kind]), 0.0) for kind in kinds(self.model)]
        alone = np.where(stages, 0.0, self.copies(self.layers_dense, self.sizes.experts))
        return np.maximum(self.slowest(layers, head), self.slowest(layers, head, 0.0, each)) + alone

    @cached_property
    def exchanged(self) -> tuple[list[Reals], list[Reals]]:
        """Seconds of each kind of layer in which gradients and weights keep (scale-up, scale-out) busy, once
        a step, below ZeRO-3, that the program does not hide beside the passes: all layers in one message at
        best."""
        return self._replicas(hidden=False)

    @cached_property
    def hidden(self) -> tuple[list[Reals], list[Reals]]:
        """The same of what it does hide, layer by layer."""
        return self._replicas(hidden=True)

    def _replicas(self, *, hidden: bool) -> tuple[list[Reals], list[Reals]]:
        c, found, shown = self.c, [], list[tuple[str, Reals | float]]()
        if bool(self.hides.grad_reduce) == hidden:
            shown.append(("reduce_scatter", self.reduce))
        if bool(self.hides.param_gather) == hidden:
            shown.append(("all_gather", self.sent_updated))
        apart = c["experts"] * c["expert_tensor"]
        for kind in kinds(self.model):
            dense, routed = self.sizes.layers[kind]
            whole = (self.sizes.dense + self.sizes.head) / dense, self.sizes.experts / max(routed, 1)
            messages = [
                Message(
                    name, params / split * width * at_once, np.where(c["zero"] < 3, self.stage / split, 1),
                    1 / max(at_once, 1), split,
                )
                for name, width in shown
                for params, split, at_once in (
                    (dense, c["tensor"], 1 if hidden else whole[0]),
                    (routed, apart, 1 if hidden else whole[1]),
                )
            ]  # fmt: skip
            found.append(self.busy(messages))
        return [one[0] for one in found], [one[1] for one in found]

    def slowest_stage(
        self,
        layers: Sequence[Reals],
        head: Reals,
        once: Sequence[Reals] | None = None,
        filled: Reals | float = 1.0,
    ) -> Reals:
        """Seconds of the slowest rank: of the mean stage, or, in a layout, of the stage whose layers (of the
        last, with the loss) and what a microbatch takes on the way there and back are most. layers, head: as
        `layer_seconds` and `head_seconds`; once: of each kind of layer, once a step. filled: 1 where a stage
        waits for what a microbatch takes on its way, 0 where it does not."""
        c, counts = self.c, list(kinds(self.model).values())
        once = once or [np.zeros(len(self.space))] * len(layers)
        mean = head + sum(
            count * (each + last) for count, each, last in zip(counts, layers, once, strict=True)
        )
        found = np.asarray(mean / c["pipeline"])
        if not self.by_layout:
            return found
        every, last = np.stack(layers, axis=1), np.stack(once, axis=1)
        for code, rows in self.by_layout:
            stage = load(self.model, *parts_of(code))
            each = (every[rows] + last[rows]) @ stage.layers.T
            way = np.broadcast_to(filled, len(self.space))[rows] / self.microbatches[rows]
            each += every[rows] * way[:, None] @ stage.before.T
            each[:, -1] += head[rows]
            found[rows] = np.maximum(found[rows], each.max(axis=1))
        return found

    @cached_property
    def by_layout(self) -> list[tuple[int, Column]]:
        """The rows of each layout of several stages, by its code."""
        chosen = (self.c["pipeline"] > 1) & (self.c["layout"] != IDEAL)
        rows, codes = np.flatnonzero(chosen), laid(self.space.columns)[chosen]
        return [(code, rows[codes == code]) for code in np.unique(codes).tolist()]

    def busy(self, messages: Iterable[Message]) -> tuple[Reals, Reals]:
        """Seconds in which messages keep (scale-up, scale-out) busy."""
        return _added(map(self.wires.seconds, messages), len(self.space))

    def weights(self) -> list[Message]:
        """Gathers and reductions of weights that no schedule of ZeRO-3 avoids."""
        c, m = self.c, self.model
        if not (c["zero"] == 3).all():
            return []
        layers = float(m.num_hidden_layers)
        dense = self.layers_dense / layers / c["tensor"]
        gathers = self.gathers()
        unit = self.sizes.largest_expert_unit / (c["experts"] * c["expert_tensor"])
        each = self.microbatches / c["pipeline"]
        times, experts = layers * each, self.sizes.moe_layers * each
        shard, copies = c["dense_shard"], c["expert_shard"]
        apart = np.where(c["strided"] == 1, 1, c["experts"] * c["expert_tensor"])
        sums = self.reductions()
        return [
            Message("all_gather", dense * self.sent, shard, times * gathers, c["tensor"]),
            Message("reduce_scatter", dense * self.reduce, shard, times * sums, c["tensor"]),
            Message("all_gather", unit * self.sent, copies, experts * gathers, apart),
            Message("reduce_scatter", unit * self.reduce, copies, experts * sums, apart),
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
        """Sequence and expert all-to-alls of forward, recompute and backward; rows of experts gathered and
        scattered over the ranks that split these."""
        c, m = self.c, self.model
        tokens = self.tokens / c["tensor"]
        qk, v = attention_widths(m)
        passes = self.microbatches * (2 + c["recompute"]) * self._attending / c["pipeline"]
        sent = tokens * m.num_attention_heads * min(qk, v) * self.compute
        routes = tokens / np.maximum(c["chunks"], 1) * m.num_experts_per_tok * m.expert_width * self.compute
        moe_layers = self.sizes.moe_layers / c["pipeline"] * np.maximum(c["chunks"], 1)
        times = self.microbatches * moe_layers * (2 * ROUTED + self.sent_again)
        heads = np.where(c["exchange"] == ULYSSES, c["sequence"], 1)
        far = np.where(c["strided"] == 1, self.stage / c["experts"], c["expert_tensor"])
        once = np.where(c["dispatcher"] > 0, m.num_experts_per_tok, 0)
        rows, twice = routes * np.maximum(c["chunks"], 1) * c["expert_tensor"], 4 * self.microbatches
        return [
            Message("all_to_all", sent, heads, 2 * passes, c["tensor"]),
            Message(
                "all_to_all",
                routes,
                c["experts"],
                times,
                far,
                once,
                m.num_local_experts,
                (m.n_group, m.topk_group),
                self.space.stack.forces_consecutive(self.problem.training.routing),
            ),
            Message("all_gather", rows, c["expert_tensor"], twice * self.sizes.moe_layers / c["pipeline"]),
        ]

    @property
    def _attending(self) -> int:
        """Decoder layers that have attention; what those of linear attention exchange is left out."""
        return self.model.num_hidden_layers - self.model.num_linear_layers

    @cached_property
    def _sent_tokens(self) -> list[tuple[Reals, Reals]]:
        """Seconds in which each of the exchanges keeps (scale-up, scale-out) busy."""
        return [*map(self.wires.seconds, self.exchanges())]

    @property
    def sent_again(self) -> Reals:
        """Exchanges of experts that recomputation repeats."""
        saved = np.array(["dispatch" in names for names in SAVED])
        return np.asarray(self.c["recompute"] * ~saved[self.space.columns["saved"]])

    def in_turn(self) -> list[Reals]:
        """Seconds of each kind of layer, all microbatches, with the exchanges that compute waits for: forward
        and backward in turn, of those that are woven the backward alone. Experts that go chunk by chunk
        compute beside exchanges."""
        c, woven = self.c, self.c["overlap"] == 1
        sequence, experts, _ = ((up + out) * c["pipeline"] for up, out in self._sent_tokens)
        sequence = sequence / max(self._attending, 1)
        experts = experts / max(self.sizes.moe_layers, 1) * (c["chunks"] <= 1)
        behind = (ROUTED + self.sent_again) / (2 * ROUTED + self.sent_again)  # of the experts' exchanges
        found = []
        for place, kind in enumerate(kinds(self.model)):
            trades = sequence * (not kind.linear)
            back = self._busy[:, 1, place] + trades / 2 + kind.routed * experts * behind
            whole = self._busy[:, :, place].sum(axis=1) + trades + kind.routed * experts
            found.append(np.where(woven, back, whole))
        return found

    def copy_time(self) -> Reals:
        """Layer inputs out and back over the host link, the slower way; with offload the weights up for each
        use and their gradients down; the state of an update beside the step both ways."""
        c, each, (weights, state) = self.c, self.copied, self.held
        moved, offload = self.moved() * self.microbatches, c["offload"] * weights * self.microbatches
        beside = (c["beside"] > 0) * (c["state"] == STREAMED) * state * self.streamed
        uses = self.gathers()
        up = (moved + offload * uses * self.param) * each("h2d") + beside * each("h2d", duplex=True)
        down = (moved + offload * self.reductions() * self.grad) * each("d2h") + beside * each(
            "d2h", duplex=True
        )
        return np.asarray(np.maximum(up, down))

    def awaited(self) -> Reals:
        """Seconds in which compute and exchanges of tokens stand still while the host waits for gradients
        and adds them to those of the first microbatch (mopsim.program.shards)."""
        c, sharding = self.c, self.space.stack.sharding
        added = self.scale("host_memory") / self.hardware.host_memory_share
        each = self.grad * (self.copied("d2h") + 3 * added) * (sharding.copies and sharding.experts is True)
        often = (
            c["offload"] * (c["pipeline"] == 1) * (self.microbatches - 1) * (sharding.whole_sums != "always")
        )
        return np.asarray(often * each * sum(self.states))

    def copied(self, way: str, *, duplex: bool = False) -> float:
        """Seconds of a byte on its way up (h2d) or down (d2h) the host link."""
        return self.scale(way) / host_rate(way, self.hardware, duplex=duplex)

    def optimizer_time(self) -> Reals:
        """Of the update after the passes, of one streamed beside the step the norm alone. On the host, of all
        but flat units: gradients down, the update, parameters up, one after the other."""
        _, state = self.held
        device, host, flat = self.hardware.device, self.hardware.host, self.flat
        on_device = (1 - self.state_away) * state * self.updated(device.adam_rate.si)
        streamed = self.streamed * self.copied("h2d", duplex=True)
        on_host = self.scale("host_optimizer") / host.adam_rate.si
        visits = self.grad * self.copied("d2h") + self.param * self.copied("h2d")
        after = np.where(self.c["offload"] == 1, 0.0, 0.0 if flat else visits)
        each = np.where(self.c["state"] == HOST, on_host + after, streamed * (self.c["beside"] == 0))
        norm = state * self.grad * self.traffic if flat else 0.0
        after = np.maximum(on_device, self.state_away * state * each) + norm
        return np.asarray(np.where(self.early, 0.0, after))

    def updates(self) -> Reals:
        """Seconds in which compute has updates of state on the device, and norms, between those of a
        backward."""
        _, state = self.held
        each = (self.c["state"] == DEVICE) * self.updated(self.hardware.device.adam_rate.si)
        return np.asarray(self.early * state * (each + self.grad * self.traffic))

    def updated(self, rate: float) -> Reals:
        """Seconds of a parameter's update on the device at so many a second in fp32, at least."""
        own = np.where(self.own_master > 0, self.own_master, self.param)
        adamw, narrow = self.space.stack.kernels.adamw, min(int(own.min()), 4)
        least = moved(adamw, narrow, int(self.grad), int(self.wide))
        return np.asarray(min(least, 1.0) * self.scale("optimizer") / rate)


def _added(seconds: Iterable[tuple[Reals, Reals]], rows: int) -> tuple[Reals, Reals]:
    """(Scale-up, scale-out) seconds of all of some messages."""
    up, out = np.zeros(rows), np.zeros(rows)
    for inside, across in seconds:
        up, out = up + inside, out + across
    return up, out
