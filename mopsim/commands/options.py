"""Options that several commands share, and the job that they describe."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from mopsim.common.errors import MopError, shown
from mopsim.common.units import parse_count
from mopsim.spec.categories import FAMILIES
from mopsim.spec.figures import FIGURES

MOST_SIMULATIONS = 10**6


def _simulations(text: str) -> int:
    """`--budget` of a search. Raises MopError, which names the other meaning that the option has."""
    typed = str(text)
    if not re.fullmatch("0*[1-9][0-9]{0,6}", typed, re.ASCII) or int(typed) > MOST_SIMULATIONS:
        rule = f"is not a number of simulations, 1 to {MOST_SIMULATIONS:,} (dollars are --budget of size)"
        raise MopError(f"--budget: {shown(typed)} {rule}")
    return int(typed)


def budget_of(each: str) -> Any:
    """The option `--budget` of a command that searches. each: of what it is the number."""
    said = f"simulations {each} (not dollars, as in size)"
    return typer.Option("--budget", parser=_simulations, metavar="<int>", help=said)


Model = Annotated[str, typer.Option(help="preset, YAML file or Hugging Face config.json")]
Hardware = Annotated[str, typer.Option(help="hardware profile: a name or a YAML file")]
Nodes = Annotated[int, typer.Option(min=1, max=65536, help="number of nodes")]
SeqLen = Annotated[str, typer.Option(help="tokens per sequence: 4096, 128K, 1M")]
GlobalBatch = Annotated[int, typer.Option(min=1, help="sequences per optimizer step")]
OneStrategy = Annotated[
    str, typer.Option(help=f"a strategy or plan YAML, or a family: {', '.join(FAMILIES)}")
]
Family = Annotated[
    str | None,
    typer.Option("--family", help=f"families to search, comma-separated; default: {','.join(FAMILIES)}"),
]
Routing = Annotated[
    str,
    typer.Option(
        help="balanced; forced: balanced as the program's benchmarks force it; r/h: r % of the tokens choose "
        "among h hot experts; zipf:s; or a YAML file that lists the experts' shares of all routes"
    ),
]
DocumentTokens = Annotated[
    str | None,
    typer.Option(
        help="length of packed documents that attention does not cross: the mean length of a token's "
        "document, or MEAN/SPREAD of log-normal lengths (485/1); 0: attention crosses documents"
    ),
]
Products = Literal["bfloat16", "float32", "float64", "fp8", "mxfp8", "nvfp4"]
Precision = Annotated[
    Products,
    typer.Option(help="precision of matrix products (for a family); fp8, mxfp8, nvfp4 run beside bfloat16"),
]
FamilyPrecision = Annotated[
    Products | None,
    typer.Option(
        "--precision",
        help="precision of matrix products (for a family; default: bfloat16); fp8, mxfp8, nvfp4 run beside "
        "bfloat16",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="recorded in the plan; the simulation draws no random numbers")
]
MaybeSeed = Annotated[
    int | None,
    typer.Option(min=0, help="recorded in the plan (default: the given plan's, else 0)"),
]
StackName = Annotated[
    str | None,
    typer.Option("--stack", help="software: a stack's name or YAML file (default: each strategy's own)"),
]
Json = Annotated[str | None, typer.Option(help="write the result as JSON here (- for standard output)")]
PlanOut = Annotated[str | None, typer.Option(help="write the plan (YAML) here, ready for mopexec train")]
Trace = Annotated[str | None, typer.Option(help="write a Chrome/Perfetto trace (JSON) here")]
Runnable = Annotated[bool, typer.Option("--runnable", help="only plans that mopexec runs today")]
AnyPlan = Annotated[
    bool, typer.Option("--any", hidden=True, help="of old commands: what it asked for is the default now")
]
Budget = Annotated[
    str | None,
    typer.Option(help="dollars (--buy: of the purchase): 250000, 10M, 1.5B; simulations are --simulations"),
]
MaxCost = Annotated[
    str | None, typer.Option(help="dollars that the fastest cluster may cost: 250000, 10M, 1.5B")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="formats of the figures: png, svg, pdf, comma-separated; PNGs are always written, for the page",
    ),
]
Jobs = Annotated[int, typer.Option(min=0, max=1024, help="processes; 0: one for each core, at most 4")]
Interval = Annotated[float, typer.Option(help="probability of the intervals of time and memory")]
FIGURE = {one.name: typer.Option(help=f"{one.meaning}, {one.unit}") for one in FIGURES}
Seal = Annotated[
    str | None,
    typer.Option(
        help="write the prediction with its inputs here, hashed, for validate --sealed after the run"
    ),
]
OutDirectory = Annotated[str, typer.Option(help="directory of the report")]
MaybeDirectory = Annotated[
    str | None, typer.Option("--out", help="directory of the report, if one is written")
]


def keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """A job as typed, as keywords of the API. Raises MopError naming the option."""
    job = {name: one for name, one in given.items() if name != "any_plan"}
    return job | {"seq_len": parse_count(job["seq_len"], "--seq-len")}
