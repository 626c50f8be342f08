"""From a row of a space to its strategy: one table of what each column sets."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from msgspec.structs import replace

from mopsim import strategies
from mopsim.common.units import DTYPE_BYTES
from mopsim.search.axes import most_chunks
from mopsim.search.problem import (
    BESIDE,
    CHUNKED,
    DEVICE,
    DISPATCHERS,
    EXCHANGES,
    LEANEST,
    PARTS,
    RECOMPUTED,
    SAVED,
    STATES,
    Problem,
    offloaded,
)
from mopsim.search.problem import tokens as tokens_of
from mopsim.search.stages import IDEAL, layers_of
from mopsim.spec.layout import ceil_div
from mopsim.spec.strategy import CAST, Experts, Strategy
from mopsim.strategies import AS_STACK

Row = dict[str, int]


def build(family: str, problem: Problem, row: Row) -> Strategy:
    """The strategy of one row. Raises SpecError where a relation that the columns do not hold breaks."""
    given = {name: SETTINGS[name](problem, row) for name in _keywords(family)}
    strategy: Strategy = getattr(strategies, family)(problem.world_size, **given)
    if problem.precision in CAST:
        precision = replace(strategy.precision, matmul=problem.precision)
        strategy = replace(strategy, precision=precision)
    stack = problem.software(family)
    return stack.resolve(replace(strategy, stack=stack.name))


@cache
def _keywords(family: str) -> list[str]:
    """The keywords of a family that columns set."""
    return [name for name in inspect.signature(getattr(strategies, family)).parameters if name in SETTINGS]


def _slices(column: str) -> Callable[[Problem, Row], int]:
    """Tokens of a slice; 0 (= all at once) where there is one."""
    return lambda problem, row: 0 if row[column] <= 1 else ceil_div(tokens_of(problem, row), row[column])


def _column(name: str) -> Callable[[Problem, Row], int]:
    return lambda problem, row: row[name]


def _budget(problem: Problem, row: Row) -> int:
    """Bytes of the host for a part of the layer inputs; 0 = no cap."""
    if not row["boundary_host"] or row["boundary_parts"] == PARTS:
        return 0
    each = tokens_of(problem, row) * problem.model.hidden_size * int(DTYPE_BYTES[problem.compute])
    return int(offloaded(problem.model.num_hidden_layers, row["boundary_parts"])) * each


SETTINGS: dict[str, Callable[[Problem, Row], Any]] = {
    "micro_batch": _column("micro_batch"),
    "tensor_parallel": _column("tensor"),
    "pipeline_parallel": _column("pipeline"),
    "virtual_stages": _column("virtual_stages"),
    "stage_layers": lambda problem, row: (
        layers_of(problem.model, row["pipeline"], row["virtual_stages"], row["layout"]) or ()
    ),
    "context_parallel": _column("sequence"),
    "context_exchange": lambda problem, row: EXCHANGES[row["exchange"]],
    "expert_parallel": _column("experts"),
    "expert_tensor_parallel": _column("expert_tensor"),
    "expert_fsdp": _column("expert_shard"),
    "rank_placement": lambda problem, row: "strided" if row["strided"] else "contiguous",
    "token_dispatcher": lambda problem, row: DISPATCHERS[row["dispatcher"]],
    "overlap": lambda problem, row: replace(
        AS_STACK, experts=bool(row["overlap"] and row["layout"] != IDEAL)
    ),
    "vocab_parallel": _column("vocabulary"),
    "fsdp": _column("dense_shard"),
    "expert_chunk_tokens": lambda problem, row: (
        ceil_div(tokens_of(problem, row), max(row["chunks"], 1)) if problem.model.num_local_experts else 0
    ),
    "max_expert_chunks": lambda problem, row: max(most_chunks(problem), Experts().max_chunks),
    "ffn_chunk_tokens": _slices("ffn_slices"),
    "loss": lambda problem, row: "chunked" if row["loss"] == CHUNKED else "full",
    "loss_chunk_tokens": _slices("loss_slices"),
    "optimizer": lambda problem, row: STATES[row["state"]],
    "optimizer_on_host": lambda problem, row: 0.0 if row["state"] == DEVICE else row["state_parts"] / PARTS,
    "optimizer_bucket_params": _column("bucket"),
    "optimizer_overlap": lambda problem, row: BESIDE[row["beside"]],
    "offload_inputs": lambda problem, row: bool(row["boundary_host"]),
    "offload_inputs_bytes": _budget,
    "recompute": lambda problem, row: (
        "full" if row["recompute"] else "selective" if row["modules"] else "none"
    ),
    "recompute_modules": lambda problem, row: RECOMPUTED[row["modules"] % LEANEST],
    "save_ops": lambda problem, row: SAVED[row["saved"]] if row["recompute"] else (),
    "offload": lambda problem, row: bool(row["offload"]),
    "reshard_after_forward": lambda problem, row: bool(row["reshard"]),
    "dtype": lambda problem, row: problem.compute,
}
"""Keyword of a family -> what a row says of it."""
