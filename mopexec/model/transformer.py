"""The single-device MoE transformer in plain torch modules, the reference that every parallel run is held
against.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopexec.data.dataset import IGNORED
from mopexec.model.attention import SelfAttention
from mopexec.model.auxiliary import Auxiliary, attach
from mopexec.model.following import next_tokens
from mopexec.model.moe import MoE
from mopexec.model.parts import FeedForward, linear, norm_of
from mopexec.model.routing import Routing, balance_step, balance_told
from mopexec.model.support import check_model
from mopexec.operators.documents import Documents
from mopexec.operators.dtypes import wide
from mopexec.operators.learned_positions import add_positions, position_ids, positions_backward
from mopexec.operators.rope import rope_tables
from mopexec.operators.temperature import temperatures
from mopsim.spec.model import ModelSpec


@dataclass(frozen=True)
class Given:
    """What all layers of a forward share. cos, sin [S, rotated / 2], of each sequence [B, ..] where it has
    documents; experts [N, top_k] where a profile chose them; ids of learned positions; temperature [S] or
    [B, S]: factors of queries.
    """

    cos: Tensor
    sin: Tensor
    experts: Tensor | None = None
    documents: Documents = ()
    ids: Tensor | None = None
    temperature: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: attention, then a dense FFN or MoE."""

    def __init__(
        self, spec: ModelSpec, index: int, moe: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = norm_of(spec, dtype, device)
        self.attention = SelfAttention(spec, index, dtype, device)
        self.ffn_norm = norm_of(spec, dtype, device)
        self.is_moe = moe
        if moe:
            self.moe = MoE(spec, dtype, device)
        else:
            inner, bias = spec.intermediate_size, spec.ffn_bias
            self.ffn = FeedForward(spec, inner, dtype, device, bias)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """[B, S, H] to [B, S, H]."""
        x = x + self.attention(
            x, self.attention_norm, given.cos, given.sin, given.documents, given.temperature
        )
        hidden: Tensor = self.ffn_norm(x)
        if self.is_moe:
            moe = self.moe(hidden.flatten(0, 1), given.experts, x.shape[0])
            inner: Tensor = moe.view_as(x)
        else:
            inner = self.ffn(hidden)
        return x + inner


class Mtp(nn.Module):
    """One multi-token-prediction module (arXiv 2412.19437, 2.2): hidden states of the model, or of the module
    before, and the embedding of the next token, each normed, projected to one, through a layer.
    """

    def __init__(self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        norms = [norm_of(spec, dtype, device) for _ in range(3)]
        self.embedding_norm, self.hidden_norm = norms[0], norms[1]
        self.projection = linear(2 * spec.hidden_size, spec.hidden_size, dtype, device)
        layer = spec.num_hidden_layers + index
        self.layer = DecoderLayer(spec, layer, spec.num_local_experts > 0, dtype, device)
        self.final_norm = norms[2]

    def forward(self, hidden: Tensor, embedded: Tensor, given: Given) -> Tensor:
        """Normed hidden states [B, S, H] of the model and embeddings [B, S, H] of the tokens that follow, to
        normed hidden states.
        """
        result: Tensor = self.final_norm(self.layer(self.join(hidden, embedded), given))
        return result

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Both normed and projected to one, [B, S, H]."""
        pair = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        result: Tensor = self.projection(pair)
        return result


@dataclass(frozen=True)
class Term:
    """One cross entropy of the objective: normed hidden [B, S, H], targets [B, S], its weight."""

    hidden: Tensor
    targets: Tensor
    weight: float


class _Placed(torch.autograd.Function):
    """Keeps which rows it adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return add_positions(x, table, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        of_table = grads[0].new_zeros(ctx.shape)
        positions_backward(of_table, grads[0], ids)
        return grads[0], of_table, None


class TokenEmbedding(nn.Embedding):
    """weight [V, H] of the vocabulary; positions [P, H] where the network learns them."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        table = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        super().__init__(spec.vocab_size, spec.hidden_size, _weight=table)
        self.positions: nn.Parameter | None = None
        if spec.learned_positions:
            rows = torch.empty(spec.learned_positions, spec.hidden_size, dtype=dtype, device=device)
            self.positions = nn.Parameter(rows)

    def forward(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens [B, S] to [B, S, H]; ids: of their positions, where these are learned."""
        return self.placed(super().forward(tokens), ids)

    def placed(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Embeddings [B, S, H] at their positions."""
        if self.positions is None or ids is None:
            return x
        found: Tensor = _Placed.apply(x, self.positions, ids)  # type: ignore[no-untyped-call]
        return found


class Transformer(nn.Module):
    """Decoder-only transformer of a ModelSpec. Parameter names and shapes are those of
    `mopsim.spec.tensors.parameters`.

    Raises SpecError for a spec that the executor does not run (`check_model`). Weights are uninitialised:
    `mopexec.weights.load.fill`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        routing: Routing = Routing(),  # noqa: B008
    ) -> None:
        check_model(spec)
        super().__init__()
        device = torch.device(device)
        self.spec, self.routing, self.auxiliary = spec, routing, Auxiliary()
        self.embedding = TokenEmbedding(spec, dtype, device)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, index, spec.is_moe_layer(index), dtype, device)
            for index in range(spec.num_hidden_layers)
        )
        self.final_norm = norm_of(spec, dtype, device)
        self.head = linear(spec.hidden_size, spec.vocab_size, dtype, device)
        if spec.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.mtp = nn.ModuleList(
            Mtp(spec, index, dtype, device) for index in range(spec.num_nextn_predict_layers)
        )

    def set_auxiliary(self, auxiliary: Auxiliary) -> None:
        """Train with these losses beside the cross entropy."""
        self.auxiliary = auxiliary
        for layer in self.blocks():
            if layer.is_moe:
                layer.moe.router.auxiliary = auxiliary

    def unreached(self) -> Iterator[str]:
        """Parameters that no loss of the objective reaches: those of MTP modules without weight."""
        return (n for n, _ in self.named_parameters() if n.startswith("mtp.") and not self.auxiliary.mtp)

    def blocks(self) -> Iterator[DecoderLayer]:
        """Every decoder layer that is here, those of MTP modules last."""
        yield from (layer for layer in self.layers if isinstance(layer, DecoderLayer))
        for module in self.mtp:
            assert isinstance(module, Mtp)
            yield module.layer

    def given(self, tokens: Tensor, start: int, documents: Documents = ()) -> Given:
        """What the layers share in a forward of tokens [B, S] at positions from `start` on."""
        batch, seq = tokens.shape
        weight = self.embedding.weight
        of = (self.spec, start, start + seq, weight.dtype, weight.device, documents)
        experts = None
        if not self.routing.learned and self.spec.num_moe_layers:
            experts = self.routing.experts(self.spec, batch, seq, weight.device)
        ids = self.ids(start, start + seq, documents)
        return Given(*rope_tables(*of), experts, documents, ids, temperatures(*of))

    def ids(self, start: int, stop: int, documents: Documents = ()) -> Tensor | None:
        """Of learned positions [start, stop); None without."""
        if not self.spec.learned_positions:
            return None
        return position_ids(start, stop, self.embedding.weight.device, documents)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Normed hidden states [B, S, H] of tokens [B, S]; start: position of the first token (a sequence's
        slice).
        """
        return self._hidden(tokens, self.given(tokens, start))

    def _hidden(self, tokens: Tensor, given: Given) -> Tensor:
        x = self.embedding(tokens, given.ids)
        for layer in self.layers:
            x = layer(x, given)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def terms(
        self, tokens: Tensor, targets: Tensor, start: int, scale: float, documents: Documents = ()
    ) -> list[Term]:
        """The cross entropies of a step: the model's, then those of MTP modules, which are weighed only where
        the objective has them.

        tokens and targets [B, S + d]: of the S positions and, with d MTP modules, of the d that follow
        (IGNORED beyond the sequence).
        """
        seq = tokens.shape[1] - len(self.mtp)
        given = self.given(tokens[:, :seq], start, documents)
        hidden = self._hidden(tokens[:, :seq], given)
        found = [Term(hidden, targets[:, :seq], scale)]
        if not self.mtp or not self.auxiliary.mtp:
            return found
        following = next_tokens(tokens, targets)
        for depth, module in enumerate(self.mtp, start=1):
            ahead = following[:, depth - 1 : depth - 1 + seq]
            hidden = module(hidden, self.embedding(ahead), given)
            weight = scale * self.auxiliary.mtp / len(self.mtp)
            found.append(Term(hidden, targets[:, depth : depth + seq], weight))
        return found

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        start: int = 0,
        scale: float = 1.0,
        documents: Documents = (),
    ) -> Tensor:
        """`scale` times the sum over tokens of the cross entropy of targets [B, S], in float32 (float64 in
        float64). Its backward also has the other losses of the objective: MTP modules' times `scale`, those
        of routers as `Auxiliary` weighs them.
        """
        tokens, targets = (F.pad(ids, (0, len(self.mtp)), value=IGNORED) for ids in (tokens, targets))
        terms = self.terms(tokens, targets, start, scale, documents)
        main, *others = (self._cross_entropy(term) for term in terms)
        for loss in others:
            main = attach(main, loss)
        return main

    def _cross_entropy(self, term: Term) -> Tensor:
        logits = self.head(term.hidden).flatten(0, 1)
        targets = term.targets.flatten()
        return F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="sum") * term.weight

    @torch.no_grad()
    def update_balance(
        self, rate: float, reduce: Callable[[Tensor], object] = lambda load: None, degree: int = 1
    ) -> Tensor:
        """Move every router's balance bias by the load since the last call; returns `balance_told` of it, of
        no route where the model has no router.

        reduce: sums loads over ranks in place. degree: of expert parallelism.
        """
        routers = [layer.moe.router for layer in self.blocks() if layer.is_moe]
        for router in routers:
            reduce(router.load)
        device = next(self.parameters()).device
        loads = [router.load for router in routers] or [torch.zeros(degree, device=device)]
        told = balance_told(torch.stack(loads), degree)
        for router in routers:
            balance_step(router.balance_bias, router.load, rate)
            router.load.zero_()
        return told
