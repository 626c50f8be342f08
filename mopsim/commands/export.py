"""`mopsim export`: the plan as the configuration of another trainer."""

import sys
from dataclasses import asdict
from pathlib import Path

from mopsim.commands.console import human
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.export import export, target_of
from mopsim.export.left import left
from mopsim.spec.upgrade import load_plan


def run(*, plan: str, to: str, out: str, lossy: bool, json: str | None) -> None:
    """Read the plan, write the configuration, say what it leaves out."""
    check_outputs({"--out": out, "--json": json}, stdout=("--out", "--json"))
    target, given = target_of(to), load_plan(plan)
    text, gaps = export(given, to, lossy=lossy)
    rest = left(given, gaps)
    console = human("-" if "-" in (out, json) else None)
    if out == "-":
        sys.stdout.write(text)
    else:
        io.write_text(Path(out), text)
        console.print(f"{to} configuration written to {out}; keys checked against {target.checked}")
    for gap in gaps:
        console.print(f"  not expressed: {gap}", style="yellow")
    if rest:
        console.print(f"  {rest}", style="yellow")
    if json:
        missing = [{"field": gap.field, "value": gap.value, "why": gap.rule} for gap in gaps]
        found = {"to": to, "out": out, "checked": target.checked, "not_expressed": missing}
        io.write_json(json, found | ({"left": asdict(rest)} if rest else {}))
