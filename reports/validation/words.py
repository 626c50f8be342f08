"""How many cases would get another stack by their words alone: python -m reports.validation.words.

Every case as a row that names no stack, of a source that nobody knows (adr/0076). The columns that a case no
longer has are empty, so that variants of one program which rules tell by them count as another. A stack with
its changes may be the program that another name stands for, on the run's card and for its strategy: both are
counted. A case whose name is the words' is not looked into.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mopsim.common import io
from mopsim.common.changes import changed
from mopsim.common.errors import MopError
from mopsim.spec.stack import Hides, Stack, StateDTypes
from mopsim.spec.stacks import load_stack
from mopsim.validate.case import Case, read_cases
from mopsim.validate.facts import facts, families, stack_names
from reports.validation.make import CASES


def found(case: Case) -> tuple[str, dict[str, Any]]:
    """The stack that the case's words give it, and what they change of it."""
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
    known, root = facts(row), "stack."
    changes = {
        name.removeprefix(root): value for name, value in known.settings.items() if name.startswith(root)
    }
    return known.row["stack"] or families()[strategy.name].stack, changes


def same(case: Case, name: str, changes: dict[str, Any]) -> bool:
    """Whether the case's program is, for its run, this stack with these changes."""
    try:
        other = changed(load_stack(name), changes, "stack_changes")
        return _running(case, other) == _running(case, case.program())
    except MopError:  # what the words change does not suit the stack
        return False


def _running(case: Case, program: Stack) -> tuple[object, ...]:
    """What a program is on the case's machine, for its strategy, of which the strategy has what it hides."""
    machine, plain = case.profile(), case.training.plain_attention(case.network())
    here = program.on_kind(machine.device_kind).on(machine.device.architecture, plain).behaviour
    strategy = program.resolve(case.strategy)
    return io.digest(replace(here, hides=Hides(), dtypes=StateDTypes(), has={})), strategy


def main() -> None:
    """Print the number of cases, of those with another stack, and the pairs of stacks."""
    cases = [case for path in sorted(Path(CASES).glob("*.jsonl")) for case in read_cases(path)]
    words = [(case, *found(case)) for case in cases]
    named = Counter((case.stack, name) for case, name, _ in words if case.stack != name)
    other = Counter(
        (case.stack, name)
        for case, name, changes in words
        if case.stack != name and not same(case, name, changes)
    )
    print(
        f"{len(cases)} cases, {named.total()} with another stack, {other.total()} with another program "
        f"({len(stack_names())} sources are known by name)"
    )
    for (own, word), count in named.most_common():
        print(f"{count:5d} {other[own, word]:5d} {own} -> {word}")


if __name__ == "__main__":
    main()
