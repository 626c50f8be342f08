"""Attention scores that are kept in memory, and how their softmax is made."""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.graph.layer import decoder_layer
from mopsim.graph.shapes import Shapes
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

TINY = replace(load_model("tiny"), dropout=0.0)


def _autograd_keeps(softmax: str, dropout: float) -> int:
    """Bytes of a score that autograd saves."""
    q, k, v = (torch.randn(2, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == tensor.shape[-2] == 8:
            saved[tensor.data_ptr()] = tensor.element_size()
        return tensor

    wide: dict[str, Any] = {"dtype": torch.float32} if softmax == "upcast" else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = torch.softmax(q @ k.mT, dim=-1, **wide).to(torch.bfloat16)
        if dropout:
            made, _ = torch.native_dropout(made, dropout, True)
        made @ v
    return sum(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("softmax", ["composed", "upcast"])
def test_a_softmax_by_operators_keeps_what_autograd_saves(softmax: str, dropout: float) -> None:
    shapes = Shapes(64, 64, flash=False, softmax=softmax)
    tape = decoder_layer(replace(TINY, dropout=dropout), shapes, 0)
    (kept,) = (v for kernel in tape.kernels for v in kernel.writes if v.name == "attention_scores")
    assert kept.bytes == 64 * 64 * TINY.num_attention_heads * _autograd_keeps(softmax, dropout)


def test_a_softmax_by_operators_moves_more() -> None:
    """Each of them takes longer, and the cast one most."""
    times = []
    for softmax in ("fused", "composed", "upcast"):
        stack = load_stack("megatron-core-local")
        kernels = replace(stack.kernels, softmax=softmax)
        training, card = TrainSpec(seq_len=16384, global_batch=8), load_profile("h100-sxm-80g")
        made = simulate(TINY, card, 1, megatron(8), training, stack=replace(stack, kernels=kernels))
        times.append(made.step_time)
    assert times[0] < times[1] < times[2]
