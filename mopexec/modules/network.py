"""From a plan to this rank's part of the network: its slices of parameters, parallel parts swapped in, the
loss of a microbatch. Where parameters, gradients and optimizer states are stored is not said here.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mopexec.distributed.mesh import Mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import uncounted
from mopexec.model import Routing, Transformer
from mopexec.model.attention import AttentionCore
from mopexec.model.following import with_following
from mopexec.model.moe import Router
from mopexec.model.transformer import Given, Term
from mopexec.modules.compiled import compile_blocks
from mopexec.modules.context_parallel import BlockAttention
from mopexec.modules.expert_tensor import SplitExperts
from mopexec.modules.experts import ExpertDispatch
from mopexec.modules.hooks import name_components, recompute
from mopexec.modules.loss import chunked_loss, compute_losses, full_loss
from mopexec.modules.pipeline import Links, Part, StagePipeline
from mopexec.modules.sequence import UlyssesAttention, auxiliary
from mopexec.modules.slices import Block, block_of
from mopexec.modules.tensor_parallel import split_layer
from mopexec.modules.vocabulary_parallel import SplitEmbedding, split_loss
from mopexec.operators.documents import Documents
from mopexec.operators.dtypes import of_name
from mopexec.operators.learned_positions import position_ids
from mopexec.operators.rope import Positions
from mopexec.run.runner import Batch
from mopexec.weights.source import Source
from mopsim.spec import layout
from mopsim.spec.plan import Plan


class RankNetwork:
    """This rank's part of the network. model: called with (tokens, targets, scale, documents) it gives scale
    times the loss, equal on the ranks of a tensor group. blocks: what this rank holds of each parameter, by
    name; the model's parameters have these sizes, and no storage yet.
    """

    def __init__(self, plan: Plan, mesh: Mesh, platform: Platform, routing: Routing) -> None:
        self._plan, self._mesh, self._platform = plan, mesh, platform
        with uncounted():  # without storage: what stores parameters is counted
            device = platform.device if platform.fake else "meta"
            self.model: Any = Transformer(plan.model, of_name(plan.strategy.precision.param), device, routing)
        pipeline = plan.strategy.pipeline
        self._parts = layout.stage_layers(
            plan.model.num_hidden_layers, pipeline.pipeline_parallel, pipeline.virtual_stages,
            mesh.place.stage, pipeline.layers,
        )  # fmt: skip
        self.pipeline: StagePipeline | None = None
        self._positions: Positions | None = None
        if pipeline.pipeline_parallel > 1:
            self.pipeline = self._stages()
            self._drop_others()
        self.model.set_auxiliary(auxiliary(plan.training, mesh.shared))
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.blocks: dict[str, Block] = {name: block_of(name, shape, mesh) for name, shape in shapes.items()}
        with uncounted():
            self._cut()
        self._split()

    def part(self, batches: Sequence[Batch], scale: float) -> Part:
        """What a part of this stage makes of a microbatch."""

        def run(microbatch: int, chunk: int, x: Tensor | None) -> Tensor:
            batch = batches[microbatch]
            return cast(Tensor, self.model(batch.tokens, batch.targets, scale, batch.documents, chunk, x))

        return run

    def sequences(self) -> list[list[nn.Module]]:
        """The modules that hold parameters, in the order in which each part of this stage runs them."""
        model, found = self.model, []
        for chunk, layers in enumerate(self._parts):
            first, last = self._is_first(chunk), self._is_last(chunk)
            modules = [model.embedding] * first + [model.layers[layer] for layer in layers]
            found.append(modules + [*model.mtp, model.final_norm] * last)
        return found

    def copies(self, name: str) -> int:
        """Ranks of the world that hold the very elements of this rank's shard of a parameter."""
        mesh, kind = self._mesh, self.blocks[name].kind
        if kind == "experts":
            return mesh.expert_replicas.size
        return mesh.dense_replicas.size * (mesh.tensor.size if kind == "whole" else 1)

    def reset_routers(self, source: Source) -> None:
        """Balance biases start at zero or as in the source, loads at zero, on the device."""
        for name, module in self.model.named_modules():
            if isinstance(module, Router):
                module.balance_bias = torch.zeros_like(module.balance_bias, device=self._platform.device)
                module.load = torch.zeros_like(module.balance_bias)
                start = None if self._platform.fake else source.buffer(f"{name}.balance_bias")
                if start is not None:
                    module.balance_bias.copy_(start)

    def _stages(self) -> StagePipeline:
        plan, strategy = self._plan, self._plan.strategy
        with self._platform.bookkeeping():
            links = Links(strategy, self._platform)
        rows, batch = plan.training.tokens_per_rank(strategy) // self._mesh.tensor.size, strategy.micro_batch
        shape = (batch, rows // batch, plan.model.hidden_size)
        return StagePipeline(strategy, links, shape, of_name(strategy.precision.compute), self._platform)

    def _is_first(self, chunk: int) -> bool:
        return self.pipeline is None or self.pipeline.first(chunk)

    def _is_last(self, chunk: int) -> bool:
        return self.pipeline is None or self.pipeline.last(chunk)

    def _through(self, chunk: int, x: Tensor, given: Given) -> Tensor:
        for layer in self._parts[chunk]:
            x = self.model.layers[layer](x, given)
        return x

    def _drop_others(self) -> None:
        """Keep what this stage's parts have; names stay as they are."""
        model, chunks = self.model, range(len(self._parts))
        mine = {layer for part in self._parts for layer in part}
        for layer in range(len(model.layers)):
            if layer not in mine:
                model.layers[layer] = nn.Module()
        if not any(map(self._is_first, chunks)):
            model.embedding = nn.Module()
        if not any(map(self._is_last, chunks)):
            model.final_norm, model.head = nn.Module(), nn.Module()

    def _cut(self) -> None:
        """Parameters of the sizes that this rank holds."""
        for name, parameter in list(self.model.named_parameters()):
            if self.blocks[name].size != self.blocks[name].shape:
                owner, _, attribute = name.rpartition(".")
                own = nn.Parameter(parameter.detach().new_empty(self.blocks[name].size))
                setattr(self.model.get_submodule(owner), attribute, own)
        self.tie()

    def tie(self) -> None:
        """One weight where the network has one for embedding and head."""
        if self._plan.model.tie_word_embeddings:
            self.model.head.weight = self.model.embedding.weight

    def _split(self) -> None:
        """Swap in the parallel parts, and what the backward recomputes."""
        plan, mesh, model = self._plan, self._mesh, self.model
        strategy, tensor = plan.strategy, mesh.tensor
        kept = layout.not_recomputed(strategy, plan.model)
        for layer in model.blocks():
            if tensor.size > 1:
                split_layer(layer, tensor)
            if layer.is_moe:
                self._spread(layer.moe, again=strategy.activations.experts_again and layer.index not in kept)
            if mesh.sequence.size > 1:
                layer.attention.core = self._exchange()
        first_row, _ = layout.interval(plan.model.vocab_size, tensor.size, tensor.place)
        if tensor.size > 1:
            model.embedding.forward = SplitEmbedding(model.embedding, first_row, tensor)
        model.given = self._given
        self._attach_loss(first_row)
        if strategy.compile == "block":
            compile_blocks(model, strategy.activations.modules_again)
        recompute(model, plan, self._platform)
        name_components(model)

    def _exchange(self) -> AttentionCore:
        how, sequence = self._plan.strategy.attention.cp_comm_type, self._mesh.sequence
        if how == "ulysses":
            return UlyssesAttention(sequence)
        return BlockAttention(sequence, ring=how == "ring")

    def _spread(self, moe: Any, *, again: bool) -> None:
        """again: the experts are recomputed, rows that they gather included."""
        mesh, spec, routing = self._mesh, self._plan.model, self.model.routing
        if moe.shared is not None and mesh.tensor.size > 1:
            moe.forward = SharedFirst(moe)
        moe.dispatch = ExpertDispatch(
            routing, spec.num_local_experts, mesh.experts, self._platform, mesh.expert_tensor
        )
        if mesh.expert_tensor.size > 1:
            moe.experts.forward = SplitExperts(moe.experts, mesh.expert_tensor, regathers=not again)

    def _given(self, tokens: Tensor, start: int, documents: Documents = ()) -> Given:
        """As `Transformer.given`: positions of the rows inside regions, routes of those outside."""
        (batch, seq), model, device = tokens.shape, self.model, tokens.device
        dtype = of_name(self._plan.strategy.precision.param)
        if self._positions is None:  # those of all microbatches
            self._positions = Positions(model.spec, start, start + seq, dtype, device, documents)
        self._positions.use(documents)
        experts = None
        if not model.routing.learned and model.spec.num_moe_layers:
            rows = seq // self._mesh.tensor.size
            experts = model.routing.experts(model.spec, batch, rows, device)
        ids = position_ids(start, start + seq, device, documents) if model.spec.learned_positions else None
        now = self._positions
        return Given(now.cos, now.sin, experts, documents, ids, now.temperature)

    def _attach_loss(self, first_row: int) -> None:
        model, vocabulary, mesh = self.model, self._plan.strategy.vocabulary, self._mesh
        head, in_place = model.head, vocabulary.loss == "vocab_parallel"
        if vocabulary.loss == "full":
            in_place = not self._plan.stack.sharding.fsdp  # beside whole parameters, as Megatron-LM's

        def one(term: Term, total: list[Tensor]) -> Tensor:
            if in_place:
                return split_loss(term.hidden, head.weight, term.targets, first_row, term.weight, mesh.tensor)
            hidden, targets = term.hidden.flatten(0, 1), term.targets.flatten()
            if vocabulary.loss == "chunked":
                chunk = vocabulary.chunk_tokens
                return chunked_loss(hidden, head.weight, targets, term.weight, chunk, total)
            return full_loss(hidden, head.weight, targets, term.weight)

        def forward(
            tokens: Tensor, targets: Tensor, scale: float, documents: Documents = (), chunk: int = 0,
            x: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            start = mesh.place.context * tokens.shape[1]
            if self.pipeline is not None:
                given = self._given(tokens, start, documents)
                x = model.embedding(tokens, given.ids) if x is None else x
                x = self._through(chunk, x, given)
                return head([Term(model.final_norm(x), targets, scale)]) if self._is_last(chunk) else x
            ids = with_following(tokens, targets, len(model.mtp), mesh.sequence)
            return cast(Tensor, head(model.terms(*ids, start, scale, documents)))

        compute_losses(head, one)
        model.forward = forward


class SharedFirst:
    """A drop-in for the forward of an MoE block: the shared experts run before the rows leave."""

    def __init__(self, moe: Any) -> None:
        self._moe = moe

    def __call__(self, x: Tensor, experts: Tensor | None, batch: int = 1) -> Tensor:
        moe = self._moe
        chosen, weights = moe.router(x, experts, batch)
        shared: Tensor = moe.shared(x)
        if moe.shared_gate is not None:
            shared = moe.shared_gate(x).sigmoid() * shared
        return cast(Tensor, moe.dispatch(x, chosen, weights, moe.experts) + shared)
