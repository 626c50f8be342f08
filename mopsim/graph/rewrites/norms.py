"""Norms as eager torch composes them, some of whose numbers are in fp32: see mopsim.graph.rewrites.eager."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import ComposedKernel, TensorPasses, instead, scratch
from mopsim.graph.tape import Kernel, Value

NORM = TensorPasses(2, 8, 7, strided=2, along_wide=4)
NORM_BACKWARD = TensorPasses(2, 24, 16, strided=4, along_wide=7)
"""Cast, square, mean, add, root, product, cast, product; its backward by autograd. What has a number of each
row or column is not contiguous: both products; back, their gradients, the mean's and the square's."""
ROUNDED = TensorPasses(4, 7, 8, strided=2, along=2, along_wide=2)
ROUNDED_BACKWARD = TensorPasses(8, 19, 15, strided=4, along=2, along_wide=5)
"""transformers' LlamaRMSNorm: cast, square, mean, add, root, product, cast, product of narrow values. Back:
two gradients of that and a sum; in fp32 a cast, a product's, a sum, the mean's, the square's, both added, a
cast."""
UNWEIGHTED = TensorPasses(2, 6, 6, strided=1, along_wide=2)
UNWEIGHTED_BACKWARD = TensorPasses(2, 18, 13, strided=3, along_wide=5)
"""NORM without the product with a weight; back, without both of its gradients and the sum of one. Of which
`rounded` is no other (transformers, modeling_llama4.py: Llama4TextL2Norm)."""
UPCAST = ComposedKernel(
    TensorPasses(2, 2, 2), TensorPasses(3, 4, 3), (("wide", 0.0, 1.0),), whole=False, back_working=(0.0, 1.0)
)
"""Cast, and a norm of the copy, which is kept; the gradients of the copy and of the weight, each of which
reads the copy and the output's gradient, and a cast back."""
UPCAST_AGAIN = ComposedKernel(
    UPCAST.forward, TensorPasses(5, 6, 5), working=(0.0, 1.0), back_working=(0.0, 2.0)
)
"""Keeps its input as it came, of which copy and norm are made again."""


def composed_norm(kernel: Kernel, wider: float, wings: int, rounded: bool = False) -> Kernel:
    """Keeps its input in fp32 (a copy where it is narrower), the normed values and each row's root; the
    product with the weight is in fp32 too; the backward holds three and a half of them at once (three).
    rounded: the normed values are narrow again before that product. Without a weight they are not kept; the
    backward has its most once they would be freed."""
    narrow, weighted = kernel.writes[0].bytes, kernel.weighted
    size = int(narrow * wider)
    kept = [Value(f"{kernel.name}_roots", int(kernel.per_row * wider), grad=False)]
    if weighted:
        kept.insert(0, Value(f"{kernel.name}_normed", narrow if rounded else size, grad=False))
    if wider > 1:
        kernel = replace(kernel, saves=())
        kept.append(Value(f"{kernel.name}_wide", size, grad=False))
    passes = (ROUNDED, ROUNDED_BACKWARD) if rounded else (NORM, NORM_BACKWARD)
    passes = passes if weighted else (UNWEIGHTED, UNWEIGHTED_BACKWARD)
    working = int((3.5 if wider > 1 and not (rounded and weighted) else 3) * size) - narrow
    working += 0 if weighted else size
    return replace(
        instead(kernel, wider, *passes).keeping(*kept), scratch=scratch(size if wider > 1 else 0),
        back_scratch=scratch(working),
    )  # fmt: skip
