"""Hooks of the runtimes of modules: component names, memory categories, recompute and boundary offload."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import finalize

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import NOW
from mopexec.measure.tracker import recategorize
from mopexec.model.attention import AttentionCore
from mopexec.modules.save_ops import keep_products
from mopexec.operators.again import contexts
from mopexec.operators.dtypes import of_name
from mopexec.operators.layer_inputs import HostInput, count_on_host
from mopsim.spec import layout
from mopsim.spec.plan import Plan


def name_components(model: Any) -> None:
    """Name the part of the model that runs, in forward by module hooks and in backward by the gradients
    that arrive."""
    _name(model.embedding, "embedding")
    _name(model.head, "vocabulary")
    for layer in model.blocks():
        _name(layer.attention, "attention")
        if layer.is_moe:
            _name(layer.moe.router, "router")
            _name(layer.moe.experts, "experts")
            if layer.moe.shared is not None:
                _name(layer.moe.shared, "shared_experts")
        else:
            _name(layer.ffn, "dense_ffn")


def _name(module: nn.Module, name: str) -> None:
    def before(*_: Any) -> None:
        NOW.component = name

    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        NOW.component = "other"
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    def arrived(_grad: Tensor) -> None:
        NOW.component = name

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


class InputHooks:
    """Where checkpointed layers keep their inputs: on the device, or the first `count` of a forward on the
    host, copied there beside what follows and back when their backward asks. Memory of inputs that are gone
    holds the next ones: a pinned block takes a system call."""

    def __init__(self, platform: Platform, count: int) -> None:
        self._platform, self._count = platform, count
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)

    @classmethod
    def of(cls, plan: Plan, platform: Platform) -> "InputHooks":
        """As many on the host as the plan's budget holds."""
        strategy, spec = plan.strategy, plan.model
        rows = plan.training.tokens_per_rank(strategy) // strategy.dense.tensor_parallel
        size = rows * spec.hidden_size * of_name(strategy.precision.compute).itemsize
        return cls(platform, count_on_host(strategy.activations, spec.num_hidden_layers, size))

    def keep(self, layer: int, x: Tensor) -> AbstractContextManager[Any]:
        """A context for the checkpoint call of `layer`, whose input is x."""
        recategorize(x, "boundaries")
        if layer >= self._count:
            return nullcontext()
        return saved_tensors_hooks(partial(self._pack, x.untyped_storage()._cdata), self._unpack)

    def _pack(self, storage: int, tensor: Tensor) -> Tensor | HostInput:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        free = self._free[tensor.shape, tensor.dtype]
        packed = HostInput(self._platform, tensor, free.pop() if free else None)
        finalize(packed, free.append, packed.host)
        return packed

    def _unpack(self, packed: Tensor | HostInput) -> Tensor:
        return packed.take() if isinstance(packed, HostInput) else packed


def recompute(model: Any, plan: Plan, platform: Platform) -> None:
    """Have the backward run again what the plan's strategy says; with all layers also the projection before
    that of an MTP module."""
    activations = plan.strategy.activations
    if activations.recompute == "full":
        kept = layout.not_recomputed(plan.strategy, plan.model)
        layers = [layer for layer in model.blocks() if layer.index not in kept]
        recompute_layers(layers, InputHooks.of(plan, platform), activations.save_ops)
        for module in () if kept else model.mtp:
            module.join = partial(again, module.join)
    recompute_modules(model, activations.modules_again)


def recompute_layers(layers: Sequence[Any], boundaries: InputHooks, names: Collection[str]) -> None:
    """Run layers under a non-reentrant checkpoint, inside FSDP's hooks: their inputs are kept and what
    kernels of these names make, the rest made again."""
    keep_products(layers, names)
    for place, layer in enumerate(layers):
        layer.forward = _Checkpointed(place, layer.forward, boundaries, names)


def recompute_modules(model: Any, names: Collection[str]) -> None:
    """Run the named modules of every layer under a non-reentrant checkpoint: the attention core, the dense
    FFN, the MoE block.
    """
    for layer in model.blocks():
        if "core_attn" in names:
            layer.attention.core = partial(_core_again, layer.attention.core)
        inner = layer.moe if layer.is_moe else layer.ffn
        if ("moe" if layer.is_moe else "mlp") in names:
            inner.forward = partial(again, inner.forward)


def _core_again(core: AttentionCore, parts: list[Tensor], *how: Any) -> Tensor:
    """`core` under a checkpoint, which keeps what is in the list."""
    given = tuple(parts)
    parts.clear()
    return again(lambda *given: core(list(given[:3]), *given[3:]), *given, *how)


def again(function: Callable[..., Tensor], *args: Any, names: Collection[str] = ()) -> Tensor:
    """The function under a non-reentrant checkpoint, which keeps what kernels of these names make."""
    result: Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=partial(contexts, names)
    )
    return result


class _Checkpointed:
    def __init__(
        self, index: int, forward: Callable[..., Tensor], boundaries: InputHooks, names: Collection[str]
    ) -> None:
        self._index, self._forward, self._boundaries, self._names = index, forward, boundaries, names

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        with self._boundaries.keep(self._index, x):
            return again(self._forward, x, *args, names=self._names)
