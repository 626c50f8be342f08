"""Passes beside projections: of a joint one, whose parts torch splits, and of those that are apart."""

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, each, made
from mopsim.graph.tape import Kernel, Value


def split(
    kernels: tuple[Kernel, ...], copied: bool, whole: bool = False, apart: bool = False
) -> tuple[Kernel, ...]:
    """Queries, keys and values as torch splits them from one projection, whose gradient is put together from
    theirs. copied: values, and queries that share keys, are made contiguous for the attention kernel, unless
    it reads the projection as it lies. whole: a kernel that keeps the values keeps all of the projection.
    apart: so where the tape has a product for each, as one of them may be kept without the others."""
    joint = next((kernel for kernel in kernels if kernel.name == "qkv_proj"), None)
    last = joint or next((one for one in kernels if apart and copied and one.name == "v_proj"), None)
    if last is None:
        return kernels
    by_name = {one.name: one.writes for one in kernels}
    q, k, v = joint.writes[:3] if joint else (by_name[f"{one}_proj"][0] for one in "qkv")
    if copied and any(kernel.name == "attention_core" and q.name in kernel.reads for kernel in kernels):
        return kernels
    shared, own = q.bytes != k.bytes, replace(v, name=f"{v.name}_own")
    parts = Kernel(
        "qkv_split", "memory_bound", last.component, (v.name,), () if joint else (own,),
        bytes=2.0 * (v.bytes + shared * q.bytes) * copied, launches=(1 + shared) * copied,
        back_bytes=2.0 * (q.bytes + k.bytes + v.bytes), back_launches=1,
    )  # fmt: skip
    place = kernels.index(last) + 1
    rest = kernels[place:]
    if joint is None:
        rest = tuple(one.renamed(lambda name: own.name if name == v.name else name) for one in rest)
    elif whole:
        names = tuple(value.name for value in joint.writes[:3])
        rest = tuple(
            replace(one, saves=tuple(dict.fromkeys((*names, *one.saves)))) if v.name in one.saves else one
            for one in rest
        )
    return (*kernels[:place], parts, *rest)


def heads_apart(kernels: tuple[Kernel, ...], repeated: bool, laid_out: tuple[int, int]) -> tuple[Kernel, ...]:
    """Copies around the attention kernel. repeated: of keys and values, for each query head that shares them.
    laid_out: times that its output, and its output's gradient, are laid out anew before the product that
    reads it has it by tokens."""
    core = next((kernel for kernel in kernels if kernel.name == "attention_core"), None)
    if core is None:
        return kernels
    values, around = made(kernels), dict[str, tuple[Kernel, ...]]()
    q, k, v = (values[name] for name in core.reads[:3])
    names = ("gather_kv_blocks", "ring", "sequence_to_heads")
    exchange = next((kernel for kernel in kernels if kernel.name in names), core)
    k, v = (values[name] for name in exchange.reads[-2:] or core.reads[1:3])
    if repeated and k.bytes < q.bytes:
        times = q.bytes // k.bytes
        whole = tuple(replace(one, name=f"{one.name}_all", bytes=one.bytes * times) for one in (k, v))
        moved = float(sum(one.bytes for one in (k, v, *whole)))
        copy = Kernel(
            "heads_repeated", "memory_bound", core.component, (k.name, v.name), whole, bytes=moved,
            back_bytes=moved, launches=2,
        )  # fmt: skip
        reader, sent = (
            one.renamed(lambda name: f"{name}_all" if name in (k.name, v.name) else name)
            for one in (core, exchange)
        )
        if exchange.name == "sequence_to_heads":  # all heads travel, beside the queries
            sent = sent.sized(lambda one: one.bytes if one is sent.writes[0] else k.bytes * times)
            sent = replace(sent, bytes=float(sum(one.bytes for one in sent.writes)))
        elif exchange is not core:
            sent = sent.moving(times).sized(lambda one: one.bytes * times)
        if again := next((one for one in kernels if one.name == "gather_kv_again"), None):
            around[again.name] = (again.moving(times),)
        if exchange.name in ("gather_kv_blocks", "ring"):  # blocks that come again, and a block's gradients
            blocks = exchange.bytes + k.bytes + v.bytes if again else 2 * (k.bytes + v.bytes)
            *rest, (category, size) = reader.back_scratch
            reader = replace(reader, back_scratch=(*rest, (category, size + int((times - 1) * blocks))))
        around |= {core.name: (reader,), exchange.name: (copy, sent)}
    out, product = core.writes[0], next((one for one in kernels if one.name == "o_proj"), None)
    there, back = laid_out
    if there and product and product.reads == (out.name,):
        laid, between = replace(out, name=f"{out.name}_laid"), (("activations", out.bytes),)
        copy = Kernel(
            "heads_laid", "memory_bound", core.component, (out.name,), (laid,), bytes=2.0 * there * out.bytes,
            back_bytes=2.0 * back * out.bytes, launches=there, back_launches=back,
            scratch=between if there > 1 else (), back_scratch=between if back > 1 else (),
        )  # fmt: skip
        around[product.name] = (copy, replace(product, reads=(laid.name,), saves=(laid.name,)))
    return each(kernels, lambda one: around.get(one.name, (one,)))


def values_padded(kernels: tuple[Kernel, ...], wider: float) -> tuple[Kernel, ...]:
    """Values, output and its gradient are copied to `wider` times their size around the attention kernel;
    the output and the values' gradient are then parts of theirs. Of as many rows as it takes at a time. What
    is there inside of the kernel is beside the output."""

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        narrow, wide = kernel.writes[0].bytes, round(kernel.writes[0].bytes * wider)
        sizes = 2 * wide - narrow, 4 * wide - narrow
        alive, back = (("activations", round(kernel.share * size)) for size in sizes)
        copies = Kernel(
            "values_padded", "memory_bound", kernel.component, (kernel.writes[0].name,), (),
            bytes=float(3 * narrow + wide), back_bytes=float(3 * (narrow + wide)), launches=2,
            back_launches=3,
        )  # fmt: skip
        padded = replace(kernel, scratch=(*kernel.scratch, alive), back_scratch=(*kernel.back_scratch, back))
        return padded, copies

    return each(kernels, change, "attention_core")


def norms_after(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Norms of queries and keys, right after the products that make them; those after a rotation stay."""
    turned = {value.name for one in kernels if one.name.startswith("rope_") for value in one.writes}
    norms = [one for one in kernels if one.name in ("q_norm", "k_norm") and one.reads[0] not in turned]
    found = [kernel for kernel in kernels if kernel not in norms]
    for norm in norms:
        source = next(i for i, one in enumerate(found) if norm.reads[0] in (v.name for v in one.writes))
        found.insert(source + 1, norm)
    return tuple(found)


def sliced(kernels: tuple[Kernel, ...], share: float, neighbours: bool) -> tuple[Kernel, ...]:
    """Rotations of queries and keys apart, of which a share turns, or neighbours do: autograd writes the
    gradient of each slice into zeros and adds both. What is in fp32 is of the share, and the rest of a head
    is put beside it; one kernel turns halves, which neighbours are first copied to."""

    def one(kernel: Kernel) -> Kernel:
        apart = neighbours or (share < 1.0 and kernel.back_scratch)  # one kernel turns a part where it lies
        if not kernel.name.startswith("rope_") or not apart:
            return kernel
        size = kernel.writes[0].bytes
        if not kernel.back_scratch:
            there, again = neighbours * size, (2 + (share < 1.0)) * size
            return replace(kernel, scratch=(("activations", there),), back_scratch=(("activations", again),))
        inside, back = (sum(each for _, each in steps) for steps in (kernel.scratch, kernel.back_scratch))
        least = round((1.0 + share) / 2.0 * inside)
        again = max(2 * size, round((1.0 + share) / 2.0 * (back + size / 2) + share * size / 2) - size)
        return replace(kernel, scratch=(("activations", least),), back_scratch=(("activations", again),))

    return tuple(map(one, kernels))


def latents_split(kernels: tuple[Kernel, ...], share: float, inside: float) -> tuple[Kernel, ...]:
    """Latent attention whose queries are split by views, of which a share turns: the backward makes the
    gradient of that part first and, once it comes to their projection, after those of keys and values, that
    of the whole. inside: bytes in the rotation's backward over those of what it turns."""
    place = next((i for i, kernel in enumerate(kernels) if kernel.name == "rope"), 0)
    if not place or "q0" not in kernels[place].reads:
        return kernels
    turned = round(made(kernels)["q0"].bytes * share)
    parts = replace(made(kernels)["q0"], name="q_parts", bytes=0, of_grad=turned)
    split = Kernel("q_split", "view", kernels[place].component, ("q0",), (parts,))
    rotated = kernels[place]
    first = next(i for i, kernel in enumerate(kernels) if kernel.writes[:1] == (made(kernels)["q0"],)) + 1
    reads = tuple("q_parts" if name == "q0" else name for name in rotated.reads)
    back = Kernel(
        "q_turned_back", "memory_bound", rotated.component, (rotated.writes[0].name,), (), launches=0,
        back_bytes=0.0, back_scratch=(("activations", round(inside * turned)),),
    )  # fmt: skip
    turn = (replace(rotated, reads=reads), *((back,) if inside else ()))
    return (*kernels[:first], split, *kernels[first:place], *turn, *kernels[place + 1 :])


def rows_fused(kernels: tuple[Kernel, ...], rotary: bool, gates: Collection[str]) -> tuple[Kernel, ...]:
    """Rows of products that are apart, in one kernel each: the rotary embedding of queries and of keys, and
    gates of these names, SiLU and product, which keep what they read."""
    found: list[Kernel] = []
    for kernel in kernels:
        if rotary and kernel.name.startswith("rope"):
            parts = 2 if kernel.name == "rope" else 1  # latents: both in one
            moved = 2.0 * sum(value.bytes for value in kernel.writes)
            kernel = replace(kernel, bytes=moved, back_bytes=moved, launches=parts, back_launches=parts)
        elif kernel.name in gates:
            reads, size = (*found.pop().reads, kernel.reads[1]), kernel.writes[0].bytes
            kernel = replace(
                kernel, name=kernel.name.replace("gated", "act"), reads=reads, saves=reads, bytes=3.0 * size,
                back_bytes=5.0 * size, back_launches=1,
            )  # fmt: skip
        found.append(kernel)
    return tuple(found)


def tables_gathered(kernels: tuple[Kernel, ...], size: int) -> tuple[Kernel, ...]:
    """Before the rotary embedding, sines and cosines of queries and of keys for each row, `size` bytes, are
    gathered by position; its products keep them for their backward."""
    tables = Value("rope_tables", size, grad=False)
    gather = Kernel(
        tables.name, "memory_bound", "attention", (), (tables,), saves=(tables.name,), bytes=2.0 * size,
        back_bytes=0.0, launches=4, back_launches=0,
    )  # fmt: skip
    return each(kernels, lambda one: (gather, one), "rope")


def lengths_read(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Before the attention kernel the host reads the longest of a microbatch's sequences from the device:
    a difference, its maximum and a copy."""
    read = Kernel("lengths read", "memory_bound", "attention", (), (), launches=3, back_bytes=0.0)
    return each(kernels, lambda one: (read, one), "attention_core")


def summed_apart(kernels: tuple[Kernel, ...], parts: Mapping[str, int]) -> tuple[Kernel, ...]:
    """Tensor-parallel regions without sequence parallelism whose products sum their own input gradients, one
    after the other, where others sum the gradients' sum once. parts: products that a kernel of this name
    stands for, where it is not one."""
    readers = {kernel.reads[0]: kernel.name for kernel in reversed(kernels) if kernel.matmuls}

    def one(kernel: Kernel) -> Kernel:
        begins = kernel.kind == "all_reduce" and not kernel.writes and not kernel.bytes
        sums = parts.get(readers.get(kernel.reads[0], ""), 1) if begins else 1
        back = sums * (kernel.back_bytes or 0.0)
        return replace(kernel, back_bytes=back, back_launches=sums) if sums > 1 else kernel

    return tuple(map(one, kernels))


def inputs_copied(kernels: tuple[Kernel, ...], parts: Mapping[str, int]) -> tuple[Kernel, ...]:
    """Tensor-parallel regions without sequence parallelism whose products each read, and keep, a copy of
    their own of the input; the gradient of what ends a region is copied too. parts: as in summed_apart."""
    values, found = made(kernels), list[Kernel]()
    copies: dict[str, str] = {}
    for place, kernel in enumerate(kernels):
        name = kernel.reads[0] if kernel.reads else ""
        in_place = kernel.kind == "all_reduce" and kernel.group == "tensor" and not kernel.writes
        if kernel.matmuls and name in copies:
            saves = tuple(copies[name] if one == name else one for one in kernel.saves)
            kernel = replace(kernel, reads=(*kernel.reads, copies[name]), saves=saves)
        found.append(kernel)
        if not in_place or name not in values:
            continue
        size = values[name].bytes
        if kernel.bytes:  # a region ends
            back = 2.0 * size
            copy = Kernel(
                f"{kernel.name}_copy", "memory_bound", kernel.component, (name,), (), launches=0,
                back_bytes=back, back_launches=1,
            )  # fmt: skip
        else:
            reader = next((one.name for one in kernels[place:] if one.matmuls and name == one.reads[0]), "")
            times, copies[name] = parts.get(reader, 1), f"{name}_copied"
            whole = Value(copies[name], times * size, values[name].category, grad=False)
            copy = Kernel(
                f"{kernel.name}_copy", "memory_bound", kernel.component, (name,), (whole,),
                bytes=2.0 * whole.bytes, launches=times, back_bytes=0.0, back_launches=0,
            )  # fmt: skip
        found.append(copy)
    return tuple(found)


def rows_apart(kernels: tuple[Kernel, ...], parts: Mapping[str, int], gathers: bool) -> tuple[Kernel, ...]:
    """Tensor-parallel regions under sequence parallelism whose products each scatter their own input's
    gradient, and gather their own rows too where `gathers`. parts: as in summed_apart."""
    readers = {kernel.reads[0]: kernel.name for kernel in reversed(kernels) if kernel.matmuls}

    def one(kernel: Kernel) -> Kernel:
        if kernel.kind != "all_gather" or kernel.back_kind != "reduce_scatter" or kernel.group != "tensor":
            return kernel
        times = parts.get(readers.get(kernel.writes[0].name, ""), 1)
        found = replace(kernel, back_bytes=times * kernel.bytes, back_launches=times)
        if not gathers:
            return found
        copies = replace(kernel.writes[0], bytes=times * kernel.writes[0].bytes)
        return replace(found, writes=(copies,), bytes=found.bytes * times, launches=times)

    return tuple(map(one, kernels))


def gathered_kept(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Tensor-parallel regions under sequence parallelism whose products keep the gathered rows that they
    read, where others keep the rows of their own rank and gather again in the backward."""
    gathers = (one for one in kernels if one.kind == "all_gather" and one.group == "tensor")
    own = {one.writes[0].name: one.reads[0] for one in gathers if one.back_kind == "reduce_scatter"}

    def kept(kernel: Kernel) -> Kernel:
        whole = kernel.reads[0] if kernel.reads else ""
        if not kernel.matmuls or whole not in own:
            return kernel
        return replace(kernel, saves=tuple(whole if name == own[whole] else name for name in kernel.saves))

    return tuple(map(kept, kernels))


def rows_exchanged(
    kernels: tuple[Kernel, ...], ordered: bool, rows: float, grads: float, exact: Collection[str]
) -> tuple[Kernel, ...]:
    """What tensor-parallel ranks exchange under sequence parallelism. ordered: gathered rows are copied into
    the order of their sequences, and rows to scatter into that of the ranks. rows, grads: bytes of what is
    gathered over those in the compute dtype, of products that take it so: but of those of the components
    `exact`.
    """

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        gathers, back = kernel.kind == "all_gather", kernel.back_moved
        if kernel.group != "tensor" or not kernel.back_kind:
            return (kernel,)
        less, fewer = (1.0, 1.0) if kernel.component in exact else (rows, grads)
        first, second = (kernel.bytes * less, back) if gathers else (kernel.bytes, back * fewer)
        kernel = replace(kernel, bytes=first, back_bytes=second)
        copy = Kernel(
            f"{kernel.name}_order", "memory_bound", kernel.component,
            (kernel.writes[0].name if gathers else kernel.reads[0],), (), bytes=2 * first,
            back_bytes=2 * second, scratch=(("activations", int(first)),),
            back_scratch=(("activations", int(second)),),
        )  # fmt: skip
        both = (kernel, copy) if gathers else (copy, kernel)
        return both if ordered else (kernel,)

    return each(kernels, change)


def gradients_added(kernels: tuple[Kernel, ...], parts: Mapping[str, int], eager: bool) -> tuple[Kernel, ...]:
    """Gradients of a value that several products read are added: by eager autograd one after the other, those
    of all kernels; by a compiler in one kernel, those of the parts of one. A residual's has the sum already.
    parts: products that a kernel of this name stands for, where it is not one.
    """
    readers: dict[str, list[Kernel]] = {}
    for kernel in kernels if eager else ():
        if kernel.kind in ("matmul", "grouped_matmul") or kernel.name == "permute":
            readers.setdefault(kernel.reads[0], []).append(kernel)
    values = made(kernels)

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        name, own = kernel.reads[0] if kernel.reads else "", parts.get(kernel.name, 1)
        first, *others = readers.get(name, [None])
        sums = own - 1 + len(others) * (kernel is first)
        if not sums or name not in values:
            return (kernel,)
        once = COMPOSED["residual"].backward
        passes, launches = (once.narrow * sums, once.launches * sums) if eager else (own + 1, 1)
        added = Kernel(
            f"{kernel.name}_sum", "memory_bound", kernel.component, (name,), (), launches=0,
            back_bytes=float(passes * values[name].bytes), back_launches=launches,
        )  # fmt: skip
        return added, kernel

    return each(kernels, change)
