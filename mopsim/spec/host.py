"""What a program's Python costs the host."""

from typing import Literal

import msgspec

from mopsim.common.errors import require
from mopsim.common.io import Spec
from mopsim.spec.categories import COMPONENTS
from mopsim.spec.kernels import DEFAULT
from mopsim.spec.quantity import require_between
from mopsim.spec.recompute import require_known

MOST_READS, MOST_DOCUMENTS = 1000, 1e6
"""Values of a message's shape, documents of a row: more than any has."""


class HostCosts(Spec, frozen=True, kw_only=True):
    """What a program's Python costs the host.

    modules: layers are Python modules under autograd, so the host does more than start kernels. `routed`:
    layers with routed experts alone, where a compiler makes one call of every other.
    layers: whose modules the layers are, which decides their host time. `mopexec`: its own. `compiled`: those
    between graphs of TorchInductor. `functional`: experts dispatched by
    torch's functional collectives. `functional_compiled`: so, their layers compiled by modules.
    tensor: what splits the layers' products over tensor-parallel ranks, which decides its host time.
    `dtensor`: torch's parallelize_module. `plain`: nothing, or not known.
    hooks: parameters are gathered and freed around each module (DeepSpeed's ZeRO-3), not around groups. true:
    by its hooks of 2026. `early`: by those of 2023, which take half as long (reports/host).
    blocking: the host waits for every kernel before it starts the next (CUDA_LAUNCH_BLOCKING=1).
    queues: what starts kernels of several streams, by device architecture (`hopper`, ...; `default`: all
    others). `each`: a queue for each stream. `one`: all kernels, of compute and communicators, start in the
    order in which the host issues them (CUDA_DEVICE_MAX_CONNECTIONS=1), so that one that has to wait holds up
    those behind it; those that run do so side by side. `exposed`: `one` where no exchange of experts is
    hidden, else `each`. `split`: so too, and `one` only where tensor or context parallelism splits layers.
    profiled: torch's profiler records operators and kernels, so that the host takes longer for each.
    reads_lengths: in the forward of a layer the host reads the lengths of sequences from the device, for
    the attention kernel. `every`: in every layer. `single`: if a microbatch is one sequence.
    documents: documents of a packed row. A rotary embedding that no kernel fuses turns them one after the
    other. 1: a row is turned at once.
    orders_documents: where context-parallel ranks exchange packed rows by all-to-all, the host makes the
    order of their tokens piece by piece, two a rank of each document, and reads both ends of each from the
    device.
    counts_read: in the forward of routed experts the host waits for the number of rows of each expert.
    `exchanged`: if rows are exchanged, for the messages' sizes. `always`: the products need these sizes
    too. `never`: every expert gets as many rows, padded, or only the device knows the number.
    loss_read: the host reads the loss of every microbatch, to stop if it is not a number: before it starts
    the backward, or (`after_backward`) once that is over.
    grads_read: the host reads the norm of each bucket of gradients before they are reduced.
    message_reads: values that the host reads from the device before a message between pipeline stages can
    come. Two messages before it give its shape.
    products: what each product of experts that the host starts one by one takes the host, in torch Linears,
    beside what was measured of such layers without a device.
    permutes: what launches the kernels of a fused permutation of experts' rows.
    collections: steps from one collection of all of Python's garbage (gc.collect) to the next. A mean step
    has its part of the time. 0: none.
    delayed_grads: if exchanges of experts hide behind another microbatch, weight gradients are computed
    separately from those of inputs (Megatron-Core's delay_wgrad_compute), those of experts beside the
    exchange of their inputs'.
    woven_grads: when the tensors that the parts of such a layer hand each other (inputs, gradients) are
    freed. `layer`: with the layer's backward. `chunk`: with the model chunk's.
    logs: values that the program counts and reads at the end of a step for its log alone. `zeros`: the
    number of gradients that are zero. `params_norm`: the norm of the parameters.
    frames: variables of a layer's Python frame (residual stream, norm's output, sum of routes) live until
    the layer has run, that of attention's norm until queries and keys are made.
    graphs: components whose kernels CUDA graphs replay. `step`: one graph of the whole step.
    """

    modules: bool | Literal["routed"] = False
    layers: Literal[
        "transformers", "transformer_engine", "functional", "functional_compiled", "mopexec", "compiled"
    ] = "transformers"
    tensor: Literal["plain", "transformer_engine", "dtensor"] = "plain"
    hooks: bool | Literal["early"] = False
    blocking: bool = False
    queues: dict[str, Literal["each", "one", "exposed", "split"]] = msgspec.field(
        default_factory=lambda: {DEFAULT: "each"}
    )
    profiled: bool = False
    reads_lengths: Literal["never", "single", "every"] = "never"
    documents: float = 1.0
    orders_documents: bool = False
    counts_read: Literal["never", "exchanged", "always"] = "exchanged"
    loss_read: bool | Literal["after_backward"] = False
    grads_read: bool = False
    message_reads: int = 0
    products: float = 0.0
    permutes: Literal["compiled", "triton"] = "compiled"
    collections: int = 0
    delayed_grads: bool = False
    woven_grads: Literal["layer", "chunk"] = "layer"
    logs: tuple[Literal["zeros", "params_norm"], ...] = ()
    frames: bool = False
    graphs: tuple[str, ...] = ()

    def reads_loss(self, phase: str) -> bool:
        """Whether the host reads the loss of a microbatch at the end of a phase."""
        return phase == {True: "forward", "after_backward": "backward"}.get(self.loss_read, "")

    def __post_init__(self) -> None:
        require_known("graphs", self.graphs, ("step", *COMPONENTS))
        require_between(self, 0, MOST_READS, "message_reads", "collections", "products")
        require(DEFAULT in self.queues, "queues", self.queues, f"must have {DEFAULT!r}, of all others")
        require_between(self, 1, MOST_DOCUMENTS, "documents")
