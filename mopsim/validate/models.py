"""Networks as rows of a table (columns of models.csv): one row -> one ModelSpec, or the reason why not."""

from functools import cache
from pathlib import Path

from mopsim.common.errors import MopError, SpecError, require
from mopsim.common.rules import Rule, applied, load_rules
from mopsim.spec.model import ModelSpec
from mopsim.validate import tables
from mopsim.validate.columns import MODELS
from mopsim.validate.tables import UNKNOWN, Row, UnsupportedError


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a models CSV by their `model` column. Raises MopError where it is missing or a name repeats."""
    rows: dict[str, Row] = {}
    for row in tables.read_known(path, MODELS, "models"):
        if row["model"] in rows:
            raise MopError(f"models: {path}: model {row['model']!r} appears twice")
        rows[row["model"]] = row
    return rows


@cache
def model_rules() -> tuple[Rule, ...]:
    """What notes say, and what rows leave open."""
    return load_rules("mopsim.validate", "data/models.yaml")


def from_row(row: Row) -> ModelSpec:
    """One row as a ModelSpec; what the row leaves open is filled by rules and listed in `assumptions`.

    Raises SpecError naming the column that is missing, or the kind of layer that ModelSpec can't express.
    """
    try:
        return _from_row(tables.stated(row, MODELS))
    except SpecError as error:
        raise error.within(f"models.{row['model']}") from None


_DENSE, _ROUTED = ("dense_ffn_hidden",), ("top_k", "expert_ffn_hidden", "num_dense_layers")
_USED = ("hidden", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def complaints_of(row: Row) -> list[UnsupportedError]:
    """What is wrong of the cells of a row, each by itself, and what it lacks; put down to a run's `model`."""
    head = f"models.{row['model']}"
    wrong = [*tables.wrong_cells(row, MODELS)]
    filled = applied(model_rules(), row, ("model.",)).row
    told = {one.field for one in wrong}
    ffn = () if "num_experts" in told else _ROUTED if _get(filled, "num_experts") else _DENSE
    needed = (*_USED, *ffn)
    wrong += [_empty(column) for column in needed if column not in told and filled.get(column, "") in UNKNOWN]
    return [UnsupportedError("model", str(one.within(head))) for one in wrong]


def _from_row(row: Row) -> ModelSpec:
    known = applied(model_rules(), row, ("model.",))
    for rule in known.rules:
        if rule.refuse:
            raise SpecError("", rule.id, f"{rule.refuse}, which ModelSpec cannot express")
    filled = known.row
    fields: dict[str, object] = {
        "name": row["model"],
        "hidden_size": _need(filled, "hidden"),
        "num_hidden_layers": _need(filled, "num_layers"),
        "num_attention_heads": _need(filled, "num_heads"),
        "num_key_value_heads": _need(filled, "num_kv_heads"),
        "head_dim": _need(filled, "head_dim"),
        "vocab_size": _need(filled, "vocab_size"),
        "tie_word_embeddings": _flag(filled, "tied_embeddings"),
        "num_nextn_predict_layers": _get(filled, "mtp_layers"),
        "sliding_window": _get(filled, "sliding_window"),
        "total_params": _published(row, "total_params_b"),
        "active_params": _published(row, "active_params_b"),
        "source": row.get("source", ""),
        "assumptions": known.told,
    }
    fields |= _latent(filled) | _ffn(filled) | known.of("model")
    return ModelSpec(**fields)  # type: ignore[arg-type]


def _get(row: Row, column: str) -> int:
    return tables.count(row, column, MODELS[column].least) or 0


def _need(row: Row, column: str) -> int:
    if row.get(column, "") in UNKNOWN:
        raise _empty(column)
    return _get(row, column)


def _empty(column: str) -> SpecError:
    return SpecError(column, "", "is empty, the column is needed")


def _flag(row: Row, column: str) -> bool:
    value = _get(row, column)
    require(value <= 1, column, row.get(column), "is neither 0 nor 1")
    return value == 1


def _published(row: Row, column: str) -> float | None:
    """Of 1e9 parameters."""
    value = tables.number(row, column)
    return None if value is None else value * 1e9


def _latent(row: Row) -> dict[str, object]:
    """The sizes of MLA."""
    if row.get("attention") != "mla":
        return {}
    columns = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes: dict[str, object] = {column: _get(row, column) for column in columns}
    width = _get(row, "qk_nope_head_dim") + _get(row, "qk_rope_head_dim")
    return {"attention": "mla", "head_dim": width, **sizes}


def _ffn(row: Row) -> dict[str, object]:
    experts = _get(row, "num_experts")
    if not experts:
        return {"intermediate_size": _need(row, "dense_ffn_hidden")}
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": _need(row, "top_k"),
        "moe_intermediate_size": _need(row, "expert_ffn_hidden"),
        "shared_expert_intermediate_size": _get(row, "shared_ffn_hidden"),
        "first_k_dense_replace": _need(row, "num_dense_layers"),
        "intermediate_size": _get(row, "dense_ffn_hidden"),
    }
