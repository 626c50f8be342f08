"""The space holds what people run; what is not multiplied out is bounded from below."""

from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import pytest

import mopsim
from mopsim.common.errors import SpecError
from mopsim.engine import simulate
from mopsim.search import Options, search, staged
from mopsim.search.axes import MINOR
from mopsim.search.bound import Bounder, bound
from mopsim.search.coarse import coarse
from mopsim.search.facts import SpaceFacts
from mopsim.search.guess import guess
from mopsim.search.had import axes_of
from mopsim.search.legal import expanded, minor_of, trunk
from mopsim.search.problem import PARTS, Problem
from mopsim.search.result import TIE
from mopsim.search.seeds import Recipe, published, recipes, textbook
from mopsim.search.space import Space
from mopsim.search.staged import bounds_of, facts_of
from mopsim.search.stages import BALANCED, ENDS, EVEN, FRONT, WEIGHTED, layers_of, lighter
from mopsim.spec.layer_fields import dense_fields
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES
from tests.sim.spaces import candidates, generate, spread

LLAMA_405B = ModelSpec(
    name="llama31_405b", hidden_size=16384, num_hidden_layers=126, num_attention_heads=128,
    num_key_value_heads=8, head_dim=128, vocab_size=128256, intermediate_size=53248,
)  # fmt: skip
"""https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json"""


def problem(recipe: Recipe) -> Problem:
    """The run of a recipe."""
    model = load_model(recipe.model) if recipe.model in list_models() else LLAMA_405B
    hardware = load_profile(recipe.hardware)
    training = TrainSpec(seq_len=recipe.seq_len, global_batch=recipe.global_batch)
    nodes = recipe.devices // hardware.devices_per_node
    return Problem(model, hardware, nodes, training)


def rows_of(recipe: Recipe, space: Space, free: set[str]) -> np.ndarray:
    """Rows that have all that a recipe says, but of free columns."""
    return np.flatnonzero(
        np.logical_and.reduce([mask for name, mask in recipe.masks(space) if name not in free])
    )


def own_space(recipe: Recipe) -> tuple[Space, int]:
    """The part of the recipe's space around it, and its own place there."""
    asked = problem(recipe)
    axes = axes_of(asked, recipe.family)
    free = {name for key in minor_of(axes) for name in MINOR[key].columns}
    first = trunk(asked, recipe.family, axes)
    around = expanded(first.take(rows_of(recipe, first, free)), axes)
    found = rows_of(recipe, around, set())
    assert len(found)
    return around, int(found[0])


NAMED = [f"{one.model}-{one.hardware}-{one.devices}-{one.global_batch}" for one in recipes()]


@pytest.mark.parametrize("recipe", recipes(), ids=NAMED)
def test_a_published_recipe_is_in_the_space_of_its_run_and_comes_first(recipe: Recipe) -> None:
    space, place = own_space(recipe)
    strategy = space.build(place)
    strategy.check_model(space.problem.model)
    space.problem.training.check_strategy(strategy)
    assert strategy.pipeline.pipeline_parallel == recipe.pipeline
    assert strategy.experts.expert_parallel == recipe.experts
    assert strategy.activations.modules == recipe.modules
    assert place in published(space, guess(space))
    assert 0.5 < space.problem.total_params / (recipe.parameters * 1e9) < 2


SEARCHED = {"deepseek_v3": "gb300-288g", "gpt_oss_120b": "b200-sxm-192g"}
"""Latent attention, MTP layers and dense ones; experts beside grouped heads."""


ROWS = 20_000
"""A twentieth of what a search multiplies out: what promises most is in it."""


@pytest.fixture
def few_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What promises most is told by a sixth of the layers that a search makes for it."""
    monkeypatch.setattr(staged, "KNOWN", 100)


@pytest.mark.usefixtures("few_known")
@pytest.mark.parametrize("model", SEARCHED)
def test_the_search_is_no_worse_than_a_published_recipe(model: str) -> None:
    recipe = next(one for one in recipes() if (one.model, one.hardware) == (model, SEARCHED[model]))
    space, place = own_space(recipe)
    asked = space.problem
    own = simulate(asked.model, asked.hardware, asked.num_nodes, space.build(place), asked.training)
    options = Options(("megatron",), budget=4, risk=True, rows=ROWS)
    found = search(asked, options)
    assert found.best is not None
    assert not own.fits or found.best.step_time <= own.step_time * (1 + TIE)


@pytest.mark.parametrize(
    ("layers", "mtp", "stages", "virtual", "layout", "expected"),
    [
        (61, 1, 8, 4, ENDS, (1, *[2] * 30, 0)),
        (61, 0, 16, 2, ENDS, (1, *[2] * 30, 0)),
        (61, 1, 4, 4, FRONT, (*[4] * 15, 1)),
        (61, 0, 8, 1, FRONT, (*[8] * 7, 5)),
        (126, 0, 16, 8, ENDS, (0, *[1] * 126, 0)),
        (94, 0, 8, 4, ENDS, (2, *[3] * 30, 2)),
        (80, 0, 4, 5, FRONT, None),
        (80, 0, 4, 5, EVEN, ()),
        (30, 0, 4, 8, ENDS, (0, *[1] * 30, 0)),
        (36, 0, 32, 1, FRONT, None),
        (8, 0, 4, 4, EVEN, None),
        (48, 0, 16, 1, BALANCED + 3, (*[3] * 12, *[4] * 3, 0)),
        (48, 0, 4, 1, BALANCED + 2, (12, 13, 13, 10)),
        (48, 0, 4, 4, BALANCED + 3, (*[3] * 12, 4, 4, 4, 0)),
        (48, 0, 4, 4, BALANCED + 5, (3, 3, 3, 2, *[3, 3, 3, 2], 3, 4, 4, 3, 4, 4, 4, 0)),
        (94, 0, 8, 12, BALANCED + 3, None),
        (48, 0, 16, 1, BALANCED + 4, None),
        (48, 0, 1, 1, BALANCED + 1, None),
    ],
)
def test_layouts(
    layers: int, mtp: int, stages: int, virtual: int, layout: int, expected: tuple[int, ...] | None
) -> None:
    model = ModelSpec(
        name="some", hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, vocab_size=128, intermediate_size=64, num_nextn_predict_layers=mtp,
    )  # fmt: skip
    assert layers_of(model, stages, virtual, layout) == expected


HALVES = msgspec.structs.replace(
    load_model("qwen3_30b_a3b"), intermediate_size=2048, total_params=None, active_params=None,
    **dense_fields(range(24), 48),
)  # fmt: skip
"""Dense layers, and after them as many with experts."""


def test_layers_that_weigh_less_are_more_of_a_part() -> None:
    assert layers_of(HALVES, 4, 1, WEIGHTED + 3) == (18, 12, 10, 8)
    assert layers_of(load_model("qwen3_30b_a3b"), 3, 1, WEIGHTED + 1) is None
    turns = msgspec.structs.replace(HALVES, **dense_fields(range(0, 48, 2), 48))
    assert layers_of(turns, 3, 1, WEIGHTED + 1) == (17, 16, 15)


def test_stages_of_layers_that_weigh_less_have_more_of_them() -> None:
    """The step of an even pipeline is that of its stages with experts."""
    space = balanced_rows(8, HALVES)
    c, problem = space.columns, space.problem
    rows = np.flatnonzero((c["layout"] >= WEIGHTED) & (c["virtual_stages"] == 1) & (c["overlap"] == 0))
    strategy = space.build(int(rows[0]))
    even = msgspec.structs.replace(strategy, pipeline=msgspec.structs.replace(strategy.pipeline, layers=()))
    ours, theirs = (
        simulate(problem.model, problem.hardware, problem.num_nodes, one, problem.training)
        for one in (strategy, even)
    )
    assert strategy.pipeline.layers[0] > strategy.pipeline.layers[-1]
    assert ours.step_time < 0.9 * theirs.step_time


def balanced_rows(pipeline: int, model: ModelSpec | None = None) -> Space:
    """Of a network whose loss takes as long as some three layers, or another."""
    case = ("qwen3_30b_a3b", "l40s-48g", 4, 4096, 512, "megatron")
    given, wanted = asked(case), {"pipeline": pipeline, "tensor": 1, "sequence": 1, "recompute": 1}
    if model:
        given = replace(given, model=model)
    axes = axes_of(given, "megatron")
    first = trunk(given, "megatron", axes)
    kept = np.logical_and.reduce([first.columns[name] == value for name, value in wanted.items()])
    return expanded(first.take(np.flatnonzero(kept)), axes)


def test_the_loss_counts_as_the_layers_that_it_takes() -> None:
    """48 layers on 16 stages, even: the last has three and the loss. Of a balanced row no layout has a lower
    bound, and the step is a quarter shorter."""
    space = balanced_rows(16)
    c, given = space.columns, SpaceFacts.of(space)
    rows = space.take(np.flatnonzero((c["layout"] > BALANCED) & (c["virtual_stages"] == 1)))
    assert len(rows)
    turn = rows.having(overlap=0)
    chosen = Bounder(turn, given).time()
    for layout in (EVEN, *lighter(space.problem.model, 16, 1)):
        assert (chosen <= Bounder(turn.having(layout=layout), given).time() * 1.02).all()
    alone = np.flatnonzero((rows.columns["experts"] == 1) & (rows.columns["micro_batch"] == 2))
    strategy = rows.build(int(alone[0]))
    assert strategy.pipeline.layers[-1] == 0
    problem = space.problem
    even = msgspec.structs.replace(strategy, pipeline=msgspec.structs.replace(strategy.pipeline, layers=()))
    ours, theirs = (
        simulate(problem.model, problem.hardware, problem.num_nodes, one, problem.training)
        for one in (strategy, even)
    )
    assert ours.step_time < 0.8 * theirs.step_time


def test_a_balanced_layout_is_tried_only_where_no_other_is_as_good() -> None:
    """One layout beside those of the other rules, and none equal to one of theirs."""
    space = balanced_rows(4)
    c, model = space.columns, space.problem.model
    rows = {tuple(space.row(index).values()) for index in range(0, len(space), 7)}
    assert len(rows) == len(range(0, len(space), 7))
    laid = {*zip(c["virtual_stages"].tolist(), c["layout"].tolist(), strict=True)}
    for virtual, layout in laid:
        if layout > BALANCED:
            own = layers_of(model, 4, virtual, layout)
            assert own not in [layers_of(model, 4, virtual, other) for other in (EVEN, ENDS, FRONT)]
    assert not (c["layout"] == BALANCED).any()


CASES = (
    ("tiny", "cpu-2core", 2, 512, 16, "megatron"),
    ("qwen3_30b_a3b", "h100-sxm-80g", 4, 4096, 256, "megatron"),
    ("deepseek_v3", "gb200-186g", 64, 4096, 4096, "megatron"),
    ("deepseek_v3", "h200-sxm-141g", 16, 32768, 128, "mop"),
    ("mixtral_8x7b", "h100-sxm-80g", 1, 8192, 64, "megatron"),
    ("qwen3_30b_a3b", "h100-sxm-80g", 4, 4096, 256, "fsdp2"),
)


def asked(case: tuple[str, str, int, int, int, str]) -> Problem:
    name, hardware, nodes, seq_len, batch, _ = case
    model = load_model(name)
    training = TrainSpec(seq_len=seq_len, global_batch=batch)
    return Problem(model, load_profile(hardware), nodes, training)


@pytest.mark.usefixtures("few_known")
def test_a_proven_plan_is_not_beaten_by_a_lighter_last_stage() -> None:
    """Of 51.4 s, proven, a plan of the same family with no layer beside the loss took 37.9 s."""
    given = asked(("qwen3_30b_a3b", "l40s-48g", 4, 4096, 512, "megatron"))
    found = search(given, Options(("megatron",), rows=ROWS))
    assert found.proven
    assert found.best is not None
    assert found.best.step_time < 37.9


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_multiplied_out_is_bounded_below_all_that_it_stands_for(
    case: tuple[str, str, int, int, int, str],
) -> None:
    given = asked(case)
    axes = axes_of(given, case[-1])
    first = trunk(given, case[-1], axes)
    rows = np.linspace(0, len(first) - 1, 60).astype(int)
    some = first.take(rows)
    time, miss = bounds_of(some, axes)
    fits, over = np.flatnonzero(miss <= 1), np.flatnonzero(miss > 1)
    hardware = given.hardware
    numbered = Space(some.family, some.problem, some.columns | {"place": np.arange(len(some))})
    parts = [(fits, facts_of(some.take(fits), axes) if len(fits) else None)]
    for places, facts in parts + [
        (over[at : at + 1], None) for at in range(len(over))
    ]:  # by facts of its own
        space = expanded(numbered.take(places), axes)
        mine = bound(space, facts)
        shares = np.maximum(mine.device / hardware.memory_limit(), mine.host / max(hardware.host_limit(), 1))
        for place in places:
            rows = space.columns["place"] == place
            fast = mine.time[rows & (shares <= 1)]
            assert time[place] <= fast.min(initial=np.inf) * (1 + 1e-9)
            assert miss[place] <= shares[rows].min(initial=np.inf) * (1 + 1e-9)


LARGE = pytest.mark.xdist_group("large space")


@cache
def large() -> tuple[Space, np.ndarray]:
    space, rest = candidates(asked(CASES[1]), "megatron")
    return space, rest.time


@LARGE
def test_a_large_space_keeps_seeds_and_counts_the_rest() -> None:
    """Experts inside a node, one sequence a microbatch, 1 to 16 stages, with and without recomputation."""
    space, rest = large()
    assert len(rest) > 0
    assert len(space) < 500_000
    seeds = [space.row(place) for place in textbook(space, guess(space))]
    for stages in (1, 2, 4, 8, 16):
        for again in (0, 1):
            assert any(
                row["pipeline"] == stages and row["recompute"] == again and row["micro_batch"] == 1
                and row["tensor"] == 1 and row["experts"] <= 8
                for row in seeds
            )  # fmt: skip


@LARGE
def test_rows_of_a_large_space_are_legal_strategies() -> None:
    space, _ = large()
    given = space.problem
    for index in np.linspace(0, len(space) - 1, 150).astype(int):
        strategy = space.build(int(index))
        strategy.check_model(given.model)
        given.training.check_strategy(strategy)
    assert {name for name, column in space.columns.items() if len(np.unique(column)) > 1} >= {
        "virtual_stages", "layout", "modules", "dispatcher", "overlap", "exchange", "expert_tensor",
    }  # fmt: skip


@pytest.mark.parametrize(("seq_len", "global_batch", "nodes"), [(513, 7, 1), (1, 1, 1), (512, 8, 4096)])
def test_a_whole_space_without_candidates_is_no_error(seq_len: int, global_batch: int, nodes: int) -> None:
    training = TrainSpec(seq_len=seq_len, global_batch=global_batch)
    odd = replace(asked(CASES[0]), num_nodes=nodes, training=training)
    for family in FAMILIES:
        assert generate(odd, family).rejected


def test_no_candidates_is_no_error() -> None:
    """A batch that no layout divides: 7 sequences over 2 ranks of a sequence that cannot be split."""
    tiny = asked(CASES[0])
    odd = replace(tiny, num_nodes=1, training=TrainSpec(seq_len=511, global_batch=7))
    for family in FAMILIES:
        space, rest = candidates(odd, family)
        assert len(space) + len(rest.time) == 0 or family in ("fsdp2", "megatron")
    found = search(odd, Options(("zero_offload",), budget=2))
    assert found.best is None


@pytest.mark.parametrize("case", CASES)
def test_a_coarse_space_is_a_part_of_the_whole_one(case: tuple[str, str, int, int, int, str]) -> None:
    given, family = asked(case), case[-1]
    every = axes_of(given, family)
    for key, values in coarse(given, every).items():
        assert len(values)
        assert set(values) <= set(every[key])
    first = trunk(given, family, every)
    some = first.take(np.linspace(0, len(first) - 1, 50).astype(int))
    numbered = Space(some.family, some.problem, some.columns | {"place": np.arange(len(some))})
    left = expanded(numbered, coarse(given, every)).columns["place"]
    assert set(left.tolist()) == set(range(len(some)))


def test_a_small_space_is_whole() -> None:
    given = asked(CASES[0])
    space, rest = candidates(given, "megatron")
    assert not len(rest.time)
    assert len(space) == len(generate(given, "megatron"))
    rows = {tuple(space.row(index).values()) for index in range(len(space))}
    assert len(rows) == len(space)


@LARGE
def test_part_of_the_optimizer_may_be_on_the_host_where_it_is_large() -> None:
    columns = spread(asked(CASES[4]), "megatron").columns
    assert set(zip(columns["state"].tolist(), columns["state_parts"].tolist(), strict=True)) == {
        (0, PARTS), (2, PARTS // 2), (2, PARTS),
    }  # fmt: skip
    assert set(spread(asked(CASES[1]), "megatron").columns["state"].tolist()) == {0}


def test_strided_experts_lie_apart() -> None:
    given = asked(CASES[3])
    axes = axes_of(given, "mop")
    first = trunk(given, "mop", axes)
    space = expanded(first.take(np.flatnonzero(first.columns["experts"] == 8)[:1]), axes)
    places = {space.build(index).experts.rank_placement for index in range(len(space))}
    assert places == {"contiguous", "strided"}


def test_a_layout_that_cannot_be_is_refused_by_name() -> None:
    space, place = own_space(recipes()[0])
    with pytest.raises(SpecError, match="virtual_stages 20 is more than num_hidden_layers 61"):
        space.having(**space.row(place) | {"virtual_stages": 20}).build(0).check_model(space.problem.model)


def test_a_family_that_a_stack_has_nothing_of_is_refused_at_once() -> None:
    """The program shards gradients, whatever Megatron's other values are."""
    found = mopsim.search(
        "tiny", "h200-sxm-141g", seq_len=512, global_batch=8, families="megatron", stack="torchtitan"
    )
    assert found.best is None
    assert found.found.candidates == sum(found.found.rejected.values())
    (reason,) = found.found.rejected
    assert reason.startswith("strategy.dense.zero must be 2 or 3 under the stack torchtitan")
