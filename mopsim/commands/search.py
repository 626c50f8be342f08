"""`mopsim search`: rank the strategies that fit."""

from mopsim.api.run import search
from mopsim.commands.console import human
from mopsim.commands.options import Job
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import format_seconds
from mopsim.engine import SimResult
from mopsim.report.tables import comparison, describe
from mopsim.search import DEFAULT_FAMILIES


def run(
    job: Job,
    top: int,
    family: str,
    any_plan: bool,
    risk: bool,
    any_routing: bool,
    budget: int,
    plan: str | None,
    json: str | None,
) -> None:
    """Search with a progress line, show the ranking, write the winner's plan and the JSON."""
    check_outputs({"--plan": plan, "--json": json})
    console = human(json)
    with progress(console, "searching", budget) as shown:

        def tell(simulated: int, best: SimResult | None) -> None:
            shown(simulated, f"best {format_seconds(best.step_time)}" if best else "nothing fits yet")

        ranking = search(
            families=family, top=top, budget=budget, runnable=not any_plan, at_risk=risk,
            any_routing=any_routing, progress=tell, **job.keywords(),
        )  # fmt: skip
    found, where = ranking.found, ranking.inputs.where
    console.print(ranking.inputs.parameters, style="dim")
    if found.top:
        console.print(comparison(found.top, where))
        console.print(f"Winner: {describe(found.top[0].strategy)}")
    elif found.closest:
        console.print(comparison([found.closest], f"{where}: the closest that misses"))
    plain = [name for name in ranking.families if name not in DEFAULT_FAMILIES]
    if plain:
        console.print(
            f"{', '.join(plain)}: planned only, mopexec does not run these (mopsim export writes them)"
        )
    ending = "no candidate left out can beat these" if found.proven else "the budget of simulations ended it"
    ending = f"; {ending}" if found.top else ""
    rate = found.bounded / max(found.bound_seconds, 1e-9)
    console.print(
        f"{found.verdict()}\n{found.candidates:,} candidates, {found.bounded:,} bounded ({rate:,.0f}/s), "
        f"{found.simulated} simulated, {found.seconds:.1f} s{ending}"
    )
    for reason, count in found.rejected.most_common():
        console.print(f"  {count:>9,}  {reason}", style="dim")
    if json:
        io.write_json(json, ranking.to_json())
    if plan:
        if not ranking.best:
            raise MopError(f"--plan: {plan} not written: {found.verdict()}")
        ranking.best.save_plan(plan)
