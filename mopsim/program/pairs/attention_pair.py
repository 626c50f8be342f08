"""The attention half of a layer: forward, recompute, backward (mopexec.operators.attention and
.sequence)."""

from mopsim.graph.attention import attention
from mopsim.program.builder import Recorder
from mopsim.program.context import Context
from mopsim.program.pairs.rows import Rows, slice_rows
from mopsim.program.workload import Work

_C = "attention"


class AttentionPair(Rows):
    """x1 = x + o_proj(attention(norm(x)))."""

    def __init__(self, context: Context, recorder: Recorder) -> None:
        super().__init__(context, recorder)
        self.recorder = recorder
        model, D = context.model, context.shapes.sequence
        self.N, self.H, self.D = context.tokens, model.hidden_size, D
        self.B = context.strategy.micro_batch
        self.d = model.head_dim
        self.heads, self.kv = model.num_attention_heads, model.num_key_value_heads
        self.kv_blocks = min(D, self.kv)
        self.q_bytes = self.N * self.heads * self.d * context.b
        self.kv_bytes = self.N * self.kv * self.d * context.b * D // self.kv_blocks
        self.kv_merged = self.N * self.kv * self.d * context.b
        self.sums = self.N * self.heads * context.wide
        in_turn = not context.shapes.accumulates and not context.shapes.by_rows
        self.repeats = max(1, (self.heads // D) // (self.kv // self.kv_blocks)) if in_turn else 1

    def kernels(self, layer: int, backward: bool, *names: str) -> list[Work]:
        return self.works(attention(self.c.model, self.c.shapes, layer), backward, *names)

    def forward(self, layer: int, *waits: int | None) -> None:
        """Makes `x1`; x is left as it was."""
        self._core(layer, "forward", waits)
        self.b.drop("q", "k", "v", "sums")
        self._output(layer, "forward")

    def recompute(self, layer: int, *waits: int | None) -> None:
        """Makes `x1` and keeps q, k, v, out and sums."""
        self._core(layer, "recompute", waits)
        self._output(layer, "recompute")

    def backward(self, layer: int) -> None:
        """The gradient of x1 (`grad`, there already) becomes that of x, in place."""
        b, N, H = self.b, self.N, self.H
        self._core_backward(layer)
        self.recorder.cut("core")
        works = [self.norm(N, H, "hidden")]
        works += self._projection_backward(layer, "q", self.heads, self.q_bytes)
        works += self._projection_backward(layer, "k", self.kv, self.kv_merged)
        works += self._projection_backward(layer, "v", self.kv, self.kv_merged)
        b.drop("hidden")
        works.append(self.norm_backward(N, H))
        b.compute("projections", _C, "backward", layer, works)
        b.drop("grad_hidden")

    def _core(self, layer: int, phase: str, waits: tuple[int | None, ...]) -> None:
        b, N = self.b, self.N
        works = [self.norm(N, self.H, "hidden")]
        for name, size, heads in (
            ("q", self.q_bytes, self.heads),
            ("k", self.kv_bytes, self.kv),
            ("v", self.kv_bytes, self.kv),
        ):
            b.make(f"{name}_packed", size)
            copies = max(1, self.D // heads)
            works += self.kernels(layer, False, f"{name}_proj") * copies
            if name != "v":
                works += self._head_norm(name)
                works += self._rotate(size, layer)
            if name == "q":
                works += self._temper(size, layer)
        b.compute("projections", _C, phase, layer, works, *waits)
        b.drop("hidden")
        waiting = None
        for name, size in (("q", self.q_bytes), ("k", self.kv_bytes), ("v", self.kv_bytes)):
            waiting = self._to_heads(layer, phase, f"{name}_packed", name, size)
        b.make("out", self.q_bytes)
        b.make("sums", self.sums)
        core = attention(self.c.model, self.c.shapes, layer).by_name["attention_core"]
        b.spike(sum(size for _, size in core.scratch))
        works = self.kernels(layer, False, "attention_core")
        if self.repeats > 1:
            works.append(self.elementwise(self.q_bytes, 2, self.repeats))
        b.compute("attention_core", _C, phase, layer, works, waiting)

    def _output(self, layer: int, phase: str) -> None:
        """x1 = x + o_proj of the heads' outputs."""
        b, last = self.b, phase == "forward"
        waiting = self._local_output(layer, phase, last=last)
        b.make("x1", self.c.hidden)
        works = [*self._merge_work(), *self.kernels(layer, False, "o_proj")]
        b.compute("o_proj", _C, phase, layer, works, waiting)
        b.drop(*(("merged",) if self.D > 1 else ("out",) * last))

    def _exchange(self, layer: int, phase: str, name: str, size: int) -> int | None:
        """What was made so far is there before ranks trade heads for positions, or the other way."""
        self.b.flush(_C, phase, layer)
        return self.b.issue(name, "all_to_all", size, "sequence", _C, phase, layer)

    def _local_output(self, layer: int, phase: str, *, last: bool = False) -> int | None:
        """out -> `merged`, all heads of this rank's positions; a view without an exchange. last: it is freed
        once it is sent, or laid out to be sent."""
        if self.D == 1:
            return None
        b, sent = self.b, ("out",) * last
        if self.B > 1:
            b.make("send", self.q_bytes)
            b.compute("pack", _C, phase, layer, [self.elementwise(self.q_bytes, 2, 1)])
            b.drop(*sent)
            sent = ("send",)
        b.make("received", self.q_bytes)
        waiting = self._exchange(layer, phase, "heads_to_sequence", self.q_bytes)
        b.drop(*sent)
        b.make("merged", self.q_bytes)
        b.drop("received")
        return waiting

    def _merge_work(self) -> list[Work]:
        return [self.elementwise(self.q_bytes, 2, 1)] if self.D > 1 else []

    def _to_heads(self, layer: int, phase: str, source: str, target: str, size: int) -> int | None:
        """The send layout becomes all positions of this rank's heads."""
        b = self.b
        if self.D == 1:
            b.rename(source, target)
            return None
        b.make(target, size)
        waiting = self._exchange(layer, phase, "sequence_to_heads", size)
        b.drop(source)
        if self.B > 1:
            b.spike(size)
            b.compute("unpack", _C, phase, layer, [self.elementwise(size, 2, 1)], waiting)
        return waiting

    def _core_backward(self, layer: int) -> None:
        """Makes dq, dk, dv in the send layout; frees what the recompute kept."""
        b, phase = self.b, "backward"
        waiting = self._local_output(layer, phase)
        kernel = self.kernels(layer, True, "o_proj")
        b.compute("o_proj wgrad", _C, phase, layer, [*self._merge_work(), kernel[1]], waiting)
        self.weight_gradient(self.heads * self.d * self.H)
        if self.D > 1:
            b.drop("merged")
        b.make("grad_packed", self.q_bytes)
        b.compute("o_proj dgrad", _C, phase, layer, [kernel[0], *kernel[2:]])
        waiting = self._to_heads(layer, phase, "grad_packed", "grad_out", self.q_bytes)
        local_q, local_kv = self.q_bytes, self.kv_bytes
        whole = {"dq": local_q, "dk": local_kv, "dv": local_kv}
        for name, size in whole.items():
            b.make(f"{name}_whole", size)
        core = attention(self.c.model, self.c.shapes, layer).by_name["attention_core"]
        b.spike(sum(size for _, size in core.back_scratch))
        works = self.kernels(layer, True, "attention_core")
        if self.repeats > 1:
            works.append(self.elementwise(local_q + 3 * local_kv * self.repeats, 2, 3 * self.repeats))
        b.compute("attention_core", _C, phase, layer, works, waiting)
        b.drop("grad_out", "q", "k", "v", "out", "sums")
        for name, size in whole.items():
            waiting = self._to_positions(layer, f"{name}_whole", name, size)
        works = self._temper(local_q, layer) + self._rotate(local_q, layer) + self._rotate(local_kv, layer)
        b.compute("rotate", _C, phase, layer, works, waiting)

    def _to_positions(self, layer: int, source: str, target: str, size: int) -> int | None:
        b = self.b
        if self.D == 1:
            b.rename(source, target)
            return None
        if self.B > 1:
            b.make("send", size)
            b.drop(source)
            source = "send"
        b.make(target, size)
        waiting = self._exchange(layer, "backward", "heads_to_sequence", size)
        b.drop(source)
        return waiting

    def _projection_backward(self, layer: int, name: str, heads: int, merged: int) -> list[Work]:
        """Merges d`name`, its head norm's gradient, both products; makes `grad_hidden` on the first call."""
        b = self.b
        works: list[Work] = []
        blocks = min(self.D, heads)
        if blocks < self.D:
            b.make("summed", merged)
            works.append(self.elementwise(self.kv_bytes, 2, 1))
        if blocks > 1:
            b.make("merged", merged)
            works.append(self.elementwise(merged, 2, 1))
        if blocks < self.D and blocks > 1:
            b.drop("summed")
        if name != "v" and self.c.model.qk_norm == "head":
            part = self.N if self.fused_norm else slice_rows(self.N)
            size = heads * self.d
            b.spike((1 if part == self.N else 2) * part * size * self.c.b)
            b.make("before", part * size * self.c.b)
            works += self.kernels(layer, False, f"{name}_proj")
            works.append(self.norm_backward(part, size, heads=heads))
            b.drop("before")
        if "grad_hidden" not in b.alive:
            b.make("grad_hidden", self.c.hidden)
        works += self.kernels(layer, True, f"{name}_proj")
        self.weight_gradient(heads * self.d * self.H)
        used = "merged" if blocks > 1 else "summed" if blocks < self.D else ""
        order = (f"d{name}", used) if name == "v" else (used, f"d{name}")
        b.drop(*filter(None, order))
        return works

    def _head_norm(self, name: str) -> list[Work]:
        """Norm of q or k per head, block by block, copied back in place."""
        if self.c.model.qk_norm != "head":
            return []
        heads = self.heads if name == "q" else self.kv_bytes // (self.N * self.d * self.c.b)
        if self.fused_norm:
            return [self.norm(self.N, heads * self.d)]
        width = heads * self.d // self.D
        self.b.spike(slice_rows(self.N) * width * (self.c.b + self.c.wide))
        return [self.pass_(self.N, width * self.D, 5 * self.c.b + 4 * self.c.wide, 9 * self.D)]

    def _rotate(self, size: int, layer: int) -> list[Work]:
        """Rotation in place, slice by slice of positions: a slice of temporaries in the tables' dtype, of the
        part of a head that turns. None in layers without rotary positions."""
        if not self.c.model.rotates(layer):
            return []
        size = size * self.c.model.rotary_dim // self.d
        if self.fused_rotary:
            return [Work("memory_bound", bytes=2.0 * size, launches=2)]
        positions = self.c.training.seq_len // self.D
        part = slice_rows(positions)
        self.b.spike(size * self.c.wide / self.c.b * part / positions)
        elements = size / self.c.b
        launches = 6 * max(1, -(-positions // part)) if elements else 0
        return [Work("memory_bound", bytes=6.0 * size, launches=launches)]

    def _temper(self, size: int, layer: int) -> list[Work]:
        """Queries times their positions' factors, in place."""
        return [self.elementwise(size, 2, 1)] if self.c.model.tempers(layer) else []
