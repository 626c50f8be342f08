"""What the peak memory that a program reports is."""

from typing import Literal

from mopsim.common.errors import require
from mopsim.common.io import Spec


class Reading(Spec, frozen=True, kw_only=True):
    """What the program's reported peak memory is.

    memory: what the reported peak counts. `allocated`: live tensors. `reserved`: the caching allocator's
    blocks. `device`: the whole device as NVML has it.
    segments: segments that the allocator's blocks are parts of. `fixed`: one size each (torch's default).
    `expandable`: they grow (PYTORCH_CUDA_ALLOC_CONF).
    workspaces: what the libraries of matrix products keep, which the allocator counts. `torch`: cuBLAS's and
    hipBLAS's handles. `transformer_engine`: beside them its own, and one for each stream of grouped products.
    first_stage: the peak is of the first pipeline stage only.
    last_stage: the peak is of the last pipeline stage only.
    first_step: the peak is of a first step, whose forward and backward run before the update that makes
    Adam's moments.
    """

    memory: Literal["allocated", "reserved", "device"] = "allocated"
    segments: Literal["fixed", "expandable"] = "fixed"
    workspaces: Literal["torch", "transformer_engine"] = "torch"
    first_stage: bool = False
    last_stage: bool = False
    first_step: bool = False

    def __post_init__(self) -> None:
        rule = (
            "a peak is of one stage or a first step: another of first_stage, last_stage, first_step is true"
        )
        given = [name for name in ("first_stage", "last_stage", "first_step") if getattr(self, name)]
        require(len(given) < 2, given[-1] if given else "", True, rule)
