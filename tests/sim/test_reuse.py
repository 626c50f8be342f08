"""Parameters that DeepSpeed keeps gathered until their next use (sharding.reuse_distance)."""

import msgspec
import pytest

from mopsim.program import lower
from mopsim.program.context import Context, make_context
from mopsim.program.reuse import HEAD, near
from mopsim.spec.model import ModelSpec
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import small

LAYERS = 6
MODEL = small(
    num_hidden_layers=LAYERS, num_local_experts=0, num_experts_per_tok=0, moe_intermediate_size=0,
    shared_expert_intermediate_size=0, first_k_dense_replace=0, intermediate_size=64,
)  # fmt: skip
DEEPSPEED = load_stack("deepspeed")


def _gathers(distance: float, recompute: str = "none") -> dict[int, int]:
    """Gathers of a microbatch by layer; the embedding and the head are -1."""
    sharding = msgspec.structs.replace(DEEPSPEED.sharding, reuse_distance=distance)
    stack = msgspec.structs.replace(DEEPSPEED, sharding=sharding)
    strategy = fsdp2(8, recompute=recompute)  # type: ignore[arg-type]
    training = TrainSpec(seq_len=128, global_batch=8)
    program = lower(MODEL, strategy, training, stack=stack, compose=False).programs[0]
    found = dict.fromkeys(range(-1, LAYERS), 0)
    for op in program.ops:
        found[op.layer] += op.name.startswith("gather ")
    balance = sum(size for op in program.ops for category, size in op.net if category == "gathered")
    assert balance == 0
    return found


def _sizes() -> tuple[int, int]:
    """Parameters of the head with its norm, and of a layer."""
    head = MODEL.vocab_size * MODEL.hidden_size + MODEL.hidden_size
    width, heads = MODEL.hidden_size, 2 * MODEL.num_attention_heads + 2 * MODEL.num_key_value_heads
    return head, width * (heads * MODEL.head_dim + 3 * MODEL.intermediate_size + 2)


def test_without_a_distance_all_is_gathered_twice() -> None:
    assert {_gathers(0)[layer] for layer in range(LAYERS)} == {2}


@pytest.mark.parametrize(("recompute", "uses"), [("none", 2), ("full", 3)])
def test_the_last_layers_stay_whose_next_use_is_near(recompute: str, uses: int) -> None:
    head, layer = _sizes()
    ahead = 2 * head + uses * layer  # of the last layer but one
    before, after = (_gathers(distance, recompute) for distance in (ahead, ahead + 1))
    assert [before[one] for one in range(LAYERS)] == [2, 2, 2, 2, 2, 1]
    assert [after[one] for one in range(LAYERS)] == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_mtp_layers_stay_first_and_each_uses_the_head_again(tied: bool) -> None:
    model = msgspec.structs.replace(MODEL, num_nextn_predict_layers=1, tie_word_embeddings=tied)
    head, layer = _sizes()
    context = _context(model, 0)
    extra = 2 * sum(unit.numel for unit in context.layers[LAYERS])  # the MTP layer, beside the head it uses
    assert near(_context(model, 2 * head)) == {*HEAD}
    assert near(_context(model, 2 * head + 1)) == {*HEAD, LAYERS}
    assert near(_context(model, 4 * head + extra)) == {*HEAD, LAYERS}
    assert near(_context(model, 4 * head + extra + 1)) == {*HEAD, LAYERS, LAYERS - 1}
    assert near(_context(model, 4 * head + extra + 2 * layer)) == {*HEAD, LAYERS, LAYERS - 1}


def _context(model: ModelSpec, distance: float) -> Context:
    sharding = msgspec.structs.replace(DEEPSPEED.sharding, reuse_distance=distance)
    stack = msgspec.structs.replace(DEEPSPEED, sharding=sharding)
    training = TrainSpec(seq_len=128, global_batch=8)
    return make_context(model, stack.resolve(fsdp2(8, recompute="none")), training, 8, stack)


def test_a_weight_shared_with_the_head_is_gathered_for_it_too() -> None:
    """Once for the embedding, and once for the head, whose backward comes right after its forward."""
    tied = msgspec.structs.replace(MODEL, tie_word_embeddings=True)
    job = TrainSpec(seq_len=128, global_batch=8)
    program = lower(tied, fsdp2(8, recompute="none"), job, stack=DEEPSPEED, compose=False).programs[0]
    names = [op.name for op in program.ops]
    assert names.count("gather embedding") == names.count("release embedding") == 2
    assert sum(size for op in program.ops for category, size in op.net if category == "gathered") == 0


def test_a_small_network_is_gathered_once() -> None:
    whole = _gathers(DEEPSPEED.sharding.reuse_distance)
    assert {whole[layer] for layer in range(LAYERS)} == {1}
