"""What the kernels of a GPU are called with, on a machine without one: by tensors without data and stubs."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mopexec.model.attention import causal_attention
from mopexec.operators import compiler as operators_compiler
from mopexec.operators import cudnn, grouped
from mopexec.operators.attention_core import Core
from mopexec.operators.documents import Documents, cumulative, positions
from mopexec.operators.grouped import Groups, _in_one_kernel
from mopexec.operators.kernels import using
from mopsim.spec.stacks import load_stack

CUDA = load_stack("mopexec-flat").on_kind("cuda").kernels


def _older_compile(leaf: Any, *, dynamic: bool, fullgraph: bool, backend: str) -> Any:
    return _COMPILE(leaf, dynamic=dynamic, fullgraph=fullgraph, backend=backend)


_COMPILE = torch.compile


@pytest.mark.parametrize("compiler", [torch.compile, _older_compile])
def test_an_op_has_many_variants(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By flags, strides and dtypes; called from another thread, as autograd does."""
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(operators_compiler, "BACKEND", "eager")
    torch._dynamo.reset()

    def leaf(x: Tensor, *flags: bool) -> Tensor:
        return x + sum(2**place for place, flag in enumerate(flags) if flag)

    run = operators_compiler.compiled(leaf, dynamic=True)
    with ThreadPoolExecutor(1) as thread:
        found = thread.map(
            lambda flags: run(torch.zeros(()), *flags).item(), product((False, True), repeat=4)
        )
    assert sorted(found) == list(range(16))


def test_cudnns_backward_is_told_of_nothing_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias or ends of documents that are there, even empty, are taken for such."""
    op, given = cudnn._ATEN._scaled_dot_product_cudnn_attention_backward, dict[str, Any]()

    def called(*args: Any, **_: Any) -> list[Any]:
        given.update(zip((one.name for one in op.default._schema.arguments), args, strict=False))
        return list(args[1:4])

    q, k, v = (torch.empty((1, 32, 8, 64), dtype=torch.bfloat16, device="meta") for _ in "qkv")
    out, saved = cudnn.forward(q, k, v, 0.1, causal=True)
    monkeypatch.setattr(cudnn, "_ATEN", SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=called))
    cudnn.backward(out, q, k, v, out, saved, 0.1, causal=True)
    assert [given[name] for name in ("attn_bias", "cum_seq_q", "cum_seq_k")] == [None] * 3


def test_experts_without_rows_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel that leaves their memory as it was, as Blackwell's does."""
    ends, whole = torch.tensor([3, 3, 8, 8], dtype=torch.int32), functional.grouped_mm

    def leaving(rows: Tensor, grads: Tensor, *, offs: Tensor) -> Tensor:
        product = whole(rows, grads, offs=offs)
        product[[1, 3]] = float("nan")
        return product

    rows, grads = (torch.randn(8, 16).bfloat16() for _ in "rg")
    groups = Groups(ends, 8, biased=False)
    expected = groups.of_weights(rows, grads), groups.of_bias(grads)
    monkeypatch.setattr(functional, "grouped_mm", leaving)
    monkeypatch.setattr(grouped, "_leaves_memory", lambda device: True)
    groups = Groups(ends, 8, biased=False)
    for found, wanted in zip((groups.of_weights(rows, grads), groups.of_bias(grads)), expected, strict=True):
        assert torch.equal(found, wanted)
        assert not found[[1, 3]].any()


@pytest.mark.parametrize(
    ("capability", "hip", "grouped"),
    [((8, 0), None, False), ((8, 9), None, False), ((9, 0), None, True), ((10, 3), None, True),
     ((12, 0), None, False), ((9, 4), "7.0", True)],
)  # fmt: skip
def test_products_are_grouped_where_that_is_one_kernel(
    capability: tuple[int, int], hip: str | None, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere torch's op waits for the device and loops."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert _in_one_kernel.__wrapped__(torch.device("cuda", 0)) == grouped
    assert _in_one_kernel(torch.device("cpu"))


def test_ends_of_documents_reach_a_card_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all layers, pinned; the positions too."""
    card, given = torch.device("cuda", 0), list[Any]()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: given.append("pinned") or host)
    monkeypatch.setattr(torch.Tensor, "to", lambda host, *a, **k: given.append((*a, *k.items())) or host)
    cumulative.cache_clear()
    ends = [cumulative(((3, 9), (8, 9)), card)[0] for _ in range(3)]
    assert ends[0].tolist() == [0, 3, 9, 17, 18]
    cumulative.cache_clear()
    positions(((3, 9), (8, 9)), 0, 9, card)
    assert given == ["pinned", (card, ("non_blocking", True))] * 2


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
