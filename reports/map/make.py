"""Makes this report: python -m reports.map.make [--budget N] (an hour of one core with 20); page and figure
again from map.json: python -m reports.map.make --render.

Over networks, clusters and contexts: which family wins, by how much and how surely; and what MoP's degrees,
chosen by the search, gain over the papers' rule.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product, repeat
from pathlib import Path
from statistics import median
from subprocess import run
from typing import Any

import yaml

from mopsim.common import io
from mopsim.common.units import format_probability
from mopsim.search.result import exhausted, format_gap
from reports.map.cells import PAPERS_TOKENS, PAPERS_VOCAB, Cell, played
from reports.map.figure import SURE, draw, sure

HERE = Path(__file__).parent


def grid(given: dict[str, Any]) -> list[Cell]:
    """All cells, by cluster, network and context."""
    asked = product(given["clusters"], given["networks"], given["contexts"])
    return [
        Cell(model, cluster["hardware"], cluster["nodes"], seq_len, given["tokens_per_device"])
        for cluster, model, seq_len in asked
    ]


def table(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """A line for each cell."""
    names = (
        "cluster | network | context | winner | P(fits) | tokens/s per GPU (90 %) | lead (90 %) | p | next"
    )
    yield f"| {names} |"
    yield "|---|---|---:|---|---:|---:|---:|---:|---|"
    for row in rows:
        where = f"| {row['cluster']} | {row['model']} | {context(row['seq_len'])} "
        families = list(row["families"].items())
        if not families:
            none = f"no plan fits with {SURE:g}" if row["risky"] else "nothing fits"
            yield f"{where}| {none} | | | | | {', '.join(_risky(row))} |"
            continue
        (winner, best), *rest = families
        others = [*(f"{family} {_rate(one)}" for family, one in rest), *_risky(row)]
        alike = f"; {row['alike']}" if row.get("alike") else ""
        alike += f"; without overlap=experts {winner} {row['apart']:,.0f}" if row.get("apart") else ""
        yield (
            f"{where}| {winner} `{best['strategy']}` | {format_probability(best['p_fits'])} "
            f"| {_rate(best)} ({best['interval'][0]:,.0f} to {best['interval'][1]:,.0f}) "
            f"| {_lead(row['lead'])} | {', '.join(others)}{alike} |"
        )


def _risky(row: dict[str, Any]) -> list[str]:
    """Families that fit with a probability below that of the ranked, likeliest first."""
    found = sorted(row["risky"].items(), key=lambda item: -item[1]["p_fits"])
    return [f"{family} {_rate(one)} (fits with {format_probability(one['p_fits'])})" for family, one in found]


def _rate(one: dict[str, Any]) -> str:
    return f"{one['tokens_per_s_per_device']:,.0f}"


def _lead(lead: dict[str, Any] | None) -> str:
    """Two columns: the lead, and how surely it is one."""
    if lead is None:
        return "only one that fits | "
    low, high = lead["interval"]
    return f"{lead['ratio']:.2f}x ({low:.2f} to {high:.2f}) | {lead['p_faster']:.2f}"


def rule_table(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """MoP chosen by the search beside the papers' rule."""
    yield "| cluster | network | context | the search's MoP | tokens/s per GPU | the papers' rule | gain |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for row in rows:
        best, rule = row["families"].get("mop"), row["rule"]
        if not best:
            continue
        gain = gain_over_rule(row)
        beside = f"{rule['tokens_per_s_per_device']:,.0f}{_odds(rule)}" if gain else _why_not(rule)
        yield (
            f"| {row['cluster']} | {row['model']} | {context(row['seq_len'])} | `{best['strategy']}` "
            f"| {best['tokens_per_s_per_device']:,.0f} | {beside} | {f'{gain:.2f}x' if gain else ''} |"
        )


def _odds(one: dict[str, Any]) -> str:
    """' (fits with 0.84)' where that is below SURE."""
    return f" (fits with {format_probability(one['p_fits'])})" if one["p_fits"] < SURE else ""


def _why_not(rule: dict[str, Any]) -> str:
    return "refused: " + rule["refused"] if "refused" in rule else "does not fit"


def gain_over_rule(row: dict[str, Any]) -> float | None:
    """How many times as fast; None where the rule's plan is none or does not fit."""
    best, rule = row["families"].get("mop"), row["rule"]
    if not best or not rule.get("fits"):
        return None
    return float(best["tokens_per_s_per_device"] / rule["tokens_per_s_per_device"])


def context(tokens: int) -> str:
    """131072 is 128K."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def findings(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Who wins where, in sentences that follow from the rows."""
    for seq_len in sorted({row["seq_len"] for row in rows}):
        here = [row for row in rows if row["seq_len"] == seq_len]
        won = Counter(next(iter(row["families"])) for row in here if row["families"])
        certain = Counter(next(iter(row["families"])) for row in here if row["families"] and sure(row))
        told = ", ".join(
            f"{family} wins {count} ({certain[family]} with p of {SURE:g} or more)"
            for family, count in won.most_common()
        )
        none = [row for row in here if not row["families"]]
        may = sum(bool(row["risky"]) for row in none)
        but = f" (in {may} of them one may)" if may else ""
        nothing = f"; no plan fits with {SURE:g} in {len(none)} cells{but}" if none else ""
        yield f"- **{context(seq_len)}**: {told or 'no family wins'}{nothing}"
    yield from (f"- {said}" for said in (_fitting(rows), _kernels(rows), _overlapped(rows)) if said)
    gains = [gain for row in rows if (gain := gain_over_rule(row))]
    lost = sum(bool(row["families"].get("mop")) and gain_over_rule(row) is None for row in rows)
    if gains:
        yield (
            "- **Degrees chosen by the search against the papers' rule**: "
            f"{min(gains):.2f}x to {max(gains):.2f}x as fast, {median(gains):.2f}x in the median of "
            f"{len(gains)} cells. In {lost} more cells the search's plan fits, and the rule's plan is "
            "refused or does not fit."
        )


def _fitting(rows: Sequence[dict[str, Any]]) -> str:
    """How surely winners fit."""
    odds = [next(iter(row["families"].values()))["p_fits"] for row in rows if row["families"]]
    below = [one for one in odds if one < SURE]
    if not below:
        return ""
    least = format_probability(min(below))
    return (
        f"**P(fits)** of {len(below)} of {len(odds)} winners is below {SURE:g} ({least} at least): their "
        "programs may keep other tensors than their stacks say. One measured step tells"
    )


def _kernels(rows: Sequence[dict[str, Any]]) -> str:
    """On which networks the sure wins are where the next best runs attention in another kernel."""
    certain = [row for row in rows if row["lead"] and sure(row)]
    other = [row for row in certain if len({one["attention"] for one in _leaders(row)}) > 1]
    if not other:
        return ""
    winners = Counter(next(iter(row["families"])) for row in other)
    told = " and ".join(f"{count} of {family}" for family, count in winners.most_common())
    networks = ", ".join(dict.fromkeys(row["model"] for row in other))
    kernels = dict.fromkeys(tuple(one["attention"] for one in _leaders(row)) for row in other)
    pairs = ", ".join(f"{_kernel(ours)} against {_kernel(theirs)}" for ours, theirs in kernels)
    return (
        f"**Attention kernels**: of {len(certain)} wins with p of {SURE:g} or more {len(other)} ({told}, on "
        f"{networks}) are over a family that runs attention in another kernel ({pairs})"
    )


def _overlapped(rows: Sequence[dict[str, Any]]) -> str:
    """How many wins are exchanges of experts that another microbatch hides."""
    hidden = [row for row in rows if row.get("apart")]
    split = [row for row in hidden if " TP=" in _leaders(row)[0]["strategy"]]
    other = [row for row in hidden if row["apart"] < max(map(_speed, _leaders(row)[1:]), default=0.0)]
    won = Counter(next(iter(row["families"])) for row in hidden)
    if not hidden:
        return ""
    told = " and ".join(f"{count} of {family}" for family, count in won.most_common())
    return (
        f"**Overlap of exchanges**: in {len(hidden)} wins ({told}) another microbatch hides experts' "
        f"exchanges (`overlap=experts`); without it {len(other)} of them would be another family's. "
        f"{len(split)} have tensor ranks: published runs like these saved 2.1 s where 5.2 are simulated "
        "(`overlap-of-tensor-ranks` in [misses](../validation/misses.md)); those with one tensor rank are "
        "met within 13 %"
    )


def _speed(one: dict[str, Any]) -> float:
    return float(one["tokens_per_s_per_device"])


def _kernel(name: str) -> str:
    return "the profile's curve" if name == "profile" else name


def _leaders(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The winner and the next best."""
    return list(row["families"].values())[:2]


def proofs(rows: Sequence[dict[str, Any]]) -> str:
    """How many searches are proven, and what the others leave."""
    gaps = [row["gap"] for row in rows]
    left = sorted(gap for gap in gaps if gap is not None and not exhausted(gap))
    said = f"{sum(map(exhausted, gaps))} of {len(gaps)} searches are proven"
    if left:
        said += (
            f"; in the others a plan left out is at most {format_gap(left[0])} to {format_gap(left[-1])} "
            f"faster, {format_gap(median(left))} in the median"
        )
    return said


def searched(budget: int, jobs: int | None) -> dict[str, Any]:
    """The grid played, and of which commit and day that is."""
    given = yaml.safe_load((HERE / "grid.yaml").read_text(encoding="utf-8"))
    asked = ["git", "-C", str(HERE), "rev-parse", "--short=8", "HEAD"]
    commit = run(asked, capture_output=True, text=True, check=True).stdout.strip()
    rows = []
    with ProcessPoolExecutor(jobs) as pool:
        for row in pool.map(played, grid(given), repeat(budget)):
            rows.append(row)
            print(row["cluster"], row["model"], context(row["seq_len"]), *row["families"], flush=True)
    made = datetime.now(UTC).date().isoformat()
    return {"commit": commit, "made": made, "budget": budget, "grid": given, "cells": rows}


def page(found: dict[str, Any]) -> str:
    """index.md of map.json."""
    rows = found["cells"]
    head = (HERE / "head.md").read_text(encoding="utf-8")
    said = head.format(
        tokens=found["grid"]["tokens_per_device"], budget=found["budget"], sure=SURE, proofs=proofs(rows),
        vocab=PAPERS_VOCAB, papers_tokens=PAPERS_TOKENS, findings="\n".join(findings(rows)),
        commit=found["commit"], made=found["made"],
    )  # fmt: skip
    lines = [said, "## Every cell\n", *table(rows), "\n## MoP's degrees\n", *rule_table(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Play the grid and write map.json, index.md and map.png beside this file, or into --out."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--budget", type=int, default=40, help="simulations at most of each family")
    asked.add_argument("--jobs", type=int, default=os.cpu_count())
    asked.add_argument("--out", type=Path, default=HERE)
    asked.add_argument("--render", action="store_true", help="page and figure of the map.json that is there")
    options = asked.parse_args()
    if options.render:
        found = json.loads((HERE / "map.json").read_text(encoding="utf-8"))
    else:
        found = searched(options.budget, options.jobs)
        io.write_json(str(options.out / "map.json"), found)
    draw(options.out / "map.png", found["cells"], context)
    io.write_text(options.out / "index.md", page(found))


if __name__ == "__main__":
    main()
