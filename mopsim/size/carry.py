"""A strategy of one cluster on another of the same machines: shards grow with the ranks, degrees stay."""

from collections.abc import Iterator

from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.engine import SimResult, simulate
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


def carried(strategy: Strategy, world_size: int) -> Iterator[Strategy]:
    """`strategy` on `world_size` ranks: tensor, pipeline, context and expert degrees as they are. First with
    shards and vocabulary groups over the same part of all ranks, then over as many ranks as before; what
    breaks a rule of the strategy is left out."""
    seen: list[Strategy] = []
    for grows in (True, False):
        ratio = world_size / strategy.world_size if grows else 1.0
        try:
            found = _scaled(strategy, world_size, ratio)
        except MopError:
            continue
        if found is not None and found not in seen:
            seen.append(found)
            yield found


def _scaled(strategy: Strategy, world_size: int, ratio: float) -> Strategy | None:
    """None where a degree is no whole number."""
    s = strategy
    dense, experts = s.dense.fsdp * ratio, s.experts.expert_fsdp * ratio
    whole = s.vocabulary.vocab_parallel == s.world_size and s.world_size > 1
    vocabulary = world_size if whole else s.vocabulary.vocab_parallel
    if dense % 1 or experts % 1 or world_size % s.pipeline.pipeline_parallel or min(dense, experts) < 1:
        return None
    return replace(
        s,
        world_size=world_size,
        dense=replace(s.dense, fsdp=int(dense)),
        experts=replace(s.experts, expert_fsdp=int(experts)),
        vocabulary=replace(s.vocabulary, vocab_parallel=vocabulary),
    )


def played(
    model: ModelSpec,
    hardware: HardwareProfile,
    nodes: int,
    strategy: Strategy,
    training: TrainSpec,
    stack: Stack,
) -> SimResult | None:
    """The simulated step; None where a rule refuses the strategy here."""
    try:
        strategy.check_model(model)
        training.check_strategy(strategy)
        return simulate(model, hardware, nodes, strategy, training, stack)
    except MopError:
        return None
