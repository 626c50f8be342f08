"""The tables of `mopsim size`: what a buyer asks of a cluster."""

import math
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_bytes, format_number, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.intervals.errors import known_errors
from mopsim.intervals.spread import SURE
from mopsim.report.tables import between
from mopsim.report.terminal import table
from mopsim.search.result import proof
from mopsim.size.assumptions import DEFAULT
from mopsim.size.figures import DAY, Figures, rated
from mopsim.size.points import Miss, Point, Request, Sizing, pareto
from mopsim.spec.documents import own
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.stacks import variants

CARRIED = "plan carried from another number of nodes or machine"
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


def format_days(days: float) -> str:
    """'123', '12.3' or '0.12'."""
    return f"{days:,.{0 if days >= 100 else 1 if days >= 1 else 2}f}"


def format_energy(joules: float) -> str:
    """'12.3 MWh'."""
    return f"{format_number(joules / 3.6e9)} MWh"


def format_carbon(kilograms: float) -> str:
    """'12.3 t', of CO2 equivalents."""
    return f"{format_number(kilograms / 1e3)} t"


def steps(point: Point) -> str:
    """'1,000 steps of 18.4 s as simulated (the days count 1.06 times that, 19.5 s: the median of measured
    over predicted steps)', the factor where it is more than a hundredth."""
    result, bill = point.step_and_bill
    more = bill.measured_over_predicted
    said = f"{point.num_steps:,.0f} steps of {format_seconds(result.step_time)} as simulated"
    if abs(more - 1) < 0.01:
        return said
    counted = f"{more:.2f} times that, {format_seconds(more * result.step_time)}"
    return f"{said} (the days count {counted}: the median of measured over predicted steps)"


def _details(point: Point, level: float) -> str:
    """What the columns have no room for, in four lines. Free: below the limit of a device, of a rank's share
    of the host.
    level: of the interval of memory."""
    (result, bill), training = point.step_and_bill, point.training
    tokens = training.global_batch * training.seq_len
    return (
        f"{point.hardware.name}: {result.line}\n"
        f"  {training.global_batch:,} sequences ({tokens:,} tokens) a step, {steps(point)}, "
        f"{result.tokens_per_second:,.0f} tokens/s in all, MFU {result.mfu:.1%}\n"
        f"  {_paid(point, bill)}{_failures(bill)}{bill.device_hours:,.0f} device-hours\n"
        f"  fits with probability {format_probability(result.p_fits)}; "
        f"free device memory {_headroom(result.memory_limit, result.peak_memory)} beside a peak of "
        f"{format_bytes(result.peak_memory)} ({100 * level:g} %: "
        f"{between(result.peak_memory_interval(level), format_bytes)}); "
        f"free host memory {_headroom(result.host_limit, result.host_memory)}"
    )


def _paid(point: Point, bill: Figures) -> str:
    """What is paid for beside the nodes that train, and at once."""
    more = bill.billed_nodes - point.num_nodes
    said = f"{more:,} more node{'s' if more > 1 else ''} paid for (spares, whole racks); " if more else ""
    if bill.capex is not None:
        wires = bill.network.price / bill.capex if bill.network else 0.0
        said += f"{format_dollars(bill.capex)} to buy it, {wires:.0%} of that the network; "
    if bill.carbon is not None:
        said += f"{format_energy(bill.energy or 0.0)}, {format_carbon(bill.carbon)} CO2; "
    return said


def unmeasured(result: SimResult) -> str:
    """What the interval of a step rests on where no run of its stack was measured; else empty."""
    stack = result.stack.name
    known = known_errors().of("step_time", stack)
    others = {one.stack for one in known.cells}
    if stack in others | {one.stack for one in result.facts.seen if one.step_time is not None}:
        return ""
    runs = sum(one.runs for one in known.cells)
    apart, near = math.expm1(known.deviations.stack), variants(result.stack, sorted(others))
    kin = f" (only of its variants {', '.join(near)})" if near else ", nor of a variant"
    return (
        f"No measured run of {stack} is known{kin}. The interval of days, the odds of the deadline and "
        f"the median factor rest on {runs:,.0f} runs of {len(others)} other programs. The errors of programs "
        f"differ by {apart:.0%} (standard deviation)."
    )


def published(result: SimResult, hardware: HardwareProfile) -> str:
    """How many of the runs that the interval rests on are of this machine type."""
    known = known_errors().of("step_time", result.stack.name).cells
    here = [one for one in known if one.hardware == hardware.name]
    own, sources = sum(one.runs for one in here), len({one.source for one in here})
    told = f"{own:,.0f} of {sources} source{'s' * (sources != 1)}" if own else "none"
    return f"{told} on {hardware.name}"


def _failures(bill: Figures) -> str:
    good = bill.goodput
    if good is None or good.mtbf > bill.seconds:
        return ""
    return (
        f"a failure every {format_number(good.mtbf / 3600)} h, a checkpoint of "
        f"{format_bytes(good.checkpoint_bytes)} every {format_seconds(good.interval)}"
        f"{'' if good.asynchronous else ', for which training waits ' + format_seconds(good.blocked)}; "
    )


def format_dollars(dollars: float) -> str:
    """'$1.23 M', '$45.6 k' or '$12'."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if dollars >= scale:
            return (
                f"${dollars / scale:,.3g} {unit}"
                if dollars < 1000 * scale
                else f"${dollars / scale:,.0f} {unit}"
            )
    return f"${dollars:,.0f}"


def _headroom(limit: int, used: int) -> str:
    return f"{format_bytes(limit - used)} ({1 - used / limit:.0%})" if limit else "-"


def sizing_table(
    sizings: Sequence[Sizing], recommended: Point | None, request: Request, assumptions: Sequence[str]
) -> Group:
    """One line a machine: its cluster that does, or why there is none; then each strategy, and its MFU, for
    which 80 columns have no room."""
    names = columns(request)[:-1]
    shown = table(title(request), names[:1], names[1:])
    lines: list[Text] = []
    for sizing in sizings:
        if sizing.best is None:
            shown.add_row(sizing.hardware.name, "cannot", *["-"] * (len(names) - 2), style="red")
            lines.append(Text(f"{sizing.hardware.name}: cannot: {sizing.why}", style="red"))
            continue
        chosen = recommended is not None and recommended is sizing.best
        shown.add_row(*row(sizing.best, request)[:-1], style="bold green" if chosen else None)
        lines.append(Text(_details(sizing.best, request.interval)))
    if any(sizing.best for sizing in sizings):
        assumptions = [SIMULATED, *assumptions]
    return Group(shown, *lines, *(Text(line, style="dim") for line in assumptions))


def title(request: Request) -> str:
    """'mixtral_8x7b: 1,000,000 tokens within 60 days, sequences of 4,096, products in bfloat16'."""
    goal = request.goal
    limits = [] if goal.seconds is None else [f"{goal.seconds / DAY:g} days"]
    limits += [] if goal.budget is None else [format_dollars(goal.budget)]
    document = own(request.documents, request.seq_len)
    apart = f" in documents of {document:,}" if document else ""
    return (
        f"{request.model.name}: {goal.tokens:,} tokens within {' and '.join(limits)}, "
        f"sequences of {request.seq_len:,}{apart}, products in {request.precision}"
    )


def summary(point: Point | None) -> str:
    """'16 nodes (128 devices) of h200-sxm-141g: 27.2 days, $120 k' or 'none'."""
    if point is None or point.figures is None:
        return "none"
    bill = point.figures
    cost = "price unknown" if bill.cost is None else format_dollars(bill.cost)
    cluster = point.hardware.cluster(point.num_nodes)
    where = f" in {bill.site}" if bill.site != DEFAULT else ""
    return f"{cluster}{where}: {format_days(bill.days)} days, {cost} ({searched(point)})"


def searched(point: Point) -> str:
    """How far the search of a cluster that fits went: it is of plans on its own number of nodes."""
    if point.gap is None:
        return f"{CARRIED}: a plan left out may be faster"
    return f"on this number of nodes {proof(point.gap, found=True)}"


def asked_odds(request: Request) -> str:
    """'in time with probability 50% or more if it fits'; empty where no deadline was asked for."""
    if request.goal.seconds is None:
        return ""
    return f"in time with probability {request.confidence:.0%} or more if it fits"


def surely(one: Point | None, chosen: Point | None, request: Request) -> str:
    """'3 nodes (24 devices) of b200-sxm-192g, in time with probability >99% instead of 63% if the plan fits,
    for 5.0% more cost: 19.7 days, $57 k'. one: `mopsim.size.points.surer` of the chosen; empty where there is
    none."""
    mine, theirs = (point.figures if point else None for point in (chosen, one))
    if one is None or mine is None or theirs is None or mine.cost is None or theirs.cost is None:
        return ""
    likely, less = (odds(bill.p_within(request.goal.seconds)) for bill in (theirs, mine))
    return (
        f"{one.hardware.cluster(one.num_nodes)}, in time with probability {likely} instead of {less} if the "
        f"plan fits, for {theirs.cost / mine.cost - 1:.1%} more cost: {format_days(theirs.days)} days, "
        f"{format_dollars(theirs.cost)}"
    )


def chances(point: Point, request: Request) -> str:
    """'in time with probability 62% if it fits (50% asked), within the budget with probability 53% if it
    fits; it fits with probability 0.76 (0.97 if megatron-core keeps the tensors that its description
    says)': the odds of a cluster that fits."""
    result, bill = point.step_and_bill
    certain, paid = bill.p_within(request.goal.seconds), bill.p_budget(request.goal.budget)
    limits = []
    if certain is not None:
        limits.append(f"in time with probability {odds(certain)} if it fits ({request.confidence:.0%} asked)")
    if paid is not None:
        limits.append(f"within the budget with probability {odds(paid)} if it fits")
    kept = f"{', '.join(limits)}; it " if limits else ""
    fits, described = map(format_probability, (result.p_fits, result.p_as_described))
    also = f" ({described} if {result.stack.name} keeps the tensors that its description says)"
    return f"{kept}fits with probability {fits}{also if described != fits else ''}"


def fits_surely(one: Point | None, chosen: Point | None) -> str:
    """'3 nodes (24 devices) of h200-sxm-141g, whose plan fits with probability 0.95 instead of 0.76 (0.9 is
    aimed at), at 1.29 times the cost: 33.1 days, $67 k'; of the chosen number of nodes which plan too. one:
    `mopsim.size.points.surer_to_fit`; empty where there is none."""
    if one is None or chosen is None:
        return ""
    (result, theirs), (tight, mine) = one.step_and_bill, chosen.step_and_bill
    times = f", at {theirs.cost / mine.cost:.2f} times the cost" if theirs.cost and mine.cost else ""
    cost = f", {format_dollars(theirs.cost)}" if theirs.cost else ""
    same = (one.hardware.name, one.num_nodes) == (chosen.hardware.name, chosen.num_nodes)
    plan = f" (plan: {result.line} on {result.stack.name})" if same else ""
    which, what = ("the same ", "surer plan") if same else ("", "plan")
    odds, less = map(format_probability, (result.p_fits, tight.p_fits))
    return (
        f"{which}{one.hardware.cluster(one.num_nodes)}, whose {what} fits with probability {odds} instead of "
        f"{less} ({SURE:g} is aimed at){times}: {format_days(theirs.days)} days{cost}{plan}"
    )


def break_even(sizings: Sequence[Sizing], chosen: Point | None) -> str:
    """'12 nodes (96 devices) of b200-sxm-192g for 1.7 days cost as much as 3 nodes (24 devices) of
    h200-sxm-141g for 9.8 days at 3.52 USD/h (billed at 3.5)': of what the other machine types are rented for,
    those too that are beyond the budget; empty where nothing is."""
    mine = chosen.figures if chosen else None
    if mine is None or mine.cost is None or chosen is None:
        return ""
    others = [one for one in sizings if one.hardware.name != chosen.hardware.name]
    found = [
        f"{_for_days(one)} at {price:.3g} USD/h (billed at {bill.price_for(bill.cost):g})"
        for one in (sizing.rival for sizing in others)
        if one and (bill := one.figures) and bill.cost and (price := bill.price_for(mine.cost))
    ]
    verb = "costs" if chosen.num_nodes == 1 else "cost"
    return f"{_for_days(chosen)} {verb} as much as {', or '.join(found)}" if found else ""


def _for_days(point: Point) -> str:
    """'3 nodes (24 devices) of h200-sxm-141g for 9.8 days'."""
    _, bill = point.step_and_bill
    return f"{point.hardware.cluster(point.num_nodes)} for {format_days(bill.days)} days"


def missed(miss: Miss | None, flag: str = "--max-nodes") -> str:
    """The nearest miss, and the smallest change that would meet the limits. flag: of more nodes."""
    if miss is None:
        return "no number of nodes that was tried has a plan"
    point, changes = miss.point, []
    if miss.days is not None:
        changes.append(f"--days {math.ceil(miss.days * 100) / 100:g}")
    if miss.dollars is not None:
        changes.append(f"--budget {math.ceil(miss.dollars)}")
    elif not point.affordable:
        changes.append("a price (--price, --capex)")
    would = f"it would meet the limits with {' and '.join(changes)}"
    return f"nearest: {summary(point)}; {would}{_more_nodes(miss, flag)}"


def _more_nodes(miss: Miss, flag: str) -> str:
    """Whether more nodes would do where the nearest is late, and how many."""
    if miss.thin is not None:
        return (
            "; more nodes also need a larger batch (--global-batch-tokens): with as many nodes as would be "
            f"in time, if each added as much, a device has {miss.thin:,.0f} tokens a step"
        )
    if miss.nodes is not None:
        return f", or about {miss.nodes:,} nodes ({flag})"
    return f", or with more nodes ({flag})" if miss.days is not None and miss.point.affordable else ""


def stated(request: Request, sizings: Sequence[Sizing]) -> list[str]:
    """What the figures rest on: lines for the assumptions, one a machine for price and power as billed."""
    a = request.assumptions
    trains = "goodput from failures, checkpoints and stragglers (--assume, --utilisation)"
    if a.utilisation is not None:
        trains = f"{a.utilisation:.0%} of the wall clock trains (--utilisation)"
    front = pareto([point for one in sizings for point in one.tried])
    brought = sum(point.gap is None for point in front)
    lines = [
        f"Assumed: {trains}; about {request.batch_tokens:,} tokens a step (--global-batch-tokens).",
        f"Searched: {', '.join(request.families)}, at most {request.simulations} "
        f"simulation{'s' * (request.simulations > 1)} of each at a node count that is searched "
        f"({sum(one.simulated for one in sizings):,} in all). Other counts have a "
        f"{CARRIED}: {brought} of {len(front)} on the Pareto front. More simulations may find "
        "a cheaper cluster (--simulations).",
    ]
    for sizing in sizings:
        here, bill = request.at(sizing.bill), sizing.bill
        watts = bill.network.power if sizing.best and bill and bill.network else 0.0
        also = f", and {watts / 1e3:g} kW of the whole cluster's switches" if watts else ""
        where = f" in {here.sites[0].name}" if here.sites[0].name != DEFAULT else ""
        lines.append(
            f"{sizing.hardware.name}{where}: {_price(here, sizing.hardware)}; power "
            f"{_power(here, sizing.hardware)}{also}; {_electricity(here)}"
        )
    plans = [one.best.result for one in sizings if one.best and one.best.result]
    return [*lines, *dict.fromkeys(filter(None, map(unmeasured, plans)))]


def _electricity(request: Request) -> str:
    """What the energy, its CO2 and, of a purchase, its cost count."""
    a = request.assumptions
    bought = f", {a.power_price:g} USD/kWh, {a.space_price:g} USD/kW/month of space"
    return (
        f"{a.draw_share:.0%} of rated power drawn, PUE {a.pue:g}, {a.carbon:g} g CO2/kWh"
        f"{bought if request.terms.buy else ''} (--assume, --sites)"
    )


def _price(request: Request, hardware: HardwareProfile) -> str:
    """What is paid for a device or a node, and who says so."""
    terms = request.terms
    if terms.buy and hardware.name in terms.capex:
        one = terms.capex[hardware.name]
        return f"{format_dollars(one.value)} a node ({one.tag}, {one.dated}: {one.source})"
    price = terms.price(hardware, request.sites[0], request.assumptions)
    return f"price {price.dollars:g} USD/h ({price.source})" if price else "price -"


def _power(request: Request, hardware: HardwareProfile) -> str:
    """What the energy counts (mopsim.size.figures.rated)."""
    device, node = hardware.device.power, f"of a node of {hardware.devices_per_node} devices"
    if hardware.node_power is not None:
        return f"{node} {_quantity(hardware.node_power)}"
    watts, a = rated(hardware, request.assumptions), request.assumptions
    if device is None or watts is None:
        return "-"
    times = f"{a.node_over_devices:g} times its devices'"
    return f"{node} {watts / 1e3:.3g} kW (assumed: {times}; {_quantity(device)})"


def _quantity(quantity: Quantity) -> str:
    return f"{quantity.text} ({quantity.tag}: {' '.join(quantity.source.split())})"
