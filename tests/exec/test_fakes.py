"""Fake tensors without torch's bookkeeping are what torch's are: shapes, strides, storages, known values."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager

from mopexec.measure.fakes import QuickFakeMode
from mopexec.measure.tracker import MemoryTracker


def _views(x: Tensor) -> list[Tensor]:
    return [x.t(), x[1:3, ::2], x.view(-1), x.detach(), x.expand(2, 6, 4), *x.split([2, 4]), *x.unbind(1)]


def _in_place(x: Tensor) -> list[Tensor]:
    own = x.add_(1)
    parts = x.view(3, 8)
    return [own, parts.transpose_(0, 1), x.unsqueeze_(0), x.mul_(2.0), torch.add(own, own, out=own)]


def _fresh(x: Tensor) -> list[Tensor]:
    mean = torch.nn.functional.layer_norm(x.t(), (6,))
    top, at = x.topk(2)
    return [
        x + 1,
        x.double() * x,
        x.t().contiguous(),
        x.t() * 2,
        mean,
        top,
        at,
        x.new_zeros(3),
        x.to(x.dtype),
    ]


def _known(x: Tensor) -> list[Tensor]:
    one = torch.tensor(3)
    return [x[: one.item()], x[: (one + 1).item()], one.view(1) + 1, x * one]


WORKS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "views": _views, "in place": _in_place, "fresh": _fresh, "known values": _known,
}  # fmt: skip


def _shape(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.untyped_storage().nbytes()


def _told(mode: Any, work: Callable[[Tensor], list[Tensor]]) -> list[Any]:
    """Of each result: what it is, and which result's storage it shares. Met twice."""
    told = []
    with mode():
        for _ in range(2):
            x = torch.empty(6, 4)
            made = [x, *work(x)]
            places = [one.untyped_storage()._cdata for one in made]
            told.append(
                [(*_shape(one), places.index(place)) for one, place in zip(made, places, strict=True)]
            )
    assert told[0] == told[1]
    return told


@pytest.mark.parametrize("work", WORKS)
def test_ops_make_what_they_make_in_torchs_mode(work: str) -> None:
    assert _told(QuickFakeMode, WORKS[work]) == _told(FakeTensorMode, WORKS[work])


@pytest.mark.parametrize("watch", [nullcontext, MemoryTracker])
def test_a_device_is_that_of_torchs_mode(watch: Any) -> None:
    """Also where a kernel reads it, which runs on meta tensors."""
    for device in ("cpu", "cuda"):
        for mode in (FakeTensorMode, QuickFakeMode):
            with mode() as fakes, watch():
                x = torch.empty(2, 3, device=device)
                assert {one.device.type for one in (x, x.t(), x + 1, torch.nn.Parameter(x))} == {device}
                with in_kernel_invocation_manager(fakes):
                    assert x.device.type == "meta"


def test_gradients_have_the_shapes_of_what_they_are_of() -> None:
    with QuickFakeMode():
        for _ in range(2):
            weight = torch.nn.Parameter(torch.empty(5, 4))
            x = torch.empty(3, 4, requires_grad=True)
            (x @ weight.t()).relu().sum().backward()
            assert weight.grad is not None
            assert x.grad is not None
            assert (weight.grad.shape, x.grad.shape) == (weight.shape, x.shape)
            assert type(weight.grad) is type(x)
