"""Fits of CollectiveCurve from NCCL timings inside a node."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from hardware_profiles.data.fit.tables import Array, Residuals, column, params, round_to
from mopsim.spec.hardware import Tag

#: Names of the table -> ours.
OPS = {
    "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
}  # fmt: skip
ELEMENT_BYTES = 2
RAMP = 0.5


def _microseconds(value: float) -> float:
    """Seconds of a fitted number of microseconds; below a nanosecond it is none."""
    return round_to(float(value) * 1e-6, 3) if value > 1e-3 else 0.0


@dataclass(frozen=True)
class CollectiveFit:
    """SI seconds: latency + n * latency_per_rank + wire * (1 + (bytes_half / wire)^RAMP) / bandwidth."""

    latency: float
    latency_per_rank: float
    bandwidth: float
    bytes_half: float
    residuals: Residuals
    residuals_large: Residuals


def wire_bytes(op: str, ranks: Array, size: Array) -> Array:
    """Bytes a rank sends for a full buffer of `size`: (n-1)/n of it, twice that for all_reduce."""
    return size * (ranks - 1) / ranks * (2.0 if op == "all_reduce" else 1.0)


def fit_collective(op: str, ranks: Array, size: Array, seconds: Array, peak: float) -> CollectiveFit:
    """Robust least squares of the log error; bandwidth at most `peak` (bytes/s a rank, one direction).

    Timings of one group size cannot tell a delay from a delay a rank: all of it then goes by the rank,
    as the hops of a ring do.
    """
    return _fit(ranks, wire_bytes(op, ranks, size), seconds, peak)


def _fit(ranks: Array, wire: Array, seconds: Array, peak: float) -> CollectiveFit:
    largest = min(float((wire / seconds).max()), peak)

    sizes = len(np.unique(ranks))

    def errors(x: Array) -> Array:
        moved = wire * (1 + (x[3] * 1e6 / wire) ** RAMP)
        predicted = (x[0] * (sizes > 1) + ranks * x[1]) * 1e-6 + moved / (x[2] * largest)
        return np.asarray(np.log(predicted / seconds))

    top = min(1.5, peak / largest)
    result = least_squares(
        errors, [5.0, 1.0, 0.9 * top, 4.0], loss="soft_l1", f_scale=0.1, x_scale=[1.0, 1.0, 0.1, 1.0],
        bounds=([0.0, 0.0, 0.05, 0.0], [1000.0, 100.0, top, 100.0]),
    )  # fmt: skip
    x, error = result.x, errors(result.x)
    return CollectiveFit(
        _microseconds(x[0]) if sizes > 1 else 0.0, _microseconds(x[1]),
        round_to(float(x[2]) * largest * 0.9999), round_to(float(x[3]) * 1e6, 3) if x[3] > 1e-6 else 0.0,
        Residuals.of(error), Residuals.of(error[wire > 1e6]),
    )  # fmt: skip


def fit_node(rows: list[dict[str, str]], peak: float, at_ranks: int = 0) -> dict[str, CollectiveFit]:
    """One fit for each op in one GPU's rows; the median of NCCL versions. at_ranks: that group size only."""
    fits = {}
    for theirs, ours in OPS.items():
        mine = [row for row in rows if row["op"] == theirs and at_ranks in (0, int(row["num_gpus"]))]
        if not mine:
            continue
        keys = sorted({(int(r["num_gpus"]), int(r["message_elements_or_bytes"])) for r in mine})
        groups: dict[tuple[int, int], list[dict[str, str]]] = {key: [] for key in keys}
        for row in mine:
            groups[int(row["num_gpus"]), int(row["message_elements_or_bytes"])].append(row)
        seconds = np.array([np.median(column(groups[key], "latency_s")) for key in keys])
        ranks = np.array([float(key[0]) for key in keys])
        size = np.array([float(key[1] * ELEMENT_BYTES) for key in keys])
        fits[ours] = fit_collective(ours, ranks, size, seconds, peak)
    return fits


def fit_timed(rows: list[dict[str, str]], peak: float) -> CollectiveFit:
    """All-reduces of one group size by bytes (components.csv: num_gpus, params.size_bytes, seconds)."""
    ranks, seconds = column(rows, "num_gpus"), column(rows, "value")
    size = np.array([float(params(row)["size_bytes"]) for row in rows])
    return fit_collective("all_reduce", ranks, size, seconds, peak)


@dataclass(frozen=True)
class OverNodes:
    """Curves over the NICs of one network (machines.yaml, `networks`), by operation, and how each was had."""

    nic: float
    fits: dict[str, CollectiveFit]
    tags: dict[str, Tag]
    sources: dict[str, str]

    def with_dispatch(self, fit: CollectiveFit, source: str) -> "OverNodes":
        """With the curve of kernels that send a row once to a node."""
        tag: Tag = "measured" if fit.residuals.rows else "assumed"
        return replace(
            self, fits={**self.fits, "dispatch": fit}, tags={**self.tags, "dispatch": tag},
            sources={**self.sources, "dispatch": source},
        )  # fmt: skip


def fit_over_nodes(op: str, rows: list[dict[str, str]], nic: float, node: int = 8) -> CollectiveFit:
    """One op of nccl_over_nodes.csv by what a NIC carries, as mopsim.cost.communication counts it. Sums of
    more than 1 MB over two nodes are left out: NVLink bounds them."""
    ranks, size, seconds = (column(rows, name) for name in ("num_gpus", "size_bytes", "seconds"))
    nodes = ranks / node
    if op == "all_to_all":
        return _fit(ranks, size * (ranks - node) / ranks, seconds, nic)
    summed = op == "all_reduce"
    kept = (nodes > 2) | (size <= 2**20) | (not summed)
    wire = wire_bytes(op, nodes if summed else ranks, size / node)
    return _fit(nodes[kept], wire[kept], seconds[kept], nic)


def other_network(known: OverNodes, nic: float, delays: float, why: str) -> OverNodes:
    """The curves of another by the NICs' rates, delays times `delays`, and sizes at half rate by both."""
    fits = {
        op: replace(
            fit, latency=round_to(fit.latency * delays, 3),
            bandwidth=round_to(fit.bandwidth * nic / known.nic),
            latency_per_rank=round_to(fit.latency_per_rank * delays, 3),
            bytes_half=round_to(fit.bytes_half * delays * nic / known.nic, 3),
        )
        for op, fit in known.fits.items()
    }  # fmt: skip
    sources = {op: f"{source}; {why}" for op, source in known.sources.items()}
    return OverNodes(nic, fits, dict.fromkeys(fits, "assumed"), sources)


def at_length(op: str, ranks: int, size: float, rate: float, like: CollectiveFit) -> CollectiveFit:
    """The curve of another that has `rate` (bytes/s of a rank) in a buffer of `size`."""
    wire = float(wire_bytes(op, np.array([float(ranks)]), np.array([size]))[0])
    return replace(like, bandwidth=round_to(rate * (1 + (like.bytes_half / wire) ** RAMP)))


def check_against_vtrain(rows: list[dict[str, str]], fit: CollectiveFit, gpu: str = "A100") -> Residuals:
    """Errors of a fitted all-reduce on another lab's timings of the same GPU: nothing is fitted here."""
    mine = [row for row in rows if row["gpu"] == gpu]
    ranks, size, seconds = (column(mine, name) for name in ("n_gpus", "size_bytes", "time_s"))
    wire = wire_bytes("all_reduce", ranks, size)
    moved = wire * (1 + (fit.bytes_half / wire) ** RAMP)
    predicted = fit.latency + ranks * fit.latency_per_rank + moved / fit.bandwidth
    return Residuals.of(np.asarray(np.log(predicted / seconds)))
