"""The MoE half of a layer: chunks through dispatch(i+1) | experts(i) | combine(i-1)
(mopexec.flat.experts)."""

from dataclasses import replace

from mopsim.graph.experts import experts, router
from mopsim.graph.tape import Kernel
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.pairs.ffn_pair import FfnPair
from mopsim.program.pairs.moved_experts import ForeignExperts, MovedExperts
from mopsim.program.pairs.rows import FUSED_ROWS, SLICE_ROWS, Rows, slice_rows
from mopsim.program.workload import Work

_E, _R, _D = "experts", "router", "dispatch"


class ExpertsPair:
    """Buffers of chunk i are named `….i`. Everything on its way is of category dispatch."""

    def __init__(self, context: Context, builder: Builder, ffn: FfnPair) -> None:
        self.c, self.b, self.ffn, self.rows = context, builder, ffn, Rows(context, builder)
        model = context.model
        self.H, self.E, self.k = model.hidden_size, model.num_local_experts, model.num_experts_per_tok
        nested = context.stack.recompute.chunk_inputs == "nested"
        self.moved = (MovedExperts if nested else ForeignExperts)(context, builder)
        self.up = ("experts_gate", "experts_up") if model.ffn_matrices == 3 else ("experts_up",)
        self.inner = model.moe_intermediate_size // context.strategy.experts.expert_tensor_parallel
        self.row = self.H * context.b
        degree = context.strategy.experts.expert_parallel
        whole = context.stack.kernels.expert_products == "grouped" and context.b == 2
        self.grouped = whole and not self.moved
        self.split = degree > 1
        self.ordered = self.split and (self.E // degree > 1 or bool(self.moved))
        self._router: dict[int, dict[str, Kernel]] = {}
        self._works: dict[tuple[tuple[int, ...], bool, tuple[str, ...]], list[Work]] = {}

    @property
    def choice(self) -> int:
        """Bytes of the choices of a layer."""
        return self.c.tokens * self.k * 2

    def plan(self, layer: int) -> None:
        """The router's choice for all tokens and the exchange of counts; the choice is kept for the
        backward."""
        c, b, n = self.c, self.b, self.c.tokens
        b.make(f"choice{layer}", self.choice)
        part = n if self.rows.fused_router else slice_rows(n)
        if self.rows.fused_router:
            b.spike(n * (self.row + 2 * self.E * c.wide))
        else:
            b.spike(part * (self.row + self.H * c.wide) + self.E * (self.H + 3 * part) * c.wide)
        works = [self.rows.norm(part, self.H), *self._routing(n, False)]
        b.compute("choose", _R, "forward", layer, works)
        size, placed = 8.0 * self.E * c.chunks, c.strategy.experts.balance != "none"
        kind, size = ("all_gather", size * c.groups["experts"].size) if placed else ("all_to_all", size)
        arrived = b.issue("counts", kind, size, "experts", _R, "forward", layer)
        b.compute(
            "counts", _R, "forward", layer, [Work("memory_bound", bytes=24.0 * n * self.k, launches=14)],
            arrived, awaited=arrived is not None,
        )  # fmt: skip

    def forward(self, layer: int, *waits: int | None) -> None:
        """x1 becomes x2 in place. waits: the gather of the expert unit."""
        K = self.c.chunks
        waits = (*waits, *self.moved.gather(layer, "forward", self.b.last))
        arrived = self._dispatch(0, layer, "forward")
        returning: tuple[int, int | None] | None = None
        for i in range(K):
            self.ffn.shared(layer, self.c.chunk_tokens(i), backward=False)
            works = self._receive(i, "forward")
            here = arrived
            if i + 1 < K:
                self._reorder(works, here, layer, "forward")
                self.moved.read(layer, "forward", self.b.last)
                arrived = self._dispatch(i + 1, layer, "forward")
            self._experts_forward(i, layer, works, here, *waits)
            if returning is not None:
                self._combine(*returning, layer)
            returning = (i, self._return(i, layer, "forward"))
        assert returning is not None
        self._combine(*returning, layer)
        self.moved.free()

    def backward(self, layer: int, *waits: int | None) -> None:
        """The gradient of x2 becomes that of x1, in place."""
        K = self.c.chunks
        waits = (*waits, *self.moved.gather(layer, "backward", self.b.last))
        self.moved.open()
        arrived = self._dispatch(0, layer, "backward")
        returning: tuple[int, int | None] | None = None
        for i in range(K):
            self.ffn.shared(layer, self.c.chunk_tokens(i), backward=True)
            works = self._receive(i, "backward")
            here = arrived
            if i + 1 < K:
                self._reorder(works, here, layer, "backward")
                self.moved.read(layer, "backward", self.b.last)
                arrived = self._dispatch(i + 1, layer, "backward")
            self._experts_backward(i, layer, works, here, *waits)
            if returning is not None:
                self._combine_backward(*returning, layer)
            returning = (i, self._return(i, layer, "backward"))
        assert returning is not None
        self._combine_backward(*returning, layer)
        self.moved.send_home(layer, self.b.last)
        self.b.drop(f"choice{layer}")

    def _receive(self, i: int, phase: str) -> list[Work]:
        """The chunk at the experts: rows in their order, what was sent freed."""
        _, _, received, _ = self._sizes(i)
        works = self._take("weights", i, received * self.c.wide)
        works += self._take("rows", i, received * self.row)
        if phase == "backward":
            works += self._take("grads", i, received * self.row)
        return works

    def _reorder(self, works: list[Work], arrived: int | None, layer: int, phase: str) -> None:
        """The executor waits for the chunk and reorders it before it sends the next one."""
        self.b.compute("arrived", _E, phase, layer, works, arrived)
        works.clear()

    def _return(self, i: int, layer: int, phase: str) -> int | None:
        """The chunk's rows (and gradients of its route weights) go home."""
        _, sent, received, _ = self._sizes(i)
        name = "rows" if phase == "forward" else "grads"
        if phase == "backward":
            self._send_back("grad_weights", i, received * self.c.wide, sent * self.c.wide, layer, phase)
        waiting = self._send_back(name, i, received * self.row, sent * self.row, layer, phase)
        self.b.drop(*(n for n in ("weights", "grad_weights", f"arrival_order.{i}") if n in self.b.alive))
        return waiting

    def _sizes(self, i: int) -> tuple[int, int, int, int]:
        """(tokens, routes sent, routes received, most rows of one expert) of chunk i."""
        tokens, routes = self.c.chunk_tokens(i), self.c.routes(i)
        return tokens, tokens * self.k, sum(routes) if self.split else tokens * self.k, max(routes)

    def _routing(self, tokens: int, backward: bool) -> list[Work]:
        if tokens not in self._router:
            tape = router(self.c.model, tokens, self.c.b, self.c.wide)
            self._router[tokens] = {kernel.name: kernel for kernel in tape.kernels}
        kernels = self._router[tokens]
        found = [*self.rows.works(kernels["router"], False), *self.rows.works(kernels["scores"], False)]
        if backward:
            found += [
                *self.rows.works(kernels["router"], True),
                *self.rows.works(kernels["top_k"], True),
            ]
        else:
            found += self.rows.works(kernels["top_k"], False)
        cast = self.rows.elementwise(tokens * self.H, self.c.b + self.c.wide, 2)
        return [cast, *found]

    def _dispatch(self, i: int, layer: int, phase: str) -> int | None:
        """Orders the chunk's routes and sends route weights, rows and (backward) output gradients."""
        c, b = self.c, self.b
        n, sent, arrived, _ = self._sizes(i)
        wide = c.wide
        b.make("order", sent * 8, _D)
        b.spike(sent * 8 * 2, _D)
        if self.ordered:
            b.make(f"arrival_order.{i}", arrived * 8, _D)
        works = [self.rows.norm(n, self.H, "hidden", _D)]
        if self.rows.fused_router:
            b.spike(n * (self.E + self.k) * wide, _D)
        else:
            b.spike(n * (self.H + self.E) * wide + self.E * self.H * wide, _D)
        b.make(f"weights_sent.{i}", sent * wide, _D)
        works += self._routing(n, False)
        works.append(self.rows.elementwise(sent, 8, 10))
        b.compute("order routes", _R, phase, layer, works)
        b.make(f"weights.{i}", arrived * wide, _D) if self.split else None
        works = [self.rows.by_index(sent * self.row)]
        b.make(f"rows_sent.{i}", sent * self.row, _D)
        b.compute("permute", _E, phase, layer, works)
        waiting = b.issue(
            "dispatch weights", "all_to_all", float(max(sent, arrived) * wide), "experts", _E, phase, layer
        )
        size = float(max(sent, arrived) * self.row)
        if self.split:
            b.make(f"rows.{i}", arrived * self.row, _D)
        b.drop("hidden")
        waiting = b.issue("dispatch", "all_to_all", size, "experts", _E, phase, layer)
        if phase == "backward":
            b.make(f"grads_sent.{i}", sent * self.row, _D)
            b.compute("permute", _E, phase, layer, works)
            if self.split:
                b.make(f"grads.{i}", arrived * self.row, _D)
            waiting = b.issue("dispatch gradients", "all_to_all", size, "experts", _E, phase, layer)
        b.make(f"inverse.{i}", sent * 8, _D)
        b.drop("order")
        b.compute("inverse", _R, phase, layer, [self.rows.elementwise(sent, 16, 1)])
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
        return [self.rows.by_index(size)]

    def _send_back(self, name: str, i: int, size: int, sent: int, layer: int, phase: str) -> int | None:
        """`name` in the experts' order goes back in the sender's order; arrives as `{name}_back.i`."""
        b = self.b
        if not self.split:
            b.rename(name, f"{name}_back.{i}")
            return None
        if self.ordered:
            b.make(f"{name}_ordered.{i}", size, _D)
            b.compute("reorder", _E, phase, layer, [self.rows.by_index(size)])
            if name != "grad_weights":  # its caller holds it
                b.drop(name)
        else:
            b.rename(name, f"{name}_ordered.{i}")
        b.make(f"{name}_back.{i}", sent, _D)
        return b.issue("combine", "all_to_all", float(max(size, sent)), "experts", _E, phase, layer)

    def _products(self, i: int, backward: bool, *names: str) -> list[Work]:
        """Works of the named products, one launch per expert where they are not grouped."""
        routes = self.c.routes(i)
        key = (routes, backward, names)
        if key not in self._works:
            tape = experts(
                self.c.model, routes, self.c.b, self.c.wide, self.c.strategy.experts.expert_tensor_parallel
            )
            kernels = {kernel.name: kernel for kernel in tape.kernels}
            works = [work for name in names for work in self.rows.works(kernels[name], backward)]
            self._works[key] = (
                works if self.grouped else [replace(work, launches=int(work.count)) for work in works]
            )
        return self._works[key]

    def _experts_forward(
        self, i: int, layer: int, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        c = self.c
        _, _, received, most = self._sizes(i)
        rows = received if self.grouped else most
        self.b.spike(len(self.up) * rows * self.inner * c.b)
        works = [*works, *self._products(i, False, *self.up, "experts_down")]
        active = sum(1 for rows in c.routes(i) if rows)
        passes = 7 if len(self.up) == 2 else 4
        if self.grouped:
            passes, active = len(self.up) + 1, 1
        works.append(self.rows.elementwise(received * self.inner, passes * c.b, 3 * active))
        self.b.compute("experts", _E, "forward", layer, works, arrived, *waits)

    def _combine(self, i: int, arrived: int | None, layer: int) -> None:
        """x1 += the sum of each token's routes."""
        b, n = self.b, self.c.chunk_tokens(i)
        self._arrive("rows", i)
        part = slice_rows(n)
        if not self.rows.fused_routes:
            b.spike(part * (self.k + 1) * self.row, _D)
        works = self._sum_routes(n, 2)
        b.compute("combine", _E, "forward", layer, works, arrived)
        b.drop(f"rows_back.{i}", f"inverse.{i}")

    def _sum_routes(self, tokens: int, launches: int) -> list[Work]:
        """Routes of each token gathered by index and summed, slice by slice."""
        if self.rows.fused_routes:
            return [self.rows.elementwise(tokens * (self.k + 2), self.row, 2)]
        gathered = self.rows.by_index(tokens * self.k * self.row, tokens)
        return [gathered, self.rows.pass_(tokens, self.H, (self.k + 4) * self.c.b, launches)]

    def _arrive(self, name: str, i: int) -> None:
        if self.split:
            self.b.drop(f"{name}_ordered.{i}")

    def _experts_backward(
        self, i: int, layer: int, works: list[Work], arrived: int | None, *waits: int | None
    ) -> None:
        b, c = self.b, self.c
        _, _, received, most = self._sizes(i)
        b.make("grad_weights", received * c.wide)
        if self.grouped:
            stack = self.E // c.strategy.experts.expert_parallel * self.H * self.inner
            b.spike(((len(self.up) + 1) * received * self.inner + stack) * c.b)
        else:
            b.spike((4 if len(self.up) == 1 else 6) * most * self.inner * c.b)
        works = [*works, *self._products(i, False, *self.up)]
        works += self._products(i, True, *self.up, "experts_down")
        if not self.grouped and c.strategy.precision.reduce != c.strategy.precision.compute:
            b.spike((4 * most + self.H) * self.inner * c.b)
        active = sum(1 for rows in c.routes(i) if rows)
        if self.grouped:
            works.append(self.rows.elementwise(received * self.inner, 6 * c.b, 3))
            works.append(self.rows.elementwise(3 * stack, c.b + 2 * c.reduce, 3))
            works.append(self.rows.elementwise(received * self.H, 3 * c.b, 1))
        else:
            works.append(self.rows.elementwise(received * self.inner, 26 * c.b, 10 * active))
        b.compute("experts", _E, "backward", layer, works, arrived, *waits)
        b.drop("rows")

    def _combine_backward(self, i: int, arrived: int | None, layer: int) -> None:
        """Gradients of tokens from their routes and from the router, through the norm, slice by slice."""
        b, c = self.b, self.c
        n, sent, _, _ = self._sizes(i)
        self._arrive("grads", i)
        self._arrive("grad_weights", i)
        b.make("home_weights", sent * c.wide, _D)
        b.drop(f"grad_weights_back.{i}")
        part = slice_rows(n, FUSED_ROWS if self.rows.fused_routes else SLICE_ROWS)
        b.make("grad_hidden", part * self.row, _D)
        if not self.rows.fused_routes:
            b.spike(part * self.k * self.row, _D)
        b.compute("combine", _E, "backward", layer, self._sum_routes(n, 1), arrived)
        works = [self.rows.norm(part, self.H, "hidden", strided=c.chunks > 1)]
        if tokens_kept := self.rows.fused_norm and c.chunks > 1:
            b.make("tokens", part * self.row)
        if self.rows.fused_router:
            b.spike(part * self.H * (c.wide + c.b) + (part + self.H) * self.E * c.wide)
        else:
            b.spike(part * (2 * self.H + 3 * self.E) * c.wide + 2 * self.E * self.H * c.wide)
        works += self._routing(n, True)
        b.drop("hidden")
        works.append(self.rows.norm_backward(part, self.H))
        if tokens_kept:
            b.drop("tokens")
        if self.rows.fused_router:
            slices = -(-n // part)
            works.append(self.rows.elementwise(n * self.H, 5 * c.b + 3 * c.wide, 8 * slices))
        else:
            works.append(self.rows.pass_(n, self.H, 7 * c.b + 20 * c.wide, 31))
        b.drop("grad_hidden")
        b.compute("router", _R, "backward", layer, works)
        b.drop(f"grads_back.{i}", f"inverse.{i}", "home_weights")
