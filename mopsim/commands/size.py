"""`mopsim size`: which cluster, and how many nodes of it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mopsim.api.size import size
from mopsim.commands.console import human
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import parse_count, parse_tokens
from mopsim.report.sizing import format_dollars, sizing_table, stated, summary
from mopsim.spec.strategy import MatmulDType


@dataclass(frozen=True)
class Order:
    """What is to be sized, as typed on the command line."""

    model: str
    tokens: str
    days: float
    hardware: Sequence[str]
    seq_len: str
    global_batch_tokens: str
    families: str
    max_nodes: int
    utilisation: float
    pue: float
    max_cost: float | None
    budget: int
    runnable: bool
    routing: str
    precision: MatmulDType
    stack: str | None

    def keywords(self) -> dict[str, Any]:
        """The order as the keywords of mopsim.size. Raises MopError naming the option."""
        batch = parse_count(self.global_batch_tokens, "--global-batch-tokens")
        return {
            **asdict(self),
            "seq_len": parse_count(self.seq_len, "--seq-len"),
            "tokens": parse_tokens(self.tokens, "--tokens"),
            "global_batch_tokens": batch,
        }


def run(order: Order, plan: str | None, json: str | None) -> int:
    """Size each machine type, show the answer, write the recommended plan and the JSON.

    Returns the exit code: 0, or 1 where no cluster will do (the JSON says so too). Raises MopError where a
    plan was asked for then.
    """
    check_outputs({"--plan": plan, "--json": json})
    console = human(json)
    with progress(console, "sizing", None) as shown:
        found = size(jobs=os.cpu_count() or 1, progress=lambda text: shown(0, text), **order.keywords())
    request = found.request
    title = (
        f"{request.model.name}: {request.goal.tokens:,} tokens within {order.days:g} days, "
        f"sequences of {request.seq_len:,}"
    )
    console.print(sizing_table(found.sizings, found.cheapest, title, stated(request, found.sizings)))
    within = "" if order.max_cost is None else f" within {format_dollars(order.max_cost)}"
    console.print(
        f"Recommended (cheapest): {summary(found.cheapest)}\nFastest{within}: {summary(found.fastest)}"
    )
    if json:
        io.write_json(json, found.to_json())
    if found.best is None:
        none = f"no cluster of at most {order.max_nodes} nodes will do"
        if plan:
            raise MopError(f"--plan: {plan} not written: {none}")
        print(f"mopsim: {none}", file=sys.stderr)
        return 1
    if plan:
        found.best.save_plan(plan)
    return 0
