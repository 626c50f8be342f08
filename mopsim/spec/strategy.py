"""Strategy: per component, what splits the compute, where its state lives, and how it is scheduled.

Every degree but the pipeline's is a view of the stage's ranks, chosen independently of the others. Families
(`mopsim.strategies`) are functions that return a value of this one type; nothing branches on its name.
"""

from typing import Literal

from mopsim.common.errors import require, require_name
from mopsim.common.io import Spec
from mopsim.common.units import LARGEST
from mopsim.spec.categories import COMPONENTS, KEPT, MODULES
from mopsim.spec.model import ModelSpec

DEFAULT_STACK = "mopexec-flat"
"""The stack of a strategy that names none."""
Tier = Literal["device", "host"]
Order = Literal["contiguous", "strided"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Exchange = Literal["ulysses", "ring", "all_gather"]
MatmulDType = Literal["float64", "float32", "bfloat16", "float16", "fp8", "mxfp8", "nvfp4"]
CAST: tuple[MatmulDType, ...] = ("fp8", "mxfp8", "nvfp4")
"""Recipes of products whose operands are cast from what everything else computes in."""


class Pipeline(Spec, frozen=True, kw_only=True):
    """Pipeline parallelism: the only degree that factors the world.

    layers: decoder layers of each of the degree x virtual_stages parts, in the network's order; empty = as
    even as can be. Embedding, MTP layers and loss lie in the first and the last part.
    """

    degree: int = 1
    virtual_stages: int = 1
    layers: tuple[int, ...] = ()
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"


class Dense(Spec, frozen=True, kw_only=True):
    """Attention projections, norms, router, dense FFN, shared experts and embedding.

    sequence_parallel: outside the products that `tensor` splits, its ranks split the rows (arXiv 2205.05198);
    otherwise each holds all of them and sums travel by all-reduce (arXiv 1909.08053).
    shard: ranks that share one copy of the state (W: ZeRO over all ranks; below W the copies are replicated).
    zero: 0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters. fully_shard has 2 and 3.
    prefetch: layers whose parameters are gathered ahead of use.
    chunk_tokens: tokens per slice of dense FFN and shared experts, recomputed slice by slice; 0 = one slice.
    """

    tensor: int = 1
    sequence_parallel: bool = True
    shard: int = 1
    zero: Literal[0, 1, 2, 3] = 3
    reshard_after_forward: bool = True
    prefetch: int = 1
    param_tier: Tier = "device"
    grad_tier: Tier = "device"
    chunk_tokens: int = 0


class Attention(Spec, frozen=True, kw_only=True):
    """sequence: ranks that share one sequence (D for Ulysses). exchange: how they trade it."""

    sequence: int = 1
    exchange: Exchange = "ulysses"
    order: Order = "contiguous"


class Experts(Spec, frozen=True, kw_only=True):
    """Routed experts. degree Ep: ranks that whole experts are spread over. tensor: split of an expert (ETP).

    shard: ranks among the replicas of one expert (W / Ep of them) that share one copy of its state.
    chunk_tokens c: local tokens per dispatch chunk (strided positions); 0 = one chunk, intermediates kept.
    max_chunks: K = min(ceil(N / c), max_chunks).
    balance: `least_loaded` moves routed work (and the weights it needs) off ranks with more than `capacity`
    times the mean load, in pieces of min_rows rows or more, where the most loaded rank has `threshold` times
    the mean or more (LLEP, arXiv 2601.17111: alpha, m, lambda).
    dispatch: `all_to_all` sends a token once for each expert; `deduplicated` once to a rank and once to
    another scale-up domain, however many of its experts are there (DeepEP, HybridEP).
    """

    degree: int = 1
    tensor: int = 1
    shard: int = 1
    chunk_tokens: int = 0
    max_chunks: int = 10
    balance: Literal["none", "least_loaded"] = "none"
    capacity: float = 1.0
    min_rows: int = 1024
    threshold: float = 1.0
    dispatch: Literal["all_to_all", "deduplicated"] = "all_to_all"
    order: Order = "contiguous"
    param_tier: Tier = "device"
    grad_tier: Tier = "device"


class Vocabulary(Spec, frozen=True, kw_only=True):
    """Output projection and loss.

    loss: `full` keeps N x V logits; `chunked` forms them chunk_tokens rows at a time; `ring` (Ring-DTP)
    shards the vocabulary over `degree` ranks with distinct tokens; `vocab_parallel` splits it over the
    tensor group (Megatron).
    chunk_tokens: rows of logits formed at a time, in a round of the ring or in `chunked`; 0 = all.
    """

    degree: int = 1
    loss: Literal["full", "chunked", "ring", "vocab_parallel"] = "full"
    chunk_tokens: int = 0
    order: Order = "contiguous"


class Optimizer(Spec, frozen=True, kw_only=True):
    """AdamW. state_tier: where master weights and moments live. update_on: which side computes the update.

    state on host, update on device: streamed through `slots` staging slots of `bucket_params` parameters.
    host_fraction: part of the state that is on the host where state_tier is host (1 = all).
    """

    state_tier: Tier = "device"
    update_on: Tier = "device"
    bucket_params: int = 100_000_000
    slots: int = 2
    host_fraction: float = 1.0


class Activations(Spec, frozen=True, kw_only=True):
    """recompute: none, selective (the modules named), or full (each layer from its input, the boundary).

    kept: kernels of a layer (categories.KEPT) whose outputs a full recomputation keeps and which it does not
    run again: torch's selective activation checkpointing by operator.

    boundary_tier host: the inputs of decoder layers go to pinned memory while host_budget bytes per rank last
    (0 = no cap), also where no recomputation starts from them (offload_modules layer_input and attn_norm of
    Megatron-Core). layers_on_host: the first so many decoder layers of a stage keep all that their backward
    needs in pinned memory (cpu_offloading_num_layers of Megatron-Core and Transformer Engine).
    """

    recompute: Literal["none", "selective", "full"] = "full"
    modules: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    boundary_tier: Tier = "device"
    host_budget: int = 0
    layers_on_host: int = 0


class Overlap(Spec, frozen=True, kw_only=True):
    """Communication that runs beside compute where parameters are not gathered layer by layer (ZeRO below 3).

    grad_reduce: gradients of a layer while the last microbatch's backward goes on. param_gather: updated
    parameters while the next forward begins. pipeline: sends between stages. tensor: gathers and scatters of
    tensor-parallel regions beside their products. experts: dispatch and combine of one microbatch's forward
    beside the backward of another, layer by layer, and the other way round.
    """

    grad_reduce: bool = False
    param_gather: bool = False
    pipeline: bool = False
    tensor: bool = False
    experts: bool = False


class Precision(Spec, frozen=True, kw_only=True):
    """Dtypes of: matmul inputs, activations and gathered parameters (compute), resident parameter
    shards (param), gradient communication and shards (grad), optimizer moments (moments), master weights
    (master; "param": the parameter shard is the master), the matmul recipe (matmul; "compute": same as
    compute), the operands of the attention core and of the output projection (attention, vocabulary;
    "matmul": those of the recipe)."""

    compute: DType = "bfloat16"
    param: DType = "bfloat16"
    reduce: DType = "bfloat16"
    grad: DType = "bfloat16"
    moments: DType = "float32"
    master: Literal["param", "float64", "float32"] = "float32"
    matmul: MatmulDType | Literal["compute"] = "compute"
    attention: Literal["compute", "matmul"] = "compute"
    vocabulary: Literal["compute", "matmul"] = "compute"


class Strategy(Spec, frozen=True, kw_only=True):
    """How one model is trained on `world_size` ranks, `micro_batch` sequences per microbatch and data group.

    stack: the software that it is meant for, where no other is given: a stack's name, or a YAML file.
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

    def __post_init__(self) -> None:
        require_name(self.name)
        require_name(self.stack, "stack")
        for field, least in _LEAST.items():
            value = self._at(field)
            require(value >= least, field, value, f"must be at least {least}")
            require(value <= LARGEST, field, value, "must be at most 2^62")
        require(
            0 <= self.optimizer.host_fraction <= 1,
            "optimizer.host_fraction",
            self.optimizer.host_fraction,
            "must lie between 0 and 1",
        )
        for field, ratio in (("capacity", self.experts.capacity), ("threshold", self.experts.threshold)):
            require(1 <= ratio <= 1e6, f"experts.{field}", ratio, "must lie between 1 and 1e6")
        require(
            self.world_size % self.pipeline.degree == 0,
            "pipeline.degree",
            self.pipeline.degree,
            f"does not divide world_size {self.world_size}",
        )
        ranks = self.stage_ranks
        for field in (
            "dense.tensor",
            "dense.shard",
            "attention.sequence",
            "experts.degree",
            "vocabulary.degree",
        ):
            value = self._at(field)
            require(ranks % value == 0, field, value, f"does not divide the {ranks} ranks of a stage")
        require(
            ranks % (self.experts.degree * self.experts.tensor) == 0,
            "experts.tensor",
            self.experts.tensor,
            f"times experts.degree {self.experts.degree} does not divide the {ranks} ranks of a stage",
        )
        require(
            self.expert_replicas % self.experts.shard == 0,
            "experts.shard",
            self.experts.shard,
            f"does not divide the {self.expert_replicas} replicas of an expert",
        )
        require(
            ranks % (self.dense.tensor * self.attention.sequence) == 0,
            "attention.sequence",
            self.attention.sequence,
            f"times dense.tensor {self.dense.tensor} does not divide the {ranks} ranks of a stage",
        )
        require(
            self.vocabulary.degree == 1 or self.vocabulary.loss in ("ring", "vocab_parallel"),
            "vocabulary.loss",
            self.vocabulary.loss,
            f"does not split the vocabulary, but vocabulary.degree is {self.vocabulary.degree}",
        )
        require(
            self.vocabulary.loss != "chunked" or self.vocabulary.chunk_tokens >= 1,
            "vocabulary.chunk_tokens",
            self.vocabulary.chunk_tokens,
            "must be at least 1 for a chunked loss",
        )
        require(
            self.optimizer.update_on == "device" or self.optimizer.state_tier == "host",
            "optimizer.update_on",
            self.optimizer.update_on,
            "needs optimizer.state_tier host",
        )
        for module in self.activations.modules:
            require(
                module in (*COMPONENTS, *MODULES),
                "activations.modules",
                module,
                f"is not one of {', '.join((*MODULES, *COMPONENTS))}",
            )
        for kernel in self.activations.kept:
            require(kernel in KEPT, "activations.kept", kernel, f"is not one of {', '.join(KEPT)}")
        require(
            not self.activations.kept or self.activations.recompute == "full",
            "activations.kept",
            self.activations.kept,
            f"needs activations.recompute full, not {self.activations.recompute}",
        )
        beside = (
            ("activations.recompute none", self.activations.recompute == "none"),
            ("activations.boundary_tier device", self.activations.boundary_tier == "device"),
            ("pipeline.degree 1", self.pipeline.degree == 1),
        )
        for needed, given in beside:
            require(
                not self.activations.layers_on_host or given,
                "activations.layers_on_host",
                self.activations.layers_on_host,
                f"needs {needed}",
            )
        require(
            not self.activations.kept or self.dense.tensor == 1,
            "activations.kept",
            self.activations.kept,
            f"needs dense.tensor 1, not {self.dense.tensor}",
        )
        require(
            self.pipeline.virtual_stages == 1 or self.pipeline.degree > 1,
            "pipeline.virtual_stages",
            self.pipeline.virtual_stages,
            "needs a pipeline.degree above 1",
        )
        require(
            self.pipeline.virtual_stages == 1 or self.pipeline.schedule == "interleaved",
            "pipeline.schedule",
            self.pipeline.schedule,
            f"plays one part a stage, not pipeline.virtual_stages {self.pipeline.virtual_stages}: "
            "needs interleaved",
        )
        parts = self.pipeline.degree * self.pipeline.virtual_stages
        require(
            len(self.pipeline.layers) in (0, parts) and min(self.pipeline.layers, default=0) >= 0,
            "pipeline.layers",
            list(self.pipeline.layers),
            f"must be a count of layers, 0 or more, for each of the {parts} parts",
        )
        require(
            not self.overlap.experts or self.pipeline.degree == 1 or self.pipeline.virtual_stages > 1,
            "overlap.experts",
            self.overlap.experts,
            "needs pipeline.virtual_stages above 1 in a pipeline",
        )

    def _at(self, path: str) -> int:
        value: object = self
        for step in path.split("."):
            value = getattr(value, step)
        assert isinstance(value, int)
        return value

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: what every other degree is a view of."""
        return self.world_size // self.pipeline.degree

    @property
    def data_groups(self) -> int:
        """Groups of ranks that work on distinct sequences (the data-parallel degree)."""
        return self.stage_ranks // (self.dense.tensor * self.attention.sequence)

    @property
    def expert_replicas(self) -> int:
        """Ranks of a stage that hold the same expert slice."""
        return self.stage_ranks // (self.experts.degree * self.experts.tensor)

    def check_model(self, model: ModelSpec) -> None:
        """Raise SpecError where a degree does not fit the model."""
        if model.num_local_experts:
            require(
                model.num_local_experts % self.experts.degree == 0,
                "strategy.experts.degree",
                self.experts.degree,
                f"does not divide num_local_experts {model.num_local_experts}",
            )
        else:
            require(
                self.experts.degree == 1,
                "strategy.experts.degree",
                self.experts.degree,
                "must be 1 for a model without experts",
            )
        require(
            self.vocabulary.loss != "ring" or not model.tie_word_embeddings,
            "strategy.vocabulary.loss",
            self.vocabulary.loss,
            "needs a head of its own, but model.tie_word_embeddings is true",
        )
        heads = model.num_attention_heads
        if self.attention.exchange == "ulysses":
            split = self.attention.sequence * self.dense.tensor
            require(
                heads % split == 0,
                "strategy.attention.sequence",
                self.attention.sequence,
                f"times dense.tensor {self.dense.tensor} does not divide num_attention_heads {heads}",
            )
        require(
            self.dense.sequence_parallel or self.dense.tensor == 1 or not model.num_local_experts,
            "strategy.dense.sequence_parallel",
            self.dense.sequence_parallel,
            "must be true where dense.tensor is above 1 for a model with experts",
        )
        require(
            heads % self.dense.tensor == 0,
            "strategy.dense.tensor",
            self.dense.tensor,
            f"does not divide num_attention_heads {heads}",
        )
        require(
            self.activations.layers_on_host <= model.num_hidden_layers,
            "strategy.activations.layers_on_host",
            self.activations.layers_on_host,
            f"is more than num_hidden_layers {model.num_hidden_layers}",
        )
        stages = self.pipeline.degree * self.pipeline.virtual_stages
        layers = self.pipeline.layers
        require(
            not layers or sum(layers) == model.num_hidden_layers,
            "strategy.pipeline.layers",
            list(layers),
            f"is {sum(layers)} layers, not the num_hidden_layers {model.num_hidden_layers}",
        )
        require(
            bool(layers) or stages <= model.num_hidden_layers,
            "strategy.pipeline.degree",
            self.pipeline.degree,
            f"times virtual_stages {self.pipeline.virtual_stages} is more than num_hidden_layers "
            f"{model.num_hidden_layers}",
        )


_LEAST = {
    "world_size": 1, "micro_batch": 1, "pipeline.degree": 1, "pipeline.virtual_stages": 1, "dense.tensor": 1,
    "dense.shard": 1, "dense.prefetch": 0, "dense.chunk_tokens": 0, "attention.sequence": 1,
    "experts.degree": 1,
    "experts.tensor": 1, "experts.shard": 1, "experts.chunk_tokens": 0, "experts.max_chunks": 1,
    "experts.min_rows": 1,
    "vocabulary.degree": 1, "vocabulary.chunk_tokens": 0, "optimizer.bucket_params": 1, "optimizer.slots": 1,
    "activations.host_budget": 0, "activations.layers_on_host": 0,
}  # fmt: skip
