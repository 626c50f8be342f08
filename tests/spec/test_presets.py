"""Presets: every one loads, says what it assumes, and has as many parameters as were published."""

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.common.io import write_yaml
from mopsim.layers import active_params, total_params
from mopsim.spec.presets import list_models, load_model

#: Presets held to a wider bound, and why. All others: 1 %.
WIDER = {
    **dict.fromkeys(
        ("mop_120b", "mop_241b", "mop_667b", "mop_1t"), (0.03, "attention and shared experts are assumed")
    ),
    "kimi_k2": (0.03, "published as 1.04T and as 1T"),
    "gpt3_5b": (0.02, "published as 5B"),
    "gpt_h3072_l30": (0.02, "published as 3.6B, the vocabulary is assumed"),
    "nemotron_8b": (0.07, "published as 8B"),
    "olmo2_13b": (0.06, "published as 13B"),
}
REQUIRED = (
    "tiny",
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
PUBLISHED = [name for name in list_models() if load_model(name).total_params]


def test_the_required_presets_exist() -> None:
    assert set(REQUIRED) <= set(list_models())


@pytest.mark.parametrize("name", list_models())
def test_a_preset_carries_its_own_name_and_its_source(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert model.source


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_parameters_match_the_published_figure(name: str) -> None:
    model = load_model(name)
    assert model.total_params is not None
    within, why = WIDER.get(name, (0.01, ""))
    declared = total_params(
        msgspec.structs.replace(model, num_nextn_predict_layers=0)
    )  # published without MTP
    assert declared == pytest.approx(model.total_params, rel=within), why


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
