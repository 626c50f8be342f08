"""Targets that do not count: every loss gives torch's own value and gradients without them."""

import pytest
import torch
import torch.nn.functional as F

from mopexec.distributed.mesh import Group
from mopexec.flat.vocabulary import Ring, local_loss
from mopexec.modules.loss import chunked_loss, full_loss

TOKENS, VOCABULARY, HIDDEN, SCALE = 11, 23, 8, 0.1


def flat(make):
    def run(hidden, head, targets):
        grad_head = torch.zeros_like(head)
        with torch.no_grad():
            loss, grad_hidden = make(hidden.detach(), targets, head.detach(), grad_head)
        return loss * SCALE, grad_hidden, grad_head

    return run


def ring(moves_weights):
    one = Ring(Group((0,), 0, None), VOCABULARY, 3, moves_weights=moves_weights)
    return flat(lambda hidden, targets, head, grad: one.loss(hidden, targets, head, grad, SCALE))


def modules(loss):
    def run(hidden, head, targets):
        value = loss(hidden, head, targets, SCALE)
        return value.detach(), *torch.autograd.grad(value, (hidden, head))

    return run


@pytest.mark.parametrize(
    "run",
    [
        flat(lambda hidden, targets, head, grad: local_loss(hidden, targets, head, grad, SCALE, 4)),
        ring(True),
        ring(False),
        modules(full_loss),
        modules(lambda *given: chunked_loss(*given, 4)),
    ],
    ids=["flat", "ring of weights", "ring of activations", "full", "chunked"],
)
def test_targets_that_do_not_count(run):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 4, 5, 10]] = -100
    wanted = F.cross_entropy(hidden @ head.t(), targets, reduction="sum") * SCALE
    expected = (wanted, *torch.autograd.grad(wanted, (hidden, head)))
    for found, value in zip(run(hidden, head, targets), expected, strict=True):
        torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)
