"""Biases of routed experts around their products: gathered for every row beside grouped products
(mopexec.operators.expert_products), fused with those of one expert after another (looped_products)."""

from mopsim.program.context import Context
from mopsim.program.pairs.rows import Rows
from mopsim.program.workload import Work

_INDEX = 8
"""Bytes of a row's expert."""


class ExpertBiases(Rows):
    """Nothing where experts have none, or have them inside grouped products."""

    def __init__(self, rows: Rows, context: Context, wings: int, inner: int, *, grouped: bool) -> None:
        super().__init__(context, rows.b)
        self.wings, self.inner, self.H = wings, inner, context.model.hidden_size
        gathered = context.stack.kernels.expert_bias == "gathered"
        self.beside = context.model.expert_bias and grouped and gathered
        self.within = context.model.expert_bias and not grouped

    def forward(self, rows: int, active: int) -> list[Work]:
        """Works of so many rows of `active` experts; the largest temporaries, beside `rows` packed, which are
        gone before the last product."""
        size, row = self.width, self.H * self.width
        if self.within:
            return [self.elementwise(rows * self.H, 2 * size, 2 * active)]
        if not self.beside:
            return []
        self.b.spike(rows * ((self.wings + 1) * self.inner * size + _INDEX))
        self.b.spike(rows * (self.inner * size + 2 * row + _INDEX) - self.b.alive["rows"][1])
        return [*self._gathered(rows), self.elementwise(rows * self.H, 4 * size, 2)]

    def backward(self, rows: int, most: int, active: int) -> list[Work]:
        """The same of a backward. most: rows of one expert."""
        size, wings = self.width, self.wings * self.inner
        if self.within:
            held = 2 if self.wings == 1 else 4
            self.b.spike(most * (held * self.inner * size + self.H * self.wide))
            moved = self.H * (4 * size + 2 * self.wide) + wings * size
            return [self.elementwise(rows, moved, (5 + 2 * self.wings) * active)]
        if not self.beside:
            return []
        self.b.spike(rows * (wings * size + 2 * self.H * size + _INDEX))
        moved = 8 * self.H * size + wings * size + 2 * _INDEX * size
        return [*self._gathered(rows), self.elementwise(rows, moved, 7 + 3 * self.wings)]

    def _gathered(self, rows: int) -> list[Work]:
        """Each row's expert, and the first products' biases gathered and added."""
        wings = self.wings * self.inner
        return [
            self.elementwise(rows, 2 * _INDEX, 2),
            self.elementwise(rows * wings, 4 * self.width, 2 * self.wings),
        ]
