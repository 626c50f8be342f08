"""The commands of mopsim: they read options, call the API and print; each makes its own heavy imports."""

from mopsim.common.command_line import quiet_interrupts, run_app

quiet_interrupts("mopsim")  # before what takes long

from typing import Annotated, Literal  # noqa: E402

import typer  # noqa: E402

from mopsim.commands import options as o  # noqa: E402
from mopsim.commands import pairs  # noqa: E402
from mopsim.common.app import App  # noqa: E402

app = App(
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
    stack: o.StackName = None,
    seed: o.Seed = 0,
    interval: o.Interval = 0.9,
    seal: o.Seal = None,
    json: o.Json = None,
) -> None:
    """Simulate one strategy: step time, memory by category, exposed time."""
    from mopsim.commands.simulate import run

    job = o.JobOptions(
        model, hardware, nodes, seq_len, global_batch, routing, precision, seed, stack=stack,
        interval=interval,
    )  # fmt: skip
    run(job, strategy, trace, plan, seal, json)


@app.command()
def search(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    nodes: o.Nodes = 1,
    top: Annotated[int, typer.Option(min=1, max=10**6, help="how many strategies to rank")] = 5,
    family: o.Family = None,
    runnable: o.Runnable = False,
    any_plan: o.AnyPlan = False,
    risk: Annotated[
        bool, typer.Option("--risk", help="rank plans that fit with a probability below 0.9 too")
    ] = False,
    any_routing: Annotated[
        bool, typer.Option("--any-routing", help="only plans that fit however unevenly the router chooses")
    ] = False,
    budget: Annotated[
        int,
        typer.Option(
            min=1, max=10**6, help="simulations at most of each family, 4 x as many to prove the best"
        ),
    ] = 100,
    jobs: o.Jobs = 0,
    plan: o.PlanOut = None,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    learning_rate: Annotated[float, typer.Option(help="recorded in the plan")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="recorded in the plan")] = 0,
    stack: o.StackName = None,
    seed: o.Seed = 0,
    interval: o.Interval = 0.9,
    seal: o.Seal = None,
    json: o.Json = None,
) -> None:
    """Rank the strategies that fit; write the winner as a plan."""
    from mopsim.commands.search import run

    job = o.JobOptions(
        model, hardware, nodes, seq_len, global_batch, routing, precision, seed, learning_rate, warmup_steps,
        stack, interval,
    )  # fmt: skip
    raise typer.Exit(run(job, top, family, runnable, risk, any_routing, budget, jobs, plan, seal, json))


@app.command(cls=pairs.COMPARE)
def compare(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    out: o.OutDirectory,
    strategy: Annotated[list[str], typer.Option(help="a strategy YAML or a family; give several")],
    nodes: o.Nodes = 1,
    sweep: Annotated[str | None, typer.Option(help="seq-len=32K,64K,... or nodes=1,2,...")] = None,
    hold: Annotated[
        Literal["tokens-per-step", "sequences-per-step", "tokens-per-device"],
        typer.Option(help="what the sweep holds constant; the global batch follows"),
    ] = "tokens-per-step",
    formats: o.Format = "png",
    runnable: o.Runnable = False,
    any_plan: o.AnyPlan = False,
    budget: Annotated[int, typer.Option(min=1, max=10**6, help="simulations per family and point")] = 100,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    stack: o.StackName = None,
    seed: o.Seed = 0,
    interval: o.Interval = 0.9,
    json: o.Json = None,
) -> None:
    """Simulate several strategies side by side: tables and figures."""
    from mopsim.commands.compare import run

    job = o.JobOptions(
        model, hardware, nodes, seq_len, global_batch, routing, precision, seed, stack=stack,
        interval=interval,
    )  # fmt: skip
    raise typer.Exit(run(job, strategy, out, sweep, hold, formats, runnable, budget, json))


@app.command()
def context(
    out: o.OutDirectory,
    model: Annotated[list[str], typer.Option(help="as --model elsewhere; give several")],
    nodes: Annotated[list[int], typer.Option(min=1, help="nodes, one for each --model")],
    hardware: o.Hardware = "h200-sxm-141g",
    seq_len: Annotated[
        str, typer.Option(help="context lengths, comma-separated")
    ] = "64K,128K,256K,512K,1M,2M,4M,8M,16M",
    tokens_per_device: Annotated[str, typer.Option(help="tokens of each device in one step")] = "128K",
    contender: Annotated[str, typer.Option(help="comma-separated; default: all", show_default=False)] = "",
    budget: Annotated[int, typer.Option(min=1, max=10**6, help="simulations per length")] = 24,
    jobs: o.Jobs = 0,
    routing: o.Routing = "balanced",
    json: o.Json = None,
) -> None:
    """Sweep the context length: throughput of MoP, and of FSDP2 under each of some restrictions."""
    from mopsim.commands.context import ContextOrder, run

    order = ContextOrder(model, nodes, hardware, seq_len, tokens_per_device, contender, budget, jobs, routing)
    raise typer.Exit(run(order, out, json))


@app.command(cls=pairs.SIZE)
def size(
    model: o.Model,
    tokens: Annotated[str, typer.Option(help="tokens to train on, decimal: 500B, 1.5T, 15T, 2e12")],
    hardware: Annotated[list[str], typer.Option(help="a hardware profile or YAML file; give several")],
    days: Annotated[float | None, typer.Option(help="wall-clock days that it may take")] = None,
    budget: Annotated[
        float | None, typer.Option(help="dollars that it may cost (with --buy: to buy it)")
    ] = None,
    seq_len: o.SeqLen = "4096",
    global_batch_tokens: Annotated[
        str, typer.Option(help="tokens per optimizer step, fitted to each cluster (binary: 4M = 4194304)")
    ] = "4M",
    family: o.Family = None,
    max_nodes: Annotated[int, typer.Option(min=1, max=65536, help="nodes at most")] = 512,
    confidence: Annotated[float, typer.Option(help="probability of the deadline that will do")] = 0.5,
    price: Annotated[
        list[str] | None, typer.Option(help="NAME=DOLLARS per device and hour, instead of the profile's")
    ] = None,
    reserved: Annotated[bool, typer.Option("--reserved", help="rent at reserved prices")] = False,
    buy: Annotated[bool, typer.Option("--buy", help="as a purchase, not as rent")] = False,
    capex: Annotated[list[str] | None, typer.Option(help="NAME=DOLLARS of a node, for --buy")] = None,
    years: Annotated[float | None, typer.Option(help="years over which a purchase is written off")] = None,
    sites: Annotated[
        str | None, typer.Option(help="YAML list of data centres: power price, PUE, carbon, space, rent")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, or a YAML file, instead of a shipped assumption")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="share of the wall clock that trains, instead of reckoned goodput")
    ] = None,
    pue: Annotated[
        float | None, typer.Option(help="power of the building over power of its machines")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="dollars that the fastest cluster may cost")] = None,
    simulations: Annotated[
        int, typer.Option(min=1, max=10**6, help="of each family, where a node count is searched")
    ] = 3,
    runnable: o.Runnable = False,
    plan: o.PlanOut = None,
    out: Annotated[
        str | None, typer.Option(help="folder for decision.html: rivals, risks, what-if, what to measure")
    ] = None,
    routing: o.Routing = "balanced",
    precision: o.Precision = "bfloat16",
    stack: o.StackName = None,
    interval: o.Interval = 0.9,
    json: o.Json = None,
) -> None:
    """Find the machine type and number of nodes that train in time, or within a budget: days, cost, risk."""
    from mopsim.commands.size import SizeOrder, run

    order = SizeOrder(
        model, tokens, days, budget, hardware, seq_len, global_batch_tokens, family, max_nodes, confidence,
        price or [], reserved, buy, capex or [], years, sites, assume or [], utilisation, pue, max_cost,
        simulations, runnable, routing, precision, stack, interval,
    )  # fmt: skip
    raise typer.Exit(run(order, plan, json, out))


@app.command()
def export(
    plan: Annotated[str, typer.Option(help="a plan (YAML), as mopsim search writes it")],
    to: Annotated[str, typer.Option(help="whose configuration; one that is not known lists those that are")],
    out: Annotated[str, typer.Option(help="where to write it (- for standard output)")],
    lossy: Annotated[
        bool, typer.Option("--lossy", help="write it even so, listing what the target cannot express")
    ] = False,
    json: o.Json = None,
) -> None:
    """Write a plan as the configuration of another trainer, or refuse it by field."""
    from mopsim.commands.export import run

    run(plan, to, out, lossy, json)


@app.command("list")
def listing(
    kind: Annotated[Literal["models", "hardware", "stacks"], typer.Argument(help="whose names")],
    json: o.Json = None,
) -> None:
    """The networks, machine types or software stacks that are known by name, a line each."""
    from mopsim.commands.listing import run

    run(kind, json)


@app.command()
def calibrate(
    profile: Annotated[str, typer.Option(help="the hardware profile to correct: a name or a YAML file")],
    measurements: Annotated[
        list[str], typer.Option(help="run directories (or measurement.yaml files) of mopexec train")
    ],
    out: Annotated[str, typer.Option(help="where to write the new profile (YAML)")],
    stack: o.StackName = None,
    json: o.Json = None,
    more: Annotated[
        list[str] | None, typer.Argument(help="further run directories", show_default=False)
    ] = None,
) -> None:
    """Correct a hardware profile by measured runs; show what remains unexplained."""
    from mopsim.commands.calibrate import run

    run(profile, [*measurements, *(more or [])], out, json, stack)


@app.command(cls=pairs.VALIDATE)
def validate(
    runs: Annotated[str | None, typer.Option(help="CSV of measured runs")] = None,
    models: Annotated[
        str | None, typer.Option(help="CSV of the networks they train; names it lacks are presets")
    ] = None,
    components: Annotated[str | None, typer.Option(help="CSV of measured components")] = None,
    cases: Annotated[
        list[str] | None, typer.Option(help="file of cases (JSON lines or YAML); give several")
    ] = None,
    stack: o.StackName = None,
    out: Annotated[str | None, typer.Option(help="folder for figures of predicted against measured")] = None,
    formats: o.Format = "png",
    jobs: o.Jobs = 0,
    hold_out: Annotated[
        Literal["source", "model", "none"],
        typer.Option(help="what a prediction has not learned from: its source, its network, or nothing"),
    ] = "source",
    interval: o.Interval = 0.9,
    sealed: Annotated[str | None, typer.Option(help="a prediction that --seal wrote before its run")] = None,
    measurements: Annotated[str | None, typer.Option(help="with --sealed: its run's directory")] = None,
    json: o.Json = None,
) -> None:
    """Predict measured runs; show the errors, and how many intervals hold, of sources never seen."""
    from mopsim.commands.sealed import run as score_sealed
    from mopsim.commands.validate import run

    if sealed:
        score_sealed(sealed, measurements, json)
        return
    run(runs, models, components, cases or [], stack or "", out, formats, jobs, hold_out, interval, json)


profiles = App(no_args_is_help=True, help="Hardware profiles.")
app.add_typer(profiles, name="profile")


@profiles.command("new", cls=pairs.PROFILE_NEW)
def profile_new(
    out: Annotated[str, typer.Option(help="where to write the profile (YAML)")],
    name: Annotated[str | None, typer.Option(help="of the machine type, as h20-sxm-96g")] = None,
    memory: o.Memory = None,
    memory_bandwidth: o.MemoryBandwidth = None,
    bf16: o.Bf16 = None,
    fp8: o.Fp8 = None,
    scale_up: o.ScaleUp = None,
    nic: o.Nic = None,
    host_link: o.HostLink = None,
    host_memory: o.HostMemory = None,
    power: o.Power = None,
    node_power: o.NodePower = None,
    price: o.Price = None,
    devices_per_node: Annotated[int | None, typer.Option(min=1, max=65536, help="GPUs of a node")] = None,
    scale_up_size: Annotated[
        int | None, typer.Option(min=1, max=65536, help="GPUs of one NVLink domain")
    ] = None,
    near: Annotated[
        str | None, typer.Option(help="the known card that fills the rest; default: nearest")
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="look for the nearest card of this one: hopper, ...")
    ] = "",
    source: Annotated[
        str | None, typer.Option(help="where the figures come from: a data sheet, a page")
    ] = None,
    tag: Annotated[
        Literal["datasheet", "measured", "assumed"], typer.Option(help="of the figures")
    ] = "datasheet",
    ask: Annotated[bool, typer.Option("--ask", help="ask for what is not given")] = False,
    model: Annotated[str | None, typer.Option(help="of the reference job, as elsewhere")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, max=65536, help="of the reference job")] = None,
    seq_len: Annotated[str | None, typer.Option(help="of the reference job")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="of the reference job")] = None,
    family: Annotated[str | None, typer.Option(help="families searched for its strategy")] = None,
    budget: Annotated[int | None, typer.Option(min=1, max=10**6, help="simulations of each family")] = None,
    json: o.Json = None,
) -> None:
    """Describe a card that nobody measured: its figures, the nearest known card for the rest, and how much
    each of those assumptions moves the step of a reference job. A figure may have another unit: 1,979 TFLOPS,
    400Gb/s (docs/profile-from-a-data-sheet.md)."""
    from mopsim.commands.profile import CardOrder, run

    figures = {
        "memory": memory, "memory-bandwidth": memory_bandwidth, "bf16": bf16, "fp8": fp8,
        "scale-up": scale_up, "nic": nic, "host-link": host_link, "host-memory": host_memory, "power": power,
        "node-power": node_power, "price": price,
    }  # fmt: skip
    given = {figure: text for figure, text in figures.items() if text is not None}
    card = CardOrder(name, given, near, architecture, devices_per_node, scale_up_size, source, tag)
    job = {
        "model": model, "nodes": nodes, "seq_len": seq_len, "global_batch": global_batch, "families": family,
        "budget": budget,
    }  # fmt: skip
    run(card, {key: value for key, value in job.items() if value is not None}, out, ask, json)


@app.command(cls=pairs.EXPLORE)
def explore(
    result: Annotated[
        str, typer.Argument(help="what simulate, search, compare, size, context or validate wrote (--json)")
    ],
    out: Annotated[str, typer.Option(help="the page (HTML)")],
    timelines: Annotated[
        int, typer.Option(min=0, max=100, help="simulate so many steps once more, for their timelines")
    ] = 3,
    model: Annotated[list[str] | None, typer.Option(help="the result's model, where it is no preset")] = None,
    hardware: Annotated[
        list[str] | None, typer.Option(help="the result's hardware, where it is no shipped profile")
    ] = None,
) -> None:
    """Write a result as one page that sorts, filters and zooms, and needs no network."""
    from mopsim.commands.explore import run

    run(result, out, timelines, model or [], hardware or [])


@app.command()
def demo(
    out: o.OutDirectory = "reports/demo",
    seed: o.Seed = 0,
    steps: Annotated[int, typer.Option(min=20, help="training steps of each strategy")] = 40,
) -> None:
    """Run the whole loop on this machine: probe, search, train, calibrate, predict, report."""
    from mopsim.loop import run

    run(out, seed, steps)


def main() -> None:
    """Entry point."""
    run_app(app, "mopsim")


if __name__ == "__main__":
    main()
