"""Full recomputation of some layers of each model chunk (activations.recompute_num_layers)."""

from typing import Any

import msgspec
import pytest

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, simulate
from mopsim.program import lower
from mopsim.spec.layout import not_recomputed
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron

H100 = load_profile("h100-sxm-80g")
LAYERS = 16
MIXTRAL = msgspec.structs.replace(load_model("mixtral_8x7b"), num_hidden_layers=LAYERS)
TRAINING = TrainSpec(seq_len=4096, global_batch=16)
LAYOUTS: dict[str, tuple[Any, dict[str, int]]] = {
    "fsdp2": (fsdp2, {"expert_parallel": 8}),
    "one stage": (megatron, {"expert_parallel": 8}),
    "stages": (megatron, {"pipeline_parallel": 4, "expert_parallel": 2}),
    "stages in turn": (megatron, {"pipeline_parallel": 2, "virtual_stages": 2, "expert_parallel": 4}),
}


def _with(name: str, layers: int) -> Strategy:
    make, degrees = LAYOUTS[name]
    found: Strategy = make(8, recompute="full", recompute_num_layers=layers, **degrees)
    return found


def _chunk(strategy: Strategy) -> int:
    return LAYERS // (strategy.pipeline.pipeline_parallel * strategy.pipeline.virtual_stages)


def _simulated(strategy: Strategy) -> SimResult:
    return simulate(MIXTRAL, H100, 1, strategy, TRAINING)


@pytest.mark.parametrize("name", LAYOUTS)
def test_work_and_memory_lie_between_none_and_all(name: str) -> None:
    """FLOP that run again grow with the layers; of memory each layer that is kept has as much more."""
    whole = _with(name, 0)
    chunk = _chunk(whole)
    some = [_with(name, layers) for layers in (1, chunk // 2, chunk)]
    none = msgspec.structs.replace(
        whole, activations=msgspec.structs.replace(whole.activations, recompute="none")
    )
    again = [_flops_again(one) for one in (*some, whole)]
    assert again == pytest.approx([again[0] * layers for layers in (1, chunk // 2, chunk, chunk)], rel=1e-9)
    results = [_simulated(one) for one in (none, *some)]
    times, peaks = [one.step_time for one in results], [one.peak_memory for one in results]
    assert times == sorted(times)
    assert peaks == sorted(peaks, reverse=True)
    assert results[-1].step_time == _simulated(whole).step_time
    assert results[-1].peak_memory == _simulated(whole).peak_memory


def _flops_again(strategy: Strategy) -> float:
    """Of all stages."""
    programs = lower(MIXTRAL, strategy, TRAINING, compose=False).programs
    return sum(
        work.flops for one in programs for op in one.ops if op.phase == "recompute" for work in op.work
    )


def test_the_first_layers_of_each_chunk_run_again() -> None:
    model = msgspec.structs.replace(MIXTRAL, num_nextn_predict_layers=1)
    assert not_recomputed(_with("stages in turn", 0), model) == frozenset()
    kept = not_recomputed(_with("stages in turn", 3), model)
    assert kept == {3, 7, 11, 15, 16}  # the last is the MTP layer


@pytest.mark.parametrize(
    ("activations", "rule"),
    [
        ({"recompute": "none", "recompute_num_layers": 2}, "needs activations.recompute full, not none"),
        ({"recompute": "selective", "recompute_num_layers": 2}, "needs activations.recompute full"),
        ({"recompute": "full", "recompute_num_layers": -1}, "must be"),
    ],
)
def test_it_is_refused_beside_other_recomputation(activations: dict[str, Any], rule: str) -> None:
    plain = msgspec.to_builtins(fsdp2(8))
    plain["activations"].update(activations)
    with pytest.raises((SpecError, msgspec.ValidationError), match=rule):
        msgspec.convert(plain, Strategy)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_that_run_again_are_at_most_those_of_a_chunk(name: str) -> None:
    chunk = _chunk(_with(name, 0))
    rule = f"recompute_num_layers: {chunk + 1} is more than the {chunk} layers of a model chunk; 0 recomputes"
    with pytest.raises(SpecError, match=rule):
        _simulated(_with(name, chunk + 1))


def test_the_largest_of_uneven_chunks_counts() -> None:
    uneven = msgspec.structs.replace(_with("stages", 6).pipeline, layers=(6, 5, 3, 2))
    msgspec.structs.replace(_with("stages", 6), pipeline=uneven).check_model(MIXTRAL)
    with pytest.raises(SpecError, match="7 is more than the 6 layers of a model chunk"):
        msgspec.structs.replace(_with("stages", 7), pipeline=uneven).check_model(MIXTRAL)
