"""`mopsim size`: which cluster, and how many nodes of it."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mopsim.api.inputs import busy, read_hardware, unread
from mopsim.api.size import Clusters, size
from mopsim.commands.console import human, say_notes, say_plan, say_written
from mopsim.commands.progress import progress, writing
from mopsim.common import io
from mopsim.common.command_line import NOTHING_FITS, as_typed
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import format_dollars, parse_count, parse_tokens
from mopsim.report import sizing
from mopsim.size.assumptions import check, read_values


def keywords(
    *, seq_len: str, tokens: str, global_batch_tokens: str, prices: Sequence[str] | None,
    capex: Sequence[str] | None, assumptions: Sequence[str] | None, pue: float | None, years: float | None,
    **same: Any,
) -> dict[str, Any]:  # fmt: skip
    """What was typed, as the keywords of mopsim.size. Raises MopError naming the option."""
    batch = parse_count(global_batch_tokens, "--global-batch-tokens")
    assumed = read_values(assumptions or (), "--assume")
    for name, one in (("pue", pue), ("years", years)):
        if one is not None and name in assumed:
            raise MopError(f"--{name}: {one:g} is its second value, --assume {name}= is its first")
        if one is not None:
            check(name, one, f"--{name}")
            assumed[name] = one
    machines = [read_hardware(one).name for one in same["hardware"]]
    return {
        **same,
        "seq_len": parse_count(seq_len, "--seq-len"),
        "tokens": parse_tokens(tokens, "--tokens"),
        "global_batch_tokens": batch,
        "prices": read_values(prices or (), "--price", machines),
        "capex": read_values(capex or (), "--capex", machines),
        "assumptions": assumed,
    }


def _answer(found: Clusters) -> Iterator[str]:
    """What is recommended, and the clusters that a buyer may prefer to it."""
    request, chosen = found.request, found.chosen
    asked = sizing.asked_odds(request)
    least = "cheapest" if found.cheapest or not chosen else "no price is known: fewest devices"
    kind = f"{least} {asked}, --confidence" if asked else "fastest"
    yield f"Recommended ({kind}): {sizing.summary(chosen, sizing.price_is(chosen, request))}"
    if chosen:
        yield f"Odds: {sizing.chances(chosen, request)}"
    yield from (f"{what}: {said}" for what, said in sizing.preferable(found).items())
    within = "" if request.max_cost is None else f" within {format_dollars(request.max_cost)}"
    of = "" if request.goal.seconds is None else " of the counts that were asked"
    yield f"Fastest{within}{of}: {sizing.with_plan(found.fastest)}"


def run(*, plan: str | None, json: str | None, out: str | None, **order: Any) -> int:
    """Size each machine type, show the answer, write the recommended plan, the JSON and the page.

    Returns the exit code: 0, or 3 where no cluster will do (the JSON says so too).
    """
    check_outputs({"--plan": plan, "--json": json}, {"--out": out})
    console = human(json)
    with progress(console, "sizing", None) as shown:
        found = size(
            jobs=os.cpu_count() or 1,
            progress=lambda done, total, text: shown(done, f"{done} of at least {total}: {text}"),
            **keywords(**order),
        )
    request, chosen = found.request, found.chosen
    console.print(sizing.title(request), style="italic")
    for line in _answer(found):
        console.print(line)
    console.print()
    console.print(sizing.sizing_table(found))
    probed = [note for one in found.sizings for note in busy(one.hardware)]
    say_notes(console, [*unread(request.model), *probed])
    with io.json_beside(json, found.to_json() if json else None), writing(console, out):
        pages = found.write(out, as_typed("mopsim")) if out else []
    say_written(console, json, *map(str, pages))
    if chosen is None:
        miss = sizing.missed(found.miss, request.flag)
        none = f"no cluster of at most {request.limit} meets the limits; {miss}"
        unwritten = f"--plan: {plan} not written: " if plan else ""
        print(f"mopsim: {unwritten}{none}", file=sys.stderr)
        return NOTHING_FITS
    if plan and found.best:
        found.best.save_plan(plan)
        say_plan(console, plan, found.best)
    return 0
