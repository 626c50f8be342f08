"""Sharding: how a program shards, gathers and sums its state, beside what a strategy decides."""

from typing import Any, Literal

from msgspec.structs import replace

from mopsim.common.errors import Rules
from mopsim.common.io import Spec
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.quantity import require_between
from mopsim.spec.strategy import Precision, Strategy

MOST_BYTES = 1000
"""Moved for one element beside what is counted."""
MOST_BUCKETS = 1e12
"""Bytes: more than a device has."""

MOST_COPIES = 8
Deferred = Literal["never", "pipelines", "always"]
"""When something waits for the last microbatch's backward."""

WHOLE = (
    "sums", "owners", "grad_passes", "microbatch_grads", "update_copies", "buckets", "reduce_copies",
    "reductions", "update_group", "norm_passes",
)  # fmt: skip
"""Entries of gradients that a rank sums or updates without sharding parameters."""


def during(when: Deferred, stages: Any) -> Any:
    """Whether it waits, in pipelines of so many stages."""
    return (when == "always") | ((when == "pipelines") & (stages > 1))


class Sharding(Spec, frozen=True, kw_only=True):
    """How state is sharded and gathered.

    fsdp: parameters are sharded by groups of modules whatever `dense.zero` says, and gradients live within a
    step (torch's FSDP, Megatron-FSDP). optional: that, and copies, are of ZeRO-2 and 3 alone; below them
    parameters and gradients are whole on every rank (torch's DistributedDataParallel). bucketed: that has
    buckets as large as the gradients that several ranks sum, for good, into which they are copied and back
    (gradient_as_bucket_view is false by default): so it is where optional says that it runs. copies: between
    shards or gradients and the buffers of collectives (torch's FSDP2). experts: routed experts' parameters
    are sharded by what shards the others; else those spread over ranks are plain tensors, whole on every
    replica; or they are sharded where expert_fsdp is above 1, and such plain tensors where it is 1
    (`shared`). whole_sums: gradients of a step's microbatches are summed whole, in the reductions' dtype, and
    reduced with the last one's (FSDP2's set_requires_gradient_sync): `always`, or in `pipelines` (as torch's
    do). stays: what is gathered for a backward is there until the next pass frees it, or the last backward
    (set_reshard_after_backward): `always`, or in `pipelines` (as torch's do). flat: a group's parameters are
    views of one tensor, whose gradient autograd puts together and which is cast and divided before it is
    reduced (torch's FullyShardedDataParallel); `original`: what the optimizer has are views of it too, each
    time it is sharded again (use_orig_params). gathers: of these in the dtype of the products, or as shards
    are (without MixedPrecision, under autocast); those of layers in the 8 bits that products read (`cast`,
    torchao and Transformer Engine). sums: under ZeRO-1 and 2 gradients are scattered to the ranks that update
    them (`scattered`), or all ranks sum them whole (`whole`). reductions: under ZeRO-2 and 3 they run beside
    the backward (`hidden`), or so where the strategy hides them, else what comes after waits for each
    (`asked`). owners: under ZeRO-1 each tensor's optimizer state is with one rank, whole, and owners
    broadcast what they have updated one after the other. grad_passes: bytes moved for each gradient of a rank
    once the backward after which they are reduced has made it: into the buffers of reductions and back,
    scaled, counted into a norm while they are whole. microbatch_grads: where gradients are summed in a wider
    dtype than the products' and no rank shards them, each that a backward makes is added and freed at once
    (`added`); or all are added after the backward, each from a copy in the sums' dtype, and live until the
    next backward begins, through forwards and update (`kept`). zero_grad: where parameters are whole,
    gradients are there for good (`fills`), or each from the backward that makes it to the end of the step
    (`frees`, torch's default); so are shards of gradients, unless they are parts of buffers that are there
    for good (`buffers`); or so below ZeRO-3 alone, until the update has copies in fp32 (`copied`).
    update_copies: under ZeRO-1, bytes for each parameter that a rank updates of flat tensors that its update
    makes of gradients narrower than fp32; buckets: bytes of those through which such gradients are reduced
    after the last backward; reduce_copies: bytes for each gradient of a rank of one whole copy that is
    reduced then. Where none of a backward's tensors is as large, torch's caching allocator has blocks for
    them beside. reduce_buffer: under ZeRO-2 and 3, bytes of one through which gradients are reduced, which
    lives through the step; ZeRO-2 has a second one where reductions are hidden. Then, and under ZeRO-3, what
    is gathered, and a copy of the buffer that is sent, are in pools of streams of their own. update_group:
    what a rank updates is one flat tensor (0: tensors of their own), under ZeRO-3 several of so many numbers,
    one after the other, each with a copy of its gradient in fp32. norm_passes: bytes moved for each gradient
    that a rank updates, for the norm of all (0: those of one in the dtype of the update). host_masters: where
    the host updates part of the optimizer's state, the master weights of that part go there with the moments
    (`moved`); or stay on the device too, and the host updates a copy: gradients go down and masters come up
    as wide as these are (`copied`). host_moments: where the host updates part of the optimizer's state,
    moments are as wide as asked (`asked`); or no narrower than what is updated (`masters`: torch.zeros_like).
    embedding: tensor-parallel ranks split the token embedding, or each has it whole. prefetch: FSDP2 gathers
    a layer's parameters in the forward while it runs the one before (`told`), or when the host is there
    (`reached`, its default), as far ahead as nothing makes it wait for the device; or is told where ranks
    split the routed experts (`split`). loop: layers are the turns of a loop of the compiled program: what a
    layer gathers and reduces is beside the layers before and after it (`pipelined`), as without a loop
    (`none`), or lies within its turn: that of routed experts in collectives of their own, beside the rest of
    the layer (`apart`), or all in one each, which the layer waits for (`together`; XLA's combiners with
    thresholds above a layer's size). loop_copies: copies of the shards of all layers' parameters, as wide as
    these, that are laid out by layer for the loop and live through the step. one_mesh: routed experts have as
    many copies as the other weights: one degree replicates both (a mesh of replicas and shards); else each is
    sharded over as many ranks as is asked for. agreements: at the end of a step ranks sum the loss and each
    router's load, one exchange each. groups: parameters that are gathered and reduced together are a layer's,
    and those of the root, which is gathered once a microbatch (`layers`); or embedding, head with the final
    norm, and a layer's routed experts are groups of their own too (`modules`); or every module is one
    (`each`), whose parameters are whole one after the other.
    """

    fsdp: bool = False
    optional: bool = False
    bucketed: bool = False
    copies: bool = False
    whole_sums: Deferred = "never"
    stays: Deferred = "never"
    flat: bool | Literal["original"] = False
    gathers: Literal["compute", "param", "cast"] = "compute"
    sums: Literal["scattered", "whole"] = "scattered"
    reductions: Literal["hidden", "asked"] = "hidden"
    owners: bool = False
    grad_passes: float = 0.0
    microbatch_grads: Literal["added", "kept"] = "added"
    zero_grad: Literal["fills", "frees", "buffers", "copied"] = "fills"
    update_copies: float = 0.0
    buckets: float = 0.0
    reduce_copies: float = 0.0
    update_group: float = 0.0
    norm_passes: float = 0.0
    reduce_buffer: float = 0.0
    host_masters: Literal["moved", "copied"] = "moved"
    host_moments: Literal["asked", "masters"] = "asked"
    experts: bool | Literal["shared"] = True
    embedding: Literal["split", "whole"] = "split"
    prefetch: Literal["told", "reached", "split"] = "told"
    loop: Literal["none", "pipelined", "apart", "together"] = "none"
    loop_copies: float = 0.0
    one_mesh: bool = False
    agreements: bool = False
    groups: Literal["layers", "modules", "each"] = "layers"

    @property
    def whole(self) -> "Sharding":
        """Where a strategy shards no parameters: by torch's DistributedDataParallel, or not at all."""
        return replace(
            self, fsdp=False, copies=False, optional=False, whole_sums="never", stays="never", bucketed=True,
            loop="pipelined" if self.loop_copies else "none",
            zero_grad="fills" if self.zero_grad == "buffers" else self.zero_grad,
        )  # fmt: skip

    def told(self, strategy: Strategy) -> bool:
        """Whether FSDP2 is told what to gather ahead in the forward."""
        split = self.prefetch == "split" and strategy.experts.expert_parallel > 1
        return split or self.prefetch == "told"

    def frees(self, zero: int) -> bool:
        """Whether gradients on the device live from the first backward to the end of the step only, under a
        level of ZeRO (zero_grad to None, or copied before the update)."""
        sharded = self.fsdp and self.zero_grad != "buffers"
        return sharded or self.zero_grad == "frees" or (self.zero_grad == "copied" and zero < 3)

    def waits(self, strategy: Strategy) -> bool:
        """Whether compute waits for each reduction of a backward (reductions)."""
        return self.reductions == "asked" and not strategy.overlap.grad_reduce

    def with_moments(self, precision: Precision, strategy: Strategy) -> Precision:
        """The dtypes with those of the moments that the host has (host_moments)."""
        by_host = strategy.optimizer.state_tier == strategy.optimizer.update_on == "host"
        narrow = DTYPE_BYTES[precision.moments] < DTYPE_BYTES[precision.masters]
        wider = by_host and narrow and self.host_moments == "masters"
        return replace(precision, moments=precision.masters) if wider else precision

    def _rules(self) -> Rules:
        require_between(self, 0, MOST_BYTES, "grad_passes", "update_copies", "reduce_copies", "norm_passes")
        require_between(self, 0, MOST_COPIES, "loop_copies")
        require_between(self, 0, MOST_BUCKETS, "buckets", "reduce_buffer", "update_group")
        whole = self.update_group == int(self.update_group)
        yield whole, "update_group", "must be 0, or a whole number of at least 1: parameters of one update"
        defaults = dict(zip(self.__struct_fields__, self.__struct_defaults__, strict=True))
        for field in WHOLE:
            without = defaults[field]
            rule = f"must be {without!r} with fsdp, under which each rank sums and updates a shard only"
            yield not self.fsdp or getattr(self, field) == without, field, rule
        rule = "is of a program that may shard parameters (fsdp)"
        yield self.fsdp or not self.optional, "optional", rule
        rule = "is of torch's DistributedDataParallel, whose parameters are whole (fsdp false)"
        yield not (self.fsdp and self.bucketed), "bucketed", rule
        rule = "is of a program that shards parameters (fsdp)"
        yield self.fsdp or self.zero_grad != "buffers", "zero_grad", rule
        rule = "is of a program whose optimizer has masters of its own (fsdp false)"
        yield not self.fsdp or self.zero_grad != "copied", "zero_grad", rule
        rule = "is of torch's FSDP2 (copies)"
        yield self.copies or self.whole_sums == "never", "whole_sums", rule
        yield self.copies or self.stays == "never", "stays", rule
        rule = "are of a program whose layers are turns of a loop (loop)"
        yield self.loop != "none" or not self.loop_copies, "loop_copies", rule
        rule = "is of a program that shards parameters (fsdp), without copies of FSDP2 and flat tensors"
        copied = self.loop == "pipelined" and bool(self.loop_copies)
        looped = (self.fsdp or copied) and not self.copies and not self.flat
        yield looped or self.loop == "none", "loop", rule
        rule = "is of torch's FSDP1 (flat)"
        yield bool(self.flat) or self.gathers != "param", "gathers", rule
        rule = "is of torch's FSDP1 (flat), whose modules may be wrapped one by one"
        yield bool(self.flat) or self.groups != "each", "groups", rule
        rule = "is torch's FSDP1, which makes no copies of FSDP2 (copies)"
        yield not (self.flat and self.copies), "flat", rule
