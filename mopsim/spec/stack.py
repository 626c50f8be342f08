"""Stack: what a program makes of a strategy.

Strategy is what a user decides; a stack is what its software does anyway: which kernels are fused, what its
collectives copy, what its Python costs the host, which dtypes its state has, what its memory reading means.

Every entry is data with a source (`sources`: dotted field -> where it is written, and of which version). A
stack that nobody wrote is guessed by `generic-eager`, `generic-compile` or `generic-fused`, no bounds.
"""

from typing import Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from mopsim.common.errors import InnerError, MopError, Rules, require, require_name
from mopsim.common.io import Spec, convert, to_plain
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.categories import Runtime
from mopsim.spec.hardware import DEVICE_ARCHITECTURES, unknown_architecture
from mopsim.spec.has import require_had
from mopsim.spec.hides import Hides as Hides
from mopsim.spec.host import HostCosts as HostCosts
from mopsim.spec.kernels import BEYOND, WIDE
from mopsim.spec.kernels import DEFAULT as DEFAULT
from mopsim.spec.kernels import AttentionKernel as AttentionKernel
from mopsim.spec.kernels import Kernels as Kernels
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec
from mopsim.spec.reading import Reading as Reading
from mopsim.spec.recompute import Recompute as Recompute
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.sharding import Sharding as Sharding
from mopsim.spec.strategy import CAST, Activations, Overlap, Precision, Strategy, Tier

T = TypeVar("T", bound=Spec)
FILLED = ("ada", "ampere", "hopper")
"""Device architectures on which a product fills the SMs before a collective that another queue has starts,
though that was issued first: before Blackwell (Megatron-LM d98e8a64, megatron/training/arguments.py)."""
GROUPED_ROW = 16
"""Bytes of which torch's grouped products want rows to be multiples (ATen/native/GroupedMMUtils.h)."""
_STATE = ("param", "reduce", "grad", "moments")
StateDType = Literal["float64", "float32", "bfloat16", "float16", "compute"]


def _filled(given: T, stack: Spec, blank: object) -> T:
    """A part of a strategy, its blank fields as the stack has them."""
    fields = (name for name in stack.__struct_fields__ if getattr(given, name) == blank)
    found = {name: getattr(stack, name) for name in fields}
    return replace(given, **found) if found else given


class StateDTypes(Spec, frozen=True, kw_only=True):
    """Dtypes that a program gives its state where a strategy does not say. `compute`: the dtype of the
    products.

    param: dtype of resident parameter shards.
    reduce: dtype of gradient communication.
    grad: dtype of gradient shards.
    moments: dtype of the optimizer's moments.
    master: dtype of master weights. "param": the parameter shard is the master.
    """

    param: StateDType = "compute"
    reduce: StateDType = "compute"
    grad: StateDType = "compute"
    moments: StateDType = "float32"
    master: Literal["param", "float32", "float64", "bfloat16"] = "float32"


class Stack(Spec, frozen=True, kw_only=True):
    """One program.

    name: one line of text.
    version: version of the program.
    extends: the parent: a shipped stack whose entries count for the fields that this one leaves out.
    runtime: the runtime of mopexec that runs the stack; empty: none does. It is never inherited.
    explicit: the program is a schedule of forward and backward pairs without an autograd graph (mopexec's
    flat_units).
    has: the values of a strategy's fields that the program can run: a field -> its values
    (`vocabulary.loss: [full]`), and of a network's (`model.sparse_attention.index_topk: [0]`). A field
    without an entry may have any value. A key `field where condition` counts only where the condition
    (conditions.yaml of the capability table) holds.
    stage_outputs: how long the output of a pipeline stage lives. `freed`: until it is sent; the last
    stage's logits until their backward. `returned`: as `freed`, but the last stage's logits of all
    microbatches live until the end of the step, where they are concatenated. `held`: in buffers until its
    own backward is over, whole; logits until the next microbatch's backward. `parts`: as `held`, a part on
    each rank.
    balanced_routes: the routes that the program makes for benchmarks (training.routing `forced`).
    `independent`: a token's experts are drawn independently (random logits). `consecutive`: they lie one
    after the other (round robin), on fewer ranks.
    kernels: the implementation of each operation.
    cpu: the implementations on devices that are CPUs, if they differ (in a file: the entries that differ).
    compiled: the entries (`kernels.norm`), on devices of every kind, that differ if a strategy has its
    blocks compiled. Empty: the program does not leave that to a strategy.
    sharding: how state is sharded and gathered.
    recompute: habits of recomputation.
    host: the time that the program's Python takes on the host.
    dtypes: dtypes of state if a strategy does not state them.
    hides: communication that is hidden by default.
    reading: what the program's reported memory counts.
    pool: part of a device's memory that the program's allocator takes at the start (XLA's
    XLA_PYTHON_CLIENT_MEM_FRACTION), of the memory that driver and framework leave. All tensors must lie in
    it, and the communication library has the rest. It applies to devices that are not CPUs. 0: the
    allocator takes the memory that tensors need.
    pinned_blocks: what a block of pinned host memory takes. `powers_of_two`: the next power of two (torch's
    host allocator by default). `as_asked`: what was asked for.
    communication_share: part of the SMs that the experts' exchanges take from kernels beside them, by
    architecture, if it is not the profile's.
    sources: by dotted field, where an entry is written and of which version.
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
    compiled: dict[str, Any] = msgspec.field(default_factory=dict)
    sharding: Sharding = Sharding()
    recompute: Recompute = Recompute()
    host: HostCosts = HostCosts()
    dtypes: StateDTypes = StateDTypes()
    hides: Hides = Hides()
    reading: Reading = Reading()
    pool: float = 0.0
    pinned_blocks: Literal["powers_of_two", "as_asked"] = "powers_of_two"
    communication_share: dict[str, float] = msgspec.field(default_factory=dict)
    sources: dict[str, str] = msgspec.field(default_factory=dict)

    def _rules(self) -> Rules:
        require_name(self.name)
        for key, values in self.has.items():
            require_had(key, values)
        for path in self.compiled:
            section, _, entry = path.partition(".")
            fields = {"kernels": Kernels, "host": HostCosts}.get(section, Kernels).__struct_fields__
            rule = "is not an entry of kernels or host, which a compiler of blocks changes"
            require(section in ("kernels", "host") and entry in fields, "compiled", path, rule)
        self._compiled()
        grads, masters = self.sharding.microbatch_grads, self.sharding.host_masters
        rule = "must be 'added' with explicit, whose schedule has gradients of its own"
        yield not self.explicit or grads == "added", "sharding.microbatch_grads", rule
        rule = "must be 'moved' with explicit, which moves all state"
        yield not self.explicit or masters == "moved", "sharding.host_masters", rule
        rule = "must be 'none' with explicit, whose layers are no turns of a compiled loop"
        yield not self.explicit or self.sharding.loop == "none", "sharding.loop", rule
        require(0 <= self.pool <= 1, "pool", self.pool, "must be a part of the device's memory, 0 to 1")
        for architecture, share in self.communication_share.items():
            require(0 <= share < 1, f"communication_share.{architecture}", share, "must lie in [0, 1)")

    def check_architecture(self, architecture: str) -> None:
        """Raise SpecError where an entry is of an architecture that neither a shipped profile nor the device
        has: it would be passed over."""
        words = (DEFAULT, BEYOND, WIDE)
        parts: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
            "kernels.attention": (self.kernels.attention, words),
            "cpu.attention": (self.cpu.attention if self.cpu else {}, words),
            "compiled.kernels.attention": (self.compiled.get("kernels.attention", {}), words),
            "communication_share": (self.communication_share, (DEFAULT,)),
            "host.queues": (self.host.queues, (DEFAULT,)),
            "compiled.host.queues": (self.compiled.get("host.queues", {}), (DEFAULT,)),
        }
        for field, (entries, keys) in parts.items():
            known = {*keys, *DEVICE_ARCHITECTURES, architecture or DEFAULT}
            for key in (one for one in entries if one not in known):
                raise unknown_architecture(f"stack.{field}", key, keys)

    def on_kind(self, device_kind: str) -> "Stack":
        """The stack on devices of a kind (`HardwareProfile.device_kind`), of which it then says no more."""
        if self.cpu is None:
            return self
        return replace(self, kernels=self.cpu if device_kind == "cpu" else self.kernels, cpu=None)

    def on(self, architecture: str, plain: bool = True) -> "Stack":
        """The stack on one device architecture: `attention` and `communication_share` have `default` only.
        plain: whether its attention is (`TrainSpec.plain_attention`). Raises SpecError for an entry of an
        unknown architecture."""
        self.check_architecture(architecture)
        kernel, share = self.kernels.attention, self.communication_share
        found = kernel.get(architecture, kernel.get(DEFAULT, "profile"))
        found = found if plain else kernel.get(BEYOND, found)
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

    def wide_stream(self, wide_weights: bool) -> bool:
        """Whether the residual stream is in fp32. wide_weights: weights are wider than the products."""
        return self.kernels.stream == "float32" or (self.autocasts and wide_weights)

    @property
    def autocasts(self) -> bool:
        """Whether products cast the weights that they read (Kernels.autocast), which are whole."""
        return self.kernels.autocast and not self.sharding.fsdp

    def skips_hidden(self, plain: bool) -> bool:
        """Whether attention leaves out the blocks of scores that a window or a document hides, beside the
        causal half. plain: see `on`."""
        return self.on("", plain).attention not in ("masked", "unfused", "scores")

    def running(self, model: ModelSpec, strategy: Strategy, architecture: str = "") -> "Stack":
        """The stack as a job runs it on a device architecture."""
        compiled = self.compiling(strategy.compile).cut(model, strategy)
        return compiled.ordered(architecture, strategy).multiplying(model, strategy)

    def ordered(self, architecture: str, strategy: Strategy) -> "Stack":
        """The stack whose hidden collectives of tensor groups start before the products that hide them, or do
        not (Kernels.region_backward): `queued` becomes one of the others."""
        if self.kernels.region_backward != "queued":
            return self
        late = architecture in FILLED and self.queue(architecture, strategy) == "each"
        turn: Literal["beside", "in_turn"] = "in_turn" if late else "beside"
        return replace(self, kernels=replace(self.kernels, region_backward=turn))

    def queue(self, architecture: str, strategy: Strategy) -> Literal["each", "one"]:
        """What starts kernels on a device architecture (HostCosts.queues)."""
        found = self.host.queues.get(architecture, self.host.queues[DEFAULT])
        if found in ("each", "one"):
            return found
        splits = strategy.dense.tensor_parallel > 1 or strategy.attention.context_parallel > 1
        return "one" if (splits or found == "exposed") and not strategy.overlap.experts else "each"

    def compiling(self, how: str) -> "Stack":
        """The stack where a strategy has compiled what it says (`Strategy.compile`)."""
        return replace(self, **self._compiled(), compiled={}) if how != "none" else self

    def cut(self, model: ModelSpec, strategy: Strategy) -> "Stack":
        """The stack where the products of a compiled layer's gate lie in graphs of their own
        (Sharding.bucket)."""
        dense, run, sharding = strategy.dense, self.kernels, self.sharding
        elements = model.hidden_size * model.intermediate_size / dense.tensor_parallel
        large = elements * DTYPE_BYTES[strategy.precision.param] >= sharding.bucket
        reduced = sharding.bucketed and strategy.dense_replicas > 1
        if not (run.compiled and run.activation == "fused" and reduced and large):
            return self
        return replace(self, kernels=replace(run, activation="composed"))

    def multiplying(self, model: ModelSpec, strategy: Strategy) -> "Stack":
        """The stack as its products are: torch's grouped ones are in 16 bits alone, of rows of whole 16 bytes
        (GROUPED_ROW), others run one by one (mopexec/operators/grouped.py: fits). Its attention kernel may be
        one for wider dtypes (WIDE)."""
        element = DTYPE_BYTES[strategy.precision.compute]
        if WIDE in self.kernels.attention and element > 2:
            attention = {DEFAULT: self.kernels.attention[WIDE]}
            self = replace(self, kernels=replace(self.kernels, attention=attention))
        run = self.kernels
        inner = ceil_div(model.moe_intermediate_size, strategy.experts.expert_tensor_parallel)
        whole = all(size * element % GROUPED_ROW == 0 for size in (model.expert_width, inner))
        if run.expert_products != "torch" or (element == 2 and whole):
            return self
        outputs: Literal["whole", "pieces"] = "whole" if self.explicit else "pieces"
        alone = replace(run, expert_products="looped", expert_bias="fused", expert_outputs=outputs)
        return replace(self, kernels=alone)

    def _compiled(self) -> dict[str, Any]:
        """The sections that compiled blocks change. Raises SpecError for a value that no entry can have."""
        found: dict[str, Any] = {}
        for name, start in (("kernels", "kernels."), ("cpu", "kernels."), ("host", "host.")):
            own: Any = getattr(self, name)
            mine = (path for path in self.compiled if path.startswith(start))
            more = {path.removeprefix(start): self.compiled[path] for path in mine}
            if more and own is not None:
                try:
                    found[name] = convert(to_plain(own) | more, type(own), f"compiled.{start[:-1]}")
                except MopError as refusal:
                    raise InnerError(str(refusal)) from None
        return found

    def under(self, zero: int) -> "Stack":
        """The stack as it shards state at a level of ZeRO."""
        if zero >= 2 or not self.sharding.optional:
            return self
        return replace(self, sharding=self.sharding.whole)

    def forces_consecutive(self, routing: RoutingProfile) -> bool:
        """Whether a token's experts lie one after the other."""
        return routing == "forced" and self.balanced_routes == "consecutive"

    def widens(self, precision: Precision, zero: int, update_on: Tier) -> bool:
        """Whether moments are narrower than the update, which copies them: that of Megatron-Core's
        distributed optimizer on the device (use_precision_aware_optimizer), and one without masters."""
        there = (zero >= 1 or not precision.own_master) and update_on == "device" and not self.sharding.fsdp
        narrow = DTYPE_BYTES[precision.moments] < DTYPE_BYTES["float32"]
        return there and narrow and self.kernels.adamw == "widened"

    def gathered(self, precision: Precision) -> float:
        """Bytes of a parameter of a layer that is gathered in the dtype of the products, or as they read
        it."""
        cast = self.sharding.gathers == "cast" and precision.matmul in CAST
        return DTYPE_BYTES[precision.matmul if cast else precision.compute]

    def updated(self, precision: Precision, zero: int) -> float:
        """Bytes of an updated parameter of a layer that is gathered below ZeRO-3. Weights that are casts
        alone (Kernels.weight_casts) go as such, but for MXFP8's, cast where they arrive (Megatron-LM
        d98e8a64, megatron/core/distributed/param_and_grad_buffer.py: buffers of uint8, of two values a byte
        in NVFP4; reuse_grad_buf_for_mxfp8_param_ag)."""
        sent = precision.matmul in ("fp8", "nvfp4") and self.weights_as(zero) == "only"
        return DTYPE_BYTES[precision.matmul if sent else precision.param]

    def own_master(self, precision: Precision, zero: int, update_on: Tier) -> int:
        """Bytes of a master weight beside the parameter: where moments are widened, those that it lacks,
        unless weights lie in 8 or 4 bits alone (Kernels.weight_casts)."""
        lacking = precision.own_master - int(DTYPE_BYTES[precision.param])
        cast = self.kernels.weight_casts == "only" and precision.matmul in CAST
        widened = self.widens(precision, zero, update_on) and lacking > 0 and not cast
        return lacking if widened else precision.own_master

    def weights_as(self, zero: int) -> str:
        """`Kernels.weight_casts` at a level of ZeRO: `only` is of masters that ranks shard, which are cast
        (Megatron-Core, training/arguments.py: fp8_param_gather asserts the distributed optimizer), not of
        parameters that are gathered."""
        how = self.kernels.weight_casts
        if how != "only":
            return how
        return "step" if zero == 3 or self.sharding.fsdp else "only" if zero else "cached"

    def held_weight(self, precision: Precision) -> float:
        """Bytes of a weight at least, below ZeRO-3 (Kernels.weight_casts)."""
        param, run = DTYPE_BYTES[precision.param], self.kernels
        if run.weight_casts != "only" or precision.matmul not in CAST:
            return param
        return min(param, DTYPE_BYTES[precision.matmul] * (1 + (run.casts == "kept")))

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
        found = _filled(strategy.overlap, hides.of(strategy), None)
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
        experts, whole = strategy.experts, not self.sharding.experts
        alone = self.sharding.experts == "shared" and experts.expert_fsdp == 1
        return (whole or alone) and experts.expert_parallel > 1

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
