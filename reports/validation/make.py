"""Makes this report: python -m reports.validation.make, from the cases beside it.

The errors to expect (mopsim/intervals/errors.yaml) are learned from the same simulations. With --runs and
--models (tables of published runs, which are not part of this repository) the cases are resolved first;
--components predicts a table of components too. A quarter of an hour on two cores.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame

from mopsim.common import io
from mopsim.report.validation_tables import tables
from mopsim.validate.case import Case, read_cases, write_cases
from mopsim.validate.components import predict_components
from mopsim.validate.models import read_rows
from mopsim.validate.output import to_json
from mopsim.validate.run import Refused, Validation, cases_of, refused_of, scored_by
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import score
from mopsim.validate.simulated import simulate_all
from mopsim.validate.tables import read_components, read_runs
from reports.validation import errors as expected
from reports.validation import headline
from reports.validation.few_runs import few_runs
from reports.validation.figures import figures
from reports.validation.guesses import guesses
from reports.validation.misses import markdown, missed_json, misses

HERE = Path(__file__).parent
CASES = HERE / "cases"
REFUSED = HERE / "refused.csv"


def main() -> None:
    """Read or resolve the cases, simulate, write tables, misses, figures and the README's figures."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--runs", type=Path, help="table of published runs (CSV)")
    asked.add_argument("--models", type=Path, help="table of the networks that they train (CSV)")
    asked.add_argument("--components", type=Path, help="table of measured components (CSV)")
    asked.add_argument("--json", help="write the result as JSON here")
    asked.add_argument("--jobs", type=int, default=0)
    asked.add_argument("--resolve-only", action="store_true", help="write the cases and stop")
    options = asked.parse_args()
    refused: list[Refused] = []
    if options.runs:
        refused = resolve(options.runs, options.models)
        if options.resolve_only:
            return
    cases = [case for path in sorted(CASES.glob("*.jsonl")) for case in read_cases(path)]
    validation, unknown = _validated(cases, options.jobs, refused)
    parts = predict_components(read_components(options.components)) if options.components else []
    few = few_runs(validation.scored)
    grids = [*tables(validation, parts), few]
    missed = misses(validation, parts)
    io.write_text(HERE / "tables.md", "\n".join(grid.markdown() for grid in grids))
    io.write_text(HERE / "misses.md", markdown(missed))
    figures(HERE, validation, parts)
    headline.install(validation, unknown, parts, few)
    if options.json:
        io.write_json(options.json, to_json(validation, parts) | missed_json(missed))


def _validated(cases: list[Case], jobs: int, refused: list[Refused]) -> tuple[Validation, list[Scored]]:
    """The cases simulated, the errors to expect learned from them and installed, then all scored, each by
    what other sources teach; and some of them as runs of programs that nobody described."""
    results = simulate_all(cases, jobs, _told)
    known = [(case, result) for case, result in zip(cases, results, strict=True) if not result.error]
    own, general = guesses([case for case, _ in known], jobs, _told)
    expected.install(known, own)
    held = scored_by(known, "source")
    unknown = score([case for case, _ in general], [result for _, result in general])
    return Validation(held["source"], refused + refused_of(cases, results), held), unknown


def _told(count: int, of: int) -> None:
    print(f"\r{count} of {of}", end="\n" if count == of else "", flush=True)


def resolve(runs: Path, models: Path | None) -> list[Refused]:
    """Write the rows of a table as cases, a file for each source, and a list of those that are none, which
    are returned."""
    cases, refused = cases_of(read_runs(runs), read_rows(models) if models else {})
    sources: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        sources[case.source.name].append(case)
    for source, some in sources.items():
        write_cases(CASES / f"{source}.jsonl", some)
    list_refused(refused)
    print(f"{len(cases)} cases in {CASES}, {len(refused)} rows refused")
    return refused


def list_refused(refused: Sequence[Refused]) -> None:
    """Write what each row is refused for."""
    rows = [one.about | {"refused": "; ".join(one.told)} for one in refused]
    io.write_text(REFUSED, DataFrame(rows).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
