"""`mopsim search`: rank the strategies that fit."""

import sys
import time
from typing import Any

from rich.console import Console

from mopsim.api.inputs import busy, unread
from mopsim.api.results import Ranking
from mopsim.api.run import search
from mopsim.commands.console import exported, human, say_notes, say_plan, say_written
from mopsim.commands.options import keywords
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.command_line import NOTHING_FITS
from mopsim.common.outputs import check_outputs
from mopsim.common.processes import workers
from mopsim.common.units import format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.report.tables import best_of_others, comparison, plan_line
from mopsim.search import SearchResult
from mopsim.search.miss import nearest_miss
from mopsim.search.reasons import plain

BRIEF = 1.0
"""Seconds that nobody minds."""


def run(*, jobs: int, plan: str | None, seal: str | None, json: str | None, **job: Any) -> int:
    """Search with a progress line, show the ranking and why it is so, write the winner's plan and the JSON.
    Returns the exit code: 3 where nothing fits."""
    check_outputs({"--plan": plan, "--seal": seal, "--json": json})
    console = human(json)
    with progress(console, "searching", None) as shown:

        def tell(simulated: int, best: SimResult | None) -> None:
            leads = f"best {format_seconds(best.step_time)} ({best.strategy.name})" if best else ""
            shown(simulated, f"{simulated} simulated, {leads or 'nothing fits yet'}")

        ranking = search(jobs=workers(jobs), progress=tell, **keywords(job))
    found, where, level = ranking.found, ranking.inputs.where, ranking.inputs.interval
    console.print(ranking.inputs.parameters, style="dim")
    if found.doubt:
        console.print(found.doubt, style="bold red")
    if found.top:
        told = [found.doubt, found.outcome(), *found.left_out, *map(plain, found.rejected)]
        console.print(comparison(found.top, where, level, found.free, said=told))
    elif found.closest:
        console.print(comparison([found.closest], f"{where}: the closest that misses", level))
    others = best_of_others(found.best_by_family, found.best or found.closest, found.lacking)
    if others and (found.top or len(found.lacking) > 1):
        console.print(others)
    more = _explain(console, ranking)
    refused = [one for one in ranking.top if not one.runnable]
    if refused:
        console.print(
            f"{len(refused)} of {len(ranking.top)} plans are planned only: mopexec does not run "
            f"{_not_run(ranking)}; {exported(refused)}"
        )
    rate = f"{found.bounded / max(found.bound_seconds, 1e-9):,.0f}/s"
    console.print(
        f"{found.outcome()}\n{found.candidates:,} candidates: lower bounds of {found.bounded:,} ({rate}), "
        f"{found.simulated} simulated, {found.seconds:.1f} s{more}"
    )
    inputs = ranking.inputs
    say_notes(console, [*unread(inputs.model), *busy(inputs.hardware)])
    for line in found.left_out:
        console.print(line, style="dim")
    for reason, count in found.rejected.most_common():
        console.print(f"  {count:>9,}  {plain(reason)}", style="dim")
    with io.json_last(json, ranking.to_json):
        _write(console, ranking, plan, seal)
    say_written(console, json)
    return 0 if ranking.best else NOTHING_FITS


def _explain(console: Console, ranking: Ranking) -> str:
    """Asks why the winner wins, or what would fit, and shows it; returns what that took, as of _more."""
    found = ranking.found
    what = "why" if found.top else "what would fit"
    tried, began = 0, time.perf_counter()
    with progress(console, f"asking {what}", None) as shown:

        def ask(simulated: int, said: str) -> None:
            nonlocal tried
            tried = simulated
            shown(simulated, f"{simulated} simulated, {said}")

        lines = ranking.explain(ask)
    asked = time.perf_counter() - began
    shown_above = [] if found.top or not found.closest else [nearest_miss(found.closest)]
    for line in lines:
        if line not in shown_above:
            console.print(f"- {line}")
    return _more(what, tried, asked)


def _not_run(ranking: Ranking) -> str:
    """What it does not run: the stack that was asked for, or plans that --runnable leaves out."""
    asked = ranking.inputs.stack
    return asked.name if asked and not asked.runtime else "them (--runnable leaves them out)"


def _more(what: str, tried: int, seconds: float) -> str:
    """'; to say what would fit 12 more, 4.2 s': what was done after the search, where it is not next to
    nothing."""
    counted = f"{tried} more simulated, " if tried else ""
    return f"; to say {what} {counted}{seconds:.1f} s" if tried or seconds >= BRIEF else ""


def _instead(found: SearchResult) -> list[str]:
    """A line of each plan that a user may rather want written, with the option that does so."""
    best, lines = found.best, []
    others = (
        (found.run_by_mopexec, "mopexec runs a plan", "--runnable"),
        (found.surer, "more likely to fit is a plan", f"--confidence {SURE:g}"),
    )
    for one, what, option in others:
        if one and best:
            slower = max(0.0, one.ranked_time / best.ranked_time - 1)
            that = f"that is {slower:.0%} slower, P(fits) {format_probability(one.p_fits)}"
            lines.append(f"{what} {that} ({option} ranks only such): {plan_line(one)}")
    return lines


def _write(console: Console, ranking: Ranking, plan: str | None, seal: str | None) -> None:
    """The winner's plan and its sealed prediction, where they are asked for."""
    best = ranking.best
    for option, path in (("--plan", plan), ("--seal", seal)):
        if path and not best:
            print(f"mopsim: {option}: {path} not written: {ranking.found.verdict()}", file=sys.stderr)
    if plan and best:
        best.save_plan(plan)
        say_plan(console, plan, best, "plan 1")
        say_notes(console, _instead(ranking.found))
    if seal and best:
        console.print(f"sealed in {seal}: sha256 {best.seal(seal)}")
