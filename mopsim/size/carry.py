"""A strategy of one cluster on another of the same machines: one degree grows with the ranks."""

from collections.abc import Iterator
from fractions import Fraction
from math import gcd

from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.engine import SimResult
from mopsim.search.least import least_time
from mopsim.search.problem import Problem, divisors
from mopsim.search.simulating import play
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Pipeline, Strategy
from mopsim.strategies import STACKS

EXACT = 1e-6
"""Part by which sums in another order may differ."""


def carried(strategy: Strategy, world_size: int, batch: int) -> Iterator[Strategy]:
    """`strategy` on `world_size` ranks and `batch` sequences, in every form that breaks no rule of its own.

    More ranks become data-parallel ones, or ranks that share a sequence, or (of a plan that has them)
    tensor-parallel ranks or stages, in this order; the other degrees stay. Shards are over the same part of
    the ranks as before, else over as many. Expert-parallel ranks that do not divide the ranks become as many
    of them as do, and more ranks share an expert's state. A microbatch is the largest that divides the batch,
    is no larger than before and leaves each stage one, where there are so many.
    """
    ratio = Fraction(world_size, strategy.world_size)
    seen: list[Strategy] = []
    for degrees in _degrees(strategy, ratio):
        for same_part, fewer in ((True, False), (False, False), (True, True)):
            try:
                found = _form(strategy, world_size, batch, degrees, same_part, fewer=fewer)
            except MopError:
                continue
            if found is not None:
                if found not in seen:
                    seen.append(found)
                    yield found
                break


def _degrees(s: Strategy, ratio: Fraction) -> list[tuple[Fraction, Fraction, Fraction]]:
    """(stages, tensor-parallel ranks, context-parallel ranks) to try."""
    stages, tensor, context = (
        Fraction(one)
        for one in (s.pipeline.pipeline_parallel, s.dense.tensor_parallel, s.attention.context_parallel)
    )
    found = [(stages, tensor, context), (stages, tensor, context * ratio)]
    found += [(stages, tensor * ratio, context)] if tensor > 1 else []
    found += [(stages * ratio, tensor, context)] if stages > 1 else []
    return found


def _form(
    s: Strategy, world_size: int, batch: int, degrees: tuple[Fraction, ...], same_part: bool, *, fewer: bool
) -> Strategy | None:
    """None where a number is not whole. fewer: expert-parallel ranks, so that they divide the ranks."""
    if any(one.denominator > 1 or one < 1 for one in degrees):
        return None
    stages, tensor, context = (int(one) for one in degrees)
    ranks, over = divmod(world_size, stages)
    groups, more = divmod(ranks, tensor * context)
    if over or more or not groups or batch % groups:
        return None
    grown = Fraction(ranks, s.stage_ranks) if same_part else Fraction(1)
    dense, experts = s.dense.fsdp * grown, s.experts.expert_fsdp * grown
    parallel = s.experts.expert_parallel
    if fewer:
        parallel = gcd(parallel, ranks)
        experts *= Fraction(s.experts.expert_parallel, parallel)
    if dense.denominator > 1 or experts.denominator > 1:
        return None
    whole = s.vocabulary.vocab_parallel == s.world_size > 1
    vocabulary = world_size if whole else s.vocabulary.vocab_parallel
    if s.vocabulary.loss == "vocab_parallel":
        vocabulary = vocabulary * tensor // s.dense.tensor_parallel
    each = batch // groups
    most = each // min(stages, each)
    micro_batch = max(one for one in divisors(each) if one <= min(s.micro_batch, most))
    return replace(
        s,
        world_size=world_size,
        micro_batch=micro_batch,
        pipeline=_pipeline(s.pipeline, stages, each // micro_batch),
        dense=replace(s.dense, fsdp=int(dense), tensor_parallel=tensor),
        attention=replace(s.attention, context_parallel=context),
        experts=replace(s.experts, expert_parallel=parallel, expert_fsdp=int(experts)),
        vocabulary=replace(s.vocabulary, vocab_parallel=vocabulary),
    )


def _pipeline(given: Pipeline, stages: int, microbatches: int) -> Pipeline:
    """With other stages the layers are spread anew; interleaving needs multiples of them as microbatches."""
    if given.virtual_stages > 1 and microbatches % stages:
        return Pipeline(pipeline_parallel=stages)
    return given if stages == given.pipeline_parallel else replace(given, pipeline_parallel=stages, layers=())


def played(problem: Problem, strategy: Strategy, stack: Stack) -> SimResult | None:
    """The simulated step; None where a rule refuses the strategy here."""
    try:
        return play(problem, strategy, stack)
    except MopError:
        return None


def slower(problem: Problem, strategy: Strategy, stack: Stack, within: float) -> bool:
    """Whether a bound says that a step takes longer than `within` seconds."""
    used = stack.on_kind(problem.hardware.device_kind)
    if strategy.name not in STACKS or problem.software(strategy.name) != used:
        return False
    return least_time(problem, used.resolve(replace(strategy, stack=used.name))) > (1 + EXACT) * within
