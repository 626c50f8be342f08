"""Routing profiles: counts in closed form are those of the positions; shares come out as stated."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.api.inputs import read_routing
from mopsim.common.errors import SpecError
from mopsim.common.io import convert, parse_yaml, to_yaml
from mopsim.spec.presets import load_model
from mopsim.spec.routing import (
    RoutingProfile,
    check,
    check_model,
    routing_counts,
    shares,
    worst,
)
from mopsim.spec.training import TrainSpec
from tests.routed import routed_expert
from tests.sim.toys import small

SHARES = (0.3, 0.05, 0.05, 0.1, 0.0, 0.2, 0.2, 0.1)
PROFILES = ["balanced", "forced", "0/3", "80/3", "100/5", "35/8", "zipf:0", "zipf:1.1", SHARES]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PROFILES), st.integers(1, 200), st.integers(1, 7), st.integers(1, 3))
def test_counts_are_those_of_the_positions(
    profile: RoutingProfile, tokens: int, chunks: int, top_k: int
) -> None:
    for index in range(min(chunks, tokens)):
        by_hand = Counter(
            routed_expert(profile, position, tokens, slot, 8, top_k)
            for position in range(index, tokens, chunks)
            for slot in range(top_k)
        )
        assert routing_counts(profile, tokens, chunks, index, 8, top_k) == tuple(by_hand[e] for e in range(8))


@pytest.mark.parametrize("profile", ["zipf:0.5", "zipf:1.3", SHARES])
def test_shares_come_out_in_every_chunk(profile: RoutingProfile) -> None:
    expected = shares(profile, 8, 3)
    assert sum(expected) == pytest.approx(1.0)
    assert max(expected) <= 1 / 3 + 1e-9
    for index in range(4):
        counts = routing_counts(profile, 8192, 4, index, 8, 3)
        assert [count / (3 * 2048) for count in counts] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("profile", ["zipf:2.5", SHARES])
def test_a_token_chooses_an_expert_once(profile: RoutingProfile) -> None:
    for position in range(500):
        chosen = {routed_expert(profile, position, 500, slot, 8, 3) for slot in range(3)}
        assert len(chosen) == 3


def test_a_histogram_reads_from_yaml() -> None:
    spec = TrainSpec(seq_len=8, global_batch=1, routing=SHARES)
    assert convert(parse_yaml(to_yaml(spec), "text"), TrainSpec, "training") == spec


@pytest.mark.parametrize("name", ["shares.yaml", "shares.json"])
def test_shares_of_a_file_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(SHARES))
    assert read_routing(str(tmp_path / name)) == SHARES


@pytest.mark.parametrize(
    ("profile", "field"),
    [
        ("zipf:", "routing"), ("zipf:-1", "routing"), ("101/2", "routing"), ("some", "routing"),
        ((0.5, 0.4), "routing"), ((1.5, -0.5), r"routing\[1\]"), ((), "routing"),
    ],
)  # fmt: skip
def test_refused(profile: RoutingProfile, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}: "):
        check(profile)


@pytest.mark.parametrize(
    ("profile", "rule"),
    [
        ((0.5, 0.5), "not one for each of num_local_experts 8"),
        ((0.6, 0.4, 0, 0, 0, 0, 0, 0), "a token chooses an expert once"),
        ("10/9", "more hot experts than num_local_experts 8"),
    ],
)
def test_refused_by_the_model(profile: RoutingProfile, rule: str) -> None:
    with pytest.raises(SpecError, match=rule):
        TrainSpec(seq_len=8, global_batch=1, routing=profile).check_model(small())


def test_the_worst_routing_sends_a_token_once_to_an_expert() -> None:
    """Two ranks of four experts get all of a top-2 token; a rank of one expert gets it once."""
    model = load_model("tiny")
    assert worst(model, 1) == "balanced"
    assert worst(model, 2) == "100/4"
    one_each = worst(model, model.num_local_experts)
    assert isinstance(one_each, tuple)
    assert one_each[0] == 1 / model.num_experts_per_tok
    assert sum(one_each) == pytest.approx(1.0)
    check(one_each)
    check_model(one_each, model)


@pytest.mark.parametrize("tokens", [129, 333, 4096, 4100])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (60, 4), (8, 2)])
def test_balanced_is_within_experts_over_tokens_of_even(tokens: int, experts: int, top_k: int) -> None:
    counts = routing_counts("balanced", tokens, 1, 0, experts, top_k)
    for local in (size for size in (1, 2, 4, 8) if experts % size == 0):
        loads = [sum(counts[i : i + local]) for i in range(0, experts, local)]
        excess = max(loads) * experts / (tokens * top_k * local) - 1
        assert excess <= experts / tokens
        assert excess == pytest.approx(0, abs=1e-12) or tokens % experts


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from((8, 16, 32, 60, 64, 128, 160, 256, 384)), st.integers(1, 8), st.integers(1, 16),
    st.integers(1, 64), st.integers(0, 400),
)  # fmt: skip
def test_every_chunk_is_even(experts: int, top_k: int, chunks: int, rows: int, more: int) -> None:
    """A chunk of n tokens gives an expert its even share k n / E within a dozen rows, also where the chunks
    share a factor with the experts; exactly that where E and the chunks divide the tokens."""
    for tokens in (rows * experts * chunks, rows * experts * chunks + more):
        even = []
        for index in range(chunks):
            counts = routing_counts("balanced", tokens, chunks, index, experts, top_k)
            mean = top_k * len(range(index, tokens, chunks)) / experts
            assert sum(counts) == pytest.approx(mean * experts)
            even.append(max(abs(count - mean) for count in counts))
        assert max(even) <= (1e-9 if tokens % (experts * chunks) == 0 else 12)


@pytest.mark.parametrize("profile", ["balanced", "40/2"])
def test_a_token_of_a_chunk_has_distinct_experts(profile: RoutingProfile) -> None:
    for position in range(0, 96, 8):
        chosen = [routed_expert(profile, position, 96, slot, 16, 2) for slot in range(2)]
        assert len(set(chosen)) == 2
