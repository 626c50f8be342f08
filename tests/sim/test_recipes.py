"""What rows become by data: notes in a standard form, and what recipes set for a network or a release."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.intervals.spread import network
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.validate.case import read_cases, write_cases
from mopsim.validate.facts import facts, rules
from mopsim.validate.models import from_row, read_rows
from mopsim.validate.rows import read_case
from mopsim.validate.simulated import Simulated, as_read
from mopsim.validate.tables import UnsupportedError
from mopsim.validate.workspaces import workspaces
from tests.sim.test_validate import MODELS, row

GOLDEN = Path(__file__).parent / "data" / "golden_models.csv"


def bridge(model: str, gpu: str, notes: str, **changes: str) -> dict[str, str]:
    cells = {
        "source": "megatron-bridge-perf",
        "precision": "mxfp8",
        "sharding": "zero1",
        "routing": "balanced",
    }
    return row(model=model, gpu=gpu, notes=notes, **(cells | changes))


def test_an_exchange_that_no_row_states_is_one_that_the_program_has_on_the_network() -> None:
    for model, exchange in (("mixtral_8x7b", "ring"), ("gpt_oss_20b", "ulysses"), ("deepseek_v2", "ring")):
        asked = row(model=model, stack="megatron-core", sharding="zero1", cp="2", dp="4")
        assert read_case(asked, MODELS).strategy.attention.cp_comm_type == exchange


def test_deepseek_v3_has_its_groups_of_experts_but_in_a_program_that_chooses_of_all() -> None:
    """Tables of networks have no column for groups."""
    whole = load_model("deepseek_v3")
    for name in ("deepseek_v3", "deepseek_v3_nomtp"):
        table = read_rows(GOLDEN)["deepseek_v3"] | {"model": name}
        for model in (load_model(name), from_row(table)):
            assert (model.n_group, model.topk_group) == (whole.n_group, whole.topk_group) == (8, 4)
        for stack, groups in (("megatron-bridge-hybridep", None), ("nemo", None), ("maxtext-turbo", 1)):
            set_ = facts(row(model=name, stack=stack, sharding="zero3")).settings
            assert (set_.get("model.n_group"), set_.get("model.topk_group")) == (groups, groups)
        dated = {"202510": 1, "2025-11-02": 1, "20251220": None, "2026-03": None, "": None}
        for when, groups in dated.items():
            set_ = facts(row(model=name, stack="torchtitan-compile", source_ref=when)).settings
            assert (set_.get("model.n_group"), set_.get("model.topk_group")) == (groups, groups)
    assert network(replace(whole, n_group=1, topk_group=1, topk_method="greedy")) == network(whole)


def test_rows_of_an_unfused_permutation_are_added_by_atomic_operations() -> None:
    """Some programs must be asked for a fused one, as their notes say."""
    for stack, notes, sums in (
        ("megatron-core", "unfused permutation", "atomic"),
        ("megatron-core", "run without permute fusion", "atomic"),
        ("megatron-core", "permute fusion", "gathered"),
        ("megatron-lm", "", "atomic"),
        ("megatron-lm", "permute fusion", "gathered"),
        ("megatron-lm", "no permute fusion", "atomic"),
        ("nemo", "NeMo 24.12", "atomic"),
        ("megatron-core", "", "gathered"),
        ("megatron-bridge", "", "gathered"),
        ("primus-2026", "", "gathered"),
    ):
        found = read_case(row(stack=stack, notes=notes, sharding="zero1"), MODELS)
        assert found.program().kernels.row_sums == sums, (stack, notes)


def test_experts_padded_to_their_capacity_are_not_counted_by_the_host() -> None:
    padded = "token drop, capacity factor 1 with padding"
    for stack, notes, reads in (
        ("nemo", f"NeMo 25.04; {padded}", "never"),
        ("nemo", f"NeMo 24.12; {padded}", "always"),
        ("megatron-core", padded, "never"),
        ("megatron-core", "capacity factor 1.0 (tokens dropped)", "always"),
    ):
        found = read_case(row(stack=stack, notes=notes, sharding="zero1"), MODELS)
        assert found.program().host.counts_read == reads, (stack, notes)


def test_a_fused_loss_is_what_the_program_calls_so() -> None:
    for stack in ("megatron-core", "nemo", "megatron-bridge", "llm-foundry"):
        zero = "zero3" if stack == "llm-foundry" else "zero1"
        found = read_case(row(stack=stack, loss="fused", sharding=zero), MODELS)
        kernel = "native" if stack in ("megatron-core", "nemo") else "fused"
        assert (found.strategy.vocabulary.loss, found.program().kernels.loss) == ("full", kernel)
        told = row(stack=stack, loss="fused", sharding=zero, notes="TE cross-entropy fusion")
        assert read_case(told, MODELS).program().kernels.loss == "fused"
    assert read_case(row(stack="halo", loss="fused"), MODELS).strategy.vocabulary.loss == "chunked"
    split = read_case(row(stack="nemo", loss="fused", sharding="zero1", tp="2", dp="4"), MODELS)
    assert split.strategy.vocabulary.loss == "vocab_parallel"
    for kind in ("fused", "chunked"):
        with pytest.raises(
            UnsupportedError, match=f"loss: '{kind}' is not in the stack torchtitan, which has full, v"
        ):
            read_case(row(stack="torchtitan", loss=kind), MODELS)
    asked = row(stack="torchtitan", loss="fused") | {"stack.kernels.loss": "fused"}
    assert read_case(asked, MODELS).program().kernels.loss == "fused"


def test_a_row_is_of_a_program_in_a_file(tmp_path: Path) -> None:
    fork = tmp_path / "fork.yaml"
    fork.write_text(
        "name: my-fork\nversion: '1'\nextends: torchtitan\nkernels:\n  source: fork.py\n  norm: fused\n"
    )
    found = read_case(row(stack=str(fork)), MODELS)
    assert (found.stack, found.strategy.stack) == ("my-fork", str(fork))
    assert found.program().kernels.norm == "fused"
    write_cases(tmp_path / "cases.jsonl", [found])
    assert read_cases(tmp_path / "cases.jsonl") == [found]


@pytest.mark.parametrize("stack", ["megatron-bridge-library", "nemo-rl"])
def test_the_gate_of_a_library_is_fused_where_the_config_of_its_network_says_so(stack: str) -> None:
    for model, gate in (("llama3_8b", "fused"), ("qwen3_30b_a3b", "strided")):
        kernels = read_case(row(model=model, stack=stack, sharding="zero1"), MODELS).program().kernels
        assert (kernels.activation, kernels.expert_rows == "fused") == (gate, gate == "fused")
    later = row(model="qwen3_30b_a3b", stack="nemo-rl", sharding="zero1", notes="2025-12")
    assert read_case(later, MODELS).program().kernels.activation == "fused"


def test_the_loss_of_a_library_is_what_the_recipes_of_its_network_leave() -> None:
    """DeepSeek's and its kin's is of their provider, so of every release and of fine-tuning too."""
    for model, notes, loss in (
        ("llama3_8b", "pretraining, 2025-10", None),
        ("llama3_8b", "pretraining, 2025-11", "fused"),
        ("llama3_8b", "SFT, 2026-03", None),
        ("deepseek_v3", "pretraining, 2025-10", "fused"),
        ("moonlight_16b_a3b", "SFT, 2026-03", "fused"),
        ("moonlight_16b_a3b", "long-context fine-tuning, 2026-08", "in_place"),
    ):
        found = facts(row(model=model, stack="megatron-bridge-library", sharding="zero1", notes=notes))
        assert found.settings.get("stack.kernels.loss") == loss, (model, notes)


def test_rules_have_names_of_their_own_and_sources() -> None:
    assert len({rule.id for rule in rules()}) == len(rules())
    assert all(rule.when and rule.set and rule.source for rule in rules())


def test_what_was_found_for_one_run_is_in_its_case() -> None:
    """Loads and documents of a published run that no file of its program has: no rule gives them."""
    found = {"loads", "document_tokens", "stack.host.documents"}
    wrong = [rule.id for rule in rules() if "source" in rule.when and found & rule.set.keys()]
    assert wrong == ["documents-of-longwriter", "documents-of-longalpaca"], "those name data sets, by script"


def test_rows_of_a_chunk_are_said_where_a_user_of_the_stack_looks() -> None:
    """A strategy has them, TRL's are a constant: validation's rule and the stack say the same number."""
    rule = next(rule for rule in rules() if rule.id == "chunks-of-trls-loss")
    rows = rule.set["strategy.vocabulary.chunk_tokens"]
    assert f"of {rows} rows (vocabulary.chunk_tokens" in load_stack("trl").sources["has.vocabulary.loss"]


@pytest.mark.parametrize(
    ("notes", "graphs"),
    [
        ("CUDA graph full_iteration:[]", ["step"]),
        ("CUDA graph transformer_engine:['attn', 'moe_router', 'mamba']; MTP", ["attention", "router"]),
        ("cuda graphs: attn, moe_router, moe_preprocess.", ["attention", "router"]),
        ("CUDA graph transformer_engine:mlp", ["dense_ffn"]),
        ("cuda graphs: off. INCONSISTENT", None),
        ("CUDA graph none; eager baseline of CUDA-graph A/B", None),
        ("NeMo 26.04", None),
    ],
)  # fmt: skip
def test_graphs_by_the_notes(notes: str, graphs: list[str] | None) -> None:
    found = facts(bridge("llama3_8b", "b200-sxm-192g", notes))
    assert found.settings.get("stack.host.graphs") == graphs


def test_the_last_release_replays_the_whole_step() -> None:
    said = bridge("deepseek_v3", "gb300-288g", "NeMo 26.08; fields from recipe", num_layers="61", ep="8")
    found = read_case(said, MODELS)
    assert found.program().host.graphs == ("step",)
    assert found.program().kernels.expert_products == "grouped"
    assert found.strategy.overlap.experts
    assert found.strategy.experts.token_dispatcher != "alltoall"
    assert (found.strategy.precision.attention, found.strategy.precision.vocabulary) == ("matmul", "matmul")
    assert "late-mxfp8-of-deepseek-v3" in found.assumptions
    assert read_case({**said, "gpu": "gb200-186g"}, MODELS).strategy.precision.attention == "compute"
    assert read_case({**said, "source": "mine"}, MODELS).program().host.graphs == ("step",)
    for other in ({"notes": "NeMo 26.04"}, {"stack": "megatron-core"}):
        plain = read_case({**said, **other}, MODELS)
        assert plain.program().host.graphs == ()
        assert not plain.strategy.overlap.experts
        assert plain.strategy.experts.token_dispatcher == "alltoall"
        assert plain.strategy.precision.attention == "compute"


def test_a_cell_of_the_table_wins_over_every_rule() -> None:
    said = bridge("deepseek_v3", "gb300-288g", "NeMo 26.08", num_layers="61", ep="8")
    said |= {"graphs": "attention", "strategy.overlap.experts": "false", "stack.kernels.loss": "composed"}
    found = read_case(said, MODELS)
    assert found.program().host.graphs == ("attention",)
    assert not found.strategy.overlap.experts
    assert found.program().kernels.loss == "composed"


@pytest.mark.parametrize(
    ("notes", "layers"),
    [
        ("recompute only in part: full(block,5 layers)", 5),
        ("recompute method block, recompute_num_layers 12", 12),
        ("recompute_num_layers=3 (method block)", 3),
        ("recompute method block, recompute_num_layers 31", 31),
        ("recompute method block, recompute_num_layers 32", 0),  # all of its layers
        ("recompute method block, recompute_num_layers 80", 0),
        ("recompute method uniform, recompute_num_layers 1", 0),
        ("", 0),
    ],
)
def test_recompute_of_some_layers(notes: str, layers: int) -> None:
    said = bridge("llama3_8b", "h100-sxm-80g", notes, precision="fp8")
    found = read_case(said, MODELS).strategy.activations
    assert (found.recompute, found.recompute_num_layers) == ("full", layers)
    none = bridge("llama3_8b", "h100-sxm-80g", "full/block with 0 layers", precision="fp8")
    assert read_case(none, MODELS).strategy.activations.recompute == "none"


def test_layouts_hold_the_whole_network() -> None:
    layouts = [rule for rule in rules() if "strategy.pipeline.layers" in rule.set]
    for rule in layouts:
        layers = rule.set["strategy.pipeline.layers"]
        assert f"^{len(layers)}$" == rule.when["stages"]
        assert sum(layers) == 61
    assert len(layouts) == 4
    key = "strategy.pipeline.layers"
    assert facts(row(model="deepseek_v3", num_layers="", pp="8", vp="2")).settings[key][-1] == 1
    assert key not in facts(row(model="deepseek_v3", num_layers="4", pp="8")).settings
    assert key not in facts(row(num_layers="80", pp="8")).settings


@pytest.mark.parametrize(
    ("source", "dispatcher", "gpu", "share"),
    [
        ("megatron-bridge-cards", "hybridep", "h100-sxm-80g", 32 / 132),
        ("megatron-bridge-perf", "hybridep", "b200-sxm-192g", 32 / 148),
        ("megatron-bridge-perf", "deepep", "h100-sxm-80g", None),
        ("megatron-bridge-perf", "alltoall", "h100-sxm-80g", None),
        ("halo-bench", "hybridep", "b300-sxm-288g", None),
    ],
)
def test_hybrid_exchanges_take_the_recipes_share(
    source: str, dispatcher: str, gpu: str, share: float | None
) -> None:
    cells = {"model": "qwen3_30b_a3b", "num_layers": "48", "ep": "8", "routing": "balanced"}
    one = row(source=source, dispatcher=dispatcher, gpu=gpu, **cells)
    case = read_case(one, MODELS)
    assert case.strategy.experts.token_dispatcher == dispatcher
    assert case.program().communication_share.get("default") == (pytest.approx(share) if share else None)


def test_a_case_is_the_same_when_read_again(tmp_path: Path) -> None:
    said = bridge("deepseek_v3", "gb300-288g", "NeMo 26.08", num_layers="61", ep="8")
    cases = [read_case(said, MODELS), read_case(row("b"), MODELS)]
    write_cases(tmp_path / "some.jsonl", cases)
    assert read_cases(tmp_path / "some.jsonl") == cases
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("llama3_8b", "lama3"), "case 1: model"),
        (("generic-eager", "nobody"), "case 1: strategy.stack"),
        (('"num_nodes":1', '"num_nodes":0'), "case 1.num_nodes: 0 must be at least 1"),
        (('"name":"mine"', '"nom":"mine"'), "case 1.source.nom: 'mine' is an unknown field"),
        (('{"id"', '{"id'), "line 1: is not valid JSON"),
    ],
)
def test_a_wrong_entry_of_a_case_is_one_line(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write_cases(path, [read_case(row(), MODELS)])
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(MopError) as refused:
        read_cases(path)
    assert str(refused.value).startswith(f"cases: {path}: {says}")
    assert "\n" not in str(refused.value)


def test_blocks_that_are_read_are_by_the_programs_segments() -> None:
    """torch's default, what a launcher sets, and what notes say."""
    read = Simulated(peak_memory=100 * 2**30, limit=160 * 2**30)
    profile = load_profile("h200-sxm-141g")
    for stack, notes, ratio in (
        ("torchtitan", "", 1.05),
        ("torchtitan-compile-2026", "", 1.05),
        ("megatron-lm", "", 1.10),
        ("megatron-lm", "memory = max reserved; expandable segments", 1.05),
    ):
        program = read_case(row(stack=stack, notes=notes), MODELS).program()
        found = replace(program.reading, memory="reserved")
        assert as_read(read, found, profile) == pytest.approx(ratio * read.peak_memory)
        allocated = replace(found, memory="allocated")
        assert as_read(read, allocated, profile) == read.peak_memory


def test_torchs_allocator_counts_workspaces_of_its_libraries() -> None:
    """Of a thread's handle each, and of Transformer Engine, with one for each stream of its grouped
    products; a device's `reserved` has them."""
    model, experts = load_model("llama3_8b"), load_model("qwen3_30b_a3b")
    for machine, stack, trained, mib in (
        ("h100-sxm-80g", "torchtitan", model, 64),
        ("h100-sxm-80g", "megatron-lm", model, 96),
        ("h100-sxm-80g", "megatron-lm", experts, 224),
        ("a100-sxm-80g", "megatron-lm", model, 20.25),
        ("mi300x-192g", "torchtitan", model, 256),
        ("h100-sxm-80g", "maxtext", model, 0),
    ):
        profile, program = load_profile(machine), load_stack(stack)
        found = workspaces(program, trained, profile)
        assert found == mib * 2**20, (machine, stack)
        read = replace(program.reading, memory="allocated")
        assert as_read(Simulated(peak_memory=2**30, libraries=found), read, profile) == 2**30 + found
        read, bare = replace(read, memory="device"), Simulated(peak_memory=2**30, limit=60 * 2**30)
        kept = Simulated(peak_memory=2**30, limit=60 * 2**30, libraries=found)
        assert as_read(kept, read, profile) == as_read(bare, read, profile)


def test_layers_of_stages_are_nvidias_recipes_in_programs_on_megatron_core_alone() -> None:
    stacks = {"megatron-bridge": True, "nemo": True, "nemo-automodel": False, "torchtitan": False}
    for stack, told in stacks.items():
        found = facts(row(model="deepseek_v3", num_layers="61", stack=stack, pp="8", vp="1"))
        assert ("strategy.pipeline.layers" in found.settings) == told, stack


def test_primus_has_a_network_of_its_own_by_the_name_of_gpt_oss() -> None:
    """MLPerf's file has windows and no shared expert, the others a shared expert and no windows."""
    for notes, window, shared in (("MLPerf", 128, 0), ("the preset", 0, 2880)):
        cells = row(model="gpt_oss_20b", stack="primus-2026", sharding="zero1", routing="forced", notes=notes)
        found = read_case(cells | {"gpu": "mi355x-288g", "ep": "8"}, MODELS).network()
        assert (found.qk_norm, found.expert_bias, found.swiglu_limit) == ("head", False, 0)
        assert (found.sliding_window, found.shared_expert_intermediate_size) == (window, shared)
        assert found.attention_sinks == (shared > 0)


@pytest.mark.parametrize(
    ("month", "notes", "moments"),
    [("202604", "", "bfloat16"), ("202603", "", "stack"), ("202604", "fp32 gradients", "stack")],
)
def test_primus_has_narrow_states_by_its_files_since_april_2026(month: str, notes: str, moments: str) -> None:
    cells = row(
        model="deepseek_v3", stack="primus-2026", sharding="zero1", routing="forced", source_ref=month
    )
    found = facts(cells | {"gpu": "mi355x-288g", "notes": notes}).settings
    assert found.get("strategy.precision.moments", "stack") == moments


@pytest.mark.parametrize(
    "notes", ["no check for NaN in loss and gradients", "--no-check-for-nan-in-loss-and-grad"]
)
def test_a_run_without_checks_reads_nothing_for_them(notes: str) -> None:
    cells = row(stack="megatron-core", sharding="zero1", notes=notes)
    host = read_case(cells, MODELS).program().host
    assert (host.loss_read, host.grads_read) == (False, False)


def test_legacy_grouped_products_of_primus_are_in_bf16_and_add_their_gradients() -> None:
    cells = row(
        model="qwen3_30b_a3b", stack="primus-2026", sharding="zero1", routing="forced", precision="fp8"
    )
    for notes, dtype, added in (("legacy grouped products", "compute", "composed"), ("", "recipe", "fused")):
        kernels = (
            read_case(cells | {"gpu": "mi355x-288g", "ep": "8", "notes": notes}, MODELS).program().kernels
        )
        assert (kernels.expert_dtype, kernels.weight_grads) == (dtype, added)


@pytest.mark.parametrize(
    ("precision", "notes", "layers"),
    [
        ("nvfp4", "bf16_with_nvfp4_mixed, the last 4 layers in bf16", (None, 4)),
        ("nvfp4", "NVFP4 in the first 85 % of the layers, the last 15 % and output layer bf16", (None, 5)),
        ("fp8", "delayed scaling (first and last layer in bf16)", (1, 1)),
        ("fp8", "bf16_with_fp8_current_scaling_mixed", (1, 1)),
        ("bf16", "the last 4 layers in bf16", (None, None)),
    ],
)
def test_layers_in_bf16_are_as_the_notes_say(precision: str, notes: str, layers: tuple[int, ...]) -> None:
    settings = facts(row(model="llama3_8b", precision=precision, notes=notes)).settings
    fields = (f"strategy.precision.num_layers_at_{place}_in_bf16" for place in ("start", "end"))
    assert tuple(settings.get(field) for field in fields) == layers
