"""What a program's Python costs the host."""

from typing import Literal

from mopsim.common.io import Spec
from mopsim.spec.categories import COMPONENTS
from mopsim.spec.quantity import require_between
from mopsim.spec.recompute import require_known

MOST_READS, MOST_DOCUMENTS = 1000, 1e6
"""Values of a message's shape, documents of a row: more than any has."""


class HostCosts(Spec, frozen=True, kw_only=True):
    """modules: layers are Python modules under autograd, whose host does more than to start kernels. layers:
    whose modules they are, for what they take (`compiled`: mopexec's, between graphs of TorchInductor).
    tensor: what splits their products over tensor-parallel ranks, for what it takes (`dtensor`: torch's
    parallelize_module; `plain`: nothing, or not known). hooks: around each, parameters are gathered and freed
    (DeepSpeed's ZeRO-3), not around groups. graphs: components whose
    kernels CUDA graphs replay; `step`: one graph of the whole step. frames: variables of a layer's Python
    frame (residual stream, norm's output, sum of routes) live until it has run. blocking: the host waits for
    every kernel before it starts the next (CUDA_LAUNCH_BLOCKING=1). reads_lengths: in the forward of a layer
    it reads from the device how long sequences are, for the attention kernel, in every one or where a
    microbatch is one sequence (`single`). documents: of a packed row, which a rotary embedding that no kernel
    fuses turns one after the other; 1: a row is turned at once. counts_read: in the forward of routed experts
    it waits for how many rows each gets, where they are exchanged, for the messages' sizes; `always`, as it
    gives their products these sizes too; or `never`: every expert gets as many, padded, or the device alone
    knows. loss_read: it reads the loss of every microbatch, to stop where that is no number. grads_read: the
    norm of each bucket of gradients, before they are reduced. message_reads: values that it reads from the
    device before a message between pipeline stages can come, whose shape two messages before it say.
    permutes: what launches the kernels of a permutation of experts' rows that is fused.
    collections: steps from one collection of all of Python's garbage (gc.collect) to the next, which a mean
    step has its part of; 0: none. delayed_grads: where exchanges of experts hide behind another microbatch,
    weight gradients are made apart from those of inputs (Megatron-Core's delay_wgrad_compute). woven_grads:
    there, what the parts of a layer hand each other (inputs, gradients) is freed with the layer's backward,
    or with its model chunk's (`chunk`). logs: what it counts and reads at the end of a step for its log
    alone: how many gradients are zero (`zeros`), the norm of the parameters (`params_norm`)."""

    modules: bool = False
    layers: Literal["transformers", "transformer_engine", "compiled"] = "transformers"
    tensor: Literal["plain", "transformer_engine", "dtensor"] = "plain"
    hooks: bool = False
    blocking: bool = False
    reads_lengths: Literal["never", "single", "every"] = "never"
    documents: float = 1.0
    counts_read: Literal["never", "exchanged", "always"] = "exchanged"
    loss_read: bool = False
    grads_read: bool = False
    message_reads: int = 0
    permutes: Literal["compiled", "triton"] = "compiled"
    collections: int = 0
    delayed_grads: bool = False
    woven_grads: Literal["layer", "chunk"] = "layer"
    logs: tuple[Literal["zeros", "params_norm"], ...] = ()
    frames: bool = False
    graphs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_known("graphs", self.graphs, ("step", *COMPONENTS))
        require_between(self, 0, MOST_READS, "message_reads", "collections")
        require_between(self, 1, MOST_DOCUMENTS, "documents")
