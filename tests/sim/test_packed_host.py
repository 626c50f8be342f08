"""What Transformer Engine's layers take of the host in some runs, as measured: documents of a packed row that
are turned one after the other or put in order, Triton's launches."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mopsim.common.errors import SpecError
from mopsim.graph.host_costs import DOCUMENTS, LAUNCHES, ORDERED
from mopsim.program import lower
from mopsim.program.host_time import kinds_of
from mopsim.spec.documents import number
from mopsim.spec.host import HostCosts
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Exchange, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

HOST = Path(__file__).parents[2] / "reports/host"
FOUND = json.loads((HOST / "te_packed.json").read_text())["parts"]
replace = msgspec.structs.replace


@pytest.mark.parametrize(("name", "kind"), [("gpt_oss_20b", "rotary"), ("deepseek_v3", "latent_rotary")])
def test_each_document_more_takes_the_host_what_was_measured(name: str, kind: str) -> None:
    each = FOUND[kind.replace("_", " ")]["document"]
    assert DOCUMENTS[kind] == pytest.approx((each["forward"], each["backward"]), abs=0.06)
    core, strategy = load_stack("megatron-core"), Strategy(name="megatron", world_size=8)
    host = replace(core.host, documents=21.0)
    took = {}
    for rotary in ("fused", "halves"):
        eager = replace(core.kernels, rotary=rotary)
        for documents, given in ((1, core.host), (21, host)):
            stack = replace(core, kernels=eager, host=given)
            took[rotary, documents] = kinds_of(load_model(name), stack, strategy)["attention"]
    assert took["fused", 21] == took["fused", 1], "a kernel turns a row at once"
    for place in (0, 1):
        more = took["halves", 21][place] - took["halves", 1][place]
        assert more == pytest.approx(20 * DOCUMENTS[kind][place])


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_piece_of_a_document_that_is_exchanged_takes_the_host_what_was_measured(ranks: int) -> None:
    found = json.loads((HOST / "te_ordered.json").read_text())
    read = 33 / 13.5  # us of one, of a Linear
    for place, phase in enumerate(("forward", "backward")):
        whole = found["passes"][phase] + read * found["reads"][phase]
        assert ORDERED[place] == pytest.approx(whole, rel=0.02)
    model, core = load_model("qwen3_8b"), load_stack("megatron-core")
    apart = replace(core, host=replace(core.host, orders_documents=False))
    counted = replace(core, host=replace(core.host, documents=40.0))
    causal = TrainSpec(seq_len=8192, global_batch=16)
    packed = replace(causal, attention_mask="document", document_tokens="400/1")

    def took(stack: Stack, training: TrainSpec, way: Exchange = "ulysses", **more: Any) -> dict[str, float]:
        spread = megatron(8, context_parallel=ranks, context_exchange=way, recompute="full", **more)
        ops = (
            lower(model, replace(spread, stack=core.name), training, 8, stack, compose=False).programs[0].ops
        )
        mine = [op for op in ops if (op.layer, op.microbatch, op.component) == (5, 1, "attention")]
        return {
            phase: sum(work.issued + work.host for op in mine if op.phase == phase for work in op.work)
            for phase in ("forward", "backward", "recompute")
        }

    for stack, documents in ((core, 8192 / 400), (counted, 40.0)):
        ordered, plain = took(stack, packed), took(apart, packed)
        for phase, cost in zip(ordered, (*ORDERED, ORDERED[0]), strict=True):
            more = pytest.approx(2 * ranks * documents * cost, abs=4)  # the read of the lengths
            assert ordered[phase] - plain[phase] == more
    assert took(core, causal) == took(apart, causal), "a row is one document"
    assert took(core, packed, "ring") == took(apart, packed, "ring"), "kernels of its own put parts in order"


def test_documents_of_a_row() -> None:
    assert [number(given, 8192) for given in (0, 512, 8192, "400/1", "20000/1")] == [1, 16, 1, 20.48, 1]


def test_a_row_has_a_document() -> None:
    with pytest.raises(SpecError, match=r"documents: 0\.0 must lie between 1 and 1e"):
        HostCosts(documents=0.0)


def test_launches_by_triton_take_the_host_what_was_measured_where_a_permutation_is_fused() -> None:
    """HybridEP permutes by kernels of its own; the allgather dispatcher permutes once, as DeepEP's does."""
    added = json.loads((HOST / "te_triton.json").read_text())["added"]
    core = load_stack("megatron-core")
    compiled = replace(core, host=replace(core.host, permutes="compiled"))
    apart = replace(core, kernels=replace(core.kernels, row_sums="atomic"))
    for dispatcher in ("alltoall", "deepep", "allgather", "hybridep"):
        plain = Strategy(name="megatron", world_size=8)
        strategy = replace(
            plain, experts=replace(plain.experts, expert_parallel=8, token_dispatcher=dispatcher)
        )
        took = [
            kinds_of(load_model("qwen3_30b_a3b"), stack, strategy)["experts"]
            for stack in (core, compiled, apart)
        ]
        measured = "deepep" if dispatcher == "allgather" else dispatcher
        found = added.get(f"{measured}, 4", {"forward": 0.0, "backward": 0.0})
        for place, phase in enumerate(("forward", "backward")):
            assert took[0][place] - took[1][place] == pytest.approx(LAUNCHES.get(dispatcher, (0, 0))[place])
            assert took[0][place] - took[1][place] == pytest.approx(found[phase], abs=0.06)
        assert took[1] == took[2]
