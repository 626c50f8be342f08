"""mopexec: train, probe, dry-run, verify. torch is imported inside the commands that need it."""

from mopsim.common.interrupts import quiet_interrupts

quiet_interrupts("mopexec")  # before what takes long

from pathlib import Path  # noqa: E402
from typing import Annotated, Any, Literal  # noqa: E402

import typer  # noqa: E402

from mopsim.common.app import App  # noqa: E402
from mopsim.common.command_line import run_app  # noqa: E402
from mopsim.common.errors import MopError  # noqa: E402
from mopsim.common.pairs import Pair, needs, paired  # noqa: E402

EXTRA = ("torch", "tokenizers", "pynvml", "safetensors")
"""Modules that the base install lacks: those of `mop[exec]`."""

app = App(
    name="mopexec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a plan for real, probe this machine, run one rank without hardware, verify a plan.",
)

PlanPath = Annotated[Path, typer.Option("--plan", help="a plan, as `mopsim search --plan` writes it")]
Json = Annotated[str | None, typer.Option("--json", help="write the result as JSON ('-' = standard output)")]
Limit = Annotated[str | None, typer.Option(help="bytes of one rank that may be used: 512MiB, 2GB")]
TrackedSteps = Annotated[
    int,
    typer.Option(
        min=0,
        max=10**9,
        help="number of first steps whose memory is tracked, and which are not compiled; 0: all under a "
        "limit, if the plan compiles nothing, else two",
    ),
]
Routing = Annotated[
    Literal["learned", "profile"],
    typer.Option(help="who chooses experts: the router, or the plan's profile"),
]
ProfileSteps = Annotated[int, typer.Option(min=0, max=10**9, help="extra steps timed by kind of work")]
TraceSteps = Annotated[
    int, typer.Option(min=0, max=10**9, help="extra steps whose Kineto trace goes into RUN/trace")
]
LogTo = Annotated[
    list[str] | None, typer.Option(help="tensorboard or wandb, where installed; may be repeated")
]
Restarts = Annotated[
    int, typer.Option(min=0, max=10**9, help="restart failed ranks from the last checkpoint")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**62, help="seed of weights and data; default: the plan's")
]

Data = Annotated[
    str | None,
    typer.Option(
        help="text, JSON lines or Parquet (.jsonl, .parquet), a directory of these, token ids (Megatron's "
        ".bin, .npy), or a YAML mixture; 'python' = ships with Python, default without a GPU"
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="tokenizer.json or its directory; default: the weights' own, else one trained on the text"
    ),
]
LossMask = Annotated[
    Literal["auto", "all", "assistant"],
    typer.Option(help="what counts in the loss; auto: a chat's assistant messages, all other text"),
]
Schedule = Annotated[
    Literal["constant", "linear", "cosine", "wsd"],
    typer.Option(help="learning rate after warm-up; wsd: constant, falling in the last fifth"),
]
Excluded = Annotated[
    int,
    typer.Option(
        min=0,
        max=10**9,
        help="first steps left out of the measurement; the learning rate's own: --set warmup_steps=N",
    ),
]
EvalData = Annotated[str | None, typer.Option(help="held-out data, as --data; its loss is in the metrics")]
EvalEvery = Annotated[int, typer.Option(min=0, max=10**9, help="steps between evaluations; 0 = at the end")]
EvalBatches = Annotated[int, typer.Option(min=1, max=10**9, help="global batches of an evaluation, at most")]
InitFrom = Annotated[
    Path | None, typer.Option(help="Hugging Face directory whose weights the run begins with")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="a field of plan.training, such as bias_update_rate=0; may be repeated",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint")]
Async = Annotated[
    bool,
    typer.Option(
        "--checkpoint-async", help="write checkpoints beside the next steps, from a copy on the host"
    ),
]
Every = Annotated[int, typer.Option(min=0, max=10**9, help="steps between checkpoints; 0 = only at the end")]


TRAIN = paired(
    needs("--eval-data", "--eval-every", "--eval-batches"), needs("--checkpoint-every", "--checkpoint-async")
)
REACH = paired(
    Pair(("--data",), lambda given: given.get("--confirm", True), "has no use beside --no-confirm")
)


@app.command(cls=TRAIN)
def train(
    plan: PlanPath,
    steps: Annotated[
        int, typer.Option(min=1, max=10**9, help="optimizer steps in all, earlier ones included")
    ],
    out: Annotated[Path, typer.Option(help="the run's directory: new, or one to --resume")],
    set_: Set = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    text_field: Annotated[str, typer.Option(help="field of a record with its text")] = "text",
    loss_mask: LossMask = "auto",
    eval_data: EvalData = None,
    eval_every: EvalEvery = 0,
    eval_batches: EvalBatches = 8,
    init_from: InitFrom = None,
    resume: Resume = False,
    device_limit: Limit = None,
    host_limit: Limit = None,
    tracked_steps: TrackedSteps = 0,
    routing: Routing = "learned",
    schedule: Schedule = "constant",
    warmup_steps_excluded: Excluded = 3,
    checkpoint_every: Every = 0,
    checkpoint_async: Async = False,
    final_checkpoint: Annotated[bool, typer.Option(help="write a checkpoint after the last step")] = True,
    keep: Annotated[int, typer.Option(min=1, max=10**9, help="checkpoints to keep")] = 2,
    profile_steps: ProfileSteps = 1,
    trace_steps: TraceSteps = 0,
    log_to: LogTo = None,
    max_restarts: Restarts = 0,
    seed: Seed = None,
    cache: Annotated[str | None, typer.Option(help="where tokenised text is kept")] = None,
    json: Json = None,
) -> None:
    """Train a plan on text; starts the ranks itself, or is one of them under torchrun."""
    given = dict(locals())
    from mopexec.cli.train import options_of, run

    raise typer.Exit(run(options_of(given), json, max_restarts))


@app.command()
def probe(
    out: Annotated[Path, typer.Option(help="the hardware profile to write")],
    ranks: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="devices; default: all cores or GPUs")
    ] = None,
    budget: Annotated[float, typer.Option(min=0.01, max=1000, help="scales the time spent measuring")] = 1.0,
    json: Json = None,
) -> None:
    """Measure this machine and write its hardware profile."""
    from mopexec.cli.probe import run

    run(out, ranks, budget, json)


@app.command(context_settings={"ignore_unknown_options": True})
def launch(
    plan: PlanPath,
    options: Annotated[
        list[str] | None,
        typer.Argument(help="options of `mopexec train`, after --: --data, --steps, --out, ..."),
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="a script for sbatch")] = False,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="a script to run on each node")] = False,
    script: Annotated[str | None, typer.Option(help="write it here instead of printing it")] = None,
    json: Json = None,
) -> None:
    """Write what a cluster needs to train a plan."""
    from mopexec.cli.launch import run

    if slurm == torchrun:
        raise MopError("launch: give one of --slurm and --torchrun")
    run(plan, "slurm" if slurm else "torchrun", script, options or [], json)


@app.command("dry-run")
def dry_run(
    plan: PlanPath,
    rank: Annotated[int, typer.Option(min=0, max=10**9, help="the rank that is played")] = 0,
    device_limit: Limit = None,
    host_limit: Limit = None,
    program: Annotated[
        str | None, typer.Option(help="write the ops that are played, in order, as JSON")
    ] = None,
    json: Json = None,
) -> None:
    """Show one rank's memory by category at the plan's full scale, without the hardware."""
    from mopexec.cli.dry_run import run

    run(plan, rank, device_limit, host_limit, program, json)


@app.command()
def verify(
    plan: PlanPath,
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="optimizer steps to compare")] = 2,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="most ranks; default: enough to show every mechanism")
    ] = None,
    json: Json = None,
) -> None:
    """Check the plan's parallel step against the single-device step, scaled down to this machine."""
    from mopexec.cli.verify import run

    raise typer.Exit(run(plan, steps, ranks, json))


@app.command()
def export(
    run: Annotated[Path, typer.Option("--run", help="the directory of a run of `mopexec train`")],
    out: Annotated[Path, typer.Option(help="the new directory to write")],
    to: Annotated[Literal["hf"], typer.Option(help="format: hf is Hugging Face's")] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="dtype of the tensors; default: the initial weights', else the computation's"),
    ] = None,
    json: Json = None,
) -> None:
    """Write a run's newest checkpoint as safetensors and config.json, which transformers loads."""
    from mopexec.cli.export import run as write

    write(run, out, dtype, json)


@app.command(cls=REACH)
def reach(
    plan: Annotated[list[Path], typer.Option("--plan", help="a plan; give several to compare")],
    device_limit: Annotated[str, typer.Option(help="bytes of one rank that may be used: 512MiB, 2GB")],
    host_limit: Annotated[str, typer.Option(help="bytes of one rank that may be used: 512MiB, 2GB")],
    out: Annotated[Path, typer.Option(help="the directory for reach.md and reach.json")],
    quantum: Annotated[str, typer.Option(help="lengths are multiples of this many tokens")] = "256",
    data: Annotated[
        str, typer.Option(help="text for the real steps; 'python' = ships with Python")
    ] = "python",
    confirm: Annotated[bool, typer.Option(help="run real steps at the longest and the next length")] = True,
    json: Json = None,
) -> None:
    """Find how long a context each plan trains under enforced limits: by dry run, then by real steps."""
    from mopexec.cli.reach import run

    raise typer.Exit(run(plan, device_limit, host_limit, quantum, data, confirm, out, json))


def _run(arguments: list[str], standalone_mode: bool) -> Any:
    """The app; what only `mop[exec]` installs is named where it is missing. Raises MopError then."""
    try:
        return app(arguments, standalone_mode=standalone_mode)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        raise MopError(f"{missing} is not installed, mopexec needs it: pip install 'mop[exec]'") from None


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_app(_run, "mopexec", arguments)
