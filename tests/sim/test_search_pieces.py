"""Parts of candidates stand for those alone that have them, whatever was asked before."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopsim.engine import simulate
from mopsim.program.context import make_context
from mopsim.program.host_time import Around
from mopsim.program.lower import passes_of
from mopsim.search.facts import SpaceFacts
from mopsim.search.layer import _least
from mopsim.search.pieces import DENSE, LAYER, Pieces
from mopsim.search.problem import Problem, lowered, worked_out
from mopsim.search.refined import Refined, alike
from mopsim.search.space import Space
from mopsim.spec.model import every_kind
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES
from tests.sim.spaces import generate, spread
from tests.software import changed


def asked(model: str, nodes: int, batch: int, seq_len: int = 2048, stack: str | None = None) -> Problem:
    spec = load_model(model)
    training, own = TrainSpec(seq_len=seq_len, global_batch=batch), load_stack(stack) if stack else None
    return Problem(spec, load_profile("h200-sxm-141g"), nodes, training, stack=own)


def forget() -> None:
    for cache in (lowered, worked_out):
        cache.cache_clear()


def bounds(space: Space, *groups: list[int]) -> list[float]:
    found, kept = Refined.of(Pieces(space), SpaceFacts.of(space), [np.array(group) for group in groups])
    assert found is not None
    assert len(kept) == len(groups)
    return [float(time) for time in found.time()]


@pytest.mark.parametrize("first", ["woven", "plain"])
def test_a_plain_row_has_not_what_weaving_takes_of_the_host(first: str) -> None:
    problem = asked("qwen3_30b_a3b", 2, 64)
    space = spread(problem, "megatron")
    woven = space.within()[1]
    keys = [tuple(int(space.columns[name][at]) for name in LAYER) for at in range(len(space))]
    of = {keys[at]: int(at) for at in np.flatnonzero(woven)}
    plain = (int(at) for at in np.flatnonzero(space.columns["overlap"] == 0) if keys[at] in of)
    rows = next((of[keys[at]], at) for at in plain)
    rows = rows if first == "woven" else rows[::-1]
    for at, bound in zip(rows, bounds(space, *([at] for at in rows)), strict=True):
        found = simulate(problem.model, problem.hardware, 2, space.build(at), problem.training, space.stack)
        assert bound <= found.step_time * (1 + 1e-9)
    assert len(alike(space.take(np.array(rows)))[1]) == 2


def test_dense_layers_have_not_what_modules_of_experts_take_of_the_host() -> None:
    """Of a program whose layers with experts are compiled module by module; a whole layer is one call."""
    made = []
    for modules in ("routed", False):
        problem = replace(
            asked("llama3_8b", 1, 8), stack=changed("torchtitan-compile", host={"modules": modules})
        )
        layers = Pieces(generate(problem, "fsdp2")).layers(0)
        assert layers is not None
        made.append({kind: (one.ahead, one.back) for kind, one in layers.items()})
    assert made[0] == made[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_share_their_pieces_have_equal_templates(family: str) -> None:
    """Those without experts wherever other layers' are, those that keep their input wherever it waits."""
    problem = asked("tiny", 2, 32)
    pieces, groups, shared = Pieces(spread(problem, family)), dict[object, list[int]](), dict[int, int]()
    for row in np.linspace(0, len(pieces.space) - 1, 400).astype(int).tolist():
        groups.setdefault(pieces.key(row, DENSE), []).append(row)
    for row in (row for some in sorted(groups.values(), key=len)[-6:] for row in some[:5]):
        layers = pieces.layers(row)
        if layers is None:
            continue
        strategy = pieces.space.build(row)
        domain = problem.hardware.scale_up_size
        own = passes_of(make_context(problem.model, strategy, problem.training, domain, pieces.space.stack))
        around = Around.of(own.context, own.again(), woven=own.context.weaves)
        for layer, kind in enumerate(every_kind(problem.model)):
            ways = own.forward(layer), own.backward(layer)
            assert tuple(make() for make in layers[kind].templates) == ways
            prices = pieces.prices
            assert [prices.of(way, around) for way in ways] == [layers[kind].ahead, layers[kind].back]
            shared[id(layers[kind])] = shared.get(id(layers[kind]), 0) + 1
    assert max(shared.values()) > 3  # the three layers with experts of a row are one piece


def test_a_piece_computes_as_long_as_its_passes() -> None:
    layers = Pieces(spread(asked("tiny", 1, 8), "megatron")).layers(0)
    assert layers
    for piece in layers.values():
        assert piece.busy == piece.forward.busy + piece.backward.busy > 0


def test_a_bound_is_the_same_after_another_batch() -> None:
    """Gradients of one microbatch alone are added to none."""

    def one(batch: int) -> float:
        problem = asked("llama3_8b", 1, batch, 512, "universal-llm-trainer")
        return bounds(generate(problem, "megatron"), [0])[0]

    forget()
    alone = one(8)
    forget()
    assert one(64) > alone
    assert one(8) == alone


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=40))
def test_the_first_row_of_a_code_is_the_least_by_one_key_after_the_other(rows: list[tuple[int, ...]]) -> None:
    codes, *keys = np.array(rows, dtype=np.int64).T
    order = np.lexsort((*keys[::-1], codes))
    first = order[np.unique(codes[order], return_index=True)[1]]
    assert _least(codes, *keys).tolist() == first.tolist()


def test_layers_whose_gradients_no_other_rank_sums_are_compiled_whole() -> None:
    """DistributedDataParallel's buckets cut a compiled layer (Stack.cut), which then keeps more."""
    space = spread(asked("llama3_70b", 2, 64, stack="generic-compile"), "megatron")
    pieces = Pieces(space)
    summed: dict[tuple[int, ...], int] = {}
    whole: dict[tuple[int, ...], int] = {}
    for at in np.flatnonzero(space.columns["tensor"] == 8):
        found = whole if space.columns["pipeline"][at] == 2 else summed
        found.setdefault(tuple(int(space.columns[name][at]) for name in LAYER), int(at))
    both = next(key for key in summed if key in whole)
    left = [sum(one.left for one in (pieces.layers(of[both]) or {}).values()) for of in (summed, whole)]
    assert left[0] > left[1] > 0
