"""decision.html: what to sign, on one page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mopsim.common.io import write_text
from mopsim.common.units import format_bytes, format_number, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.engine.result import UPPER
from mopsim.intervals.spread import machines_share, products
from mopsim.report import sizing
from mopsim.report.page import Table, templates
from mopsim.report.sizing_plots import cost_time, tornado
from mopsim.size.assumptions import DEFAULT, NAMES, known
from mopsim.size.figures import DAY, Figures
from mopsim.size.points import Miss, Point, Request, Sizing
from mopsim.size.settle import Settled
from mopsim.size.whatif import Swing
from mopsim.spec.hardware import HardwareProfile

TOLD = 5e-4
"""Half-width of the interval of days that a measurement must take away to be told."""


@dataclass(frozen=True)
class Decision:
    """What the page says. subject: the cluster recommended, or the nearest miss. swings, settled: of it.
    surer: a cluster that is little dearer than the chosen one and far surer to be in time, if any; fitter:
    one that is surer to fit."""

    request: Request
    sizings: Sequence[Sizing]
    points: Sequence[Point]
    front: Sequence[Point]
    chosen: Point | None
    miss: Miss | None
    swings: Sequence[Swing]
    settled: Sequence[Settled]
    facts: Mapping[str, str] = field(default_factory=dict)
    surer: Point | None = None
    fitter: Point | None = None

    @property
    def subject(self) -> Point | None:
        return self.chosen or (self.miss.point if self.miss else None)


def write_decision(folder: Path, decision: Decision) -> None:
    """Write decision.html and its figures (PNG and SVG) into `folder`."""
    subject, goal, level = decision.subject, decision.request.goal, decision.request.interval
    for kind in ("png", "svg"):
        if decision.points:
            path = folder / f"pareto.{kind}"
            cost_time(path, decision.points, decision.front, decision.chosen, goal, level)
        if subject and decision.swings:
            tornado(folder / f"tornado.{kind}", decision.swings, subject)
    drawn = {"pareto": "", "tornado": ""}
    for path in folder.glob("*.svg"):
        text = path.read_text("utf-8")
        drawn[path.stem] = text[text.index("<svg") :]
    template = templates(escape=True).get_template("decision.html.j2")
    write_text(folder / "decision.html", template.render(**content(decision), **drawn))


def content(d: Decision) -> dict[str, object]:
    """What the template shows, but for its figures."""
    subject = d.subject
    bill = subject.figures if subject else None
    return {
        "title": "Which cluster to sign for" if d.chosen else "No cluster will do",
        "question": sizing.title(d.request),
        "found": d.chosen is not None,
        "answer": answer(d),
        "cards": _cards(d, subject, bill) if subject and bill else [],
        "why": why(d),
        "rivals": _rivals(d),
        "carried": sizing.CARRIED,
        "parts": _parts(bill),
        "network": _network(bill),
        "sites": _sites(subject),
        "risks": risks(d),
        "measures": _measures(d.settled),
        "level": f"{100 * d.request.interval:g} %",
        "now": f"{d.settled[0].before:.1%}" if d.settled else "",
        "machine": f"{machines_share(subject.result.facts):.0%}" if subject and subject.result else "",
        "assumptions": _assumptions(d.request.at(bill)),
        "facts": d.facts,
    }


def answer(d: Decision) -> str:
    """The recommendation in a sentence; where there is none, the nearest miss."""
    if d.chosen is None or d.chosen.figures is None:
        return f"Nothing that was tried will do. {sizing.missed(d.miss).capitalize()}."
    point, bill, terms = d.chosen, d.chosen.figures, d.request.terms
    verb = "Buy" if terms.buy else "Reserve" if terms.reserved else "Rent"
    level = d.request.interval
    low, high = (one / DAY for one in bill.seconds_interval(level))
    where = "" if bill.site == DEFAULT else f" in {bill.site}"
    paid = point.hardware.cluster(bill.billed_nodes)
    use = f" and train on {point.num_nodes:,} of them" if bill.billed_nodes > point.num_nodes else ""
    text = (
        f"{verb} {paid}{where}{use}: {sizing.format_days(bill.days)} days "
        f"({sizing.format_days(low)} to {sizing.format_days(high)} with {100 * level:g} %)"
    )
    if bill.cost is not None:
        text += f", {sizing.format_dollars(bill.cost)}{' of its life' if terms.buy else ''}"
    text += f"; {sizing.chances(point, d.request)}."
    for said, better in (
        ("More likely to be in time", sizing.surely(d.surer, point, d.request)),
        ("More likely to fit", sizing.fits_surely(d.fitter, point)),
    ):
        text += f" {said}: {better}." if better else ""
    if prices := sizing.break_even(d.sizings, point):
        text += f" Break-even: {prices}."
    return text


def _cards(d: Decision, point: Point, bill: Figures) -> list[dict[str, str]]:
    level = d.request.interval
    low, high = (one / DAY for one in bill.seconds_interval(level))
    result, good, costs = point.result, bill.goodput, bill.cost_interval(level)
    goal = d.request.goal
    certain, paid = bill.p_within(goal.seconds), bill.p_budget(goal.budget)
    cards = [
        (f"days, {100 * level:g} %", f"{sizing.format_days(low)} to {sizing.format_days(high)}"),
        ("probability of the deadline, if the plan fits", None if certain is None else sizing.odds(certain)),
        ("probability of the budget, if the plan fits", None if paid is None else sizing.odds(paid)),
        (f"cost, {100 * level:g} %", " to ".join(map(sizing.format_dollars, costs)) if costs else None),
        ("to buy it", None if bill.capex is None else sizing.format_dollars(bill.capex)),
        ("of the wall clock trains", f"{good.share:.1%}" if good else None),
        ("model FLOP utilisation, as simulated", f"{result.mfu:.1%}" if result else None),
        ("probability that the plan fits", format_probability(result.p_fits) if result else None),
        ("energy", None if bill.energy is None else sizing.format_energy(bill.energy)),
        ("CO2", None if bill.carbon is None else sizing.format_carbon(bill.carbon)),
    ]
    return [{"name": name, "value": value} for name, value in cards if value]


def why(d: Decision) -> list[str]:
    """What makes the cluster the answer: its plan, what bounds the step, how far the others are."""
    subject = d.subject
    if subject is None or subject.result is None or subject.figures is None:
        return [f"{one.hardware.name}: {one.why}" for one in d.sizings]
    result, training = subject.result, subject.training
    waits = sorted(result.waits.items(), key=lambda item: -item[1])
    heaviest = [
        f"{name.replace('_', ' ')} {seconds / result.step_time:.0%}"
        for name, seconds in waits[:3]
        if seconds > 0.005 * result.step_time
    ]
    lines = [
        f"Plan: {result.line} on {result.stack.name}; {training.global_batch:,} sequences a "
        f"step, {sizing.steps(subject)}, products in {products(result.strategy.precision)}.",
        f"A node, as its profile has it: {_node(subject.hardware)}.",
        f"Of a step compute waits for {', '.join(heaviest) or 'next to nothing'}; device memory is filled to "
        f"{result.peak_memory / result.memory_limit:.0%}.",
    ]
    for one in d.sizings:
        other = one.best
        if other is None:
            lines.append(f"{one.hardware.name} cannot: {one.why}.")
        elif other is not subject and other.figures:
            lines.append(_against(other, subject))
    return lines


def _node(hardware: HardwareProfile) -> str:
    """'8 devices of 141 GiB and 400 Gbit/s of network a device'."""
    network = hardware.scale_out
    spine = f", {network.oversubscription:g} to 1 oversubscribed" if network.oversubscription != 1 else ""
    return (
        f"{hardware.devices_per_node} devices of {format_bytes(hardware.device.memory.si)} and "
        f"{network.peak.si * 8 / 1e9:,.0f} Gbit/s of network a device{spine}"
    )


def _against(other: Point, chosen: Point) -> str:
    """'h200-sxm-141g: 200 nodes take 58 days, 1.24 times the cost'."""
    mine, theirs = (point.step_and_bill[1] for point in (chosen, other))
    text = f"{other.hardware.cluster(other.num_nodes)}: {sizing.format_days(theirs.days)} days"
    if mine.cost and theirs.cost:
        text += f", {theirs.cost / mine.cost:.2f} times the cost"
    return text + "."


def _rivals(d: Decision) -> Table:
    """The best of each machine, the front, and the next sizes of the one chosen."""
    subject = d.subject
    near = [one for one in d.points if subject and one.hardware.name == subject.hardware.name]
    near = sorted(near, key=lambda one: abs(one.num_nodes - (subject.num_nodes if subject else 0)))[:4]
    best = [one.best for one in d.sizings if one.best]
    shown = {(one.hardware.name, one.num_nodes): one for one in (*best, *d.front, *near) if one.figures}
    rows = [_rival(shown[key], d.request) for key in sorted(shown)]
    heads = [*sizing.columns(d.request)[:-1], "P(fits)", "plan", "remark"]
    chosen = _rival(subject, d.request) if subject else ()
    return Table(heads, rows, ("machine", "plan", "remark"), chosen)


def _rival(point: Point, request: Request) -> list[str]:
    result = point.step_and_bill[0]
    remarks = [point.why, sizing.CARRIED if point.gap is None else ""]
    cells = [*sizing.row(point, request)[:-1], format_probability(result.p_fits), result.line]
    return [*cells, "; ".join(filter(None, remarks))]


def _parts(bill: Figures | None) -> Table:
    parts = dict(bill.parts) if bill else {}
    whole = sum(parts.values())
    rows = [[name, sizing.format_dollars(one), f"{one / whole:.0%}"] for name, one in parts.items() if whole]
    return Table(["part", "of this run", "share"], rows)


def _network(bill: Figures | None) -> str:
    """What a purchase's network is; a rent has it in its price."""
    if bill is None or not bill.capex or bill.network is None or not bill.network.switches:
        return ""
    wires = bill.network
    return (
        f"Network: {wires.ports:,} ports, {wires.tiers} tier{'s' if wires.tiers > 1 else ''}, "
        f"{wires.switches:,} switch{'es' if wires.switches > 1 else ''}, {wires.links:,} links, "
        f"oversubscribed {wires.oversubscription:g} to 1: {sizing.format_dollars(wires.price)}, "
        f"{wires.price / bill.capex:.0%} of the purchase."
    )


def _sites(point: Point | None) -> Table:
    bills = point.sites if point and len(point.sites) > 1 else ()
    rows = [
        [
            one.site, "-" if one.cost is None else sizing.format_dollars(one.cost),
            "-" if one.energy is None else sizing.format_energy(one.energy),
            "-" if one.carbon is None else sizing.format_carbon(one.carbon),
        ]
        for one in bills
    ]  # fmt: skip
    site = point.figures.site if point and point.figures else ""
    chosen = next((one for one in rows if one[0] == site), ())
    return Table(["site", "cost", "energy", "CO2"], rows, ("site",), chosen)


def risks(d: Decision) -> list[str]:
    """What may go otherwise."""
    subject = d.subject
    if subject is None or subject.result is None or subject.figures is None:
        return ["No number of nodes that was tried has a plan: why, by machine type, is said above."]
    result, bill, here = subject.result, subject.figures, d.request.at(subject.figures)
    terms = here.terms
    lines = [
        _memory(result),
        f"The step time is predicted, and its error makes most of the interval of days. "
        f"Its search: {sizing.searched(subject)}; no search bounds what another number of nodes would cost.",
    ]
    lines += filter(None, [sizing.unmeasured(result)])
    best = [one.best for one in d.sizings if one.best and one.best.result]
    runs = [sizing.published(one.result, one.hardware) for one in best if one.result]
    runs = runs or [sizing.published(result, subject.hardware)]
    lines.append(
        f"Measured runs behind the intervals of step times: {'; '.join(runs)}. A type with few is given "
        f"the error that machine types had so far."
    )
    if bill.goodput:
        good, lost = bill.goodput, bill.goodput.lost
        worst = ", ".join(f"{name} {share:.1%}" for name, share in lost.items() if share > 5e-4)
        lines.append(
            f"A failure every {format_number(good.mtbf / 3600)} hours, {bill.seconds / good.mtbf:,.2g} in "
            f"the run; a checkpoint of {format_bytes(good.checkpoint_bytes)} every "
            f"{format_seconds(good.interval)}. "
            f"Lost of the wall clock: {worst or 'next to nothing'}. Spare nodes: {good.spares:,}."
        )
    if terms.buy:
        one = terms.capex[subject.hardware.name]
        lines.append(
            f"The price of a node is {one.tag}, of {one.dated}: between {sizing.format_dollars(one.low)} and "
            f"{sizing.format_dollars(one.high)} ({one.source})."
        )
    elif price := terms.price(subject.hardware, here.sites[0], here.assumptions):
        lines.append(f"The price of a device and hour is {price.dollars:g} USD ({price.source}).")
    if d.swings:
        names = ", ".join(one.name.replace("_", " ") for one in d.swings[:3])
        lines.append(f"What moves the answer most: {names}.")
    return lines


def _memory(result: SimResult) -> str:
    """How surely the plan fits, and how much of the device memory it needs at UPPER."""
    described, error = result.device.as_described, result.device.error
    most, chance = described.quantile(UPPER) / result.memory_limit, format_probability(result.p_as_described)
    text = (
        f"If {result.stack.name} keeps the tensors that its description says, the plan fits with probability "
        f"{chance}, and with a probability of {1 - UPPER:.0%} it needs more than {most:.1%} of the usable "
        f"device memory. That is evenly routed as planned; a router that learns is uneven."
    )
    if error.off is None:
        return text
    return text + (
        f" Of programs that nobody had compared {error.share:.0%} kept others; with these the probability is "
        f"{format_probability(result.p_fits)}. One measured step of the plan settles it."
    )


def _measures(settled: Sequence[Settled]) -> Table:
    rows = [
        [one.benchmark.name, f"{one.benchmark.nodes}", one.benchmark.how,
         f"{one.before:.1%} to {one.after:.1%}"]
        for one in settled
        if one.before - one.after > TOLD
    ]  # fmt: skip
    return Table(["measure", "nodes", "how", "half-width"], rows, ("measure", "how"))


def _assumptions(request: Request) -> Table:
    a, shipped = request.assumptions, known()
    rows = [
        [
            name, f"{getattr(a, name):g} {shipped[name].unit}".removesuffix(" 1"),
            f"{shipped[name].low:g} to {shipped[name].high:g}", shipped[name].says, request.source(name),
        ]
        for name in NAMES
    ]  # fmt: skip
    return Table(["name", "value", "range", "what", "source"], rows, ("name", "what", "source"))
