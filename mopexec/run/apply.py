"""From a plan to a Runner: refuse what no runtime does, then put the mechanisms together in a fixed order."""

from typing import Any, Literal

import msgspec
import torch

from mopexec.distributed.mesh import Mesh, build_mesh
from mopexec.distributed.tiers import Platform
from mopexec.flat import state
from mopexec.flat.composed import ComposedAttention
from mopexec.flat.contents import layer_contents, outer_contents
from mopexec.flat.flat_units import FlatModel, FlatRunner, routed_layers
from mopexec.flat.layer import LayerSchedule
from mopexec.flat.mtp import MtpSchedule
from mopexec.flat.token_rows import TokenRows
from mopexec.flat.units import Unit
from mopexec.measure.tracker import category
from mopexec.model.routing import profile_experts
from mopexec.operators import compiler, kernels
from mopexec.operators.attention import AttentionBlock
from mopexec.operators.experts import MoEBlock
from mopexec.operators.ffn import DenseBlock
from mopexec.operators.layer_inputs import LayerInputs, count_on_host
from mopexec.operators.loss import Ring
from mopexec.operators.nested_experts import NestedMoEBlock
from mopexec.operators.ring_rows import RowsRing
from mopexec.operators.router_losses import RouterLosses
from mopexec.operators.routes import RoutePlanner
from mopexec.operators.ulysses import SequenceExchange
from mopexec.run.runner import Runner
from mopexec.run.supported import check_supported
from mopexec.weights.source import Seeded, Source
from mopsim.spec import layout
from mopsim.spec.plan import Plan
from mopsim.spec.tensors import buffers

RoutingChoice = Literal["learned", "profile"]


def build(
    plan: Plan,
    platform: Platform,
    *,
    routing: RoutingChoice = "learned",
    seed: int = 0,
    weights: Source | None = None,
) -> Runner:
    """This rank's Runner, with `weights`, or drawn from `seed`; torch.distributed must be initialised. Raises
    SpecError.
    """
    check_supported(plan)
    stack = plan.stack
    if not platform.fake:
        stack = stack.on_kind("cuda" if platform.is_cuda else "cpu")
    stack = stack.compiling(plan.strategy.compile).multiplying(plan.model, plan.strategy)
    stack = stack.on(plan.hardware.architecture, plan.training.plain_attention(plan.model))
    plan = msgspec.structs.replace(plan, stack=stack)
    if plan.strategy.compile != "none" and not platform.fake:
        compiler.check_compiler("plan.strategy.compile", cuda=platform.is_cuda)
    if platform.is_cuda:
        kernels.prepare(plan.stack.kernels)
    source = weights or Seeded(seed)
    if plan.stack.runtime == "fully_shard":
        from mopexec.modules.fully_shard import FullyShardRunner

        return FullyShardRunner(plan, platform, routing, source)
    if plan.stack.runtime == "split_modules":
        from mopexec.modules.split_modules import SplitRunner

        return SplitRunner(plan, platform, routing, source)
    return build_flat_units(plan, platform, routing=routing, source=source)


@torch.no_grad()
def build_flat_units(plan: Plan, platform: Platform, *, routing: RoutingChoice, source: Source) -> FlatRunner:
    """The flat_units Runner of this rank."""
    with platform.bookkeeping():
        mesh = build_mesh(plan.strategy, platform)
    spec, strategy = plan.model, plan.strategy
    outer = _outer_units(plan, mesh, platform)
    embedding = outer["embedding"]
    num_tokens, compute = plan.training.tokens_per_rank(strategy), embedding.compute
    ring = _ring(plan, mesh, num_tokens)
    size = num_tokens * spec.hidden_size * compute.itemsize
    on_host = count_on_host(strategy.activations, spec.num_hidden_layers, size)
    with category("params"):
        shape = (max(1, len(routed_layers(spec))), max(1, spec.num_local_experts))
        balance_bias, load = (torch.zeros(shape, dtype=torch.float32, device=platform.device) for _ in "bl")
    layers = _layers(plan, mesh, platform, routing, compute)
    model = FlatModel(
        rows=TokenRows(
            embedding,
            outer.get("positions"),
            ring if isinstance(ring, RowsRing) else None,
            shared="head" not in outer,
        ),
        layers=layers[: spec.num_hidden_layers],
        final=outer["final"],
        head=outer.get("head", embedding),
        inputs=LayerInputs(platform, (num_tokens, spec.hidden_size), compute, on_host),
        ring=ring,
        balance_bias=balance_bias,
        load=load,
        modules=[module for module in layers if isinstance(module, MtpSchedule)],
    )
    for row, name in enumerate(buffers(spec)):
        bias = source.buffer(name)
        if bias is not None:
            balance_bias[row].copy_(bias)
    runner = FlatRunner(plan, mesh, platform, model, learned=routing == "learned")
    if not platform.fake:
        state.initialize(runner.optimizer, source)
    return runner


def _outer_units(plan: Plan, mesh: Mesh, platform: Platform) -> dict[str, Unit]:
    """Of `outer_contents`."""
    strategy, dense = plan.strategy, (mesh.dense_shard, mesh.dense_replicas)
    rows = None
    if strategy.vocabulary.loss == "ring":
        rows = layout.interval(plan.model.vocab_size, strategy.vocabulary.vocab_parallel, mesh.ring.place)
    early = strategy.optimizer.overlap == "backward"
    return {
        key: Unit(
            contents, *(dense if contents.rows is None else (mesh.ring_shard, mesh.alone)),
            strategy.precision, platform, transient=early,
        )
        for key, contents in outer_contents(plan.model, rows).items()
    }  # fmt: skip


def _layers(
    plan: Plan, mesh: Mesh, platform: Platform, routing: RoutingChoice, dtype: torch.dtype
) -> list[LayerSchedule]:
    spec, strategy, training = plan.model, plan.strategy, plan.training
    degree = strategy.attention.context_parallel
    exchange = SequenceExchange(mesh.sequence, strategy.micro_batch, training.seq_len // degree)
    with category("activations"):
        block = ComposedAttention if spec.composes_projections else AttentionBlock
        attention = block(spec, exchange, dtype, platform.device)
    ffn = DenseBlock(spec, strategy.dense.chunk_tokens)
    moe = _moe(plan, mesh, platform, routing) if spec.num_moe_layers else None
    found: list[LayerSchedule] = []
    early = strategy.optimizer.overlap == "backward"
    for index in range(spec.num_hidden_layers + spec.num_nextn_predict_layers):
        dense, experts = layer_contents(spec, index, strategy.experts.expert_parallel, mesh.experts.place)
        given: dict[str, Any] = {"precision": strategy.precision, "platform": platform, "transient": early}
        unit = Unit(dense, mesh.dense_shard, mesh.dense_replicas, **given)
        expert_unit = None
        if experts is not None:
            expert_unit = Unit(experts, mesh.expert_shard, mesh.expert_replicas, **given)
        parts = (unit, expert_unit, attention.of_layer(index), ffn, moe)
        module = index - spec.num_hidden_layers
        if module < 0:
            found.append(LayerSchedule(*parts))
            continue
        found.append(MtpSchedule(*parts, index=module, norms=ffn.norms))
        if not training.mtp_loss_coef:  # no loss reaches it
            for one in found[-1].units:
                one.undecayed = [(0, one.valid)]
    return found


def _moe(plan: Plan, mesh: Mesh, platform: Platform, routing: RoutingChoice) -> MoEBlock:
    spec, strategy, training = plan.model, plan.strategy, plan.training
    num_tokens = training.tokens_per_rank(strategy)
    chunks = layout.num_chunks(num_tokens, strategy.experts.chunk_tokens, strategy.experts.max_chunks)
    profile = None
    if routing == "profile":
        with category("activations"):
            profile = profile_experts(
                training.routing,
                num_tokens,
                spec.num_local_experts,
                spec.num_experts_per_tok,
                platform.device,
            ).to(torch.int16)
    losses = RouterLosses.of(spec, training, mesh.sequence)
    planner = RoutePlanner(
        spec, mesh.experts, profile, training.routing, chunks, platform, strategy.experts, losses
    )
    block = NestedMoEBlock if plan.stack.recompute.chunk_inputs == "nested" else MoEBlock
    return block(spec, planner, strategy.dense.chunk_tokens)


def _ring(plan: Plan, mesh: Mesh, num_tokens: int) -> Ring | None:
    vocabulary = plan.strategy.vocabulary
    if vocabulary.loss != "ring":
        return None
    moves_weights = layout.ring_moves_weights(num_tokens, plan.model.vocab_size, vocabulary.vocab_parallel)
    kind = RowsRing if plan.model.tie_word_embeddings else Ring
    return kind(mesh.ring, plan.model.vocab_size, vocabulary.chunk_tokens, moves_weights=moves_weights)
