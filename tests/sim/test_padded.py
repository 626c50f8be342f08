"""Rows of experts copied slice by slice to those of the busiest one, and stacked weights, against torch."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mopsim.graph.experts import combine, dispatch, experts
from mopsim.graph.rewrites.padded import padded_to_busiest, weights_stacked
from tests.sim.toys import small

TRAFFIC = {"copy_": 2, "clone": 2, "add": 3, "stack": 2}
ROUTES = (370, 100, 60, 30)


class Moved(TorchDispatchMode):
    """Elements that ops move: copies read and write, sums read two. A gradient of a slice is a whole tensor
    of zeros, with a slice copied into it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if name in TRAFFIC:
            self.by_op[name] += TRAFFIC[name] * out.numel()
        elif name == "zeros_like":
            self.by_op[name] += out.numel()
        elif name in ("slice_backward", "select_backward"):
            self.by_op[name] += out.numel() + 2 * args[0].numel()
        return out


def test_the_backward_of_slices_moves_what_torch_moves() -> None:
    width = small().hidden_size
    rows = torch.randn(sum(ROUTES), width, requires_grad=True)
    there, back, starts = rows.new_zeros(4, max(ROUTES), width), torch.zeros_like(rows), [0, 370, 470, 530]
    source = rows * 1
    for i, (start, count) in enumerate(zip(starts, ROUTES, strict=True)):
        there[i, :count] = source[start : start + count]
    products = there * 2
    for i, (start, count) in enumerate(zip(starts, ROUTES, strict=True)):
        back[start : start + count] = products[i, :count]
    with Moved() as moved:
        back.sum().backward()

    tape = dispatch(small(), 280, sum(ROUTES), 1, True), experts(small(), ROUTES, 1)
    unsort = combine(small(), 280, sum(ROUTES), 1, True).kernels[0]
    padded = padded_to_busiest((tape[0].kernels[-1], *tape[1].kernels, unsort), len(ROUTES))
    found = sum(one.back_bytes or 0 for one in padded if one.name in ("sort", "unsort"))
    assert found == pytest.approx(sum(moved.by_op.values()), rel=1e-3)


def test_stacked_weights_are_copied_once_in_each_direction() -> None:
    weights = [torch.nn.Parameter(torch.randn(6, 5)) for _ in range(4)]
    with Moved() as moved:
        torch.bmm(torch.randn(4, 3, 5), torch.stack([one.t() for one in weights])).sum().backward()
    each = 4 * 6 * 5
    assert moved.by_op == {"stack": 2 * each, "copy_": 2 * each}

    products = experts(small(), (100,) * 4, 2).kernels
    stacked = [one for one in weights_stacked(products, 2) if one.name == "stack_weights"]
    size = 2 * 4 * small().hidden_size * small().moe_intermediate_size
    assert [one.bytes for one in stacked] == [one.back_bytes for one in stacked] == [2.0 * size] * 3
