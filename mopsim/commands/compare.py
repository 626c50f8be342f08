"""`mopsim compare`: several strategies side by side, as tables and figures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from mopsim.commands import inputs as read_inputs
from mopsim.commands.inputs import Inputs
from mopsim.commands.options import Job
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import parse_count
from mopsim.engine import SimResult, simulate
from mopsim.report.compare import Sweep, difference, finding, summary, write_compare
from mopsim.report.tables import comparison
from mopsim.strategies import FAMILIES

_SETTINGS = ("seq-len", "nodes")


def run(
    job: Job,
    strategies: Sequence[str],
    out: str,
    sweep: str | None,
    any_plan: bool,
    budget: int,
    json: str | None,
) -> None:
    """Compare, show, write the report into `out`."""
    check_outputs({"--json": json}, {"--out": out})
    folder = Path(out)
    inputs = read_inputs.read(job)
    swept = parse_sweep(sweep) if sweep else None
    results = [read_inputs.resolve(ref, inputs, any_plan=any_plan, budget=budget) for ref in strategies]
    labels = label(strategies, results)
    lines = _sweep(job, strategies, labels, swept, any_plan, budget) if swept else None
    timelines = [
        simulate(inputs.model, inputs.hardware, inputs.nodes, result.strategy, inputs.training, timeline=True)
        for result in results
    ]
    title = f"{inputs.model.name} at {job.seq_len} tokens on {inputs.hardware.cluster(inputs.nodes)}"
    written = write_compare(folder, results, labels, timelines, lines, title, read_inputs.facts(inputs))
    console = read_inputs.human(json)
    console.print(comparison(results, title))
    console.print(f"{summary(results, labels)} Written: {', '.join(str(path) for path in written)}")
    for note in read_inputs.notes(strategies, inputs):
        console.print(note, style="yellow")
    if json:
        io.write_json(json, _json(inputs, labels, results, lines))


def label(refs: Sequence[str], results: Sequence[SimResult]) -> list[str]:
    """A short distinct name for each strategy: the family, or the file's stem."""
    names = [ref if ref in FAMILIES else Path(ref).stem for ref in refs]
    if len(set(names)) == len(names):
        return names
    return [f"{name} {index + 1}" for index, (name, _) in enumerate(zip(names, results, strict=True))]


def parse_sweep(text: str) -> tuple[str, list[int], list[str]]:
    """(setting, values, their names) of 'seq-len=32K,64K' or 'nodes=1,2'. Raises MopError."""
    setting, _, values = text.partition("=")
    if setting not in _SETTINGS or not values:
        raise MopError(
            f"--sweep: {text!r} is not {' or '.join(f'{name}=VALUE,VALUE,...' for name in _SETTINGS)}"
        )
    names = [name.strip() for name in values.split(",")]
    pairs = sorted((parse_count(name, "--sweep"), name) for name in names)
    for (value, name), (following, other) in pairwise(pairs):
        if value == following:
            raise MopError(f"--sweep: {setting} {other!r} is given twice (as {name!r})")
    return setting, [value for value, _ in pairs], [name for _, name in pairs]


def _sweep(
    job: Job,
    refs: Sequence[str],
    labels: Sequence[str],
    swept: tuple[str, list[int], list[str]],
    any_plan: bool,
    budget: int,
) -> Sweep:
    setting, values, names = swept
    results: dict[str, list[SimResult | None]] = {name: [] for name in labels}
    for value in values:
        point = replace(job, seq_len=str(value)) if setting == "seq-len" else replace(job, nodes=value)
        inputs = read_inputs.read(point)
        for ref, name in zip(refs, labels, strict=True):
            results[name].append(_point(ref, inputs, any_plan, budget))
    return Sweep(setting, values, names, results)


def _point(ref: str, inputs: Inputs, any_plan: bool, budget: int) -> SimResult | None:
    """A result, or None where the strategy is not legal at this point."""
    try:
        return read_inputs.resolve(ref, inputs, any_plan=any_plan, budget=budget)
    except MopError:
        return None


def _json(
    inputs: Inputs, labels: Sequence[str], results: Sequence[SimResult], sweep: Sweep | None
) -> dict[str, object]:
    found: dict[str, object] = {
        "strategies": dict(zip(labels, (result.to_json() for result in results), strict=True)),
        "finding": finding(results, labels),
        "difference": difference(results, labels),
        "facts": read_inputs.facts(inputs),
    }
    if sweep:
        found["sweep"] = {
            "setting": sweep.setting,
            "values": list(sweep.values),
            "results": {
                name: [r.to_json() if r else None for r in points] for name, points in sweep.results.items()
            },
        }
    return found
