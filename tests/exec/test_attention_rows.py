"""Attention by blocks of query rows, forced on a CPU, against the flash kernel there."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mopexec.operators import context_parallel, kernels
from mopexec.operators.attention_core import Core, causal_backward, causal_forward
from mopexec.operators.context_parallel import blocks_backward, blocks_forward
from mopexec.operators.kernels import using
from mopsim.spec.stack import Kernels
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2
from tests.parity.memory_cases import MODEL

ROWS = Kernels(attention={"default": "rows"})
LENGTH = 300
"""More than two blocks, the last of them shorter."""


def _drawn(kv_heads: int, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, LENGTH, n, 8, dtype=torch.float64) for n in (4, kv_heads, kv_heads, 4)]


DOCUMENTS = ((), ((130, LENGTH), (LENGTH,)))


@pytest.mark.parametrize(
    ("kv_heads", "window", "documents", "sunk"),
    [*product((1, 2, 4), (0, 50, 200), DOCUMENTS, (False, True))],
)
def test_as_the_flash_kernel_of_cpus(kv_heads: int, window: int, documents: Any, sunk: bool) -> None:
    q, k, v, grad = _drawn(kv_heads)
    core, sinks = Core(0.3, window, documents), torch.randn(4, dtype=torch.float64) if sunk else None
    found = []
    for run in (Kernels(attention={"default": "cpu"}), ROWS):
        with using(run):
            out, saved = causal_forward(q, k, v, core, sinks)
            found.append((out, *causal_backward(grad, q, k, v, out, saved, core, sinks)))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_blocks_of_context_parallelism_are_the_whole(
    ring: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one after the other, whose exchanges hand over what the other has."""
    q, k, v, grad = _drawn(kv_heads)
    core, half = Core(0.3), LENGTH // 2
    parts = [[t[:, :half].contiguous(), t[:, half:].contiguous()] for t in (q, k, v, grad)]
    sums = [[torch.zeros_like(one) for one in parts[i]] for i in (0, 1, 2)]

    def before(_k: Tensor, _v: Tensor, group: Any) -> Any:
        return ((place, parts[1][place], parts[2][place]) for place in range(group.place))

    def back(_k: Tensor, _v: Tensor, group: Any, block: Any) -> Any:
        for place in range(group.place + 1):
            grads = block(place, parts[1][place], parts[2][place])
            for total, part, at in zip(sums, grads, (group.place, place, place), strict=True):
                total[at].add_(part)
        return grads

    for name in ("_around", "_gathered"):
        monkeypatch.setattr(context_parallel, name, before)
        monkeypatch.setattr(context_parallel, {"_around": "_ring"}.get(name, name) + "_backward", back)
    with using(ROWS):
        whole, saved = causal_forward(q, k, v, core)
        wanted = causal_backward(grad, q, k, v, whole, saved, core)
        for place in (0, 1):
            own: Any = [part[place] for part in parts]
            group: Any = SimpleNamespace(place=place, size=2)
            out, lse, rests = blocks_forward(*own[:3], core, group, ring=ring)
            here = slice(place * half, (place + 1) * half)
            torch.testing.assert_close(out, whole[:, here], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(lse, saved[0][:, :, here], rtol=1e-11, atol=1e-12)
            blocks_backward(own[3], *own[:3], out, lse, rests, core, group, ring=ring)
    for found, expected in zip(sums, wanted[:3], strict=True):
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["mopexec-flat", "mopexec-fsdp2", "mopexec-split"])
@pytest.mark.parametrize(("compute", "kernel"), [("bfloat16", "flash2"), ("float32", "rows")])
def test_one_table_of_kernels(name: str, compute: Any, kernel: str) -> None:
    """What a stack says of a dtype is what runs where no data is, and where it is on a GPU."""
    strategy = fsdp2(1, dtype=compute)
    stack = load_stack(name).on_kind("cuda").multiplying(MODEL, strategy).on("ampere")
    assert stack.attention == kernel
    q = torch.empty((1, 8, 4, 8), dtype=getattr(torch, compute), device="meta")
    for run in (stack.kernels, load_stack(name).on_kind("cuda").on("ampere").kernels):
        with using(run):
            assert kernels.attention(q) == kernel
    assert load_stack(name).on_kind("cpu").multiplying(MODEL, strategy).attention == "cpu"
