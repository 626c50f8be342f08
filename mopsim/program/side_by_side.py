"""Sequences of a microbatch that go through a layer side by side, where parameters are gathered layer by
layer: each computes while rows of others travel to their experts and back (XTuner's intra-layer microbatches,
xtuner/v1/module/decoder_layer/moe_decoder_layer.py, `_micro_batch_forward`).

Parameters of a layer are gathered once for all of them and gradients reduced once: to the sharding it is a
layer like any other, only that its template is woven of one for each sequence.
"""

from dataclasses import replace

from msgspec import structs

from mopsim.program.builder import turns_of
from mopsim.program.context import Context
from mopsim.program.template import Memory, Template
from mopsim.program.workload import Op, Work
from mopsim.spec.capability import Job, holds
from mopsim.spec.layout import num_chunks


def abreast(context: Context) -> int:
    """Sequences of a microbatch that go through a layer side by side; 1: all are one batch."""
    c = context
    together = holds("side_by_side")(Job(c.model, c.strategy, c.training, c.stack))
    return c.strategy.micro_batch if together and c.strategy.overlap.experts else 1


def of_one(context: Context) -> Context:
    """Of one sequence, with as many microbatches as there are."""
    count, how = context.strategy.micro_batch, context.strategy.experts
    tokens = context.tokens // count
    return replace(
        context,
        strategy=structs.replace(context.strategy, micro_batch=1),
        training=structs.replace(context.training, global_batch=context.training.global_batch // count),
        shapes=structs.replace(context.shapes, tokens=tokens),
        chunks=num_chunks(tokens, how.chunk_tokens, how.max_chunks),
    )


def woven(one: Template, count: int, width: int) -> Template:
    """`count` of a template by turns (`turn_ends`): what precedes dispatch of all, then dispatch of all, and
    so on. Weight gradients of all but the first, of `width` bytes a number, are added to the first's: two
    are read, one is written (autograd's accumulation in one graph)."""
    turns = turns_of(one.pieces)
    order = [(which, piece) for turn in turns for which in range(count) for piece in turn]
    places = {(which, piece.index): place for place, (which, piece) in enumerate(order)}
    pieces, memory, before = list[Op](), list[Memory](), dict[int, Memory]()
    for place, (which, piece) in enumerate(order):
        deps = tuple(places[which, dep] if dep >= 0 else dep for dep in piece.deps)
        work = (*piece.work, *_added(piece, width)) if which else piece.work
        pieces.append(structs.replace(piece, index=place, deps=deps, work=work))
        memory.append(one.memory[piece.index])
        if piece.index in one.before:
            before[place] = one.before[piece.index]
    last = len(one.pieces)
    before[len(order)] = one.before.get(last, ()) * count
    ends = tuple(places[which, end] for which in range(count) for end in one.ends)
    return Template(tuple(pieces), ends, tuple(memory), before, {"end": len(order)})


def _added(piece: Op, width: int) -> tuple[Work, ...]:
    made = [work for work in piece.work if work.gradient]
    size = 3.0 * width * sum(work.m * work.n * work.count for work in made)
    return (Work("memory_bound", bytes=size, launches=len(made)),) if made else ()
