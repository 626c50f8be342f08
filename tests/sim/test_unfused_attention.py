"""FlexAttention that nothing compiles: scores come and go in memory, and the host maps the mask."""

import json
from collections import Counter
from pathlib import Path

from msgspec.structs import replace

from mopsim.cost.stack import SCORE_PRODUCTS, UNFUSED_BYTES, UNFUSED_PRODUCTS
from mopsim.engine import simulate
from mopsim.graph.host_costs import UNFUSED
from mopsim.graph.layer import decoder_layer
from mopsim.graph.shapes import Shapes
from mopsim.graph.unfused import LAUNCHES, SCORES_HELD
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2

TINY = load_model("tiny")


def test_what_was_measured_is_what_is_charged() -> None:
    found = json.loads((Path(__file__).parents[2] / "reports/host/flex_unfused.json").read_text())
    for phase, host in zip(("forward", "backward"), UNFUSED, strict=True):
        traffic = found["traffic"][phase]
        assert traffic == {"bytes": UNFUSED_BYTES[phase], "kernels": LAUNCHES[phase]}
        assert host == round(found["host"][phase] - LAUNCHES[phase])


def test_each_product_of_the_forward_has_two_gradients_of_its_width() -> None:
    """Q K^T is as wide as a key, P V as a value; without a kernel that keeps the scores Q K^T comes again."""
    ahead, back, again = (
        Counter("".join(products))
        for products in (
            SCORE_PRODUCTS["forward"],
            SCORE_PRODUCTS["backward"],
            UNFUSED_PRODUCTS["backward"],
        )
    )
    assert ahead == Counter("kv")
    assert back == ahead + ahead
    assert again == back + Counter("k")


def test_it_keeps_what_a_flash_kernel_keeps_and_holds_scores_meanwhile() -> None:
    seq, heads = 64, TINY.num_attention_heads
    plain, unfused = (
        next(
            one
            for one in decoder_layer(TINY, Shapes(seq, seq, unfused=how), 0).kernels
            if one.kind == "attention"
        )
        for how in (False, True)
    )
    assert (plain.saves, plain.writes) == (unfused.saves, unfused.writes)
    scores = heads * seq * seq
    assert sum(size for _, size in unfused.scratch) - sum(size for _, size in plain.scratch) == (
        scores * SCORES_HELD["forward"]
    )


def test_it_takes_longer_by_the_square_of_a_sequence() -> None:
    """Twice the tokens: more than twice as much beside the compiled kernel, whose documents stay short."""
    more = []
    for seq in (4096, 8192):
        times = []
        for kernel in ("flex", "unfused"):
            stack = load_stack("torchtitan-2026")
            changed = replace(stack, kernels=replace(stack.kernels, attention={"default": kernel}))
            training = TrainSpec(seq_len=seq, global_batch=8, attention_mask="document", document_tokens=512)
            card = load_profile("h100-sxm-80g")
            times.append(simulate(TINY, card, 1, fsdp2(8), training, stack=changed).step_time)
        more.append(times[1] - times[0])
    assert more[0] > 0
    assert more[1] > 2 * more[0]
