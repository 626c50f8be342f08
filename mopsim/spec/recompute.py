"""Habits of recomputation of a program, a part of its stack."""

from typing import Literal

from mopsim.common.errors import require
from mopsim.common.io import Spec
from mopsim.spec.categories import COMPONENTS, KEPT, MODULES, NO_PRODUCTS
from mopsim.spec.kernels import AttentionKernel


def require_known(field: str, words: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise SpecError naming the first word that is none of those known."""
    for word in words:
        require(word in known, field, word, f"is not one of {', '.join(known)}")


class Recompute(Spec, frozen=True, kw_only=True):
    """Habits of recomputation.

    stops_early: recomputation stops once the last value that the backward needs is there.
    holds_output: the output of a layer's recomputation and its gradient live until the layer's backward is
    over (a reentrant torch.utils.checkpoint).
    kept: kernels (categories.KEPT) whose outputs `selective` without a list of modules keeps, running all
    others again (needs dense.tensor_parallel 1, else the field `selective` counts).
    kept_routed: the same for layers with routed experts, whatever splits them; empty: the kernels of
    `kept`.
    kept_inputs: attention kernels (kernels.attention) that are compiled graphs of their own: where
    `attention_core` is kept, so is what its backward reads, which such a graph hands out with its output.
    unlisted: recipes of products (precision.matmul) that are operators of their own, which a recomputation by
    operator runs again wherever it keeps those of the compute dtype.
    sums: of a kept product whose ranks have partial sums. `partial`: these stay. `scattered`: what a
    reduce-scatter makes of them stays in their place.
    selective: modules that `selective` without a list of modules runs again.
    chunk_inputs: the tensors that the backward of chunked experts reads. `redispatch`: they are sent again.
    `nested`: the layer's recomputation runs the experts and keeps them, and each chunk's backward runs its
    products once more (arXiv 2609.14306). `autograd`: as `nested`, but autograd runs the backward, in the
    reverse of the forward's order, and weights that least-loaded placement moves lie in one tensor with the
    rank's own (the published code of arXiv 2601.17111).
    inputs: when layer inputs on the host are copied up. `ahead`: one layer ahead, and the last one stays
    (Megatron-Core). `asked`: when their backward asks for them (autograd's hooks on saved tensors).
    gathers_again: rows that expert-tensor ranks gather in a recomputation are gathered once more for the
    products' own backward.
    around: the norm before an FFN or its experts, and the sum after, run again with them.
    router_graph: the graph of a recomputed router. `freed`: it is gone once its backward is over. `held`:
    the router stores its balancing loss, and with it all tensors that were saved on the way, until the
    layer's next forward.
    """

    stops_early: bool = False
    holds_output: bool = False
    kept: tuple[str, ...] = ()
    kept_routed: tuple[str, ...] = ()
    kept_inputs: tuple[AttentionKernel, ...] = ()
    unlisted: tuple[Literal["fp8", "mxfp8", "nvfp4"], ...] = ()
    sums: Literal["partial", "scattered"] = "partial"
    selective: tuple[str, ...] = ()
    chunk_inputs: Literal["redispatch", "nested", "autograd"] = "redispatch"
    inputs: Literal["ahead", "asked"] = "ahead"
    gathers_again: bool = True
    around: bool = True
    router_graph: Literal["freed", "held"] = "freed"

    def __post_init__(self) -> None:
        require_known("kept", self.kept, KEPT)
        require_known("kept_routed", self.kept_routed, KEPT)
        require_known("selective", self.selective, (*MODULES, *COMPONENTS))

    def listed(self, kept: tuple[str, ...], recipe: str) -> tuple[str, ...]:
        """Of kernels that are kept, those that are where products have a recipe."""
        return tuple(one for one in kept if one in NO_PRODUCTS) if recipe in self.unlisted else kept
