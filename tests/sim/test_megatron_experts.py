"""Layers of experts as Megatron-Core runs them: biases and clamps by torch, for which the host waits; rows
padded for products in 8 bits."""

import json
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from mopsim.graph import host_costs
from mopsim.program import lower
from mopsim.program.casts import Part
from mopsim.program.context import make_context
from mopsim.program.host_time import kinds_of
from mopsim.program.lower import passes_of
from mopsim.program.works import works
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dispatcher, MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

MODEL = load_model("gpt_oss_20b")
JOB = TrainSpec(seq_len=4096, global_batch=16, routing="balanced")
replace = msgspec.structs.replace


def _stacks() -> tuple[Stack, Stack]:
    """Megatron-Core, and itself with the gate in one kernel."""
    core = load_stack("megatron-core")
    return core, replace(core, kernels=replace(core.kernels, clamped_gate="fused"))


@pytest.mark.parametrize("modules", [(), ("moe_act",)])
def test_the_host_waits_for_clamps_once_in_every_pass_that_makes_a_gate(modules: tuple[str, ...]) -> None:
    """Beside what it waits for anyway: also where a recomputation makes the gate again, never backward."""
    strategy = megatron(8, expert_parallel=8, recompute="selective" if modules else "none")
    activations = replace(strategy.activations, modules=modules)
    strategy = replace(strategy, stack="megatron-core", activations=activations)
    waits = {}
    for stack in _stacks():
        ops = lower(MODEL, strategy, JOB, 8, stack, compose=False).programs[0].ops
        mine = [op for op in ops if op.awaited and (op.layer, op.microbatch) == (5, 1)]
        waits[stack.kernels.clamped_gate] = sorted(op.phase for op in mine)
    assert waits["fused"] == ["forward"], "for the counts of rows"
    assert waits["apart"] == ["forward", "forward", *(["recompute"] if modules else [])]


def test_clamps_keep_what_they_read_and_what_they_make() -> None:
    """Two halves, 8 passes over one of them forward and 15 back; the gate moves what it does anyway."""
    strategy = replace(megatron(8, expert_parallel=8, recompute="none"), stack="megatron-core")
    kernels = {}
    for stack in _stacks():
        tape = passes_of(make_context(MODEL, strategy, JOB, 8, stack)).tape(5)
        kernels[stack.kernels.clamped_gate] = {kernel.name: kernel for kernel in tape.kernels}
    (clamps,) = kernels["apart"].keys() - kernels["fused"].keys()
    one, gate, plain = (
        kernels["apart"][clamps],
        kernels["apart"]["experts_act"],
        kernels["fused"]["experts_act"],
    )
    half = gate.writes[0].bytes
    assert (one.bytes, one.back_bytes, one.writes[0].bytes) == (8 * half, 15 * half, 2 * half)
    assert one.saves == plain.saves
    assert gate.saves == (one.writes[0].name,)
    assert (gate.bytes, gate.back_bytes) == (plain.bytes, plain.back_bytes)


def test_clamps_of_two_tensors_keep_both() -> None:
    """As a user's stack may have them: gate and up by a product each."""
    core = load_stack("megatron-core")
    apart = replace(core, kernels=replace(core.kernels, gate_up="separate"))
    strategy = replace(megatron(8, expert_parallel=8), stack="megatron-core")
    tape = passes_of(make_context(MODEL, strategy, JOB, 8, apart)).tape(5)
    gate = next(kernel for kernel in tape.kernels if kernel.name == "experts_act")
    assert len(gate.reads) == 2
    assert all(name.endswith("_clamped") for name in gate.reads)


def test_what_biases_and_clamps_add_to_the_host_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_biases.json").read_text())["added"]
    found = {name: (cost["forward"], cost["backward"]) for name, cost in added.items()}
    assert found["clamps"] == pytest.approx(host_costs.CLAMPS, abs=0.05)
    assert found["biases"] == pytest.approx(host_costs.BIASES["layer"], abs=0.05)
    assert found["bias"] == pytest.approx(host_costs.BIASES["expert"], abs=0.05)
    core, fused = _stacks()
    plain = replace(MODEL, swiglu_limit=0.0, expert_bias=False)
    strategy = replace(megatron(8, expert_parallel=8), stack="megatron-core")
    took = [
        kinds_of(model, stack, strategy)["experts"]
        for model, stack in ((plain, core), (MODEL, fused), (MODEL, core))
    ]
    for place in (0, 1):
        bias = host_costs.BIASES["layer"][place] + 4 * host_costs.BIASES["expert"][place]
        assert took[1][place] - took[0][place] == pytest.approx(bias)
        assert took[2][place] - took[1][place] == pytest.approx(host_costs.CLAMPS[place])


@pytest.mark.parametrize("name", ["megatron-core", "megatron-lm", "megatron-fsdp", "megatron-bridge"])
def test_megatron_core_pads_rows_for_8_bits_unless_routes_are_padded(name: str) -> None:
    """TEGroupedMLP.forward; NeMo's Grok has experts one by one, Primus pads the map of routes."""
    assert load_stack(name).kernels.expert_padding == "aligned"
    assert {load_stack(other).kernels.expert_padding for other in ("nemo", "primus-2026")} == {"none"}


@pytest.mark.parametrize(
    ("matmul", "dispatcher", "reads", "copies"),
    [
        ("mxfp8", "alltoall", "always", 2), ("mxfp8", "deepep", "always", 2),
        ("mxfp8", "hybridep", "always", 0), ("mxfp8", "alltoall", "never", 0),
        ("compute", "alltoall", "always", 0),
    ],
)  # fmt: skip
def test_rows_are_padded_for_products_in_8_bits(
    matmul: MatmulDType, dispatcher: Dispatcher, reads: Literal["never", "always"], copies: int
) -> None:
    """One more copy each way of all rows, before the experts and after them."""
    bridge = load_stack("megatron-bridge")
    bridge = replace(bridge, host=replace(bridge.host, counts_read=reads))
    strategy = megatron(8, expert_parallel=8, token_dispatcher=dispatcher, recompute="none")
    precision = replace(strategy.precision, matmul=matmul)
    strategy = replace(strategy, stack="megatron-bridge", precision=precision)
    moved = {}
    for padding in ("none", "aligned"):
        stack = replace(bridge, kernels=replace(bridge.kernels, expert_padding=padding))
        tape = passes_of(make_context(load_model("qwen3_30b_a3b"), strategy, JOB, 8, stack)).tape(5)
        moved[padding] = {kernel.name: kernel for kernel in tape.kernels}
    for name in ("sort", "unsort"):
        plain, padded = moved["none"][name], moved["aligned"][name]
        assert padded.bytes - plain.bytes == copies * plain.writes[0].bytes
        back = 2 * plain.bytes if plain.back_bytes is None else plain.back_bytes
        assert (padded.back_bytes or 2 * padded.bytes) - back == copies * plain.writes[0].bytes


def test_experts_without_a_gate_are_weighed_after_their_activation() -> None:
    """Without bias_activation_fusion GELU and the weights are kernels of their own: what GELU makes is kept
    beside what it reads."""
    model = replace(load_model("olmoe_1b_7b"), ffn_matrices=2)
    strategy = replace(megatron(8, expert_parallel=8, recompute="none"), stack="megatron-core")
    core = load_stack("megatron-core")
    apart = replace(core, kernels=replace(core.kernels, expert_rows="shifted"))
    fused, weighed = (
        next(
            kernel
            for kernel in passes_of(make_context(model, strategy, JOB, 8, stack)).tape(5).kernels
            if kernel.name == "experts_act"
        )
        for stack in (core, apart)
    )
    (more,) = {value.name for value in weighed.writes} - {value.name for value in fused.writes}
    assert more in weighed.saves
    assert set(fused.saves) < set(weighed.saves)
    size = fused.writes[0].bytes
    assert (weighed.bytes, weighed.back_bytes) == (4 * size, 9 * size)
    assert (weighed.launches, weighed.back_launches) == (2, 4)


def test_hybrideps_kernels_permute_rows_whatever_is_fused() -> None:
    """dispatch_with_permute and combine_with_unpermute: no rows by torch's indexing, added by no atomic
    operations; nothing of a permutation for the host."""
    stack = load_stack("megatron-lm")
    assert stack.kernels.row_sums == "atomic"
    kinds: dict[Dispatcher, set[bool]] = {}
    dispatchers: tuple[Dispatcher, ...] = ("deepep", "hybridep")
    parts: tuple[Part, ...] = ("forward", "backward")
    for dispatcher in dispatchers:
        strategy = megatron(8, expert_parallel=8, token_dispatcher=dispatcher, recompute="none")
        context = make_context(MODEL, replace(strategy, stack=stack.name), JOB, 8, stack)
        mine = [one for one in passes_of(context).tape(5).kernels if one.name in ("sort", "unsort")]
        done = [work for one in mine for part in parts for work in works(one, part, context)]
        kinds[dispatcher] = {work.indexed or work.sums > 0 or work.host > 0 for work in done}
    assert kinds == {"deepep": {True}, "hybridep": {False}}
