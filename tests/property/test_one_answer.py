"""One strategy has one answer, however a value that means the same is written."""

from collections.abc import Callable

import msgspec
import pytest

from mopsim.spec.strategy import Strategy
from tests.property.drawn import play, random_strategies

replace = msgspec.structs.replace
Synonym = Callable[[Strategy], Strategy]


def _in(part: str, **fields: object) -> Synonym:
    return lambda strategy: replace(
        strategy, **{part: replace(getattr(strategy, part), **fields)}
    )  # fmt: skip


SYNONYMS: dict[str, tuple[Callable[[Strategy], bool], Synonym]] = {
    "the recipe is what computes": (
        lambda s: s.precision.matmul == "compute",
        lambda s: _in("precision", matmul=s.precision.compute)(s),
    ),
    "all of the state but a millionth": (
        lambda s: s.optimizer.state_tier == "host",
        _in("optimizer", host_fraction=0.999999),
    ),
    "operands of a recipe that is none": (
        lambda s: s.precision.matmul == "compute",
        _in("precision", attention="matmul", vocabulary="matmul"),
    ),
    "one slice of all tokens": (lambda s: not s.dense.chunk_tokens, _in("dense", chunk_tokens=2**20)),
    "one chunk of all tokens": (lambda s: not s.experts.chunk_tokens, _in("experts", chunk_tokens=2**20)),
    "one strip of all logits": (
        lambda s: not s.vocabulary.chunk_tokens,
        _in("vocabulary", chunk_tokens=2**20),
    ),
    "an exchange among one": (
        lambda s: s.attention.context_parallel == 1,
        _in("attention", cp_comm_type="ring"),
    ),
    "an order of one": (
        lambda s: s.attention.context_parallel == 1,
        _in("attention", rank_placement="strided"),
    ),
    "a dispatcher among one": (
        lambda s: s.experts.expert_parallel == 1,
        _in("experts", token_dispatcher="deepep"),
    ),
    "a schedule of one stage": (
        lambda s: s.pipeline.pipeline_parallel == 1,
        _in("pipeline", schedule="interleaved"),
    ),
    "a budget that nothing exceeds": (
        lambda s: not s.activations.host_budget,
        _in("activations", host_budget=2**50),
    ),
    "sends among one stage": (lambda s: s.pipeline.pipeline_parallel == 1, _in("overlap", pipeline=True)),
    "regions of one rank": (lambda s: s.dense.tensor_parallel == 1, _in("overlap", tensor=True)),
    "a sequence split of one": (
        lambda s: s.dense.tensor_parallel == 1,
        _in("dense", sequence_parallel=False),
    ),
}
"""What means the same: (where it does, the strategy written so)."""

DRAWN = dict(random_strategies(12, seed=5))


def _moved(name: str) -> dict[str, tuple[float, float]]:
    """(time, peak) by which a synonym moves a strategy, in per cent, where it does."""
    applies, write, found = *SYNONYMS[name], {}
    for case, (model, strategy, training, nodes) in DRAWN.items():
        if applies(strategy):
            first = play((model, strategy, training, nodes))
            second = play((model, write(strategy), training, nodes))
            time = 100 * (second.step_time / first.step_time - 1)
            peak = 100 * (second.peak_memory / first.peak_memory - 1)
            if abs(time) > 0.1 or abs(peak) > 0.1:
                found[case] = (round(time, 2), round(peak, 2))
    return found


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_synonym_moves_nothing(name: str) -> None:
    assert not _moved(name)
