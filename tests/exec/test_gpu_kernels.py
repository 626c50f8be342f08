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
from mopexec.operators import attention_core, attention_rows, cudnn, grouped, kernels
from mopexec.operators import compiler as operators_compiler
from mopexec.operators.attention_core import Core
from mopexec.operators.documents import Documents, cumulative, positions, spans
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


PACKED: list[Documents] = [((100, 160), (30, 31, 160)), ((100, 160), (30, 160))]


@pytest.mark.parametrize("documents", PACKED)
@pytest.mark.parametrize("window", [0, 48])
def test_gradients_of_documents_with_sinks_have_their_shapes(window: int, documents: Documents) -> None:
    shapes = [(2, 160, 8, 64), (2, 160, 4, 64), (2, 160, 4, 64), (8,)]
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    with using(CUDA):
        out = causal_attention(*leaves[:3], Core(0.1, window, documents), leaves[3])
        grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [tuple(grad.shape) for grad in grads] == shapes


class Packed:
    """What torch's flash op makes of tokens [T, heads, d] and the ends of documents (its registration for
    tensors without data: log-sum-exps [heads, T]), by the attention of CPUs."""

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, *__: Any, scale: float, **sides: int
    ) -> list[Tensor]:
        core = self._core(ends, scale, **sides)
        out, sums = attention_core._documents_forward(q[None], k[None], v[None], core, None)
        return [out[0], torch.cat(sums[1:], dim=2)[0], q, q, q]

    def _flash_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends: Tensor,
        *_: Any, scale: float, **sides: int,
    ) -> list[Tensor]:  # fmt: skip
        core, found = self._core(ends, scale, **sides), [torch.empty_like(t) for t in (q, k, v)]
        for _row, at in spans(core.documents):
            parts = (t[None, at] for t in (grad, q, k, v, out))
            alone = Core(core.scale, core.window)
            for whole, part in zip(
                found, attention_rows.backward(*parts, (sums[None, :, at],), alone), strict=True
            ):
                whole[at] = part[0]
        return found

    def _core(self, ends: Tensor, scale: float, window_size_left: int = -1, **_: int) -> Core:
        return Core(scale, window_size_left + 1, (tuple(ends[1:].tolist()),))


@pytest.mark.parametrize("documents", PACKED)
@pytest.mark.parametrize("window", [0, 48])
@pytest.mark.parametrize("sunk", [False, True])
def test_one_kernel_takes_all_documents(
    sunk: bool, window: int, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one document after the other; sinks too, whose sums are of all sequences in a row."""
    shapes = [(2, 160, 8, 16), (2, 160, 4, 16), (2, 160, 4, 16), *[(8,)] * sunk]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad, found = torch.randn(2, 160, 8, 16, dtype=torch.float64), []
    monkeypatch.setattr(attention_core, "_ATEN", Packed())
    for packed in (False, True):
        monkeypatch.setattr(kernels, "attention", lambda x: "rows")
        monkeypatch.setattr(attention_core, "_packed_kernel", lambda q, packed=packed: packed)
        monkeypatch.setattr(attention_core, "_pair", _flash_of_packed)
        out = causal_attention(*leaves[:3], Core(0.25, window, documents), *leaves[3:])
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def _flash_of_packed(q: Tensor, core: Core, sinks: Tensor | None) -> tuple[Any, Any]:
    """Only what has documents is given to the op."""
    if core.documents:
        return attention_core._cuda_forward, attention_core._cuda_backward
    return attention_rows.forward, attention_rows.backward
