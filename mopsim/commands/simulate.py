"""`mopsim simulate`: one strategy."""

from dataclasses import asdict
from pathlib import Path

from mopsim.api.run import simulate
from mopsim.commands.console import human, say_plan, say_written
from mopsim.commands.options import JobOptions
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.report.tables import breakdown, comparison


def run(
    job: JobOptions, strategy: str, trace: str | None, plan: str | None, seal: str | None, json: str | None
) -> None:
    """Simulate, show, and write what was asked for."""
    check_outputs({"--trace": trace, "--plan": plan, "--seal": seal, "--json": json})
    step = simulate(strategy=strategy, **job.keywords())
    made = step.plan() if plan else None
    if trace:
        step.save_trace(trace, asdict(job))
    if plan and made:
        io.write_yaml(Path(plan), made)
    sealed = step.seal(seal) if seal else ""
    console = human(json)
    console.print(step.inputs.parameters, style="dim")
    console.print(comparison([step.result], step.inputs.where_of([step.result]), step.inputs.interval))
    console.print(breakdown(step.result))
    if sealed:
        console.print(f"sealed in {seal}: sha256 {sealed}")
    for note in step.notes:
        console.print(note, style="yellow")
    if json:
        io.write_json(json, step.to_json())
    if plan:
        say_plan(console, plan, step.runnable)
    say_written(console, trace, json)
