"""`mopsim simulate`: one strategy."""

from dataclasses import asdict
from pathlib import Path

from mopsim.commands import inputs as read_inputs
from mopsim.commands.options import Job
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.engine import simulate
from mopsim.report.tables import breakdown, comparison
from mopsim.report.trace import Timeline, chrome_trace, write_trace


def run(job: Job, strategy: str, trace: str | None, plan: str | None, json: str | None) -> None:
    """Simulate, show, and write what was asked for."""
    check_outputs({"--trace": trace, "--plan": plan, "--json": json})
    inputs = read_inputs.read(job)
    result = read_inputs.resolve(strategy, inputs)
    made = read_inputs.make_plan(inputs, result) if plan else None
    if trace:
        result = simulate(
            inputs.model, inputs.hardware, inputs.nodes, result.strategy, inputs.training, timeline=True
        )
        facts = {**result.provenance, "job": asdict(job)}
        write_trace(Path(trace), chrome_trace(Timeline.of(result, facts)))
    if plan and made:
        io.write_yaml(Path(plan), made)
    console = read_inputs.human(json)
    console.print(comparison([result], f"{inputs.model.name} on {inputs.hardware.cluster(inputs.nodes)}"))
    console.print(breakdown(result))
    notes = read_inputs.notes([strategy], inputs)
    for note in notes:
        console.print(note, style="yellow")
    if json:
        io.write_json(json, {**result.to_json(), "notes": notes})
