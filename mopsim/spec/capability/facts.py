"""What the capability table is written in: a job's parts, a cell for each side, a row for each field."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mopsim.common.errors import SpecError
from mopsim.spec.layout import num_chunks
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

Side = Literal[
    "simulator", "flat_units", "fully_shard", "split_modules", "torchtitan", "megatron-bridge", "deepspeed"
]  # fmt: skip
SIDES: tuple[Side, ...] = get_args(Side)
RUNTIMES: tuple[Side, ...] = ("flat_units", "fully_shard", "split_modules")
EXPORTS: tuple[Side, ...] = ("torchtitan", "megatron-bridge", "deepspeed")

DOES: dict[Side, str] = {
    "simulator": "simulated",
    "flat_units": "run by flat_units",
    "fully_shard": "run by fully_shard",
    "split_modules": "run by split_modules",
    "torchtitan": "in TorchTitan",
    "megatron-bridge": "in Megatron-Bridge",
    "deepspeed": "in DeepSpeed",
}
"""`<field>: <value> is not ...` in messages."""


@dataclass(frozen=True)
class Job:
    """What is asked of a side. training: None where it is not known yet; its rows and rules that need it then
    refuse nothing. stack: that which the strategy names, where None."""

    model: ModelSpec
    strategy: Strategy
    training: TrainSpec | None = None
    stack: Stack | None = None

    @property
    def software(self) -> Stack:
        """The stack of the job."""
        return self.stack or load_stack(self.strategy.stack, "strategy.stack")

    @property
    def settled(self) -> "Job":
        """The job with what its strategy leaves to the stack filled in."""
        return replace(self, strategy=self.software.resolve(self.strategy))

    @property
    def fsdp(self) -> bool:
        """Whether the program shards parameters by groups of modules, whatever `dense.zero` says."""
        return self.software.sharding.fsdp

    @property
    def chunks(self) -> int:
        """Dispatch chunks of a layer's routed experts (2 where the training is not known yet)."""
        experts = self.strategy.experts
        if self.training is None:
            return 1 if experts.chunk_tokens == 0 else 2
        tokens = self.training.tokens_per_rank(self.strategy)
        return num_chunks(tokens, experts.chunk_tokens, experts.max_chunks)


@dataclass(frozen=True)
class Cell:
    """What one side does with a field: plays every value (values None), or only these, because of `why`; or
    it has no part in what the side does (`reads` False), because of `why`."""

    values: tuple[Any, ...] | None = None
    why: str = ""
    reads: bool = True

    def refuse(self, side: Side, path: str, value: Any) -> SpecError | None:
        """The error that names the field, the values that work and the reason; None where the value works."""
        if self.values is None or value in self.values:
            return None
        names = " or ".join(repr(one) for one in self.values)
        reason = f": {self.why}" if self.why else ""
        return SpecError(path, value, f"is not {DOES[side]}, only {names}{reason}")


ALL = Cell()


def only(*values: Any, why: str = "") -> Cell:
    """These values and no others."""
    return Cell(values, why)


def elsewhere(why: str) -> Cell:
    """Not read by this side, which is right because of `why`."""
    return Cell(None, why, reads=False)


LABEL = elsewhere("a label, for people")


@dataclass(frozen=True)
class Row:
    """One field. acts: whether the field has anything to act on in this job; where it has not, simulator and
    exports pass over its value, while a runtime still refuses what it could not run."""

    cells: dict[Side, Cell]
    acts: Callable[[Job], bool] | None = None

    def concerns(self, side: Side, job: Job) -> bool:
        """Whether the side has to do something with the field's value."""
        return side in RUNTIMES or self.acts is None or self.acts(job)


def row(
    acts: Callable[[Job], bool] | None = None,
    *,
    simulator: Cell = ALL,
    mopexec: Cell = ALL,
    flat_units: Cell | None = None,
    fully_shard: Cell | None = None,
    split_modules: Cell | None = None,
    exports: Cell = ALL,
    torchtitan: Cell | None = None,
    megatron_bridge: Cell | None = None,
    deepspeed: Cell | None = None,
) -> Row:
    """A row; mopexec and exports stand for each runtime and each target that is not named itself."""
    return Row(
        {
            "simulator": simulator,
            "flat_units": flat_units or mopexec,
            "fully_shard": fully_shard or mopexec,
            "split_modules": split_modules or mopexec,
            "torchtitan": torchtitan or exports,
            "megatron-bridge": megatron_bridge or exports,
            "deepspeed": deepspeed or exports,
        },
        acts,
    )


# Conditions under which a field has something to act on.


def pipelined(job: Job) -> bool:
    return job.strategy.pipeline.pipeline_parallel > 1


def scheduled(job: Job) -> bool:
    """Interleaving one part a stage is 1F1B."""
    pipeline = job.strategy.pipeline
    return pipelined(job) and (pipeline.virtual_stages > 1 or pipeline.schedule == "zero_bubble")


def tensor_parallel(job: Job) -> bool:
    return job.strategy.dense.tensor_parallel > 1


def zero_3(job: Job) -> bool:
    return job.strategy.dense.zero == 3


def gathers_layers(job: Job) -> bool:
    """Parameters are gathered layer by layer."""
    return zero_3(job) or job.fsdp


def whole_steps(job: Job) -> bool:
    """Gradients and parameters travel once a step, not layer by layer."""
    return not gathers_layers(job)


def slices(job: Job) -> bool:
    """The dense FFN works in more than one slice."""
    size = job.strategy.dense.chunk_tokens
    if job.training is None:
        return size > 0
    return 0 < size < job.training.tokens_per_rank(job.strategy)


def context_parallel(job: Job) -> bool:
    return job.strategy.attention.context_parallel > 1


def context_groups(job: Job) -> bool:
    """There is more than one group of ranks that share a sequence."""
    return context_parallel(job) and job.strategy.data_groups > 1


def has_experts(job: Job) -> bool:
    return job.model.num_moe_layers > 0


def has_dense(job: Job) -> bool:
    return job.model.num_dense_layers > 0


def expert_parallel(job: Job) -> bool:
    return has_experts(job) and job.strategy.experts.expert_parallel > 1


def expert_groups(job: Job) -> bool:
    """There is more than one group of ranks that the experts are spread over."""
    return expert_parallel(job) and job.strategy.expert_replicas > 1


def chunked_experts(job: Job) -> bool:
    return has_experts(job) and job.chunks > 1


def capped_chunks(job: Job) -> bool:
    """max_chunks makes the chunks larger than chunk_tokens."""
    return chunked_experts(job) and job.chunks == job.strategy.experts.max_chunks


def balanced_experts(job: Job) -> bool:
    return expert_parallel(job) and job.strategy.experts.balance != "none"


def split_vocabulary(job: Job) -> bool:
    return job.strategy.vocabulary.loss in ("ring", "vocab_parallel")


def vocabulary_rings(job: Job) -> bool:
    """There is more than one ring of vocabulary shards."""
    vocabulary = job.strategy.vocabulary
    return vocabulary.loss == "ring" and 1 < vocabulary.vocab_parallel < job.strategy.stage_ranks


def logits_in_rows(job: Job) -> bool:
    return job.strategy.vocabulary.loss in ("chunked", "ring")


def state_on_host(job: Job) -> bool:
    return job.strategy.optimizer.state_tier == "host"


def streamed(job: Job) -> bool:
    """State on the host, update on the device."""
    return state_on_host(job) and job.strategy.optimizer.update_on == "device"


def selective(job: Job) -> bool:
    return job.strategy.activations.recompute == "selective"


def boundaries_on_host(job: Job) -> bool:
    return job.strategy.activations.layer_inputs == "host"


def in_8_bits(job: Job) -> bool:
    """A recipe casts the operands of products from what everything else computes in."""
    return job.strategy.precision.matmul in ("fp8", "mxfp8", "nvfp4")


def pairs(job: Job) -> bool:
    """There are pairs of a forward and a backward for the operators of an explicit program: none of those
    that tensor parallelism splits, none of a layer that keeps more than its input."""
    strategy, activations = job.strategy, job.strategy.activations
    one = (
        strategy.pipeline.pipeline_parallel
        == strategy.dense.tensor_parallel
        == strategy.experts.expert_tensor_parallel
        == 1
    )
    return (
        one
        and job.software.explicit
        and strategy.dense.zero == 3
        and activations.recompute == "full"
        and not activations.save_ops
        and not job.model.dropout
        and (strategy.attention.cp_comm_type == "ulysses" or strategy.attention.context_parallel == 1)
        and (strategy.experts.token_dispatcher == "alltoall" or strategy.experts.expert_parallel == 1)
    )


def mla(job: Job) -> bool:
    return job.model.attention == "mla"


def gqa(job: Job) -> bool:
    return job.model.attention == "gqa"


def windowed(job: Job) -> bool:
    return gqa(job) and job.model.sliding_window > 0


def predicts_further(job: Job) -> bool:
    """There are MTP modules."""
    return job.model.num_nextn_predict_layers > 0
