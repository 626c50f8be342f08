"""What tensor-parallel ranks gather under sequence parallelism where products are in 8 or 4 bits."""

import msgspec
import pytest

from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import small
from tests.software import changed

replace = msgspec.structs.replace


@pytest.mark.parametrize(
    ("recipe", "rows", "gradients"),
    [("compute", 2.0, 2.0), ("fp8", 1.0, 1.0), ("mxfp8", 1.03125, 2.0625), ("nvfp4", 0.5625, 1.125)],
)
def test_rows_are_gathered_as_products_read_them(recipe: MatmulDType, rows: float, gradients: float) -> None:
    """By rows before a product, gradients for both of its own by rows and by columns; sums are wide."""
    plain = megatron(4, tensor_parallel=4, recompute="none")
    strategy = replace(plain, precision=replace(plain.precision, matmul=recipe))
    stack, training = changed("megatron-core"), TrainSpec(seq_len=32, global_batch=2)
    tape = Passes(make_context(small(num_hidden_layers=1), strategy, training, 4, stack)).tape(0)
    elements = 32 * 64
    for kernel in tape.kernels:
        if kernel.kind == "all_gather":
            assert (kernel.bytes, kernel.back_bytes) == (rows * elements, 2 * elements)
        if kernel.kind == "reduce_scatter":
            assert (kernel.bytes, kernel.back_bytes) == (2 * elements, gradients * elements)
    assert sum(one.kind == "all_gather" for one in tape.kernels) == 2
