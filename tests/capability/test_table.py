"""The capability table names every field of the specs, and only values that the specs have."""

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from mopsim.common.io import leaves as flat
from mopsim.export import TARGETS
from mopsim.spec.capability import EXPORTS, ROWS, SIDES, Job, holds, not_run, refusals, runnable
from mopsim.spec.capability.expressions import CONDITIONS, compiled
from mopsim.spec.capability.rules import ALL_RULES, value_at
from mopsim.spec.capability.table import RUNTIMES
from mopsim.spec.kernels import Kernels
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop, zero_offload
from tests.capability.enumerated import REPRESENTATIVE, ROOTS, leaves, values

FIELDS = {path: kind for noun in ROOTS for path, kind in leaves(noun)}


def test_every_field_has_a_row_and_every_row_a_field() -> None:
    assert set(ROWS) == set(FIELDS)


@pytest.mark.parametrize("side", SIDES)
def test_a_row_names_values_that_the_field_can_have(side: str) -> None:
    """A runtime may differ from the default only where the family that it runs says so."""
    for path, row in ROWS.items():
        cell = row.cells[side]  # type: ignore[index]
        known = values(path, FIELDS[path])
        if cell.values is not None and all(isinstance(value, str) for value in known):
            assert path == "model.name" or set(cell.values) <= set(known), path


def test_what_each_family_says_by_itself_is_run_by_its_runtime() -> None:
    tiny = load_model("tiny")
    for strategy in (
        mop(8, expert_parallel=2),
        zero_offload(8),
        fsdp2(8, expert_parallel=2),
        fsdp2(8, offload=True),
    ):
        assert runnable(strategy, tiny) is None


@pytest.mark.parametrize(
    ("entries", "path", "rule"),
    [
        ({"pool": 0.5}, "pool", "only 0.0"),
        ({"stage_outputs": "held"}, "stage_outputs", "only 'freed'"),
        ({"balanced_routes": "consecutive"}, "balanced_routes", "only 'independent'"),
        ({"cpu": Kernels(norm="upcast")}, "cpu.norm", "only 'fused' or 'composed'"),
    ],
)
def test_every_entry_of_a_stack_is_what_its_runtime_does(
    entries: dict[str, Any], path: str, rule: str
) -> None:
    stack = structs.replace(load_stack("mopexec-fsdp2"), **entries)
    strategy = fsdp2(8, expert_parallel=2)
    told = [str(one) for one in not_run(Job(load_model("tiny"), strategy, stack=stack, kind="cpu"))]
    assert [one for one in told if one.startswith(f"stack.{path}: ") and one.endswith(rule)]


def test_what_no_runtime_has_a_part_in_is_said_in_the_table() -> None:
    """Labels, what a strategy's own fields decide, what changes numbers alone: other entries are held."""
    for side in RUNTIMES:
        held = {path for path, _ in flat(Stack) if ROWS[f"stack.{path}"].cells[side].reads}
        assert {
            "pool",
            "explicit",
            "stage_outputs",
            "balanced_routes",
            "sharding.loop",
            "host.graphs",
        } <= held


def test_masks_of_experts_are_not_of_kernels_that_move_rows_themselves() -> None:
    stack = structs.replace(load_stack("maxtext-slurm"), has={})
    job = Job(load_model("tiny"), fsdp2(8, expert_parallel=2), stack=stack)
    experts = structs.replace(job.strategy.experts, token_dispatcher="deepep")
    by_deepep = replace(job, strategy=structs.replace(job.strategy, experts=experts))
    assert not [one for one in refusals(job, "simulator") if one.field == "stack.kernels.expert_masks"]
    assert (
        "stack.kernels.expert_masks: True acts on nothing where experts.token_dispatcher is 'deepep', whose "
        "kernels move the rows, only False"
    ) in map(str, refusals(by_deepep, "simulator"))


def test_a_refusal_names_field_value_and_what_works() -> None:
    job = Job(structs.replace(load_model("tiny"), dropout=0.1), mop(8))
    first = next(refusals(job, by="flat_units"))
    assert str(first) == "model.dropout: 0.1 is not run by flat_units, only 0.0"


def test_export_sides_are_the_targets() -> None:
    assert set(TARGETS) == set(EXPORTS)


def test_representative_values_are_of_fields() -> None:
    assert set(REPRESENTATIVE) <= set(FIELDS)


def test_the_data_is_whole() -> None:
    """Conditions that rows name are known, rules name fields and sides, and every expression is one."""
    assert {row.acts for row in ROWS.values()} <= {"", *CONDITIONS}
    job = Job(load_model("tiny"), mop(8), TrainSpec(seq_len=64, global_batch=8)).settled
    assert all(holds(name)(job) in (True, False) for name in CONDITIONS)
    for rule in ALL_RULES:
        assert set(rule.sides) <= set(SIDES)
        for path in rule.fields:
            assert path in ROWS
            (value,) = value_at(job, path) or (None,)
            for text in (rule.where, rule.needs):
                compiled(text, rule.let)(job, value)
            assert compiled(rule.otherwise, rule.let, message=True)(job, value, "done")
