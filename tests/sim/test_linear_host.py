"""The host's time of layers whose mixer is linear attention: as measured, by layer and not on average."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from mopsim.graph import host_costs
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.host_time import Around, hosted, kinds_of
from mopsim.program.lower import passes_of
from mopsim.spec.layer_fields import LINEAR
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.test_linear_attention import HYBRID
from tests.sim.test_modules import linears

pytestmark = pytest.mark.usefixtures("tables_as_measured")
JOB = TrainSpec(seq_len=4096, global_batch=32, routing="balanced"), 8
PHASES = "forward", "backward"
DELTA = replace(HYBRID, linear_attention=replace(HYBRID.linear_attention, kind="gated_delta"))
PLAIN = host_costs.LAYERS["transformer_engine"][False]["attention"]
MIXERS = host_costs.MIXERS["transformer_engine"]


def test_what_mixers_add_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_linear.json").read_text())["added"]
    for kind, costs in MIXERS.items():
        found = added[kind]["forward"], added[kind]["backward"]
        assert costs == pytest.approx(found, abs=0.05), kind


@pytest.mark.parametrize("kind", ["mamba2", "gated_delta"])
def test_each_layer_takes_what_its_own_mixer_takes(kind: str) -> None:
    """Layers 0 and 2 are linear, 2 without a feed-forward; 1 and 3 are plain attention."""
    model = HYBRID if kind == "mamba2" else DELTA
    workload = lower(model, megatron(8, expert_parallel=4), *JOB, compose=False)
    own = kinds_of(model, load_stack("megatron-core"))["attention"]
    for place, phase in enumerate(PHASES):
        took = [linears(workload, layer)[phase, "attention"] for layer in range(4)]
        mixer = PLAIN[place] + MIXERS[kind][place]
        assert took == pytest.approx([mixer, PLAIN[place] + own[place]] * 2), phase


def test_a_mixer_that_is_recomputed_takes_its_forward_again() -> None:
    how = megatron(8, expert_parallel=4)
    again = replace(how, activations=replace(how.activations, recompute="full"))
    found = linears(lower(HYBRID, again, *JOB, compose=False), 0)
    assert found["recompute", "attention"] >= PLAIN[0] + MIXERS["mamba2"][0]


def test_ranks_of_a_sequence_exchange_it_as_mixers_do() -> None:
    stack = load_stack("megatron-core")
    how = megatron(8, context_parallel=2)
    ring = kinds_of(HYBRID, stack, how)
    for place in (0, 1):
        added = MIXERS["mamba2"][place] + MIXERS["context"][place]
        assert ring[LINEAR][place] == pytest.approx(added)
    assert ring["attention"] != ring[LINEAR]


def test_the_attention_of_a_hybrid_without_rotary_embedding_pays_the_host_for_none() -> None:
    stack = load_stack("megatron-core")
    eager = replace(stack, kernels=replace(stack.kernels, rotary="halves"))
    bare = replace(HYBRID, full_attention_rotary=False)
    assert kinds_of(bare, eager) == kinds_of(HYBRID, stack) != kinds_of(HYBRID, eager)


@pytest.mark.parametrize(("how", "known"), [(megatron(8), True), (fsdp2(8), False)])
def test_modules_that_were_not_measured_count_as_attention(how: Strategy, known: bool) -> None:
    assert (LINEAR in kinds_of(HYBRID, load_stack(how.stack), how)) == known


def test_a_search_prices_a_mixer_as_the_program_has_it() -> None:
    how, stack = megatron(8, expert_parallel=4), load_stack("megatron-core")
    context = make_context(HYBRID, how, JOB[0], JOB[1], stack)
    passes, workload = passes_of(context), lower(HYBRID, how, *JOB, compose=False)
    for layer in range(4):
        around = Around.of(context, passes.again(), woven=False, layer=layer)
        for phase, way in zip(PHASES, (passes.forward(layer), passes.backward(layer)), strict=True):
            ops = hosted(way.pieces, range(len(way.pieces)), stack, around)
            works = [work for op in ops if op.component == "attention" for work in op.work]
            took = sum(work.issued + work.host for work in works)
            assert took == pytest.approx(linears(workload, layer)[phase, "attention"]), (layer, phase)
