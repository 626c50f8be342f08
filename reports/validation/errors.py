"""Fits the errors to expect of a prediction to the runs of a validation, and installs them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec.structs import replace

from mopsim.common import io
from mopsim.common.changes import sparse
from mopsim.common.yaml_text import dump_yaml
from mopsim.intervals import errors
from mopsim.intervals.errors import NAMES, ErrorCell, ErrorQuantity, Errors, Guesses, Name
from mopsim.intervals.made import Made
from mopsim.validate.case import Case
from mopsim.validate.facts import general_stacks
from mopsim.validate.scored import trusted
from mopsim.validate.simulated import as_read
from mopsim.validate.uncertain import cell, reading
from reports.validation.first_scores import first_scores
from reports.validation.fitted_errors import fit_errors
from reports.validation.guesses import Run

INSTALLED = Path(errors.__file__).with_name("errors.yaml")
MADE_BY = "python -m reports.validation.make"
EXACT = 0.006
EXACT_SOURCE = (
    "tests/parity: peaks that the dry run plays lie within 1 %, which is taken for the 90 % interval"
)
EXACT_ON = ("cpu",)
"""No run of mopexec on a GPU has been compared with its dry run."""


FIRST: dict[Name, str] = {"step_time": "step_time_s", "peak_memory": "peak_memory_bytes"}
"""Columns of first scores that tell how wide intervals are to be."""
SOME: frozenset[Name] = frozenset({"peak_memory"})
"""Whose programs are some as described and some not (adr/0072)."""


def learn(runs: Sequence[Run], guesses: Sequence[Run]) -> Errors:
    """From runs of grade A and B without a refusal, by their own stacks and by general ones."""
    described = [run for run in runs if run[0].stack not in general_stacks()]
    unknown = [run for run in runs if run[0].stack in general_stacks()]
    first = first_scores()
    guessed = {name: row for name, row in first.items() if row["stack"] in general_stacks()}
    step_time, peak_memory = _fitted(described, {name: first[name] for name in first.keys() - guessed})
    guessed_time, guessed_memory = _fitted([*unknown, *guesses], guessed)
    stacks = tuple(sorted(general_stacks()))
    return Errors(
        made_by=MADE_BY, exact=EXACT, exact_source=EXACT_SOURCE, exact_on=EXACT_ON,
        step_time=step_time, peak_memory=peak_memory,
        guesses=Guesses(stacks=stacks, step_time=guessed_time, peak_memory=guessed_memory),
    )  # fmt: skip


def _fitted(runs: Iterable[Run], first: dict[str, dict[str, str]]) -> tuple[ErrorQuantity, ErrorQuantity]:
    """Of the step time, of the peak. first: as runs were predicted before anything was learned from them."""
    known: dict[Name, list[ErrorCell]] = defaultdict(list)
    before: dict[Name, dict[str, list[ErrorCell]]] = {name: {} for name in NAMES}
    for case, result in runs:
        if not trusted(case) or result.error:
            continue
        peak = as_read(result, case.program().reading, case.profile())
        said: tuple[tuple[Name, float, str, Made], ...] = (
            ("step_time", result.step_time, "", result.made), ("peak_memory", peak, reading(case), ()),
        )  # fmt: skip
        for name, predicted, read, made in said:
            if not (measured := getattr(case.measured, name)):
                continue
            known[name].append(_cell(case, measured, predicted, read, made))
            row = first.get(case.id, {})
            if scored := row.get(FIRST[name]):
                one = _cell(case, measured, float(scored), read, made)
                before[name].setdefault(row["set"], []).append(one)
    step_time, peak_memory = (fit_errors(known[name], _by_set(before[name]), name in SOME) for name in NAMES)
    return step_time, peak_memory


def _by_set(before: dict[str, list[ErrorCell]]) -> dict[str, list[ErrorCell]]:
    """In the order in which the sets were scored, which their numbers are."""
    return dict(sorted(before.items(), key=lambda item: int(item[0])))


def _cell(case: Case, measured: float, predicted: float, read: str = "", made: Made = ()) -> ErrorCell:
    """By its program: that of a general stack is known by its source alone."""
    found = cell(case, measured, predicted, read, made)
    return replace(found, stack=case.source.name) if case.stack in general_stacks() else found


def install(runs: Sequence[Run], guesses: Sequence[Run]) -> None:
    """Write what is learned where mopsim reads it."""
    found = learn(runs, guesses)
    io.write_text(INSTALLED, dump_yaml(sparse(found)))
    errors.known_errors.cache_clear()
