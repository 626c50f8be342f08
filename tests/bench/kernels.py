"""Kernels that a layer launches on the planned GPU, forward and backward, counted on tensors without data.

`PYTHONPATH=. python tests/bench/kernels.py reports/executor` writes kernels.md and kernels.json.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mopsim.common import io
from mopsim.spec.plan import Plan
from tests.exec.kernel_counts import KERNELS, counted_step, layer_kernels
from tests.exec.test_kernels import planned

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one chunk": (0, {}),
    "one chunk, CP=8": (0, {"context_parallel": 8}),
    "4 chunks of 8,192 tokens": (8192, {}),
    "10 chunks (the most)": (2048, {}),
}


ASKED = 400

HEAD = f"""# Kernels a layer

One layer of Qwen3-30B-A3B on 8 GPUs under `mopexec-flat`: 16 experts and 32K tokens a rank, forward,
recompute and backward, without the update; {ASKED} are asked for. An op that torch is given counts as one, a
collective too. `at most`: compiled functions and the norm's backward by their kernels as Inductor makes them
for a CPU (`KERNELS`, tests/exec/kernel_counts.py); a GPU's were not at hand. A sort is several inside torch.
Routes are as a profile has them: the router's own choice and its exchange of counts, once a layer, are not
counted. Before grouped products and fused rows it was 4,326 in one chunk and 5,686 in four; before orders
came without a sort, 181, 399 and, in ten, 915; before orders, route weights and the router's backward were
once a layer for all chunks, 155, 323 and 725.
Command: `PYTHONPATH=. python tests/bench/kernels.py reports/executor`.
"""


def measure() -> dict[str, dict[str, Any]]:
    """Launches by case, and of each component and phase."""
    found = {}
    for name, (chunk_tokens, options) in CASES.items():
        plan = planned(chunk_tokens, **options)
        counted: Counter[tuple[str, str]] = layer_kernels(plan)
        by_place = {f"{component} {phase}": count for (component, phase), count in sorted(counted.items())}
        total = sum(counted.values())
        found[name] = {"kernels": total, "at_most": total + _more(plan), "by_place": by_place}
    return found


def _more(plan: Plan) -> int:
    """Kernels of a layer's ops beyond one each."""
    layers = plan.model.num_hidden_layers
    by_op = counted_step(plan).by_op
    return sum((count - 1) * by_op[f"mop::{name}"] for name, count in KERNELS.items()) // layers


def table(found: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown."""
    places = list(dict.fromkeys(place for row in found.values() for place in row["by_place"]))
    lines = [
        HEAD,
        "| | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
        "| all | " + " | ".join(str(row["kernels"]) for row in found.values()) + " |",
        "| at most | " + " | ".join(str(row["at_most"]) for row in found.values()) + " |",
    ]
    for place in places:
        lines.append(
            f"| {place} | " + " | ".join(str(r["by_place"].get(place, 0)) for r in found.values()) + " |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    found = measure()
    io.write_json(folder / "kernels.json", found)
    io.write_text(folder / "kernels.md", table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
