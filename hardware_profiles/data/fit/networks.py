"""Curves over NICs, fitted by network; those of networks that nobody timed by those of one that was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hardware_profiles.data.fit.collectives import OPS, OverNodes, fit_over_nodes, other_network
from hardware_profiles.data.fit.tables import round_to
from mopsim.common.units import UNITS

TABLE = Path(__file__).parents[1] / "nccl_over_nodes.csv"


def network(name: str, networks: dict[str, dict[str, Any]], rows: list[dict[str, str]]) -> OverNodes:
    """That of an entry of `networks`: what `like` has, by its NICs and `delays`, and its own timings where
    they are of several numbers of nodes."""
    entry = networks[name]
    nic = float(entry["nic"][0]) * UNITS[entry["nic"][1]]
    fits, tags, sources = {}, {}, {}
    if "like" in entry:
        delays, why = entry["delays"]
        known = other_network(network(entry["like"], networks, rows), nic, delays, why)
        fits, tags, sources = known.fits, known.tags, known.sources
    for theirs, ours in OPS.items():
        mine = [row for row in rows if (row["network"], row["op"]) == (name, theirs)]
        if len({row["num_gpus"] for row in mine}) > 1:
            fits[ours], tags[ours] = fit_over_nodes(ours, mine, nic), "measured"
            sources[ours] = f"fitted to the {name} rows of {TABLE.name}"
    if "reduce_scatter" not in fits:
        fits["reduce_scatter"], tags["reduce_scatter"] = fits["all_gather"], "assumed"
        sources["reduce_scatter"] = f"as all_gather: {sources['all_gather']}"
    both = fits["all_reduce"]
    hop = round_to((both.latency + 2 * both.latency_per_rank) / 2, 3)
    fits["send_recv"] = replace(fits["all_to_all"], latency=hop, latency_per_rank=0.0)
    tags["send_recv"] = "assumed"
    sources["send_recv"] = (
        "as all_to_all, of one peer, half the delay of an all_reduce over two nodes, which sends there and "
        f"back: {sources['all_to_all']}"
    )
    return OverNodes(nic, fits, tags, sources)
