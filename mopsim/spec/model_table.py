"""Networks as rows of a table (columns of models.csv): one row -> one ModelSpec, or the reason why not.

`python -m mopsim.spec.model_table MODELS.csv` makes presets/truth_models.yaml: rows without an own preset.
"""

import sys
from importlib.resources import files
from pathlib import Path

import msgspec

from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import to_plain, to_yaml, write_text
from mopsim.common.table import Row, read_table
from mopsim.spec.model import ModelSpec

#: Words of the notes column that name a layer ModelSpec has no shapes for.
INEXPRESSIBLE = (
    ("mamba", "has Mamba layers"),
    ("gated-delta-net", "has gated-delta-net (linear attention) layers"),
    ("sparse", "has sparse attention"),
    ("hyper-connections", "has hyper-connections"),
)

#: Vocabulary sizes (and widths) that the table leaves open, and why we take these.
ASSUMED: dict[str, tuple[dict[str, int], str]] = {
    "gpt3_5b": (
        {"vocab_size": 51200},
        "vocab_size 51200: GPT-2's 50257 padded as Megatron does for gpt3_175b",
    ),
    "nemotron_8b": (
        {"vocab_size": 256000},
        "vocab_size 256000: the Nemotron SentencePiece vocabulary (arXiv 2402.16819)",
    ),
    "nemotron_340b": ({"vocab_size": 256000}, "vocab_size 256000: arXiv 2406.11704"),
    "olmo2_1b": (
        {"dense_ffn_hidden": 8192},
        "FFN width 8192: OLMo-core's rule 1.5 x 8/3 x hidden, rounded to 256",
    ),
    "olmo2_13b": ({"dense_ffn_hidden": 13824}, "FFN width 13824: the public OLMo-2-1124-13B config"),
    "mop_120b": (
        {"num_dense_layers": 0, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128},
        "attention GQA with 64 query and 8 key-value heads of 128, every layer MoE: not stated by the source",
    ),
}
_VTRAIN_VOCABULARY = (
    51200,
    "vocab_size 51200: GPT-2's 50257 padded to a multiple of 1024, as Megatron-LM runs do",
)
_POSITIONS = 2048


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a models CSV by their `model` column. Raises MopError where it is missing or a name repeats."""
    rows: dict[str, Row] = {}
    for row in read_table(path, ("model",), "models"):
        if row["model"] in rows:
            raise MopError(f"models: {path}: model {row['model']!r} appears twice")
        rows[row["model"]] = row
    return rows


def from_row(row: Row) -> ModelSpec:
    """One row as a ModelSpec; what the row leaves open is taken from ASSUMED and listed in `assumptions`.

    Raises SpecError naming the column that is missing, or the kind of layer that ModelSpec can't express.
    """
    name, notes = row["model"], row.get("notes", "").lower()
    for word, reason in INEXPRESSIBLE:
        if word in notes:
            raise SpecError(f"models.{name}", word, f"{reason}, which ModelSpec cannot express")
    filled, assumptions = _fill(name, row)
    fields: dict[str, object] = {
        "name": name,
        "hidden_size": _need(filled, "hidden"),
        "num_hidden_layers": _need(filled, "num_layers"),
        "num_attention_heads": _need(filled, "num_heads"),
        "num_key_value_heads": _need(filled, "num_kv_heads"),
        "head_dim": _need(filled, "head_dim"),
        "vocab_size": _need(filled, "vocab_size"),
        "tie_word_embeddings": _get(filled, "tied_embeddings") == 1,
        "num_nextn_predict_layers": _get(filled, "mtp_layers"),
        "total_params": _published(row, "total_params_b"),
        "active_params": _published(row, "active_params_b"),
        "source": row.get("source", ""),
    }
    fields |= _attention(filled, notes) | _ffn(filled, notes)
    if fields.get("attention") == "mla":
        fields["head_dim"] = _get(filled, "qk_nope_head_dim") + _get(filled, "qk_rope_head_dim")
    if fields["ffn_matrices"] == 2:
        old, taken = _old_style(name, notes)
        fields |= old
        assumptions += taken
    return ModelSpec(**fields, assumptions=tuple(assumptions))  # type: ignore[arg-type]


def _fill(name: str, row: Row) -> tuple[Row, list[str]]:
    values, why = ASSUMED.get(name, ({}, ""))
    if name.startswith("gpt_h"):
        values, why = {"vocab_size": _VTRAIN_VOCABULARY[0]}, _VTRAIN_VOCABULARY[1]
    filled = dict(row)
    for column, value in values.items():
        if not filled.get(column):
            filled[column] = str(value)
    return filled, [why] if why and filled != row else []


def _get(row: Row, column: str) -> int:
    text = row.get(column, "")
    try:
        return int(float(text)) if text else 0
    except (ValueError, OverflowError):
        raise SpecError(f"models.{row['model']}.{column}", text, "is not a number") from None


def _need(row: Row, column: str) -> int:
    if not row.get(column):
        raise SpecError(f"models.{row['model']}.{column}", "", "is empty, the column is needed")
    return _get(row, column)


def _published(row: Row, column: str) -> float | None:
    text = row.get(column, "")
    try:
        return float(text) * 1e9 if text else None
    except ValueError:
        raise SpecError(f"models.{row['model']}.{column}", text, "is not a number") from None


def _attention(row: Row, notes: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    if row.get("attention") == "mla":
        fields = {"attention": "mla"}
        for column in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            fields[column] = _get(row, column)
    if "q/k norm" in notes or row["model"].startswith("qwen3_"):
        fields["qk_norm"] = "full" if row["model"].startswith("olmo2") else "head"
    if "qkv bias" in notes:
        fields["attention_bias"] = "qkv"
    elif "biases" in notes and "no biases" not in notes:
        fields["attention_bias"] = "qkvo"
    fields["attention_sinks"] = "attention sinks" in notes
    if _get(row, "sliding_window"):
        fields["sliding_window"] = _get(row, "sliding_window")
        fields["sliding_window_period"] = 2 if "every other layer" in notes else 1
    return fields


def _ffn(row: Row, notes: str) -> dict[str, object]:
    fields: dict[str, object] = {"ffn_matrices": 2 if "two-matrix" in notes else 3}
    experts = _get(row, "num_experts")
    biases = "biases" in notes and "no biases" not in notes
    if not experts:
        return fields | {"intermediate_size": _need(row, "dense_ffn_hidden"), "ffn_bias": biases}
    fields |= {
        "num_local_experts": experts,
        "num_experts_per_tok": _need(row, "top_k"),
        "moe_intermediate_size": _need(row, "expert_ffn_hidden"),
        "shared_expert_intermediate_size": _get(row, "shared_ffn_hidden"),
        "shared_expert_gate": "gated shared expert" in notes,
        "first_k_dense_replace": _need(row, "num_dense_layers"),
        "intermediate_size": _get(row, "dense_ffn_hidden"),
        "expert_bias": biases,
        "router_bias": biases,
    }
    if row.get("attention") == "mla":
        fields |= {"scoring_func": "sigmoid"}
    return fields


def _old_style(name: str, notes: str) -> tuple[dict[str, object], list[str]]:
    """GPT-2-like networks: LayerNorm, and learned positions where the notes say so."""
    fields: dict[str, object] = {}
    taken: list[str] = []
    if "learned position" in notes:
        fields["learned_positions"] = 1024 if name.startswith("gpt_h1024") else _POSITIONS
        taken.append(f"learned_positions {fields['learned_positions']}: the sequence length of the runs")
    if not name.startswith("mcore_ci_moe"):
        fields["norm"] = "layernorm"
    return fields, taken


def brief(model: ModelSpec) -> dict[str, object]:
    """The fields of a model that differ from their defaults."""
    fields = msgspec.structs.fields(ModelSpec)
    defaults = {field.name: field.default for field in fields if field.default is not msgspec.NODEFAULT}
    given = {name for name, default in defaults.items() if getattr(model, name) != default} | {
        field.name for field in fields if field.name not in defaults
    }
    return {name: value for name, value in to_plain(model).items() if name in given}


def presets_text(rows: dict[str, Row], own: set[str]) -> str:
    """truth_models.yaml: the rows that are not in `own`; those ModelSpec cannot express are named."""
    models, left_out = {}, []
    for name in sorted(set(rows) - own, key=list(rows).index):
        try:
            models[name] = brief(from_row(rows[name]))
        except SpecError as error:
            left_out.append(f"#   {error}\n")
    head = "# Networks of the table of published runs, made from it by `python -m mopsim.spec.model_table`.\n"
    return f"{head}# Left out:\n{''.join(left_out)}{to_yaml(models)}"


def main() -> None:
    """Write the presets of a models CSV beside the ones that are written by hand."""
    folder = Path(str(files("mopsim"))) / "presets"
    own = {path.stem for path in folder.glob("*.yaml")} - {"truth_models"}
    write_text(folder / "truth_models.yaml", presets_text(read_rows(Path(sys.argv[1])), own))


if __name__ == "__main__":
    main()
