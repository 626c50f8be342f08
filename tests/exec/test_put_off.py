"""A backward in two halves: what each makes, and how often a checkpointed layer runs again."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mopexec.model.parts import FeedForward, RMSNorm
from mopexec.operators.put_off import PutOff, planned
from mopsim.spec.presets import load_model

TINY = load_model("tiny")


class Block(nn.Module):
    """Counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(TINY.hidden_size, 1e-6, torch.float64, torch.device("cpu"))
        self.ffn = FeedForward(TINY, 12, torch.float64, torch.device("cpu"), bias=True)
        for parameter in self.ffn.parameters():
            nn.init.normal_(parameter)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = x + self.ffn(self.norm(x))
        return out


def _grads(block: Block) -> dict[str, Tensor]:
    return {name: one.grad for name, one in block.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_both_halves_make_what_one_backward_makes(again: bool) -> None:
    torch.manual_seed(3)
    block, x = Block(), torch.randn(5, TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    run: Callable[[Tensor], Tensor] = partial(checkpoint, block, use_reentrant=False) if again else block
    block(x).square().sum().backward()
    expected, of_input = _grads(block), x.grad
    block.zero_grad()
    x.grad = None
    with planned():
        out = run(x)
    later, block.runs = PutOff(), 0
    with later:
        out.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, of_input)
    first = _grads(block)
    assert set(first) == {name for name in expected if not name.endswith("proj.weight")}
    later.make()
    assert block.runs == int(again)
    torch.testing.assert_close(_grads(block), expected)


def test_nothing_is_put_off_elsewhere() -> None:
    block, x = Block(), torch.randn(5, TINY.hidden_size, dtype=torch.float64)
    with PutOff() as later:
        block(x)
    block(x).sum().backward()
    later.make()
    assert len(_grads(block)) == len(list(block.parameters()))
