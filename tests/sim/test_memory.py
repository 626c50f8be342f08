"""Peak memory of programs, held against formulas of the papers and hand counts."""

from collections.abc import Callable

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.graph import tensors
from mopsim.graph.layer import decoder_layer
from mopsim.graph.liveness import backward, forward
from mopsim.graph.rewrites.quantized import quantized
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Tape
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Activations, Experts, Pipeline, Strategy, Vocabulary
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload
from tests.sim.megatron_jobs import MACHINE, deep, play, with_
from tests.sim.toys import small
from tests.software import changed, unfused

GPT3 = load_model("gpt3_175b")


def kept(tape: Tape, recompute: str = "none", modules: tuple[str, ...] = ()) -> int:
    """Bytes that a layer of a stack leaves for its backward: its output counts for its input."""
    chosen = plan(tape, recompute, modules)
    return sum(size for item in forward(tape, chosen) for _, size in item.memory)


def without_rows_split(strategy: Strategy) -> Strategy:
    return with_(strategy, dense=msgspec.structs.replace(strategy.dense, sequence_parallel=False))


@pytest.mark.parametrize("tensor", [2, 8])
def test_a_tensor_parallel_layer_without_sequence_parallelism(tensor: int) -> None:
    """arXiv 2205.05198 equation 2 without scores: s b h (10 + 24/t), of which 2 are dropout masks."""
    s, h, a = 2048, GPT3.hidden_size, GPT3.num_attention_heads
    shapes = Shapes(s, s, tensor=tensor, fused=True, sequence_parallel=False)
    assert kept(decoder_layer(GPT3, shapes, 0)) == s * h * 8 + (24 * s * h + 4 * s * a) // tensor


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_backward_leaves_the_gradient_of_the_input_alone(sequence_parallel: bool, recompute: str) -> None:
    tape = decoder_layer(GPT3, Shapes(256, 512, tensor=2, fused=True, sequence_parallel=sequence_parallel), 0)
    chosen = plan(tape, recompute, ())
    played = [*forward(tape, chosen), *backward(tape, chosen)]
    left = sum(size for item in played for _, size in item.memory)
    assert left == tape.inputs[0].bytes  # the gradient of the output, which came from elsewhere, went


def test_sums_travel_by_all_reduce_where_rows_are_not_split() -> None:
    """Two all-reduces forward and two backward a layer (arXiv 1909.08053); the same bytes on the wire."""
    strategy = megatron(4, tensor_parallel=4)
    split, whole = (play(deep(), one, 4, 4096) for one in (strategy, without_rows_split(strategy)))
    assert whole.busy["all_reduce"] > 0
    assert "reduce_scatter" not in whole.busy
    assert whole.memory_by_category["activations"] > split.memory_by_category["activations"]
    program = lower(deep(), without_rows_split(strategy), TrainSpec(seq_len=4096, global_batch=1)).programs[0]
    sums = [
        op
        for op in program.ops
        if op.component in ("attention", "dense_ffn") and op.stream == "tensor scale_up"
    ]
    assert len(sums) == 4 * 8
    assert {work.kind for op in sums for work in op.work} == {"all_reduce"}
    assert {work.bytes for op in sums for work in op.work} == {4096 * 1024 * 2}


def test_experts_of_ranks_that_hold_all_rows_get_all_of_them() -> None:
    """Two tensor ranks send the same rows to the experts: twice the traffic."""
    strategy = megatron(4, tensor_parallel=2, expert_parallel=2)
    sent = []
    for one in (strategy, without_rows_split(strategy)):
        program = lower(small(), one, TrainSpec(seq_len=128, global_batch=2)).programs[0]
        works = [work for op in program.ops for work in op.work]
        sent.append(sum(work.bytes for work in works if work.kind == "all_to_all"))
    assert sent[1] == pytest.approx(2 * sent[0])


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_gathered_layers_never_run_further_ahead_than_prefetch(prefetch: int) -> None:
    """However slow the layers: FSDP frees a layer before it gathers beyond the next ones."""
    strategy = megatron(8, recompute="selective", recompute_modules=("mlp",))
    dense = msgspec.structs.replace(strategy.dense, zero=3, reshard_after_forward=True, prefetch=prefetch)
    strategy = with_(strategy, dense=dense)
    result = play(deep(), strategy, 8, 4096)
    layer = make_context(deep(), strategy, TrainSpec(seq_len=4096, global_batch=8), 8).layers[0][0]
    assert result.memory_by_category["gathered"] == (prefetch + 1) * layer.padded * 2


@pytest.mark.parametrize("make", [mop, fsdp2, zero_offload])
def test_gathers_end_with_the_last_layer_however_far_ahead(make: Callable[..., Strategy]) -> None:
    far, whole = (play(deep(), make(8, prefetch=ahead), 8, 4096) for ahead in (2**62, 100))
    assert deep().num_hidden_layers < 100
    assert (far.step_time, far.peak_memory) == (whole.step_time, whole.peak_memory)


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_dropout_and_kept_scores_are_kept(tensor: int) -> None:
    """arXiv 2205.05198 equation 4: s b h (34 + 5 a s / h) / t, the most; 32 and 2 without dropout."""
    s, h, a = 2048, GPT3.hidden_size, GPT3.num_attention_heads
    shapes = Shapes(s // tensor, s, tensor=tensor, fused=True, flash=False)
    dropped = msgspec.structs.replace(GPT3, dropout=0.1)
    assert kept(decoder_layer(dropped, shapes, 0)) == (34 * s * h + 5 * a * s * s) // tensor
    assert kept(decoder_layer(GPT3, shapes, 0)) == (32 * s * h + 2 * a * s * s) // tensor
    again = kept(decoder_layer(dropped, shapes, 0), "selective", ("core_attn",))
    assert again == 34 * s * h // tensor  # the point of selective recomputation


def test_an_operator_that_is_kept_is_not_run_again() -> None:
    """torchtitan's list on a Llama layer: input, wq, wv, attention (and its row sums), w1 and w2."""
    model = load_model("llama3_8b")
    tokens, H, F, kv = 1024, model.hidden_size, model.intermediate_size, 8 * 128
    tape = decoder_layer(model, Shapes(tokens, tokens), 0)
    names = ("q_proj", "v_proj", "attention_core", "gate_proj", "down_proj")
    chosen = plan(tape, "full", (), names)
    held = sum(size for item in forward(tape, chosen) for _, size in item.memory)
    assert held == 2 * tokens * (H + H + kv + H + F + H) + 4 * tokens * model.num_attention_heads
    played = backward(tape, chosen)
    again = [item.kernel.name for item in played if not item.backward]
    assert set(again) == {kernel.name for kernel in tape.kernels} - set(names)
    assert len(again) == len(set(again))
    left = sum(size for item in [*forward(tape, chosen), *played] for _, size in item.memory)
    assert left == tape.inputs[0].bytes


@pytest.mark.parametrize("experts", [False, "shared"])
def test_plain_experts_are_whole_on_every_replica_and_used_where_they_lie(experts: bool | str) -> None:
    strategy = fsdp2(8, expert_parallel=4, recompute="full")
    plain = with_(strategy, experts=msgspec.structs.replace(strategy.experts, expert_fsdp=1))
    software = changed("mopexec-fsdp2", sharding={"experts": experts})
    model, training = small(num_hidden_layers=4), TrainSpec(seq_len=256, global_batch=8)
    sharded = simulate(model, MACHINE, 1, strategy, training)
    whole = simulate(model, MACHINE, 1, plain, training, software)
    if experts:
        assert simulate(model, MACHINE, 1, strategy, training, software).peak_memory == sharded.peak_memory
    routed = sum(t.numel for t in tensors(model) if t.routed) // 4
    assert whole.memory_by_category["optimizer"] >= 2 * 4 * routed
    assert whole.resident_memory > sharded.resident_memory
    ops = lower(model, plain, training, stack=software).programs[0].ops
    assert not [op.name for op in ops if op.name.startswith("gather") and "experts" in op.name]


def test_gradients_of_fsdp_live_from_the_first_backward_to_the_end_of_the_step() -> None:
    strategy = with_(fsdp2(8), experts=Experts(), pipeline=Pipeline())
    kept_ops = with_(strategy, activations=Activations(recompute="full", save_ops=("q_proj",)))
    result = simulate(deep(), MACHINE, 1, kept_ops, TrainSpec(seq_len=256, global_batch=32), timeline=True)
    curve = result.memory_curve_by_category["grads"]
    assert curve[0] == 0
    assert max(curve) == result.highest_by_category["grads"] > 0


@pytest.mark.parametrize(("heads", "fused"), [(8, False), (4, False), (4, True)])
def test_the_backward_of_flash_attention_needs_room(heads: int, fused: bool) -> None:
    """dq in fp32, and a row's sum of dO x O for each head; without a fused stack also dk and dv for each
    query head where heads share them."""
    model = deep(num_attention_heads=8, num_key_value_heads=heads)
    tape = decoder_layer(model, Shapes(512, 512, fused=fused), 0)
    core = next(kernel for kernel in tape.kernels if kernel.name == "attention_core")
    width = 8 * model.head_dim
    room = width * (4 + 4 * (heads < 8 and not fused)) + 8 * 4
    assert dict(core.back_scratch) == {"activations": 512 * room}


def test_a_lone_rank_has_the_whole_host() -> None:
    alone, all_of_them = (
        simulate(deep(), MACHINE, 1, fsdp2(ranks), TrainSpec(seq_len=256, global_batch=8)) for ranks in (1, 8)
    )
    assert alone.host_limit == 8 * all_of_them.host_limit


@pytest.mark.parametrize(("dtype", "width"), [("fp8", 1.0), ("mxfp8", 1.03125), ("nvfp4", 0.5625)])
def test_products_keep_their_cast_inputs(dtype: str, width: float) -> None:
    """Of a gated layer: the inputs of qkv, o, the FFN and its last product are kept cast."""
    model = load_model("llama3_8b")
    tokens, H, F = 1024, model.hidden_size, model.intermediate_size
    tape = decoder_layer(model, Shapes(tokens, tokens, fused=True), 0)
    cast = H + H + H + F
    less = kept(tape) - kept(quantized(tape, width / 2, (), ()))
    assert less == tokens * (2 * (cast - H) - width * cast)  # attention keeps its output beside the cast copy


def test_a_discarded_input_is_not_kept_cast() -> None:
    model = load_model("qwen3_30b_a3b")
    tape = decoder_layer(model, Shapes(256, 256, fused=True), 0, (64,) * 128)
    plain = quantized(tape, 0.5, ("moe_act",), ())
    down = next(kernel for kernel in plain.kernels if kernel.name == "experts_down")
    assert down.saves == ("act",)
    assert kept(plain, "selective", ("moe_act",)) < kept(quantized(tape, 0.5, (), ()))


@pytest.mark.parametrize(
    ("loss", "held", "bytes_each"),
    [
        ("composed", True, 2 + 3 * 4),
        ("composed", "copy", 4 * 4),
        ("fused", True, 2 + 2),
        ("upcast", True, 2 + 4 + 2),
        ("upcast", "cut", 2 * 4),
        ("upcast", "torchtitan-compile", 2 + 4),
        ("compiled", "torchtitan-compile", 2 + 2),
    ],
)
def test_bytes_of_a_logit_at_the_peak_of_the_loss(loss: str, held: bool | str, bytes_each: int) -> None:
    """torch's cross entropy of cast logits, which its caller holds (not mopexec's), or their cast: that, the
    log-probabilities and two gradients in fp32. A gradient in place of the cast (Liger's, Unsloth's) is put
    into zeros where the cast was cut (transformers before 4.50). torchtitan has deleted the logits."""
    strategy = with_(fsdp2(8), activations=Activations(recompute="full", save_ops=("q_proj",)))
    cut = held == "cut"
    if held == "torchtitan-compile":
        held = load_stack(held).kernels.logits_held
    kernels = {"loss": loss, "logits_held": not cut and held, "logits_cut": cut}
    software = unfused("copies", kernels=kernels, sharding={"fsdp": True})
    model = deep(1, vocab_size=32_000)
    result = simulate(model, MACHINE, 1, strategy, TrainSpec(seq_len=4096, global_batch=8), software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * bytes_each


@pytest.mark.parametrize("stages", [1, 2])
def test_logits_may_be_held_in_pipelines_alone(stages: int) -> None:
    """By torch.distributed.pipelining, whose cache has a microbatch's output until its backward is over."""
    took: dict[bool | str, int] = {}
    strategy = with_(fsdp2(2 * stages, fsdp=2, expert_fsdp=2), pipeline=Pipeline(pipeline_parallel=stages))
    training = TrainSpec(seq_len=4096, global_batch=8)
    for held in (True, False, "pipelines"):
        kernels = {"logits_held": held, "loss": "composed"}
        software = unfused("copies", kernels=kernels, sharding={"fsdp": True})
        result = simulate(deep(2, vocab_size=32_000), MACHINE, 1, strategy, training, software)
        took[held] = result.peak_by_stage[-1]
    assert took["pipelines"] == took[stages > 1]
    assert took[True] - took[False] == 4096 * 32_000 * 2


@pytest.mark.parametrize(("loss", "bytes_each"), [("gathered", 2 + 3 * 4), ("in_place", (2 + 4) / 4)])
def test_logits_that_every_tensor_rank_gathers_are_whole(loss: str, bytes_each: float) -> None:
    """Of torch's cross entropy as above, at any degree; Megatron-LM splits logits and softmax."""
    software = unfused(kernels={"loss": loss})
    model, training = deep(1, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=1)
    result = simulate(model, MACHINE, 1, megatron(4, tensor_parallel=4), training, software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * bytes_each


def test_a_loss_is_the_programs_whoever_shards_state() -> None:
    """Megatron-LM's is in place on the copy under Megatron-FSDP too; torch's on one rank makes its gradient
    and that of its copy beside it, when no gradient of a weight is there yet."""
    model, training = deep(1, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=4)
    software = unfused("copies", sharding={"fsdp": True})
    result = simulate(model, MACHINE, 1, fsdp2(4, fsdp=4, expert_fsdp=4), training, software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * (2 + 4)
    eager, training = load_stack("generic-eager"), TrainSpec(seq_len=4096, global_batch=1)
    result = simulate(model, MACHINE, 1, megatron(1), training, eager)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * (2 + 3 * 4)
    assert "grads" not in result.memory_by_category


@pytest.mark.parametrize(("loss", "tensors"), [("composed", 3), ("loss_parallel", 4), ("compiled", 2)])
def test_torchs_loss_on_slices_holds_one_more_of_them(loss: str, tensors: int) -> None:
    """Log-probabilities, zeros with the picked ones, the exponential and their sum, beside logits in bf16;
    compiled, the picked ones and the gradient."""
    software = unfused("copies", kernels={"loss": loss}, sharding={"fsdp": True})
    model, training = deep(1, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=1)
    sliced = Vocabulary(vocab_parallel=4, loss="vocab_parallel")
    strategy = with_(fsdp2(4, tensor_parallel=4), vocabulary=sliced)
    result = simulate(model, MACHINE, 1, strategy, training, software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 / 4 * (2 + 4 * tensors)


def test_torchs_compiled_loss_holds_logits_and_their_gradient() -> None:
    software = unfused("copies", kernels={"loss": "compiled"}, sharding={"fsdp": True})
    model, training = deep(1, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=8)
    result = simulate(model, MACHINE, 1, fsdp2(8), training, software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * (2 + 2)


@pytest.mark.parametrize(("where", "tensors"), [("in_place", 1), ("apart", 2), ("in_place_if_whole", 2)])
def test_a_stack_says_where_a_fused_loss_makes_its_gradient(where: str, tensors: int) -> None:
    """ZeRO-3 stood for it, which no kernel knows of; where a stack says nothing it does still."""
    kernels = {"loss": "fused", "logit_grads": where}
    software = unfused("copies", kernels=kernels, sharding={"fsdp": True})
    model, training = deep(1, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=8)
    result = simulate(model, MACHINE, 1, fsdp2(8), training, software)
    assert result.highest_by_category["logits"] == 4096 * 32_000 * 2 * tensors
    whole = simulate(model, MACHINE, 1, megatron(8), training, unfused(kernels=kernels))
    assert whole.highest_by_category["logits"] == 4096 * 32_000 * 2 * (1 + (where == "apart"))


def test_a_residual_stream_in_fp32_is_kept_as_wide() -> None:
    """Layers' inputs under full recomputation, of which one is kept for each layer; no byte is left over."""
    model, training = deep(4, vocab_size=32_000), TrainSpec(seq_len=4096, global_batch=8)
    hidden = 4096 * model.hidden_size * 2
    narrow, wide = (
        simulate(model, MACHINE, 1, fsdp2(8), training, unfused(kernels={"stream": stream}))
        for stream in ("compute", "float32")
    )
    assert wide.peak_by_phase["backward"] - narrow.peak_by_phase["backward"] >= 4 * hidden
    assert wide.resident_memory == narrow.resident_memory
    assert wide.peak_by_phase["optimizer"] == narrow.peak_by_phase["optimizer"]


def test_a_residual_stream_in_fp32_exchanges_experts_rows_as_narrow() -> None:
    """DeepEP's rows are counted by the choices that each is sent for."""
    strategy, jobs, found = megatron(8, expert_parallel=8), TrainSpec(seq_len=64, global_batch=8), []
    routed = msgspec.structs.replace(strategy.experts, token_dispatcher="deepep")
    strategy = msgspec.structs.replace(strategy, experts=routed)
    for stream in ("compute", "float32"):
        program = lower(small(), strategy, jobs, stack=unfused(kernels={"stream": stream})).programs[0]
        works = [work for op in program.ops for work in op.work if work.kind == "all_to_all"]
        found.append([work.group.choices for work in works if work.group])
    assert found[0] == found[1]
    assert any(found[0])


def test_a_buffer_of_reductions_lives_through_the_step() -> None:
    model, training = deep(1), TrainSpec(seq_len=4096, global_batch=8)
    plain, buffered = (
        simulate(model, MACHINE, 1, fsdp2(8), training, unfused(sharding={"reduce_buffer": size}))
        for size in (0.0, 1e6)
    )
    assert buffered.resident_memory - plain.resident_memory == 1e6
    assert buffered.peak_memory - plain.peak_memory == 1e6


def test_tokens_that_arrive_once() -> None:
    """Of 8 experts chosen among 128, 16 a rank: two thirds of all ranks' tokens, not a row a route."""
    model = load_model("qwen3_30b_a3b")
    routes = (512,) * 16  # of 8 ranks with 1024 tokens each
    tape = decoder_layer(model, Shapes(1024, 1024, fused=True), 0, routes, split=True, deduplicated=True)
    arrived = next(value for name, value in tape.values.items() if name.endswith("arrived"))
    tokens = arrived.bytes / (2 * model.hidden_size)
    assert tokens == pytest.approx(8 * 1024 * (1 - (7 / 8) ** 8), rel=0.02)


def test_what_came_from_other_ranks_may_be_kept_for_the_recomputation() -> None:
    strategy = with_(
        fsdp2(8, expert_parallel=8),
        activations=Activations(recompute="full", save_ops=("dispatch", "combine")),
    )
    software = unfused("copies", sharding={"fsdp": True})
    model = small(num_hidden_layers=4)
    program = lower(model, strategy, TrainSpec(seq_len=256, global_batch=8), 8, software).programs[0]
    exchanges = [op for op in program.ops if {work.kind for work in op.work} == {"all_to_all"}]
    assert {op.phase for op in exchanges} == {"forward", "backward"}
    assert len(exchanges) == 4 * model.num_moe_layers


def test_a_reentrant_checkpoint_holds_what_it_recomputed() -> None:
    """As under DeepSpeed: its output, and the gradient that came for it."""
    training = TrainSpec(seq_len=4096, global_batch=8)
    first, second = (
        simulate(
            deep(), MACHINE, 1, zero_offload(8), training,
            changed("deepspeed", recompute={"holds_output": holds}),
        )
        for holds in (False, True)
    )  # fmt: skip
    more = second.highest_by_category["activations"] - first.highest_by_category["activations"]
    assert more == 2 * 4096 * 1024 * 2


def test_a_flash_kernel_draws_its_mask_and_kept_scores_have_a_kernel_for_it() -> None:
    plan = megatron(1, recompute="none")
    training = TrainSpec(seq_len=2048, global_batch=1)

    def drops(dropout: float, flash: bool) -> set[bool]:
        kernel = "profile" if flash else "scores"
        software = changed("megatron-core", kernels={"attention": {"default": kernel}})
        model = msgspec.structs.replace(GPT3, dropout=dropout)
        ops = lower(model, plan, training, 8, software).programs[0].ops
        return {work.drops for op in ops for work in op.work if work.kind == "attention"}

    assert drops(0.1, True) == {True}
    assert drops(0.0, True) == drops(0.1, False) == {False}
