"""`compile: block`: torch.compile of each decoder layer's own work. Attention, experts and their exchanges
run between its graphs as they are: what depends on routes, and what communicates, is in none.

| graph | of |
|---|---|
| `_queries` | norm, projections, norms of heads, rotation |
| `_attended` | output projection, residual stream, norm |
| `_dense` | dense FFN, residual stream |
| `_routed` | router: logits, choice, counts, weights |
| `_summed` | shared experts, sum of routes, residual stream |

Layers share them: a graph is compiled once for training and once for evaluation, whatever the number of
layers. Parameters keep their names, as no module is wrapped.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from mopexec.measure.torch_dispatch import EagerMode
from mopexec.model.attention import project
from mopexec.model.parts import FeedForward
from mopexec.model.transformer import DecoderLayer, Given
from mopexec.modules.hooks import again
from mopexec.operators import kernels
from mopexec.operators.compiler import Function, compiled


def _graph(function: Function) -> Function:
    """A part of a layer in one graph, of torch's own operators: it is their fusion that is asked for."""
    whole = compiled(function)

    def run(*args: Any) -> Any:
        with kernels.composed():
            return whole(*args)

    return run


@_graph
def _queries(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    block = layer.attention
    weights, normed = dict(block.named_parameters()), layer.attention_norm(x)
    how: dict[str, Any] = {"rotates": block.rotates, "factors": factors}
    return project(block.spec, weights, normed, cos, sin, block.rows, **how)


@_graph
def _attended(layer: DecoderLayer, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after attention, and what the FFN reads of it."""
    x = x + layer.attention.o_proj(out.flatten(2))
    return x, layer.ffn_norm(x)


@_graph
def _dense(layer: DecoderLayer, x: Tensor, hidden: Tensor) -> Tensor:
    return x + FeedForward.forward(layer.ffn, hidden)


@_graph
def _routed(layer: DecoderLayer, rows: Tensor, experts: Tensor | None) -> tuple[Tensor, ...]:
    """Experts and weights; logits and scores too, where losses are made of them."""
    found = layer.moe.router.scored(rows, experts)
    return found if layer.moe.router.has_losses else found[:2]


@_graph
def _summed(layer: DecoderLayer, x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    moe = layer.moe
    if moe.shared is not None:
        shared = FeedForward.forward(moe.shared, rows)
        out = out + (shared if moe.shared_gate is None else moe.shared_gate(rows).sigmoid() * shared)
    return x + out.view_as(x)


class CompiledBlock:
    """A drop-in for the forward of a decoder layer. While a dispatch mode is on (memory is watched, kinds of
    work are timed, a dry run) the layer runs as it is: torch compiles nothing then. again: the FFN runs under
    a checkpoint.
    """

    def __init__(self, layer: DecoderLayer, *, again: bool) -> None:
        self._layer, self._plain, self._again = layer, layer.forward, again

    def __call__(self, x: Tensor, given: Given) -> Tensor:
        if EagerMode.entered:
            return self._plain(x, given)
        block = self._layer.attention
        factors = given.temperature if block.tempers else None
        parts = list(_queries(self._layer, x, given.cos, given.sin, factors))
        out = block.core(parts, replace(block.what, documents=given.documents), block.sinks)
        x, hidden = _attended(self._layer, x, out)
        del out
        inner = partial(_dense, self._layer)
        if self._layer.is_moe:
            inner = partial(self._experts, given.experts)
        return again(inner, x, hidden) if self._again else inner(x, hidden)

    def _experts(self, experts: Tensor | None, x: Tensor, hidden: Tensor) -> Tensor:
        moe, rows = self._layer.moe, hidden.flatten(0, 1)
        chosen, weights, *judged = _routed(self._layer, rows, experts)
        if judged:
            chosen, weights = moe.router.judged(chosen, weights, judged[0], judged[1], x.shape[0])
        out = moe.dispatch(rows, chosen, weights, moe.experts)
        summed: Tensor = _summed(self._layer, x, rows, out)
        return summed


def compile_blocks(model: Any, recomputed: Collection[str] = ()) -> None:
    """Compile every decoder layer of a model. recomputed: the modules that selective recomputation runs
    again."""
    for layer in model.blocks():
        layer.forward = CompiledBlock(layer, again=("moe" if layer.is_moe else "mlp") in recomputed)
