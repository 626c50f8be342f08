"""`mopsim size`: which cluster, and how many nodes of it."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mopsim.api.size import size
from mopsim.commands.console import human, say_plan, say_written
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import parse_count, parse_tokens
from mopsim.report.sizing import (
    asked_odds,
    format_dollars,
    missed,
    sizing_table,
    stated,
    summary,
    surely,
)
from mopsim.size.assumptions import read_values
from mopsim.spec.strategy import MatmulDType

NONE = 3
"""Exit code where no cluster will do."""


@dataclass(frozen=True)
class SizeOrder:
    """What is to be sized, as typed on the command line."""

    model: str
    tokens: str
    days: float | None
    budget: float | None
    hardware: Sequence[str]
    seq_len: str
    global_batch_tokens: str
    families: str | None
    max_nodes: int
    confidence: float
    prices: Sequence[str]
    reserved: bool
    buy: bool
    capex: Sequence[str]
    years: float | None
    sites: str | None
    assumptions: Sequence[str]
    utilisation: float | None
    pue: float | None
    max_cost: float | None
    simulations: int
    runnable: bool
    routing: str
    precision: MatmulDType
    stack: str | None
    interval: float

    def keywords(self) -> dict[str, Any]:
        """The order as the keywords of mopsim.size. Raises MopError naming the option."""
        batch = parse_count(self.global_batch_tokens, "--global-batch-tokens")
        named = {"pue": self.pue, "years": self.years}
        assumed = read_values(self.assumptions, "--assume")
        for name in (name for name, one in named.items() if one is not None and name in assumed):
            raise MopError(f"--{name}: {named[name]:g} is its second value, --assume {name}= is its first")
        assumed |= {name: one for name, one in named.items() if one is not None}
        found = {
            **asdict(self),
            "seq_len": parse_count(self.seq_len, "--seq-len"),
            "tokens": parse_tokens(self.tokens, "--tokens"),
            "global_batch_tokens": batch,
            "prices": read_values(self.prices, "--price"),
            "capex": read_values(self.capex, "--capex"),
            "assumptions": assumed,
        }
        return {name: value for name, value in found.items() if name not in named}


def run(order: SizeOrder, plan: str | None, json: str | None, out: str | None = None) -> int:
    """Size each machine type, show the answer, write the recommended plan, the JSON and the page.

    Returns the exit code: 0, or NONE where no cluster will do (the JSON says so too).
    """
    check_outputs({"--plan": plan, "--json": json}, {"--out": out})
    console = human(json)
    with progress(console, "sizing", None) as shown:
        found = size(
            jobs=os.cpu_count() or 1,
            progress=lambda done, total, text: shown(done, f"{done} of {total} so far: {text}"),
            **order.keywords(),
        )
    request, chosen = found.request, found.chosen
    console.print(sizing_table(found.sizings, chosen, request, stated(request, found.sizings)))
    within = "" if order.max_cost is None else f" within {format_dollars(order.max_cost)}"
    asked = asked_odds(request)
    kind = f"cheapest {asked}, --confidence" if asked else "fastest"
    console.print(f"Recommended ({kind}): {summary(chosen)}")
    if better := surely(found.surer, chosen, request):
        console.print(f"Surer: {better}")
    console.print(f"Fastest{within}: {summary(found.fastest)}")
    with io.json_beside(json, found.to_json() if json else None):
        pages = found.write(out, shlex.join(["mopsim", *sys.argv[1:]])) if out else []
    say_written(console, json, *map(str, pages))
    if chosen is None:
        none = f"no cluster of at most {order.max_nodes} nodes will do; {missed(found.miss)}"
        unwritten = f"--plan: {plan} not written: " if plan else ""
        print(f"mopsim: {unwritten}{none}", file=sys.stderr)
        return NONE
    if plan and found.best:
        found.best.save_plan(plan)
        say_plan(console, plan, found.best.runnable)
    return 0
