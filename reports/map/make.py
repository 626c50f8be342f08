"""Makes this report: python -m reports.map.make [--budget N] (an hour of one core with 20).

Over networks, clusters and contexts: which family wins, by how much and how surely; and what MoP's degrees,
chosen by the search, gain over the papers' rule.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mopsim.common import io
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
    yield "| cluster | network | context | winner | tokens/s per GPU (90 %) | lead (90 %) | p | next |"
    yield "|---|---|---:|---|---:|---:|---:|---|"
    for row in rows:
        where = f"| {row['cluster']} | {row['model']} | {context(row['seq_len'])} "
        families = list(row["families"].items())
        if not families:
            yield f"{where}| nothing fits | | | | {', '.join(_risky(row))} |"
            continue
        (winner, best), *rest = families
        yield (
            f"{where}| {winner} `{best['strategy']}` | {_rate(best)} ({best['interval'][0]:,.0f} to "
            f"{best['interval'][1]:,.0f}) | {_lead(row['lead'])} | "
            f"{', '.join([*(f'{family} {_rate(one)}' for family, one in rest), *_risky(row)])} |"
        )


def _risky(row: dict[str, Any]) -> list[str]:
    """Families that fit with a probability below that of the ranked."""
    return [f"{family} {_rate(one)} (fits with {one['p_fits']:.2f})" for family, one in row["risky"].items()]


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
        beside = f"{rule['tokens_per_s_per_device']:,.0f}" if gain else _why_not(rule)
        yield (
            f"| {row['cluster']} | {row['model']} | {context(row['seq_len'])} | `{best['strategy']}` "
            f"| {best['tokens_per_s_per_device']:,.0f} | {beside} | {f'{gain:.2f}x' if gain else ''} |"
        )


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
        none = sum(not row["families"] for row in here)
        nothing = f"; nothing fits in {none} cells" if none else ""
        yield f"- **{context(seq_len)}**: {told or 'no family wins'}{nothing}"
    gains = [gain for row in rows if (gain := gain_over_rule(row))]
    lost = sum(bool(row["families"].get("mop")) and gain_over_rule(row) is None for row in rows)
    if gains:
        yield (
            "- **Degrees chosen by the search against the papers' rule**: "
            f"{min(gains):.2f}x to {max(gains):.2f}x as fast, {median(gains):.2f}x in the median of "
            f"{len(gains)} cells. In {lost} more cells the search's plan fits, and the rule's plan is "
            "refused or does not fit."
        )


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


def main() -> None:
    """Play the grid and write map.json, index.md and map.png beside this file, or into --out."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--budget", type=int, default=40, help="simulations at most of each family")
    asked.add_argument("--jobs", type=int, default=os.cpu_count())
    asked.add_argument("--out", type=Path, default=HERE)
    options = asked.parse_args()
    given = yaml.safe_load((HERE / "grid.yaml").read_text(encoding="utf-8"))
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(played, grid(given), repeat(options.budget)):
            rows.append(row)
            print(row["cluster"], row["model"], context(row["seq_len"]), *row["families"], flush=True)
    io.write_json(str(options.out / "map.json"), {"budget": options.budget, "grid": given, "cells": rows})
    draw(options.out / "map.png", rows, context)
    head = (HERE / "head.md").read_text(encoding="utf-8")
    said = head.format(
        tokens=given["tokens_per_device"], budget=options.budget, sure=SURE, proofs=proofs(rows),
        vocab=PAPERS_VOCAB, papers_tokens=PAPERS_TOKENS, findings="\n".join(findings(rows)),
    )  # fmt: skip
    lines = [said, "## Every cell\n", *table(rows), "\n## MoP's degrees\n", *rule_table(rows)]
    io.write_text(options.out / "index.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
