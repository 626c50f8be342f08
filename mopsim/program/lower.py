"""model x strategy x training -> Workload."""

from dataclasses import replace
from functools import partial

from mopsim.graph.flops import flops_per_token
from mopsim.program.context import Context, make_context
from mopsim.program.dispatcher import buffers
from mopsim.program.host_time import Around, by_modules
from mopsim.program.loss import cast_logits, gathered_logits
from mopsim.program.pairs.layer_pairs import Pairs
from mopsim.program.passes import Passes
from mopsim.program.pinned import rounding
from mopsim.program.side_by_side import abreast
from mopsim.program.side_passes import SidePasses
from mopsim.program.step import StageStep
from mopsim.program.workload import Workload
from mopsim.spec.capability import Job, holds, runnable
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

EXPANDED = 3
"""Microbatches lowered where they are all alike: the first, a repeating one and the last."""


def lower(
    model: ModelSpec,
    strategy: Strategy,
    training: TrainSpec,
    domain: int = 8,
    stack: Stack | None = None,
    *,
    architecture: str = "",
    expand: bool = False,
    compose: bool = True,
) -> Workload:
    """The programs of one step. domain: devices of a scale-up domain. stack: that of the strategy where none
    is given. architecture: of the devices. expand: every microbatch and layer is played, none is composed;
    compose: layers are (mopsim.program.composed).

    Raises SpecError where model, strategy, training and stack do not fit together.
    """
    stack = stack or load_stack(strategy.stack, "strategy.stack")
    passes = passes_of(make_context(model, strategy, training, domain, stack, architecture))
    return _lowered(passes, stack, expand=expand, compose=compose)


def _lowered(
    passes: Passes, stack: Stack, *, expand: bool = False, compose: bool = True, rounds: int = 1
) -> Workload:
    """The programs of these templates, which longer ones share. rounds: of the stages of a pipeline, until
    its steady state."""
    context = passes.context
    model, strategy, training = context.model, context.strategy, context.training
    total = training.num_microbatches(strategy)
    unit, expanded = _expansion(strategy, total, rounds)
    expanded = total if expand else expanded
    stages = range(strategy.pipeline.pipeline_parallel)
    programs = tuple(
        StageStep(context, passes, stage, compose=compose and not expand).program(expanded)
        for stage in stages
    )
    if context.stack.host.modules:
        around = Around.of(context, passes.again(), woven=context.weaves)
        programs = tuple(by_modules(program, context.stack, around) for program in programs)
    if stack.host.graphs:
        programs = tuple(replace(program, graphs=stack.host.graphs) for program in programs)
    tokens = training.global_batch * training.seq_len
    flops = 3 * sum(flops_per_token(model, training.seq_len, training.own_document).values()) * tokens
    exact = runnable(strategy, model, training, stack) is None
    again = partial(_lowered, passes, stack, expand=expand, rounds=2 * rounds)
    composed = any(program.repeats for program in programs)
    filled = len(stages) > 1 and expanded < total
    return Workload(
        programs, total, expanded, flops, guarantee(context), unit, exact=exact, pinned=rounding(context),
        whole=partial(again, compose=False) if composed else None,
        longer=partial(again, compose=compose) if filled else None, stack=stack, cast=cast_logits(context),
        gathered=gathered_logits(context), exchange=buffers(context),
    )  # fmt: skip


def passes_of(context: Context) -> Passes:
    """The templates of a program: pairs of operators where it is explicit and has them, else tapes, those of
    sequences side by side."""
    job = Job(context.model, context.strategy, context.training, context.stack)
    if holds("pairs")(job):
        return Pairs(context)
    return SidePasses(context) if abreast(context) > 1 else Passes(context)


def _expansion(strategy: Strategy, total: int, rounds: int) -> tuple[int, int]:
    """(microbatches of a repetition, microbatches lowered): the rest repeats the last repetition but one.

    A pipeline is in its steady state once its stages are full, one of several parts a stage after two rounds
    of them; where that turns out not to be so, after more (`longer`): stages of fewer layers run ahead for a
    while.
    """
    stages, folded = strategy.pipeline.pipeline_parallel, strategy.pipeline.folded
    if stages == 1 and not folded:
        return 1, min(total, EXPANDED + bool(strategy.overlap.experts))
    unit = stages if strategy.pipeline.virtual_stages > 1 and not folded else 1
    base = (2 + rounds) * stages if unit > 1 else (rounds + 2 * folded) * stages + EXPANDED + 1
    return unit, total - unit * max(0, (total - base) // unit)


def guarantee(context: Context) -> int:
    """Dispatch bytes that no routing exceeds: 2 Ep k c_eff H b, H a routed row's width (arXiv 2607.01844)."""
    model = context.model
    if not model.num_local_experts:
        return 0
    routes = context.strategy.experts.expert_parallel * model.num_experts_per_tok * context.chunk_tokens(0)
    return 2 * routes * model.expert_width * context.b
