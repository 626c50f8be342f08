"""Routed experts over strided chunks of a layer's tokens: dispatch(i+1) | experts(i) | combine(i-1)
(arXiv 2607.01844)."""

from collections.abc import Sequence

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Step

_FIRST, _SENT, _BACK, _LAST = "permute", "dispatch", "combine", "accumulate"
"""Kernels that a chunk begins with, is sent, returns and ends with."""


def in_chunks(
    kernels: tuple[Kernel, ...], shares: Sequence[float], again: str = "", between: tuple[Kernel, ...] = ()
) -> tuple[Kernel, ...]:
    """A layer's kernels, those of its routed experts once for each chunk. shares: of the tokens, by chunk.

    Exchanges run beside the products of other chunks. again: the kernel from which on each chunk runs again
    in its own backward: from `permute` on no chunk's rows are kept, from `sort` on those that have arrived.
    Backwards run from the last chunk to the first; those after the first one have the gradients of weights to
    add to. between: kernels before every chunk but the first.
    """
    names = [kernel.name for kernel in kernels]
    if len(shares) == 1 or _LAST not in names:
        return kernels
    first, end = names.index(_FIRST), names.index(_LAST) + 1
    routed, total = kernels[first:end], kernels[end - 1].writes[0].name
    saved = {name for kernel in kernels for name in kernel.saves}
    begin = names.index(again) - first if again else end
    kept = max((i for i, kernel in enumerate(routed) if saved & {v.name for v in kernel.writes}), default=-1)
    inner = {value.name for kernel in routed for value in kernel.writes}
    parts = []
    for index, share in enumerate(shares):
        region, newest = f"chunk {index}", index == len(shares) - 1
        parts.append(
            [
                _part(kernel, share, f".{index}", inner, region if begin <= place <= kept else "", newest)
                for place, kernel in enumerate(routed)
            ]
        )
    whole = tuple(f"{total}.{index}" for index in range(len(shares)))
    after = (
        replace(one, reads=_instead(one.reads, total, whole), saves=_instead(one.saves, total, whole))
        for one in kernels[end:]
    )
    return (*kernels[:first], *_pipelined(parts, routed, between), *after)


def _pipelined(
    parts: Sequence[Sequence[Kernel]], routed: Sequence[Kernel], between: tuple[Kernel, ...]
) -> list[Kernel]:
    """Chunks in the order in which they are started: each sent before the products of the one before it."""
    names = [kernel.name for kernel in routed]
    sent, back = names.index(_SENT) + 1, names.index(_BACK)
    found = list(parts[0][:sent])
    for index, part in enumerate(parts):
        found += (*between, *parts[index + 1][:sent]) if index + 1 < len(parts) else ()
        found += part[sent:back]
        found += parts[index - 1][back + 1 :] if index else ()
        found.append(part[back])
    return [*found, *parts[-1][back + 1 :]]


def _part(kernel: Kernel, share: float, suffix: str, inner: set[str], region: str, newest: bool) -> Kernel:
    """A kernel of one chunk. What chunks share beside the layer's rows (weights that moved, the output of
    shared experts) has its gradient made by the newest one, whose backward is the first."""

    def scaled(steps: Sequence[Step]) -> tuple[Step, ...]:
        return tuple((category, int(size * share)) for category, size in steps)

    added = 0 if newest else kernel.weight_grad
    reads = [name for name in kernel.reads if newest or name in inner or kernel.name == _FIRST]
    part = replace(kernel, reads=tuple(reads)).sized(lambda one: int(one.bytes * share)).moving(share)
    return replace(
        part.renamed(lambda name: name + suffix if name in inner else name),
        matmuls=tuple(replace(one, m=one.m * share) for one in kernel.matmuls),
        back_serial=kernel.back_serial * share,
        back_sums=kernel.back_sums * share, back_dots=kernel.back_dots * share,
        scratch=scaled(kernel.scratch), weight_grad=kernel.weight_grad - added,
        back_scratch=(*scaled(kernel.back_scratch), *((("activations", added),) if added else ())),
        region=region, beside=kernel.kind == "all_to_all",
    )  # fmt: skip


def _instead(names: Sequence[str], old: str, new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one for name in names for one in (new if name == old else (name,)))
