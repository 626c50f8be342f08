"""Networks as rows of a table (columns of models.csv): one row -> one ModelSpec, or the reason why not."""

from pathlib import Path

from mopsim.common import io
from mopsim.common.errors import MopError, SpecError, require
from mopsim.common.rules import Rule, applied
from mopsim.common.shipped import listed_in
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


model_rules = listed_in("mopsim.validate", Rule, "data/models.yaml")
"""What notes say, and what rows leave open."""


def from_row(row: Row) -> ModelSpec:
    """One row as a ModelSpec; what the row leaves open is filled by rules and listed in `assumptions`.

    Raises SpecError naming the column that is missing, or the kind of layer that ModelSpec can't express.
    """
    try:
        return _from_row(tables.stated(row, MODELS))
    except SpecError as error:
        raise error.within(f"models.{row['model']}") from None


def complaints_of(row: Row) -> list[UnsupportedError]:
    """What is wrong of the cells of a row, each by itself, and what it lacks; put down to a run's `model`."""
    head = f"models.{row['model']}"
    wrong = [*tables.wrong_cells(row, MODELS)]
    filled = applied(model_rules(), row, ("model.",)).row
    told = {one.field for one in wrong}
    kinds = {"all"} if "num_experts" in told else _kinds(filled)
    needed = [name for name, one in MODELS.items() if one.must in kinds and name not in told]
    wrong += [_empty(column) for column in needed if filled.get(column, "") in UNKNOWN]
    return [UnsupportedError("model", str(one.within(head))) for one in wrong]


def _from_row(row: Row) -> ModelSpec:
    known = applied(model_rules(), row, ("model.",))
    for rule in known.rules:
        if rule.refuse:
            raise SpecError("", rule.id, f"{rule.refuse}, which ModelSpec cannot express")
    filled = known.row
    kinds = _kinds(filled)
    fields: dict[str, object] = {
        column.field: (_need if column.must in kinds else _get)(filled, name)
        for name, column in MODELS.items()
        if column.field and column.of in kinds
    }
    if "mla" in kinds:
        width = _get(filled, "qk_nope_head_dim") + _get(filled, "qk_rope_head_dim")
        fields |= {"attention": "mla", "head_dim": width}
    fields |= {
        "name": row["model"],
        "tie_word_embeddings": _flag(filled, "tied_embeddings"),
        "total_params": _published(row, "total_params_b"),
        "active_params": _published(row, "active_params_b"),
        "source": row.get("source", ""),
        "assumptions": known.told,
    }
    return io.convert(fields | known.of("model"), ModelSpec, "")


def _kinds(row: Row) -> set[str]:
    """Kinds of network that a row's is, of which columns are."""
    latent = {"mla"} if row.get("attention") == "mla" else set()
    return {"all", "experts" if _get(row, "num_experts") else "dense", *latent}


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
