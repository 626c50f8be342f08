"""FlexAttention that nothing compiles (Kernels.attention `unfused`), operator by operator:
torch/_higher_order_ops/flex_attention.py of torch 2.13, math_attention and sdpa_dense_backward."""

from msgspec.structs import replace

from mopsim.graph.tape import Kernel

SCORES_HELD = {"forward": 16.0, "backward": 24.0}
"""Bytes of a score at the most, all in fp32: scores and masked scores, their softmax and what it is chosen
from; in the backward those two, the softmax, its gradient, and two sums of that beside each other."""
LAUNCHES = {"forward": 38, "backward": 57}
"""Kernels under a mask of documents (reports/host/flex_unfused.json)."""


def by_scores(core: Kernel, scores: float) -> Kernel:
    """The core of attention, which keeps what a flash kernel keeps. scores: of all heads of a rank."""
    ahead, back = (int(scores * size) for size in SCORES_HELD.values())
    return replace(
        core, launches=LAUNCHES["forward"], back_launches=LAUNCHES["backward"],
        scratch=(*core.scratch, ("activations", ahead)),
        back_scratch=(*core.back_scratch, ("activations", back)),
    )  # fmt: skip
