"""The MoE half of a layer: chunks through dispatch(i+1) | experts(i) | combine(i-1)
(mopexec.operators.experts)."""

from typing import NamedTuple

from msgspec.structs import replace

from mopsim.graph.experts import experts, router
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.expert_biases import ExpertBiases
from mopsim.program.pairs.ffn_pair import FfnPair
from mopsim.program.pairs.looped_products import LoopedProducts
from mopsim.program.pairs.moved_experts import moved_experts
from mopsim.program.pairs.rows import Rows, slice_rows
from mopsim.program.workload import Work
from mopsim.spec.layout import FUSED_ROWS, SLICE_ROWS, packed_row

_E, _R, _D = "experts", "router", "dispatch"


class _RouterLoss(NamedTuple):
    """Of a slice of the router's logits: passes over it, kernels, and tensors of its size that are alive at
    once beside it and its gradient (mopexec/operators/router_losses.py, add_gradient_)."""

    passes: int
    launches: int
    alive: int


BALANCE, Z = _RouterLoss(25, 16, 3), _RouterLoss(13, 10, 2)


class ExpertsPair(Rows):
    """Buffers of chunk i are named `….i`. Everything on its way is of category dispatch."""

    whole = False
    """Whether products run again in the backward with their outputs, which nobody reads."""

    def __init__(self, context: Context, builder: Builder, ffn: FfnPair) -> None:
        super().__init__(context, builder)
        self.ffn, model = ffn, context.model
        self.H, self.E, self.k = model.hidden_size, model.num_local_experts, model.num_experts_per_tok
        self.moved = moved_experts(context, builder)
        self.up = ("experts_gate", "experts_up") if model.ffn_matrices == 3 else ("experts_up",)
        self.inner = model.moe_intermediate_size // context.strategy.experts.expert_tensor_parallel
        self.row = self.H * context.b
        self.packed = packed_row(self.row)
        degree = context.strategy.experts.expert_parallel
        whole = context.stack.kernels.expert_products in ("grouped", "torch") and context.b == 2
        self.grouped, self.looped = whole and not self.moved, LoopedProducts.of(model)
        self.biases = ExpertBiases(self, context, len(self.up), self.inner, grouped=self.grouped)
        self.split = degree > 1
        self.ordered = self.split and (self.E // degree > 1 or bool(self.moved))
        self._router: dict[int, dict[str, list[Work]]] = {}
        self._works: dict[tuple[tuple[int, ...], bool, tuple[str, ...]], list[Work]] = {}

    @property
    def choice(self) -> int:
        """Bytes of the choices of a layer."""
        return self.c.tokens * self.k * 2

    def plan(self, layer: int) -> None:
        """The router's choice for all tokens, its weights, and the exchange of counts; the choice is kept for
        the backward, the weights until the end of the forward."""
        c, b, n = self.c, self.b, self.c.tokens
        b.make(f"choice{layer}", self.choice)
        works = self._weigh(2 * self.E * c.wide)
        works += self._router_works(n)["top_k"]
        b.compute("choose", _R, "forward", layer, works)
        size, placed = 8.0 * self.E * c.chunks, c.strategy.experts.balance != "none"
        kind, size = ("all_gather", size * c.groups["experts"].size) if placed else ("all_to_all", size)
        arrived = b.issue("counts", kind, size, "experts", _R, "forward", layer)
        b.compute(
            "counts", _R, "forward", layer, [Work("memory_bound", bytes=24.0 * n * self.k, launches=10)],
            arrived, awaited=arrived is not None,
        )  # fmt: skip

    def _weigh(self, each: int) -> list[Work]:
        """The weights of all tokens' routes. each: bytes of a token beside its logits."""
        c, b, n = self.c, self.b, self.c.tokens
        part = n if self.fused_router else slice_rows(n)
        b.make("route_weights", n * self.k * c.wide, _D)
        works = [self.norm(part, self.H, "hidden")]
        cast = 0 if self.fused_router or not self.cast else (part + self.E) * self.H * c.wide
        b.spike(part * self.E * c.wide + cast)
        b.drop("hidden")
        b.spike(part * (self.E * c.wide + each))
        b.spike(n * self.k * c.wide if part < n else 0, _D)
        found = self._router_works(n)
        return [*works, *found["cast"], *found["router"], *found["scores"]]

    def _router_works(self, tokens: int) -> dict[str, list[Work]]:
        """What the router does with rows, by kernel; `back`: its products in the backward."""
        if tokens not in self._router:
            tape = router(self.c.model, tokens, self.c.b, self.c.wide)
            cast = self.elementwise(tokens * self.H, self.c.b + self.c.wide, 2)
            found = {name: self.works(tape, False, name) for name in tape.by_name}
            back = self.works(tape, True, "router", "top_k")
            self._router[tokens] = found | {"back": back, "cast": [cast]}
        return self._router[tokens]

    def _order(self, layer: int, phase: str) -> None:
        """The orders of all chunks' routes: as they are sent, as they come home, as they arrive."""
        c, b, n = self.c, self.b, self.c.tokens * self.k
        b.make("orders", n * 16, _D)
        b.spike(n * (16 if self.moved else 8), _D)
        works = [self.elementwise(n, 60, 12)]
        if self.ordered:
            arriving = sum(sum(c.routes(i)) for i in range(c.chunks))
            b.make("arrivals", arriving * 8, _D)
            works.append(self.elementwise(arriving, 16, 3))
        b.compute("order routes", _R, phase, layer, works)

    def _ordered(self) -> tuple[str, ...]:
        return ("orders", *(("arrivals",) if self.ordered else ()), "route_weights")

    def forward(self, layer: int, *waits: int | None) -> None:
        """x1 becomes x2 in place. waits: the gather of the expert unit."""
        if self.moved:
            waits = (*waits, self.moved.gather(layer, "forward", self.b.last))
        self._order(layer, "forward")
        self._chunks(layer, "forward", waits)
        if self.moved:
            self.moved.free()
        self.b.drop(*self._ordered())

    def backward(self, layer: int, *waits: int | None) -> None:
        """The gradient of x2 becomes that of x1, in place."""
        self._after(layer, self._again(layer, "backward", waits))

    def _again(self, layer: int, phase: str, waits: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Weights that moved, route weights and orders once more; what the products wait for."""
        if self.moved:
            waits = (*waits, self.moved.gather(layer, phase, self.b.last))
        self.b.compute("weigh", _R, phase, layer, self._weigh(0))
        self._order(layer, phase)
        return waits

    def _after(self, layer: int, waits: tuple[int | None, ...]) -> None:
        """The backward, once orders are known."""
        b = self.b
        b.make("grad_route_weights", self.c.tokens * self.k * self.c.wide, _D)
        self._chunks(layer, "backward", waits)
        b.drop(*self._ordered())
        self._router_backward(layer)
        if self.moved:
            self.moved.send_home(layer, b.last)
        b.drop(f"choice{layer}")

    def _chunks(self, layer: int, phase: str, waits: tuple[int | None, ...]) -> None:
        """dispatch(i+1) | experts(i) | combine(i-1)."""
        back, count = phase == "backward", self.c.chunks
        products = self._experts_backward if back else self._experts_forward
        arrived = self._dispatch(0, layer, phase)
        if back and self.moved:
            self.moved.open()
        returning: int | None = None
        for i in range(count):
            if phase != "recompute":  # shared experts run again slice by slice, in their backward
                self.ffn.shared(layer, self.c.chunk_tokens(i), backward=back)
            works, here = self._receive(i, phase), arrived
            if i + 1 < count:  # the executor waits for the chunk and reorders it before it sends the next one
                self.b.compute("arrived", _E, phase, layer, works, here)
                works = []
                if self.moved:
                    self.moved.read(layer, phase)
                arrived = self._dispatch(i + 1, layer, phase)
            products(i, layer, phase, works, here, *waits)
            if i:
                self._home(i - 1, returning, layer, phase)
            returning = self._return(i, layer, phase)
        self._home(count - 1, returning, layer, phase)

    def _home(self, i: int, arrived: int | None, layer: int, phase: str) -> None:
        (self._combine_backward if phase == "backward" else self._combine)(i, arrived, layer, phase)

    def _sent(self, phase: str) -> dict[str, int]:
        """What a chunk sends to the experts, and the bytes of a row: rows packed with their weights, and
        output gradients."""
        return {"rows": self.packed, **({"grads": self.row} if phase == "backward" else {})}

    def _receive(self, i: int, phase: str) -> list[Work]:
        """The chunk at the experts: rows in their order, what was sent freed."""
        _, _, received, _ = self._sizes(i)
        sent = self._sent(phase).items()
        return [work for name, size in sent for work in self._take(name, i, received * size)]

    def _return(self, i: int, layer: int, phase: str) -> int | None:
        """The chunk's rows go home, and packed with them the gradients of its route weights."""
        b, (_, sent, received, _) = self.b, self._sizes(i)
        name, back = ("grads", self.packed) if phase == "backward" else ("rows", self.row)
        if not self.split:
            b.rename(name, f"{name}_back.{i}")
            if phase == "backward":
                b.rename("grad_weights", f"grad_weights.{i}")
            return None
        if self.ordered or b.alive[name][1] != received * back:
            b.make(f"{name}_ordered.{i}", received * back, _D)
            copy = [self.by_index(received * back)] if self.ordered else []
            b.compute("reorder", _E, phase, layer, copy or [self.elementwise(received * back, 2, 1)])
            b.drop(name)
        else:
            b.rename(name, f"{name}_ordered.{i}")
        b.make(f"{name}_back.{i}", sent * back, _D)
        size = float(max(received, sent) * back)
        waiting = b.issue("combine", "all_to_all", size, "experts", _E, phase, layer)
        if phase == "backward":
            b.drop("grad_weights")
        return waiting

    def _sizes(self, i: int) -> tuple[int, int, int, int]:
        """(tokens, routes sent, routes received, most rows of one expert) of chunk i."""
        tokens, routes = self.c.chunk_tokens(i), self.c.routes(i)
        return tokens, tokens * self.k, sum(routes) if self.split else tokens * self.k, max(routes)

    def _dispatch(self, i: int, layer: int, phase: str) -> int | None:
        """Sends a chunk to its experts."""
        b, (n, sent, arrived, _), names = self.b, self._sizes(i), self._sent(phase)
        normed = (self.centred or not self.fused_norm) and "rows" in names
        works = [self.norm(n, self.H, "hidden")] if normed else []
        for name, size in names.items():
            b.make(f"{name}_sent.{i}", sent * size, _D)
            works.append(self.by_index(sent * size))
        if "rows" not in names:  # whose kernel finds the tokens of routes itself
            b.spike(sent * 8, _D)
            works.append(self.elementwise(sent, 16, 1))
        if normed:
            b.drop("hidden")
        b.compute("permute", _E, phase, layer, works)
        waiting = None
        for name, size in names.items():
            if self.split:
                b.make(f"{name}.{i}", arrived * size, _D)
            each = float(max(sent, arrived) * size)
            waiting = b.issue("dispatch", "all_to_all", each, "experts", _E, phase, layer)
        return waiting

    def _take(self, name: str, i: int, size: int) -> list[Work]:
        """Arrived rows, reordered to the experts' order where needed, under the name `name`; what was sent
        is freed."""
        b = self.b
        if not self.split:
            b.rename(f"{name}_sent.{i}", name)
            return []
        b.drop(f"{name}_sent.{i}")
        if not self.ordered:
            b.rename(f"{name}.{i}", name)
            return []
        b.make(name, size, _D)
        b.drop(f"{name}.{i}")
        return [self.by_index(size)]

    def _products(self, i: int, backward: bool, *names: str) -> list[Work]:
        """Works of the named products, one launch per expert where they are not grouped."""
        routes = self.c.routes(i)
        key = (routes, backward, names)
        if key not in self._works:
            tape = experts(self.c.model, routes, self.c.b, self.c.strategy.experts.expert_tensor_parallel)
            works = self.works(tape, backward, *names)
            if not self.grouped:
                works = [replace(work, launches=int(work.count)) for work in works]
            self._works[key] = works
        return self._works[key]

    def _experts_forward(
        self, i: int, layer: int, phase: str, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        c = self.c
        _, _, received, most = self._sizes(i)
        rows = len(self.up) * received if self.grouped else self.looped.forward * most
        self.b.spike(rows * self.inner * c.b)
        works = [*works, *self._products(i, False, *self.up, "experts_down")]
        active = sum(1 for rows in c.routes(i) if rows)
        works += self.biases.forward(received, active)
        passes = 7 if len(self.up) == 2 else 4
        if self.grouped:
            passes, active = len(self.up) + 1, 1
        works.append(self.elementwise(received * self.inner, passes * c.b, (len(self.up) + 1) * active))
        self.b.compute("experts", _E, phase, layer, works, arrived, *waits)
        if self.grouped:
            self.b.drop("rows")
            self.b.make("rows", received * self.row)

    def _combine(self, i: int, arrived: int | None, layer: int, phase: str) -> None:
        """x1 += the sum of each token's routes."""
        b, n = self.b, self.c.chunk_tokens(i)
        self._arrive("rows", i)
        part = slice_rows(n)
        if not self.fused_routes:
            b.spike(part * (self.k + 1) * self.row, _D)
        works = self._sum_routes(n, 2)
        b.compute("combine", _E, phase, layer, works, arrived)
        b.drop(f"rows_back.{i}")

    def _sum_routes(self, tokens: int, launches: int) -> list[Work]:
        """Routes of each token gathered by index and summed, slice by slice."""
        if self.fused_routes:
            return [self.elementwise(tokens * (self.k + 2), self.row, 2)]
        gathered = self.by_index(tokens * self.k * self.row, tokens)
        return [gathered, self.pass_(tokens, self.H, (self.k + 4) * self.c.b, launches)]

    def _arrive(self, name: str, i: int) -> None:
        if self.split:
            self.b.drop(f"{name}_ordered.{i}")

    def _experts_backward(
        self, i: int, layer: int, phase: str, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        b, c = self.b, self.c
        _, _, received, most = self._sizes(i)
        b.make("grad_weights", received * c.wide)
        if self.grouped:
            stack = self.E // c.strategy.experts.expert_parallel * self.H * self.inner
            held = (len(self.up) + 1) * received * self.inner
            b.spike((held + max(stack, self.whole * received * self.H)) * c.b)
        else:
            width = self.looped.backward * self.inner + max(self.inner, self.whole * self.H)
            b.spike(max(width, self.looped.activation * self.inner) * most * c.b)
        works = [*works, *self._products(i, False, *self.up, *["experts_down"] * self.whole)]
        works += self._products(i, True, *self.up, "experts_down")
        if not self.grouped and c.strategy.precision.reduce != c.strategy.precision.compute:
            b.spike(((2 + len(self.up)) * most + self.H) * self.inner * c.b)
        active = sum(1 for rows in c.routes(i) if rows)
        works += self.biases.backward(received, most, active)
        if self.grouped:
            matrices = len(self.up) + 1
            works.append(self.elementwise(received * self.inner, 2 * matrices * c.b, matrices))
            works.append(self.elementwise(matrices * stack, c.b + 2 * c.reduce, matrices))
            if len(self.up) == 2:
                works.append(self.elementwise(received * self.H, 3 * c.b, 1))
        else:  # activation and gradient, their product and its sum, both weighted, the gradient's way back
            passes, launches = (26, 10) if len(self.up) == 2 else (13, 6)
            works.append(self.elementwise(received * self.inner, passes * c.b, launches * active))
        b.compute("experts", _E, phase, layer, works, arrived, *waits)
        b.drop("rows")

    def _combine_backward(self, i: int, arrived: int | None, layer: int, phase: str) -> None:
        """Gradients of tokens from their routes, through the norm, slice by slice."""
        b, (n, sent, _, _) = self.b, self._sizes(i)
        self._arrive("grads", i)
        part = slice_rows(n, FUSED_ROWS if self.fused_routes else SLICE_ROWS)
        inputs_weighted = self.c.model.expert_inputs_weighted
        if not self.fused_routes and not inputs_weighted:
            b.spike(sent * self.c.wide, _D)
        works = self._inputs_weighted(n, part) if inputs_weighted else []
        b.make("grad_hidden", part * self.row, _D)
        if not self.fused_routes:
            b.spike(part * self.k * self.row, _D)
        works += [*self._sum_routes(n, 1), self.elementwise(sent, 8 + 2 * self.c.wide, 1)]
        b.compute("combine", _E, phase, layer, works, arrived)
        if inputs_weighted:
            b.drop("hidden")
        norm = self.norm_backward(part, self.H)
        b.compute("combine", _R, phase, layer, [replace(norm, bytes=norm.bytes * n / part)])
        b.drop("grad_hidden", f"grads_back.{i}", *(() if self.split else (f"grad_weights.{i}",)))

    def _inputs_weighted(self, tokens: int, part: int) -> list[Work]:
        """Tokens normed once more, slice by slice, and read with the gradients of their rows for those of the
        weights."""
        norm = self.norm(part, self.H, "hidden")
        read = self.elementwise(tokens * self.k * self.H, 2 * self.c.b, 1)
        return [replace(norm, bytes=norm.bytes * tokens / part), read]

    def _router_backward(self, layer: int) -> None:
        """Gradients of all tokens from their route weights, and the router's own, slice by slice."""
        b, c, n = self.b, self.c, self.c.tokens
        part = slice_rows(n, FUSED_ROWS if self.fused_router else SLICE_ROWS)
        logits, cast = part * self.E * c.wide, self.cast * self.H * c.wide
        b.make("router", self.E * cast)
        works = [self.norm(part, self.H, "hidden")]
        b.spike(logits + (0 if self.fused_router else (part + self.E) * cast))
        b.spike((2 if self.fused_router else 5) * logits)
        b.make("grad_logits", logits)
        losses, shared = self._losses(layer, n, -(-n // part), logits)
        b.spike(part * cast)
        b.drop("hidden")
        b.make("grad_hidden", part * self.H * c.wide)
        found = self._router_works(n)
        works += [*found["cast"], *found["router"], *found["scores"], *found["back"]]
        works.append(self.norm_backward(part, self.H))
        slices = -(-n // part)
        works.append(self.elementwise(n * self.H, 5 * c.b + 3 * c.wide, 4 * slices))
        b.compute("router", _R, "backward", layer, [*works, *losses], shared)
        b.drop("router", "grad_logits", "grad_hidden", "grad_route_weights")

    def _losses(self, layer: int, tokens: int, slices: int, logits: int) -> tuple[list[Work], int | None]:
        """What the router's losses add to the gradient of the logits, slices of so many bytes, and the sum of
        the counts of routes over the ranks of a sequence."""
        training, shared = self.c.training, None
        given = (BALANCE, training.router_aux_loss_coef), (Z, training.router_z_loss_coef)
        asked = [one for one, weight in given if weight]
        self.b.spike(max((logits * (1 + one.alive) for one in asked), default=0))
        if BALANCE in asked:
            size = float(self.c.strategy.micro_batch * self.E * self.c.wide)
            shared = self.b.issue("routes", "all_reduce", size, "sequence", _R, "backward", layer)
        each = self.c.wide
        return [
            self.elementwise(tokens * self.E, one.passes * each, one.launches * slices) for one in asked
        ], shared
