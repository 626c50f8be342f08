"""What the host does to order documents of packed rows that context-parallel ranks exchange by all-to-all.

    git clone --depth 1 --branch v2.17 https://github.com/NVIDIA/TransformerEngine
    python -m reports.host.te_ordered --sources TransformerEngine/transformer_engine \\
        --json reports/host/te_ordered.json

Transformer Engine 2.10 to 2.17 index the tokens of each tensor by a torch.arange for every piece of every
document, two pieces for each rank: once it has arrived (queries, keys, values and the output's gradient) and
before it leaves (the output and the other three's gradients). Measured as te_layers.py measures layers, for
several ranks and numbers of documents: Linears of a piece, by the line through the pieces. On a CPU nothing
waits for the two ends of a piece that it reads; on a device both are read there (READS).
"""

import argparse
import ast
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import torch

from reports.host import te_layers

WAYS = {
    "arrived": "reorder_seq_chunks_after_a2a_before_attn_thd",
    "leaving": "reorder_seq_chunks_before_a2a_after_attn_thd",
}
TENSORS = {"forward": {"arrived": 3, "leaving": 1}, "backward": {"arrived": 1, "leaving": 3}}
VERSION = "2.17.0"
RANKS, DOCUMENTS, READS, ROUNDS = (2, 4, 8), (4, 8, 16, 32), 2, 60


def functions(sources: Path) -> dict[str, Callable[..., torch.Tensor]]:
    """The two functions of its sources, without the rest of their module."""
    path = sources / "pytorch/attention/dot_product_attention/context_parallel.py"
    whole = ast.parse(path.read_text())
    parts: list[ast.stmt] = [
        one for one in whole.body if isinstance(one, ast.FunctionDef) and one.name in WAYS.values()
    ]
    found: dict[str, Any] = {"torch": torch, "itertools": itertools}
    exec(compile(ast.Module(parts, []), str(path), "exec"), found)
    return {way: found[name] for way, name in WAYS.items()}


def ordered(order: Callable[..., torch.Tensor], way: str, ranks: int, documents: int) -> list[float]:
    pieces = 2 * ranks
    ends = torch.arange(documents + 1, dtype=torch.int32) * pieces
    rows = torch.zeros(documents * pieces, 2, 4, dtype=torch.bfloat16)
    places = torch.tensor([*range(0, pieces, 2), *range(pieces - 1, 0, -2)], dtype=torch.int32)
    begin = te_layers.clock()
    order(rows, ends, *(places,) * (way == "arrived"), ranks)
    over = te_layers.clock()
    return [begin, over, over]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    calls: dict[str, te_layers.Call] = {
        f"{way} on {ranks}, {documents}": partial(ordered, order, way, ranks, documents)
        for way, order in functions(given.sources).items()
        for ranks in RANKS
        for documents in DOCUMENTS
    }
    took = te_layers.timed(calls, ROUNDS)

    def piece(way: str, ranks: int) -> float:
        counts = [2 * ranks * documents for documents in DOCUMENTS]
        each = linear_regression(counts, [took[f"{way} on {ranks}, {n} forward"] for n in DOCUMENTS])
        return each.slope

    pieces = {way: mean(piece(way, ranks) for ranks in RANKS) for way in WAYS}
    passes = {
        phase: sum(count * pieces[way] for way, count in tensors.items())
        for phase, tensors in TENSORS.items()
    }
    reads = {phase: READS * sum(tensors.values()) for phase, tensors in TENSORS.items()}
    found = {"calls": took, "piece": pieces, "passes": passes, "reads": reads}
    te_layers.written(given.json, "", took, {"transformer_engine": VERSION} | found)


if __name__ == "__main__":
    main()
