"""Rows of a models table as ModelSpecs."""

from pathlib import Path

import pytest

from mopsim.common.errors import MopError, SpecError
from mopsim.validate.models import Row, complaints_of, from_row, read_rows

ROW: Row = {
    "model": "m",
    "num_layers": "2",
    "num_dense_layers": "2",
    "hidden": "64",
    "dense_ffn_hidden": "128",
    "num_heads": "4",
    "num_kv_heads": "2",
    "head_dim": "16",
    "attention": "gqa",
    "vocab_size": "100",
    "tied_embeddings": "1",
    "notes": "",
}


def test_a_dense_row() -> None:
    model = from_row(ROW)
    assert (model.num_hidden_layers, model.intermediate_size, model.tie_word_embeddings) == (2, 128, True)


def test_notes_carry_what_has_no_column() -> None:
    old = from_row(ROW | {"notes": "two-matrix GELU MLP (not gated); learned positions; biases"})
    assert (old.ffn_matrices, old.norm, old.attention_bias, old.learned_positions) == (
        2,
        "layernorm",
        "qkvo",
        2048,
    )
    assert old.assumptions
    assert from_row(ROW | {"notes": "two-matrix MLP, no biases"}).attention_bias == "none"


@pytest.mark.parametrize(
    ("notes", "attention", "ffn"),
    [
        ("biases", "qkvo", True),
        ("biases of all products", "qkvo", True),
        ("qkv bias", "qkv", None),
        ("QKV biases", "qkv", None),
        ("biases of queries, keys and values", "qkv", None),
        ("query, key and value biases", "qkv", None),
        ("biases of q, k and v", "qkv", None),
        ("q/k/v biases", "qkv", None),
        ("without biases", "none", None),
        ("no qkv biases", "none", None),
        ("qkv bias, no ffn biases", "qkv", None),
        ("without dropout; biases", "qkvo", True),
    ],
)
def test_biases_are_where_notes_say(notes: str, attention: str, ffn: bool | None) -> None:
    routed = {"num_dense_layers": "0", "num_experts": "4", "top_k": "2", "expert_ffn_hidden": "32"}
    for experts in ({}, routed):
        found = from_row(ROW | experts | {"notes": notes})
        assert found.attention_bias == attention
        assert (found.expert_bias if experts else found.ffn_bias) == bool(ffn), notes


def test_qwen2_has_biases_of_queries_keys_and_values_whatever_notes_call_them() -> None:
    for name in ("qwen2_7b", "qwen2.5_7b", "qwen25_7b", "qwen15_moe"):
        for notes in ("", "biases", "qkv bias"):
            found = from_row(ROW | {"model": name, "notes": notes})
            assert (found.attention_bias, found.ffn_bias) == ("qkv", False)
    assert from_row(ROW | {"model": "qwen25_7b", "notes": "trained without biases"}).attention_bias == "none"
    assert from_row(ROW | {"model": "qwen3_8b"}).attention_bias == "none"


def test_norms_of_latent_attention_are_its_own() -> None:
    """Of MLA the norms of queries and keys are those of its low ranks, which its layers always have."""
    ranks = {"kv_lora_rank": "16", "qk_nope_head_dim": "16", "qk_rope_head_dim": "8", "v_head_dim": "16"}
    notes = {"notes": "q/k norm as in the config"}
    assert from_row(ROW | notes).qk_norm == "head"
    assert from_row(ROW | notes | {"attention": "mla"} | ranks).qk_norm == "none"


@pytest.mark.parametrize(
    "notes", ["hybrid Mamba-2 / attention", "DeepSeek sparse attention", "gated-delta-net"]
)
def test_a_layer_without_shapes_is_refused_by_name(notes: str) -> None:
    with pytest.raises(SpecError, match=r"models\.m: .* cannot express"):
        from_row(ROW | {"notes": notes})


@pytest.mark.parametrize("column", ["hidden", "num_layers", "num_heads", "vocab_size", "dense_ffn_hidden"])
def test_an_empty_or_wrong_column_is_named(column: str) -> None:
    with pytest.raises(SpecError, match=rf"models\.m\.{column}: '' is empty"):
        from_row(ROW | {column: ""})
    with pytest.raises(SpecError, match=rf"models\.m\.{column}: 'many' is not a number"):
        from_row(ROW | {column: "many"})


@pytest.mark.parametrize(
    ("cells", "wrong"),
    [
        ({"num_experts": "0", "mtp_layers": "0", "sliding_window": "0", "q_lora_rank": "0"}, []),
        ({"num_experts": "0.0"}, []),
        ({"num_experts": "many"}, ["num_experts: 'many' is not a number"]),
        ({"mtp_layers": "0.5"}, ["mtp_layers: '0.5' is not a whole number"]),
        ({"vocab_size": "0"}, ["vocab_size: '0' is not a positive whole number"]),
    ],
)
def test_cells_are_held_to_what_their_column_may_say(cells: Row, wrong: list[str]) -> None:
    assert [one.reason for one in complaints_of(ROW | cells)] == [f"models.m.{one}" for one in wrong]


def test_a_file_without_the_column_or_with_a_name_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,hidden\nx,1\n")
    with pytest.raises(MopError, match="has no column 'model'"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("model,hidden\nx,1\nx,2\n")
    with pytest.raises(MopError, match="model 'x' appears twice"):
        read_rows(tmp_path / "b.csv")


def test_attention_is_one_that_is_known() -> None:
    latent = {"q_lora_rank": "0", "kv_lora_rank": "32", "qk_nope_head_dim": "16", "qk_rope_head_dim": "8",
              "v_head_dim": "16"}  # fmt: skip
    assert from_row(ROW | latent | {"attention": "MLA"}) == from_row(ROW | latent | {"attention": "mla"})
    assert from_row(ROW | {"attention": "MHA"}) == from_row(ROW)
    with pytest.raises(SpecError, match=r"models\.m\.attention: 'lightning' is not one of mha, mqa"):
        from_row(ROW | {"attention": "lightning"})


@pytest.mark.parametrize(
    ("column", "cell", "says"),
    [
        ("hidden", "64.9", "is not a positive whole number"),
        ("hidden", "0", "is not a positive whole number"),
        ("num_layers", "-2", "must be from 0"),
        ("tied_embeddings", "2", "is neither 0 nor 1"),
        ("tied_embeddings", "0.5", "is not a whole number"),
        ("total_params_b", "many", "is not a number"),
    ],
)
def test_a_cell_is_not_cut_to_fit(column: str, cell: str, says: str) -> None:
    with pytest.raises(SpecError, match=rf"models\.m\.{column}: '{cell}' {says}"):
        from_row(ROW | {column: cell})
    assert from_row(ROW | {"hidden": "64.0", "sliding_window": "unknown"}) == from_row(ROW)


def test_a_misspelt_column_is_refused(tmp_path: Path) -> None:
    cells = {**ROW, "q_lora": "8", "mtp": "1"}
    (tmp_path / "a.csv").write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    with pytest.raises(MopError, match="column 'q_lora' is unknown, near q_lora_rank"):
        read_rows(tmp_path / "a.csv")
