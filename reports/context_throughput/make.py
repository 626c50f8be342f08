"""Makes this report: python -m reports.context_throughput.make [--budget N] [--jobs N], a quarter of an hour
on two cores.

The four networks of the papers on their machines; what the papers leave unsaid is varied for the first.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import mopsim
from mopsim.common import io
from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import ContextCase, Curve, Task, nested, sweep, totals
from mopsim.report.context import case_name, curves_json, to_json
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.strategies import STACKS
from reports.context_throughput.page import write_context
from reports.context_throughput.variants import OFFLOADED, VARIANTS, Variant
from reports.context_throughput.words import Study, summary

PAPERS = (("mop_120b", 2), ("mop_241b", 4), ("mop_667b", 8), ("mop_1t", 12))
"""Networks and nodes of 8 H200 of arXiv 2607.01844 and 2609.14306."""
LENGTHS = tuple(2**power for power in range(16, 25))
TOKENS_PER_DEVICE = 128 * 1024
HARDWARE = "h200-sxm-141g"


def main() -> None:
    """Sweep all and write the report beside this file, or into --out."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--budget", type=int, default=24, help="simulations per length")
    asked.add_argument("--jobs", type=int, default=0)
    asked.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = asked.parse_args()
    hardware = load_profile(HARDWARE)
    cases = [ContextCase(load_model(name), hardware, nodes, TOKENS_PER_DEVICE) for name, nodes in PAPERS]
    study, found = studied(cases, contenders(), VARIANTS, LENGTHS, options.budget, options.jobs)
    facts = {
        "command": f"python -m reports.context_throughput.make --budget {options.budget}",
        "model": "; ".join(f"{case.model.name} (digest {io.digest(case.model)})" for case in cases),
        "profile": f"{hardware.name} (digest {io.digest(hardware)})",
        "version": mopsim.__version__,
    }
    write_context(options.out, study, facts, assumptions(cases, options.budget))
    made = to_json(cases, study.curves, study.contenders, LENGTHS)
    made["variants"] = [
        {"name": one.name, "label": one.label, "curves": curves_json(curves)}
        for one, curves in study.variants
    ]
    made |= {"facts": facts, "version": mopsim.__version__, "simulated": totals(found.values())["simulated"]}
    io.write_json(str(options.out / "context.json"), made)
    print(summary(study))


def studied(
    cases: Sequence[ContextCase],
    known: Sequence[Contender],
    variants: Sequence[Variant],
    lengths: Sequence[int],
    budget: int,
    jobs: int,
) -> tuple[Study, dict[tuple[str, ...], Curve]]:
    """The curves by case and contender, and by variant."""
    tasks = plan(cases, known, variants, lengths, budget)
    found: dict[tuple[str, ...], Curve] = {}
    for key, curve in sweep(tasks, jobs):
        found[key] = curve
        print(f"{len(found)} of {len(tasks)}: {' '.join(key)}", flush=True)
    return gather(cases, known, variants, lengths, found), found


def plan(
    cases: Sequence[ContextCase],
    contenders: Sequence[Contender],
    variants: Sequence[Variant],
    lengths: Sequence[int],
    budget: int,
) -> list[Task]:
    """A task a curve; the base variant is the first case itself."""
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
    return tasks


def gather(
    cases: Sequence[ContextCase],
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


def assumptions(cases: Sequence[ContextCase], budget: int) -> list[str]:
    """What the numbers rest on, beside the profile."""
    first = cases[0]
    lines = [
        "symbols, as in the papers: D ranks share a sequence (CP), H is the hidden size",
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
        f"programs as their stacks describe them (MoP on {STACKS['mop']}, FSDP2 on {STACKS['fsdp2']}), whose "
        "attention is cuDNN's, FlashAttention-2 with heads wider than 128: kernels at their fitted rates, no "
        "jitter, no fragmentation; what the host does is simulated, and hidden at these lengths",
    ]
    for case in cases:
        lines += [f"{case.model.name}: {' '.join(text.split())}" for text in case.model.assumptions]
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    main()
