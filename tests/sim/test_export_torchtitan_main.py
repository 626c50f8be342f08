"""The module written for TorchTitan's main branch, run against the names and fields of that branch."""

import sys
import tomllib
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest

import mopsim
from mopsim.common.errors import MopError
from mopsim.common.units import format_seconds
from mopsim.export import export
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy, Vocabulary
from mopsim.strategies import fsdp2
from tests.plans import changed
from tests.sim.test_export import fsdp_context, plan

replace = msgspec.structs.replace

FIELDS = {
    "config.configs": {
        "TrainingConfig": (
            "num_tokens_per_microbatch_per_dp_rank num_tokens_per_train_step max_context_length max_norm "
            "steps enable_cpu_offload disable_cuda_graphs dtype mixed_precision_param mixed_precision_reduce "
            "gc_freq gc_debug"
        ),
        "ParallelismConfig": (
            "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
            "enable_fsdp_symm_mem tensor_parallel_degree enable_sequence_parallel spmd_backend "
            "pipeline_parallel_degree module_fqns_per_model_part pipeline_parallel_first_stage_less_layers "
            "pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage "
            "pipeline_parallel_schedule pipeline_parallel_schedule_csv num_pp_microbatches "
            "context_parallel_degree context_parallel_load_balancer context_parallel_ptrr_mask_key "
            "expert_parallel_degree"
        ),
        "CompileConfig": "enable enable_async_tensor_parallel components backend",
        "DebugConfig": "seed spmd_typechecking deterministic moe_force_load_balance print_config",
    },
    "components.data": {"ConcatThenSplitPackingConfig": "dataset", "GrainDataLoader.Config": "dataset"},
    "components.loss": {
        "CrossEntropyLoss.Config": "global_vocab_size",
        "ChunkedLossWrapper.Config": "num_chunks loss_fn",
    },
    "components.optimizer": {
        "LRSchedulersContainer.Config": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
        "default_adamw": "lr betas eps weight_decay",
    },
    "components.quantization": {
        "Float8LinearConverter.Config": "recipe_name filter_fqns emulate model_compile_enabled",
        "Float8GroupedExpertsConverter.Config": "model_compile_enabled",
        "MXFP8LinearConverter.Config": "fqns model_compile_enabled",
        "MXFP8GroupedExpertsConverter.Config": "recipe_name pad_multiple model_compile_enabled",
    },
    "distributed.activation_checkpoint": {"FullAC.Config": "", "SelectiveAC.Config": ""},
    "models.deepseek_v3.mtp": {"MTPLoss.Config": "mtp_scale global_vocab_size"},
    "models.qwen3": {"model_registry": "flavor attn_backend moe_comm_backend converters"},
    "models.llama3": {"model_registry": "flavor attn_backend tp_gemm_backend converters"},
    "models.deepseek_v3": {
        "model_registry": (
            "flavor attn_backend moe_comm_backend non_blocking_capacity_factor converters num_mtp_layers"
        )
    },
    "models.gpt_oss": {"model_registry": "flavor moe_comm_backend attn_backend converters"},
    "trainer": {
        "Trainer.Config": (
            "model_spec hf_assets_path dump_folder profiler metrics tokenizer dataloader optimizer "
            "lr_scheduler training parallelism checkpoint activation_checkpoint compile comm validator "
            "debug override loss"
        )
    },
}
"""Of torchtitan b5bcd76c (2026-08-21), the files of these modules."""


def _made(name: str, fields: str) -> Any:
    def make(**given: Any) -> SimpleNamespace:
        assert given.keys() <= set(fields.split()), f"{name} has no {given.keys() - set(fields.split())}"
        return SimpleNamespace(made=name, **given)

    return make


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package torchtitan that has these names, and takes these fields."""
    for place, names in FIELDS.items():
        module = ModuleType(f"torchtitan.{place}")
        for name, fields in names.items():
            owner, _, inner = name.partition(".")
            made = _made(name, fields)
            setattr(module, owner, SimpleNamespace(**{inner: made}) if inner else made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    text, common = ModuleType("torchtitan.hf_datasets.text_datasets"), "torchtitan.models.common.config_utils"
    text.DATASETS = {"c4": "c4"}  # type: ignore[attr-defined]
    utils = ModuleType(common)
    utils.decoder_vocab_size = lambda spec: 151936  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, text.__name__, text)
    monkeypatch.setitem(sys.modules, common, utils)


def configured(strategy: Strategy, model: str = "qwen3_30b_a3b", lossy: bool = False) -> Any:
    found: dict[str, Any] = {}
    exec(export(plan(strategy, model), "torchtitan-main", lossy=lossy)[0], found)
    return found["plan"]()


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize(
    ("network", "flavor"),
    [
        ("llama3_8b", ["llama3", "8B"]),
        ("llama3_70b", ["llama3", "70B"]),
        ("qwen3_8b", ["qwen3", "8B"]),
        ("qwen3_0_6b", ["qwen3", "0.6B"]),
    ],
)
def test_dense_networks_have_flavors(network: str, flavor: list[str]) -> None:
    dense = replace(fsdp2(32, context_parallel=2, context_exchange="all_gather"), stack="torchtitan-compile")
    text, gaps = export(plan(dense, network), "torchtitan")
    assert (list(tomllib.loads(text)["model"].values()), list(gaps)) == (flavor, [])
    assert configured(replace(dense, stack="torchtitan-compile-2026"), network).model_spec.flavor == flavor[1]


@pytest.mark.usefixtures("main")
def test_it_is_the_plan_by_hand() -> None:
    """32 ranks = 2 replicas x 8 shards x 2 context, sequences of 4,096 tokens, 64 a step."""
    made = configured(fsdp_context())
    parallel = made.parallelism
    assert (parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree) == (2, 8)
    assert (parallel.context_parallel_degree, parallel.expert_parallel_degree) == (2, 8)
    assert made.model_spec.attn_backend == "flex"
    training = made.training
    assert (training.num_tokens_per_microbatch_per_dp_rank, training.num_tokens_per_train_step) == (
        4096,
        262144,
    )
    assert training.max_context_length == 4096
    assert training.disable_cuda_graphs
    assert made.activation_checkpoint.made == "FullAC.Config"
    assert made.loss.made == "CrossEntropyLoss.Config"
    assert made.optimizer.lr == 1e-4


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize("stack", ["torchtitan-compile-2026", "torchtitan-2026"])
def test_what_its_selective_mode_keeps_is_selective(stack: str) -> None:
    given = changed(fsdp2(32, expert_parallel=8), activations={"recompute": "selective"})
    own = replace(given, stack=stack)
    assert configured(load_stack(stack).resolve(own)).activation_checkpoint.made == "SelectiveAC.Config"
    other = changed(given, activations={"recompute": "full", "save_ops": ["q_proj"]})
    with pytest.raises(MopError, match=r"save_ops: .* is not in TorchTitan's main, only"):
        configured(other)


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize("matmul", ["fp8", "mxfp8"])
def test_quantised_products_are_converters(matmul: str) -> None:
    made = fsdp2(32, expert_parallel=8)
    found = configured(replace(made, precision=replace(made.precision, matmul=matmul)))
    assert len(found.model_spec.converters) == 2


@pytest.mark.usefixtures("main")
def test_chunks_and_compiled_layers_are_those_of_the_stack() -> None:
    made = replace(fsdp2(32, expert_parallel=8), stack="torchtitan-compile-2026")
    found = configured(replace(made, vocabulary=Vocabulary(loss="chunked", chunk_tokens=512)))
    assert (found.loss.made, found.loss.num_chunks) == ("ChunkedLossWrapper.Config", 8)
    assert found.compile.enable
    for eager in ("torchtitan", "mopexec-fsdp2"):
        assert not configured(replace(made, stack=eager)).compile.enable
    assert configured(replace(made, stack="mopexec-fsdp2", compile="block")).compile.enable


@pytest.mark.usefixtures("main")
def test_what_is_not_expressed_is_not_asked_for() -> None:
    """A chunk of more rows than a rank has was written as no chunk at all; no clipping as a norm of 0."""
    made = replace(fsdp2(32, expert_parallel=8), vocabulary=Vocabulary(loss="chunked", chunk_tokens=10**6))
    made = replace(made, stack="torchtitan-compile-2026")
    assert configured(made, lossy=True).loss.made == "CrossEntropyLoss.Config"
    given = plan(made)
    given = replace(given, training=replace(given.training, clip_norm=0.0))
    found: dict[str, Any] = {}
    exec(export(given, "torchtitan-main", lossy=True)[0], found)
    assert found["plan"]().training.max_norm == 1e12


@pytest.mark.usefixtures("main")
def test_deepseek_v3_keeps_its_mtp_module() -> None:
    made = configured(fsdp2(32, expert_parallel=8), "deepseek_v3")
    assert made.model_spec.num_mtp_layers == 1
    assert made.loss.made == "MTPLoss.Config"


@pytest.mark.parametrize(
    ("strategy", "model", "says"),
    [
        (
            replace(fsdp2(32, expert_parallel=8, tensor_parallel=2), vocabulary=Vocabulary()),
            "qwen3_30b_a3b",
            "strategy.vocabulary.loss: 'full' is not in TorchTitan's main under tensor parallelism",
        ),
        (
            replace(fsdp2(32, context_parallel=2, context_exchange="ring"), stack="torchtitan"),
            "qwen3_30b_a3b",
            "strategy.attention.cp_comm_type: 'ring' is not in TorchTitan's main, only 'all_gather'",
        ),
        (
            replace(fsdp2(32, context_parallel=2, context_exchange="all_gather"), stack="torchtitan"),
            "deepseek_v3",
            "strategy.attention.context_parallel: 2 beside MTP modules is not in TorchTitan's main, only 1",
        ),
    ],
)
def test_what_it_has_not_is_refused_by_name(strategy: Strategy, model: str, says: str) -> None:
    with pytest.raises(MopError, match=says):
        export(plan(strategy, model), "torchtitan-main")


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({}, "attends to its own document alone, in the plan to all before it"),
        ({"attention_mask": "document"}, ""),
        ({"attention_mask": "document", "document_tokens": 500}, "Predicted for documents of 500 tokens"),
    ],
)
def test_documents_are_apart_whatever_the_plan_says(training: Any, says: str, lossy: bool) -> None:
    given = plan(fsdp2(32, expert_parallel=8))
    given = replace(given, training=replace(given.training, **training))
    text, gaps = export(given, "torchtitan-main", lossy=lossy)
    told = [line for line in text.splitlines() if line.startswith("#") and "document" in line]
    assert not gaps
    assert len(told) == bool(says)
    assert says in "".join(told)
    if training:
        with pytest.raises(MopError, match="attention_mask: 'document' is not in TorchTitan, only 'causal'"):
            export(given, "torchtitan")


def test_a_prediction_of_another_version_is_said_with_that_of_this_one() -> None:
    """A plan on the stack of 2024 to 2025 told its 52 s in a file for main, where a step takes 34 s."""
    machine = load_profile("h200-sxm-141g")
    made = mopsim.simulate(
        "qwen3_30b_a3b", machine, nodes=2, strategy=mopsim.fsdp2(expert_parallel=8), stack="torchtitan",
        seq_len="4K", global_batch=16,
    )  # fmt: skip
    titan = made.plan()
    text = export(titan, "torchtitan-main", lossy=True)[0]
    assert "described by torchtitan-2026 (" in text
    there = mopsim.simulate(
        "qwen3_30b_a3b", machine, nodes=2, strategy=made.result.strategy, stack="torchtitan-2026",
        seq_len="4K", global_batch=16,
    )  # fmt: skip
    assert f"{format_seconds(there.step_time_s)} a step" in text
    assert "another version" not in export(titan, "torchtitan", lossy=True)[0]
    foreign = replace(titan, hardware=replace(titan.hardware, digest="0"))
    assert "the plan's profile is no shipped one" in export(foreign, "torchtitan-main", lossy=True)[0]
