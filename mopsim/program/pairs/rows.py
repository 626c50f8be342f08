"""What pairs have in common: works of a tape's kernels, sliced norms and other element-wise passes with their
temporaries and their traffic."""

from mopsim.graph.rewrites.tensor_passes import COMPOSED, TensorPasses, traffic
from mopsim.graph.tape import Tape
from mopsim.program.builder import Builder
from mopsim.program.casts import Part
from mopsim.program.context import Context
from mopsim.program.workload import Work, memory_work
from mopsim.program.works import works
from mopsim.spec.layout import SLICE_ROWS


def slice_rows(rows: int, most: int = SLICE_ROWS) -> int:
    """Rows of the largest slice, as mopexec.operators.rows cuts them."""
    return min(rows, most)


class Rows:
    """Operators over rows, written into a program. Buffers by name: what the executor's variables hold."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.c, self.b, self.width, self.wide = context, builder, context.b, context.wide
        self.cast = context.wide != context.b
        kernels = context.stack.kernels
        self.fused_norm, self.fused_rotary = kernels.norm == "fused", kernels.rotary == "fused"
        self.fused_routes, self.fused_router = kernels.expert_rows == "fused", kernels.router == "fused"
        self.fused_gate = kernels.activation == "fused"
        self.centred = context.model.norm == "layernorm"

    def works(self, tape: Tape, backward: bool, *names: str) -> list[Work]:
        """The works of one pass of the named kernels of a tape."""
        part: Part = "backward" if backward else "forward"
        kernels = tape.by_name
        return [work for name in names for work in works(kernels[name], part, self.c)]

    def weight_gradient(self, size: int, category: str = "activations") -> None:
        """The temporary of a weight gradient of `size` elements in the compute dtype, where the buffer that
        it is added to has another."""
        precision = self.c.strategy.precision
        if precision.reduce != precision.compute:
            self.b.spike(size * self.c.b, category)

    def norm(self, rows: int, size: int, name: str = "") -> Work:
        """A norm of rows x size into a new buffer `name` (in place of nothing where unnamed: copied back by
        the caller)."""
        b, part = self.b, slice_rows(rows)
        out = rows * size * self.width
        if self.fused_norm:
            b.spike(out)
            if name:
                b.make(name, out)
            return memory_work(float(rows * size * 2 * self.width), 1)
        if name:
            b.make(name, out)
        else:
            b.spike(out)
        b.spike((part * size + part) * self.wide + self.cast * size * self.wide)
        how = COMPOSED["layernorm_rows" if self.centred else "norm_rows"]
        return self._passes(rows, size, how.forward, 1 + self.centred)

    def norm_backward(self, rows: int, size: int, heads: int = 1) -> Work:
        """Gradient of a norm added into a buffer that is there already. heads: normed one by one."""
        if self.fused_norm:
            return memory_work(float(rows * size * 6 * self.width), 4)
        part, slices = slice_rows(rows), -(-rows // SLICE_ROWS)
        held = (3 if slices > 1 else 2) * part * (size + heads) * self.wide
        self.b.spike(held + (1 + self.cast) * size // heads * self.wide, "activations")
        centred = self.centred and heads == 1
        how = COMPOSED["layernorm_rows" if centred else "norm_rows"]
        return self._passes(rows, size, how.backward, 3 + 2 * centred)

    def _passes(self, rows: int, size: int, how: TensorPasses, once: int) -> Work:
        """Such passes over rows x size, slice by slice, and `once` more kernels."""
        return self.pass_(rows, size, traffic(how, self.width, self.wide), how.launches, once)

    def pass_(self, rows: float, size: float, bytes_each: float, launches: int, once: int = 0) -> Work:
        """Memory-bound work of `launches` kernels per slice and `once` more, with `bytes_each` per element
        in all."""
        count = max(1, -(-int(rows) // SLICE_ROWS)) * launches + once
        return memory_work(float(rows * size * bytes_each), count)

    def by_index(self, size: float, rows: int = 0) -> Work:
        """A copy of `size` bytes by index, at once or in slices of `rows`."""
        return memory_work(2.0 * size, max(1, -(-rows // SLICE_ROWS)), indexed=True)

    def elementwise(self, elements: float, bytes_each: float, launches: int) -> Work:
        """Memory-bound work of `launches` kernels over all elements."""
        return memory_work(float(elements * bytes_each), launches)
