"""Makes mopsim/presets/truth_models.yaml: python -m reports.validation.presets MODELS.csv.

Networks of the table of published runs that have no preset of their own; of those that a model cannot express
the reason in their place.
"""

import sys
from importlib.resources import files
from pathlib import Path

from mopsim.common.changes import sparse
from mopsim.common.errors import SpecError
from mopsim.common.io import to_yaml, write_text
from mopsim.common.table import Row
from mopsim.validate.models import from_row, read_rows


def presets_text(rows: dict[str, Row], own: set[str]) -> str:
    """The file's text: the rows that are not in `own`."""
    found = {}
    for name in sorted(set(rows) - own, key=list(rows).index):
        try:
            found[name] = sparse(from_row(rows[name]))
        except SpecError as error:
            found[name] = error.rule
    head = "# Networks of the table of published runs: python -m reports.validation.presets MODELS.csv\n"
    return f"{head}{to_yaml(found)}"


def main() -> None:
    """Write the presets of a models CSV beside the ones that are written by hand."""
    folder = Path(str(files("mopsim"))) / "presets"
    own = {path.stem for path in folder.glob("*.yaml")} - {"truth_models"}
    write_text(folder / "truth_models.yaml", presets_text(read_rows(Path(sys.argv[1])), own))


if __name__ == "__main__":
    main()
