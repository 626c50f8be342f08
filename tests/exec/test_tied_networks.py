"""Networks whose embedding and head share a weight, and those with learned positions, under flat_units: with
every mechanism that touches the vocabulary they equal the single-device model in float64, in loss, gradients
and weights after two clipped steps.
"""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mopexec.distributed.mesh import Group
from mopexec.flat.contents import outer_contents
from mopexec.operators.ring_rows import RowsRing
from mopsim.spec.model import ModelSpec
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO, DENSE

TIED = replace(MODEL, tie_word_embeddings=True)
GPT = replace(
    DENSE, tie_word_embeddings=True, learned_positions=64, norm="layernorm", ffn_matrices=2, ffn_bias=True,
    qk_norm="none",
)  # fmt: skip
"""Without biases of keys, whose gradients are rounding (see `verify`)."""
BETWEEN = replace(TIED, learned_positions=64)
STREAMED = {"state_tier": "host", "bucket_params": 300}
RING = {"loss": "ring", "vocab_parallel": 2}
LONG = {"seq_len": 64, "global_batch": 4}
"""More tokens than the rows of a rank: those travel."""

WAYS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "whole": (1, {"vocabulary": {"loss": "ring"}}, {}),
    "full": (2, {}, {}),
    "chunked, copies": (4, {"dense": {"fsdp": 2}, "vocabulary": {"loss": "chunked", "chunk_tokens": 7}}, {}),
    "ring": (2, {"vocabulary": RING}, {}),
    "ring, rows travel": (2, {"vocabulary": RING}, LONG),
    "ring, rows travel in turns": (4, {"vocabulary": RING | {"vocab_parallel": 4}}, LONG | {"seq_len": 32}),
    "rings of two": (4, {"vocabulary": RING | {"rank_placement": "strided", "chunk_tokens": 6}}, {}),
    "ring of all": (4, {"vocabulary": RING | {"vocab_parallel": 4}}, {}),
    "no ring of rows": (2, {"vocabulary": {"loss": "ring"}}, {}),
    "on the host": (2, {"vocabulary": RING, "optimizer": STREAMED | {"update_on": "host"}}, {}),
    "offloaded, chunked": (
        2,
        {"vocabulary": {"loss": "chunked", "chunk_tokens": 7}, "optimizer": STREAMED | {"update_on": "host"}},
        {},
    ),
    "ring beside the next forward": (
        4,
        {"vocabulary": RING, "optimizer": STREAMED | {"overlap": "next_forward"}},
        LONG | {"seq_len": 32},
    ),
    "sequences split": (2, {"vocabulary": RING, "attention": {"context_parallel": 2}}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_they_equal_the_single_device_model(way: str) -> None:
    world, changes, training = WAYS[way]
    _equal(world, changes, BETWEEN, training)


@pytest.mark.parametrize("way", ["full", "ring", "ring, rows travel"])
def test_without_experts(way: str) -> None:
    """Without positions: test_with_mtp_modules."""
    world, changes, training = WAYS[way]
    _equal(world, changes, GPT, training)


@pytest.mark.parametrize(
    ("world", "changes", "stack"),
    [(2, ALL_TWO, "mopexec-flat-nested"), (4, ALL_FOUR, "mopexec-flat")],
    ids=["two, nested", "four"],
)
def test_with_all_mechanisms(world: int, changes: dict[str, Any], stack: str) -> None:
    _equal(world, changes, BETWEEN, {}, micro_batch=2, stack=stack)


@pytest.mark.parametrize("way", ["offloaded, chunked", "ring, rows travel", "ring beside the next forward"])
def test_with_mtp_modules(way: str) -> None:
    """Each looks words up once more."""
    world, changes, training = WAYS[way]
    training = training | {"mtp_loss_coef": 0.3}
    _equal(world, changes, replace(TIED, num_nextn_predict_layers=2), training)


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [
        ("full", STREAMED),
        ("ring of all", STREAMED),
        ("chunked, copies", {"bucket_params": 300}),
    ],
)
def test_an_update_under_the_backward(way: str, optimizer: dict[str, Any]) -> None:
    """The embedding, open from the loss on, is the last to be updated."""
    world, changes, training = WAYS[way]
    changes = changes | {"optimizer": optimizer | {"overlap": "backward"}}
    _equal(world, changes, BETWEEN, training | {"clip_norm": 0.0})


@pytest.mark.parametrize("way", ["full", "ring, rows travel"])
def test_an_update_beside_the_next_forward_is_the_same_to_the_bit(way: str) -> None:
    """Lookups and loss wait for it, evaluation and checkpoints too, however slow."""
    world, changes, training = WAYS[way]
    plain, beside = (
        make_plan(world, changes | {"optimizer": STREAMED | own}, model=BETWEEN, training=training)
        for own in ({}, {"overlap": "next_forward"})
    )
    for _, lost in pool(world).run("tests.exec.flat_parity", "apart", plain, beside, "train"):
        assert not lost


@pytest.mark.parametrize("way", ["full", "ring, rows travel"])
def test_evaluation_leaves_nothing_behind(way: str) -> None:
    """The gradient that its loss makes of a head that is the embedding too is dropped."""
    world, changes, training = WAYS[way]
    plan = make_plan(world, changes, model=TIED, training=training)
    for worst in pool(world).run("tests.exec.flat_parity", "evaluated", plan):
        assert max(worst.values()) <= 1e-9, worst


def test_gradients_of_both_uses_are_summed_in_the_dtype_of_reductions() -> None:
    """In bf16 with sums in fp32, as close as bf16 allows."""
    mixed = {"compute": "bfloat16", "param": "bfloat16", "reduce": "float32", "grad": "float32"}
    for way in ("full", "ring, rows travel"):
        world, changes, training = WAYS[way]
        precision = mixed | {"moments": "float32", "master": "float32"}
        plan = make_plan(
            world, changes | {"precision": precision}, dtype="bfloat16", model=TIED, training=training
        )
        for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, "learned"):
            assert worst["loss"] < 1e-3, worst
            assert worst["norm"] < 0.02, worst


@pytest.mark.parametrize("moves_weights", [True, False])
def test_what_is_added_to_a_row_is_added_in_the_dtype_of_reductions(moves_weights: bool) -> None:
    """Where bf16 would stay at 256: one word in 600 tokens, the embedding's own row."""
    ring = RowsRing(Group((0,), 0, None), 5, 0, moves_weights=moves_weights)
    table, ids = torch.zeros(5, 3), torch.full((600,), 4)
    ring.rows_backward(ids, torch.ones(600, 3, dtype=torch.bfloat16), table)
    assert table.tolist() == [*[[0.0] * 3] * 4, [600.0] * 3]


def test_one_weight_is_one_unit() -> None:
    """Split over a ring it is its rows that are; learned positions are not."""
    found = outer_contents(GPT, (0, 19))
    assert list(found) == ["embedding", "positions", "final"]
    assert [contents.rows for contents in found.values()] == [(0, 19), None, None]
    assert torch.Size(found["positions"].names[0][1]) == (64, 16)
    assert list(outer_contents(replace(GPT, tie_word_embeddings=False), (0, 19))) == [*found, "head"]


def _equal(
    world: int, changes: dict[str, Any], model: ModelSpec, training: dict[str, Any], **options: Any
) -> None:
    if not model.num_moe_layers:
        changes = {name: fields for name, fields in changes.items() if name != "experts"}
    plan = make_plan(world, changes, model=model, training=training, **options)
    for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, "learned"):
        assert max(worst.values()) <= 1e-9, worst
