"""Passes and kernels of composed.yaml, counted as torch dispatches them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mopexec.operators.norms import layer_norm, layer_norm_backward_
from mopexec.operators.rows import rms_norm, rms_norm_backward_
from mopsim.graph.rewrites.tensor_passes import COMPOSED, TensorPasses

NONE = {"view", "expand", "t", "detach", "alias", "slice", "empty"}
"""Operators that start no kernel."""
ROWS, WIDTH = 512, 128


class Counted(TorchDispatchMode):
    """Kernels, and tensors of ROWS x WIDTH that they read and write, in bf16 and in fp32; of an expanded
    tensor nothing is read, nor of one that is copied to."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"narrow": 0.0, "wide": 0.0, "launches": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
        if name not in NONE:
            self.found["launches"] += 1
            for one in (*args[name == "copy_" :], found):
                if isinstance(one, Tensor) and one.numel() == ROWS * WIDTH and 0 not in one.stride():
                    self.found["narrow" if one.dtype == torch.bfloat16 else "wide"] += 1
        return found

    def check(self, known: TensorPasses, once: int = 0) -> None:
        """once: kernels beside those of a slice."""
        passes = {word: getattr(known, word) for word in self.found}
        assert self.found == passes | {"launches": known.launches + once}


def random(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.bfloat16)


def rounded(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(
    ("name", "run", "weights"),
    [
        ("norm", lambda x, weight: torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6), (WIDTH,)),
        ("norm_unweighted", lambda x: torch.nn.functional.rms_norm(x, (WIDTH,), None, 1e-6), ()),
        ("norm_rounded", rounded, (WIDTH,)),
        ("weighted", lambda x, weight: x * weight, (ROWS, 1)),
    ],
)
def test_passes_are_those_that_torch_dispatches(
    name: str, run: Callable[..., Tensor], weights: tuple[int, ...]
) -> None:
    shapes = [(ROWS, WIDTH), weights] if weights else [(ROWS, WIDTH)]
    inputs = [random(*shape).requires_grad_() for shape in shapes]
    with Counted() as forward:
        out = run(*inputs)
    gradient = torch.ones_like(out)
    with Counted() as backward:
        torch.autograd.grad(out, inputs, gradient)
    forward.check(COMPOSED[name].forward)
    backward.check(COMPOSED[name].backward)


@pytest.mark.parametrize("centred", [False, True])
def test_norms_of_a_slice_are_those_of_the_flat_runtime(centred: bool) -> None:
    x, grad, target, weight, bias = *(random(ROWS, WIDTH) for _ in range(3)), random(WIDTH), random(WIDTH)
    sums = [torch.zeros(WIDTH) for _ in range(2)]
    with Counted() as forward:
        layer_norm(x, weight, bias, 1e-6) if centred else rms_norm(x, weight, 1e-6)
    with Counted() as backward:
        if centred:
            layer_norm_backward_(target, x, grad, weight, *sums, 1e-6)
        else:
            rms_norm_backward_(target, x, grad, weight, sums[0], 1e-6)
    known = COMPOSED["layernorm_rows" if centred else "norm_rows"]
    forward.check(known.forward, once=1 + centred)
    backward.check(known.backward, once=3 + 2 * centred)
