"""What all candidates of a space share and bounds are made of: sizes of the network, the machine, a layer."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from mopsim.common.units import DTYPE_BYTES
from mopsim.engine.upper import ALLOCATOR
from mopsim.intervals.memory import least_share
from mopsim.intervals.spread import Facts
from mopsim.search.layer import Layer
from mopsim.search.space import Space
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import LayerKind
from mopsim.spec.tensors import tensors


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model by how they are sharded. layers: (dense, routed) of the smallest layer of each
    kind. rows: of what projects on the vocabulary, the head or the embedding."""

    dense: int
    experts: int
    head: int
    largest_expert_unit: int
    moe_layers: int
    embedding: int
    rows: int
    layers: dict[LayerKind, tuple[int, int]]

    @staticmethod
    def of(space: Space) -> "Sizes":
        found, model = tensors(space.problem.model), space.problem.model
        routed, every = Counter[int](), Counter[int]()
        for tensor in found:
            every[tensor.layer] += tensor.numel
            if tensor.routed:
                routed[tensor.layer] += tensor.numel
        layers = {
            kind: min((every[layer] - routed[layer], routed[layer]) for layer in mine)
            for kind, mine in model.layer_kinds().items()
        }
        head = sum(tensor.numel for tensor in found if tensor.name == "head.weight")
        experts = sum(routed.values())
        dense = sum(tensor.numel for tensor in found) - experts - head
        embedding = model.vocab_size * model.hidden_size
        largest = max(routed.values(), default=0)
        return Sizes(dense, experts, head, largest, len(routed), embedding, head or embedding, layers)


def surely(space: Space, on_top: float = 0.0, confidence: float = 0.0) -> float:
    """How many times the peak of a candidate a device must hold, at least, to fit as good as surely. on_top:
    part of the peak that communicators take beside it. confidence: `Options.confidence`."""
    problem, stack = space.problem, space.stack
    hardware, precision = problem.hardware, space.build(0).precision
    about = Facts.of(stack, hardware, precision, problem.model, exact=bool(stack.runtime))
    apart = hardware.device_kind == "cpu" or stack.pool  # no caching allocator (mopsim.engine.account)
    return least_share(about, 0.0 if apart else ALLOCATOR + on_top, confidence)


@dataclass(frozen=True)
class SpaceFacts:
    """What all candidates of a space share. hardware: as their stack uses it, waiting for the slowest
    device. each: bytes of an element."""

    sizes: Sizes
    hardware: HardwareProfile
    space: Space
    each: float

    @cached_property
    def layer(self) -> Layer:
        """What a layer takes at least; made where it is asked for."""
        return Layer.of(self.space, self.each)

    @staticmethod
    def of(space: Space) -> "SpaceFacts":
        each = DTYPE_BYTES[space.build(0).precision.compute]
        return SpaceFacts(Sizes.of(space), space.machine, space, each)
