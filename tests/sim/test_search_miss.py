"""Where nothing fits or is legal, the answer says what would."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

import mopsim
from mopsim.common.working import near_batches
from mopsim.search import Options, SearchResult, miss
from mopsim.search.miss import would_fit
from mopsim.search.problem import Problem
from mopsim.search.staged import may_fit
from mopsim.search.why import why
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from tests.sim.test_search_why import OPTIONS, TINY, given


def test_where_nothing_fits_the_smallest_changes_are_told() -> None:
    options = replace(OPTIONS, families=("mop", "fsdp2"))
    found, problem = given(10e6, options)
    assert found.best is None
    assert why(found, problem) == []
    lines = would_fit(found, problem, options)
    assert lines[0].startswith("the nearest miss is ")
    assert "over the device memory" in lines[0]
    assert any(
        line.startswith("2 nodes instead of 1 would fit") or "tokens instead of" in line for line in lines
    )


def test_a_miss_of_device_and_host_names_both() -> None:
    """Kimi-K2 on eight H100 lacks some 200 GiB a rank on the device and eight hosts."""
    plan, job = mopsim.zero_offload(), {"seq_len": 4096, "global_batch": 8}
    one = mopsim.simulate("kimi_k2", "h100-sxm-80g", strategy=plan, **job).result
    device, host = one.missing_bytes
    assert device == one.peak_memory - one.memory_limit > 0
    assert host == one.host_memory - one.host_limit > 0


@pytest.mark.parametrize(
    ("batch", "works"),
    [(63, "; 32 or 64 will do"), (65, "; 64 or 128 will do"), (32, ""), (128, "")],
)
def test_a_batch_that_divides_over_no_ranks_is_told_which_do(batch: int, works: str) -> None:
    assert near_batches(batch, 64) == works


def test_a_refusal_says_what_it_counts() -> None:
    job: dict[str, Any] = {"seq_len": 4096, "nodes": 16, "families": ["zero_offload"], "budget": 1}
    found = mopsim.search("olmoe_1b_7b", "h100-sxm-80g", global_batch=63, **job)
    assert re.search(r"data groups; 32 or 64 will do \([\d,]+ candidates\)", found.verdict)
    assert mopsim.search("olmoe_1b_7b", "h100-sxm-80g", global_batch=64, **job).top
    one = SearchResult(TINY, rejected=Counter({"a reason": 1}))
    assert one.verdict() == "nothing to run: a reason (1 candidate)"


def test_what_would_fit_asks_bounds_first_and_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight million tokens on one node nothing fits at half and a quarter of them: no search says so."""
    asked: list[int] = []
    told: list[tuple[int, str]] = []

    def noted(problem: Problem, options: Options) -> SearchResult:
        asked.append(problem.training.seq_len)
        assert (options.nearest, options.jobs, options.prove) == (False, 1, False)
        assert all(may_fit(problem, family) for family in options.families)
        return SearchResult(problem.model)

    monkeypatch.setattr(miss, "search", noted)
    network, training = load_model("mop_120b"), TrainSpec(seq_len=2**23, global_batch=1)
    long = Problem(network, load_profile("h100-sxm-80g"), 1, training, "bfloat16")
    options = Options(("mop", "zero_offload"))
    lines = would_fit(SearchResult(network), long, options, lambda *one: told.append(one))
    assert lines == ["we found no single change of nodes, sequence, bits or host memory that would fit"]
    assert {2**22, 2**21, 2**20}.isdisjoint(asked)
    assert 2**23 in asked, "on more nodes"
    assert (0, "sequences of 4,194,304 tokens instead of 8,388,608") in told
