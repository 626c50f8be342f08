"""A few kills of `make kills`, of processes that are forked: a run that is killed and resumed has the losses
of one that is not."""

import pytest

from tests.bench import kills
from tests.bench.kills import passed, sweep
from tests.exec.forking import Program
from tests.exec.train_runs import common, environment


def start(inputs, out, *arguments):
    return Program(["mopexec.cli", "train", *common(inputs, out), *arguments], environment(), out)


@pytest.mark.slow
def test_killed_runs_go_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "_start", start)
    found = sweep(tmp_path, 2, 4, kills.same(), background=True)
    assert all(map(passed, found)), found
