"""Makes this report: python -m reports.papers.make (a minute on two cores).

The stated layouts of the papers' own runs, simulated: how fast, where memory ends, what separates the two.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import mopsim
from mopsim.common import io
from mopsim.graph import flops_per_token, total_params
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from reports.papers.published import DEGREES, POINTS, K, Point

HARDWARE = "h200-sxm-141g"
Row = tuple[Point, mopsim.Simulation]


def simulated(point: Point) -> mopsim.Simulation:
    """The point's step in the stated layout, one sequence for each group of ranks that shares one."""
    ranks = 8 * point.nodes
    if point.program == "mop":
        degree = DEGREES[point.seq_len]
        strategy = mopsim.mop(
            context_parallel=degree, expert_parallel=ranks, vocab_parallel=8, grad_dtype="bfloat16"
        )
        groups, stack = ranks // degree, "mop-papers"
    elif point.model == "mop_120b":  # FSDP 1, EP 16, CP 16, nothing offloaded
        strategy = mopsim.fsdp2(context_parallel=16, context_exchange="ring", expert_parallel=16)
        groups, stack = 1, "torchtitan"
    else:  # FSDP 3, EP 96, CP 4, TP 8, offload
        strategy = mopsim.fsdp2(
            tensor_parallel=8, context_parallel=4, context_exchange="ring", expert_parallel=96, offload=True
        )
        groups, stack = 3, "torchtitan"
    return mopsim.simulate(
        point.model,
        HARDWARE,
        nodes=point.nodes,
        strategy=strategy,
        seq_len=point.seq_len,
        global_batch=groups,
        stack=stack,
    )


def peak_flops() -> float:
    """Dense bf16 FLOP/s of the card, from its profile."""
    return next(curve.peak.si for curve in load_profile(HARDWARE).device.matmul if curve.dtype == "bfloat16")


def shape_errors(rows: Sequence[Row]) -> list[float]:
    """How far each printed rate's ratio to the simulated one lies from the first one's, as a fraction: what
    is left once one point is fixed.
    """
    ratios = [one.tokens_per_s_per_device / (point.tokens_per_s or 1.0) for point, one in rows]
    return [ratio / ratios[0] - 1 for ratio in ratios]


def resident_bytes(point: Point) -> int:
    """fp32 parameter and gradient shards of a rank: on the device where only the optimizer is offloaded."""
    params = mopsim.load_model(point.model)
    return 8 * _total(params) // (8 * point.nodes)


def kept_bytes(point: Point) -> int:
    """What the stated offload of the 1T baseline leaves on the device, which torch's does not."""
    return resident_bytes(point) if point.model == "mop_1t" else 0


def attention_rate(model_name: str, first: Point, last: Point, passes: float) -> float:
    """FLOP/s that attention needs if it alone makes the later point slower, causal half counted. passes: of
    the forward's FLOP, 4.5 with full recomputation (1 + 1 + 2.5), 3.5 without.
    """
    model = load_model(model_name)
    width = model.num_attention_heads * model.head_dim
    assert first.tokens_per_s is not None
    assert last.tokens_per_s is not None
    more = 4 * width * (last.seq_len - first.seq_len) / 2 * model.num_hidden_layers * passes
    return more / (1 / last.tokens_per_s - 1 / first.tokens_per_s)


def model_flops(point: Point) -> float:
    """FLOP/s of a GPU at a printed rate, recomputation not counted: 6 for each parameter that a token meets,
    and the causal half of attention.
    """
    flops = 3 * sum(flops_per_token(load_model(point.model), point.seq_len).values())
    return flops * (point.tokens_per_s or 0.0)


def _printed(point: Point) -> str:
    return "runs" if point.tokens_per_s else "out of memory"


def _of_curve(row: Row) -> tuple[str, str, str]:
    point = row[0]
    return point.source, point.model, point.program


def _total(model: object) -> int:
    return total_params(model)  # type: ignore[arg-type]


def _speed_tables(rows: Sequence[Row]) -> Iterable[str]:
    for (source, model, program), group in groupby(rows, _of_curve):
        ran = [row for row in group if row[0].tokens_per_s]
        yield f"\n### {model}, {program}, {source}\n"
        yield "| context | printed | simulated | simulated / printed | shape | exposed, of the step | peak |"
        yield "|---:|---:|---:|---:|---:|---|---:|"
        for (point, one), shape in zip(ran, shape_errors(ran), strict=True):
            waits = sorted(one.exposed_s.items(), key=lambda item: -item[1])[:2]
            told = ", ".join(f"{kind} {seconds / one.step_time_s:.0%}" for kind, seconds in waits)
            yield (
                f"| {point.seq_len // K}K | {point.tokens_per_s:,.0f} | {one.tokens_per_s_per_device:,.0f} | "
                f"{one.tokens_per_s_per_device / (point.tokens_per_s or 1):.2f}x | {shape:+.0%} | {told} | "
                f"{one.peak_memory_bytes / 2**30:.1f} GiB |"
            )


def _memory_table(rows: Sequence[Row]) -> Iterable[str]:
    yield "\n| source | network | context | printed | peak | with weights and gradients kept | limit |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for point, one in rows:
        if point.program != "fsdp2":
            continue
        peak, kept = one.peak_memory_bytes, kept_bytes(point)
        yield (
            f"| {point.source} | {point.model} | {point.seq_len // K}K | {_printed(point)} | "
            f"{peak / 2**30:.1f} GiB | {f'{(peak + kept) / 2**30:.1f} GiB' if kept else ''} | "
            f"{one.memory_limit_bytes / 2**30:.1f} GiB |"
        )


def _attention_table() -> Iterable[str]:
    yield "\n| source | network | needs, recomputed | of the peak | needs, kept | of the peak |"
    yield "|---|---|---:|---:|---:|---:|"
    for (source, model), group in groupby(
        [point for point in POINTS if point.program == "mop"], lambda point: (point.source, point.model)
    ):
        points = list(group)
        rates = [attention_rate(model, points[0], points[-1], passes) for passes in (4.5, 3.5)]
        told = " | ".join(f"{rate / 1e12:,.0f} TFLOP/s | {rate / peak_flops():.0%}" for rate in rates)
        yield f"| {source} | {model} | {told} |"


def _ratios(rows: Sequence[Row]) -> list[float]:
    """Simulated over printed, of points with a printed rate."""
    return [one.tokens_per_s_per_device / point.tokens_per_s for point, one in rows if point.tokens_per_s]


def _ends(baselines: Sequence[Row]) -> Iterable[str]:
    """Of each length that is printed to run out, how far the simulated peak lies from the limit."""
    for point, one in baselines:
        if not point.tokens_per_s:
            above = (one.peak_memory_bytes + kept_bytes(point)) / one.memory_limit_bytes - 1
            yield f"{above:+.1%} ({point.model}, {point.seq_len // K}K)"


def page(rows: Sequence[Row]) -> str:
    """index.md."""
    first = [row for row in rows if _of_curve(row) == _of_curve(rows[0])]
    worst = max(abs(error) for error in shape_errors(first))
    shares = [model_flops(point) / peak_flops() for point in POINTS if point.program == "mop"]
    ratios = _ratios(first)
    later = [row for row in rows if row[0].source != rows[0][0].source and row[0].program == "mop"]
    baselines = [row for row in rows if row[0].program == "fsdp2"]
    template = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")
    return template.format(
        ratio=f"{statistics.geometric_mean(ratios):.1f}x",
        ratios=f"{min(ratios):.1f} to {max(ratios):.1f}",
        later=f"{min(_ratios(later)):.1f} to {max(_ratios(later)):.1f}",
        shares=f"{min(shares):.0%} to {max(shares):.0%}",
        worst=f"{worst:.0%}",
        ends=" and ".join(_ends(baselines)),
        baselines=f"{min(_ratios(baselines)):.0f} to {max(_ratios(baselines)):.0f}",
        speed="\n".join(_speed_tables(rows)),
        memory="\n".join(_memory_table(rows)),
        attention="\n".join(_attention_table()),
    )


def main() -> None:
    """Simulate every point and write index.md and papers.json beside this file, or into --out."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = asked.parse_args()
    rows = [(point, simulated(point)) for point in POINTS]
    io.write_text(options.out / "index.md", page(rows))
    made = [
        {
            "source": point.source,
            "model": point.model,
            "program": point.program,
            "seq_len": point.seq_len,
            "printed_tokens_per_s_per_device": point.tokens_per_s,
            "tokens_per_s_per_device": one.tokens_per_s_per_device,
            "peak_memory_bytes": one.peak_memory_bytes,
            "fits": one.fits,
        }
        for point, one in rows
    ]
    io.write_json(str(options.out / "papers.json"), {"hardware": HARDWARE, "points": made})


if __name__ == "__main__":
    main()
