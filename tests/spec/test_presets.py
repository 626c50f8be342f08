"""Presets: every one loads, says what it assumes, and has as many parameters as were published."""

from pathlib import Path

import msgspec
import pytest

from mopsim.api.inputs import read_model
from mopsim.common.errors import MopError
from mopsim.common.io import write_yaml
from mopsim.graph import active_params, total_params
from mopsim.graph.counts import counts, tolerance
from mopsim.spec.presets import list_models, load_model
from tests.together import together

REQUIRED = (
    "tiny",
    "tiny_qwen3_moe",
    "mixtral_8x7b",
    "mixtral_8x22b",
    "qwen3_30b_a3b",
    "qwen3_235b_a22b",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss_20b",
    "gpt_oss_120b",
    "olmoe_1b_7b",
    "kimi_k2",
    "mop_120b",
    "mop_241b",
    "mop_667b",
    "mop_1t",
    "llama3_8b",
    "gpt3_175b",
)
#: Published as a figure of few digits, or (kimi_k2, gpt3_5b) rounded otherwise than by us.
ROUNDED = {"mop_120b", "mop_1t", "kimi_k2", "gpt3_5b", "gpt_h3072_l30", "nemotron_8b", "olmo2_13b"}
PUBLISHED = [name for name in list_models() if load_model(name).total_params]


def test_the_required_presets_exist() -> None:
    assert set(REQUIRED) <= set(list_models())


@together(list_models())
def test_a_preset_carries_its_own_name_and_its_source(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert model.source


@together(PUBLISHED)
def test_total_parameters_match_the_published_figure(name: str) -> None:
    """Within 2 %, or a unit of its last digit; most within 1 %."""
    found = counts(load_model(name))
    assert found.stated_total is not None
    gap = abs(found.total / found.stated_total - 1)
    assert gap <= tolerance(found.stated_total)
    assert gap <= 0.01 or name in ROUNDED


@pytest.mark.parametrize(
    ("stated", "allowed"),
    [(671e9, 0.02), (6.92e9, 0.02), (13e9, 1 / 13), (8e9, 0.1), (340e9, 1 / 34), (1e12, 0.1), (354e6, 0.02)],
)
def test_a_figure_of_few_digits_may_be_off_by_a_unit_of_the_last(stated: float, allowed: float) -> None:
    assert tolerance(stated) == pytest.approx(allowed)


def test_a_stated_total_that_the_fields_contradict_is_refused() -> None:
    model = msgspec.structs.replace(load_model("qwen3_30b_a3b"), num_hidden_layers=40)
    with pytest.raises(MopError, match=r"model\.total_params: 30500000000 is not the 25,.* 16\.\d% apart"):
        read_model(model)
    assert read_model(msgspec.structs.replace(model, total_params=None))


@pytest.mark.parametrize("name", ["gpt_oss_20b", "gpt_oss_120b"])
def test_gpt_oss_active_parameters_are_published_without_the_input_embedding(name: str) -> None:
    model = load_model(name)
    declared = active_params(model) - model.vocab_size * model.hidden_size
    assert declared == pytest.approx(model.active_params, rel=0.01)


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3", "olmoe_1b_7b", "kimi_k2"])
def test_active_parameters_match_the_rounded_figure(name: str) -> None:
    model = load_model(name)
    declared = active_params(msgspec.structs.replace(model, num_nextn_predict_layers=0))
    assert declared == pytest.approx(model.active_params, rel=0.02)


@pytest.mark.parametrize("name", ["mop_120b", "mop_241b", "mop_667b", "mop_1t"])
def test_the_papers_networks_list_what_they_assume(name: str) -> None:
    model = load_model(name)
    assert model.num_attention_heads % 16 == 0
    assert any("attention" in text for text in model.assumptions)
    assert any("shared expert" in text for text in model.assumptions)
    assert any("MoE" in text for text in model.assumptions)
    counted = any("4.73B" in text for text in model.assumptions)
    assert counted == (name == "mop_120b")  # what one network has was said of all four


def test_tiny_qwen3_moe_is_a_qwen3_moe_of_tinys_sizes() -> None:
    small, tiny, large = (load_model(name) for name in ("tiny_qwen3_moe", "tiny", "qwen3_30b_a3b"))
    sizes = ("hidden_size", "num_hidden_layers", "num_local_experts", "moe_intermediate_size", "vocab_size")
    assert [getattr(small, name) for name in sizes] == [getattr(tiny, name) for name in sizes]
    rest = ("qk_norm", "rope_theta", "rms_norm_eps", "scoring_func", "norm_topk_prob", "tie_word_embeddings")
    assert [getattr(small, name) for name in rest] == [getattr(large, name) for name in rest]
    assert 2e6 < total_params(small) < 6e6


def test_tiny_has_every_mechanism_at_a_cpus_size() -> None:
    model = load_model("tiny")
    assert 2e6 < total_params(model) < 6e6
    assert (model.num_dense_layers, model.num_moe_layers, model.num_local_experts) == (1, 3, 8)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(
        MopError, match=r"model: 'mixtral_8x7' is neither a preset nor a file; near: .*mixtral_8x7b"
    ):
        load_model("mixtral_8x7")


def test_a_model_is_read_from_a_yaml_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_yaml(tmp_path / "m.yaml", load_model("deepseek_v3"))
    assert load_model(tmp_path / "m.yaml") == load_model("deepseek_v3")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MopError, match=r"nowhere/m\.yaml: no such file"):
        load_model("nowhere/m.yaml")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v4_flash", "has sparse attention, which ModelSpec cannot express"),
    ],
)
def test_a_network_that_cannot_be_expressed_says_why(name: str, reason: str) -> None:
    assert name not in list_models()
    with pytest.raises(MopError, match=f"^model: '{name}' {reason}$"):
        load_model(name)


def test_a_directory_of_no_network_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(MopError, match=r"model: .*: is a directory without a config\.json of Hugging Face"):
        load_model(tmp_path)
