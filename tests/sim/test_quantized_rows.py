"""What tensor-parallel ranks gather under sequence parallelism where products are in 8 or 4 bits."""

import msgspec
import pytest

from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.program.works import works
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


def test_experts_may_stay_in_the_compute_dtype() -> None:
    """Their products run in bf16 on inputs that are kept as they are; the others are cast as ever."""
    plain = megatron(4, expert_parallel=2, recompute="none")
    strategy = replace(plain, precision=replace(plain.precision, matmul="fp8"))
    network, training = small(first_k_dense_replace=0), TrainSpec(seq_len=32, global_batch=4)
    kept = {}
    for dtype, found in (("recipe", "fp8"), ("compute", "bfloat16")):
        stack = changed("megatron-core", kernels={"expert_dtype": dtype})
        context = make_context(network, strategy, training, 4, stack)
        tape = Passes(context).tape(0)
        products = {one.name: works(one, "forward", context)[0].dtype for one in tape.kernels if one.matmuls}
        assert {products[name] for name in products if name.startswith("experts_")} == {found}
        assert products["qkv_proj"] == products["up_proj"] == "fp8"
        assert products["router"] == "bfloat16"
        kept[dtype] = {one.name: one.saves for one in tape.kernels if one.name.startswith("experts_up")}
    assert kept["recipe"] != kept["compute"]
