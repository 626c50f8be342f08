"""The loss as a tape: final norm, projection on the vocabulary (split over the tensor group or not), cross
entropy."""

from collections.abc import Sequence
from typing import Literal

from msgspec.structs import replace

from mopsim.graph.attention import norm
from mopsim.graph.liveness import backward, everything, forward
from mopsim.graph.region import begin
from mopsim.graph.rewrites.tensor_passes import COMPOSED, charged
from mopsim.graph.tape import Kernel, Matmul, Step, Tape, Value
from mopsim.program.builder import Recorder
from mopsim.program.context import Context
from mopsim.program.strip_loss import StripLoss, passes
from mopsim.program.taped import template
from mopsim.program.template import START, Template
from mopsim.program.workload import Work, memory_work
from mopsim.program.works import implemented, works
from mopsim.spec.layout import token_slices

_C = "vocabulary"
CASTS = ("composed", "shifted", "log_probs", "loss_parallel", "in_place", "slices_in_place")
"""Losses that torch's operators make on a copy of the logits."""
KEEP_SOFTMAX = ("in_place", "shifted", "log_probs")
"""Of these the functions of autograd, which keep a softmax of that copy and nothing else."""


Half = Literal["", "norm", "terms"]
"""What of the loss: all, the final norm alone, or what comes after it."""


def wanted_again(context: Context, kept: int, phase: str) -> tuple[Step, ...]:
    """Bytes of a hidden state that its loss has freed (in strips in its forward, else in its backward), and
    that the projection before an MTP layer has kept."""
    strips = context.strategy.vocabulary.loss in ("chunked", "ring")
    return (("activations", kept),) if (phase == "forward") == strips else ()


def loss_template(context: Context, direction: str, freed: Sequence[Step], half: Half = "") -> Template:
    """Forward or backward of the loss. freed: memory steps that end the backward."""
    kind = context.strategy.vocabulary.loss
    at_once = kind in ("chunked", "ring")
    tape = _norm(context) if at_once else loss_tape(context)
    chosen, early, late = everything(tape), *_freed(tape, freed)
    played = backward(tape, chosen) if direction == "backward" else forward(tape, chosen)
    norms = [item for item in played if item.kernel is tape.kernels[0]]
    if half:
        played = norms if half == "norm" else [item for item in played if item not in norms]
    last = () if half == "terms" else early if direction == "forward" else late
    found = template(played, context, direction, last) if played else None
    if not at_once or direction == "backward" or half == "norm":
        return found or Recorder(context.groups).template()
    after = _chunks(context) if kind == "chunked" else _ring(context)
    return found.then(after) if found else after


def _freed(tape: Tape, freed: Sequence[Step]) -> tuple[Sequence[Step], Sequence[Step]]:
    """Where the hidden state dies: at the end of the forward if nothing wants it after, else of the
    backward."""
    wanted = any("x" in kernel.saves for kernel in tape.kernels)
    return ((), freed) if wanted else (freed, ())


def logit_elements(context: Context) -> int:
    """Of the logits that a rank makes of a microbatch: of all rows of its tensor group, for its slice of the
    vocabulary or, once the slices are gathered, for all of it. A loss in strips has none whole: 0."""
    c, kind, degree = context, context.strategy.vocabulary.loss, context.strategy.dense.tensor_parallel
    parts = kind == "vocab_parallel" and c.stack.kernels.loss != "gathered"
    whole = kind not in ("chunked", "ring")
    return int(whole * c.shapes.region_tokens * c.model.vocab_size / (degree if parts else 1))


def cast_logits(context: Context) -> int:
    """Bytes of logits that torch's loss casts to fp32 and whose caller does not hold them."""
    kernels = context.stack.kernels
    cast = kernels.loss in CASTS and kernels.loss_copy is True
    freed = not _apart(context) and cast and context.logits_held is not True
    return logit_elements(context) * context.b if freed else 0


def gathered_logits(context: Context) -> int:
    """Logits that a rank puts together from the slices of its tensor group. Segments that grow have no
    blocks for them to lie in (mopsim.engine.upper.around_logits)."""
    stack, dense = context.stack, context.strategy.dense
    split = context.strategy.vocabulary.loss == "vocab_parallel" and dense.tensor_parallel > 1
    gathers = split and stack.kernels.loss == "gathered" and stack.reading.segments == "fixed"
    return logit_elements(context) if gathers else 0


def _apart(context: Context) -> bool:
    """Whether the loss is a function of autograd on the copy in fp32 (KEEP_SOFTMAX), as Megatron-LM's
    vocab_parallel_cross_entropy, or one that is neither that nor torch's and overwrites the logits
    (Kernels.logit_grads)."""
    run, vocabulary, dense = context.stack.kernels, context.strategy.vocabulary, context.strategy.dense
    kernel, where = run.loss, run.logit_grads
    split = vocabulary.loss == "vocab_parallel" and dense.tensor_parallel > 1
    if kernel in CASTS:
        return kernel in KEEP_SOFTMAX or (kernel == "slices_in_place" and split)
    return where == "in_place" or (where == "in_place_if_whole" and dense.zero < 2)


def loss_tape(context: Context) -> Tape:
    """x [N,H] -> the loss. Logits in the compute dtype; unless fused, their softmax in fp32 is kept
    (Megatron-LM)."""
    c, vocabulary = context, context.strategy.vocabulary
    kernel = c.stack.kernels.loss
    fused, gathered = kernel in ("fused", "upcast", "compiled"), kernel == "gathered"
    split = vocabulary.loss == "vocab_parallel" and c.strategy.dense.tensor_parallel > 1
    parts = split and not gathered
    elements = logit_elements(c)
    apart = _apart(c)
    steps = kernel == "log_probs"
    whole = apart and c.b == c.wide and not gathered and not steps  # its cast to fp32 is itself
    # torch's cross_entropy of logits cast to fp32: the caller holds the logits, and the gradients of the
    # picked log-probabilities, of all of them and of the cast are made apart, one after the other.
    # mopexec's holds them no longer than their cast.
    # Fused after an upcast (Liger's kernel in transformers, a compiled loss): one fp32 tensor of their size.
    native = kernel == "native"
    own = c.stack.kernels.loss_copy is not True  # cross entropy on logits in their own dtype is torch's
    torch = (not apart or gathered or own) and not fused and not native
    # Compiled, of slices: the forward makes the gradient, beside the matrix of the picked ones, and keeps no
    # logits (the graphs of torch 2.13 on two CPU ranks).
    ahead = kernel == "compiled" and parts
    in_place = not ahead and (whole or kernel in ("fused", "compiled") or (fused and split))
    sliced = kernel == "loss_parallel" and split and torch
    wide = c.b if torch and own else c.wide
    cast = torch and not own
    picked = torch and c.stack.kernels.loss_copy == "picked" and c.b < c.wide
    held = (torch or fused) and c.logits_held is True and not ahead
    copy = ("wide",) if c.logits_held == "copy" else ()
    logits = Value("logits", elements * c.b, "logits", grad=not apart or not (fused or whole))
    kernels = _projection(c, logits, split, in_place or held)
    exact = Value("softmax", 0 if in_place else elements * wide, "logits", grad=picked)
    copies = (kernel == "shifted") + steps * (1 + (c.b < c.wide))  # beside the softmax or what it comes from
    second = (Value("shifted", elements * wide * copies, "logits", grad=False),) if copies else ()
    beside = (1 + sliced) * wide if (torch or native) and not picked else 0
    if steps or (kernel == "upcast" and c.stack.kernels.logits_cut):
        beside = c.wide - c.b  # the gradient in fp32 (beside zeros), before it is cast
    how = "ahead" if ahead else "sliced" if sliced else "torch" if torch else kernel
    if cast:
        kernels.append(_cast(c, "logits", elements, copy))
    loss = Value("loss", 0)
    entropy = Kernel(
        "cross_entropy", "memory_bound", _C, ("wide" if cast else "logits",),
        (exact, *second, *(() if picked else (loss,))), ("logits",) if in_place else ("softmax",),
        scratch=(("logits", elements * c.wide),) if ahead else (),
        back_scratch=(("logits", beside * elements),) if beside else (),
    )  # fmt: skip
    size = float(elements * (wide if torch else c.wide))
    kernels.append(charged(entropy, COMPOSED[f"loss_{how}"], float(elements * c.b), size))
    kernels += _picked(c, elements, loss) if picked else ()
    kernels += _beside(c, elements, parts)
    return Tape((Value("x", c.hidden),), implemented(tuple(kernels), c), ())


def _cast(c: Context, source: str, elements: int, saves: tuple[str, ...] = ()) -> Kernel:
    """`wide`: the copy in fp32 of what the source has for each logit."""
    size, copy = float(elements * (c.b + c.wide)), Value("wide", elements * c.wide, "logits")
    return Kernel("cast", "memory_bound", _C, (source,), (copy,), saves, bytes=size, back_bytes=size)


def _picked(c: Context, elements: int, loss: Value) -> tuple[Kernel, Kernel]:
    """torch.autocast casts what nll_loss picks from to fp32; its backward fills as much."""
    fill = float(elements * (c.wide - c.b))  # loss_torch counts it in the logits' dtype
    nll = Kernel("pick", "memory_bound", _C, ("wide",), (loss,), ("wide",), bytes=0.0, back_bytes=fill)
    return _cast(c, "softmax", elements), nll


def _beside(c: Context, elements: int, parts: bool) -> list[Kernel]:
    """What a program does with logits beside the loss; sums over ranks of what each found in its part."""
    found = []
    if c.stack.kernels.logit_passes:
        size = c.stack.kernels.logit_passes * elements
        found.append(Kernel("beside", "memory_bound", _C, ("logits",), (), bytes=size, back_bytes=0.0))
    if parts:
        found.append(
            Kernel(
                "loss_sums", "all_reduce", _C, ("loss",), (Value("total", 0),), launches=3, group="tensor",
                bytes=4.0 * c.shapes.region_tokens, back_bytes=0.0,
            )
        )  # fmt: skip
    return found


def _projection(c: Context, logits: Value, split: bool, keeps_logits: bool) -> list[Kernel]:
    """Final norm and product with the vocabulary, or with a rank's slice of it; `gathered`: the slices are
    then put together on every rank, a copy beside what came, and a rank takes its slice of the gradient."""
    H, tensor = c.model.hidden_size, c.strategy.dense.tensor_parallel if split else 1
    rows, columns = c.shapes.region_tokens, c.model.vocab_size / tensor
    gathers = tensor > 1 and c.stack.kernels.loss == "gathered"
    kernels = [norm("final_norm", "x", "n", c.tokens, H, c.b, _C)]
    first, source = begin("gather_n", "n", H, _C, c.shapes)
    kernels += first if split or c.shapes.sequence_parallel else ()
    out = Value("slice", int(rows * columns) * c.b, "logits") if gathers else logits
    weight = int(columns * H * c.b)  # added into a resident buffer or not, autograd is handed one
    keeps = ("n", "logits") if keeps_logits and not gathers else ("n",)
    product = (Matmul(rows, columns, H),)
    kernels.append(Kernel("logits", "matmul", _C, (source,), (out,), keeps, product, weight_grad=weight))
    if gathers:
        kernels.append(
            Kernel(
                "gather_logits", "all_gather", _C, ("slice",), (logits,), group="tensor", back_bytes=0.0,
                saves=("logits",) if keeps_logits else (), bytes=float(logits.bytes),
                scratch=(("logits", logits.bytes),),
            )
        )  # fmt: skip
    return kernels


def _norm(c: Context) -> Tape:
    """x [N,H] -> n [N,H], whose gradient is there once the loss has been."""
    kernels = (norm("final_norm", "x", "n", c.tokens, c.model.hidden_size, c.b, _C),)
    return Tape((Value("x", c.hidden),), implemented(kernels, c), ("n",))


def _ring(c: Context) -> Template:
    """Both passes around the ring of vocabulary shards; n gives way to its gradient."""
    b = Recorder(c.groups)
    b.adopt("n", c.hidden)
    StripLoss(c, b).ring(START)
    b.drop("n")
    return b.template()


def _chunks(c: Context) -> Template:
    """`chunk_tokens` rows of logits at a time, forward and backward at once; n gives way to its gradient."""
    V, H, size = c.model.vocab_size, c.model.hidden_size, c.hidden
    found: list[Work] = []
    how, gradient = c.stack.kernels.loss_chunks, float(V * H * c.b)
    torch, wide = how == "composed", how == "wide"
    held = how in ("autograd", "compiled")
    if torch:  # the head's gradient, zeroed before the chunks and scaled in the backward
        found.append(Work("memory_bound", bytes=3 * gradient, launches=2))
    rows = [stop - start for start, stop in token_slices(c.tokens, c.strategy.vocabulary.chunk_tokens)]
    for n in sorted(set(rows)):
        over = [Work("memory_bound", bytes=n * V * 6.0 * c.wide, launches=4)]
        if torch:  # the head's gradient is read to be added to
            forward, backward = passes(c, n, V)
            over = [forward, memory_work(backward.bytes + gradient, backward.launches)]
        if held:  # as the tape of a whole loss; the head's gradient is added to the sum before
            each = 5 * c.b if how == "compiled" else 2 * c.b + 9 * c.wide
            over = [memory_work(float(n * V * each), 7), memory_work(3 * gradient, 1)]
        products = _products(c, n)
        if wide:  # under a checkpoint: scores, argmax and entropy twice; casts of the weight, and of its sum
            products = [replace(one, dtype="float32") for one in (products[0], *products)]
            casts = gradient * (6 + 3 * c.wide / c.b)
            over = [memory_work(24.0 * n * V * c.wide, 24), memory_work(casts, 4)]
        found += rows.count(n) * [*products, *over]
    # mopexec's chunk holds its logits in fp32 and, at its begin or end, in the compute dtype
    strip = max(rows) * V * ((c.b if torch else 2 * c.b) + c.wide)
    strip -= max(rows) * V * c.b if torch and c.b == c.wide else 0
    if held:  # logits, log_softmax, the gradient of what is picked from it, and its own; inputs' in fp32
        strip, size = max(rows) * V * (c.b + 3 * c.wide), c.rows * c.wide // c.b
        strip = max(rows) * V * 2 * c.b if how == "compiled" else strip
        # FSDP2 sums the head's gradient whole until the last chunk, in the dtype that it reduces
        size += V * H * c.reduce * (c.shards_params and c.reduce > c.b)
    if wide:  # scores, what entropy makes of them, their gradient; the weight and its gradient wide, its cast
        strip, size = max(rows) * V * 3 * c.wide, 2 * size + V * H * (2 * c.wide + c.b)
    memory = (("activations", size), ("logits", strip), ("logits", -strip), ("activations", -size))
    b = Recorder(c.groups)
    b.add("loss chunks", "compute", _C, "forward", found, (START,), memory)
    return b.template()


def _products(c: Context, rows: int) -> list[Work]:
    """Of some rows' logits, forward and backward, in the recipe's dtype where it is the vocabulary's too."""
    V, H, precision = c.model.vocab_size, c.model.hidden_size, c.strategy.precision
    if precision.vocabulary == "compute" or precision.matmul == "compute":
        shapes = ((rows, V, H), (rows, H, V), (V, H, rows))
        return [Work("matmul", m=m, n=n, k=k, dtype=precision.compute) for m, n, k in shapes]
    kernel = Kernel("logits", "matmul", _C, (), (), matmuls=(Matmul(rows, V, H),))
    return [*works(kernel, "forward", c), *works(kernel, "backward", c)]
