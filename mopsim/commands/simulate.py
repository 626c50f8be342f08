"""`mopsim simulate`: one strategy."""

from pathlib import Path
from typing import Any

from mopsim.api.run import simulate
from mopsim.commands.console import human, say_notes, say_plan, say_written
from mopsim.commands.options import keywords
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.report.tables import breakdown, comparison


def run(*, trace: str | None, plan: str | None, seal: str | None, json: str | None, **job: Any) -> None:
    """Simulate, show, then write what was asked for, the largest last: a full disk loses no result."""
    check_outputs({"--trace": trace, "--plan": plan, "--seal": seal, "--json": json})
    step = simulate(**keywords(job))
    made = step.plan() if plan else None
    console = human(json)
    console.print(step.inputs.parameters, style="dim")
    console.print(comparison([step.result], step.inputs.where_of([step.result]), step.inputs.interval))
    console.print(breakdown(step.result))
    say_notes(console, step.notes)
    with io.json_last(json, step.to_json):
        if plan and made:
            io.write_yaml(Path(plan), made)
            say_plan(console, plan, step)
        if seal:
            console.print(f"sealed in {seal}: sha256 {step.seal(seal)}")
    say_written(console, json)
    if trace:
        training = step.inputs.training
        of_plan = {"learning_rate": training.learning_rate, "warmup_steps": training.warmup_steps}
        step.save_trace(trace, job | of_plan)
        say_written(console, trace)
