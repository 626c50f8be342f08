"""Pipeline schedules as pure order functions: which (phase, microbatch, model chunk) a stage works on, in
order."""

from collections import Counter
from typing import Literal

Slot = tuple[Literal["forward", "backward", "input_grad", "weight_grad"], int, int]
"""(phase, microbatch, virtual stage). input_grad and weight_grad split a backward in zero-bubble
schedules."""


def warm_up(stages: int, virtual: int, stage: int, ahead: int = 0) -> int:
    """Forwards before those that a backward follows. Where a stage has no more than these, none has one."""
    if virtual == 1:
        return stages - stage - 1 + ahead
    return (stages - stage - 1) * 2 + (virtual - 1) * stages + ahead


def one_forward_one_backward(
    stages: int, microbatches: int, stage: int, ahead: int = 0, virtual: int = 1
) -> list[Slot]:
    """1F1B (PipeDream-flush, arXiv 2006.09503): warm up with forwards, then alternate, then drain. With
    several virtual stages interleaved (Megatron-LM, arXiv 2104.04473): microbatches in groups of `stages` go
    round the model chunks. ahead: forwards more before the first backward."""
    total = microbatches * virtual
    warm = min(warm_up(stages, virtual, stage, ahead), total)

    def slot(phase: Literal["forward", "backward"], index: int) -> Slot:
        """The index-th forward or backward."""
        group, inside = divmod(index, stages * virtual)
        first = group * stages
        chunk, offset = divmod(inside, min(stages, microbatches - first))
        return phase, first + offset, chunk if phase == "forward" else virtual - 1 - chunk

    order = [slot("forward", i) for i in range(warm)]
    for i in range(total - warm):
        order += [slot("forward", warm + i), slot("backward", i)]
    return order + [slot("backward", i) for i in range(total - warm, total)]


def zero_bubble(stages: int, microbatches: int, stage: int) -> list[Slot]:
    """ZB-H1 (arXiv 2401.10241): backward split in input and weight gradients; weight gradients fill the
    drain.

    A weight gradient is put off by at most `stage` microbatches. What it is made of is held beside what 1F1B
    holds.
    """
    order: list[Slot] = []
    waiting: list[int] = []
    for phase, microbatch, _ in one_forward_one_backward(stages, microbatches, stage):
        if phase == "forward":
            order.append((phase, microbatch, 0))
            continue
        order.append(("input_grad", microbatch, 0))
        waiting.append(microbatch)
        if len(waiting) > stage:
            order.append(("weight_grad", waiting.pop(0), 0))
    return order + [("weight_grad", microbatch, 0) for microbatch in waiting]


def dualpipe_v(stages: int, microbatches: int, stage: int) -> list[tuple[Slot, ...]]:
    """The turns of DualPipeV (arXiv 2412.19437; deepseek-ai/DualPipe 3da1bbea, dualpipe/dualpipev.py): chunk
    0 of the stages lies on the way down a V, chunk 1 on its way up. A forward of one and a backward of the
    other are one turn in the steady state; some backwards before and after it leave their weight gradients to
    later, the first one first. Needs two microbatches a stage."""
    found: list[tuple[Slot, ...]] = []
    begun, waiting = Counter[tuple[bool, int]](), list[tuple[int, int]]()
    after, before = stages - stage - 1, stage + 1

    def play(*passes: tuple[Literal["forward", "backward", "input_grad"], int]) -> None:
        turn: list[Slot] = []
        for phase, chunk in passes:
            turn.append((phase, begun[phase == "forward", chunk], chunk))
            begun[phase == "forward", chunk] += 1
            waiting.extend([turn[-1][1:]] * (phase == "input_grad"))
        found.append(tuple(turn))

    def weights() -> None:
        found.append((("weight_grad", *waiting.pop(0)),))

    for _ in range(2 * after):
        play(("forward", 0))
    for _ in range(before):
        play(("forward", 0))
        play(("forward", 1))
    for _ in range(after):
        play(("input_grad", 1))
        weights()
        play(("forward", 1))
    for turn in range(microbatches - 2 * stages + before):
        if turn == after == 0:  # its backward waits for a forward just before
            play(("forward", 0))
            play(("backward", 1))
        else:
            play(("forward", 0), ("backward", 1))
        play(("forward", 1), ("backward", 0))
    for _ in range(after):
        play(("backward", 1))
        play(("forward", 1), ("backward", 0))
    for place in range(2 * before):
        play(("backward" if place < before else "input_grad", 1 - place % 2))
    for _ in range(after):
        weights()
        play(("input_grad", 0))
    while waiting:
        weights()
    return found


def order(
    schedule: str, stages: int, virtual: int, microbatches: int, stage: int, ahead: int = 0
) -> list[Slot]:
    """The slots of one stage, by the name in `Pipeline.schedule`.

    ahead: forwards beyond the warm-up, so that a forward and the backward after it are of two microbatches,
    as those of a turn of `dualpipe_v` are anyway.
    """
    if schedule == "dualpipe_v":
        return [slot for turn in dualpipe_v(stages, microbatches, stage) for slot in turn]
    if schedule == "zero_bubble" and stages > 1:  # nothing to fill in a stage alone
        return zero_bubble(stages, microbatches, stage)
    chunks = virtual if schedule == "interleaved" else 1
    return one_forward_one_backward(stages, microbatches, stage, ahead, chunks)


def turns(
    schedule: str, stages: int, virtual: int, microbatches: int, stage: int, ahead: int = 0
) -> list[tuple[Slot, ...]]:
    """The slots of one stage, those together whose messages travel together: a forward and the backward after
    it, of an interleaved schedule or where `ahead` sets them apart."""
    if schedule == "dualpipe_v":
        return dualpipe_v(stages, microbatches, stage)
    slots = order(schedule, stages, virtual, microbatches, stage, ahead)
    paired = virtual > 1 or ahead
    if not paired or warm_up(stages, virtual, stage, ahead) >= microbatches * virtual:
        return [(slot,) for slot in slots]
    found: list[tuple[Slot, ...]] = []
    for slot in slots:
        if found and slot[0] == "backward" and [one[0] for one in found[-1]] == ["forward"]:
            found[-1] = (*found[-1], slot)
        else:
            found.append((slot,))
    return found
