"""decision.html: what to sign, on one page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mopsim.common.io import write_text
from mopsim.common.units import (
    format_bytes,
    format_days,
    format_dollars,
    format_number,
    format_probability,
    format_seconds,
    format_span,
)  # fmt: skip
from mopsim.engine.result import UPPER
from mopsim.intervals.spread import machines_share, products
from mopsim.report import sizing
from mopsim.report.lanes import named
from mopsim.report.page import Table, templates
from mopsim.report.sizing_plots import cost_time, tornado
from mopsim.size.assumptions import DEFAULT, NAMES, known
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY, Figures
from mopsim.size.points import Point, Request
from mopsim.size.settle import Settled
from mopsim.size.whatif import Swing

TOLD = 5e-4
"""Half-width of the interval of days that a measurement must take away to be told."""

LEAST_SHARE = 5e-4
"""Of the wall clock: what takes less of it is not told."""


@dataclass(frozen=True)
class Decision:
    """What the page says. swings, settled: of the cluster recommended, or the nearest miss. facts: of its own
    making."""

    found: Decided
    swings: Sequence[Swing] = ()
    settled: Sequence[Settled] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write_decision(folder: Path, decision: Decision) -> None:
    """Write decision.html and its figures (PNG and SVG) into `folder`."""
    found = decision.found
    for kind in ("png", "svg"):
        if found.points:
            cost_time(folder / f"pareto.{kind}", found)
        if found.subject and decision.swings:
            tornado(folder / f"tornado.{kind}", decision.swings, found.subject, found.request.model.name)
    drawn = {"pareto": "", "tornado": ""}
    for path in folder.glob("*.svg"):
        text = path.read_text("utf-8")
        drawn[path.stem] = text[text.index("<svg") :]
    template = templates(escape=True).get_template("decision.html.j2")
    write_text(folder / "decision.html", template.render(**content(decision), **drawn))


def content(decision: Decision) -> dict[str, object]:
    """What the template shows, but for its figures."""
    d, settled, said = decision.found, decision.settled, texts(decision)
    subject = d.subject
    bill = subject.figures if subject else None
    return {
        "title": "Which cluster to sign for" if d.chosen else "No cluster meets the limits",
        "question": sizing.title(d.request),
        "found": d.chosen is not None,
        "answer": " ".join(said["answer"]),
        "cards": _cards(d, subject, bill) if subject and bill else [],
        "why": said["why"],
        "rivals": _rivals(d),
        "parts": _parts(subject, bill),
        "network": " ".join(said["network"]),
        "sites": _sites(subject),
        "risks": said["risks"],
        "measures": _measures(settled),
        "level": f"{100 * d.request.interval:g} %",
        "now": f"{settled[0].before:.1%}" if settled else "",
        "machine": _machines_part(subject),
        "assumptions": _assumptions(d.request.at(bill)),
        "facts": decision.facts,
    }


def _machines_part(subject: Point | None) -> str:
    """'12%' of the variance of a step's error, by machine types; empty where it is next to nothing."""
    share = machines_share(subject.result.facts) if subject and subject.result else 0.0
    return f"{share:.0%}" if share >= 0.005 else ""


def texts(decision: Decision) -> dict[str, list[str]]:
    """The sentences of each part of the page, by block of templates/decision.j2."""
    d = decision.found
    point = d.subject
    result, bill = (point.result, point.figures) if point else (None, None)
    here, whole = d.request.at(bill), bool(result and bill)
    found = [one.best for one in d.sizings if one.best and one.best.result] or [
        one for one in (point,) if one
    ]
    waits = sorted(result.waits.items(), key=lambda item: -item[1]) if result else []
    lost = bill.goodput.lost if bill and bill.goodput else {}
    template = templates().get_template("decision.j2")
    facts = template.new_context(
        {
            "d": d, "swings": decision.swings, "point": point, "result": result, "bill": bill,
            "whole": whole, "here": here, "terms": here.terms, "machine": point and point.hardware,
            "wires": point and point.hardware.scale_out, "level": f"{100 * d.request.interval:g} %",
            "heaviest": [
                f"{named(name, 'components')} {part / result.step_time:.0%}"
                for name, part in waits[:3]
                if result and part > 0.005 * result.step_time
            ],
            "runs": [sizing.published(one.result, one.hardware) for one in found if one.result],
            "lost": [f"{name} {share:.1%}" for name, share in lost.items() if share > LEAST_SHARE],
            "sizing": sizing, "span": format_span, "dollars": format_dollars,
            "bytes": format_bytes, "seconds": format_seconds, "number": format_number,
            "odds": format_probability, "products": products, "upper": UPPER, "day": DAY, "default": DEFAULT,
        }
    )  # fmt: skip
    said = {name: "".join(block(facts)).splitlines() for name, block in template.blocks.items()}
    return {name: [line for line in lines if line] for name, lines in said.items()}


def _cards(d: Decided, point: Point, bill: Figures) -> list[dict[str, str]]:
    level = d.request.interval
    low, high = (one / DAY for one in bill.seconds_interval(level))
    result, good, costs = point.result, bill.goodput, bill.cost_interval(level)
    goal = d.request.goal
    certain, paid = bill.p_within(goal.seconds), bill.p_budget(goal.budget)
    cards = [
        (f"days, {100 * level:g} %", f"{format_days(low)} to {format_days(high)}"),
        ("probability of the deadline, if the plan fits", None if certain is None else sizing.odds(certain)),
        ("probability of the budget, if the plan fits", None if paid is None else sizing.odds(paid)),
        (f"cost, {100 * level:g} %", " to ".join(map(format_dollars, costs)) if costs else None),
        ("to buy it", None if bill.capex is None else format_dollars(bill.capex)),
        ("of the wall clock trains", f"{good.share:.1%}" if good else None),
        ("model FLOP utilisation, as simulated", f"{result.mfu:.1%}" if result else None),
        ("probability that the plan fits", format_probability(result.p_fits) if result else None),
        ("energy", None if bill.energy is None else sizing.format_energy(bill.energy)),
        ("CO2", None if bill.carbon is None else sizing.format_carbon(bill.carbon)),
    ]
    return [{"name": name, "value": value} for name, value in cards if value]


def _rivals(d: Decided) -> Table:
    """The best of each machine, the front, and the next sizes of the one chosen."""
    subject = d.subject
    near = [one for one in d.points if subject and one.hardware.name == subject.hardware.name]
    near = sorted(near, key=lambda one: abs(one.num_nodes - (subject.num_nodes if subject else 0)))[:4]
    best = [one.best for one in d.sizings if one.best]
    shown = {(one.hardware.name, one.num_nodes): one for one in (*best, *d.front, *near) if one.figures}
    rows = [_rival(shown[key], d.request) for key in sorted(shown)]
    heads = [*sizing.columns(d.request)[:-1], "P(fits)", "remark", "plan"]
    chosen = _rival(subject, d.request) if subject else ()
    return Table(heads, rows, ("machine", "remark", "plan"), chosen)


def _rival(point: Point, request: Request) -> list[str]:
    result = point.step_and_bill[0]
    remarks = "; ".join(filter(None, (point.why, "adapted plan" if point.gap is None else "")))
    return [*sizing.row(point, request)[:-1], format_probability(result.p_fits), remarks, result.line]


def _parts(point: Point | None, bill: Figures | None) -> Table:
    parts = _of_rent(point, bill) if point and bill and set(bill.parts) == {"rent"} else {}
    parts = parts or dict(bill.parts if bill else {})
    whole = sum(parts.values())
    rows = [[name, format_dollars(one), f"{one / whole:.0%}"] for name, one in parts.items() if whole]
    return Table(["part", "of this run", "share"], rows)


def _of_rent(point: Point, bill: Figures) -> dict[str, float]:
    """Dollars of the rent by what the nodes do; none where that is not known."""
    if bill.goodput is None or not bill.billed_nodes:
        return {}
    train = bill.parts["rent"] * point.num_nodes / bill.billed_nodes
    shares = {"training": bill.goodput.share, **bill.goodput.lost}
    parts = {name: train * share for name, share in shares.items() if share > LEAST_SHARE}
    spare = bill.parts["rent"] - train
    return {**parts, **({"spare nodes, whole racks": spare} if spare > 0 else {})}


def _sites(point: Point | None) -> Table:
    bills = point.sites if point and len(point.sites) > 1 else ()
    rows = [
        [
            one.site, "-" if one.cost is None else format_dollars(one.cost),
            "-" if one.energy is None else sizing.format_energy(one.energy),
            "-" if one.carbon is None else sizing.format_carbon(one.carbon),
        ]
        for one in bills
    ]  # fmt: skip
    site = point.figures.site if point and point.figures else ""
    chosen = next((one for one in rows if one[0] == site), ())
    return Table(["site", "cost", "energy", "CO2"], rows, ("site",), chosen)


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
