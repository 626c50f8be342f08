"""What the kernels of a GPU are called with, on a machine without one: by tensors without data and stubs."""

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mopexec.model.attention import causal_attention
from mopexec.operators import fused
from mopexec.operators.attention_core import Core
from mopexec.operators.documents import Documents
from mopexec.operators.kernels import using
from mopsim.spec.stacks import load_stack

CUDA = load_stack("mopexec-flat").on_kind("cuda").kernels


def _older_compile(leaf: Any, *, dynamic: bool, fullgraph: bool) -> Any:
    return _COMPILE(leaf, dynamic=dynamic, fullgraph=fullgraph, backend="eager")


_COMPILE = torch.compile


@pytest.mark.parametrize("compiler", [functools.partial(torch.compile, backend="eager"), _older_compile])
def test_an_op_has_many_variants(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By flags, strides and dtypes; called from another thread, as autograd does."""
    monkeypatch.setattr(torch, "compile", compiler)
    torch._dynamo.reset()

    def leaf(x: Tensor, *flags: bool) -> Tensor:
        return x + sum(2**place for place, flag in enumerate(flags) if flag)

    run = fused._compiled(leaf)
    with ThreadPoolExecutor(1) as thread:
        found = thread.map(
            lambda flags: run(torch.zeros(()), *flags).item(), product((False, True), repeat=4)
        )
    assert sorted(found) == list(range(16))


@pytest.mark.parametrize("documents", [((100, 160), (30, 31, 160)), ((100, 160), (30, 160))])
@pytest.mark.parametrize("window", [0, 48])
def test_documents_with_sinks_keep_what_each_one_saved(window: int, documents: Documents) -> None:
    """The kernel of a window saves 3 values, that of a document within the window 7."""
    shapes = [(2, 160, 8, 64), (2, 160, 4, 64), (2, 160, 4, 64), (8,)]
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    with using(CUDA):
        out = causal_attention(*leaves[:3], Core(0.1, window, documents), leaves[3])
        grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [tuple(grad.shape) for grad in grads] == shapes
