"""The loss: full logits, chunks of rows, or the ring over a sharded vocabulary."""

from mopsim.layers.tape import Kernel, Matmul
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.tapes.sharding import Sharding
from mopsim.lowering.workload import Work
from mopsim.spec.layout import ceil_div, ring_moves_weights, token_slices

_C = "vocabulary"


def loss(context: Context, builder: Builder, sharding: Sharding, place: int, deps: list[int]) -> int:
    """Final norm, projection, cross entropy and their backward from the output of `place` layers: leaves
    `dx`, frees that boundary. Returns the last op."""
    c, b = context, builder
    b.make("final", c.hidden)
    work = (Work("memory_bound", bytes=2.0 * c.hidden),)
    last = b.add("final_norm", "compute", _C, "forward", work, deps=deps)
    b.make("dfinal", c.hidden)
    kind = c.strategy.vocabulary.loss
    last = _ring(c, b, sharding, last) if kind == "ring" else _gathered(c, b, sharding, last)
    b.drop("final")
    b.make("dx", c.hidden)
    work = (Work("memory_bound", bytes=4.0 * c.hidden, launches=2),)
    last = b.add("final_norm", "compute", _C, "backward", work, deps=[last])
    b.drop("dfinal", f"x{place}")
    return last


def _products(c: Context, b: Builder, rows: float, columns: float, backward: bool) -> tuple[Work, ...]:
    """Of the output projection, in the dtype that the strategy's recipe gives it."""
    product = Matmul(rows, columns, c.model.hidden_size)
    return b.works(Kernel("logits", "matmul", _C, (), (), matmuls=(product,)), backward)


def _gathered(c: Context, b: Builder, sharding: Sharding, last: int) -> int:
    """Logits of all tokens, or of `chunk_tokens` rows at a time, against the gathered head."""
    vocabulary = c.strategy.vocabulary
    V = c.model.vocab_size / (vocabulary.degree if vocabulary.loss == "vocab_parallel" else 1)
    gathered = sharding.gather(c.edges["head"], "forward") if "head" in c.edges else None
    ready = [last] + ([gathered] if gathered is not None else [])
    if "head" in c.edges:
        b.make("dhead", c.edges["head"].padded * c.grad, "gathered_grads")
    for start, stop in token_slices(c.tokens, vocabulary.chunk_tokens):
        n = stop - start
        b.make("logits", int(n * V * c.b), "logits")
        last = b.add("logits", "compute", _C, "forward", _products(c, b, n, V, False), deps=ready)
        b.make("exact", int(n * V * c.wide), "logits")
        b.make("softmax", int(n * V * c.wide), "logits")
        last = b.add(
            "cross_entropy",
            "compute",
            _C,
            "forward",
            (Work("memory_bound", bytes=4.0 * n * V * c.wide, launches=3),),
            deps=[last],
        )
        b.drop("exact")
        b.make("dlogits", int(n * V * c.wide), "logits")
        last = b.add(
            "cross_entropy",
            "compute",
            _C,
            "backward",
            (Work("memory_bound", bytes=4.0 * n * V * c.wide, launches=3),),
            deps=[last],
        )
        b.drop("softmax", "logits")
        last = b.add("logits", "compute", _C, "backward", _products(c, b, n, V, True), deps=[last])
        b.drop("dlogits")
    b.flush(_C, "backward")
    if "head" in c.edges:
        sharding.release(c.edges["head"], "backward")
        last = sharding.reduce(c.edges["head"], "backward", [last], "dhead")
    return last


def _ring(c: Context, b: Builder, sharding: Sharding, last: int) -> int:
    """P rounds of strips N x V/P, forward for the normaliser, backward for the gradients; a block moves on
    beside each."""
    P = c.strategy.vocabulary.degree
    columns = ceil_div(c.model.vocab_size, P)
    weights = ring_moves_weights(c.tokens, c.model.vocab_size, P)
    head = c.edges["head"]
    gathered = sharding.gather(head, "forward")
    ready = [last] + ([gathered] if gathered is not None else [])
    block = columns * c.model.hidden_size * c.b if weights else c.hidden
    b.make("dhead", head.padded * c.grad, "gathered_grads")
    b.make("numbers", 4 * c.tokens * c.wide, "logits")
    moving = 1 if P > 1 else 0
    slices = token_slices(c.tokens, c.strategy.vocabulary.chunk_tokens)
    for backward in (False, True):
        phase = "backward" if backward else "forward"
        if moving:
            b.make("moving", 2 * block * (2 if backward else 1), "logits")
        arrived = last
        for turn in range(P):
            sent = arrived
            if moving and (turn + 1 < P or backward):
                size = float(block * (2 if backward else 1))
                sent = b.collective("ring", "send_recv", size, c.groups["ring"], _C, phase, deps=[arrived])
            for start, stop in slices:
                n = stop - start
                b.make("strip", n * columns * c.b, "logits")
                b.make("exact", n * columns * c.wide, "logits")
                works = (
                    *_products(c, b, n, columns, False),
                    Work("memory_bound", bytes=4.0 * n * columns * c.wide, launches=6),
                )
                last = b.add(
                    "strip", "compute", _C, "recompute" if backward else phase, works, deps=[*ready, arrived]
                )
                if backward:
                    last = b.add("strip", "compute", _C, phase, _products(c, b, n, columns, True))
                b.drop("strip", "exact")
            arrived = sent
        b.flush(_C, phase)
        if moving:
            b.drop("moving")
    b.drop("numbers")
    b.flush(_C, "backward")
    sharding.release(head, "backward")
    return sharding.reduce(head, "backward", [last], "dhead")
