"""What products in 8 or 4 bits take beside themselves: casts of their operands."""

from typing import Literal

from mopsim.common.units import DTYPE_BYTES
from mopsim.graph.tape import Kernel
from mopsim.program.context import Context
from mopsim.program.workload import Work
from mopsim.spec.strategy import MatmulDType

Part = Literal["forward", "backward", "input_grad", "weight_grad"]
CAST_READS = {"fp8": 2, "mxfp8": 1, "nvfp4": 3}
"""Times that a cast reads its source: fp8 by current scaling first for the largest value; nvfp4 for that, by
rows, and by columns through a Hadamard transform. 6, 4 and 7 bytes an element; what casts add to products is
6.1, 4.8 and 7.0 at full bandwidth on B300 (Transformer Engine's GEMM profiling tutorial)."""
COMPOSED_NARROW, COMPOSED_WIDE = 4, 6
"""Times that eager torch moves an element of what it casts: in the source's dtype (magnitudes made; their
largest; a copy in fp32 made) and in fp32 (that copy made, multiplied by the scale, clamped, cast)."""
COMPOSED_KERNELS = 10
"""Five that go through the operand, and five of its scale (torchao 36027d82, float8_utils.py and
float8_training_tensor.py)."""


def casts(kernel: Kernel, part: Part, context: Context, dtype: MatmulDType, looped: bool) -> tuple[Work, ...]:
    """Operands cast for a kernel's products: inputs in the forward, output gradients in the backward, by rows
    and by columns at once; or each alone and laid out again for the other product (see Kernels.casts)."""
    how, narrow, reads = context.stack.kernels, DTYPE_BYTES[dtype], CAST_READS.get(dtype, 1)
    compute = DTYPE_BYTES[context.strategy.precision.compute]
    eager = how.casts == "composed" and dtype == "fp8" and kernel.kind == "matmul"
    alone, anew = how.casts != "kept", eager or how.cast_scales == "rows"
    laid, once = 2 * narrow, reads * compute + narrow
    if eager:
        once = COMPOSED_NARROW * compute + COMPOSED_WIDE * DTYPE_BYTES["float32"] + narrow
    each = once if alone else once + narrow
    inputs = sum(one.m * one.k * one.count for one in kernel.matmuls) * kernel.casts
    outputs = sum(one.m * one.n * one.count for one in kernel.matmuls) * kernel.back_casts
    weights = sum(one.elements for one in kernel.matmuls if one.weight)
    scaled = 2 * compute * (how.cast_scales == "rows")  # by the factors of rows, in place
    moved, operands = 0.0, 0
    if part == "forward":
        moved += (inputs + weights * (anew or how.weight_casts == "pass")) * each
        operands += 2
    if part in ("backward", "input_grad"):
        moved += outputs * each + weights * (laid * alone + once * anew)
        moved += inputs * scaled * (not how.compiled)
        operands += 2
    if part in ("backward", "weight_grad") and alone:
        moved += outputs * (laid + once * anew) + inputs * (once + laid) + weights * scaled
        operands += 2
    launches = reads * (sum(int(one.count) for one in kernel.matmuls) if looped else 1)
    launches = COMPOSED_KERNELS * operands * len(kernel.matmuls) if eager else launches
    return (Work("memory_bound", bytes=moved, launches=launches),) if moved else ()
