"""The attention half of a layer: x1 = x + o_proj(attention(norm(x))), with its own recompute and backward."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.tracker import component, phase
from mopexec.operators import kernels
from mopexec.operators.attention_core import Core, causal_backward, causal_forward
from mopexec.operators.norms import LayerNorms
from mopexec.operators.rope import Positions, rotate_
from mopexec.operators.rows import add_matmul, rms_norm, rms_norm_backward_, row_slices
from mopexec.operators.temperature import temper_
from mopexec.operators.ulysses import SequenceExchange, project_backward
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Any, ...]]


class AttentionBlock:
    """Attention of every layer for one microbatch shape.

    `of_layer` gives the block of a layer, which has a `core` and rotates queries and keys or not.
    """

    def __init__(
        self, spec: ModelSpec, exchange: SequenceExchange, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.exchange, self.norms = spec, exchange, LayerNorms.of(spec)
        self.core, self.rotates, self.tempers = Core.of(spec, 0), spec.rotates(0), spec.tempers(0)
        start = exchange.group.place * exchange.seq
        self.positions = Positions(spec, start, start + exchange.seq, dtype, device)
        self._rows = row_slices(exchange.seq)

    def of_layer(self, layer: int) -> "AttentionBlock":
        """The same block for a layer: its window or chunks, with or without rotary positions."""
        block = copy.copy(self)
        block.core, block.rotates = Core.of(self.spec, layer), self.spec.rotates(layer)
        block.tempers = self.spec.tempers(layer)
        return block

    @property
    def cos(self) -> Tensor:
        return self.positions.cos

    @property
    def sin(self) -> Tensor:
        return self.positions.sin

    @property
    def factors(self) -> Tensor | None:
        """Of queries by their positions, where the layer scales them."""
        return self.positions.temperature if self.tempers else None

    @property
    def _now(self) -> Core:
        return replace(self.core, documents=self.positions.documents)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """x [N, H] to a new x1 [N, H]."""
        with component("attention"):
            return self._output(x, [self._core(x, weights)[3]], weights)

    def recompute(self, x: Tensor, weights: Weights) -> tuple[Tensor, Saved]:
        """(x1, what `backward` needs: q, k, v and the output of this rank's heads over all positions)."""
        with component("attention"), phase("recompute"):
            saved = self._core(x, weights)
            return self._output(x, [saved[3]], weights), saved

    def backward(
        self, grad: Tensor, x: Tensor, saved: list[Saved], weights: Weights, grads: Weights,
        cored: Callable[[], None],
    ) -> None:  # fmt: skip
        """grad [N, H] of x1 becomes that of x, in place; grads += the weights'. Empties `saved` to free it
        early; `cored` is called once that is done.
        """
        with component("attention"), phase("backward"):
            dq, dk, dv = self._core_backward(grad, saved.pop(), weights, grads)
            cored()
            hidden = self.norms.forward(x, weights, "attention_norm")
            grad_hidden = self._projection_backward("q", dq, hidden, weights, grads, None)
            del dq
            grad_hidden = self._projection_backward("k", dk, hidden, weights, grads, grad_hidden)
            del dk
            merged = self.exchange.merge(dv, self.spec.num_key_value_heads)
            del dv
            grad_hidden = project_backward(
                merged,
                hidden,
                weights["attention.v_proj.weight"],
                grads["attention.v_proj.weight"],
                grad_hidden,
            )
            del merged, hidden
            self.norms.backward_(grad, x, grad_hidden, weights, grads, "attention_norm")

    def _core(self, x: Tensor, weights: Weights) -> Saved:
        """q, k, v and output, each [B, S, heads of this rank, d], and what flash attention saves."""
        q, k, v = self._received(x, weights)
        out, sums = causal_forward(q, k, v, self._now, self._sinks(weights))
        return q, k, v, out, sums

    def _received(self, x: Tensor, weights: Weights) -> list[Tensor]:
        """q, k and v of all positions of this rank's heads."""
        exchange, size = self.exchange, self.spec.head_dim
        hidden = self.norms.forward(x, weights, "attention_norm")
        packed = [self._project(name, hidden, weights) for name in "qkv"]
        del hidden
        received = []
        while packed:
            received.append(exchange.to_heads([packed.pop(0)]).unflatten(-1, (-1, size)))  # type: ignore[no-untyped-call]
        return received

    def _sinks(self, values: Weights) -> Tensor | None:
        """The part of the sinks (or of their gradients) of this rank's heads, a view."""
        sinks = values.get("attention.sinks")
        return None if sinks is None else sinks.chunk(self.exchange.degree)[self.exchange.group.place]

    def _project(self, name: str, hidden: Tensor, weights: Weights) -> Tensor:
        """A projection in the send layout, normed per head and rotated in place where it is q or k."""
        heads = self.spec.num_attention_heads if name == "q" else self.spec.num_key_value_heads
        packed = self.exchange.project(hidden, weights[f"attention.{name}_proj.weight"], heads)
        if name == "v":
            return packed
        if self.spec.qk_norm == "head" and kernels.NOW.norm:
            weight = weights[f"attention.{name}_norm.weight"]
            packed = rms_norm(self._by_head(packed.flatten(0, 1)), weight, self.spec.rms_norm_eps).view_as(
                packed
            )
        elif self.spec.qk_norm == "head":
            for block in packed:
                rows = self._by_head(block)
                for start, stop in row_slices(rows.shape[0]):
                    part = rows[start:stop]
                    part.copy_(
                        rms_norm(part, weights[f"attention.{name}_norm.weight"], self.spec.rms_norm_eps)
                    )
        if self.rotates:
            rotate_(self._by_position(packed), self.cos, self.sin, self._rows)
        if name == "q" and self.factors is not None:
            temper_(self._by_position(packed), self.factors)
        return packed

    def _output(self, x: Tensor, given: list[Tensor], weights: Weights) -> Tensor:
        """x + o_proj of the heads' outputs, taken out of a list, back at this rank's positions."""
        merged = self._local_output(given)
        result = torch.addmm(x, merged, weights["attention.o_proj.weight"].t())
        bias = weights.get("attention.o_proj.bias")
        return result if bias is None else result.add_(bias)

    def _local_output(self, given: list[Tensor]) -> Tensor:
        """[B, S, heads of this rank, d], taken out of a list, to all heads of this rank's positions, [N,
        heads * d].
        """
        local = self.exchange.to_positions([given.pop().flatten(2)])
        return self.exchange.merge(local, self.spec.num_attention_heads)

    def _core_backward(
        self, grad: Tensor, saved: Saved, weights: Weights, grads: Weights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the projections q, k, v in the layout [D, N, w], before rotation and head norm."""
        q, k, v, out, sums = saved
        del saved
        merged = self._local_output([out])
        add_matmul(grads["attention.o_proj.weight"], grad.t(), merged)
        if "attention.o_proj.bias" in grads:
            grads["attention.o_proj.bias"].add_(grad.sum(0))
        del merged
        packed = [self.exchange.project_back(grad, weights["attention.o_proj.weight"])]
        grad_out = self.exchange.to_heads(packed).view(out.shape)
        dq, dk, dv, grad_sinks = causal_backward(
            grad_out, q, k, v, out, sums, self._now, self._sinks(weights)
        )
        del grad_out, q, k, v, out, sums
        own_sinks = self._sinks(grads)
        if own_sinks is not None and grad_sinks is not None:
            own_sinks.add_(grad_sinks)
        result, found = [], [dq, dk, dv]
        del dq, dk, dv
        while found:
            result.append(self.exchange.to_positions([found.pop(0).flatten(2)]))
        self._unrotate_(result[:2])
        return result[0], result[1], result[2]

    def _unrotate_(self, packed: list[Tensor]) -> None:
        """Gradients of queries and keys become those before the rotation and the queries' factors."""
        if self.factors is not None:
            temper_(self._by_position(packed[0]), self.factors)
        for part in packed if self.rotates else []:
            rotate_(self._by_position(part), self.cos, self.sin, self._rows, inverse=True)

    def _projection_backward(
        self,
        name: str,
        packed: Tensor,
        hidden: Tensor,
        weights: Weights,
        grads: Weights,
        grad_hidden: Tensor | None,
    ) -> Tensor:
        """Backward of the q or k projection and its head norm; returns the gradient of the normed input."""
        heads = self.spec.num_attention_heads if name == "q" else self.spec.num_key_value_heads
        merged = self.exchange.merge(packed, heads)
        weight = weights[f"attention.{name}_proj.weight"]
        if self.spec.qk_norm == "head":
            for start, stop in row_slices(merged.shape[0], 0 if kernels.NOW.norm else None):
                before = self._by_head(hidden[start:stop] @ weight.t())
                part = self._by_head(merged[start:stop])
                rms_norm_backward_(
                    part, before, part, weights[f"attention.{name}_norm.weight"],
                    grads[f"attention.{name}_norm.weight"], self.spec.rms_norm_eps, add=False,
                )  # fmt: skip
        return project_backward(merged, hidden, weight, grads[f"attention.{name}_proj.weight"], grad_hidden)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], -1, self.spec.head_dim)

    def _by_position(self, packed: Tensor) -> Tensor:
        """[D, N, w] as [D, B, s, heads, d]."""
        return packed.view(packed.shape[0], self.exchange.batch, self.exchange.seq, -1, self.spec.head_dim)
