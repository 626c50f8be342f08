"""From a plan to this rank's part of the network: slices of parameters in flat buffers, parallel parts
swapped in, the loss of a microbatch.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, cast

from torch import Tensor, nn

from mopexec.distributed.mesh import Group, Mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, uncounted
from mopexec.model import Routing, Transformer
from mopexec.model.attention import AttentionCore
from mopexec.model.transformer import Given, Term
from mopexec.modules.compiled import compile_blocks
from mopexec.modules.context_parallel import BlockAttention
from mopexec.modules.expert_tensor import SplitExperts
from mopexec.modules.experts import ExpertDispatch
from mopexec.modules.hooks import InputHooks, name_components, recompute_layers, recompute_modules
from mopexec.modules.loss import chunked_loss, compute_losses
from mopexec.modules.pipeline import Links, Part, StagePipeline
from mopexec.modules.sequence import UlyssesAttention, auxiliary, with_following
from mopexec.modules.slices import Block, Kind, block_of
from mopexec.modules.tensor_parallel import split_layer
from mopexec.modules.vocabulary_parallel import SplitEmbedding, split_loss
from mopexec.modules.wrap import reset_routers
from mopexec.modules.zero1 import Buffers, adopt, make_buffer
from mopexec.operators.documents import Documents
from mopexec.operators.dtypes import of_name
from mopexec.operators.rope import Positions, rope_tables
from mopexec.run.runner import Batch
from mopexec.weights.source import Source
from mopsim.spec import layout
from mopsim.spec.plan import Plan


class SplitModel:
    """This rank's part of the network, its parameters (not filled yet) and gradients in `buffers`."""

    def __init__(
        self, plan: Plan, groups: Mesh, platform: Platform, routing: Routing, source: Source
    ) -> None:
        self._plan, self._groups, self._platform = plan, groups, platform
        with uncounted():
            self.network: Any = Transformer(
                plan.model, of_name(plan.strategy.precision.param), "meta", routing
            )
        pipeline = plan.strategy.pipeline
        self._parts = layout.stage_layers(
            plan.model.num_hidden_layers, pipeline.pipeline_parallel, pipeline.virtual_stages,
            groups.place.stage, pipeline.layers,
        )  # fmt: skip
        self.pipeline: StagePipeline | None = None
        self._positions: Positions | None = None
        if pipeline.pipeline_parallel > 1:
            with platform.bookkeeping():
                links = Links(plan.strategy, platform)
            rows = plan.training.tokens_per_rank(plan.strategy) // groups.tensor.size
            batch = plan.strategy.micro_batch
            shape = (batch, rows // batch, plan.model.hidden_size)
            dtype = of_name(plan.strategy.precision.compute)
            self.pipeline = StagePipeline(plan.strategy, links, shape, dtype, platform)
            self._drop_others(self.pipeline)
        self.network.set_auxiliary(auxiliary(plan.training, groups.shared))
        shapes = {name: tuple(p.shape) for name, p in self.network.named_parameters()}
        blocks = {name: block_of(name, shape, groups) for name, shape in shapes.items()}
        self.buffers = self._make_buffers(blocks)
        with category("params"):
            adopt(self.network, self.buffers.all)
        if plan.model.tie_word_embeddings:
            self.network.head.weight = self.network.embedding.weight
        with category("params"):
            reset_routers(self.network, platform, source)
        self._split()

    def loss(self, batch: Batch, scale: float) -> Tensor:
        """scale * the loss of a microbatch, equal on the ranks of a tensor group."""
        network, sequence = self.network, self._groups.sequence
        ids = with_following(batch.tokens, batch.targets, len(network.mtp), sequence)
        start = self._groups.place.context * batch.tokens.shape[1]
        return cast(Tensor, network.head(network.terms(*ids, start, scale, batch.documents)))

    def part(self, batches: Sequence[Batch], scale: float) -> Part:
        """What a part of this stage makes of a microbatch."""
        network, pipeline, start = self.network, self.pipeline, self._groups.place.context
        assert pipeline is not None

        def run(microbatch: int, chunk: int, x: Tensor | None) -> Tensor:
            batch = batches[microbatch]
            given = self._given(batch.tokens, start * batch.tokens.shape[1], batch.documents)
            if x is None:
                x = network.embedding(batch.tokens)
            for layer in self._parts[chunk]:
                x = network.layers[layer](x, given)
            if not pipeline.last(chunk):
                return cast(Tensor, x)
            return cast(Tensor, network.head([Term(network.final_norm(x), batch.targets, scale)]))

        return run

    def _drop_others(self, pipeline: StagePipeline) -> None:
        """Keep what this stage's parts have; names stay as they are."""
        network, chunks = self.network, range(len(self._parts))
        mine = {layer for part in self._parts for layer in part}
        for layer in range(len(network.layers)):
            if layer not in mine:
                network.layers[layer] = nn.Module()
        if not any(map(pipeline.first, chunks)):
            network.embedding = nn.Module()
        if not any(map(pipeline.last, chunks)):
            network.final_norm, network.head = nn.Module(), nn.Module()

    def _make_buffers(self, blocks: dict[str, Block]) -> Buffers:
        g, precision = self._groups, self._plan.strategy.precision
        of_kind: dict[Kind, tuple[Group | None, Group, Group]] = {
            "split": (None, g.dense_shard, g.dense_replicas),
            "whole": (g.tensor, g.dense_shard, g.dense_replicas),
            "experts": (None, g.expert_shard, g.expert_replicas),
        }
        found, unreached = Buffers(), set(self.network.unreached())
        for trained, (kind, of) in product((True, False), of_kind.items()):
            mine = {
                name: block
                for name, block in blocks.items()
                if block.kind == kind and (name not in unreached) == trained
            }
            if mine:
                dtypes = (of_name(precision.param), of_name(precision.grad))
                found.all.append(make_buffer(kind, mine, of, dtypes, self._platform, trained=trained))
        return found

    def _split(self) -> None:
        """Swap in the parallel parts, and what the backward recomputes."""
        plan, groups, network = self._plan, self._groups, self.network
        strategy, tensor = plan.strategy, groups.tensor
        for layer in network.blocks():
            if tensor.size > 1:
                split_layer(layer, tensor)
            if layer.is_moe:
                self._spread(layer.moe)
            if groups.sequence.size > 1:
                layer.attention.core = self._exchange()
        first_row, _ = layout.interval(plan.model.vocab_size, tensor.size, tensor.place)
        embedding: Any = network.embedding
        if tensor.size > 1:
            embedding.forward = SplitEmbedding(embedding, first_row, tensor)
        network.given = self._given
        self._attach_loss(first_row)
        again = strategy.activations.modules if strategy.activations.recompute == "selective" else ()
        if strategy.compile == "block":
            compile_blocks(network, again)
        if strategy.activations.recompute == "full":
            recompute_layers(network, InputHooks.of(plan, self._platform))
        recompute_modules(network, again)
        name_components(network)

    def _exchange(self) -> AttentionCore:
        how, sequence = self._plan.strategy.attention.cp_comm_type, self._groups.sequence
        if how == "ulysses":
            return UlyssesAttention(sequence)
        return BlockAttention(sequence, ring=how == "ring")

    def _spread(self, moe: Any) -> None:
        groups, spec, routing = self._groups, self._plan.model, self.network.routing
        experts = groups.experts
        if moe.shared is not None:
            moe.forward = SharedFirst(moe)
        moe.dispatch = ExpertDispatch(
            routing, spec.num_local_experts, experts, self._platform, groups.expert_tensor
        )
        if groups.expert_tensor.size > 1:
            how = self._plan.strategy.activations
            again = how.recompute == "full" or (how.recompute == "selective" and "moe" in how.modules)
            moe.experts.forward = SplitExperts(moe.experts, groups.expert_tensor, regathers=not again)

    def _given(self, tokens: Tensor, start: int, documents: Documents = ()) -> Given:
        """As `Transformer.given`: positions of the rows inside regions, routes of those outside."""
        (batch, seq), network, device = tokens.shape, self.network, tokens.device
        dtype = of_name(self._plan.strategy.precision.param)
        if self._positions is None:  # those of all microbatches
            tables = partial(rope_tables, network.spec, start, start + seq, dtype, device)
            self._positions = Positions(tables, documents)
        self._positions.use(documents)
        experts = None
        if not network.routing.learned and network.spec.num_moe_layers:
            rows = seq // self._groups.tensor.size
            experts = network.routing.experts(network.spec, batch, rows, device)
        return Given(self._positions.cos, self._positions.sin, experts, documents)

    def _attach_loss(self, first_row: int) -> None:
        head, vocabulary, tensor = self.network.head, self._plan.strategy.vocabulary, self._groups.tensor

        def one(term: Term) -> Tensor:
            if vocabulary.loss != "chunked":
                return split_loss(term.hidden, head.weight, term.targets, first_row, term.weight, tensor)
            hidden, targets = term.hidden.flatten(0, 1), term.targets.flatten()
            return chunked_loss(hidden, head.weight, targets, term.weight, vocabulary.chunk_tokens)

        compute_losses(head, one)


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
