"""Strategy: per component, what splits the compute, where its state lives, and how it is scheduled.

Every degree but the pipeline's is a view of the stage's ranks, chosen independently of the others. Families
(`mopsim.strategies`) are functions that return a value of this one type; nothing branches on its name.
"""

from typing import Literal

from msgspec.structs import replace

from mopsim.common.errors import Rules, require_name
from mopsim.common.io import Spec
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec import strategy_rules as rules
from mopsim.spec.model import ModelSpec

DEFAULT_STACK = "mopexec-flat"
"""The stack of a strategy that names none."""
Tier = Literal["device", "host"]
Order = Literal["contiguous", "strided"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
Exchange = Literal["ulysses", "ring", "all_gather"]
UpdateOverlap = Literal["none", "next_forward", "backward"]
MatmulDType = Literal["float64", "float32", "bfloat16", "float16", "fp8", "mxfp8", "nvfp4"]
CAST: tuple[MatmulDType, ...] = ("fp8", "mxfp8", "nvfp4")
"""Recipes of products whose operands are cast from what everything else computes in."""


def even_parts(layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part of a pipeline, as even as can be: the first have one more."""
    base, more = divmod(layers, parts)
    return tuple(base + (part < more) for part in range(parts))


class Pipeline(Spec, frozen=True, kw_only=True):
    """Pipeline parallelism: the only degree that factors the world.

    pipeline_parallel: number of stages. virtual_stages: parts that each stage holds (interleaved schedule).
    layers: decoder layers of each of the pipeline_parallel x virtual_stages parts, in the network's order;
    empty: as evenly as possible. Embedding, MTP layers and loss lie in the first and the last part. schedule:
    order of forwards and backwards. `interleaved` needs virtual_stages above 1; `zero_bubble` splits the
    backward. `dualpipe_v` (DualPipeV, arXiv 2412.19437) needs virtual_stages 2: the first parts lie on the
    stages from the first to the last, the second parts on the way back (a V), so that the first stage has
    both ends of the network. A forward through one and a backward through the other are one turn, and
    backwards are split where the pipeline fills and drains.
    """

    pipeline_parallel: int = 1
    virtual_stages: int = 1
    layers: tuple[int, ...] = ()
    schedule: Literal["1f1b", "interleaved", "zero_bubble", "dualpipe_v"] = "1f1b"

    @property
    def splits(self) -> bool:
        """Whether all backwards are in two halves: there is nothing to fill in a stage alone."""
        return self.schedule == "zero_bubble" and self.pipeline_parallel > 1

    def parts(self, layers: int) -> tuple[int, ...]:
        """Of `layers` decoder layers those of each model chunk, in their order."""
        return self.layers or even_parts(layers, self.pipeline_parallel * self.virtual_stages)

    def largest_chunk(self, layers: int) -> int:
        """Decoder layers of the model chunk that has most, of `layers` in all."""
        return max(self.layers, default=-(-layers // (self.pipeline_parallel * self.virtual_stages)))

    @property
    def folded(self) -> bool:
        """Whether parts lie on the stages as on a V, and some backwards are in two halves."""
        return self.schedule == "dualpipe_v"


class Dense(Spec, frozen=True, kw_only=True):
    """Attention projections, norms, router, dense FFN, shared experts and embedding.

    tensor_parallel: number of tensor-parallel ranks. sequence_parallel: true: outside the split products, the
    tensor-parallel ranks split the rows (arXiv 2205.05198). false: each rank holds all rows, and sums travel
    by all-reduce (arXiv 1909.08053). fsdp: ranks that share one copy of the state (fully sharded data
    parallelism). If there are fewer of them than ranks of the stage, the copies are replicated (HSDP). zero:
    what is sharded. 0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too.
    reshard_after_forward: parameters are freed after the forward and gathered again for the backward.
    prefetch: number of layers whose parameters are gathered ahead of use. param_tier: where the parameter
    shards lie. grad_tier: where the gradient shards lie. chunk_tokens: tokens of a slice of dense FFN and
    shared experts, which are recomputed slice by slice; 0: one slice.
    """

    tensor_parallel: int = 1
    sequence_parallel: bool = True
    fsdp: int = 1
    zero: Literal[0, 1, 2, 3] = 3
    reshard_after_forward: bool = True
    prefetch: int = 1
    param_tier: Tier = "device"
    grad_tier: Tier = "device"
    chunk_tokens: int = 0


class Attention(Spec, frozen=True, kw_only=True):
    """The attention core.

    context_parallel: number of context-parallel ranks, which share one sequence. cp_comm_type: how these
    ranks exchange the sequence. `ulysses`: heads for positions; `ring`: blocks of keys and values travel in a
    ring; `all_gather`: all keys and values at once. rank_placement: a group is made of neighbouring ranks
    (`contiguous`) or of every n-th rank (`strided`).
    """

    context_parallel: int = 1
    cp_comm_type: Exchange = "ulysses"
    rank_placement: Order = "contiguous"


class Experts(Spec, frozen=True, kw_only=True):
    """Routed experts.

    expert_parallel: number of expert-parallel ranks, over which whole experts are spread.
    expert_tensor_parallel: number of ranks that split an expert. expert_fsdp: ranks that share one copy of an
    expert's state, among the replicas of the expert. chunk_tokens: local tokens of a dispatch chunk (strided
    positions); 0: one chunk. max_chunks: largest number of chunks. There are min(ceil(tokens / chunk_tokens),
    max_chunks). balance: `least_loaded` moves routed work, and the weights that the work needs, away from
    overloaded ranks (LLEP, arXiv 2601.17111). capacity: LLEP's alpha: a rank is overloaded above this load,
    in multiples of the mean. min_rows: LLEP's m: the smallest number of rows that is moved. threshold: LLEP's
    lambda: it acts if the most loaded rank has at least this load, in multiples of the mean.
    token_dispatcher: `alltoall` sends a token once for each of its experts. `allgather` sends all tokens to
    all ranks that split the experts, whose sums are scattered back. `deepep` and `hybridep` send a token
    once to a rank and once to another scale-up domain, however many of its experts are there. Before a
    `hybridep` dispatch every rank receives the chosen experts of each row of the group. rank_placement: a
    group is made of neighbouring ranks (`contiguous`) or of every n-th rank (`strided`). param_tier: where
    the parameter shards lie. grad_tier: where the gradient shards lie.
    """

    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    expert_fsdp: int = 1
    chunk_tokens: int = 0
    max_chunks: int = 10
    balance: Literal["none", "least_loaded"] = "none"
    capacity: float = 1.0
    min_rows: int = 1024
    threshold: float = 1.0
    token_dispatcher: Dispatcher = "alltoall"
    rank_placement: Order = "contiguous"
    param_tier: Tier = "device"
    grad_tier: Tier = "device"

    @property
    def sends_once(self) -> bool:
        """Whether kernels made for it send a row once to a rank, with the weights of its routes in fp32."""
        return self.token_dispatcher in ("deepep", "hybridep")

    @property
    def gathers(self) -> int:
        """Ranks whose tokens all of them gather, 0 where tokens are sent to some."""
        ranks = self.expert_parallel * self.expert_tensor_parallel
        return ranks if self.token_dispatcher == "allgather" and ranks > 1 else 0


class Vocabulary(Spec, frozen=True, kw_only=True):
    """Output projection and loss.

    vocab_parallel: number of vocabulary-parallel ranks. loss: `full` keeps N x V logits. `chunked` computes
    them chunk_tokens rows at a time. `ring` (Ring-DTP) shards the vocabulary over the vocabulary-parallel
    ranks, which have distinct tokens. `vocab_parallel` splits it over the tensor group (Megatron).
    chunk_tokens: rows of logits that are computed at a time, in a round of the ring or in `chunked`; 0: all.
    rank_placement: a group is made of neighbouring ranks (`contiguous`) or of every n-th rank (`strided`).
    """

    vocab_parallel: int = 1
    loss: Literal["full", "chunked", "ring", "vocab_parallel"] = "full"
    chunk_tokens: int = 0
    rank_placement: Order = "contiguous"


class Optimizer(Spec, frozen=True, kw_only=True):
    """AdamW.

    state_tier: where master weights and moments live. update_on: which side computes the update. If the state
    is on the host and the update on the device, the state is streamed. bucket_params: parameters of a
    streamed bucket. slots: number of staging buffers, each of one bucket. host_fraction: share of the state
    that is on the host if state_tier is host; 1: all. overlap: `next_forward` runs the streamed update of a
    step beside the forward of the next step. The gather of a parameter waits for its update. The update is
    the same, since the gradients are clipped before. `backward` updates a unit in the last backward of the
    step, once the unit's gradients are final, and frees these. The update is the same if nothing is clipped
    (training.clip_norm 0), which it needs.
    """

    state_tier: Tier = "device"
    update_on: Tier = "device"
    bucket_params: int = 100_000_000
    slots: int = 2
    host_fraction: float = 1.0
    overlap: UpdateOverlap = "none"


class Activations(Spec, frozen=True, kw_only=True):
    """What is kept from the forward to the backward, and where.

    recompute: `none`, `selective` (the modules below), or `full` (each layer from its input). modules:
    modules that selective recomputation runs again; empty: the program's own choice. save_ops: kernels of a
    layer (categories.KEPT) that a full recomputation does not run again, since it keeps their outputs:
    torch's selective activation checkpointing by operator. recompute_num_layers: of each model chunk of a
    stage, the number of decoder layers that a full recomputation runs again, the first ones; the others keep
    everything, as do MTP layers (Megatron-Core's recompute_method block; programs that spread them over the
    chunk keep as much and take as long); 0: all. layer_inputs: where the inputs of decoder layers
    wait, even if no recomputation starts from them (offload_modules layer_input and attn_norm of
    Megatron-Core). host_budget: bytes of layer inputs for each rank that go to pinned memory, the first
    inputs first; 0: no cap. cpu_offload_layers: this number of decoder layers, the first of a stage, keep
    everything that their backward needs in pinned memory (cpu_offloading_num_layers of Megatron-Core and
    Transformer Engine).
    """

    recompute: Literal["none", "selective", "full"] = "full"
    modules: tuple[str, ...] = ()
    save_ops: tuple[str, ...] = ()
    recompute_num_layers: int = 0
    layer_inputs: Tier = "device"
    host_budget: int = 0
    cpu_offload_layers: int = 0

    @property
    def modules_again(self) -> tuple[str, ...]:
        """The modules that run again where layers do not."""
        return self.modules if self.recompute == "selective" else ()

    @property
    def experts_again(self) -> bool:
        """Whether recomputation spans the exchanges of experts."""
        return self.recompute == "full" or (self.recompute == "selective" and "moe" in self.modules)


class Overlap(Spec, frozen=True, kw_only=True):
    """Communication that runs beside compute if parameters are not gathered layer by layer (ZeRO below 3).
    Null: as the stack does it.

    grad_reduce: gradients of a layer are reduced while the last microbatch's backward goes on. param_gather:
    updated parameters are gathered while the next forward begins. pipeline: sends between stages run beside
    compute. tensor: gathers and scatters of tensor-parallel regions run beside the regions' products.
    experts: dispatch and combine of one microbatch's forward run beside the backward of another, layer by
    layer, and the other way round; where every pass gathers parameters layer by layer, those of one sequence
    of a microbatch run beside the compute of the others, all of which a layer's gathers and reductions serve.
    """

    grad_reduce: bool | None = False
    param_gather: bool | None = False
    pipeline: bool | None = False
    tensor: bool | None = False
    experts: bool | None = False


class Precision(Spec, frozen=True, kw_only=True):
    """Dtypes. "stack": the stack's dtype.

    compute: dtype of matmul inputs, activations and gathered parameters. param: dtype of resident parameter
    shards. reduce: dtype of gradient communication. grad: dtype of gradient shards. moments: dtype of the
    optimizer's moments. master: dtype of master weights; "param": the parameter shard is the master. matmul:
    recipe of matrix products; "compute": no recipe. attention: dtype of the operands of the attention core;
    "matmul": the recipe's. vocabulary: dtype of the operands of the output projection; "matmul": the
    recipe's. num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: of the decoder layers, so many of the
    first and of the last whose products have no recipe, nor have their weights (Megatron-Core,
    first_last_layers_bf16). MTP layers, which come after them, have it.
    """

    compute: DType = "bfloat16"
    param: DType | Literal["stack"] = "bfloat16"
    reduce: DType | Literal["stack"] = "bfloat16"
    grad: DType | Literal["stack"] = "bfloat16"
    moments: DType | Literal["stack"] = "float32"
    master: Literal["param", "float64", "float32", "bfloat16", "stack"] = "float32"
    matmul: MatmulDType | Literal["compute"] = "compute"
    attention: Literal["compute", "matmul"] = "compute"
    vocabulary: Literal["compute", "matmul"] = "compute"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0

    def of_layer(self, layer: int, layers: int) -> "Precision":
        """That of a layer where the network has so many decoder layers."""
        end = layers - self.num_layers_at_end_in_bf16
        left = 0 <= layer < self.num_layers_at_start_in_bf16 or end <= layer < layers
        return self.without_recipe if left else self

    @property
    def without_recipe(self) -> "Precision":
        """That of layers whose products have none."""
        return replace(self, matmul="compute", num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=0)

    @property
    def is_cast(self) -> bool:
        """Whether a recipe casts operands of products."""
        return self.matmul in CAST

    @property
    def products(self) -> MatmulDType:
        """The dtype or recipe of matrix products."""
        return self.compute if self.matmul == "compute" else self.matmul

    @property
    def masters(self) -> str:
        """The dtype that is updated."""
        return self.param if self.master == "param" else self.master

    @property
    def own_master(self) -> int:
        """Bytes of a master weight beside the parameter; 0 where the parameter is the master."""
        return 0 if self.master == "param" else int(DTYPE_BYTES[self.master])


class Strategy(Spec, frozen=True, kw_only=True):
    """How one model is trained.

    name: one line of text, for tables. world_size: number of ranks. micro_batch: sequences of a microbatch of
    one data group. stack: the software that runs the strategy if no other is given: a stack's name, or a YAML
    file. pipeline: parallelism of the whole network. dense: parallelism and state of the dense modules.
    attention: parallelism of the attention core. experts: parallelism and state of routed experts.
    vocabulary: parallelism of output projection and loss. optimizer: where its state lives and its update
    runs. activations: what is kept, recomputed or offloaded. overlap: communication beside compute.
    precision: dtypes. compile: `block` compiles each decoder layer (torch.compile). `none` adds nothing to
    what the stack's program compiles anyway.
    """

    name: str
    world_size: int
    micro_batch: int = 1
    stack: str = DEFAULT_STACK
    pipeline: Pipeline = Pipeline()
    dense: Dense = Dense()
    attention: Attention = Attention()
    experts: Experts = Experts()
    vocabulary: Vocabulary = Vocabulary()
    optimizer: Optimizer = Optimizer()
    activations: Activations = Activations()
    overlap: Overlap = Overlap()
    precision: Precision = Precision()
    compile: Literal["none", "block"] = "none"

    def _rules(self) -> Rules:
        require_name(self.name)
        require_name(self.stack, "stack")
        yield from rules.own(self)

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: what every other degree is a view of."""
        return self.world_size // self.pipeline.pipeline_parallel

    @property
    def data_groups(self) -> int:
        """Groups of ranks that work on distinct sequences (the data-parallel degree)."""
        return self.stage_ranks // (self.dense.tensor_parallel * self.attention.context_parallel)

    @property
    def fills_while_reducing(self) -> bool:
        """Whether ZeRO-2 fills one buffer of gradients while another one is reduced."""
        return self.dense.zero == 2 and bool(self.overlap.grad_reduce)

    @property
    def dense_replicas(self) -> int:
        """Ranks of a stage that hold the same dense slice."""
        return self.stage_ranks // self.dense.tensor_parallel

    @property
    def dense_copies(self) -> int:
        """Copies of the dense state in a stage."""
        return max(1, self.dense_replicas // self.dense.fsdp)

    @property
    def expert_replicas(self) -> int:
        """Ranks of a stage that hold the same expert slice."""
        return self.stage_ranks // (self.experts.expert_parallel * self.experts.expert_tensor_parallel)

    def check_model(self, model: ModelSpec) -> None:
        """Raise SpecError where a degree does not fit the model."""
        self.hold(rules.with_model(self, model), "strategy.")
