"""From a row of a space to its strategy, family by family."""

from collections.abc import Callable

from msgspec.structs import replace

from mopsim.common.units import DTYPE_BYTES
from mopsim.search.problem import CHUNKED, EXCHANGES, PARTS, STATES, Problem, offloaded
from mopsim.search.problem import tokens as tokens_of
from mopsim.spec.layout import ceil_div
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import CAST, Strategy
from mopsim.strategies import STACKS, fsdp2, megatron, mop, zero_offload


def build(family: str, problem: Problem, row: dict[str, int]) -> Strategy:
    """The strategy of one row. Raises SpecError where a relation that the columns do not hold breaks."""
    strategy = BUILDERS[family](problem, row)
    if problem.precision in CAST:
        precision = replace(strategy.precision, matmul=problem.precision)
        strategy = replace(strategy, precision=precision)
    stack = problem.stack or load_stack(STACKS[family])
    strategy = stack.resolve(replace(strategy, stack=stack.name))
    return _within_host(problem, row, strategy)


def _within_host(problem: Problem, row: dict[str, int], strategy: Strategy) -> Strategy:
    """The strategy with a budget of the host for a part of the layer inputs."""
    if not row["boundary_host"] or row["boundary_parts"] == PARTS:
        return strategy
    each = tokens_of(problem, row) * problem.model.hidden_size * int(DTYPE_BYTES[strategy.precision.compute])
    budget = int(offloaded(problem.model.num_hidden_layers, row["boundary_parts"])) * each
    return replace(strategy, activations=replace(strategy.activations, host_budget=budget))


def _chunk(tokens: int, slices: int) -> int:
    """Tokens per slice; 0 (= all at once) for one slice."""
    return 0 if slices <= 1 else ceil_div(tokens, slices)


def _build_mop(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = tokens_of(problem, row)
    return mop(
        problem.world_size,
        sequence=row["sequence"],
        experts=row["experts"],
        vocabulary=row["vocabulary"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        expert_shard=row["expert_shard"],
        chunk_tokens=ceil_div(tokens, max(row["chunks"], 1)),
        ffn_chunk_tokens=_chunk(tokens, row["ffn_slices"]),
        loss_chunk_tokens=_chunk(tokens, row["loss_slices"]),
        state=STATES[row["state"]],
        bucket_params=row["bucket"],
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


def _build_fsdp2(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = tokens_of(problem, row)
    return fsdp2(
        problem.world_size,
        tensor=row["tensor"],
        sequence=row["sequence"],
        exchange=EXCHANGES[row["exchange"]],
        experts=row["experts"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        recompute="full" if row["recompute"] else "none",
        loss="chunked" if row["loss"] == CHUNKED else "full",
        loss_chunk_tokens=ceil_div(tokens, row["loss_slices"]),
        offload=bool(row["offload"]),
        reshard=bool(row["reshard"]),
        precision=problem.compute,
    )


def _build_zero_offload(problem: Problem, row: dict[str, int]) -> Strategy:
    tokens = tokens_of(problem, row)
    return zero_offload(
        problem.world_size,
        sequence=row["sequence"],
        experts=row["experts"],
        micro_batch=row["micro_batch"],
        dense_shard=row["dense_shard"],
        expert_shard=row["expert_shard"],
        loss="chunked" if row["loss"] == CHUNKED else "full",
        loss_chunk_tokens=ceil_div(tokens, row["loss_slices"]),
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


def _build_megatron(problem: Problem, row: dict[str, int]) -> Strategy:
    return megatron(
        problem.world_size,
        tensor=row["tensor"],
        pipeline=row["pipeline"],
        virtual_stages=row["virtual_stages"],
        sequence=row["sequence"],
        experts=row["experts"],
        expert_tensor=row["expert_tensor"],
        micro_batch=row["micro_batch"],
        recompute="full" if row["recompute"] else "none",
        boundary_tier="host" if row["boundary_host"] else "device",
        precision=problem.compute,
    )


BUILDERS: dict[str, Callable[[Problem, dict[str, int]], Strategy]] = {
    "mop": _build_mop,
    "fsdp2": _build_fsdp2,
    "zero_offload": _build_zero_offload,
    "megatron": _build_megatron,
}
