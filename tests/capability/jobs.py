"""Jobs on which every field has something to act on, and each job with one field changed."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec

from mopsim.common.errors import MopError, SpecError
from mopsim.spec.capability import ROWS, Job, Side, refusals
from mopsim.spec.linear_attention import LinearAttention
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.presets import load_model
from mopsim.spec.sparse_attention import SparseAttention
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload
from tests.capability.enumerated import at, changed, leaves, values
from tests.plans import split

replace = msgspec.structs.replace
HARDWARE = HardwareRef(
    name="any", digest="", num_nodes=1, devices_per_node=8, memory_limit=1 << 40, host_limit=1 << 40
)
TRAINING = TrainSpec(seq_len=64, global_batch=16)
TURNS = 4
"""Microbatches of a step in a pipeline: two stages, of one part or two, fill, keep step and drain."""


def models() -> dict[str, ModelSpec]:
    """A small MoE, the same with latent attention, with windows, with linear attention in half of its layers,
    and one without experts."""
    tiny = load_model("tiny")
    latent = replace(
        tiny, attention="mla", kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=32, num_key_value_heads=8,
    )  # fmt: skip
    dense = replace(
        tiny, num_local_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, first_k_dense_replace=0,
        shared_expert_intermediate_size=0,
    )  # fmt: skip
    windowed = replace(tiny, sliding_window=16)
    mixer = LinearAttention(
        kind="gated_delta", num_key_heads=4, num_value_heads=8, key_head_dim=16, value_head_dim=16,
        conv_kernel_dim=4, chunk=16,
    )  # fmt: skip
    hybrid = replace(
        tiny, layer_types=("linear_attention", "full_attention") * 2, layers_without_ffn=(2,),
        linear_attention=mixer,
    )  # fmt: skip
    indexer = SparseAttention(index_n_heads=4, index_head_dim=16, index_topk=8, index_topk_freq=2)
    return {
        "moe": tiny, "latent": latent, "dense": dense, "windowed": windowed, "hybrid": hybrid,
        "sparse": replace(latent, sparse_attention=indexer),
    }  # fmt: skip


def strategies() -> dict[str, tuple[str, Strategy]]:
    """(model, strategy on eight ranks) by name: each family with its mechanisms at work."""
    chunked = mop(
        8, context_parallel=2, expert_parallel=4, vocab_parallel=2, expert_chunk_tokens=8,
        ffn_chunk_tokens=8, loss_chunk_tokens=8,
        optimizer_bucket_params=100_000, offload_inputs_bytes=1 << 14,
    )  # fmt: skip
    gathered = fsdp2(
        8, context_parallel=2, context_exchange="all_gather", expert_parallel=2, recompute="none"
    )
    gathered = replace(gathered, experts=replace(gathered.experts, expert_fsdp=1))
    moved = megatron(8, expert_parallel=4)
    moved = replace(moved, experts=replace(moved.experts, balance="least_loaded", min_rows=1, capacity=1.1))
    deep = megatron(8, expert_parallel=4)
    deep = replace(
        deep, experts=replace(deep.experts, token_dispatcher="deepep"),
        precision=replace(deep.precision, matmul="fp8"),
    )  # fmt: skip
    return {
        "mop": ("moe", chunked),
        "mop, capped": ("moe", replace(chunked, experts=replace(chunked.experts, max_chunks=2))),
        "mop, state updated on the host": (
            "moe",
            mop(8, expert_parallel=2, vocab_parallel=4, optimizer="host"),
        ),
        "mop, windowed": ("windowed", mop(8, expert_parallel=2, optimizer="device")),
        "mop, dense": (
            "dense",
            mop(8, context_parallel=2, vocab_parallel=2, optimizer_bucket_params=100_000),
        ),
        "mop, latent": (
            "latent",
            mop(8, context_parallel=2, expert_parallel=4, vocab_parallel=2, optimizer_bucket_params=100_000),
        ),
        "fsdp2": ("moe", fsdp2(8, expert_parallel=2, loss="chunked", loss_chunk_tokens=16)),
        "fsdp2, offloaded": ("moe", fsdp2(8, expert_parallel=2, context_parallel=2, offload=True)),
        "fsdp2, tensor": ("moe", fsdp2(8, tensor_parallel=2, expert_parallel=2)),
        "fsdp2, gathered keys": ("moe", gathered),
        "zero_offload": ("moe", zero_offload(8, expert_parallel=2, offload_inputs=True)),
        "megatron": (
            "moe",
            megatron(8, tensor_parallel=2, pipeline_parallel=2, virtual_stages=2, expert_parallel=2),
        ),
        "megatron, selective": (
            "moe",
            megatron(8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=4, recompute="selective"),
        ),
        "megatron, state updated on the host": (
            "moe",
            megatron(8, tensor_parallel=2, expert_parallel=2, optimizer_on_host=0.5),
        ),
        "megatron, context": ("moe", megatron(8, context_parallel=2, expert_parallel=2, recompute="full")),
        "split": (
            "moe",
            split(
                8,
                pipeline_parallel=2,
                virtual_stages=2,
                tensor_parallel=2,
                context_parallel=2,
                expert_parallel=2,
                recompute="selective",
            ),
        ),
        "megatron, latent": (
            "latent",
            megatron(8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2),
        ),
        "megatron, sparse": (
            "sparse",
            megatron(8, context_parallel=2, expert_parallel=2, context_exchange="all_gather"),
        ),
        "megatron, linear": (
            "hybrid",
            megatron(8, context_parallel=2, expert_parallel=2, context_exchange="ulysses"),
        ),
        "megatron, balanced": ("moe", moved),
        "megatron, fp8": ("moe", deep),
    }


def jobs() -> dict[str, Job]:
    """The jobs by name. `balanced` has a router that is not, or no work would move; `fp8` sends rows once,
    where routes that a program forces matter."""
    found, routed = {}, {"balanced": "70/2", "fp8": "forced"}
    for name, (model, strategy) in strategies().items():
        staged = strategy.pipeline.pipeline_parallel > 1
        batch = TURNS * strategy.data_groups if staged else TRAINING.global_batch
        routing = routed.get(name.partition(", ")[2], TRAINING.routing)
        training = replace(TRAINING, global_batch=batch, routing=routing)
        found[name] = Job(models()[model], strategy, training, load_stack(strategy.stack)).settled
    return found


@dataclass(frozen=True)
class Variant:
    """A job with one field changed. acts: whether the field has something to act on, before or after."""

    base: str
    path: str
    value: object
    job: Job
    acts: bool

    def __str__(self) -> str:
        return f"{self.base}: {self.path} = {self.value!r}"

    def reads(self, side: Side) -> bool:
        """Whether the table says that the side reads the field."""
        return ROWS[self.path].cells[side].reads


def same_meaning(before: Job, after: Job, path: str) -> bool:
    """Whether both values of the field say the same beside the rest of the job."""
    old, new = decided(before), decided(after)
    if old == new:
        return True
    if path in ("strategy.experts.chunk_tokens", "strategy.experts.max_chunks"):
        return before.chunks == after.chunks
    if path == "strategy.pipeline.layers":
        return {*old.pipeline.layers, *new.pipeline.layers} == {_even(before)}
    if path == "strategy.vocabulary.loss":
        whole = {old.vocabulary.loss, new.vocabulary.loss} == {"full", "vocab_parallel"}
        return whole and new.vocabulary.vocab_parallel == 1
    if path == "strategy.activations.recompute":
        both = {old.activations.recompute, new.activations.recompute}
        return both == {"none", "selective"} and not new.activations.modules
    if path == "strategy.precision.matmul":
        own = ("compute", new.precision.compute)
        return old.precision.matmul in own and new.precision.matmul in own
    if path == "strategy.precision.master":
        own = ("param", new.precision.param)
        return old.precision.master in own and new.precision.master in own
    if path == "strategy.experts.plain":
        return new.expert_replicas == 1
    return False


def decided(job: Job) -> Strategy:
    """The job's strategy with the stack's entries where it leaves them to the stack."""
    return job.software.resolve(job.strategy)


def plan_of(job: Job) -> Plan:
    """The job as a plan, which leaves nothing to its stack."""
    assert job.training is not None
    return Plan(
        model=job.model, hardware=HARDWARE, strategy=decided(job), training=job.training, stack=job.software
    )


def _even(job: Job) -> int:
    """Layers of each part of a pipeline that is cut evenly."""
    pipeline = job.strategy.pipeline
    return job.model.num_hidden_layers // (pipeline.pipeline_parallel * pipeline.virtual_stages)


def variants(
    base: str, job: Job, nouns: tuple[str, ...], paths: Collection[str] | None = None
) -> Iterator[Variant]:
    """Every other value of every field of the nouns (of those of `paths`, where given) that the specs
    themselves take beside the rest."""
    for noun in nouns:
        owner = getattr(job, noun)
        for path, kind in leaves(noun):
            if paths is not None and path not in paths:
                continue
            field = path.partition(".")[2]
            for value in values(path, kind):
                if at(owner, field) == value:
                    continue
                try:
                    new = with_part(job, noun, changed(owner, field, value))
                    new = (named_stack(new) if path == "strategy.stack" else new).settled
                except MopError:
                    continue
                row = ROWS[path]
                acts = row.acts_in(job) or row.acts_in(new)
                acts = acts and new != job and not same_meaning(job, new, path)
                yield Variant(base, path, value, new, acts)


def refusal(variant: Variant, side: Side) -> SpecError | None:
    """The first refusal of a variant: one line, with the path and the value of a field of the job."""
    refused = next(refusals(variant.job, by=side), None)
    if refused is not None:
        noun, _, field = refused.field.partition(".")
        assert refused.field in ROWS, variant
        owner = decided(variant.job) if noun == "strategy" else getattr(variant.job, noun)
        assert refused.value == at(owner, field), variant
        assert str(refused).startswith(f"{refused.field}: "), variant
        assert "\n" not in str(refused), variant
    return refused


def named_stack(job: Job) -> Job:
    """The job with the stack that its strategy names."""
    return Job(job.model, job.strategy, job.training, load_stack(job.strategy.stack))


def with_part(job: Job, noun: str, part: object) -> Job:
    """The job with another part. Raises MopError where the parts do not fit together."""
    parts = {"model": job.model, "strategy": job.strategy, "training": job.training, "stack": job.stack}
    new = Job(**(parts | {noun: part}))  # type: ignore[arg-type]
    new.strategy.check_model(new.model)
    new.software.check_strategy(new.strategy)
    new.training.check_strategy(new.strategy)
    new.training.check_model(new.model)
    return new
