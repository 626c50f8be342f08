"""model x strategy x training -> Workload."""

from mopsim.layers.flops import flops_per_token
from mopsim.lowering.context import Context, make_context
from mopsim.lowering.flat.step import FlatStep
from mopsim.lowering.fsdp.step import FsdpStep
from mopsim.lowering.tapes.step import Step
from mopsim.lowering.workload import Workload
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

EXPANDED = 3
"""Microbatches lowered where they are all alike: the first, a repeating one and the last."""


def lower(
    model: ModelSpec, strategy: Strategy, training: TrainSpec, domain: int = 8, *, expand: bool = False
) -> Workload:
    """The programs of one step. domain: devices of a scale-up domain. expand: lower every microbatch,
    compose none.

    Raises SpecError where model, strategy and training do not fit together.
    """
    context = make_context(model, strategy, training, domain)
    total = training.num_microbatches(strategy)
    expanded = total if expand else min(total, EXPANDED)
    kind: type[FlatStep | FsdpStep | Step] = Step
    if (
        _plain(context)
        and strategy.runtime == "fully_shard"
        and strategy.activations.recompute != "selective"
    ):
        kind = FsdpStep
    elif _plain(context) and strategy.activations.recompute == "full" and strategy.dense.zero == 3:
        kind = FlatStep
    program = kind(context).program(expanded)
    tokens = training.global_batch * training.seq_len
    flops = 3 * sum(flops_per_token(model, training.seq_len).values()) * tokens
    return Workload((program,), total, expanded, flops, guarantee(context))


def _plain(context: Context) -> bool:
    """Whether the executor's own schedules cover model and strategy; others are lowered from the layers'
    tapes."""
    strategy, model = context.strategy, context.model
    known = model.attention == "gqa" and model.ffn_matrices == 3 and "head" in context.edges
    return known and strategy.dense.tensor == 1 and strategy.vocabulary.loss != "vocab_parallel"


def guarantee(context: Context) -> int:
    """Dispatch bytes that no routing exceeds: 2 Ep k c_eff H b (arXiv 2607.01844)."""
    model = context.model
    if not model.num_local_experts:
        return 0
    return (
        2
        * context.strategy.experts.degree
        * model.num_experts_per_tok
        * context.chunk_tokens(0)
        * model.hidden_size
        * context.b
    )
