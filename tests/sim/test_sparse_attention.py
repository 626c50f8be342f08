"""Latent attention to the keys that an indexer chooses: parameters, FLOP, rates, refusals."""

import re
from itertools import product
from typing import Literal

import msgspec
import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.cost import seconds
from mopsim.cost.stack import as_used
from mopsim.engine import simulate
from mopsim.graph.flops import flops_per_token
from mopsim.graph.layer import decoder_layer
from mopsim.graph.shapes import Shapes, causal_pairs
from mopsim.program.workload import Work
from mopsim.search.stages import RULES, can_lay, layers_of, lighter
from mopsim.spec.capability import Job, refusals
from mopsim.spec.capability.table import RUNTIMES
from mopsim.spec.model import LayerKind, ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.sparse_attention import SparseAttention
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Exchange, Pipeline
from mopsim.spec.tensors import parameters, total_params
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron

TINY = load_model("tiny")
LATENT = replace(
    TINY, attention="mla", kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=24, head_dim=24,
)  # fmt: skip
INDEXER = SparseAttention(index_n_heads=4, index_head_dim=16, index_topk=64, index_topk_freq=2)
SPARSE = replace(LATENT, sparse_attention=INDEXER)
TRAINING = TrainSpec(seq_len=256, global_batch=8)


def test_published_totals_are_counted() -> None:
    """GLM-5.2 (its card: 743,377,000,704), 21 of 78 layers with an indexer; DeepSeek-V3.2 has it in each."""
    glm, deepseek = load_model("glm5_2"), load_model("deepseek_v3_2")
    assert total_params(glm) == 743_377_000_704
    assert [layer for layer in range(78) if glm.chooses(layer)] == [0, 1, *range(2, 78, 4)]
    assert all(map(deepseek.chooses, range(61)))
    one = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert total_params(deepseek) - total_params(load_model("deepseek_v3")) == 61 * one


def test_kinds_of_layers_and_their_parameters() -> None:
    assert [SPARSE.layer_kind(layer).chooses for layer in range(4)] == [True, False, True, False]
    assert LATENT.layer_kind(0) == LayerKind(0, SPARSE.is_moe_layer(0))
    names = {
        name.rpartition("attention.")[2]: shape for name, shape in parameters(SPARSE).items() if ".0." in name
    }
    found = {name: shape for name, shape in names.items() if name.startswith("index")}
    assert found == {
        "index_q_proj.weight": (64, 48), "index_k_proj.weight": (16, TINY.hidden_size),
        "index_k_norm.weight": (16,), "index_k_norm.bias": (16,),
        "index_weights.weight": (4, TINY.hidden_size),
    }  # fmt: skip
    assert not any("index" in name for name in parameters(SPARSE) if name.startswith("layers.1."))


def test_flops_by_hand() -> None:
    """Of a query at most 64 keys, in the space of the latent: 40 elements of a score and 32 of its value; the
    indexer scores all before it. What makes keys and values costs as much as what absorbs it."""
    seq, heads = 256, TINY.num_attention_heads
    one = replace(SPARSE, num_hidden_layers=1, first_k_dense_replace=0)
    found, dense = (
        flops_per_token(one, seq),
        flops_per_token(replace(one, sparse_attention=SparseAttention()), seq),
    )
    attended = 2 * causal_pairs(seq, 64) * heads * (40 + 32) / seq
    scored = 2 * causal_pairs(seq) * 4 * 16 / seq
    assert found["attention_core"] == pytest.approx(attended + scored)
    indexer = 2 * (48 * 64 + TINY.hidden_size * (16 + 4))
    assert found["attention"] == pytest.approx(dense["attention"] + indexer)


def test_an_indexer_hands_no_gradient_on_and_may_learn_nothing() -> None:
    shapes = Shapes(256, 256)
    tape = decoder_layer(SPARSE, shapes, 0)
    names = [kernel.name for kernel in tape.kernels]
    assert names.index("index_scores") < names.index("attention_core") < names.index("absorb_v")
    products = [kernel for kernel in tape.kernels if kernel.name.startswith("index") and kernel.matmuls]
    assert all(kernel.matmuls[0].constant and not kernel.matmuls[0].frozen for kernel in products)
    still = replace(SPARSE, sparse_attention=replace(INDEXER, indexer_loss="none"))
    frozen = [kernel for kernel in decoder_layer(still, shapes, 0).kernels if kernel.name.startswith("index")]
    assert not any(kernel.saves or kernel.weight_grad or kernel.back_flops for kernel in frozen)
    assert "index_scores" not in [kernel.name for kernel in decoder_layer(SPARSE, shapes, 1).kernels]


@pytest.mark.parametrize(
    ("keys", "published"), [(128, 0.560e-3), (512, 1.233e-3), (1024, 2.155e-3), (2048, 4.019e-3)]
)
def test_the_backward_takes_what_was_measured(keys: int, published: float) -> None:
    """4,096 queries of 64 heads of 512 on B200 (NVIDIA/cudnn-frontend pull request 318)."""
    model = load_model("glm5_2")
    card = as_used(load_profile("b200-sxm-192g"), load_stack("megatron-core"), model, TRAINING)
    flops = 2 * 4096 * 64 * keys * 5 * 512
    work = Work("attention", flops=flops, seq=keys, backward=True, dtype="bfloat16")
    assert seconds(work, card) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("keys", "fast", "slow"), [(32768, 16.079, 28.606), (65536, 45.442, 70.505), (262144, 195.013, 320.990)]
)
def test_the_indexer_lies_between_two_kernels(keys: int, fast: float, slow: float) -> None:
    """32,768 queries, the last ones, of 32 heads of 128 on H200 (InternLM/xtuner pull request 1991; ms)."""
    card = as_used(load_profile("h200-sxm-141g"), load_stack("megatron-core"), load_model("glm5_2"), TRAINING)
    pairs = causal_pairs(keys) - causal_pairs(keys - 32768)
    work = Work("attention", flops=2 * pairs * 32 * 128, seq=keys, indexer=True, dtype="bfloat16")
    assert fast < 1e3 * seconds(work, card) < slow


@pytest.mark.parametrize("exchange", ["ulysses", "ring", "all_gather"])
def test_a_sequence_is_shared_by_gathering_alone(exchange: Exchange) -> None:
    strategy = fsdp2(8, context_parallel=2, context_exchange=exchange)
    said = [
        str(one)
        for one in refusals(Job(SPARSE, strategy, TRAINING, load_stack("generic-fused")), by="simulator")
    ]
    gathered = exchange == "all_gather"
    assert bool(said) != gathered
    rule = "is not simulated with a sparse_attention, only 'all_gather'"
    assert gathered or said == [f"strategy.attention.cp_comm_type: '{exchange}' {rule}"]


def test_parts_of_a_pipeline_begin_with_an_indexer() -> None:
    """Megatron-Bridge lays GLM-5.2 on six stages as 10, 12, 12, 12, 16, 16."""
    glm = load_model("glm5_2")
    assert glm.whole_groups((10, 12, 12, 12, 16, 16)) == (10, 12, 12, 12, 16, 16)
    assert glm.whole_groups((13,) * 6) == (14, 12, 12, 12, 16, 12)
    strategy, says = megatron(6, pipeline_parallel=6), "[14, 12, 12, 12, 16, 12] will do"
    with pytest.raises(MopError, match=r"pipeline\.layers: \[\] lets a part begin .*" + re.escape(says)):
        simulate(glm, load_profile("gb200-186g"), 2, strategy, TRAINING, load_stack("megatron-core"))
    for parts, words in ((32, "too many parts: 32"), (8 * 10**12, "is more than num_hidden_layers 78")):
        many = Pipeline(pipeline_parallel=8, virtual_stages=parts // 8, schedule="interleaved")
        with pytest.raises(MopError, match=words):
            replace(strategy, world_size=8, pipeline=many).check_model(glm)
    for stages, virtual, layout in product((2, 4, 6, 13), (1, 2), (*RULES, *lighter(glm, 4, 1))):
        parts = layers_of(glm, stages, virtual, layout)
        assert not parts or (glm.whole_groups(parts) == parts and sum(parts) == 78)


def test_no_runtime_or_target_takes_it() -> None:
    for side in (*RUNTIMES, "torchtitan", "megatron-bridge"):
        said = [
            str(one)
            for one in refusals(Job(SPARSE, fsdp2(8), TRAINING, load_stack("generic-fused")), by=side)
        ]
        assert any("sparse_attention.index_topk" in one for one in said)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q_lora_rank": 0}, "q_lora_rank: 0 must be at least 1 beside a sparse_attention.index_topk"),
        ({"sparse_attention": {"index_topk": 64}}, "sparse_attention.index_n_heads: 0 must lie between"),
        ({"sparse_attention": {"index_head_dim": 16}}, "sparse_attention.index_head_dim: 16 must be 0"),
        ({"sparse_attention": {"index_topk_freq": 4}}, "sparse_attention.index_topk_freq: 4 must be 1"),
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, object], says: str) -> None:
    plain = msgspec.to_builtins(SPARSE) | changes
    with pytest.raises(MopError, match=re.escape(says)):
        io.convert(plain, ModelSpec, "")


@pytest.mark.parametrize(
    "model", [SPARSE, replace(SPARSE, sparse_attention=replace(INDEXER, indexer_loss="none"))]
)
@pytest.mark.parametrize("precision", ["bfloat16", "mxfp8"])
def test_composed_and_expanded_agree(model: ModelSpec, precision: Literal["bfloat16", "mxfp8"]) -> None:
    strategy = megatron(
        8, tensor_parallel=2, pipeline_parallel=2, context_parallel=2, context_exchange="all_gather",
        recompute="selective", recompute_modules=("core_attn", "mla_up_proj"),
    )  # fmt: skip
    strategy = replace(strategy, precision=replace(strategy.precision, matmul=precision))
    card, stack = load_profile("b200-sxm-192g"), load_stack("megatron-core")
    one, other = (
        simulate(model, card, 1, strategy, TRAINING, stack, timeline=each) for each in (False, True)
    )
    assert one.step_time == pytest.approx(other.step_time, rel=1e-3)
    assert one.peak_memory == other.peak_memory


def test_what_learns_costs_more_and_long_contexts_less() -> None:
    def step(model: ModelSpec, seq_len: int) -> float:
        card = load_profile("h200-sxm-141g")
        training = TrainSpec(seq_len=seq_len, global_batch=64)
        return simulate(
            model, card, 8, fsdp2(64, expert_parallel=8), training, load_stack("generic-fused")
        ).step_time

    sparse, dense = load_model("deepseek_v3_2"), load_model("deepseek_v3")
    still = replace(sparse, sparse_attention=replace(sparse.sparse_attention, indexer_loss="none"))
    assert step(still, 8192) < step(sparse, 8192)
    assert step(sparse, 131072) < step(dense, 131072)


def test_a_published_step_lies_in_its_interval() -> None:
    """GLM-5.2 on 192 GB200 in MXFP8 by Megatron-Bridge (pull request 5401: 39.43 s); nothing was fitted."""
    glm = load_model("glm5_2")
    model = replace(glm, sparse_attention=replace(glm.sparse_attention, indexer_loss="none"))
    strategy = megatron(
        192, pipeline_parallel=6, stage_layers=(10, 12, 12, 12, 16, 16), expert_parallel=32,
        token_dispatcher="hybridep",
    )  # fmt: skip
    precision = replace(strategy.precision, matmul="mxfp8", moments="bfloat16")
    strategy = replace(strategy, precision=precision)
    step = mopsim.simulate(
        model, "gb200-186g", nodes=48, strategy=strategy, seq_len=4096, global_batch=3072, routing="forced",
        stack="megatron-bridge-hybridep",
    )  # fmt: skip
    low, high = step.result.step_time_interval(0.9)
    assert low < 39.43 < high
    assert step.step_time_s == pytest.approx(39.43, rel=0.2)


def test_a_search_lays_whole_groups() -> None:
    """No layout has as many stages as groups or more, of degrees that divide the ranks: 24, 32, 48."""
    glm = load_model("glm5_2")
    assert [can_lay(glm, stages) for stages in (6, 20, 24, 32)] == [True, True, False, False]
    found = mopsim.search(
        glm, "gb200-186g", nodes=24, seq_len=4096, global_batch=1024, families=["megatron"], budget=2
    )
    for one in found.found.played:
        parts = one.strategy.pipeline.parts(78)
        assert glm.whole_groups(parts) == parts
