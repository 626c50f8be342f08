"""Norms as eager torch composes them, some of whose numbers are in fp32: see mopsim.graph.rewrites.eager."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, instead, scratch
from mopsim.graph.tape import Kernel, Value


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
    how = COMPOSED[f"norm{'_rounded' * rounded}{'' if weighted else '_unweighted'}"]
    working = int((3.5 if wider > 1 and not (rounded and weighted) else 3) * size) - narrow
    working += 0 if weighted else size
    return replace(
        instead(kernel, wider, how).keeping(*kept), scratch=scratch(size if wider > 1 else 0),
        back_scratch=scratch(working),
    )  # fmt: skip
