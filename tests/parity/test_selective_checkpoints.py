"""What torch's selective checkpoints keep of an eager layer, against what a stack says that they keep."""

import shutil
from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.spec.strategy import Activations
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.exec.spawn import pool
from tests.parity.selective_worker import MODEL, TOKENS
from tests.software import changed


def kept_by_us(**kernels: Any) -> int:
    own = changed("torchtitan-2026", kernels=kernels)
    strategy = replace(fsdp2(8), activations=Activations(recompute="selective"))
    training = TrainSpec(seq_len=TOKENS, global_batch=8, routing="balanced")
    passes = Passes(make_context(MODEL, own.resolve(strategy), training, 8, own))
    return sum(size for _, size in passes.kept(0))


@pytest.mark.skipif(not shutil.which("g++"), reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize(("whole", "kernel"), [(True, "flex"), (False, "flash2")])
def test_a_selective_checkpoint_keeps_what_a_compiled_attention_hands_out(whole: bool, kernel: str) -> None:
    """FlexAttention compiled by itself keeps queries, keys and values as its backward reads them, beside what
    their product makes; a kernel that torch sees as an operator keeps its output and a number a row and head,
    which on a CPU is no operator of the list."""
    found = pool(1).run("tests.parity.selective_worker", "kept", whole)[0]
    said = kept_by_us(attention={"default": kernel})
    heads = TOKENS * MODEL.num_attention_heads
    assert found == said - (0 if whole else heads * (2 * MODEL.head_dim + 4))
