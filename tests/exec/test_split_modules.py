"""Every mechanism of split_modules, alone and together, equals the single-device model: loss, gradients,
weights after three clipped steps.
"""

import pytest

from tests.exec.spawn import pool
from tests.exec.split_plans import cases


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_mechanism_equals_the_single_device_model(world: int) -> None:
    found = pool(world).run("tests.exec.split_parity", "compare", cases(world))[0]
    for name, worst in found.items():
        tolerance = 1e-4 if "float32" in name else 1e-9
        assert max(worst.values()) <= tolerance, (name, worst)
