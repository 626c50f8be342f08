"""The list of faults is of the code as it is."""

from tests.bench.mutations import ROOT, load, mutated


def test_a_fault_has_its_place_and_its_tests() -> None:
    for one in load():
        assert mutated(one, (ROOT / one.file).read_text(encoding="utf-8")), one.name
        for test in (told for told in one.tests if told.startswith("tests/")):
            assert (ROOT / test.split("::")[0]).is_file(), f"{one.name}: {test}"
