"""Plain programs of torch: under autocast, compiled, in copies, and read by a trainer."""

from msgspec import structs

from mopsim.graph.rewrites.stream import widened
from mopsim.graph.tape import Kernel, Matmul, Tape, Value
from mopsim.program.context import make_context
from mopsim.program.lower import lower
from mopsim.program.passes import Passes
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from mopsim.validate.facts import general_stacks
from mopsim.validate.rows import read_case
from tests.sim.test_validate import MODELS, row

LLAMA = load_model("llama3_8b")


def test_a_layer_larger_than_a_bucket_is_compiled_in_parts_where_copies_sum_gradients() -> None:
    stack, many = load_stack("generic-compile").under(0), megatron(8)
    assert stack.cut(LLAMA, many).kernels.activation == "composed"
    assert stack.cut(LLAMA, megatron(1)) is stack
    large = structs.replace(stack, sharding=structs.replace(stack.sharding, bucket=1e9))
    assert large.cut(LLAMA, many) is large
    for name in ("generic-eager", "torchtitan-compile", "megatron-core"):
        other = load_stack(name).under(0)
        assert other.cut(LLAMA, many) is other


def test_autocast_leaves_the_stream_of_whole_fp32_weights_in_fp32() -> None:
    for name, zero, wide in (
        ("generic-eager", 0, True),
        ("generic-eager", 3, False),
        ("transformers-fsdp1", 0, True),
        ("megatron-core", 0, False),
    ):
        stack = load_stack(name).under(zero)
        assert stack.wide_stream(True) is wide
        assert not stack.wide_stream(False)


def test_each_product_keeps_a_cast_of_a_wide_norm_unless_a_compiler_makes_them_one_kernel() -> None:
    """Of transformers' Llama layer under autocast, on fp32 weights, products keep 6 rows in bf16, one of them
    the attention's output, and a norm keeps what it makes before its weight in fp32; compiled 3, and nothing
    of norms (torch.autograd.graph.saved_tensors_hooks on torch 2.13)."""
    kept = {}
    for compiled in (False, True):
        made = [Value(name, 8) for name in ("h", "q", "k", "norm_normed")]
        tape = Tape(
            (Value("x", 8),),
            (
                Kernel("norm", "memory_bound", "attention", ("x",), (made[0], made[3]), ("x", "norm_normed")),
                Kernel("q_proj_sum", "memory_bound", "attention", ("h",), (), back_bytes=24.0),
                Kernel("q_proj", "matmul", "attention", ("h",), (made[1],), ("h",), (Matmul(1, 1, 1),)),
                Kernel("k_proj", "matmul", "attention", ("h",), (made[2],), ("h",), (Matmul(1, 1, 1),)),
            ),
            (),
        )
        wide = widened(tape, 2, not compiled)
        sizes = {one.name: one.bytes for kernel in wide.kernels for one in kernel.writes} | {"x": 16}
        saved = {name for kernel in wide.kernels for name in kernel.saves}
        kept[compiled] = sum(sizes[name] for name in saved)
        assert sizes["h"] == (8 if compiled else 16)
        assert max(kernel.back_bytes or 0 for kernel in wide.kernels) == (24 if compiled else 48)
    assert kept == {False: 16 + 16 + 8 + 8, True: 16 + 8 + 8}


def test_what_a_norm_makes_in_fp32_is_no_wider_beside_a_wide_stream() -> None:
    """Eager torch's own RMSNorm casts before its product with the weight or after it: a copy in fp32 is kept
    once. Without autocast norms return the products' dtype, whatever the stream is."""
    training, eager = TrainSpec(seq_len=1024, global_batch=4), load_stack("generic-eager")
    plain = structs.replace(megatron(2), stack="generic-eager")
    wide = structs.replace(plain, precision=structs.replace(plain.precision, param="float32"))
    manual = structs.replace(eager.kernels, stream="float32", autocast=False)

    def sizes(strategy: Strategy, stack: Stack) -> tuple[int, int]:
        kernels = Passes(make_context(LLAMA, strategy, training, 8, stack)).tape(0).kernels
        (norm,) = (one for one in kernels if one.name == "attention_norm")
        found = {value.name: value.bytes // (1024 * LLAMA.hidden_size) for value in norm.writes}
        return found["h"], found["attention_norm_normed"]

    assert sizes(plain, eager) == (2, 4)
    assert sizes(wide, eager) == (4, 4)
    assert sizes(plain, structs.replace(eager, kernels=manual)) == (2, 4)


def test_a_trainer_reads_the_loss_once_its_backward_is_over() -> None:
    def reads(stack: Stack) -> list[str]:
        program = lower(LLAMA, megatron(2), TrainSpec(seq_len=1024, global_batch=4), 8, stack=stack)
        return [op.phase for op in program.programs[0].ops if op.name == "loss read" and op.awaited]

    trainer = load_stack("transformers-fsdp1")
    assert set(reads(trainer)) == {"backward"}
    assert set(reads(load_stack("megatron-core"))) == {"forward"}
    silent = structs.replace(trainer, host=structs.replace(trainer.host, loss_read=False))
    assert reads(silent) == []


def test_words_say_how_plain_programs_compile_and_attend() -> None:
    assert "generic-compile" in general_stacks()
    told = {"source": "new", "sharding": "none"}
    for notes, stack, loss, attention in (
        ("torch.compile", "generic-compile", "compiled", "profile"),
        ("torch.compile, torch 2.8 (202509)", "generic-compile", "upcast", "flash2"),
        ("torch.compile, torch 2.9 (202512)", "generic-compile", "upcast", "flash2"),
        ("torch.compile, FA2, 2026-10", "generic-compile", "compiled", "flash2"),
        ("own kernels", "generic-fused", "in_place", "profile"),
    ):
        found = read_case(row(**told, notes=notes), MODELS)
        kernels = found.program().kernels
        assert (found.stack, kernels.loss, kernels.attention["default"]) == (stack, loss, attention), notes
    for notes, norm, adamw in (
        ("Trainer, Liger kernels", "fused", "foreach"),
        ("Trainer, torch.compile of each layer, fused AdamW", "fused", "fused"),
        ("Trainer with Liger's cross-entropy alone, 2025-11", "rounded", "fused"),
    ):
        kernels = (
            read_case(row(stack="transformers-fsdp1", sharding="none", notes=notes), MODELS).program().kernels
        )
        assert (kernels.norm, kernels.adamw) == (norm, adamw), notes


def test_experts_that_stay_eager_add_their_biases_eagerly() -> None:
    """A gate that torch composes beside compiled parts: rows and biases are read, their sums written."""
    model, compiled = load_model("gpt_oss_20b"), load_stack("torchtitan-compile")
    strategy = structs.replace(fsdp2(8, recompute="none"), stack="torchtitan-compile")
    moved = {}
    for gate in ("fused", "composed"):
        stack = structs.replace(compiled, kernels=structs.replace(compiled.kernels, clamped_gate=gate))
        job = TrainSpec(seq_len=4096, global_batch=8, routing="balanced")
        kernels = Passes(make_context(model, strategy, job, 8, stack)).tape(5).kernels
        moved[gate] = {one.name: one for one in kernels if one.name.endswith("_bias")}
    for name, one in moved["composed"].items():
        assert one.launches == 2
        assert (moved["fused"][name].bytes, moved["fused"][name].launches) == (0, 0)
        assert one.back_sums == moved["fused"][name].back_sums > 0


def test_biases_of_gpt_oss_are_summed_in_bulk_since_torch_2_14_and_hopper() -> None:
    """Whether blocks are compiled or not; before layers are compiled whole, experts are eager."""
    for gpu, when, summed in (
        ("b200-sxm-192g", "202609", "bulk"),
        ("b200-sxm-192g", "202606", "added"),
        ("mi300x-192g", "202609", "added"),
    ):
        for stack in ("torchtitan-2026", "torchtitan-compile-2026"):
            found = read_case(row(stack=stack, model="gpt_oss_20b", gpu=gpu, source_ref=when), MODELS)
            assert found.program().kernels.expert_bias == summed
    part = row(stack="torchtitan-compile", model="gpt_oss_20b", source_ref="202603")
    assert read_case(part, MODELS).program().kernels.clamped_gate == "composed"
