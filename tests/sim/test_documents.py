"""Documents of a sequence that attention does not cross: what is computed, and who says how long they are."""

import pytest
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.cost.stack import as_used
from mopsim.engine import run
from mopsim.graph.shapes import Shapes, causal_pairs
from mopsim.program import lower
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2

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


def test_only_documents_that_are_apart_have_a_length() -> None:
    with pytest.raises(MopError, match="document_tokens: 512 is of attention_mask 'document'"):
        TrainSpec(seq_len=4096, global_batch=8, document_tokens=512)


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
