"""Which values of a tape live when: a forward run, and its reverse with what it makes again."""

from bisect import bisect_right
from collections.abc import Iterable, Set
from dataclasses import dataclass
from itertools import chain

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Played, Step, Tape, Value


@dataclass(frozen=True)
class Recomputation:
    """What a run of a tape leaves for its backward.

    dropped: saved values that the forward frees all the same. kept: saved values that stay.
    again: regions of kernels to run again, each once, before the first kernel of the backward that wants one
    of its values. passed: values kept for a region alone, gone once it has read them.
    """

    dropped: frozenset[str]
    again: tuple[frozenset[int], ...]
    kept: frozenset[str]
    passed: frozenset[str] = frozenset()


NOTHING = Recomputation(frozenset(), (), frozenset())
"""Of a run without a backward."""


def everything(tape: Tape) -> Recomputation:
    """All that the backward starts from is kept."""
    return Recomputation(frozenset(), (), frozenset(tape.kept))


def forward(tape: Tape, chosen: Recomputation) -> list[Played]:
    """A forward run that leaves `chosen.kept` alive, beside the tape's outputs. What a kernel makes for the
    backward alone is a temporary where it is not kept, and comes before what it makes for others."""
    keep = tape.outside | chosen.kept
    last: dict[str, int] = {}
    for index, kernel in enumerate(tape.kernels):
        for name in (*(value.name for value in kernel.writes), *kernel.reads):
            last[name] = index
    last |= {name: max(place, last[name]) for name, place in tape.holds.items()}
    over = _by_place((name, when) for name, when in last.items() if name not in keep)
    looped = _looped(tape, last, keep)
    values = tape.values | looped
    played = []
    for index, kernel in enumerate(tape.kernels):
        made, gone = [value.name for value in kernel.writes], over.get(index, [])
        passing = [name for name in made if last[name] == index and name not in keep]
        rest = [name for name in made if name not in passing]
        own = [] if passing else [name for name in gone if name in looped]  # before outputs are put together

        def steps(names: Iterable[str], sign: int = 1) -> list[Step]:
            return [(values[name].category, sign * values[name].bytes) for name in names]

        inside, later = _spike(kernel.scratch), steps(rest if passing else ())
        parts = (later, inside) if kernel.kind == "attention" else (inside, later)  # blocks of its output
        memory = [*steps(passing or rest), *steps(own, -1), *chain.from_iterable(parts)]
        memory += steps((name for name in gone if name not in own), -1)
        played.append(Played(kernel, False, tuple(memory)))
    return played


def _looped(tape: Tape, last: dict[str, int], keep: Set[str]) -> dict[str, Value]:
    """Values that a loop over experts makes and reads itself, as large as one's."""
    return {
        value.name: replace(value, bytes=int(value.bytes * kernel.loop))
        for kernel in tape.kernels
        if kernel.loop
        for value in kernel.writes
        if value.name not in keep and tape.kernels[last[value.name]].loop
    }


def _by_place(names: Iterable[tuple[str, int]]) -> dict[int, list[str]]:
    """Names by the place that is given with each."""
    found: dict[int, list[str]] = {}
    for name, place in names:
        found.setdefault(place, []).append(name)
    return found


def held_for_weights(tape: Tape, chosen: Recomputation) -> frozenset[str]:
    """Values and (as `d/name`) gradients that weight gradients put off need."""
    products = [kernel for kernel in tape.kernels if kernel.matmuls]
    saved = {name for kernel in products for name in kernel.saves} & (chosen.kept | chosen.dropped)
    return frozenset(saved | {name for kernel in products for name in gradients(tape, kernel)})


def gradients(tape: Tape, kernel: Kernel) -> list[str]:
    """The gradients (as `d/name`) of what a kernel makes: of what has none of its own, as what is added to a
    stream, that of the sum."""
    readers = {name: one for one in reversed(tape.kernels) if one.writes for name in one.reads}
    found = []
    for value in kernel.writes:
        while not value.grad and value.name in readers:
            value = readers[value.name].writes[0]
        found += [f"d/{value.name}"] if value.grad else []
    return found


def backward(
    tape: Tape, chosen: Recomputation, held: frozenset[str] = frozenset(), *, split: bool = False
) -> list[Played]:
    """The reverse of `forward`, regions run again where they are wanted. The inputs' gradients stay.

    held: what outlives this pass (see `held_for_weights`). split: weight gradients of products are none of
    it.
    """
    values, alive, lent = tape.values, set(tape.outputs), set[str]()
    first_saver, last_saver = _savers(tape, chosen)
    stay = (chosen.kept | chosen.dropped) - held - chosen.passed
    over = _by_place((name, first_saver[name]) for name in stay if name in first_saver)
    due = _due(tape, chosen, last_saver)
    played: list[Played] = []
    twice = _twice(tape, chosen, held)
    for index in reversed(range(len(tape.kernels))):
        for when, region in due:
            if when == index:
                played += _again(tape, region, chosen, frozenset(twice))
        kernel = tape.kernels[index]
        memory: list[Step] = list(kernel.back_scratch)
        of_weight = 0 if split and kernel.matmuls else kernel.weight_grad
        if of_weight:  # autograd hands both gradients on at once
            memory.append(("activations", of_weight))
        passes = not kernel.matmuls and any(f"d/{value.name}" in held for value in kernel.writes)
        apart = kernel.kind == "view" and not any(value.grad for value in kernel.writes)
        for name in kernel.reads if kernel.writes and not apart else ():  # else it is changed in place
            value = values[name]
            size = value.grad_bytes
            if value.grad and size:
                if passes and name not in alive:  # the sum's, which stays
                    lent.add(name)
                else:
                    memory.append((value.category, size))
                    if name in alive - lent:
                        memory.append((value.category, -size))
                    lent.discard(name)
                alive.add(name)
        memory += [(category, -size) for category, size in kernel.back_scratch]
        if of_weight:
            memory.append(("activations", -of_weight))
        for value in kernel.writes:
            if value.grad and value.name in alive:
                if f"d/{value.name}" not in held and value.name not in lent:
                    memory.append((value.category, -value.grad_bytes))
                alive.discard(value.name)
        gone = [*over.get(index, ()), *(name for name, first in twice.items() if first == index)]
        memory += [(values[name].category, -values[name].bytes) for name in gone]
        if kernel.reads or kernel.writes or kernel.back_bytes != 0:  # counts have no gradient
            played.append(Played(kernel, True, tuple(memory)))
    return played


def _savers(tape: Tape, chosen: Recomputation) -> tuple[dict[str, int], dict[str, int]]:
    """Of each value the first and the last kernel whose backward wants it."""
    freed = chosen.kept | chosen.dropped
    first_saver: dict[str, int] = {}
    last_saver: dict[str, int] = {}
    for index, kernel in enumerate(tape.kernels):
        for name in kernel.saves:
            first_saver.setdefault(name, index)
            last_saver[name] = index
    for region in chosen.again:  # what a region begins from stays until its kernels' own backward
        inside = {value.name for index in region for value in tape.kernels[index].writes}
        for index in sorted(region):
            for name in tape.kernels[index].reads:
                if name in freed and name not in inside:
                    first_saver[name] = min(first_saver.get(name, index), index)
    for index, kernel in enumerate(tape.kernels):  # kept, although nothing reads it again
        for value in kernel.writes:
            if value.name in chosen.kept:
                first_saver.setdefault(value.name, index)
    return first_saver, last_saver


def _due(tape: Tape, chosen: Recomputation, last_saver: dict[str, int]) -> list[tuple[int, frozenset[int]]]:
    """Before the backward of which kernel each region runs again: before the first that wants one of
    its values, or before another region that reads one."""
    made = {
        region: {v.name for i in region for v in tape.kernels[i].writes} & chosen.dropped
        for region in chosen.again
    }
    reads = {region: {name for i in region for name in tape.kernels[i].reads} for region in chosen.again}
    due = {region: max(last_saver[name] for name in names) for region, names in made.items()}
    for region in sorted(due, key=min, reverse=True):
        for before, names in made.items():
            if before is not region and names & reads[region]:
                due[before] = max(due[before], due[region])
    return [(due[region], region) for region in sorted(due, key=min)]


def _twice(tape: Tape, chosen: Recomputation, held: frozenset[str]) -> dict[str, int]:
    """Values that stay for weight gradients and that a region makes again for its own kernels' backward, and
    the kernel with which the second copy goes."""
    found: dict[str, int] = {}
    for region in chosen.again:
        made = {value.name for index in region for value in tape.kernels[index].writes}
        for index in sorted(region, reverse=True):
            found |= dict.fromkeys(made & chosen.kept & held & set(tape.kernels[index].saves), index)
    return found


def _again(tape: Tape, region: frozenset[int], chosen: Recomputation, twice: frozenset[str]) -> list[Played]:
    """A region forward: its dropped values come back, those that are there `twice` too, what is only passed
    on inside dies, as does what was kept for that. What kernels that
    do not run again would read lives as long as if they did, at most to the region's end."""
    order = sorted(region)
    last: dict[str, int] = {}
    for index in range(order[0], len(tape.kernels)):
        at = order[bisect_right(order, index) - 1]
        for name in (*(value.name for value in tape.kernels[index].writes), *tape.kernels[index].reads):
            last[name] = at
    held = {name: order[bisect_right(order, at) - 1] for name, at in tape.holds.items() if name in last}
    last |= {name: max(place, last[name]) for name, place in held.items()}
    made = {name for index in order for name in tape.kernels[index].reads} & chosen.passed
    values = tape.values
    played = []
    for index in order:
        kernel = tape.kernels[index]
        memory: list[Step] = []
        for value in kernel.writes:
            memory.append((value.category, value.bytes))
            made.add(value.name)
        memory += _spike(kernel.scratch)
        for name, when in last.items():
            if when == index and name in made and name not in chosen.dropped | twice:
                memory.append((values[name].category, -values[name].bytes))
        played.append(Played(kernel, False, tuple(memory)))
    return played


def _spike(steps: tuple[Step, ...]) -> list[Step]:
    return [*steps, *((category, -size) for category, size in steps)]
