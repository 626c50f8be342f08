"""Habits of recomputation of a program, a part of its stack."""

from typing import Literal

from mopsim.common.errors import require
from mopsim.common.io import Spec
from mopsim.spec.categories import COMPONENTS, KEPT, MODULES


def require_known(field: str, words: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise SpecError naming the first word that is none of those known."""
    for word in words:
        require(word in known, field, word, f"is not one of {', '.join(known)}")


class Recompute(Spec, frozen=True, kw_only=True):
    """Habits of recomputation. stops_early: once the last value that the backward wants is there.
    holds_output: what a layer's recomputation puts out and its gradient live until its backward is over (a
    reentrant torch.utils.checkpoint). selective: modules that `selective` without a list of them runs
    again. kept: kernels (categories.KEPT) that it keeps instead, running all others again (needs
    dense.tensor_parallel 1, else `selective` counts). kept_routed: instead of those, where any are
    named, in layers with routed experts, whatever splits them. chunk_inputs: whether what the backward of
    chunked experts reads is sent again (`redispatch`) or kept by the layer's recompute (`nested`, arXiv
    2609.14306). inputs: those that are on the host come up one layer ahead, the last stays (`ahead`,
    Megatron-Core), or each when its backward asks for it (`asked`, autograd's hooks on saved tensors).
    gathers_again: rows that expert-tensor ranks gather in a recomputation are gathered once more for the
    products' own backward. around: the norm before an FFN or its experts, and the sum after,
    run again with them. router_graph: of a recomputation is gone once its backward is over (`freed`), or the
    router has stored the loss that balances it, and with it all that is saved on the way to it, until the
    layer's next forward (`held`)."""

    stops_early: bool = False
    holds_output: bool = False
    kept: tuple[str, ...] = ()
    kept_routed: tuple[str, ...] = ()
    selective: tuple[str, ...] = ()
    chunk_inputs: Literal["redispatch", "nested"] = "redispatch"
    inputs: Literal["ahead", "asked"] = "ahead"
    gathers_again: bool = True
    around: bool = True
    router_graph: Literal["freed", "held"] = "freed"

    def __post_init__(self) -> None:
        require_known("kept", self.kept, KEPT)
        require_known("kept_routed", self.kept_routed, KEPT)
        require_known("selective", self.selective, (*MODULES, *COMPONENTS))
