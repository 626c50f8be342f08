"""What the peak memory that a program reports is."""

from typing import Literal

from mopsim.common.errors import require
from mopsim.common.io import Spec


class Reading(Spec, frozen=True, kw_only=True):
    """What its reported peak memory is.

    memory: live tensors (`allocated`), the caching allocator's blocks (`reserved`), or the whole device as
    NVML has it (`device`). segments: what these blocks are parts of, segments of one size each, as torch has
    them by default (`fixed`), or such as grow (`expandable`: PYTORCH_CUDA_ALLOC_CONF). first_stage,
    last_stage: it is of that pipeline stage only. first_step: of a first step, whose forward and backward are
    before the update that makes Adam's moments."""

    memory: Literal["allocated", "reserved", "device"] = "allocated"
    segments: Literal["fixed", "expandable"] = "fixed"
    first_stage: bool = False
    last_stage: bool = False
    first_step: bool = False

    def __post_init__(self) -> None:
        rule = (
            "a peak is of one stage or a first step: another of first_stage, last_stage, first_step is true"
        )
        given = [name for name in ("first_stage", "last_stage", "first_step") if getattr(self, name)]
        require(len(given) < 2, given[-1] if given else "", True, rule)
