"""One rank's compute, timed: matmuls, attention, memory traffic, small operators, host copies, AdamW."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mopexec.measure.probe_fit import Shape
from mopexec.measure.probe_machine import architecture
from mopexec.measure.probe_timing import Sample, Stopwatch, measure, summarize
from mopexec.measure.torch_dispatch import EagerMode
from mopsim.spec.hardware import ATTENTION_BACKWARD

Call = Callable[[], object]
DTYPES = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("bfloat16", "float16", "float32")}
ATTENTION_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
TOKENS = {"cpu": (16, 64, 256, 1024, 4096), "cuda": (16, 128, 1024, 4096, 16384)}
WEIGHTS = {
    "cpu": ((64, 64), (256, 256), (512, 64), (64, 512), (1024, 256)),
    "cuda": ((1024, 1024), (4096, 4096), (512, 4096), (4096, 512), (8192, 2048)),
}
"""(out, in) of the weights; with TOKENS they span the shapes of training, experts of few rows among them."""

LENGTHS = {"cpu": (64, 128, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}
TRAFFIC = {"cpu": (2**16, 2**18, 2**20, 2**22, 2**24), "cuda": (2**20, 2**22, 2**24, 2**26, 2**28)}


@dataclass(frozen=True)
class AttentionProbe:
    """FLOP of one call and its timing, by length."""

    forward: dict[int, tuple[float, Sample]]
    backward: dict[int, tuple[float, Sample]]


def _random(*shape: int, dtype: str, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, dtype))


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: torch.mm(x, weight.t())


def _weight_grad(grad: torch.Tensor, x: torch.Tensor) -> Call:
    return lambda: torch.mm(grad.t(), x)


def matmuls(device: torch.device, dtype: str, stopwatch: Stopwatch, budget: float) -> dict[Shape, Sample]:
    """Linear layers' forward (m = tokens, as in dgrad) and weight gradients (k = tokens), by (m, n, k)."""
    cases: dict[Shape, Call] = {}
    for tokens in TOKENS[device.type]:
        for out, width in WEIGHTS[device.type]:
            if dtype == "float64" and tokens * out * width > 2**26:
                continue  # the double of a time already long
            x, weight = (_random(rows, width, dtype=dtype, device=device) for rows in (tokens, out))
            cases[tokens, out, width] = _linear(x, weight)
            if tokens >= 64:
                cases[out, width, tokens] = _weight_grad(_random(tokens, out, dtype=dtype, device=device), x)
    return measure(cases, stopwatch, budget)


def _cpu_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Call, Call]:
    """Forward and backward by the operator itself: scaled_dot_product_attention may choose another one."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, logsumexp = forward(q, k, v, 0.0, True)
    grad = torch.ones_like(out)
    return lambda: forward(q, k, v, 0.0, True), lambda: backward(grad, q, k, v, out, logsumexp, 0.0, True)


def _cuda_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Call, Call]:
    """By the kernel that plans for this machine name: cuDNN's, or torch's flash kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = SDPBackend.CUDNN_ATTENTION if architecture(q.device) else SDPBackend.FLASH_ATTENTION

    def forward() -> torch.Tensor:
        with sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = forward()
    grad = torch.ones_like(out)
    return forward, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def attention(device: torch.device, stopwatch: Stopwatch, budget: float) -> AttentionProbe:
    """Causal flash attention by length; FLOP of the causal half: 2 * heads * s * s * head_dim forward."""
    heads, head_dim = (4, 32) if device.type == "cpu" else (16, 128)
    make = _cpu_flash if device.type == "cpu" else _cuda_flash
    cases: dict[tuple[str, int], Call] = {}
    for length in LENGTHS[device.type]:
        q, k, v = (
            _random(1, heads, length, head_dim, dtype=ATTENTION_DTYPE[device.type], device=device)
            for _ in range(3)
        )
        cases["forward", length], cases["backward", length] = make(q, k, v)
    samples = measure(cases, stopwatch, budget)
    flops = {length: 2.0 * heads * length * length * head_dim for length in LENGTHS[device.type]}
    return AttentionProbe(
        {length: (flop, samples["forward", length]) for length, flop in flops.items()},
        {length: (ATTENTION_BACKWARD * flop, samples["backward", length]) for length, flop in flops.items()},
    )


def memory_traffic(
    device: torch.device, stopwatch: Stopwatch, budget: float
) -> dict[tuple[str, float], Sample]:
    """The operators of training that make a new tensor: (name, bytes read and written) -> Sample.

    The softmax is an eighth as large as the others, about its part of a training step.
    """
    cases: dict[tuple[str, float], Call] = {}
    for size in TRAFFIC[device.type]:
        a, b = (torch.randn(size // 4, device=device) for _ in range(2))
        cases["add", 3.0 * size] = partial(torch.add, a, b)
        cases["silu", 2.0 * size] = partial(torch.nn.functional.silu, a)
        cases["mul", 3.0 * size] = partial(torch.mul, a, b)
        cases["copy", 2.0 * size] = partial(torch.clone, a)
        cases["softmax", size / 4] = partial(torch.softmax, a[: size // 32].view(-1, 256), -1)
    return measure(cases, stopwatch, budget)


class _CountOps(EagerMode):
    """Counts operators that compute: views apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _tiny_block(device: torch.device) -> Call:
    """Forward and backward of a norm, a gated FFN, a softmax and a gather, so small that overhead is all."""
    x = torch.randn(8, 16, device=device, requires_grad=True)
    gate, up, down = (torch.nn.Linear(16, 16, bias=False, device=device) for _ in range(3))
    index = torch.arange(8, device=device)
    scale = torch.ones(16, device=device, requires_grad=True)

    def step() -> None:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
        hidden = down(torch.nn.functional.silu(gate(normed)) * up(normed)) + x
        picked = torch.softmax(hidden, -1).index_select(0, index)
        picked.sum().backward()  # type: ignore[no-untyped-call]

    return step


def launch_overhead(device: torch.device, stopwatch: Stopwatch, budget: float) -> Sample:
    """Seconds per computing operator of eager training: Python, dispatch, autograd and allocation."""
    step = _tiny_block(device)
    step()
    with _CountOps() as counter:
        step()
    sample = measure({"step": step}, stopwatch, budget, min_rounds=10)["step"]
    return Sample(sample.seconds / counter.count, sample.spread, sample.repeats)


def host_copies(device: torch.device, stopwatch: Stopwatch, budget: float) -> dict[tuple[str, float], Sample]:
    """("h2d" | "d2h", bytes) -> Sample. On a CPU the host tier is memory too: a copy between two buffers."""
    pinned = device.type == "cuda"
    cases: dict[tuple[str, float], Call] = {}
    for size in TRAFFIC[device.type]:
        here = torch.zeros(size // 4, device=device)
        there = torch.zeros(size // 4, pin_memory=pinned)
        cases["h2d", float(size)] = partial(here.copy_, there, non_blocking=pinned)
        cases["d2h", float(size)] = partial(there.copy_, here, non_blocking=pinned)
    return measure(cases, stopwatch, budget)


def adamw(device: torch.device, num_params: Sequence[int], budget: float, threads: int = 1) -> Sample:
    """Seconds per parameter of the fused fp32 AdamW, by the call of the runtimes (torch.optim imports torch's
    compiler), the slowest of the sizes given.

    threads: that the host's operators use; where there are several, the wall clock counts.
    """
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    cases: dict[int, Call] = {}
    for size in num_params:
        weight, average, square = (torch.zeros(size, device=device) for _ in range(3))
        grad, step = torch.full((size,), 1e-3, device=device), torch.ones((), device=device)
        state = [weight], [grad], [average], [square]
        cases[size] = partial(torch._fused_adamw_, *state, [], [step], amsgrad=False, maximize=False, **rates)
    samples = measure(
        cases, Stopwatch(device, time.thread_time if threads == 1 else time.perf_counter), budget
    )
    slowest = max(samples, key=lambda size: samples[size].seconds / size)
    return Sample(samples[slowest].seconds / slowest, samples[slowest].spread, samples[slowest].repeats)


def overlap_compute(device: torch.device, seconds: float) -> tuple[Call, float]:
    """A run of matmuls that lasts about `seconds` on a GPU, and what it takes alone."""
    a, b = (torch.randn(4096, 4096, device=device) for _ in range(2))
    stopwatch = Stopwatch(device)
    once = summarize([stopwatch.time(partial(torch.mm, a, b), 10) for _ in range(5)]).seconds
    repeats = max(int(seconds / once), 1)

    def run() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return run, summarize([stopwatch.time(run, 1) for _ in range(4)]).seconds
