"""Tensor, pipeline, context and expert parallelism, held against formulas of the papers and hand counts."""

import msgspec
import pytest

import mopsim
from mopsim.common.errors import SpecError
from mopsim.engine import SimResult
from mopsim.graph import tensors, total_params
from mopsim.graph.layer import decoder_layer
from mopsim.graph.liveness import forward
from mopsim.graph.rewrites.quantized import cast_once
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Matmul
from mopsim.program import lower
from mopsim.program.casts import Part
from mopsim.program.context import make_context
from mopsim.program.workload import Program
from mopsim.program.works import works
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Optimizer, Overlap, Precision
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, zero_offload
from tests.sim.megatron_jobs import deep, parted, play, with_
from tests.sim.toys import small
from tests.software import changed


@pytest.mark.parametrize(
    ("tensor", "pipeline", "experts", "etp"), [(1, 4, 8, 1), (2, 8, 8, 1), (4, 2, 4, 2), (8, 16, 8, 4)]
)
def test_bytes_of_deepseek_v3(tensor: int, pipeline: int, experts: int, etp: int) -> None:
    """bf16 weights, fp32 gradients, 12 bytes of optimizer state over the data-parallel ranks of each part.

    Every tensor rank holds norms, routers and MLA's down-projections whole (Megatron-Core's TopKRouter; its
    multi_latent_attention.py: parallel_mode "duplicated").
    """
    model, world = load_model("deepseek_v3"), 512
    strategy = megatron(
        world,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        expert_parallel=experts,
        expert_tensor_parallel=etp,
    )
    workload = lower(model, strategy, TrainSpec(seq_len=4096, global_batch=1024), 8)
    held = {"params": 0, "grads": 0, "optimizer": 0}
    for program in workload.programs:
        for category, size in program.resident:
            if category in held:
                held[category] += size
    biases = 8 * model.num_moe_layers * model.num_local_experts * pipeline  # balancing biases, on every stage
    routed = sum(t.numel for t in tensors(model) if t.routed)
    dense = sum(t.numel for t in tensors(model) if not t.routed)
    copy = model.vocab_size * model.hidden_size if pipeline > 1 else 0  # MTP looks words up on the last stage
    layers, moe = 61 + 1, 58 + 1  # and the MTP module's
    whole = layers * 7168 * (1536 + 512 + 64) + moe * 7168 * 256
    whole += sum(t.numel for t in tensors(model) if len(t.shape) == 1)
    expected = (dense + copy - whole) / tensor + whole + routed / experts / etp
    assert held["params"] - biases == pytest.approx(2 * expected, rel=1e-4)  # shards are padded
    assert held["grads"] == pytest.approx(4 * expected, rel=1e-4)
    ranks = world // pipeline
    state = (dense + copy + (tensor - 1) * whole) / ranks + routed / ranks
    assert held["optimizer"] == pytest.approx(12 * state, rel=1e-4)
    assert total_params(model) == pytest.approx(671e9, rel=1e-3)


def test_the_worst_stage_is_reported() -> None:
    """Equal layers: the first stage holds the most microbatches of 1F1B."""
    strategy, model = megatron(4, pipeline_parallel=4), deep()
    result = play(model, strategy, 8)
    one = play(model, megatron(4, pipeline_parallel=1), 4)
    layer = decoder_layer(model, Shapes(256, 256, fused=True), 0)
    kept = sum(size for item in forward(layer, plan(layer, "none", ())) for _, size in item.memory)
    assert result.memory_by_category["activations"] >= 4 * 2 * kept  # 4 in flight, of 2 layers
    assert result.resident_memory < one.resident_memory


def test_zero_levels_hold_less_and_less() -> None:
    found = []
    for zero in (0, 1, 2, 3):
        strategy = megatron(4)
        dense = msgspec.structs.replace(
            strategy.dense, zero=zero, fsdp=4 if zero else 1, reshard_after_forward=True
        )
        found.append(play(deep(), with_(strategy, dense=dense), 8).resident_memory)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_recomputation_trades_memory_for_time() -> None:
    results = [
        play(
            deep(),
            megatron(
                8, tensor_parallel=2, pipeline_parallel=2, recompute=recompute, recompute_modules=modules
            ),
            32,
        )
        for recompute, modules in (("none", ()), ("selective", ("mlp",)), ("full", ()))
    ]
    memory = [result.peak_memory for result in results]
    times = [result.step_time for result in results]
    assert memory == sorted(memory, reverse=True)
    assert times == sorted(times)
    assert len(set(memory)) == len(set(times)) == 3


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "ulysses"])
def test_context_parallelism_divides_activations(exchange: str) -> None:
    def at(sequence: int) -> SimResult:
        strategy = megatron(8, context_parallel=sequence, tensor_parallel=2)
        attention = msgspec.structs.replace(strategy.attention, cp_comm_type=exchange)
        return play(deep(num_key_value_heads=8), with_(strategy, attention=attention), 8, 1024)

    one, four = at(1), at(4)
    before, after = (r.memory_by_category["activations"] for r in (one, four))
    assert after < 0.45 * before
    assert four.flops == pytest.approx(one.flops, rel=0.01)  # four times the sequences, a quarter of each
    assert four.busy[{"ring": "send_recv", "ulysses": "all_to_all"}.get(exchange, "all_gather")] > 0


def test_a_ring_hides_behind_long_attention() -> None:
    strategy = megatron(4, context_parallel=4)
    result = play(deep(), strategy, 1, 32768)
    assert result.exposed.get("send_recv", 0.0) < 0.05 * result.busy["send_recv"]


@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_overlapped_gradients_and_parameters_cost_less(mtp: int, stages: int) -> None:
    """Of two MTP layers, both of which come before what the loss needs, the second was not asked for."""
    strategy = megatron(8, tensor_parallel=2, pipeline_parallel=stages)
    hidden = with_(strategy, overlap=Overlap(grad_reduce=True, param_gather=True))
    model = deep(num_nextn_predict_layers=mtp)
    plain, overlapped = (play(model, one, 8) for one in (strategy, hidden))
    assert overlapped.step_time < plain.step_time
    for kind in ("reduce_scatter", "all_gather"):
        assert overlapped.busy[kind] == pytest.approx(plain.busy[kind])


@pytest.mark.parametrize(
    ("precision", "width"),
    [
        (Precision(compute="bfloat16", grad="float32"), 4 + 8 + 6 + 4),
        (Precision(compute="bfloat16", grad="bfloat16"), 6 + 4 + 8 + 6 + 2),
        (Precision(compute="float16", param="float16", grad="float16"), 6 + 8 + 4 + 8 + 6 + 2),
        (Precision(param="float32", grad="float32", master="param"), 4 + 8 + 4),
    ],
    ids=["fp32 gradients", "bf16 gradients", "scaled fp16", "no master"],
)
def test_a_parameter_passes_through_memory_as_megatron_updates_it(precision: Precision, width: int) -> None:
    """Bytes beside AdamW's own: narrow gradients to fp32, unscaled, norm, clip, weights cast back, zeroed."""
    model, strategy = deep(), with_(megatron(1), precision=precision)
    program = lower(model, strategy, TrainSpec(seq_len=256, global_batch=1), 8).programs[0]
    works = [work for op in program.ops if op.phase == "optimizer" for work in op.work]
    assert sum(work.bytes for work in works if work.kind == "memory_bound") == width * total_params(model)
    held = sum(size for op in program.ops if op.phase == "optimizer" for _, size in op.net)
    assert held == 0  # fp32 copies of gradients are freed


def on_host(fraction: float, stack: str) -> SimResult:
    """With so much of the optimizer on the host."""
    optimizer = Optimizer(state_tier="host", update_on="host", host_fraction=fraction)
    return play(deep(), with_(megatron(4), optimizer=optimizer, stack=stack), 4)


def test_optimizer_state_moves_to_the_host_by_its_fraction() -> None:
    none, half, whole = (on_host(part, "megatron-core") for part in (0.0, 0.5, 1.0))
    state = none.memory_by_category["optimizer"]
    assert half.memory_by_category["optimizer"] == pytest.approx(state / 2, rel=1e-6)
    assert whole.memory_by_category.get("optimizer", 0) == 0
    assert whole.host_by_category["optimizer"] == pytest.approx(state, rel=1e-6)
    # of 12 bytes a parameter; gradients that come down (fp32) and parameters that go up (bf16) beside it
    assert whole.host_memory == pytest.approx(state * (12 + 4 + 2) / 12, rel=1e-6)
    assert none.step_time < half.step_time < whole.step_time


def test_recipes_without_the_precision_aware_optimizer_keep_masters_on_the_device() -> None:
    none, half, whole = (on_host(part, "megatron-bridge") for part in (0.0, 0.5, 1.0))
    kept = [one.memory_by_category["optimizer"] for one in (none, half, whole)]
    assert kept[1:] == pytest.approx([kept[0] * (4 + 8 / 2) / 12, kept[0] * 4 / 12], rel=1e-6)


@pytest.mark.parametrize(
    ("stack", "width"),
    [("megatron-core", 12), ("megatron-bridge", 12), ("deepspeed", 12), ("mopexec-flat", 8)],
)
def test_narrow_moments_on_the_host_are_as_wide_as_what_is_updated(stack: str, width: int) -> None:
    """torch.zeros_like of fp32 clones (HybridDeviceOptimizer), of fp32 masters (DeepSpeedCPUAdam)."""
    optimizer = Optimizer(state_tier="host", update_on="host")
    made = zero_offload(4) if stack == "deepspeed" else megatron(4)
    made = with_(made, optimizer=optimizer, stack=stack)
    wide, narrow = (
        play(
            deep(),
            with_(made, precision=msgspec.structs.replace(made.precision, moments=moments, master="float32")),
            4,
        )
        for moments in ("float32", "bfloat16")
    )
    assert narrow.host_by_category["optimizer"] * 12 == wide.host_by_category["optimizer"] * width
    by_device = with_(
        made, optimizer=Optimizer(), precision=msgspec.structs.replace(made.precision, moments="bfloat16")
    )
    assert load_stack(stack).resolve(by_device).precision.moments == "bfloat16"


def test_a_state_on_the_host_saves_what_megatron_bridge_measured() -> None:
    """Qwen3-30B on 16 H100, TP 2, PP 2, EP 4: 47.2 GB and 31.9 GB (docs/training/cpu-offloading.md)."""
    peaks = [
        mopsim.simulate(
            model="qwen3_30b_a3b", hardware="h100-sxm-80g", nodes=2, seq_len="4K", global_batch=8,
            stack="megatron-bridge",
            strategy=mopsim.megatron(
                tensor_parallel=2, pipeline_parallel=2, expert_parallel=4, optimizer_on_host=part
            ),
        ).result.peak_memory
        for part in (0, 1)
    ]  # fmt: skip
    assert peaks[0] - peaks[1] == pytest.approx(15.3e9, rel=0.02)


def test_experts_have_data_parallel_groups_of_their_own() -> None:
    """TP 2 x EP 8 folded on 8 ranks: experts are not split by the tensor group, and travel over all 8
    ranks."""
    model = small()
    folded = play(model, megatron(8, tensor_parallel=2, expert_parallel=8), 8)
    split = play(model, megatron(8, tensor_parallel=2, expert_parallel=4, expert_tensor_parallel=2), 8)
    assert folded.busy["all_to_all"] > 0
    assert split.busy["all_gather"] > folded.busy["all_gather"]
    assert folded.resident_memory == pytest.approx(split.resident_memory, rel=0.01)


def test_tied_embeddings_are_summed_over_first_and_last_stage() -> None:
    model = deep(vocab_size=4096, tie_word_embeddings=True)
    tied, untied = (
        lower(one, megatron(4, pipeline_parallel=4), TrainSpec(seq_len=256, global_batch=4), 8)
        for one in (model, deep(vocab_size=4096))
    )
    names = [sum(op.name == "shared embedding" for op in program.ops) for program in tied.programs]
    assert names == [1, 0, 0, 1]
    sizes = [sum(s for c, s in w.programs[-1].resident if c == "params") for w in (tied, untied)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", ["compute", "matmul"])
def test_a_recipe_prices_the_loss_where_it_says_so(matmul: str, vocabulary: str) -> None:
    strategy = megatron(2, tensor_parallel=2)
    precision = msgspec.structs.replace(strategy.precision, matmul=matmul, vocabulary=vocabulary)
    workload = lower(deep(), with_(strategy, precision=precision), TrainSpec(seq_len=256, global_batch=2), 8)
    dtypes = {
        op.component: work.dtype
        for op in workload.programs[0].ops
        for work in op.work
        if work.kind == "matmul"
    }
    assert dtypes["dense_ffn"] == matmul
    assert dtypes["vocabulary"] == (matmul if vocabulary == "matmul" else "bfloat16")


@pytest.mark.parametrize(("recipe", "reads", "size"), [("fp8", 2, 6), ("mxfp8", 1, 4), ("nvfp4", 3, 7)])
def test_casts_read_their_source_as_often_as_the_recipe_needs(recipe: str, reads: int, size: int) -> None:
    product = (Matmul(64, 32, 128, count=4),)
    kernel = Kernel("up", "grouped_matmul", "experts", (), (), matmuls=product)
    for looped, kernels in ((False, 1), (True, 4)):
        strategy = megatron(8, expert_parallel=2)
        software = changed("megatron-core", kernels={"expert_products": "looped" if looped else "grouped"})
        precision = msgspec.structs.replace(strategy.precision, matmul=recipe)
        strategy = with_(strategy, precision=precision)
        context = make_context(small(), strategy, TrainSpec(seq_len=256, global_batch=8), 8, software)
        multiply, cast = works(kernel, "forward", context)
        assert cast.bytes == pytest.approx(4 * 64 * 128 * size, rel=0.04)  # scales of blocks beside
        assert cast.launches == kernels * reads
        assert (multiply.issued, multiply.launches) == (kernels, 1)


def test_operands_cast_again_move_by_hand() -> None:
    """torchao in fp8 of bf16: amax and cast read 2 + 2 bytes and write 1; a layout reads 1 and writes 1."""
    m, n, k = 64, 32, 128
    kernel = Kernel("up", "matmul", "dense_ffn", ("h",), (), matmuls=(Matmul(m, n, k),))

    def moved(one: Kernel, part: Part, **kernels: str | bool) -> float:
        strategy = megatron(8)
        strategy = with_(strategy, precision=msgspec.structs.replace(strategy.precision, matmul="fp8"))
        software = changed("megatron-core", kernels=kernels)
        context = make_context(small(), strategy, TrainSpec(seq_len=256, global_batch=8), 8, software)
        return sum(work.bytes for work in works(one, part, context) if work.kind == "memory_bound")

    assert moved(kernel, "forward", casts="again") == m * k * 5
    assert moved(kernel, "forward", weight_casts="pass") == (m * k + n * k) * 6
    assert moved(kernel, "input_grad", casts="again") == m * n * 5 + n * k * 2
    assert moved(kernel, "weight_grad", casts="again") == m * n * 2 + m * k * 7
    parts = sum(moved(kernel, part, casts="again") for part in ("input_grad", "weight_grad"))
    assert moved(kernel, "backward", casts="again") == parts
    rows = {"casts": "again", "cast_scales": "rows"}
    assert moved(kernel, "forward", **rows) == (m * k + n * k) * 5
    assert moved(kernel, "input_grad", **rows) == m * n * 5 + n * k * 7 + m * k * 4
    assert moved(kernel, "input_grad", compiled=True, **rows) == m * n * 5 + n * k * 7
    assert moved(kernel, "weight_grad", **rows) == m * n * 7 + m * k * 7 + n * k * 4
    # eager: magnitudes, their largest, a copy in fp32, times the scale, clamped, cast: 4 x 2 + 6 x 4 + 1
    assert moved(kernel, "forward", casts="composed") == (m * k + n * k) * 33
    assert moved(kernel, "backward", casts="composed") == (2 * m * n + n * k + m * k) * (33 + 2) - m * n * 2
    first, second = cast_once((kernel, kernel))
    assert first.casts
    assert moved(second, "forward", casts="again") == 0


def test_a_flat_gradient_is_put_together_and_divided_before_it_is_sent() -> None:
    strategy, training = fsdp2(8, fsdp=8, recompute="none"), TrainSpec(seq_len=64, global_batch=8)
    flat, apart = (
        lower(deep(), strategy, training, 8, changed("llm-foundry", sharding={"flat": there})).programs[0]
        for there in (True, False)
    )

    def moved(program: Program) -> dict[str, float]:
        found: dict[str, float] = {}
        for op in program.ops:
            for work in op.work if op.phase == "backward" else ():
                if work.kind == "memory_bound":
                    found[op.stream] = found.get(op.stream, 0.0) + op.times * work.bytes
        return found

    params = total_params(deep())
    one, other = moved(flat), moved(apart)
    assert one["compute"] - other["compute"] == pytest.approx(2 * 2 * params, rel=0.01)
    sent = one["state scale_up"] - other.get("state scale_up", 0.0)
    assert sent == pytest.approx((2 + 4 + 2 * 4) * params, rel=0.01)


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (small(), lambda: megatron(16, tensor_parallel=16),
         "dense.tensor_parallel: 16 does not divide num_attention_heads 8"),
        (small(), lambda: megatron(8, pipeline_parallel=8),
         "pipeline.pipeline_parallel: 8 .* more than num_hidden_layers 3"),
        (small(), lambda: megatron(16, expert_parallel=16),
         "experts.expert_parallel: 16 does not divide num_local_experts 8"),
        (deep(), lambda: megatron(8, expert_parallel=2),
         "experts.expert_parallel: 2 must be 1 for a model without experts"),
        (deep(8), lambda: megatron(4, pipeline_parallel=4, virtual_stages=2),
         "6 .* multiple of pipeline.pipeline_parallel 4"),
        (small(), lambda: with_(megatron(8, pipeline_parallel=2), overlap=Overlap(experts=True)),
         "overlap.experts"),
        (small(), lambda: parted(1, 2, 0), "pipeline.layers: .* each of the 2 parts"),
        (small(), lambda: parted(3, -1), "pipeline.layers: .* 0 or more"),
        (small(), lambda: parted(2, 2), "pipeline.layers: .* is 4 layers, not the num_hidden_layers 3"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused_in_a_line(model: ModelSpec, strategy: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        play(model, strategy(), 6 if model == deep(8) else 48)  # type: ignore[operator]


def test_tensor_parallel_communication_runs_beside_its_products() -> None:
    strategy = megatron(4, tensor_parallel=4)
    beside = with_(strategy, overlap=Overlap(tensor=True))
    plain, hidden = (play(deep(), one, 4, 4096) for one in (strategy, beside))
    assert hidden.step_time < plain.step_time
    assert hidden.peak_memory == pytest.approx(plain.peak_memory, rel=0.02)
    for kind in ("all_gather", "reduce_scatter"):
        assert hidden.busy[kind] == pytest.approx(plain.busy[kind])
        assert hidden.exposed[kind] < plain.exposed[kind]


def test_what_only_the_executors_schedules_do_is_refused() -> None:
    strategy = megatron(4, tensor_parallel=2)
    changed = with_(strategy, dense=msgspec.structs.replace(strategy.dense, chunk_tokens=8))
    with pytest.raises(SpecError, match=r"chunk_tokens.* needs dense.tensor_parallel 1"):
        play(deep(), changed, 4)
