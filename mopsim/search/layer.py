"""What a token takes in a layer at least, by the layer's tapes: bytes kept for its backward, traffic."""

from dataclasses import dataclass

from mopsim.graph.attention import attention
from mopsim.graph.experts import experts
from mopsim.graph.ffn import fused_ffn
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Tape
from mopsim.search.problem import Problem
from mopsim.spec.strategy import CAST


@dataclass(frozen=True)
class Layer:
    """Bytes of a token in a layer.

    attention, experts, least: kept for the backward, by attention, by routed experts, by a whole layer of the
    kind that keeps least; 0 where operands are cast, as they may be kept as they were cast. Traffic: read and
    written, forward and backward, by kernels that are no products.
    """

    attention: float
    experts: float
    least: float
    attention_traffic: float
    experts_traffic: float

    @staticmethod
    def of(problem: Problem, each: float, fused: bool) -> "Layer":
        """each: bytes of an element. fused: of kernels that do several things at once, which keep least."""
        model, rows = problem.model, problem.training.seq_len
        shapes = Shapes(rows, rows, width=int(each), fused=fused)
        tapes = [attention(model, shapes, layer) for layer in range(model.num_hidden_layers)]
        kept, routed, dense = min(tape.saved() for tape in tapes), 0, float("inf")
        moved, through = min(_traffic(tape) for tape in tapes), 0.0
        if model.num_local_experts:
            tape = experts(model, (rows * model.num_experts_per_tok,), int(each), 4, fused=fused)
            routed, through = tape.saved(), _traffic(tape)
        if model.num_dense_layers:
            dense = fused_ffn(model, model.intermediate_size, "dense_ffn", shapes).saved()
        least = kept + min(routed or dense, dense)
        if problem.precision in CAST:
            kept = routed = 0
            least = 0
        return Layer(kept / rows, routed / rows, least / rows, moved / rows, through / rows)


def _traffic(tape: Tape) -> float:
    """Bytes of a forward and a backward through kernels that only move memory."""
    found = 0.0
    for kernel in tape.kernels:
        if kernel.kind == "memory_bound":
            found += kernel.bytes + (kernel.bytes if kernel.back_bytes is None else kernel.back_bytes)
    return found
