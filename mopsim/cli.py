"""mopsim: plan the training of mixture-of-experts models. Heavy imports happen inside the command that
needs them."""

from typing import Annotated

import typer

from mopsim.commands import options as o
from mopsim.spec.command_line import run_app

app = typer.Typer(
    name="mopsim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate, compare and choose how to train a mixture-of-experts model on a cluster.",
)


@app.command()
def simulate(
    model: o.Model,
    hardware: o.Hardware,
    strategy: o.OneStrategy,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    nodes: o.Nodes = 1,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    trace: o.Trace = None,
    plan: o.PlanOut = None,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """One strategy: step time, memory by category, and what is exposed."""
    from mopsim.commands.simulate import run

    run(
        o.Job(model, hardware, nodes, seq_len, global_batch, routing, precision, seed),
        strategy,
        trace,
        plan,
        json,
    )


@app.command()
def search(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    nodes: o.Nodes = 1,
    top: Annotated[int, typer.Option(min=1, help="how many strategies to rank")] = 5,
    family: Annotated[
        str, typer.Option(help="families to search, comma-separated: mop,fsdp2,zero_offload,megatron")
    ] = "",
    any_plan: Annotated[
        bool, typer.Option("--any", help="also strategies and models that mopexec does not run yet")
    ] = False,
    risk: Annotated[
        bool, typer.Option("--risk", help="rank plans within 4 % of a memory limit like the others")
    ] = False,
    budget: Annotated[int, typer.Option(min=1, help="simulations at most")] = 200,
    plan: o.PlanOut = None,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    learning_rate: Annotated[float, typer.Option(help="of the plan's training")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="of the plan's training")] = 0,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Rank the strategies that fit; write the winner as a plan."""
    from mopsim.commands.search import run

    job = o.Job(
        model, hardware, nodes, seq_len, global_batch, routing, precision, seed, learning_rate, warmup_steps
    )
    run(job, top, family, any_plan, risk, budget, plan, json)


@app.command()
def compare(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    out: o.OutDirectory,
    strategy: Annotated[list[str], typer.Option(help="a strategy YAML or a family; give several")],
    nodes: o.Nodes = 1,
    sweep: Annotated[str | None, typer.Option(help="seq-len=32K,64K,... or nodes=1,2,...")] = None,
    any_plan: Annotated[
        bool, typer.Option("--any", help="families may use what mopexec does not run yet")
    ] = False,
    budget: Annotated[int, typer.Option(min=1, help="simulations per family and point")] = 60,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Tables and figures of several strategies side by side."""
    from mopsim.commands.compare import run

    job = o.Job(model, hardware, nodes, seq_len, global_batch, routing, precision, seed)
    run(job, strategy, out, sweep, any_plan, budget, json)


@app.command()
def calibrate(
    profile: Annotated[str, typer.Option(help="the hardware profile to correct: a name or a YAML file")],
    measurements: Annotated[
        list[str], typer.Option(help="run directories (or measurement.yaml files) of mopexec train")
    ],
    out: Annotated[str, typer.Option(help="where to write the new profile (YAML)")],
    json: o.Json = None,
    more: Annotated[
        list[str] | None, typer.Argument(help="further run directories", show_default=False)
    ] = None,
) -> None:
    """A corrected profile from measured runs, with what remains unexplained."""
    from mopsim.commands.calibrate import run

    run(profile, [*measurements, *(more or [])], out, json)


@app.command()
def validate(
    runs: Annotated[str | None, typer.Option(help="CSV of measured runs")] = None,
    models: Annotated[
        str | None, typer.Option(help="CSV of the networks they train; names it lacks are presets")
    ] = None,
    components: Annotated[str | None, typer.Option(help="CSV of measured components")] = None,
    out: Annotated[str | None, typer.Option(help="folder for figures of predicted against measured")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="processes; 0: one a core, at most 4")] = 0,
    json: o.Json = None,
) -> None:
    """Predicted against measured: errors out of sample, by source, GPU and family."""
    from mopsim.commands.validate import run

    run(runs, models, components, out, jobs, json)


@app.command()
def demo(
    out: o.OutDirectory = "reports/demo",
    seed: o.Seed = 0,
    steps: Annotated[int, typer.Option(min=10, help="training steps of each strategy")] = 50,
) -> None:
    """The closed loop on this machine: probe, search, train, calibrate, predict, report."""
    from mopsim.loop import run

    run(out, seed, steps)


def main() -> None:
    """Entry point."""
    run_app(app, "mopsim")


if __name__ == "__main__":
    main()
