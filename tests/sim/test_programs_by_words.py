"""The program that a row's words name, the month of a row, and what follows from both."""

import pytest

from mopsim.spec.stacks import load_stack
from mopsim.validate.facts import facts, programs, rules, stack_names
from mopsim.validate.rows import read_case
from tests.sim.test_validate import MODELS, row


def test_every_stack_that_is_named_exists() -> None:
    named = {*stack_names().values(), *(rule.set["stack"] for rule in rules() if "stack" in rule.set)}
    named |= {one.stack for one in programs() if one.stack}
    for name in named:
        assert load_stack(name).name == name


@pytest.mark.parametrize(
    ("source", "notes", "sharding", "stack"),
    [
        ("new", "NeMo AutoModel 25.11, FSDP2", "zero3", "nemo-automodel-hf"),
        ("torchtitan-2026", "", "zero3", "torchtitan"),
        ("new", "Megatron-LM core_r0.15", "zero1", "megatron-lm"),
        ("new", "Megatron-Core, permute fusion", "zero1", "megatron-core"),
        ("new", "Megatron-Bridge, FSDP", "zero3", "megatron-fsdp"),
        (
            "new",
            "Megatron-Bridge, library recipe qwen3_8b_pretrain_config",
            "zero1",
            "megatron-bridge-library",
        ),
        ("new", "Megatron-Bridge, deepseek_v3_pretrain_config", "zero1", "megatron-bridge"),
        ("new", "Megatron-LM of 2026-03, configs/megatron_moe_30b.yaml", "zero1", "megatron-lm"),
        ("new", "Megatron-MoE", "zero1", "megatron-core"),
        ("new", "torch 2.12, one device, eager", "zero1", "generic-eager"),
        ("new", "torch 2.12, eager attention", "zero1", "generic-fused"),
        ("new", "torchtitan, eager FSDP2, loss alone compiled", "zero3", "torchtitan"),
        ("new", "torchtitan, 2026-02; only the loss is compiled; SDPA", "zero3", "torchtitan"),
        ("new", "halo, 2026-10; gpt-oss 20B", "zero3", "halo"),
        ("new", "torchtitan, whether compiled is not said", "zero3", "torchtitan"),
        ("new", "torchtitan, compiled blocks; the loss is not compiled", "zero3", "torchtitan-compile"),
        ("new", "torchtitan, network and loss compiled", "zero3", "torchtitan-compile"),
        ("new", "NeMo 25.09 performance script, 2026-04", "zero1", "nemo"),
        ("new", "NeMo 26.04", "zero1", "megatron-bridge"),
        ("new", "TorchTitan, torch.compile off", "zero3", "torchtitan"),
        ("new", "torchtitan, compile.enable: false", "zero3", "torchtitan"),
        ("new", "torchtitan, compile disabled", "zero3", "torchtitan"),
        ("new", "torchtitan, compiled blocks and loss", "zero3", "torchtitan-compile"),
        ("new", "torchtitan, torch.compile of blocks; loss compiled", "zero3", "torchtitan-compile"),
        ("new", "torchtitan, model compiled, loss compiled", "zero3", "torchtitan-compile"),
        ("new", "Primus, torchtitan backend, no compile", "zero3", "torchtitan"),
        ("new", "Primus, torchtitan backend, compiled", "zero3", "torchtitan-compile"),
        ("new", "NeMo 24.09, accelerated, weights of Hugging Face", "zero1", "nemo"),
        ("new", "verl, megatron backend", "zero1", "megatron-core"),
        ("new", "verl, FSDP backend", "zero3", "generic-eager"),
        ("new", "torchtitan 2026-06, eager", "zero3", "torchtitan-2026"),
        ("new", "LLaMA-Factory, DeepSpeed ZeRO-3", "zero3", "deepspeed"),
        ("new", "Axolotl, DeepSpeed ZeRO-3, Liger", "zero3", "deepspeed-liger"),
        ("new", "TRL SFTTrainer, DeepSpeed, Transformers 5.6", "zero3", "deepspeed-transformers5"),
        ("new", "TRL SFTTrainer, FSDP2, Liger kernels", "zero3", "transformers-trl"),
        ("new", "TRL SFTTrainer with FSDP1", "zero3", "transformers-fsdp1"),
        ("new", "TRL SFTTrainer, FSDP2", "zero3", "trl"),
        ("new", "Megatron-SWIFT", "zero1", "megatron-core"),
        ("new", "Megatron-SWIFT of 2026-04", "zero1", "megatron-swift"),
        ("new", "AlephAlpha scaling, Aleph-Alpha/scaling", "zero1", "aleph-scaling"),
        ("new", "Megatron-Bridge, recipe qwen3_4b_pretrain", "zero1", "megatron-bridge-library"),
        ("new", "Megatron-Bridge 2026-07, full SFT on packed rows", "zero1", "megatron-bridge-library"),
        ("new", "Megatron-Bridge 2026-08, SFT on packed sequences", "zero1", "megatron-bridge-library"),
        ("new", "Megatron-Bridge 2026-07, performance scripts, full SFT", "zero1", "megatron-bridge"),
        ("new", "PaddlePaddle 2.5.1, AMP O2", "zero2", "paddlenlp-2.5"),
        ("new", "EasyContext of 2024-04, DeepSpeed ZeRO-3", "zero3", "easycontext"),
        ("new", "TinyLlama, lit-gpt fork under Lightning Fabric", "zero3", "tinyllama"),
        ("new", "open_lm of 202312, FSDP1", "zero3", "open-lm"),
        ("new", "Megatron-Core CI, tests/functional_tests/test_cases/moe", "zero1", "megatron-lm"),
        ("new", "PaddleNLP of 2024-01", "zero1", "paddlenlp"),
        ("new", "KempnerForge, eager", "zero3", "kempnerforge"),
        ("new", "prime-rl SFT", "zero3", "prime-rl"),
        ("new", "torchtitan, recompile off, compile disabled", "zero3", "torchtitan"),
        ("new", "DeepSpeed ZeRO-3 (vs torchtitan)", "zero3", "deepspeed"),
        ("new", "no torchtitan, our own trainer", "zero3", "generic-eager"),
        ("new", "DeepSpeed ZeRO-3", "zero3", "deepspeed"),
        ("new", "Megatron-DeepSpeed", "zero1", "megatron-deepspeed"),
        ("new", "GPT-NeoX (DeeperSpeed) of 2023-01", "zero1", "gpt-neox"),
        ("new", "Megatron-DeepSpeed, GPT-NeoX tokenizer", "zero1", "megatron-deepspeed"),
        ("dgxc-nemo-2505", "", "zero1", "nemo"),
        ("nemo-rl-9", "", "zero1", "nemo-rl"),
        ("nemo-rl", "", "zero1", "nemo-rl"),
        ("nemo-automodel-9", "DDP", "zero1", "generic-fused"),
        ("new", "Nemotron by our own trainer", "zero1", "generic-fused"),
        ("new", "Primus v25.9", "zero1", "megatron-core"),
        ("new", "foundation-model-stack/fms-fsdp", "zero3", "fms-fsdp"),
        ("new", "InternEvo", "zero1", "internevo"),
        ("new", "plain PyTorch with DDP", "none", "generic-eager"),
        ("nanotron-bench", "", "zero1", "nanotron"),
        ("new", "our own trainer", "zero3", "generic-eager"),
        ("new", "our own trainer", "zero1", "generic-fused"),
        ("new", "our own trainer, torch 2.5, attn_implementation eager", "zero1", "generic-fused"),
        ("new", "our own trainer, torch.compile, 10% over eager", "zero1", "generic-compile"),
        ("new", "our own trainer, torch 2.5, eager", "zero1", "generic-eager"),
    ],
)
def test_a_source_never_seen_has_the_stack_that_it_names(
    source: str, notes: str, sharding: str, stack: str
) -> None:
    found = read_case(row(source=source, notes=notes, sharding=sharding), MODELS)
    assert found.stack == stack
    told = any(text.startswith(f"stack {stack}: none is stated") for text in found.assumptions)
    assert told


def test_attention_of_torchtitan_is_by_the_card_and_the_release() -> None:
    for stack in ("torchtitan", "torchtitan-compile"):
        for when, kernels in (
            ("202506", ("flash2", "flash2", "cudnn")),
            ("202511", ("flash2", "cudnn", "cudnn")),
        ):
            found = read_case(row(stack=stack, source_ref=f"benchmarks/llama3_{when}.md"), MODELS).program()
            on = tuple(found.on(one).attention for one in ("ampere", "hopper", "blackwell"))
            assert on == kernels


@pytest.mark.parametrize(
    ("when", "recompute", "model", "ep", "stack"),
    [
        ("20250915", "full", "qwen3_30b_a3b", "8", "torchtitan"),
        ("20250915", "full", "qwen3_30b_a3b", "1", "torchtitan-compile"),
        ("20250915", "none", "qwen3_30b_a3b", "8", "torchtitan-compile"),
        ("20250915", "full", "llama3_8b", "1", "torchtitan-compile"),
        ("20251115", "full", "qwen3_30b_a3b", "8", "torchtitan-compile"),
        ("20251115", "full", "gpt_oss_20b", "8", "torchtitan"),
        ("20260315", "none", "gpt_oss_20b", "1", "torchtitan"),
        ("20260415", "full", "gpt_oss_20b", "8", "torchtitan-compile"),
    ],
)
def test_layers_that_torchtitan_left_in_eager(
    when: str, recompute: str, model: str, ep: str, stack: str
) -> None:
    """Checkpointed ones with experts on ranks of their own until October 2025; gpt-oss's until March 2026."""
    cells = {"notes": "torch.compile", "source_ref": when, "etp": "1"}
    found = read_case(row(source="torchtitan", model=model, recompute=recompute, ep=ep, **cells), MODELS)
    assert found.stack == stack
    assert found.program().kernels.loss != "loss_parallel"


def test_attention_of_nemo_is_by_the_launcher_and_the_release() -> None:
    for source, notes, kernel in (
        ("nemo-framework-launcher", "NeMo 24.05", "flash2"),
        ("nemo-framework-launcher", "NeMo 24.09", "profile"),
        ("a page", "NeMo 24.05", "profile"),
    ):
        found = read_case(row(source=source, stack="nemo", notes=notes), MODELS)
        assert found.program().attention == kernel


def test_nemo_launcher_reduces_no_scales_over_data_ranks_until_may_2024() -> None:
    for source, notes, kernels in (
        ("nemo-framework-launcher", "NeMo 24.01", (16, "none")),
        ("nemo-framework-launcher", "NeMo 24.05", (0, "none")),
        ("nemo-framework-launcher", "NeMo 24.09", (0, "world")),
        ("a page", "NeMo 24.05", (0, "world")),
    ):
        found = read_case(row(source=source, stack="nemo", notes=notes, precision="fp8"), MODELS)
        made = found.program().kernels
        assert (made.scale_updates, made.scale_sums) == kernels


def test_files_of_nemo_launcher_leave_work_to_torch() -> None:
    for model, notes, kernels in (
        ("nemotron_8b", "NeMo 24.01", ("composed", "composed")),
        ("nemotron_8b", "NeMo 24.05", ("fused", "fused")),
        ("llama2_7b", "NeMo 24.01", ("strided", "fused")),
        ("llama2_7b", "NeMo 24.05", ("fused", "fused")),
    ):
        found = read_case(
            row(source="nemo-framework-launcher", stack="nemo", model=model, notes=notes), MODELS
        )
        made = found.program().kernels
        assert (made.activation, made.weight_grads) == kernels


@pytest.mark.parametrize(
    ("gpu", "when", "kept"),
    [
        ("b200-sxm-192g", "2.9.0.dev20250815", False),
        ("b200-sxm-192g", "20251201", True),
        ("h100-sxm-80g", "20250815", True),
        ("h100-sxm-80g", "20251115", False),
        ("a100-sxm-80g", "20251115", True),
    ],
)
def test_selective_checkpoints_of_torchtitan_keep_what_is_on_their_list(
    gpu: str, when: str, kept: bool
) -> None:
    """Its list had no attention of cuDNN's until December 2025."""
    for stack in ("torchtitan", "torchtitan-compile"):
        found = read_case(row(stack=stack, gpu=gpu, source_ref=when, recompute="selective"), MODELS)
        assert ("attention_core" in found.program().recompute.kept) is kept


@pytest.mark.parametrize(
    ("model", "when", "rotary"),
    [
        ("qwen3_8b", "20251115", "halves"),
        ("gpt_oss_20b", "202606", "upcast"),
        ("llama3_8b", "20251115", "composed"),
    ],
)
def test_qwen3_and_gpt_oss_rotate_halves_in_torchtitan(model: str, when: str, rotary: str) -> None:
    found = read_case(row(stack="torchtitan", model=model, source_ref=when), MODELS)
    assert found.program().kernels.rotary == rotary


def test_a_compiled_torchtitan_since_may_2026_has_its_loss_in_chunks() -> None:
    for when, stack, loss in (
        ("20260430", "torchtitan-compile", "full"),
        ("20260512", "torchtitan-compile-2026", "chunked"),
        ("20270101", "torchtitan-compile-2026", "chunked"),
    ):
        found = read_case(
            row(source="torchtitan", notes="torch.compile", source_ref=when, loss="unknown"), MODELS
        )
        assert (found.stack, found.strategy.vocabulary.loss) == (stack, loss)
    program = found.program()
    assert (program.kernels.loss_chunks, program.reading.memory) == ("autograd", "reserved")
    assert "k_proj" in program.recompute.kept
    for notes, stack in (("torch.compile", "torchtitan-compile-2026"), ("", "torchtitan-2026")):
        undated = row(source="torchtitan", notes=notes, loss="chunked")
        assert read_case(undated, MODELS).stack == stack
    whole = read_case(row(stack="torchtitan-compile-2026", loss="full"), MODELS)
    assert whole.strategy.vocabulary.loss == "full"
    cells = {"seq_len": "4096", "micro_batch": "4", "global_batch": "32", "loss": "chunked"}
    for stack, chunk in (("torchtitan-2026", 4 * 4096 // 8), ("trl", 256)):
        assert read_case(row(stack=stack, **cells), MODELS).strategy.vocabulary.chunk_tokens == chunk


def test_torchtitan_gathers_in_float8_and_traces_where_its_notes_say_so() -> None:
    for notes, gathers in (("float8 all-gather", "cast"), ("no float8 all-gather", "compute")):
        assert read_case(row(stack="torchtitan", notes=notes), MODELS).program().sharding.gathers == gathers
    for notes, modules in (("compiler_toolkit", False), ("graph_trainer; eager FSDP2", True)):
        assert read_case(row(stack="torchtitan", notes=notes), MODELS).program().host.modules is modules


def test_experts_are_looped_over_below_hopper_by_torchtitan_and_then_by_torch() -> None:
    cells = {"model": "qwen3_30b_a3b", "ep": "8", "etp": "1", "stack": "torchtitan"}
    for gpu, when, rule in (
        ("a100-sxm-80g", "2026-04", "torchtitan-loops-before-hopper"),
        ("l40s-48g", "2026-04", "torchtitan-loops-before-hopper"),
        ("rtx4090-24g", "2026-07", "torch-loops-before-hopper"),
        ("h100-sxm-80g", "2026-04", ""),
    ):
        found = facts(row(**cells, gpu=gpu, notes=when))
        used = [one.id for one in found.rules if one.id.endswith("loops-before-hopper")]
        assert used == [rule] * bool(rule)
        looped = found.settings.get("stack.kernels.expert_products") == "looped"
        assert looped == (found.settings.get("stack.host.counts_read") == "always") == bool(rule)
    assert facts(row(**cells, gpu="abacus")).row["architecture"] == ""


def test_primus_since_august_2026_forces_routes_round_the_experts() -> None:
    cells = {"source": "amd", "notes": "Primus", "gpu": "mi355x-288g", "sharding": "zero1"}
    for when, routes in (("20260716", "independent"), ("20261010", "consecutive"), ("", "consecutive")):
        found = read_case(row(source_ref=when, **cells), MODELS)
        assert (found.stack, found.program().balanced_routes) == ("primus-2026", routes)
    assert found.program().kernels.loss == "fused"
    assert read_case(row(**cells | {"gpu": "h100-sxm-80g"}), MODELS).stack == "megatron-core"


def test_gradients_of_megatron_swift_are_narrow_until_its_flag_is_passed_on() -> None:
    for when, grad, loss in (("202604", "compute", "fused"), ("202609", "float32", "native")):
        found = read_case(row(notes=f"Megatron-SWIFT ({when}), permute fusion"), MODELS)
        program = found.program()
        assert found.stack == "megatron-swift"
        assert (program.dtypes.grad, program.kernels.row_sums, program.kernels.loss) == (
            grad, "gathered", loss
        )  # fmt: skip
    told = {"stack": "generic-eager", "sharding": "none"}
    for notes, adamw in (("torch.optim.AdamW by default", "foreach"), ("torch.optim.AdamW, fused", "fused")):
        assert read_case(row(**told, notes=notes), MODELS).program().kernels.adamw == adamw


def test_the_month_of_a_row_is_the_latest_that_it_names_else_the_first_of_its_card_and_network() -> None:
    for cells, month in (
        ({"source_ref": "benchmarks/llama3_h100_202412_x.md"}, ("2024-12", "yes")),
        ({"notes": "2025-11-02, NeMo 26.04"}, ("2026-04", "yes")),
        (
            {"notes": "20480 tokens, 201012 samples, issue 2025123456", "gpu": "b200-sxm-192g"},
            ("2024-11", ""),
        ),
        ({"gpu": "b200-sxm-192g", "model": "gpt_oss_20b"}, ("2025-08", "")),
        ({"gpu": "a100-sxm-80g", "model": "gpt"}, ("", "")),
        ({"notes": "August 2026"}, ("2026-08", "yes")),
        ({"notes": "run of Aug 3, 2026"}, ("2026-08", "yes")),
        ({"notes": "2026/8"}, ("2026-08", "yes")),
        ({"notes": "15.08.2026"}, ("2026-08", "yes")),
        ({"notes": "08/2026"}, ("2026-08", "yes")),
        ({"notes": "202605 tokens, commit 20260512abc, 2026-05-994"}, ("2024-04", "")),
    ):
        found = facts(row(**cells)).row
        assert (found["date"], found["dated"]) == month, cells


def test_routes_are_forced_where_a_row_says_so() -> None:
    cells = {"model": "qwen3_30b_a3b", "ep": "8", "etp": "1", "stack": "torchtitan", "routing": "balanced"}
    for notes, routing in (
        ("forced balance, no graphs", "forced"), ("fake balanced gate", "forced"), ("", "balanced"),
        ("even routing (forced)", "forced"),
        ("--moe-router-force-load-balancing", "forced"), ("moe_router_force_load_balancing", "forced"),
        ("real C4 without forced balance", "balanced"), ("force_load_balance=false", "balanced"),
    ):  # fmt: skip
        assert read_case(row(**cells, notes=notes), MODELS).training.routing == routing
    assert read_case(row(**{**cells, "routing": "forced"}), MODELS).training.routing == "forced"


def test_halo_of_october_2026_keeps_parameters_and_gathers_rows() -> None:
    notes = "halo, {}; AdamW bf16 with stochastic rounding; filler text"
    late, early = (
        read_case(row(source="new", sharding="zero3", notes=notes.format(month)), MODELS)
        for month in ("2026-10", "2026-05")
    )
    assert late.stack == early.stack == "halo"
    assert late.strategy.dense.reshard_after_forward is early.strategy.dense.reshard_after_forward is False
    assert [one.program().kernels.row_sums for one in (late, early)] == ["gathered", "atomic_if_sparse"]
    assert late.program().kernels.logits_held is False
    assert late.strategy.precision.moments == "bfloat16"


def test_mlperf_replays_llama_in_eight_bits_as_one_graph() -> None:
    cells = {"source": "new-mlperf", "sharding": "zero1", "model": "llama3_8b", "gpu": "b200-sxm-192g"}
    for precision, more, graphs in (
        ("fp8", "", ("step",)),
        ("fp8", "; no CUDA graphs", ()),
        ("nvfp4", "", ()),
    ):
        notes = f"MLPerf Training 5.1, llama31_8b, NeMo, 2025-10{more}"
        found = read_case(row(precision=precision, notes=notes, **cells), MODELS)
        assert found.program().host.graphs == graphs


@pytest.mark.parametrize(
    ("notes", "ordered", "fills"),
    [
        ("torchtitan, 2025-03, eager, deterministic; nn.RMSNorm", True, True),
        ("torchtitan, 2026-07, deterministic", True, False),
        ("Megatron-LM, deterministic mode", True, True),
        ("Megatron-LM, deterministic mode off", False, False),
        ("torchtitan, 2025-03, non-deterministic", False, False),
        ("torchtitan, 2025-03, deterministic=False", False, False),
        ("torchtitan, 2025-03, deterministic routing", False, False),
        ("Megatron-LM, deterministic data order", False, False),
        ("Megatron-LM, deterministic routing, deterministic mode", True, True),
    ],
)
def test_words_say_whether_sums_have_an_order(notes: str, ordered: bool, fills: bool) -> None:
    kernels = read_case(row(source="new", notes=notes, sharding="zero3"), MODELS).program().kernels
    assert (kernels.deterministic, kernels.fills) == (ordered, fills)


def test_recipes_of_megatron_bridge_for_sixteen_cards_fuse_what_those_for_eight_leave() -> None:
    for recipe, kernels in (
        ("qwen3_30b_a3b_sft_config", ("fused", "fused", "fused", "by_token")),
        ("qwen3_30b_a3b_sft_16gpu_h100_bf16_config", ("fused", "fused", "fused", "by_token")),
        ("qwen3_30b_a3b_sft_8gpu_h100_bf16_config", ("strided", "shifted", "torch", "halves")),
    ):
        cells = {"model": "qwen3_30b_a3b", "ep": "8", "etp": "1", "sharding": "zero1", "gpu": "h100-sxm-80g"}
        found = read_case(row(source="new", notes=f"Megatron-Bridge of 2026-07, {recipe}", **cells), MODELS)
        made = found.program().kernels
        assert found.stack == "megatron-bridge-library"
        assert (made.activation, made.expert_rows, made.top_k, made.rotary) == kernels


def test_mlperf_has_one_queue_where_recipes_have_more() -> None:
    for ref, queues in (
        ("mlcommons/training_results_v5.1@441d65f", ["one", "one"]),
        ("a page", ["each", "each"]),
    ):
        cells = {"source": "new", "source_ref": ref, "stack": "nemo", "notes": "NeMo 25.09"}
        found = read_case(row(**cells), MODELS)
        made = found.program()
        assert [made.queue(on, found.strategy) for on in ("hopper", "blackwell")] == queues


def test_words_say_where_weight_gradients_are_added() -> None:
    for notes in (
        "gradient-accumulation fusion off",
        "--no-gradient-accumulation-fusion",
        "gradient accumulation not fused",
    ):
        found = read_case(row(stack="megatron-lm", notes=notes), MODELS)
        assert found.program().kernels.weight_grads == "composed"
    fused = read_case(row(stack="megatron-lm", notes="gradient accumulation fused"), MODELS)
    assert fused.program().kernels.weight_grads == "fused"
    neox = read_case(row(notes="GPT-NeoX of 2023-01, flash attention"), MODELS)
    assert (neox.stack, neox.program().attention) == ("gpt-neox", "flash1")


def test_megatron_deepspeed_leaves_swiglu_and_rotary_embedding_to_torch() -> None:
    made = read_case(row(stack="megatron-deepspeed", model="llama3_8b", recompute="full"), MODELS).program()
    assert (made.kernels.activation, made.kernels.rotary) == ("strided", "halves")
