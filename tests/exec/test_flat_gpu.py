"""flat_units on CUDA over nccl: the same parity (float64 by the math attention), and bf16 by the flash
kernel.
"""

import pytest
import torch

from mopexec.model.attention import causal_attention
from mopexec.operators.attention_core import Core
from mopexec.operators.documents import Documents
from mopexec.operators.kernels import using
from mopsim.spec.stack import AttentionKernel, Kernels
from tests.exec.flat_plans import make_plan
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_TWO, TWO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ALONE = {
    "dense": {"chunk_tokens": 5},
    "experts": {"chunk_tokens": 3},
    "vocabulary": {"loss": "ring", "chunk_tokens": 6},
    "optimizer": {"state_tier": "host", "bucket_params": 900},
    "activations": {"layer_inputs": "host"},
}
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.mark.parametrize("update_on", ["device", "host"])
def test_one_device_equals_the_plain_model(update_on: str) -> None:
    optimizer = {"state_tier": "host", "update_on": update_on, "bucket_params": 900}
    plan = make_plan(1, ALONE | {"optimizer": optimizer})
    assert (
        max(pool(1, cuda=True).run("tests.exec.flat_parity", "compare", plan, "learned")[0].values()) <= 1e-9
    )


@pytest.mark.parametrize("stack", ["mopexec-flat", "mopexec-flat-nested"])
def test_one_device_in_bf16_is_close(stack: str) -> None:
    plan = make_plan(1, ALONE, dtype="bfloat16", stack=stack)
    worst = pool(1, cuda=True).run("tests.exec.flat_parity", "compare", plan, "learned")[0]
    assert worst["loss"] < 1e-3
    assert worst["norm"] < 0.02


@two_devices
@pytest.mark.parametrize("name", TWO)
def test_one_mechanism_on_two_devices(name: str) -> None:
    for worst in pool(2, cuda=True).run(
        "tests.exec.flat_parity", "compare", make_plan(2, TWO[name]), "learned"
    ):
        assert max(worst.values()) <= 1e-9


@two_devices
def test_all_mechanisms_on_two_devices() -> None:
    plan = make_plan(2, ALL_TWO, micro_batch=2)
    for worst in pool(2, cuda=True).run("tests.exec.flat_parity", "compare", plan, "learned"):
        assert max(worst.values()) <= 1e-9


@pytest.mark.parametrize("window", [0, 48])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("widths", [(64, 64), (96, 64)])
@pytest.mark.parametrize("documents", [(), ((100, 160), (30, 31, 160))])
@pytest.mark.parametrize("kernel", ["flash2", "cudnn"])
def test_flash_kernels_equal_the_cpu(
    window: int, with_sinks: bool, widths: tuple[int, int], documents: Documents, kernel: AttentionKernel
) -> None:
    """Windows, sinks, documents and values of another width in bf16, forward and backward."""
    torch.manual_seed(0)
    shapes = [(2, 160, 8, widths[0]), (2, 160, 4, widths[0]), (2, 160, 4, widths[1])]
    host = [torch.randn(shape).bfloat16() for shape in shapes]
    host += [torch.randn(8).bfloat16()] if with_sinks else []
    grad, found = torch.randn(2, 160, 8, widths[1]), []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        leaves = [one.to(device, dtype).requires_grad_() for one in host]
        core, sinks = Core(0.1, window, documents), leaves[3] if with_sinks else None
        with using(Kernels(attention={"default": kernel})):
            out = causal_attention(*leaves[:3], core, sinks)
            grads = torch.autograd.grad(out, leaves, grad.to(device, dtype))
        found.append([one.detach().double().cpu() for one in (out, *grads)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
