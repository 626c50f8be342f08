"""How many cases would get another stack by their words alone: python -m reports.validation.words.

Every case as a row that names no stack, of a source that nobody knows (adr/0076). The columns that a case no
longer has are empty, so that variants of one program which rules tell by them count as another.
"""

from collections import Counter
from pathlib import Path

from mopsim.validate.case import Case, read_cases
from mopsim.validate.facts import facts, families, stack_names
from reports.validation.make import CASES


def found(case: Case) -> str:
    """The stack that the case's words give it."""
    strategy = case.strategy
    sharded = strategy.name in ("fsdp", "zero_offload")
    row = {
        "source": "unknown",
        "source_ref": case.source.ref,
        "notes": case.source.notes,
        "model": case.model_name,
        "gpu": case.hardware,
        "sharding": f"zero{strategy.dense.zero}" if sharded else "zero1",
        "precision": case.precision,
        "recompute": str(strategy.activations.recompute),
        "routing": "natural" if case.network().num_local_experts else "dense",
        "tp": str(strategy.dense.tensor_parallel),
        "loss": "chunked" if strategy.vocabulary.loss == "chunked" else "",
        "dispatcher": strategy.experts.token_dispatcher,
    }
    return facts(row).row["stack"] or families()[strategy.name].stack


def main() -> None:
    """Print the number of cases, of those with another stack, and the pairs of stacks."""
    cases = [case for path in sorted(Path(CASES).glob("*.jsonl")) for case in read_cases(path)]
    pairs = Counter((case.stack, found(case)) for case in cases)
    other = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    wrong = sum(other.values())
    print(f"{len(cases)} cases, {wrong} with another stack ({len(stack_names())} sources are known by name)")
    for (own, word), count in sorted(other.items(), key=lambda item: -item[1]):
        print(f"{count:5d} {own} -> {word}")


if __name__ == "__main__":
    main()
