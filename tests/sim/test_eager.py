"""Software that composes what others fuse, routes naturally, or sums in a fixed order."""

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.layers.eager import NORM, NORM_BACKWARD, composed, traffic
from mopsim.layers.layer import decoder_layer
from mopsim.layers.shapes import Shapes
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Unfused
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from mopsim.validate.attention import DETERMINISTIC, with_kernel
from mopsim.validate.natural import natural
from tests.sim.toys import machine, small

ROUTES = (8,) * 8
ALL: tuple[Unfused, ...] = ("norms", "rotary", "activation", "residual", "experts")


def test_a_norm_by_hand() -> None:
    kernels = decoder_layer(small(), Shapes(tokens=16, seq_len=16, fused=True), 1, ROUTES).kernels
    found = {kernel.name: kernel for kernel in composed(kernels, ("norms",), 2, 4, 2)}
    narrow, wide = 16 * 64 * 2, 16 * 64 * 4
    assert found["attention_norm"].bytes == traffic(NORM, narrow, wide) == 2 * narrow + 8 * wide
    assert found["attention_norm"].back_bytes == traffic(NORM_BACKWARD, narrow, wide)
    assert found["attention_norm"].launches == 7
    untouched = {kernel.name: kernel for kernel in kernels}
    assert all(kernel == untouched[name] for name, kernel in found.items() if not name.endswith("norm"))


@pytest.mark.parametrize("part", [*ALL, "accumulation"])
def test_what_is_composed_costs_time_and_launches_but_no_products(part: Unfused) -> None:
    strategy = megatron(8, experts=2)
    training = TrainSpec(seq_len=64, global_batch=strategy.data_groups * strategy.micro_batch)
    fused = simulate(small(), machine(), 1, strategy, training)
    eager = simulate(small(), machine(), 1, msgspec.structs.replace(strategy, unfused=(part,)), training)
    assert eager.step_time > fused.step_time
    assert eager.num_ops["memory_bound"] > fused.num_ops["memory_bound"]
    assert eager.busy["matmul"] == fused.busy["matmul"]
    assert eager.peak_memory == fused.peak_memory


def test_natural_shares_are_shares_and_load_the_busiest_rank() -> None:
    for experts in (8, 60, 128, 256):
        assert sum(natural(experts)) == pytest.approx(1.0)
        TrainSpec(seq_len=1, global_batch=1, routing=natural(experts))
    shares = natural(128)
    loads = [sum(shares[rank * 16 : (rank + 1) * 16]) for rank in range(8)]
    assert 1.2 < 8 * max(loads) < 1.4
    assert natural(128) == natural(128)


def test_a_fixed_order_slows_attention_backward() -> None:
    hopper, blackwell = load_profile("h100-sxm-80g"), load_profile("b200-sxm-192g")
    free, fixed = hopper.device.attention, with_kernel(hopper, "profile", 128, True).device.attention
    assert (fixed.forward, fixed.backward) == (free.forward, free.backward * DETERMINISTIC)
    flash2 = with_kernel(hopper, "flash2", 128).device.attention
    there = with_kernel(blackwell, "profile", 128, True).device.attention
    rate, other = 989.4e12 * flash2.forward / 132, 2250e12 * there.forward / 148
    assert other == pytest.approx(rate, rel=1e-3)
    assert with_kernel(blackwell, "profile", 128) == blackwell
