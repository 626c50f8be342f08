"""What layers of Transformer Engine take of a host with a device, times what they took on a CPU.

python -m reports.validation.host_factor simulates the published runs of such layers (grades A and B) with
several factors in place of `on_a_device` of mopsim/graph/host_costs.yaml, ten minutes each on one core. It
prints the error of step time by factor, sources alike, and which factor all other sources choose for each.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from mopsim.graph.host_costs import ON_A_DEVICE
from mopsim.spec.stacks import load_stack
from mopsim.validate.case import Case, read_cases
from mopsim.validate.simulated import simulate_case

CASES, LAYERS = Path(__file__).parent / "cases", "transformer_engine"
FACTORS = (1.0, 1.15, 1.25, 1.35, 1.5)


def errors(cases: list[Case], factor: float) -> dict[str, list[float]]:
    """Relative errors of step time by source."""
    ON_A_DEVICE[LAYERS] = factor
    found: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        result = simulate_case(case, paced=False)
        if not result.error and case.measured.step_time:
            found[case.source.name].append(result.step_time / case.measured.step_time - 1)
    return found


def main() -> None:
    """Simulate and print."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--sources", nargs="*", help="names of files in cases/, without .jsonl (default: all)")
    names = asked.parse_args().sources or sorted(path.stem for path in CASES.glob("*.jsonl"))
    every = [case for name in names for case in read_cases(CASES / f"{name}.jsonl")]
    cases = [case for case in every if case.quality in "AB" and case.measured.step_time]
    cases = [case for case in cases if load_stack(case.strategy.stack).host.layers == LAYERS]
    means: dict[float, dict[str, float]] = {}
    for factor in FACTORS:
        found = errors(cases, factor)
        means[factor] = {source: fmean(map(abs, some)) for source, some in found.items()}
        bias = fmean(fmean(some) for some in found.values())
        print(f"{factor:.2f}: error {fmean(means[factor].values()):.2%}, bias {bias:+.2%}", flush=True)
    sources = means[FACTORS[0]]
    chosen = {one: min(FACTORS, key=lambda f: sum(means[f].values()) - means[f][one]) for one in sources}
    left_out = fmean(means[factor][one] for one, factor in chosen.items())
    print(f"chosen by the others: {dict(Counter(chosen.values()))}, error {left_out:.2%}")


if __name__ == "__main__":
    main()
