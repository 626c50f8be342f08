"""A few kills of `make kills`: a run that is killed and resumed has the losses of one that is not."""

import pytest

from tests.bench.kills import passed, sweep


@pytest.mark.slow
def test_killed_runs_go_on_to_the_bit(tmp_path):
    found = sweep(tmp_path, 2, 4, background=True)
    assert all(map(passed, found)), found
