"""Figures of the report: by source, GPU and family, titled by their finding; components."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mopsim.report.validation import Points, by, scatter, spread
from mopsim.validate.components import Predicted
from mopsim.validate.output import GROUPS, MEASURES, selections
from mopsim.validate.run import Validation
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import by_group, errors, over_sources

JUDGED = {
    "step_time": ("Step time", "step_time_s", "bf16_fp16_AB", "bf16 and fp16, grades A and B, held out"),
    "peak_memory": ("Peak memory", "peak_memory_bytes", "AB", "grades A and B"),
}
"""Of each quantity: its name, its measure, the selection that its figure is stated for, and what that is."""
FEW = 5
"""Runs from which a group counts as the worst."""
COMPONENTS = {
    "latency_s": ("Time of a component", "seconds"),
    "flops_per_s": ("Rate of a kernel", "FLOP/s"),
    "peak_memory_gib": ("Peak memory of a component", "GiB"),
}


def figures(folder: Path, validation: Validation, parts: Sequence[Predicted]) -> None:
    """Write the figures that there are points for."""
    for group in ("source", "gpu", "family"):

        def title(quantity: str, groups: Mapping[str, Points], group: str = group) -> str:
            return finding(validation, quantity, group, groups)

        by(
            folder,
            validation,
            group,
            GROUPS[group],
            title,
            runs=lambda quantity: judged(validation, quantity),
        )
    _components(folder, parts)


def judged(validation: Validation, quantity: str) -> list[Scored]:
    """The runs that a figure shows: those that its title speaks of; all, where none is of that selection."""
    chosen = selections(validation.scored)[JUDGED[quantity][2]]
    found = [one for one in chosen if getattr(one.case.measured, quantity)]
    return found or list(validation.scored)


def finding(validation: Validation, quantity: str, group: str, groups: Mapping[str, Points]) -> str:
    """The mean error of the runs that are judged, and the worst of their groups."""
    name, measure, selection, which = JUDGED[quantity]
    runs = selections(validation.scored)[selection]
    found = over_sources(runs, MEASURES[measure])
    if found is None:
        return spread(quantity, groups)
    count = len(by_group(runs, MEASURES[measure], GROUPS["source"]))
    sources = f"{count} source{'s' if count > 1 else ''}"
    alike = errors(MEASURES[measure](one) for one in runs)
    each = f"{alike.mape:.1%} over runs" if alike else ""
    within = f"9 of 10 runs within {found.p90_ape:.1%}"
    head = f"{name}: {found.mape:.1%} mean error over {sources}, {each}, {within}"
    means = by_group(runs, MEASURES[measure], GROUPS[group])
    most = max(((e.mape, key) for key, e in means.items() if e.n >= FEW), default=None)
    worst = f"\nworst {group} with {FEW} runs or more: {most[1]}, {most[0]:.1%}" if most else ""
    return f"{head}{worst}\n({which})"


def _components(folder: Path, parts: Sequence[Predicted]) -> None:
    metrics: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    for one in parts:
        if one.predicted and one.component.value:
            metrics[one.component.metric][one.component.kind].append((one.component.value, one.predicted))
    for metric, (name, unit) in COMPONENTS.items():
        if points := metrics.get(metric):
            scatter(folder / f"components_{metric}.png", points, unit, spread(name, points))
