"""A search ranks nothing that its stack lacks, leaves out nothing else, and says what it left out."""

import numpy as np
import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import SpecError
from mopsim.export import TARGETS
from mopsim.search import had as had_module
from mopsim.search.had import Had, had, left_out
from mopsim.search.problem import Problem
from mopsim.search.space import Space, generate
from mopsim.spec.capability import ROWS, Job, refusals
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.tensors import total_params
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES

TINY = load_model("tiny")
TRAINING = TrainSpec(seq_len=512, global_batch=8)
STACKS = ("torchtitan", "megatron-core", "deepspeed", "megatron-lm-2022", "megatron-deepspeed", "halo",
          "mopexec-split", "generic-eager", "torchtitan vocabulary.loss=ring",
          "megatron-core vocabulary.loss=ring",
          *(f"generic-fused activations.recompute={ways}"
            for ways in ("none", "full", "selective", "full,selective", "none,full")))  # fmt: skip
ROWS_TRIED = 60


def problem(stack: str) -> Problem:
    """stack: a name; after a space a field, = and the values of it that a fork of the stack has."""
    name, _, told = stack.partition(" ")
    program = load_stack(name)
    if told:
        field, _, values = told.partition("=")
        program = replace(program, has={**program.has, field: tuple(values.split(","))})
    machine = load_profile("h200-sxm-141g")
    return Problem(TINY, machine, 1, TRAINING, total_params(TINY), stack=program)


def refused(space: Space, index: int) -> bool:
    """Whether a candidate is refused: by its stack, the simulator, or no strategy at all."""
    try:
        strategy = space.build(index)
        space.stack.check_strategy(strategy)
    except SpecError:
        return True
    return any(True for _ in refusals(Job(TINY, strategy, TRAINING, space.stack), by="simulator"))


def codes(space: Space) -> set[tuple[int, ...]]:
    return {
        code(dict(zip(space.columns, row, strict=True))) for row in zip(*space.columns.values(), strict=True)
    }


def code(row: dict[str, int]) -> tuple[int, ...]:
    """The values of a row; what is alone on its sequence exchanges nothing, whatever the column says."""
    return tuple(row[name] if name != "exchange" or row["sequence"] > 1 else 0 for name in row)


@pytest.mark.parametrize("stack", STACKS)
def test_a_space_has_what_its_stack_has_and_all_of_it(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = np.random.default_rng(0)
    spaces = {family: generate(problem(stack), family) for family in FAMILIES}
    monkeypatch.setattr(
        "mopsim.search.space.had", lambda given, family: Had(had_module.every_axis(given, family), [], "", [])
    )
    monkeypatch.setattr("mopsim.search.space.axes_of", had_module.every_axis)
    for family, space in spaces.items():
        for index in choose.permutation(len(space))[:ROWS_TRIED].tolist():
            assert not refused(space, index), (family, space.row(index))
        whole, kept = generate(problem(stack), family), codes(space)
        for index in choose.permutation(len(whole))[: 4 * ROWS_TRIED].tolist():
            assert code(whole.row(index)) in kept or refused(whole, index), (family, whole.row(index))


def test_what_is_left_out_is_named() -> None:
    assert left_out(problem("torchtitan"), "fsdp2") == [
        "torchtitan has no attention.cp_comm_type ulysses; vocabulary.loss chunked: left out"
    ]
    assert (
        "vocabulary.loss is not simulated on the stack torchtitan"
        in had(problem("torchtitan"), "mop").refused
    )
    assert left_out(problem("generic-fused"), "fsdp2") == []


def test_a_search_prints_and_keeps_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = mopsim.search(
        "tiny", "h200-sxm-141g", seq_len=512, global_batch=8, families="fsdp2", stack="torchtitan", budget=3
    )
    assert found.left_out == left_out(problem("torchtitan"), "fsdp2")
    assert found.best is not None
    assert found.best.strategy.vocabulary.loss == "full"


@pytest.mark.parametrize("side", TARGETS)
def test_a_target_takes_no_loss_that_its_stack_lacks(side: str) -> None:
    said = ROWS["strategy.vocabulary.loss"].cells[side].values
    assert set(said or ()) <= set(load_stack(side).has["vocabulary.loss"])


@pytest.mark.parametrize("name", [name for name in list_stacks() if not name.startswith("generic")])
def test_every_program_says_which_losses_it_has(name: str) -> None:
    assert load_stack(name).has["vocabulary.loss"]
