"""Where nothing fits, the nearest miss is found, whichever bounds say so."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from mopsim.cli import app
from mopsim.common.command_line import run_app
from mopsim.search import Options, SearchResult, search
from mopsim.search.bound import Bounds, bound
from mopsim.search.closest import find_closest
from mopsim.search.problem import Problem
from mopsim.search.simulating import run_row
from mopsim.search.space import Space
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from tests.sim.spaces import candidates
from tests.sim.test_search import problem, with_memory


@cache
def small(memory: float) -> tuple[Problem, Space, Bounds]:
    """A problem on devices of so many bytes, its space and the closed-form bounds of that."""
    asked = problem(0)
    asked = replace(asked, hardware=with_memory(asked.hardware, memory))
    space, _ = candidates(asked, "mop")
    return asked, space, bound(space)


def test_what_refined_bounds_rule_out_has_a_nearest_miss() -> None:
    """Closed forms let some through, bounds of layers and loss none: nothing is left to simulate."""
    least = float(small(1e9)[2].device.min())
    found = search(small(least * 1.0001)[0], Options(("mop",), budget=2))
    assert found.rejected["device memory, bound: layers and loss"] > 0
    assert found.best is None
    assert found.closest is not None
    assert found.verdict().startswith("nothing fits: the closest (mop) is ")
    assert sum(found.rejected.values()) == found.candidates


def test_of_those_that_tie_by_closed_forms_the_nearest_is_told() -> None:
    """They differ in what a layer and the loss hold for a while."""
    asked, space, bounds = small(2e6)
    found = search(asked, Options(("mop",), budget=2))
    assert found.closest is not None
    tied = np.flatnonzero(bounds.device == bounds.device.min())
    others = [run_row(space, int(row), SearchResult(asked.model), count=False) for row in tied]
    missing = [sum(one.missing_bytes) for one in others if one is not None]
    assert max(missing) > min(missing)
    assert sum(found.closest.missing_bytes) <= min(missing)


def test_a_nearest_miss_of_long_sequences_takes_fine_chunks() -> None:
    """32M tokens on a node: one chunk of experts misses by 1.66 TiB, many by less than half of that."""
    training = TrainSpec(seq_len=32 << 20, global_batch=1)
    asked = Problem(load_model("mop_120b"), load_profile("h200-sxm-141g"), 1, training, "bfloat16")
    found = search(asked, Options(("mop",), budget=2))
    assert found.closest is not None
    assert found.closest.missing_bytes[0] < 1.82e12 / 2


def test_what_is_refused_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, space, bounds = small(2e6)
    found = SearchResult(asked.model)
    monkeypatch.setattr("mopsim.search.closest.run_row", lambda *args, **how: None)
    find_closest(space, bounds, found)
    assert found.closest is None
    some = space.take(np.arange(3))
    find_closest(some, bound(some), found)
    assert found.closest is None
    strict = replace(asked, runnable=True)
    monkeypatch.undo()
    monkeypatch.setattr("mopsim.search.simulating.runnable", lambda *args: "no")
    find_closest(replace(some, problem=strict), bound(some), found)
    assert found.closest is None


def test_a_miss_is_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the closest plan said it, its family's line, a reason why and the verdict."""
    job = "--model mixtral_8x7b --hardware cpu-2core --seq-len 256 --global-batch 2 --budget 1"
    monkeypatch.setattr("mopsim.commands.search.BRIEF", 0.0)
    with pytest.raises(SystemExit) as ended:
        run_app(app, "mopsim", f"search {job} --family fsdp2,megatron".split())
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"; to say what would fit ([0-9]+ more simulated, )?[0-9.]+ s", said), "it takes longer"
    (missed,) = re.findall(r"(\S+ [KMGT]iB) over \([0-9]+% more (?:device|host) memory", said)
    assert ended.value.code == 3
    assert said.count(missed) == 1
    assert said.count("nothing fits") == 1
    assert said.count("best of ") == 1
