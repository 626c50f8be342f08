"""The commands of mopsim and their options; mopsim.commands runs them, each with its own heavy imports."""

from mopsim.common.interrupts import quiet_interrupts

quiet_interrupts("mopsim")  # before what takes long

from collections.abc import Mapping  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import Annotated, Any, Literal  # noqa: E402

import typer  # noqa: E402

from mopsim.commands import options as o  # noqa: E402
from mopsim.commands import pairs  # noqa: E402
from mopsim.common.app import App  # noqa: E402
from mopsim.common.command_line import run_app  # noqa: E402

app = App(
    name="mopsim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate, compare and choose how to train a mixture-of-experts model on a cluster.",
)
CLIP = "global norm that gradients are clipped to; 0: none is, so that updates may run under the backward"
CONTENDERS = (
    "comma-separated: mop, fsdp2, fsdp2_node_chunked, fsdp2_full, fsdp2_node, fsdp2_half_node, fsdp2_device; "
    "mop and fsdp2 always run; default: all"
)


def run(command: str, given: Mapping[str, Any]) -> None:
    """Run mopsim.commands.COMMAND, which takes the options by name; what it returns is the exit code."""
    raise typer.Exit(import_module(f"mopsim.commands.{command}").run(**given) or 0)


@app.command()
def simulate(
    model: o.Model,
    hardware: o.Hardware,
    strategy: o.OneStrategy,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    nodes: o.Nodes = 1,
    routing: o.Routing = "balanced",
    document_tokens: o.DocumentTokens = None,
    precision: o.FamilyPrecision = None,
    clip_norm: Annotated[float | None, typer.Option(min=0, help=CLIP)] = None,
    trace: o.Trace = None,
    plan: o.PlanOut = None,
    stack: o.StackName = None,
    seed: o.MaybeSeed = None,
    interval: o.Interval = 0.9,
    seal: o.Seal = None,
    json: o.Json = None,
) -> None:
    """Simulate one strategy: step time, memory by category, exposed time.

    That a step does not fit is a result (`fits` in the JSON), with exit code 0."""
    run("simulate", locals())


@app.command()
def search(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    nodes: o.Nodes = 1,
    top: Annotated[int, typer.Option(min=1, max=10**6, help="how many strategies to rank")] = 5,
    families: o.Family = None,
    runnable: o.Runnable = False,
    any_plan: o.AnyPlan = False,
    at_risk: Annotated[
        bool,
        typer.Option("--risk", help="rank by speed alone, also plans that fit with a probability below 0.9"),
    ] = False,
    any_routing: Annotated[
        bool, typer.Option("--any-routing", help="only plans that fit however unevenly the router chooses")
    ] = False,
    budget: Annotated[int, o.budget_of("of each family, of fsdp2 twice, 4 times to prove the best")] = 100,
    jobs: o.Jobs = 0,
    plan: o.PlanOut = None,
    routing: o.Routing = "balanced",
    document_tokens: o.DocumentTokens = None,
    precision: o.Precision = "bfloat16",
    learning_rate: Annotated[float, typer.Option(help="recorded in the plan")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="recorded in the plan")] = 0,
    clip_norm: Annotated[float, typer.Option(min=0, help=CLIP)] = 1.0,
    stack: o.StackName = None,
    seed: o.Seed = 0,
    interval: o.Interval = 0.9,
    seal: o.Seal = None,
    json: o.Json = None,
) -> None:
    """Rank the strategies that fit; write the winner as a plan."""
    run("search", locals())


@app.command(cls=pairs.COMPARE)
def compare(
    model: o.Model,
    hardware: o.Hardware,
    seq_len: o.SeqLen,
    global_batch: o.GlobalBatch,
    strategies: Annotated[
        list[str], typer.Option("--strategy", help="a strategy YAML or a family; give several")
    ],
    nodes: o.Nodes = 1,
    out: o.MaybeDirectory = None,
    sweep: Annotated[str | None, typer.Option(help="seq-len=32K,64K,... or nodes=1,2,...")] = None,
    hold: Annotated[
        Literal["tokens-per-step", "sequences-per-step", "tokens-per-device"],
        typer.Option(help="what the sweep holds constant; the global batch follows"),
    ] = "tokens-per-step",
    formats: o.Format = "png",
    runnable: o.Runnable = False,
    any_plan: o.AnyPlan = False,
    budget: Annotated[int, o.budget_of("per family and point")] = 100,
    routing: o.Routing = "balanced",
    document_tokens: o.DocumentTokens = None,
    precision: o.FamilyPrecision = None,
    stack: o.StackName = None,
    seed: o.MaybeSeed = None,
    interval: o.Interval = 0.9,
    json: o.Json = None,
) -> None:
    """Simulate several strategies side by side; with --out tables and figures."""
    run("compare", locals())


@app.command()
def context(
    out: o.OutDirectory,
    model: Annotated[list[str], typer.Option(help="a network, as --model of other commands; give several")],
    nodes: Annotated[list[int], typer.Option(min=1, help="nodes, one for each --model")],
    hardware: o.Hardware = "h200-sxm-141g",
    seq_len: Annotated[
        str, typer.Option(help="context lengths, comma-separated")
    ] = "64K,128K,256K,512K,1M,2M,4M,8M,16M",
    tokens_per_device: Annotated[str, typer.Option(help="tokens of each device in one step")] = "128K",
    contender: Annotated[str, typer.Option(help=CONTENDERS, show_default=False)] = "",
    budget: Annotated[int, o.budget_of("per length")] = 24,
    jobs: o.Jobs = 0,
    routing: o.Routing = "balanced",
    document_tokens: o.DocumentTokens = None,
    json: o.Json = None,
) -> None:
    """Sweep the context length: throughput of MoP, and of FSDP2 under each of some restrictions."""
    run("context", locals())


@app.command(cls=pairs.SIZE)
def size(
    model: o.Model,
    tokens: Annotated[str, typer.Option(help="tokens to train on, decimal: 500B, 1.5T, 15T, 2e12")],
    hardware: Annotated[list[str], typer.Option(help="a hardware profile or YAML file; give several")],
    days: Annotated[float | None, typer.Option(help="deadline: wall-clock days of the training")] = None,
    budget: o.Budget = None,
    seq_len: o.SeqLen = "4096",
    global_batch_tokens: Annotated[
        str, typer.Option(help="tokens per optimizer step, fitted to each cluster (binary: 4M = 4194304)")
    ] = "4M",
    families: o.Family = None,
    max_nodes: Annotated[
        int | None, typer.Option(min=1, max=65536, help="largest number of nodes; 512 without --max-devices")
    ] = None,
    max_devices: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="largest number of devices, whatever a node has")
    ] = None,
    confidence: Annotated[float, typer.Option(help="probability of the deadline that is asked for")] = 0.5,
    prices: Annotated[
        list[str] | None,
        typer.Option("--price", help="[NAME=]DOLLARS per device and hour, instead of the profile's"),
    ] = None,
    reserved: Annotated[bool, typer.Option("--reserved", help="rent at reserved prices")] = False,
    buy: Annotated[bool, typer.Option("--buy", help="buy the cluster instead of renting it")] = False,
    capex: Annotated[list[str] | None, typer.Option(help="[NAME=]DOLLARS of a node, for --buy")] = None,
    years: Annotated[float | None, typer.Option(help="years over which a purchase is written off")] = None,
    sites: Annotated[
        str | None, typer.Option(help="YAML list of data centres: power price, PUE, carbon, space, rent")
    ] = None,
    assumptions: Annotated[
        list[str] | None,
        typer.Option("--assume", help="NAME=VALUE, or a YAML file, instead of a shipped assumption"),
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="share of the wall clock that trains, instead of a computed one")
    ] = None,
    pue: Annotated[
        float | None, typer.Option(help="power of the building over power of its machines")
    ] = None,
    max_cost: o.MaxCost = None,
    simulations: Annotated[
        int, typer.Option(min=1, max=10**6, help="simulations of a family at a searched node count")
    ] = 3,
    runnable: o.Runnable = False,
    plan: o.PlanOut = None,
    out: Annotated[
        str | None, typer.Option(help="folder for decision.html: rivals, risks, what-if, what to measure")
    ] = None,
    routing: o.Routing = "balanced",
    document_tokens: o.DocumentTokens = None,
    precision: o.Precision = "bfloat16",
    stack: o.StackName = None,
    interval: o.Interval = 0.9,
    json: o.Json = None,
) -> None:
    """Find the machine type and number of nodes that train in time, or within a budget: days, cost, risk."""
    run("size", locals())


@app.command()
def export(
    plan: Annotated[str, typer.Option(help="a plan (YAML), as mopsim search writes it")],
    to: Annotated[str, typer.Option(help="target format; an unknown name lists the known ones")],
    out: Annotated[str, typer.Option(help="where to write it (- for standard output)")],
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="write it even so, and list the fields that the target cannot express"),
    ] = False,
    json: o.Json = None,
) -> None:
    """Write a plan as the configuration of another trainer, or refuse it by field."""
    run("export", locals())


@app.command("list")
def listing(
    kind: Annotated[Literal["models", "hardware", "stacks"], typer.Argument(help="what to list")],
    json: o.Json = None,
) -> None:
    """The networks, machine types or software stacks that are known by name, a line each."""
    run("listing", locals())


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
    run("calibrate", locals())


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
        typer.Option(help="runs that calibrate nothing of a prediction: its source, its network, or none"),
    ] = "source",
    interval: o.Interval = 0.9,
    sealed: Annotated[str | None, typer.Option(help="a prediction that --seal wrote before its run")] = None,
    measurements: Annotated[str | None, typer.Option(help="with --sealed: its run's directory")] = None,
    json: o.Json = None,
) -> None:
    """Predict measured runs; show the errors, and how many intervals hold, of sources never seen."""
    run("validate", locals())


profiles = App(no_args_is_help=True, help="Hardware profiles.")
app.add_typer(profiles, name="profile")


@profiles.command("new", cls=pairs.PROFILE_NEW)
def profile_new(
    out: Annotated[str, typer.Option(help="where to write the profile (YAML)")],
    name: Annotated[str | None, typer.Option(help="name of the machine type, such as h20-sxm-96g")] = None,
    memory: Annotated[str | None, o.FIGURE["memory"]] = None,
    memory_bandwidth: Annotated[str | None, o.FIGURE["memory-bandwidth"]] = None,
    bf16: Annotated[str | None, o.FIGURE["bf16"]] = None,
    fp8: Annotated[str | None, o.FIGURE["fp8"]] = None,
    scale_up: Annotated[str | None, o.FIGURE["scale-up"]] = None,
    nic: Annotated[str | None, o.FIGURE["nic"]] = None,
    host_link: Annotated[str | None, o.FIGURE["host-link"]] = None,
    host_memory: Annotated[str | None, o.FIGURE["host-memory"]] = None,
    power: Annotated[str | None, o.FIGURE["power"]] = None,
    node_power: Annotated[str | None, o.FIGURE["node-power"]] = None,
    price: Annotated[str | None, o.FIGURE["price"]] = None,
    devices_per_node: Annotated[int | None, typer.Option(min=1, max=65536, help="GPUs of a node")] = None,
    scale_up_size: Annotated[
        int | None, typer.Option(min=1, max=65536, help="GPUs of one NVLink domain")
    ] = None,
    near: Annotated[
        str | None, typer.Option(help="the known card that fills the rest; default: nearest")
    ] = None,
    architecture: Annotated[str, typer.Option(help="architecture of the nearest card: hopper, ...")] = "",
    source: Annotated[
        str | None, typer.Option(help="where the figures come from: a data sheet, a page")
    ] = None,
    tag: Annotated[
        Literal["datasheet", "measured", "assumed"], typer.Option(help="tag of the figures")
    ] = "datasheet",
    ask: Annotated[bool, typer.Option("--ask", help="ask for figures that are not given")] = False,
    model: Annotated[str | None, typer.Option(help="network of the reference job")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, max=65536, help="nodes of the reference job")] = None,
    seq_len: Annotated[str | None, typer.Option(help="sequence length of the reference job")] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="sequences per step of the reference job")
    ] = None,
    families: Annotated[
        str | None, typer.Option("--family", help="families that are searched for the job's strategy")
    ] = None,
    budget: Annotated[int | None, o.budget_of("of each family")] = None,
    json: o.Json = None,
) -> None:
    """Describe a card that nobody measured: its figures, the nearest known card for the rest, and how much
    each of those assumptions moves the step of a reference job. A figure may have another unit: 1,979 TFLOPS,
    400Gb/s (docs/profile-from-a-data-sheet.md)."""
    run("profile", locals())


@app.command(cls=pairs.EXPLORE)
def explore(
    result: Annotated[
        str, typer.Argument(help="what simulate, search, compare, size, context or validate wrote (--json)")
    ],
    out: Annotated[str, typer.Option(help="the page (HTML)")],
    timelines: Annotated[
        int, typer.Option(min=0, max=100, help="number of steps that are simulated again for their timelines")
    ] = 3,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="the result's model, if it is not a preset")
    ] = None,
    hardware: Annotated[
        list[str] | None, typer.Option(help="the result's hardware, if it is not a shipped profile")
    ] = None,
    json: o.Json = None,
) -> None:
    """Write a result as one page that sorts, filters and zooms, and needs no network."""
    run("explore", locals())


@app.command()
def demo(
    out: o.OutDirectory = "reports/demo",
    seed: o.Seed = 0,
    steps: Annotated[int, typer.Option(min=20, help="training steps of each strategy")] = 40,
    json: o.Json = None,
) -> None:
    """Run the whole loop on this machine: probe, search, train, calibrate, predict, report."""
    from mopsim import loop

    loop.run(out, seed, steps, json)


def main() -> None:
    """Entry point."""
    run_app(app, "mopsim")


if __name__ == "__main__":
    main()
