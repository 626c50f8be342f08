"""The capability table names every field of the specs, and only values that the specs have."""

import pytest

from mopsim.export import TARGETS
from mopsim.spec.capability import EXPORTS, ROWS, SIDES, Job, holds, refusals, runnable
from mopsim.spec.capability.expressions import CONDITIONS, compiled
from mopsim.spec.capability.rules import ALL_RULES, value_at
from mopsim.spec.presets import load_model
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


def test_a_refusal_names_field_value_and_what_works() -> None:
    strategy = mop(8)
    job = Job(load_model("deepseek_v3"), strategy)
    first = next(refusals(job, by="flat_units"))
    assert str(first) == "model.num_nextn_predict_layers: 1 is not run by flat_units, only 0"


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
