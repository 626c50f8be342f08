"""Documents of a sequence that attention does not cross: what is computed, and who says how long they are."""

from typing import Literal

import pytest
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.cost.stack import as_used
from mopsim.engine import run, simulate
from mopsim.graph.flops import flops_per_token
from mopsim.graph.shapes import Shapes, causal_pairs, pairs_of_a_slice
from mopsim.program import lower
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from mopsim.validate.tables import documents_of

DENSE, WINDOWED = load_model("qwen3_30b_a3b"), load_model("gpt_oss_20b")
WINDOW = WINDOWED.sliding_window


@pytest.mark.parametrize(
    ("model", "documents", "band"),
    [
        (DENSE, 0, (0, False)),
        (DENSE, 1140, (1140, True)),
        (WINDOWED, 1140, (WINDOW, False)),
        (WINDOWED, WINDOW // 2, (WINDOW // 2, True)),
    ],
    ids=["one document", "documents", "windows within documents", "documents within windows"],
)
def test_a_query_attends_to_its_document_and_its_window(
    model: ModelSpec, documents: int, band: tuple[int, bool]
) -> None:
    windowed = next((layer for layer in range(model.num_hidden_layers) if model.window(layer)), 0)
    shapes = Shapes(8192, 8192, documents=documents)
    assert shapes.band(model, windowed) == band
    assert causal_pairs(8192, *band) <= causal_pairs(8192)


def test_shorter_documents_take_less_of_a_step() -> None:
    machine, stack = load_profile("b200-sxm-192g"), load_stack("torchtitan-compile-2026")
    strategy = fsdp2(8)
    whole = TrainSpec(seq_len=8192, global_batch=8)

    def step(training: TrainSpec) -> float:
        workload = lower(DENSE, strategy, training, machine.scale_up_size, stack)
        return run(workload, DENSE, machine, strategy, training).step_time

    apart = replace(whole, attention_mask="document")
    short, longer, one, unknown = (step(replace(apart, document_tokens=n)) for n in (500, 2000, 8192, 0))
    assert short < longer < one == unknown == step(whole)


@pytest.mark.parametrize("kernel", ["masked", "scores"])
def test_a_kernel_that_computes_what_is_hidden_gains_nothing(kernel: str) -> None:
    machine, stack = load_profile("h100-sxm-80g"), load_stack("transformers-fsdp1")
    eager = replace(stack, kernels=replace(stack.kernels, attention={"default": kernel}))
    apart = TrainSpec(seq_len=2048, global_batch=8, attention_mask="document", mtp_loss_coef=0.0)

    def busy(model: ModelSpec, training: TrainSpec, software: Stack) -> float:
        return simulate(model, machine, 1, fsdp2(8), training, software).busy["attention"]

    short = replace(apart, document_tokens=256)
    full = replace(WINDOWED, sliding_window=0, sliding_window_period=1, layer_types=())
    assert busy(DENSE, short, eager) == busy(DENSE, apart, eager)
    assert busy(DENSE, short, stack) < busy(DENSE, apart, stack)
    assert busy(WINDOWED, apart, eager) == pytest.approx(busy(full, apart, eager))


def test_the_busiest_of_ranks_in_order_has_no_less_than_its_share() -> None:
    """Of the last's slice the middle of a document may be missing."""
    whole = causal_pairs(131072, 54238, chunked=True)
    busiest = pairs_of_a_slice(131072, 8, True, 54238, chunked=True)
    assert whole / 8 < busiest <= 16384 * 54238
    assert pairs_of_a_slice(8192, 4, True) == causal_pairs(8192) - causal_pairs(6144)


def test_model_flop_are_of_what_a_token_attends_to() -> None:
    whole, apart = (flops_per_token(DENSE, 8192, documents) for documents in (0, 1024))
    assert apart["attention_core"] == pytest.approx(whole["attention_core"] * 1025 / 8193)
    assert apart["attention"] == whole["attention"]


def test_only_documents_that_are_apart_have_a_length() -> None:
    with pytest.raises(MopError, match="document_tokens: 512 needs attention_mask 'document'"):
        TrainSpec(seq_len=4096, global_batch=8, document_tokens=512)


@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("tokens", [-1, 4097])
def test_a_document_is_no_longer_than_its_sequence(mask: Literal["causal", "document"], tokens: int) -> None:
    with pytest.raises(MopError, match=f"^document_tokens: {tokens} must lie between 0 and seq_len 4096$"):
        TrainSpec(seq_len=4096, global_batch=8, attention_mask=mask, document_tokens=tokens)


def test_shorter_sequences_cut_documents() -> None:
    whole = TrainSpec(seq_len=4096, global_batch=8, attention_mask="document", document_tokens=2000)
    assert [whole.at_length(n).document_tokens for n in (1024, 2048, 8192)] == [1024, 2000, 2000]


def test_a_kernel_has_rates_of_its_own_where_they_are_known() -> None:
    """FlexAttention's on Blackwell; elsewhere it is so much slower than FlashAttention-2."""
    stack, batch = load_stack("torchtitan-2026"), TrainSpec(seq_len=8192, global_batch=8)
    flash = replace(stack, kernels=replace(stack.kernels, attention={"default": "flash2"}))
    rates = {}
    for name in ("b200-sxm-192g", "h100-sxm-80g"):
        machine = load_profile(name)
        flex, plain = (as_used(machine, one, DENSE, batch).device.attention for one in (stack, flash))
        rates[name] = flex.forward / plain.forward
    assert rates["h100-sxm-80g"] == pytest.approx(1 / 1.18)
    assert rates["b200-sxm-192g"] > 1.4


def test_a_table_says_that_attention_crosses_documents() -> None:
    """0 opts out of the documents that notes give a program's rows."""
    assert documents_of({"document_tokens": "0"}, "document_tokens") == 0
    with pytest.raises(MopError, match=r"document_tokens: '1\.5' is not a whole number"):
        documents_of({"document_tokens": "1.5"}, "document_tokens")
