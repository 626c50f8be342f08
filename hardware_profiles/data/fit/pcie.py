"""Curves over PCIe, where ranks share the host's links: those of one number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hardware_profiles.data.fit.collectives import ELEMENT_BYTES, CollectiveFit, fit_node
from hardware_profiles.data.fit.tables import Residuals, read_csv, round_to

TABLE = Path(__file__).parents[1] / "nccl_pcie.csv"
_DERIVED = Residuals(0, 0.0, 0.0, 0.0)
Rows = list[dict[str, str]]


def rows() -> Rows:
    """The table's, as that of NCCL inside a node has them."""
    table = read_csv(TABLE, ("gpu", "op", "num_gpus", "size_bytes", "seconds"))
    return [
        {
            **row,
            "message_elements_or_bytes": str(int(row["size_bytes"]) // ELEMENT_BYTES),
            "latency_s": row["seconds"],
        }
        for row in table
    ]


def fit_pcie(timed: Rows, peak: float, machine: dict[str, Any]) -> dict[str, CollectiveFit]:
    """Curves of `curves.ranks` ranks; what was not timed by what was. An all_reduce reduces and gathers, each
    half of it; an all-to-all has `exchange` of its rate; a send to a neighbour is what a ring of
    `curves.ring` ranks does all the time, after half the delay of an all_reduce of two: there and back."""
    curves = machine["curves"]
    fits = fit_node(timed, peak, curves["ranks"])
    both = replace(fits["all_reduce"], residuals=_DERIVED, residuals_large=_DERIVED)
    half = replace(
        both, latency=round_to(both.latency / 2, 3), latency_per_rank=round_to(both.latency_per_rank / 2, 3)
    )
    fits = {"all_gather": half, "reduce_scatter": half, **fits}
    if "all_to_all" not in fits:
        fits["all_to_all"] = replace(both, bandwidth=round_to(both.bandwidth * machine["exchange"][0]))
    ring = fit_node(timed, peak, curves["ring"]).get("all_gather", half)
    fits["send_recv"] = replace(
        ring, latency=half.latency + 2 * half.latency_per_rank, latency_per_rank=0.0, residuals=_DERIVED
    )
    return fits


def faster(timed: Rows, peak: float, whole: dict[str, CollectiveFit], devices: int) -> dict[str, float]:
    """By op, the rate of a group of all `devices` under one bridge over that of the whole domain."""
    under = fit_node(timed, peak, devices)
    return {op: max(1.0, round_to(fit.bandwidth / whole[op].bandwidth, 3)) for op, fit in under.items()}


def words(machine: dict[str, Any]) -> str:
    """What a profile says of its curves beside their table."""
    curves = machine["curves"]
    if "ranks" not in curves:
        return ""
    exchange = f", {machine['exchange'][1]}" if "exchange" in machine else ""
    ring = f", send_recv as a ring of {curves['ring']} passes gathered rows on"
    return f", {curves['ranks']} ranks of a node{exchange}{ring}"
