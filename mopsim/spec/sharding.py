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
MOST_CHANNELS = 64
"""MAXCHANNELS of NCCL."""
Deferred = Literal["never", "pipelines", "always"]
"""When something waits for the last microbatch's backward."""

WHOLE = (
    "sums", "owners", "grad_passes", "microbatch_grads", "update_copies", "buckets", "reduce_copies",
    "reductions", "update_group", "norm_passes", "check_copies", "search_copies", "searched", "host_room",
)  # fmt: skip
"""Entries of gradients that a rank sums or updates without sharding parameters."""
EACH = (
    "grad_passes", "update_copies", "reduce_copies", "norm_passes", "check_copies", "search_copies",
    "host_room",
)  # fmt: skip
"""Entries in bytes for each number."""


def during(when: Deferred, stages: Any) -> Any:
    """Whether it waits, in pipelines of so many stages."""
    return (when == "always") | ((when == "pipelines") & (stages > 1))


class Sharding(Spec, frozen=True, kw_only=True):
    """How state is sharded and gathered.

    fsdp: parameters are sharded by groups of modules whatever `dense.zero` says, and gradients live within
    a step (torch's FSDP, Megatron-FSDP).
    optional: fsdp and copies apply to ZeRO-2 and 3 alone. Below them parameters and gradients are whole on
    every rank (torch's DistributedDataParallel).
    bucketed: DistributedDataParallel has buckets for good, as large as the gradients that several ranks
    sum. Gradients are copied into them and back (gradient_as_bucket_view is false by default). This is so
    wherever optional makes that program run.
    bucket: bytes of parameters after which DistributedDataParallel ends a bucket (bucket_cap_mb), and
    torch.compile a graph (torch._dynamo.config.optimize_ddp): the products of a gate that are larger lie in
    graphs of their own, so no kernel makes all of what is between them and the next.
    copies: there are copies between shards or gradients and the buffers of collectives (torch's FSDP2).
    whole_sums: gradients of a step's microbatches are summed whole, and reduced with the last microbatch's:
    in the reductions' dtype (FSDP2's set_requires_gradient_sync), flat ones in that of the products, with
    parameters that no forward frees (FSDP1's no_sync): `always`, in `pipelines` (as torch's do), or `never`.
    stays: parameters that are gathered for a backward stay until the next pass, or the last backward, frees
    them (set_reshard_after_backward): `always`, in `pipelines` (as torch's do), or `never`.
    flat: the parameters of a group are views of one tensor. Autograd concatenates its gradient, which is
    cast and divided before it is reduced (torch's FullyShardedDataParallel). `original`: the optimizer's
    parameters are views of it too, made each time it is sharded again (use_orig_params).
    gathers: dtype of gathered parameters. `compute`: that of the products. `param`: that of the shards
    (flat tensors without MixedPrecision, under autocast). `cast`: those of layers in the 8 bits that
    products read (torchao and Transformer Engine).
    sums: under ZeRO-1 and 2. `scattered`: gradients are scattered to the ranks that update them. `whole`:
    all ranks sum them whole.
    reductions: under ZeRO-2 and 3. `hidden`: reductions run beside the backward. `asked`: they do so if the
    strategy hides them, else compute waits for each.
    owners: under ZeRO-1 each tensor's optimizer state is whole on one rank, its owner. Owners broadcast the
    updated tensors one after the other.
    grad_passes: bytes moved for each gradient of a rank after the backward that precedes its reduction: it
    is copied into the buffers of reductions and back, scaled, and counted into a norm while it is whole.
    scaled: below ZeRO-2, whole gradients are multiplied where they lie, each read and written once as wide as
    it is kept, for their mean. `none`: the reductions take the mean. `all`: before they are summed, if ranks
    have other tokens. `experts`: the reductions take the mean over their own ranks, and gradients of routed
    experts are scaled, if they have fewer copies than the other weights. `tokens`: all after they are summed,
    by the tokens of a step.
    microbatch_grads: if gradients are summed in a wider dtype than the products' and no rank shards them.
    `added`: each gradient of a backward is added and freed at once. `kept`: all are added after the
    backward, each from a copy in the sums' dtype. They live until the next backward begins, through
    forwards and update.
    zero_grad: how long gradients live. `fills`: whole gradients are there for good. `frees`: each lives
    from the backward that makes it to the end of the step (torch's default); shards of gradients do so too.
    `buffers`: shards of gradients are parts of buffers that are there for good. `copied`: as `frees`, below
    ZeRO-3 alone, until the update has copies in fp32.
    update_copies: under ZeRO-1, the update makes flat tensors of gradients narrower than fp32: bytes for
    each parameter that a rank updates. If no tensor of a backward is as large, torch's caching allocator
    has separate blocks for them.
    channels: below ZeRO-3, blocks of threads that a collective of gradients or parameters has at most
    (max_ctas of a communicator of NCCL, Megatron-Core's nccl_communicator_config_path). 0: as many as NCCL
    takes.
    buckets: bytes of the buffers through which such gradients are reduced after the last backward. If no
    tensor of a backward is as large, torch's caching allocator has separate blocks for them.
    reduce_copies: one whole copy of a rank's gradients is reduced after the last backward: bytes for each
    gradient. If no tensor of a backward is as large, torch's caching allocator has separate blocks for it.
    update_group: a rank updates one flat tensor. Under ZeRO-3 it updates several flat tensors of this many
    parameters, one after the other, each with a copy of its gradient in fp32. 0: separate tensors.
    norm_passes: bytes moved for the global norm, for each gradient that a rank updates. 0: those of one
    gradient in the dtype of the update.
    check_copies: under ZeRO-1 and 2, bytes, for each number of a gradient, of the copy whose norm the device
    takes, one tensor after the other: what a rank updates, before the update; under ZeRO-2 each whole, as
    it is reduced, where gradients go to the host. Those that wider sums have (microbatch_grads `kept`) are
    not copied.
    search_copies: as check_copies, of a search for inf and nan, beside a copy in fp32 of narrower gradients.
    0: no search has more than the norm.
    searched: gradients that are searched before an update: `always`, or `scaled`, those of a scaled fp16
    loss. What goes to the host always is.
    host_room: under ZeRO-1 and 2, bytes, for each number of the largest tensor, of a buffer that stays on
    the device where gradients go to the host.
    reuse_distance: under ZeRO-3, parameters whose next use comes before so many parameters of other uses stay
    gathered until then. 0: none does.
    reduce_buffer: under ZeRO-2 and 3, bytes of a buffer through which gradients are reduced. It lives
    through the step. ZeRO-2 has a second one if reductions are hidden. Then, and under ZeRO-3, gathered
    parameters, and a copy of the buffer that is sent, are in the pools of their own streams.
    host_masters: if the host updates part of the optimizer's state. `moved`: that part's master weights are
    on the host with the moments. `copied`: they stay on the device too, and the host updates a copy.
    Gradients go down and masters come up, as wide as the masters.
    host_moments: if the host updates part of the optimizer's state. `asked`: moments are as wide as the
    strategy asks. `masters`: they are no narrower than the updated weights (torch.zeros_like).
    experts: true: routed experts' parameters are sharded by the same mechanism as the others. false:
    experts that are spread over ranks are plain tensors, whole on every replica. `shared`: sharded if
    expert_fsdp is above 1, plain tensors if it is 1.
    expert_dim: the dimension along which FSDP2 shards a parameter of routed experts. `first`: the experts.
    `even`: the first that the ranks divide, if one does: along another one, what is gathered and the
    gradient that is reduced are put in order in copies of their own.
    embedding: `split`: tensor-parallel ranks split the token embedding. `whole`: each has it whole.
    mtp_projection: `split`: tensor-parallel ranks split the projection before an MTP layer. `whole`: each
    has it whole.
    prefetch: when FSDP2 gathers a layer's parameters in the forward. `told`: while it runs the layer
    before. `reached`: when the host is there (FSDP2's default), as far ahead as the host runs without
    waiting for the device. `split`: as `told` if ranks split the routed experts, else as `reached`.
    loop: layers may be the turns of a loop of the compiled program. `none`: there is no loop. `pipelined`:
    gathers and reductions of a layer run beside the layers before and after it, as without a loop. `apart`:
    they lie within the layer's turn, and those of routed experts run in their own collectives beside the
    rest of the layer. `together`: they lie within the turn, all in one collective each, which the layer
    waits for (XLA's combiners with thresholds above a layer's size).
    loop_copies: copies of the shards of all layers' parameters, as wide as the shards, that are laid out by
    layer for the loop and live through the step.
    one_pool: what FSDP gathers and reduces is allocated on the kernels' stream, and they take its blocks when
    it is freed (functional collectives of a traced graph). false: on streams of its own.
    one_mesh: routed experts have as many copies as the other weights: one degree replicates both (a mesh of
    replicas and shards). false: each is sharded over as many ranks as the strategy asks.
    agreements: at the end of a step ranks sum the loss and each router's load, in one exchange each.
    tensor_sums: what a group of tensor-parallel ranks does at the end of a step with the gradients of
    parameters that each has whole. `none`: nothing that is played. `in_place`: they are summed where they
    lie. `copied`: they are put together in one tensor, summed, and copied back.
    tied: embedding and head that share a weight. `apart`: the weight is gathered for each, and each makes
    and sums a gradient of it. `one`: they are one group with the final norm, which stays from the
    embedding's forward to its backward; the gradient that the head makes waits for the embedding's, as
    torch's autograd adds both before anything gets them.
    abreast: sequences of a microbatch may go through a gathered layer side by side (`overlap.experts`).
    groups: parameters that are gathered and reduced together. `layers`: those of a layer, and those of the
    root, which is gathered once a microbatch. `modules`: as `layers`, and the embedding, the head with the
    final norm, and a layer's routed experts are separate groups too. `each`: every module is a group, and
    groups are whole one after the other.
    """

    fsdp: bool = False
    optional: bool = False
    bucketed: bool = False
    bucket: float = 25.0 * 2**20
    copies: bool = False
    whole_sums: Deferred = "never"
    stays: Deferred = "never"
    flat: bool | Literal["original"] = False
    gathers: Literal["compute", "param", "cast"] = "compute"
    sums: Literal["scattered", "whole"] = "scattered"
    reductions: Literal["hidden", "asked"] = "hidden"
    owners: bool = False
    grad_passes: float = 0.0
    scaled: Literal["none", "all", "experts", "tokens"] = "none"
    microbatch_grads: Literal["added", "kept"] = "added"
    zero_grad: Literal["fills", "frees", "buffers", "copied"] = "fills"
    update_copies: float = 0.0
    buckets: float = 0.0
    channels: int = 0
    reduce_copies: float = 0.0
    update_group: float = 0.0
    norm_passes: float = 0.0
    check_copies: float = 0.0
    search_copies: float = 0.0
    searched: Literal["always", "scaled"] = "always"
    host_room: float = 0.0
    reuse_distance: float = 0.0
    reduce_buffer: float = 0.0
    host_masters: Literal["moved", "copied"] = "moved"
    host_moments: Literal["asked", "masters"] = "asked"
    experts: bool | Literal["shared"] = True
    embedding: Literal["split", "whole"] = "split"
    expert_dim: Literal["first", "even"] = "first"
    mtp_projection: Literal["split", "whole"] = "split"
    prefetch: Literal["told", "reached", "split"] = "told"
    loop: Literal["none", "pipelined", "apart", "together"] = "none"
    loop_copies: float = 0.0
    one_mesh: bool = False
    one_pool: bool = False
    agreements: bool = False
    tensor_sums: Literal["none", "in_place", "copied"] = "none"
    tied: Literal["apart", "one"] = "apart"
    abreast: bool = False
    groups: Literal["layers", "modules", "each"] = "layers"

    @property
    def whole(self) -> "Sharding":
        """Where a strategy shards no parameters: by torch's DistributedDataParallel, or not at all."""
        return replace(
            self, fsdp=False, copies=False, optional=False, whole_sums="never", stays="never", bucketed=True,
            loop="pipelined" if self.loop_copies else "none", expert_dim="first",
            zero_grad={"buffers": "fills", "fills": "frees"}.get(self.zero_grad, self.zero_grad),
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
        require_between(self, 0, MOST_BYTES, *EACH)
        require_between(self, 0, MOST_COPIES, "loop_copies")
        require_between(self, 0, MOST_CHANNELS, "channels")
        require_between(
            self, 0, MOST_BUCKETS, "buckets", "bucket", "reduce_buffer", "update_group", "reuse_distance"
        )
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
        rule = "is of torch's FSDP2 (copies) and FSDP1 (flat)"
        yield self.copies or bool(self.flat) or self.whole_sums == "never", "whole_sums", rule
        rule = "is of torch's FSDP2 (copies)"
        yield self.copies or self.stays == "never", "stays", rule
        yield self.copies or self.expert_dim == "first", "expert_dim", rule
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
