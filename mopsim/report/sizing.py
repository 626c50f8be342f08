"""The tables of `mopsim size`: what a buyer asks of a cluster."""

import math

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_days, format_dollars, format_number, format_span
from mopsim.engine import SimResult
from mopsim.intervals.errors import known_errors
from mopsim.intervals.spread import SURE
from mopsim.report.terminal import table
from mopsim.report.words import Words
from mopsim.search.result import TIE, format_gap, proof
from mopsim.size.assumptions import DEFAULT
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY, rated
from mopsim.size.points import Point, Request
from mopsim.spec.documents import own
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stacks import variants

ADAPTED = "plan adapted from another number of nodes or machine"
"""Of a point whose own number of nodes was not searched, or brought nothing faster."""
SIMULATED = (
    "MFU and tokens/s are as simulated. Days and cost count a longer or shorter step: the simulated one "
    "times the median of measured over predicted step times of published runs."
)


def columns(request: Request) -> tuple[str, ...]:
    """Heads of `row`. spare: nodes that are paid for beside those that train. days: wall clock, expected;
    then between which it ends with the probability that is asked for; in time: probability of the deadline,
    if the plan fits. goodput: share of the wall clock that trains. MFU: as simulated."""
    within = f"{100 * request.interval:g} %"
    return ("machine", "nodes", "spare", "devices", "days", within, "in time", "cost", "goodput", "MFU")


def row(point: Point, request: Request) -> list[str]:
    """The cells of `columns` for a point that fits; '-' where the profile does not say."""
    result, bill = point.step_and_bill
    low, high = (one / DAY for one in bill.seconds_interval(request.interval))
    certain = bill.p_within(request.goal.seconds)
    return [
        point.hardware.name,
        f"{point.num_nodes:,}",
        f"{bill.billed_nodes - point.num_nodes:,}",
        f"{point.num_devices:,}",
        format_days(bill.days),
        f"{format_days(low)}-{format_days(high)}",
        odds(certain),
        "-" if bill.cost is None else format_dollars(bill.cost),
        f"{bill.goodput.share:.1%}" if bill.goodput else "-",
        f"{result.mfu:.1%}",
    ]


def odds(probability: float | None) -> str:
    """'72%', '>99%', '<1%' or '-'."""
    if probability is None:
        return "-"
    return ">99%" if probability > 0.99 else "<1%" if probability < 0.01 else f"{probability:.0%}"


def format_energy(joules: float) -> str:
    """'12.3 MWh'."""
    return f"{format_number(joules / 3.6e9)} MWh"


def format_carbon(kilograms: float) -> str:
    """'12.3 t', of CO2 equivalents."""
    return f"{format_number(kilograms / 1e3)} t"


def price_is(point: Point | None, request: Request) -> str:
    """' at an assumed price' of a cluster whose device or node has one; else empty."""
    if point is None or point.figures is None or point.figures.cost is None:
        return ""
    here, name = request.at(point.figures), point.hardware.name
    node = here.terms.capex.get(name) if here.terms.buy else None
    price = None if here.terms.buy else here.terms.price(point.hardware, here.sites[0], here.assumptions)
    tags = (node.tag if node else "", price.tag if price else "")
    return " at an assumed price" if "assumed" in tags else ""


def preferable(d: Decided) -> dict[str, str]:
    """What a buyer may prefer to the chosen cluster: a name -> what is said of it; of a near tie in its line
    alone."""
    request, chosen, near, surer, fitter = d.request, d.chosen, d.near, d.surer, d.fitter
    left = [one for one in d.undecided if one.point is not near]
    open_to = next((one for one in d.undecided if one.point is near), None)
    found = {
        "A tie": tie(d.ties, chosen, request),
        "A near tie": SAID.near_tie(near, chosen, request, open_to),
        "Undecided": open_rivals(left, request),
        "More likely to be in time": "" if surer is near else surely(surer, chosen, request),
        "More likely to fit": "" if fitter is near else fits_surely(fitter, chosen),
        "Break-even": break_even(d.sizings, chosen),
    }
    return {name: said for name, said in found.items() if said}


def _details(point: Point, level: float) -> str:
    """What the columns have no room for, in four lines. level: of the interval of memory."""
    said = (SAID.batch(point), SAID.paid(point), SAID.room(point, level))
    return "\n  ".join((f"{point.hardware.name}: {point.step_and_bill[0].line}", *said))


def unmeasured(result: SimResult) -> str:
    """What the interval of a step rests on where no run of its stack was measured; else empty."""
    stack = result.stack.name
    known = known_errors().of("step_time", stack)
    others = {one.stack for one in known.cells}
    if stack in others | {one.stack for one in result.facts.seen if one.step_time is not None}:
        return ""
    runs, near = sum(one.runs for one in known.cells), variants(result.stack, sorted(others))
    return SAID.unmeasured(stack, runs, len(others), near)


def published(result: SimResult, hardware: HardwareProfile) -> str:
    """How many of the runs that the interval rests on are of this machine type."""
    known = known_errors().of("step_time", result.stack.name).cells
    here = [one for one in known if one.hardware == hardware.name]
    own, sources = sum(one.runs for one in here), len({one.source for one in here})
    told = f"{own:,.0f} of {sources} source{'s' * (sources != 1)}" if own else "none"
    return f"{told} on {hardware.name}"


def sizing_table(d: Decided) -> Group:
    """One line a machine: its cluster that does, or why there is none; then each strategy, and its MFU, for
    which 80 columns have no room; then what it rests on."""
    request, names = d.request, columns(d.request)[:-1]
    shown = table("", names[:1], names[1:])
    lines: list[Text] = []
    for sizing in d.sizings:
        if sizing.best is None:
            shown.add_row(sizing.hardware.name, "cannot", *["-"] * (len(names) - 2), style="red")
            lines.append(Text(f"{sizing.hardware.name}: cannot: {sizing.why}", style="red"))
            continue
        chosen = d.chosen is sizing.best
        shown.add_row(*row(sizing.best, request)[:-1], style="bold green" if chosen else None)
        lines.append(Text(_details(sizing.best, request.interval)))
    rests_on = [SIMULATED] * any(sizing.best for sizing in d.sizings) + stated(d)
    return Group(shown, *lines, *(Text(line, style="dim") for line in rests_on))


def stated(d: Decided) -> list[str]:
    """What the figures rest on: lines for the assumptions, one a machine for price and power as billed."""
    request, sizings, front = d.request, d.sizings, d.front
    brought = sum(point.gap is None for point in front)
    simulated = sum(one.simulated for one in sizings)
    plans = [one.best.result for one in sizings if one.best and one.best.result]
    return [
        SAID.assumed(request),
        SAID.looked(request, simulated, brought, len(front)),
        *(SAID.billed(one, request.at(one.bill)) for one in sizings),
        *dict.fromkeys(filter(None, map(unmeasured, plans))),
    ]


SAID = Words(
    "sizing.j2", day=DAY, default=DEFAULT, adapted=ADAPTED, sure=SURE, own=own, proof=proof, rated=rated,
    chance=odds, days=format_span, dollars=format_dollars, energy=format_energy, carbon=format_carbon,
    up=math.ceil, tied=format_gap(TIE),
)  # fmt: skip
title, summary, with_plan, searched, steps, missed = (
    SAID.title,
    SAID.summary,
    SAID.with_plan,
    SAID.searched,
    SAID.steps,
    SAID.missed,
)
asked_odds, chances, surely = SAID.asked_odds, SAID.chances, SAID.surely
fits_surely, break_even, tie, open_rivals = SAID.fits_surely, SAID.break_even, SAID.tie, SAID.open_rivals
"""What templates/sizing.j2 says."""
