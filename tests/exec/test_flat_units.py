"""Every mechanism of flat_units, alone and together, equals the single-device model: loss, gradients, updated
weights.
"""

from typing import Any

import msgspec
import pytest

from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import pool

NO_QK_NORM = msgspec.structs.replace(MODEL, qk_norm="none", scoring_func="softmax", norm_topk_prob=False)
DENSE = msgspec.structs.replace(
    MODEL, num_local_experts=0, num_experts_per_tok=0, first_k_dense_replace=0, moe_intermediate_size=0,
    shared_expert_intermediate_size=0,
)  # fmt: skip

TWO: dict[str, dict[str, Any]] = {
    "zero3": {},
    "replicated": {"dense": {"fsdp": 1}},
    "prefetch_none": {"dense": {"prefetch": 0}},
    "prefetch_two": {"dense": {"prefetch": 2}},
    "ffn_slices": {"dense": {"chunk_tokens": 5}},
    "ulysses": {"attention": {"context_parallel": 2}},
    "expert_parallel": {"experts": {"expert_parallel": 2}},
    "experts_sharded": {"experts": {"expert_parallel": 1, "expert_fsdp": 2}},
    "chunked_dispatch": {"experts": {"expert_parallel": 2, "chunk_tokens": 5}},
    "chunked_alone": {"experts": {"expert_parallel": 1, "chunk_tokens": 6}},
    "chunked_loss": {"vocabulary": {"loss": "chunked", "chunk_tokens": 7}},
    "ring_activations": {"vocabulary": {"loss": "ring", "vocab_parallel": 2}},
    "ring_activations_chunked": {"vocabulary": {"loss": "ring", "vocab_parallel": 2, "chunk_tokens": 6}},
    "boundaries": {"activations": {"layer_inputs": "host"}},
    "boundaries_partly": {"activations": {"layer_inputs": "host", "host_budget": 2 * 16 * 16 * 8}},
    "host_update": {"optimizer": {"state_tier": "host", "update_on": "host", "bucket_params": 700}},
    "streamed": {"optimizer": {"state_tier": "host", "bucket_params": 500, "slots": 2}},
    "streamed_three_slots": {"optimizer": {"state_tier": "host", "bucket_params": 500, "slots": 3}},
    "streamed_one_slot": {"optimizer": {"state_tier": "host", "bucket_params": 500, "slots": 1}},
    "streamed_beside": {"optimizer": {"state_tier": "host", "bucket_params": 500, "overlap": "next_forward"}},
    "streamed_beside_whole": {
        "dense": {"fsdp": 1},
        "optimizer": {"state_tier": "host", "bucket_params": 700, "slots": 3, "overlap": "next_forward"},
    },
    "device_buckets": {"optimizer": {"bucket_params": 300}},
    "master_is_param": {"precision": {"master": "param"}},
}
ALL_TWO: dict[str, dict[str, Any]] = {
    "dense": {"prefetch": 1, "chunk_tokens": 5},
    "attention": {"context_parallel": 2},
    "experts": {"expert_parallel": 2, "chunk_tokens": 3},
    "vocabulary": {"loss": "ring", "vocab_parallel": 2, "chunk_tokens": 6},
    "optimizer": {"state_tier": "host", "bucket_params": 900},
    "activations": {"layer_inputs": "host", "host_budget": 3000},
}
FOUR: dict[str, dict[str, Any]] = {
    "zero3_replicas": {"dense": {"fsdp": 2}},
    "ulysses_kv_replicated": {"attention": {"context_parallel": 4}},
    "ulysses_strided": {"attention": {"context_parallel": 2, "rank_placement": "strided"}},
    "experts_replicated": {"experts": {"expert_parallel": 2, "expert_fsdp": 1, "chunk_tokens": 5}},
    "experts_sharded": {"experts": {"expert_parallel": 2, "expert_fsdp": 2, "rank_placement": "strided"}},
    "experts_hybrid": {"experts": {"expert_parallel": 1, "expert_fsdp": 2}},
    "experts_all": {"experts": {"expert_parallel": 4, "chunk_tokens": 5}},
    "ring_all": {"vocabulary": {"loss": "ring", "vocab_parallel": 4, "chunk_tokens": 7}},
    "ring_half": {"vocabulary": {"loss": "ring", "vocab_parallel": 2, "rank_placement": "strided"}},
}
ALL_FOUR: dict[str, dict[str, Any]] = {
    "dense": {"fsdp": 2, "prefetch": 2, "chunk_tokens": 3},
    "attention": {"context_parallel": 2, "rank_placement": "strided"},
    "experts": {"expert_parallel": 2, "expert_fsdp": 2, "chunk_tokens": 4},
    "vocabulary": {"loss": "ring", "vocab_parallel": 4, "chunk_tokens": 5},
    "optimizer": {"state_tier": "host", "update_on": "host", "bucket_params": 600},
    "activations": {"layer_inputs": "host", "host_budget": 5000},
}  # fmt: skip
ALL_EIGHT: dict[str, dict[str, Any]] = {
    "dense": {"fsdp": 4, "prefetch": 1, "chunk_tokens": 3},
    "attention": {"context_parallel": 2},
    "experts": {"expert_parallel": 4, "expert_fsdp": 2, "chunk_tokens": 4, "rank_placement": "strided"},
    "vocabulary": {"loss": "ring", "vocab_parallel": 4, "chunk_tokens": 5},
    "optimizer": {"state_tier": "host", "bucket_params": 600, "overlap": "next_forward"},
    "activations": {"layer_inputs": "host", "host_budget": 5000},
}  # fmt: skip
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def check(
    world: int, changes: dict[str, Any], *, routing: str = "learned", dtype: str = "float64", **options: Any
) -> None:
    """All ranks' differences from the single-device model are below the tolerance of the dtype."""
    plan = make_plan(world, changes, dtype=dtype, **options)
    for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, routing):
        assert max(worst.values()) <= TOLERANCE[dtype], worst


@pytest.mark.parametrize("name", TWO)
def test_one_mechanism_on_two_ranks(name: str) -> None:
    check(2, TWO[name])


@pytest.mark.parametrize("name", FOUR)
def test_one_mechanism_on_four_ranks(name: str) -> None:
    check(4, FOUR[name])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_mechanisms_on_two_ranks(dtype: str) -> None:
    check(2, ALL_TWO, dtype=dtype, micro_batch=2)


def test_all_mechanisms_on_four_ranks() -> None:
    check(4, ALL_FOUR, micro_batch=2)


def test_all_mechanisms_on_eight_ranks() -> None:
    """Each axis in several groups of several ranks."""
    check(8, ALL_EIGHT, routing="profile", training={"routing": "95/4"})


@pytest.mark.parametrize("profile", ["balanced", "95/2", "100/1", "50/8", "zipf:1.1"])
def test_routing_profiles(profile: str) -> None:
    check(
        2,
        {"experts": {"expert_parallel": 2, "chunk_tokens": 5}},
        routing="profile",
        training={"routing": profile},
    )


@pytest.mark.parametrize("profile", ["80/3"])
def test_a_skewed_profile_with_all_mechanisms(profile: str) -> None:
    check(4, ALL_FOUR, routing="profile", training={"routing": profile}, micro_batch=2)


def test_microbatches_of_several_sequences() -> None:
    check(2, {"attention": {"context_parallel": 2}}, micro_batch=4)


@pytest.mark.parametrize("order", ["contiguous", "strided"])
def test_ring_moves_weights_where_tokens_outnumber_its_rows(order: str) -> None:
    check(
        4,
        {"vocabulary": {"loss": "ring", "vocab_parallel": 2, "rank_placement": order}},
        training={"seq_len": 64, "global_batch": 4},
    )
    check(
        2,
        {"vocabulary": {"loss": "ring", "vocab_parallel": 2, "chunk_tokens": 9}},
        training={"seq_len": 64, "global_batch": 2},
    )


def test_softmax_scores_without_normalising_or_head_norms() -> None:
    check(2, ALL_TWO, model=NO_QK_NORM, micro_batch=2)


def test_a_dense_model() -> None:
    check(2, {"dense": {"chunk_tokens": 6}, "attention": {"context_parallel": 2}}, model=DENSE)


def test_element_wise_work_in_several_slices() -> None:
    plan = make_plan(2, ALL_TWO, micro_batch=2)
    for worst in pool(2).run("tests.exec.flat_parity", "compare_in_slices", plan, "learned", 3):
        assert max(worst.values()) <= 1e-9, worst


@pytest.mark.parametrize("reduce", ["bfloat16", "float32"])
@pytest.mark.parametrize("param", ["bfloat16", "float32"])
def test_mixed_precision_is_close(param: str, reduce: str) -> None:
    """Compute in bf16 with the other dtypes apart: as close as bf16 allows, on both sides of every cast."""
    mixed = {
        "precision": {
            "param": param,
            "reduce": reduce,
            "grad": reduce,
            "moments": "bfloat16",
            "master": "float32",
        }
    }
    plan = make_plan(2, ALL_TWO | mixed, dtype="bfloat16", micro_batch=2)
    for worst in pool(2).run("tests.exec.flat_parity", "compare", plan, "learned"):
        assert worst["loss"] < 1e-3, worst
        assert worst["norm"] < 0.02, worst


@pytest.mark.parametrize("dense", [{}, {"fsdp": 1}], ids=["sharded", "replicated"])
def test_an_update_beside_the_next_forward_is_the_same_to_the_bit(dense: dict[str, Any]) -> None:
    """Every gather waits for its own update, evaluation and checkpoints for all of them, however slow."""
    plain, beside = (
        make_plan(2, ALL_TWO | {"dense": dense} | own, micro_batch=4)
        for own in ({}, {"optimizer": ALL_TWO["optimizer"] | {"overlap": "next_forward"}})
    )
    for _, lost in pool(2).run("tests.exec.flat_parity", "apart", plain, beside, "train"):
        assert not lost


def test_one_rank() -> None:
    check(
        1,
        {"experts": {"chunk_tokens": 4}, "vocabulary": {"loss": "ring"}, "optimizer": {"state_tier": "host"}},
    )
