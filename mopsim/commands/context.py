"""`mopsim context`: context length against throughput, for MoP and for FSDP2 under restrictions."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mopsim
from mopsim.api.inputs import Inputs, facts, read_routing
from mopsim.commands.console import human
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.common.units import parse_count
from mopsim.context import CONTENDERS, VARIANTS, Case, Contender, Curve, Point, Task, Variant, nested, sweep
from mopsim.context.contenders import OFFLOADED
from mopsim.context.sweep import totals
from mopsim.report.context import write_context
from mopsim.report.context_words import Study, case_name, finding, summary
from mopsim.report.tables import describe
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec

PAPERS = (("mop_120b", 2), ("mop_241b", 4), ("mop_667b", 8), ("mop_1t", 12))
"""Networks and nodes of 8 H200 of arXiv 2607.01844 and 2609.14306."""


@dataclass(frozen=True)
class Order:
    """What is asked, as typed on the command line."""

    models: Sequence[str]
    nodes: Sequence[int]
    hardware: str
    lengths: str
    tokens_per_device: str
    contenders: str
    variants: str
    budget: int
    jobs: int
    routing: str


def run(order: Order, out: str, json: str | None) -> None:
    """Sweep, show, write the report into `out`."""
    check_outputs({"--json": json}, {"--out": out})
    cases, lengths = read(order)
    contenders, variants = chosen(order.contenders), varied(order.variants)
    tasks = plan(cases, contenders, variants, lengths, order.budget)
    console = human(json)
    found: dict[tuple[str, ...], Curve] = {}
    with progress(console, "sweeping", len(tasks)) as shown:
        for key, curve in sweep(tasks, order.jobs or min(4, os.cpu_count() or 1)):
            found[key] = curve
            shown(len(found), " ".join(key))
    study = gather(cases, contenders, variants, lengths, found)
    made_by = stated(cases)
    write_context(Path(out), study, made_by, assumptions(cases, order.budget))
    made = to_json(study, made_by, totals(found.values()))
    io.write_json(str(Path(out) / "context.json"), made)
    console.print(summary(study))
    for case, curves in zip(study.cases, study.curves, strict=True):
        console.print(f"{case_name(case)}: {finding(case, curves)}")
    console.print(f"Written: {Path(out) / 'index.md'}")
    if json:
        io.write_json(json, made)


def read(order: Order) -> tuple[list[Case], list[int]]:
    """(cases, lengths). Raises MopError in one line."""
    models, nodes = list(order.models), list(order.nodes)
    if not models and not nodes:
        models, nodes = [name for name, _ in PAPERS], [count for _, count in PAPERS]
    if len(models) != len(nodes):
        raise MopError(f"--nodes: {len(nodes)} given for {len(models)} of --model, one each is needed")
    lengths = sorted(
        {parse_count(text.strip(), "--seq-len") for text in order.lengths.split(",") if text.strip()}
    )
    if not lengths:
        raise MopError(f"--seq-len: {order.lengths!r} holds no length")
    tokens = parse_count(order.tokens_per_device, "--tokens-per-device")
    routing = read_routing(order.routing)
    training = TrainSpec(seq_len=lengths[-1], global_batch=1, routing=routing)
    hardware = load_profile(order.hardware)
    cases = []
    for name, count in zip(models, nodes, strict=True):
        if not 0 < count <= 65536:
            raise MopError(f"--nodes: {count} must lie between 1 and 65,536")
        model = load_model(name)
        training.check_model(model)
        cases.append(Case(model, hardware, count, tokens, routing=routing))
    return cases, lengths


def chosen(text: str) -> list[Contender]:
    """The contenders of a comma-separated list, with MoP and the freest FSDP2. Raises MopError."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [one.name for one in CONTENDERS]
    for name in sorted(names):
        if name not in known:
            raise MopError(f"--contender: {name!r} is not one of {', '.join(known)}")
    return [one for one in CONTENDERS if not names or one.name in names | {"mop", "fsdp2"}]


def varied(text: str) -> list[Variant]:
    """The assumptions to change: all, none, or a comma-separated list. Raises MopError."""
    if text == "none":
        return []
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [one.name for one in VARIANTS]
    for name in sorted(names - {"all"}):
        if name not in known:
            raise MopError(f"--vary: {name!r} is not none, all, or one of {', '.join(known)}")
    return [one for one in VARIANTS if "all" in names or one.name in names]


def plan(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    variants: Sequence[Variant],
    lengths: Sequence[int],
    budget: int,
) -> list[Task]:
    """A task a curve, the largest networks first; the base variant is the first case itself."""
    tasks = [
        Task((case_name(case), one.name), case, one, lengths, budget) for case in cases for one in contenders
    ]
    shorter = [length for length in lengths if length >= 128 * 1024] or list(lengths)
    for variant in variants:
        if variant.name != "base":
            case = variant.change(cases[0])
            asked = [length for length in shorter if not variant.lengths or length in variant.lengths]
            tasks += [
                Task((variant.name, one.name), case, one, asked, budget)
                for one in contenders
                if one.name != "fsdp2_node_chunked"
            ]
            if variant.offloaded:
                tasks.append(Task((variant.name, OFFLOADED.name), case, OFFLOADED, asked[:1], budget))
    weight = {task.key: task.case.world_size * task.case.model.num_hidden_layers for task in tasks}
    return sorted(tasks, key=lambda task: -weight[task.key])


def gather(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    variants: Sequence[Variant],
    lengths: Sequence[int],
    found: Mapping[tuple[str, ...], Curve],
) -> Study:
    """The curves by case and contender, and by variant."""

    def of(name: str) -> dict[str, Curve]:
        known = [*contenders, OFFLOADED]
        return nested({one.name: found[name, one.name] for one in known if (name, one.name) in found})

    curves = [of(case_name(case)) for case in cases]
    changed = [(one, curves[0] if one.name == "base" else of(one.name)) for one in variants]
    return Study(cases, curves, changed, lengths, contenders)


def stated(cases: Sequence[Case]) -> dict[str, str]:
    """What the report says of its own making."""
    first = cases[0]
    inputs = Inputs(
        first.model, first.hardware, first.nodes, TrainSpec(seq_len=1, global_batch=1), first.precision
    )
    said = facts(inputs, " ".join(["mopsim", *sys.argv[1:]]))
    said["model"] = "; ".join(f"{case.model.name} (digest {io.digest(case.model)})" for case in cases)
    return said


def assumptions(cases: Sequence[Case], budget: int) -> list[str]:
    """What the numbers rest on, beside the profile."""
    first = cases[0]
    lines = [
        f"{first.tokens_per_device:,} tokens of each device in a step, for all contenders, in as many "
        "microbatches as are fastest; at least one sequence for each group of ranks that shares one; where "
        "that does not fit, one sequence for each group, and as few groups as the rules allow",
        f"routing {first.routing}; products and activations in {first.precision}; FSDP2 holds fp32 "
        "parameters, as torch's mixed precision does, MoP bf16 ones and fp32 master weights",
        "no contender offloads what its software does not: FSDP2 parameters, gradients and optimizer state "
        "together, MoP the optimizer state and the layer inputs",
        f"the best of {budget} simulations at every length, lengths doubling; the curve ends at the first "
        "length where none fits; the best of a length is tried at its neighbours with as many tokens a rank, "
        "and a looser contender may use what a stricter one found",
        "an ideal implementation: kernels at their fitted rates, no stragglers, no fragmentation; what the "
        "host does is simulated, and hidden at these lengths",
    ]
    for case in cases:
        lines += [f"{case.model.name}: {' '.join(text.split())}" for text in case.model.assumptions]
    return list(dict.fromkeys(lines))


def to_json(study: Study, facts: dict[str, str], spent: dict[str, Any]) -> dict[str, Any]:
    """SI units: tokens, seconds, bytes."""
    return {
        "lengths": list(study.lengths),
        "contenders": {one.name: {"label": one.label, "rules": one.rules} for one in study.contenders},
        "cases": [
            {
                "model": case.model.name,
                "hardware": case.hardware.name,
                "nodes": case.nodes,
                "devices": case.world_size,
                "tokens_per_device": case.tokens_per_device,
                "curves": _curves_json(curves),
            }
            for case, curves in zip(study.cases, study.curves, strict=True)
        ],
        "variants": [
            {"name": variant.name, "label": variant.label, "curves": _curves_json(curves)}
            for variant, curves in study.variants
        ],
        "facts": facts,
        "version": mopsim.__version__,
        **{name: value for name, value in spent.items() if name == "simulated"},
    }


def _curves_json(curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {
        name: {
            "longest": curve.longest.seq_len if curve.longest else None,
            "longest_with_the_whole_step": curve.whole.seq_len if curve.whole else None,
            "stopped_by": curve.end.stopped_by if curve.end else None,
            "strategy_at_longest": _strategy(curve.longest),
            "points": [_point_json(point) for point in curve.points],
        }
        for name, curve in curves.items()
    }


def _strategy(point: Point | None) -> Any:
    return io.to_plain(point.result.strategy) if point and point.result else None


def _point_json(point: Point) -> dict[str, Any]:
    result = point.result
    found: dict[str, Any] = {
        "seq_len": point.seq_len,
        "global_batch": point.global_batch,
        "smallest_step": point.small,
        "verdict": point.verdict,
        "stopped_by": point.stopped_by or None,
        "tokens_per_s_per_device": point.throughput,
    }
    if result:
        found |= {
            "step_time_s": result.step_time,
            "mfu": result.mfu,
            "peak_memory_bytes": result.peak_memory,
            "memory_limit_bytes": result.memory_limit,
            "memory_by_category_bytes": result.memory_by_category,
            "host_memory_bytes": result.host_memory,
            "host_limit_bytes": result.host_limit,
            "strategy": describe(result.strategy),
        }
    return found
