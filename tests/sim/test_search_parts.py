"""A family's space is hunted in parts: what it had before it learned more axes first, as if it were all."""

from dataclasses import replace

import numpy as np
import pytest

from mopsim.context.contenders import Contender, contenders
from mopsim.search import Options, driver, search
from mopsim.search.axes import FIRST, within
from mopsim.search.bound import Bounds
from mopsim.search.driver import hunted
from mopsim.search.problem import Axes, Column, Problem
from mopsim.search.result import TIE, SearchResult
from mopsim.search.space import Space
from mopsim.search.staged import parts
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES
from tests.sim.spaces import candidates

FSDP2 = "fsdp2"


def asked(nodes: int = 1) -> Problem:
    training = TrainSpec(seq_len=1024, global_batch=16 * nodes)
    return Problem(load_model("olmoe_1b_7b"), load_profile("h200-sxm-141g"), nodes, training)


def alone(problem: Problem, axes: Axes) -> Axes:
    return within(axes, FIRST[FSDP2])


def in_first(one: Strategy) -> bool:
    whole = one.dense.tensor_parallel == one.pipeline.pipeline_parallel == 1
    return whole and one.activations.recompute != "selective" and not one.activations.save_ops


def rows(*spaces: Space) -> list[tuple[int, ...]]:
    return [tuple(one.row(index).values()) for one in spaces for index in range(len(one))]


@pytest.mark.parametrize("most", [Options.rows, 3_000])
def test_the_parts_are_the_space(most: int) -> None:
    """Also where not all is multiplied out: what neither part has is of the rest."""
    found, (whole, rest) = parts(asked(), FSDP2, most=most), candidates(asked(), FSDP2, most=most)
    every = rows(*(space for space, _ in found))
    assert len(found) == 2
    assert len(set(every)) == len(every)
    assert set(every) >= set(rows(whole))
    assert bool(len(rest.time)) == (most < Options.rows)
    first = found[0][0].columns
    assert all((first[name] == value).all() for name, value in FIRST[FSDP2].items())


def test_what_is_not_multiplied_out_leaves_the_first_part_out() -> None:
    _, (space, rest) = parts(asked(), FSDP2, most=3_000)
    more = rest.under(float(rest.time[-1]) * 2, Options.rows)
    assert more is not None
    for one in (space, more):
        first = [one.columns[name] == value for name, value in FIRST[FSDP2].items()]
        assert not np.logical_and.reduce(first).any()


def test_a_row_of_the_trunk_is_counted_once() -> None:
    """As one candidate while it is not multiplied out, as those that it becomes after that: it stayed a
    candidate that was neither ranked nor rejected."""
    found = search(asked(), Options(("megatron",), budget=4, rows=500))
    assert sum(found.rejected.values()) + len(found.top) == found.candidates
    assert found.bounded <= found.candidates


def test_a_family_that_learned_nothing_has_one_part() -> None:
    for family in FAMILIES:
        assert len(parts(asked(), family)) == 1 + (family in FIRST)


@pytest.mark.parametrize("nodes", [1, 2])
def test_more_axes_are_never_worse(nodes: int) -> None:
    """The first part is hunted as it would be alone with its share of the budget, whatever comes after it."""
    few = hunted(asked(nodes), FSDP2, Options(budget=12, axes=alone)).found
    many = hunted(asked(nodes), FSDP2, Options(budget=16)).found
    assert few.best
    assert many.best
    assert [one.strategy for one in many.played[: len(few.played)]] == [one.strategy for one in few.played]
    assert len(few.played) < len(many.played) <= 16
    assert many.best.step_time <= few.best.step_time * (1 + TIE)


@pytest.mark.parametrize("budget", [1, 2, 3, 40])
def test_a_family_has_one_budget(budget: int) -> None:
    """Whatever its parts are and whether a proof is asked for; each part has some of two simulations."""
    problem = Problem(
        load_model("tiny"), load_profile("cpu-2core"), 2, TrainSpec(seq_len=512, global_batch=4)
    )
    one = hunted(problem, FSDP2, Options(budget=budget, prove=True))
    assert one.found.simulated <= budget
    first = [in_first(played.strategy) for played in one.found.played]
    assert any(first)
    assert all(first) == (budget == 1)


@pytest.mark.parametrize("budget", [3, 6])
def test_the_best_is_tried_without_what_it_has_on_the_host(budget: int) -> None:
    """README's first search printed offload=inputs: its last simulations were of slower plans, where the same
    plan with nothing on the host is as fast and fits."""
    training = TrainSpec(seq_len=32_768, global_batch=64)
    problem = Problem(load_model("qwen3_30b_a3b"), load_profile("h200-sxm-141g"), 2, training)
    found = hunted(problem, "mop", Options(budget=budget)).found
    assert found.best
    assert found.best.host_memory == 0
    assert any(one.host_memory for one in found.played)
    assert found.simulated == budget


@pytest.mark.parametrize(
    "one", [one for one in contenders() if one.family == FSDP2], ids=lambda one: one.name
)
def test_what_a_caller_made_is_one_part(one: Contender) -> None:
    """`context` has always searched tensor parallelism beside all else."""
    problem = replace(asked(2), stack=one.software)
    (space, rest), *others = parts(problem, FSDP2, one.axes)
    assert not others
    assert not len(rest.time)
    assert set(np.unique(space.columns["tensor"])) > {1}


def test_nothing_fits_is_said_of_what_was_not_multiplied_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing that promises most may fit the rest was forgotten, and "nothing fits" called proven."""

    def nothing(bounds: Bounds, space: Space, found: SearchResult) -> Column:
        found.rejected["device memory, bound: grads"] += len(space)
        return np.zeros(0, dtype=np.int64)

    monkeypatch.setattr(driver, "fitting", nothing)  # of what is multiplied out at first
    found = search(asked(), Options(("megatron",), budget=4, rows=500))
    assert found.best
    assert sum(found.rejected.values()) + len(found.top) == found.candidates
