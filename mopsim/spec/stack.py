"""Stack: what a program makes of a strategy.

Strategy is what a user decides; a stack is what its software does anyway: which kernels are fused, what its
collectives copy, what its Python costs the host, which dtypes its state has, what its memory reading means.

Every entry is data with a source (`sources`: dotted field -> where it is written, and of which version). A
stack that nobody wrote is `generic-eager` or `generic-fused`.
"""

from typing import Literal

import msgspec

from mopsim.common.io import Spec
from mopsim.spec.categories import Runtime

Built = Literal["fused", "composed"]
"""One kernel, or as eager torch composes it."""
AttentionKernel = Literal["profile", "flash2", "flash4", "triton", "scores"]
"""profile: the best that the hardware's profile was measured with. scores: kept in memory, no flash kernel.
"""
StateDType = Literal["float64", "float32", "bfloat16", "float16", "compute"]


class Kernels(Spec, frozen=True, kw_only=True):
    """Which implementation runs each operation.

    attention: by device architecture (`ampere`, `hopper`, ...), `default` for the others. deterministic: sums
    in a fixed order. expert_rows: gated activation and route weights of routed experts; expert_products:
    `grouped` in one kernel, `looped` expert by expert (Transformer Engine's GroupedLinear). gate_up: one
    product for both, or two. weight_grads: added to their buffer inside the product, or after it. loss: cross
    entropy by several kernels with copies in fp32 (`composed`), one kernel in place of the logits (`fused`),
    one on a copy of them in fp32 (`upcast`). ring_blocks: merging the blocks of keys and values where context
    parallelism gathers them. fills: new tensors with a known value are written first (torch's deterministic
    mode).
    """

    norm: Built = "fused"
    rotary: Built = "fused"
    activation: Built = "fused"
    residual: Built = "fused"
    expert_rows: Built = "fused"
    expert_products: Literal["grouped", "looped"] = "grouped"
    gate_up: Literal["joined", "separate"] = "joined"
    weight_grads: Built = "fused"
    ring_blocks: Built = "fused"
    loss: Literal["composed", "fused", "upcast"] = "composed"
    attention: dict[str, AttentionKernel] = msgspec.field(default_factory=lambda: {"default": "profile"})
    deterministic: bool = False
    fills: bool = False


class Sharding(Spec, frozen=True, kw_only=True):
    """How state is sharded and gathered.

    copies: between shards or gradients and the buffers of collectives (torch's FSDP2). experts: routed
    experts' parameters are sharded by what shards the others; else they are plain tensors, whole on every
    replica.
    """

    copies: bool = False
    experts: bool = True


class Recompute(Spec, frozen=True, kw_only=True):
    """Habits of recomputation. stops_early: once the last value that the backward wants is there. kept:
    kernels (categories.KEPT) whose outputs a full recomputation keeps anyway. selective: what `selective`
    without a list of modules means. chunk_inputs: how the backward of chunked experts has its inputs: sent
    again (`redispatch`), or kept by the layer's recompute (`nested`, arXiv 2609.14306)."""

    stops_early: bool = False
    kept: tuple[str, ...] = ()
    selective: tuple[str, ...] = ()
    chunk_inputs: Literal["redispatch", "nested"] = "redispatch"


class Host(Spec, frozen=True, kw_only=True):
    """modules: layers are Python modules under autograd, whose host does more than to start kernels. graphs:
    components whose kernels CUDA graphs replay; `step`: one graph of the whole step."""

    modules: bool = False
    graphs: tuple[str, ...] = ()


class StateDTypes(Spec, frozen=True, kw_only=True):
    """Dtypes that a program gives its state where a strategy does not say: see Precision."""

    param: StateDType = "compute"
    reduce: StateDType = "compute"
    grad: StateDType = "compute"
    moments: StateDType = "float32"
    master: Literal["param", "float32", "float64"] = "float32"


class Hides(Spec, frozen=True, kw_only=True):
    """Communication that the program hides by default, where a strategy does not say: see Overlap."""

    grad_reduce: bool = False
    param_gather: bool = False
    pipeline: bool = False
    tensor: bool = False
    experts: bool = False


class Reading(Spec, frozen=True, kw_only=True):
    """What its reported peak memory is: live tensors (`allocated`), the caching allocator's blocks
    (`reserved`), the whole device (`device`, NVML). last_stage: of the last pipeline stage only."""

    memory: Literal["allocated", "reserved", "device"] = "allocated"
    last_stage: bool = False


class Stack(Spec, frozen=True, kw_only=True):
    """One program. runtime: the runtime of mopexec that runs it, empty where none does. explicit: the program
    is a schedule of forward and backward pairs without an autograd graph (mopexec's flat_units).
    communication_share: part of the SMs that the experts' exchanges take from what runs beside them, where it
    is not the profile's; by architecture. extends: the stack whose entries it has where it names none.
    """

    name: str
    version: str = ""
    extends: str = ""
    runtime: Runtime | Literal[""] = ""
    explicit: bool = False
    kernels: Kernels = Kernels()
    sharding: Sharding = Sharding()
    recompute: Recompute = Recompute()
    host: Host = Host()
    dtypes: StateDTypes = StateDTypes()
    hides: Hides = Hides()
    reading: Reading = Reading()
    communication_share: dict[str, float] = msgspec.field(default_factory=dict)
    sources: dict[str, str] = msgspec.field(default_factory=dict)
