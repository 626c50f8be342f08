"""Targets that do not count: every loss gives torch's own value and gradients without them."""

import msgspec
import pytest
import torch
import torch.nn.functional as F

from mopexec.distributed.mesh import Group
from mopexec.model import Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.modules.loss import chunked_loss, full_loss
from mopexec.operators.loss import Ring
from mopexec.operators.loss import chunked_loss as flat_loss
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.spec.presets import load_model

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
        flat(lambda hidden, targets, head, grad: flat_loss(hidden, targets, head, grad, SCALE, 4)),
        ring(True),
        ring(False),
        modules(full_loss),
        modules(lambda *given: chunked_loss(*given, 4)),
    ],
    ids=["flat", "ring of weights", "ring of activations", "full", "chunked"],
)
@pytest.mark.parametrize("masked", [[0, 4, 5, 10], range(TOKENS)], ids=["some", "all"])
def test_targets_that_do_not_count(run, masked):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[list(masked)] = -100
    wanted = F.cross_entropy(hidden @ head.t(), targets, reduction="sum") * SCALE
    expected = (wanted, *torch.autograd.grad(wanted, (hidden, head)))
    for found, value in zip(run(hidden, head, targets), expected, strict=True):
        torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)


def test_mtp_modules_embed_tokens_that_do_not_count():
    """By hand: every hidden state is that of the whole text, and the losses are of the targets that count."""
    spec = msgspec.structs.replace(load_model("tiny"), num_nextn_predict_layers=2)
    model = Transformer(spec, torch.float64)
    fill(model, Seeded(3))
    model.set_auxiliary(Auxiliary(mtp=0.5))
    text = torch.randint(0, spec.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    tokens, whole = text[:, :-1], text[:, 1:]
    masked = torch.where(tokens % 3 == 0, -100, whole)
    masked[:, -1] = whole[:, -1]
    ids = [F.pad(one, (0, 2), value=-100) for one in (tokens, masked, whole)]
    found, expected = model.terms(ids[0], ids[1], 0, 0.1), model.terms(ids[0], ids[2], 0, 0.1)

    for term, other in zip(found, expected, strict=True):
        torch.testing.assert_close(term.hidden, other.hidden, rtol=0, atol=0)
    x = model._hidden(tokens, model.given(tokens, 0))
    for depth, module in enumerate(model.mtp, start=1):
        words = F.pad(text, (0, 1))[:, depth : depth + 16]
        x = module(x, model.embedding(words), model.given(tokens, 0))
        torch.testing.assert_close(found[depth].hidden, x)
        assert torch.equal(found[depth].targets[:, : 16 - depth], masked[:, depth:])
