"""What the capability table is asked about: a job's parts."""

from dataclasses import dataclass, replace

from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.layout import num_chunks
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


@dataclass(frozen=True)
class Job:
    """What is asked of a side. training, hardware: None where they are not known yet; rows and rules that
    need them then refuse nothing. stack: that which the strategy names, where None. kind: of the devices,
    where hardware is not known; empty: not known either."""

    model: ModelSpec
    strategy: Strategy
    training: TrainSpec | None = None
    stack: Stack | None = None
    hardware: HardwareProfile | None = None
    kind: str = ""

    @property
    def device_kind(self) -> str:
        """Of the devices (`HardwareProfile.device_kind`); empty where it is not known."""
        return self.hardware.device_kind if self.hardware else self.kind

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
        return self.software.under(self.strategy.dense.zero).sharding.fsdp

    @property
    def chunks(self) -> int:
        """Dispatch chunks of a layer's routed experts (2 where the training is not known yet)."""
        experts = self.strategy.experts
        if self.training is None:
            return 1 if experts.chunk_tokens == 0 else 2
        tokens = self.training.tokens_per_rank(self.strategy)
        return num_chunks(tokens, experts.chunk_tokens, experts.max_chunks)
