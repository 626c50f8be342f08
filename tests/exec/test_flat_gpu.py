"""flat_units on CUDA over nccl: the same parity (float64 by the math attention), and bf16 by the flash
kernel.
"""

import pytest
import torch

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


def test_one_device_in_bf16_is_close() -> None:
    plan = make_plan(1, ALONE, dtype="bfloat16")
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
