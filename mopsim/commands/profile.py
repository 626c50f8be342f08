"""`mopsim profile new`: a hardware profile from a data sheet, and what its assumptions are worth."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Group
from rich.text import Text

from mopsim.api.inputs import read_families, read_inputs
from mopsim.api.run import search
from mopsim.api.sensitivity import Moved, assumptions, sensitivity, turns
from mopsim.commands.console import human
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError, require
from mopsim.common.io import to_plain
from mopsim.common.outputs import check_outputs
from mopsim.common.shipped import shipped
from mopsim.common.units import format_seconds, parse_count
from mopsim.engine import SimResult
from mopsim.report.terminal import table
from mopsim.spec.figures import FIGURES
from mopsim.spec.hardware import HardwareProfile, Quantity, Tag
from mopsim.spec.new_card import FOLLOWS, check_figures, figures_of, nearest_card, new_card
from mopsim.spec.profiles import list_profiles, load_profile

BY = 0.2
"""How far each assumption is moved."""
QUIET = 5e-4
"""Below this change of the step time an assumption is only named."""


@dataclass(frozen=True)
class CardOrder:
    """What is known of a card, as typed. figures: by the names of mopsim.spec.figures.FIGURES."""

    name: str | None
    figures: Mapping[str, str]
    near: str | None
    architecture: str
    devices_per_node: int | None
    scale_up_size: int | None
    source: str | None
    tag: Tag


def run(
    *, out: str, ask: bool, json: str | None, name: str | None, near: str | None, architecture: str,
    devices_per_node: int | None, scale_up_size: int | None, source: str | None, tag: Tag, **given: Any,
) -> None:  # fmt: skip
    """Ask for what is not given, write the profile, show what each assumption moves. given: the figures, and
    what of the reference job is not as shipped."""
    check_outputs({"--out": out, "--json": json})
    console = human(json)
    stated = {option: one for option, one in given.items() if one is not None}
    options = {one.name: one.name.replace("-", "_") for one in FIGURES}
    figures = {name: stated.pop(option) for name, option in options.items() if option in stated}
    card = CardOrder(name, figures, near, architecture, devices_per_node, scale_up_size, source, tag)
    if ask:
        console.print("Enter leaves a figure to the nearest known card, and tags it as assumed.")
        card = asked(card, err=json == "-")
    if not card.name or not card.source:
        raise MopError(f"--{'source' if card.name else 'name'}: not given, it is needed (or --ask)")
    profile, nearest = made(card)
    job = {**shipped("hardware_profiles", "data/reference_job.yaml"), **stated}
    check_job(profile, job)
    io.write_yaml(Path(out), profile)
    console.print(filled(profile, nearest, card.figures))
    if not card.near:
        console.print(taken(nearest, card.architecture))
    console.print(f"Written: {out}")
    weighed = _weigh(profile, job, console)
    if json:
        io.write_json(json, {"profile": profile, "near": nearest.name, **weighed})


def check_job(profile: HardwareProfile, job: Mapping[str, Any]) -> None:
    """Refuse a reference job that cannot be, before anything is written. Raises MopError."""
    read_families(job.get("families"))
    rest = {name: one for name, one in job.items() if name not in ("families", "budget")}
    read_inputs(hardware=profile, **rest)


def asked(card: CardOrder, err: bool) -> CardOrder:
    """The card with what its user typed for what was not given. err: the questions go to standard error."""

    def answer(question: str, default: str | None = None) -> str:
        shown = default is None
        try:
            return str(typer.prompt(question, default=default, show_default=shown, err=err)).strip()
        except typer.Abort as stopped:
            if isinstance(stopped.__context__, EOFError):
                raise MopError(f"--ask: standard input ended before an answer to {question!r}") from None
            raise

    name = card.name or answer("name of the machine type, as h20-sxm-96g")
    source = card.source or answer("where its figures come from")
    architecture = card.architecture
    if not card.near and not architecture:
        architecture = answer("architecture of the card, as hopper (Enter: any)", "")
    devices = card.devices_per_node
    if devices is None and (typed := answer("GPUs of a node", "")):
        devices = parse_count(typed, "devices-per-node")
    figures = dict(card.figures)
    for figure in FIGURES:
        while figure.name not in figures and (typed := answer(f"{figure.meaning}, {figure.unit}", "")):
            try:
                figure.read(typed, card.tag, source)
                figures[figure.name] = typed
            except MopError as error:  # asked again
                typer.echo(str(error), err=True)
    return replace(
        card, name=name, source=source, architecture=architecture, devices_per_node=devices, figures=figures
    )


def made(card: CardOrder) -> tuple[HardwareProfile, HardwareProfile]:
    """The new profile, and the card that fills it. Raises MopError."""
    name, source, figures = str(card.name), str(card.source), card.figures
    plain = re.fullmatch(r"[\w+-][\w.+-]*", name)
    require(plain is not None, "name", name, "must be a plain file name: letters, digits, ., _, + and -")
    given: dict[str, Quantity] = {
        one.name: one.read(figures[one.name], card.tag, source) for one in FIGURES if one.name in figures
    }
    known = [load_profile(one) for one in list_profiles()]
    if card.near:
        near = load_profile(card.near, "near")
    else:
        near = nearest_card(known, given, card.architecture)
    found = new_card(name, given, near, card.devices_per_node, card.scale_up_size)
    check_figures(known, given)
    return found, near


def taken(near: HardwareProfile, architecture: str) -> str:
    """Which card was taken as the nearest, and whether its architecture is assumed with it."""
    known = near.device.architecture
    if architecture:
        return f"Nearest {known} card by the figures given: {near.name} (--near NAME takes another)"
    return (
        f"Nearest card by the figures given: {near.name}. That the new card is {known} too, whose kernels it "
        "gets, is assumed: --architecture NAME, or --near NAME, if it is not"
    )


def filled(profile: HardwareProfile, near: HardwareProfile, figures: Mapping[str, str]) -> Any:
    """The figures of the new profile, and where each comes from."""
    shown = table(f"{profile.name}: what is not given is as {near.name}", ("figure",), ("value",))
    shown.add_column("from")
    theirs = figures_of(near)
    for name, one in figures_of(profile).items():
        known = "given" if name in figures else f"assumed, as {near.name}"
        if name in FOLLOWS and name not in figures and one.si != theirs[name].si:
            known = f"assumed: {theirs[name].text} of {near.name} by {FOLLOWS[name]}"
        if name == "memory-bandwidth" and name in figures:
            known = "given, times the share that kernels reach"
        shown.add_row(name, one.text, known)
    return shown


def _weigh(profile: HardwareProfile, job: Mapping[str, Any], console: Any) -> dict[str, Any]:
    """Simulate the reference job with each assumption 20 % lower and higher; show and return what moves."""
    with progress(console, "weighing assumptions", len(assumptions(to_plain(profile)))) as shown:
        ranking = search(hardware=profile, top=1, **job)
        best = ranking.best
        if best is None:
            console.print(f"No assumption is weighed: {ranking.headline()} (--model, --nodes, --seq-len)")
            return {"reference": None, "assumptions": []}
        found = sensitivity(best, BY, lambda done, what: shown(done, what))
    price = profile.price_per_device_hour
    title = f"{ranking.inputs.where}: {best.result.line}"
    assumed = price is not None and price.tag == "assumed"
    console.print(weights(found, best.result, title, price_assumed=assumed))
    return {"reference": best.to_json(), "assumptions": [_json(one, best.result) for one in found]}


def weights(found: list[Moved], base: SimResult, title: str, *, price_assumed: bool) -> Group:
    """The assumptions that move the step, most first; the names of those that do not."""
    shown = table(
        f"a step of {format_seconds(base.step_time)}, with each assumption 20 % lower and higher",
        ("assumption",), ("value", "lower", "higher"),
    )  # fmt: skip
    moving = [one for one in found if one.swing(base) >= QUIET]
    for one in moving:
        cells = [
            "-" if end is None else f"{change:+.1%}"
            for end, change in zip((one.low, one.high), one.steps(base), strict=True)
        ]
        turned = [
            f"{end.verdict} if {where}"
            for end, where in ((one.low, "lower"), (one.high, "higher"))
            if end is not None and turns(end, base)
        ]
        shown.add_row(", ".join([one.name, *turned]), one.value, *cells)
    quiet = [one.name for one in found if one.swing(base) < QUIET]
    lines = [Text(title, style="dim")]
    if price_assumed:
        lines.append(Text("The price is assumed: it moves the cost as much as itself.", style="dim"))
    if quiet:
        lines.append(Text(f"Under {QUIET:.2%} on this job: {', '.join(quiet)}", style="dim"))
    return Group(shown, *lines)


def _json(one: Moved, base: SimResult) -> dict[str, Any]:
    low, high = one.steps(base)
    return {
        "name": one.name, "value": one.value, "step_time_lower": low, "step_time_higher": high,
        "verdict_lower": one.low.verdict if one.low else None,
        "verdict_higher": one.high.verdict if one.high else None,
    }  # fmt: skip
