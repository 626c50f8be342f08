"""TrainSpec: what is trained on, independent of how it is parallelised."""

import math
import re

from mopsim.spec.errors import require
from mopsim.spec.io import Spec
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy


def _is_skew(routing: str) -> bool:
    match = re.fullmatch(r"(\d{1,3})/[1-9]\d*", routing)
    return match is not None and int(match.group(1)) <= 100


class TrainSpec(Spec, frozen=True, kw_only=True):
    """One optimizer step trains on `global_batch` sequences of `seq_len` tokens.

    routing: how tokens choose experts where no router decides (simulation and dry run): "balanced", or "r/h":
    the first r % of token positions choose experts j mod h for j < top_k (see layout.routed_expert).
    """

    seq_len: int
    global_batch: int
    routing: str = "balanced"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_update_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, "seq_len", self.seq_len, "must be at least 1")
        require(self.global_batch >= 1, "global_batch", self.global_batch, "must be at least 1")
        require(
            self.routing == "balanced" or _is_skew(self.routing),
            "routing",
            self.routing,
            "must be 'balanced' or 'r/h' with r a percentage and h a number of experts",
        )
        for field in ("seq_len", "global_batch"):
            require(getattr(self, field) <= 2**40, field, getattr(self, field), "must be at most 2^40")
        for field in (
            "learning_rate",
            "eps",
            "warmup_steps",
            "weight_decay",
            "clip_norm",
            "bias_update_rate",
        ):
            require(
                math.isfinite(getattr(self, field)), field, getattr(self, field), "must be a finite number"
            )
        for field in ("learning_rate", "eps"):
            require(getattr(self, field) > 0, field, getattr(self, field), "must be positive")
        for field in ("warmup_steps", "weight_decay", "clip_norm", "bias_update_rate", "seed"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative")
        for field in ("beta1", "beta2"):
            require(0 <= getattr(self, field) < 1, field, getattr(self, field), "must lie in [0, 1)")

    def check_model(self, model: ModelSpec) -> None:
        """Raise SpecError where the routing does not fit the model's experts."""
        if self.routing != "balanced":
            hot = int(self.routing.split("/")[1])
            rule = f"has more hot experts than num_local_experts {model.num_local_experts}"
            require(hot <= model.num_local_experts, "training.routing", self.routing, rule)

    def check_strategy(self, strategy: Strategy) -> None:
        """Raise SpecError where the batch or the sequence does not divide over the strategy's ranks."""
        per_step = strategy.micro_batch * strategy.data_groups
        require(
            self.global_batch % per_step == 0,
            "training.global_batch",
            self.global_batch,
            f"is not a multiple of micro_batch {strategy.micro_batch} x data groups {strategy.data_groups}",
        )
        pipeline = strategy.pipeline
        require(
            pipeline.virtual_stages == 1 or self.num_microbatches(strategy) % pipeline.degree == 0,
            "training.global_batch",
            self.global_batch,
            f"makes {self.num_microbatches(strategy)} microbatches, not a multiple of pipeline.degree "
            f"{pipeline.degree} as interleaving needs",
        )
        dense = strategy.dense
        split = strategy.attention.sequence * (dense.tensor if dense.sequence_parallel else 1)
        require(
            self.seq_len % split == 0,
            "training.seq_len",
            self.seq_len,
            f"is not a multiple of the sequence split {split}",
        )

    def num_microbatches(self, strategy: Strategy) -> int:
        """Microbatches that one data group works through in a step."""
        return self.global_batch // (strategy.micro_batch * strategy.data_groups)

    def tokens_per_rank(self, strategy: Strategy) -> int:
        """N: tokens of one microbatch that one rank owns outside tensor-parallel regions."""
        return self.seq_len * strategy.micro_batch // strategy.attention.sequence
