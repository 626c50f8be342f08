"""The list of faults is of the code as it is."""

import pytest

from tests.bench.mutations import ROOT, Mutation, load, mutated


@pytest.mark.parametrize("one", load(), ids=lambda one: one.name)
def test_a_fault_has_its_place_and_its_tests(one: Mutation) -> None:
    assert mutated(one, (ROOT / one.file).read_text(encoding="utf-8"))
    for test in (one for one in one.tests if one.startswith("tests/")):
        assert (ROOT / test.split("::")[0]).is_file()
