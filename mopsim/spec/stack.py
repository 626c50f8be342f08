"""Stack: what a program makes of a strategy.

Strategy is what a user decides; a stack is what its software does anyway: which kernels are fused, what its
collectives copy, what its Python costs the host, which dtypes its state has, what its memory reading means.

Every entry is data with a source (`sources`: dotted field -> where it is written, and of which version). A
stack that nobody wrote is guessed by `generic-eager` or `generic-fused`, which are no bounds.
"""

from typing import Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from mopsim.common.errors import Rules, require, require_name
from mopsim.common.io import Spec
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.categories import Runtime
from mopsim.spec.has import require_had
from mopsim.spec.host import HostCosts as HostCosts
from mopsim.spec.quantity import require_between
from mopsim.spec.reading import Reading as Reading
from mopsim.spec.recompute import Recompute as Recompute
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.sharding import MOST_BYTES
from mopsim.spec.sharding import Sharding as Sharding
from mopsim.spec.strategy import CAST, Activations, Overlap, Precision, Strategy, Tier

T = TypeVar("T", bound=Spec)
_STATE = ("param", "reduce", "grad", "moments")
Built = Literal["fused", "composed"]
"""One kernel, or as eager torch composes it."""
AttentionKernel = Literal[
    "profile", "cpu", "flash2", "flash3", "flash4", "cudnn", "flex", "triton", "masked", "scores"
]
"""profile: the best that the hardware's profile was measured with. cpu: torch's flash kernel for CPUs, the
query heads of a KV head one after another. masked: torch's under a mask, of the whole square. scores: kept in
memory, no flash kernel."""
Normed = Literal["qkv_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "up_proj", "router"]
"""Products of the layers' tapes that come after a norm, in joined projections."""
StateDType = Literal["float64", "float32", "bfloat16", "float16", "compute"]
MOST_ROOM = 1000
DEFAULT = "default"
"""Key of what counts for every device architecture that has no entry of its own."""


def _filled(given: T, stack: Spec, blank: object) -> T:
    """A part of a strategy, its blank fields as the stack has them."""
    fields = (name for name in stack.__struct_fields__ if getattr(given, name) == blank)
    found = {name: getattr(stack, name) for name in fields}
    return replace(given, **found) if found else given


class Kernels(Spec, frozen=True, kw_only=True):
    """Which implementation runs each operation.

    norm, rotary, activation, residual: one kernel, or as eager torch composes it; a norm whose values are
    rounded before the product with the weight (`rounded`, transformers), or on a copy of its input in fp32,
    both made again in the backward, of which a checkpoint keeps the input alone (`upcast`); rotary embedding
    by products of complex numbers (`composed`) or of halves (`halves`). stream: of the residual stream, as
    the products' or in fp32, as autocast leaves it where weights are. norm_within: products (of the layers'
    tapes) whose kernel has the norm before them in it: its output is kept for their weight gradient, and is
    neither recomputed nor offloaded alone. head_norms: the gradient of the weight of a norm of each head is
    summed in its kernel, or by one block (`summed`, Transformer Engine). activation: or as torch composes it
    on halves of one tensor (`strided`). router: its product's input is cast to fp32 and kept (`composed`), or
    cast inside it. attention: by device architecture (`ampere`, `hopper`, ...), `default` for the others.
    sinks: those of attention are applied in its kernel, or to its output, of which a copy is kept.
    deterministic: sums in a fixed order. expert_rows: gated activation and route weights of routed experts,
    or weights alone, on a kept copy in fp32 (`wide`), so before what adds a token's rows (`added`, of which a
    compiler keeps the rows alone), or gate and weight, half of it shifted (`shifted`, no
    bias_activation_fusion), or halves in turns (`interleaved`): in MXFP8 within the products, else put
    apart, gated and weighed (Transformer Engine's op fuser). expert_products: `grouped` in one kernel, or by
    torch's (`torch`), `looped` expert by expert (Transformer Engine's
    GroupedLinear), `modules` so too, each a module of its own (transformers 4). expert_outputs: made
    in one tensor (`whole`), or expert by expert and put together (`pieces`), as are the gradients of their
    inputs. expert_padding: in 8 and 4 bits every expert's rows are copied to a multiple of theirs and back
    (`aligned`, Transformer Engine's Fp8Padding, where the host knows their number); or every expert of a rank
    computes as many rows as the `busiest` of them; under a
    `fresh` router memory holds those of a run's most uneven layer, which gives every token to one expert, for
    each layer that keeps its rows; rows are copied there and back slice by slice. expert_weights: those of a
    grouped product are one tensor, or are copied into one before it, and its gradient back (`stacked`).
    expert_room: tensors of routed experts' rows that HybridEP brings have room for so many times those of a
    balanced load (0: for as many as come), so that no host need know how many these are. expert_stash: of
    these, in 8 and 4 bits, what the backward wants of the first product's input and output is copied to a
    stash, which has so many times a balanced load's (0: there is none; Megatron-Core's paged stash).
    expert_bias: added inside the product (`fused`), or gathered row by row and added; then its gradient is a
    product (`gathered`), or torch adds it up row after row (`indexed`) or by atomic operations (`added`);
    or that of the last product times the
    route weights, which the activation has applied, by torch for each expert (`scaled`). clamped_gate: that
    of experts with clamps around SwiGLU (gpt-oss) in one kernel, or as torch composes it, or so with a
    backward that starts from gate and up (`again`), or torch clamps before one kernel and the host waits
    (`apart`). row_sums: rows of a token, and of its gradient, are gathered and added, or added by atomic
    operations on bf16 (`atomic`, torch's index_add_; under Transformer Engine's layers the host then cuts
    rows into those of each expert), or that only where a token chooses fewer experts than the expert-parallel
    degree (`atomic_if_sparse`). routes_map: what DeepEP sent becomes a map of experts in a kernel, or by
    torch's ops, for whose masks' sizes the host waits. beside_rows: what an all-to-all sends beside rows:
    each rank's `counts`, gathered by all but where the host never reads them, and `weights` of routes, twice.
    gathered_rows: those that a region of split products gathers under sequence parallelism are gathered
    `again` for the weight gradients (Megatron-Core's autograd function), or `kept` (plain autograd).
    region_backward: what begins a region gathers its rows again and scatters their input's gradient beside
    the products, or one after the other. region_sums: without sequence parallelism the input's gradient of a
    region is summed `once`, or that of each product that gate_up says is one of its own (`each`).
    region_rows: under sequence parallelism such products share what is gathered and scatter the sum of their
    inputs' gradients (`once`), or scatter each its own (`scattered`), or gather too (`each`). exchanged_rows:
    what is done to those beside: put in order by a copy where a microbatch has several sequences (`ordered`,
    torch's functional collectives; not in tensor overlap), or gathered in 8 bits (`cast`, torchao) or as the
    recipe has them (`quantized`, Transformer Engine); of split experts tokens, with all routes (`routed`).
    sequence_slices: where ranks gather or send on keys and values, each has an early and a late part of a
    sequence (`paired`), or they lie one after the other, so that the last attends to the most (`in_order`).
    sequence_exchange: Ulysses' tensors in one exchange, or one by one with copies on both sides (`composed`).
    gate_up: one product for both, and one for queries, keys and values, or one each, shared experts after the
    routed ones; or one each that are counted as one whose input's gradients are added (`added`), gate and up
    only in `ffn_added`. qkv_split: parts of the one for queries, keys and values are read where they lie, and
    their gradients written so; or torch splits them and puts their gradients together (`views`), and
    attention keeps values as they lie, with all of the projection (`kept`), or what it wants contiguous is
    copied too (`copied`). grouped_heads: keys and values that query heads share are
    read by all of them, or repeated for each before the attention (`repeated`). attention_rows: queries reach
    the attention laid out by `tokens`, or by `heads`, whose output is then copied to lie by tokens. casts:
    the copy in 8 or 4 bits of a product's input is kept for its weight gradient (`kept`, Transformer Engine),
    or the input is, and cast again, each copy laid out again for the product that reads it the other way
    (`again`, torchao), from what a norm or a gate keeps anyway, and of a plain copy the cast is kept (`made`,
    torchao compiled). weight_casts: weights are cast once a step, which is not counted (`step`), or in every
    forward pass (`pass`), or there is a copy, kept for the backward, of each (`kept`; in both layouts where
    casts are). weight_grads: added to their buffer inside the product, or after it. adamw: in one
    kernel, or operation by operation over all tensors, with the roots of all second moments beside
    (`foreach`, torch's default); or in one kernel on copies in fp32 of narrower moments, parameter by
    parameter, beside which a wider master is the bits that the parameter lacks (`widened`, Transformer
    Engine). loss: cross entropy by several kernels with copies in fp32 (`composed`), by
    those from whose copy the maximum is subtracted into another (`shifted`, Megatron-LM from 2022 to June
    2024), one kernel in place of the logits (`fused`), one on a copy of them in fp32 (`upcast`), those that
    torch compiles (`compiled`), Megatron-Core's compiled ones, whose gradient takes a second copy (`native`),
    torch's on a copy in fp32 of logits that every tensor-parallel rank gathers whole (`gathered`), or on that
    of a slice of them (`loss_parallel`, torch.distributed.tensor's; whole ones as `composed`). loss_copy:
    whether torch's works on a copy in fp32, or on the logits in their own dtype. logits_held: who calls a
    loss that works on a copy of the logits holds them, or that copy (`copy`), or does so in pipelines alone
    (`pipelines`). logits_until: what is held of them is there until the loss's backward is done, or until the
    `next` microbatch's are made, as a loop keeps them in a variable (not in pipelines). logit_passes: bytes
    moved for each logit beside what the loss moves (casts, accuracy, perplexity). loss_chunks: those of a
    chunked loss, or torch's cross entropy of each chunk on a copy in fp32, its gradients made apart and those
    of the chunks' inputs put together in fp32 (`autograd`), compiled or not, or all in fp32 under a
    checkpoint (`wide`). ring_blocks: merging blocks of keys and values where context parallelism gathers
    them. fills: new tensors of a known value are written first.
    """

    norm: Literal["fused", "composed", "rounded", "upcast"] = "fused"
    norm_within: tuple[Normed, ...] = ()
    head_norms: Literal["fused", "summed"] = "fused"
    rotary: Literal["fused", "composed", "halves"] = "fused"
    activation: Literal["fused", "composed", "strided"] = "fused"
    residual: Built = "fused"
    stream: Literal["compute", "float32"] = "compute"
    expert_rows: Literal["fused", "composed", "wide", "added", "shifted", "interleaved"] = "fused"
    expert_products: Literal["grouped", "torch", "looped", "modules"] = "grouped"
    expert_outputs: Literal["whole", "pieces"] = "whole"
    expert_padding: Literal["none", "busiest", "fresh", "aligned"] = "none"
    expert_weights: Literal["whole", "stacked"] = "whole"
    expert_room: float = 0.0
    expert_stash: float = 0.0
    expert_bias: Literal["fused", "gathered", "indexed", "added", "scaled"] = "fused"
    clamped_gate: Literal["fused", "composed", "again", "apart"] = "fused"
    row_sums: Literal["gathered", "atomic", "atomic_if_sparse"] = "gathered"
    routes_map: Built = "fused"
    beside_rows: tuple[Literal["counts", "weights"], ...] = ()
    router: Built = "fused"
    sequence_slices: Literal["paired", "in_order"] = "paired"
    sequence_exchange: Built = "fused"
    gathered_rows: Literal["again", "kept"] = "again"
    region_backward: Literal["beside", "in_turn"] = "beside"
    region_sums: Literal["once", "each"] = "once"
    region_rows: Literal["once", "scattered", "each"] = "once"
    exchanged_rows: tuple[Literal["ordered", "cast", "quantized", "routed"], ...] = ()
    gate_up: Literal["joined", "added", "ffn_added", "separate"] = "joined"
    qkv_split: Literal["fused", "views", "kept", "copied"] = "fused"
    grouped_heads: Literal["shared", "repeated"] = "shared"
    attention_rows: Literal["tokens", "heads"] = "tokens"
    casts: Literal["kept", "again", "made"] = "kept"
    weight_casts: Literal["step", "pass", "kept"] = "step"
    weight_grads: Built = "fused"
    adamw: Literal["fused", "foreach", "widened"] = "fused"
    ring_blocks: Built = "fused"
    loss: Literal[
        "composed", "shifted", "fused", "upcast", "compiled", "native", "gathered", "loss_parallel"
    ] = "composed"
    loss_copy: bool = True
    logits_held: bool | Literal["copy", "pipelines"] = True
    logits_until: Literal["backward", "next"] = "backward"
    logit_passes: float = 0.0
    loss_chunks: Literal["fused", "composed", "autograd", "compiled", "wide"] = "fused"
    attention: dict[str, AttentionKernel] = msgspec.field(default_factory=lambda: {DEFAULT: "profile"})
    sinks: Built = "fused"
    deterministic: bool = False
    fills: bool = False

    def __post_init__(self) -> None:
        require_between(self, 0, MOST_BYTES, "logit_passes")
        require_between(self, 0, MOST_ROOM, "expert_room", "expert_stash")
        room, stash = self.expert_room, self.expert_stash
        require(not room or room >= 1, "expert_room", room, "must be 0, or hold a balanced load: at least 1")
        rule = f"must be 0, or at least 1 and at most expert_room {room:g}"
        require(not stash or 1 <= stash <= room, "expert_stash", stash, rule)
        rule = "holds the loss's copy of the logits in fp32, which loss_copy false has not"
        require(self.loss_copy or self.logits_held != "copy", "logits_held", self.logits_held, rule)


class StateDTypes(Spec, frozen=True, kw_only=True):
    """Dtypes that a program gives its state where a strategy does not say; `compute` is that of the products.

    param: of resident parameter shards. reduce: of gradient communication. grad: of gradient shards. moments:
    of the optimizer's moments. master: of master weights; "param": the parameter shard is the master."""

    param: StateDType = "compute"
    reduce: StateDType = "compute"
    grad: StateDType = "compute"
    moments: StateDType = "float32"
    master: Literal["param", "float32", "float64", "bfloat16"] = "float32"


class Hides(Spec, frozen=True, kw_only=True):
    """Communication that the program hides by default, where a strategy does not say: see Overlap.

    grad_reduce: reductions of gradients. param_gather: gathers of updated parameters. pipeline: sends between
    stages, or those of interleaved stages alone. tensor: exchanges of tensor-parallel regions. experts:
    dispatch and combine."""

    grad_reduce: bool = False
    param_gather: bool = False
    pipeline: bool | Literal["interleaved"] = False
    tensor: bool = False
    experts: bool = False


class Stack(Spec, frozen=True, kw_only=True):
    """One program.

    name: one line of text. version: of the program. extends: the stack whose entries it has where it names
    none. runtime: the runtime of mopexec that runs it, empty where none does; never inherited. explicit: the
    program is a schedule of forward and backward pairs without an autograd graph (mopexec's flat_units).
    has: what it can do of what a strategy asks, a field -> its values (`vocabulary.loss: [full]`); a field
    that is not there may have any. A key `field where condition` speaks only of what the condition
    (conditions.yaml of the capability table) holds for.
    stage_outputs: what a pipeline stage makes is freed once it is sent, the last one's logits with their
    backward (`freed`), or, put together, with the step (`returned`); or lies in buffers until its own
    backward is over, whole, and logits until the next ones' is (`held`), or a part on each rank (`parts`).
    balanced_routes: a token's experts where it makes `balanced` routing itself, for benchmarks: drawn
    independently (random logits), or `consecutive` ones (round robin), which lie on fewer ranks.
    kernels: the implementation of each operation. cpu: that where the devices are CPUs, if it is another (in
    a file: the entries that are others).
    sharding: how state is sharded and gathered. recompute: habits of recomputation. host: what its Python
    costs. dtypes: of state, where a strategy does not say. hides: communication that is hidden by default.
    reading: what its memory reading means.
    communication_share: part of the SMs that the experts' exchanges take from what runs beside them, by
    architecture, where it is not the profile's. sources: by dotted field, where an entry is written and of
    which version.
    """

    name: str
    version: str = ""
    extends: str = ""
    runtime: Runtime | Literal[""] = ""
    explicit: bool = False
    has: dict[str, tuple[Any, ...]] = msgspec.field(default_factory=dict)
    stage_outputs: Literal["freed", "held", "parts", "returned"] = "freed"
    balanced_routes: Literal["independent", "consecutive"] = "independent"
    kernels: Kernels = Kernels()
    cpu: Kernels | None = None
    sharding: Sharding = Sharding()
    recompute: Recompute = Recompute()
    host: HostCosts = HostCosts()
    dtypes: StateDTypes = StateDTypes()
    hides: Hides = Hides()
    reading: Reading = Reading()
    communication_share: dict[str, float] = msgspec.field(default_factory=dict)
    sources: dict[str, str] = msgspec.field(default_factory=dict)

    def _rules(self) -> Rules:
        require_name(self.name)
        for key, values in self.has.items():
            require_had(key, values)
        grads, masters = self.sharding.microbatch_grads, self.sharding.host_masters
        rule = "must be 'added' with explicit, whose schedule has gradients of its own"
        yield not self.explicit or grads == "added", "sharding.microbatch_grads", rule
        rule = "must be 'moved' with explicit, which moves all state"
        yield not self.explicit or masters == "moved", "sharding.host_masters", rule
        for architecture, share in self.communication_share.items():
            require(0 <= share < 1, f"communication_share.{architecture}", share, "must lie in [0, 1)")

    def on_kind(self, device_kind: str) -> "Stack":
        """The stack on devices of a kind (`HardwareProfile.device_kind`), of which it then says no more."""
        if self.cpu is None:
            return self
        return replace(self, kernels=self.cpu if device_kind == "cpu" else self.kernels, cpu=None)

    def on(self, architecture: str) -> "Stack":
        """The stack on one device architecture: `attention` and `communication_share` have `default` only."""
        kernel, share = self.kernels.attention, self.communication_share
        found = kernel.get(architecture, kernel.get(DEFAULT, "profile"))
        named = share.get(architecture, share.get(DEFAULT))
        part = {} if named is None else {DEFAULT: named}
        return replace(
            self, kernels=replace(self.kernels, attention={DEFAULT: found}), communication_share=part
        )

    @property
    def attention(self) -> AttentionKernel:
        """The attention kernel of architectures without an entry of their own."""
        return self.kernels.attention.get(DEFAULT, "profile")

    @property
    def flash(self) -> bool:
        """Whether attention scores are never kept in memory."""
        return self.attention != "scores"

    def under(self, zero: int) -> "Stack":
        """The stack as it shards state at a level of ZeRO."""
        if zero >= 2 or not self.sharding.optional:
            return self
        without = replace(
            self.sharding, fsdp=False, copies=False, optional=False, whole_sums="never", bucketed=True
        )
        return replace(self, sharding=without)

    def forces_consecutive(self, routing: RoutingProfile) -> bool:
        """Whether a token's experts lie one after the other."""
        return routing == "balanced" and self.balanced_routes == "consecutive"

    def widens(self, precision: Precision, zero: int, update_on: Tier) -> bool:
        """Whether moments are narrower than the update, which copies them: that of Megatron-Core's
        distributed optimizer on the device (use_precision_aware_optimizer)."""
        there = zero >= 1 and update_on == "device" and not self.sharding.fsdp
        narrow = DTYPE_BYTES[precision.moments] < DTYPE_BYTES["float32"]
        return there and narrow and self.kernels.adamw == "widened"

    def gathered(self, precision: Precision) -> float:
        """Bytes of a parameter of a layer that is gathered in the dtype of the products, or as they read
        it."""
        cast = self.sharding.gathers == "cast" and precision.matmul in CAST
        return DTYPE_BYTES[precision.matmul if cast else precision.compute]

    def own_master(self, precision: Precision, zero: int, update_on: Tier) -> int:
        """Bytes of a master weight beside the parameter: where moments are widened, those that it lacks."""
        lacking = precision.own_master - int(DTYPE_BYTES[precision.param])
        widened = self.widens(precision, zero, update_on) and lacking > 0
        return lacking if widened else precision.own_master

    @property
    def behaviour(self) -> "Stack":
        """The stack without what changes no number: name, version, runtime, parent and sources."""
        return replace(self, name="stack", version="", extends="", runtime="", sources={})

    def resolve(self, strategy: Strategy) -> Strategy:
        """The strategy with the stack's entries where it leaves them to the stack: dtypes of state, hidden
        communication, and what `selective` recomputation without modules means; and the moments it makes."""
        precision, activations = self._precision(strategy), self._activations(strategy)
        overlap = self._overlap(strategy, activations)
        if (precision, overlap, activations) == (strategy.precision, strategy.overlap, strategy.activations):
            return strategy
        return replace(strategy, precision=precision, overlap=overlap, activations=activations)

    def _precision(self, strategy: Strategy) -> Precision:
        precision = strategy.precision
        found = _filled(precision, self.dtypes, "stack")
        computed = {name: precision.compute for name in _STATE if getattr(found, name) == "compute"}
        return self.sharding.with_moments(replace(found, **computed) if computed else found, strategy)

    def _overlap(self, strategy: Strategy, activations: Activations) -> Overlap:
        """Experts' exchanges are hidden where there is another microbatch to hide them behind, and where
        they are not recomputed."""
        pipeline, hides = strategy.pipeline, self.hides
        interleaved = pipeline.virtual_stages > 1
        if hides.pipeline == "interleaved":
            hides = replace(hides, pipeline=interleaved)
        found = _filled(strategy.overlap, hides, None)
        behind = pipeline.pipeline_parallel == 1 or interleaved
        hidden = strategy.overlap.experts or (behind and not activations.experts_again)
        return found if hidden else replace(found, experts=False)

    def _activations(self, strategy: Strategy) -> Activations:
        given, own = strategy.activations, self.recompute
        if given.recompute != "selective" or given.modules:
            return given
        if own.kept and strategy.dense.tensor_parallel == 1:
            return replace(given, recompute="full", save_ops=own.kept)
        return replace(given, modules=own.selective)

    def plain_experts(self, strategy: Strategy) -> bool:
        """Whether the routed experts are plain tensors, whole on every replica."""
        return not self.sharding.experts and strategy.experts.expert_parallel > 1

    def check_strategy(self, strategy: Strategy) -> None:
        """Raise SpecError where the program does not do what a strategy asks."""
        zero, shard = strategy.dense.zero, strategy.experts.expert_fsdp
        require(
            not self.under(zero).sharding.fsdp or zero >= 2, "strategy.dense.zero", zero,
            f"must be 2 or 3 under the stack {self.name}, which shards gradients (sharding.fsdp)",
        )  # fmt: skip
        require(
            not self.plain_experts(strategy) or shard == 1, "strategy.experts.expert_fsdp", shard,
            f"must be 1 under the stack {self.name}, which does not shard routed experts (sharding.experts)",
        )  # fmt: skip
