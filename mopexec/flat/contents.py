"""What the flat units hold: the network's parameters, in the order of its forward pass."""

from mopexec.flat.units import Contents, Shape
from mopsim.spec.model import ModelSpec
from mopsim.spec.tensors import tensors


def outer_contents(spec: ModelSpec, rows: tuple[int, int] | None) -> tuple[Contents, Contents, Contents]:
    """Embedding, final norm and head; rows: the vocabulary interval where the head is split."""
    table = (spec.vocab_size, spec.hidden_size)

    def named(start: str) -> tuple[tuple[str, Shape], ...]:
        return tuple((t.name, t.shape) for t in tensors(spec) if t.name.startswith(start))

    return (
        Contents("embedding", named("embedding.")),
        Contents("final", named("final_norm.")),
        Contents("head", (("head.weight", table),), rows=rows),
    )


def layer_contents(spec: ModelSpec, index: int, degree: int, place: int) -> tuple[Contents, Contents | None]:
    """A layer's dense unit, and its experts unit at `place` of `degree` where it is MoE. From the layer count
    on: of MTP modules, whose own parameters are in the dense unit.
    """
    found = [tensor for tensor in tensors(spec) if tensor.layer == index]
    module, local = index - spec.num_hidden_layers, spec.num_local_experts // degree
    prefix, key = f"layers.{index}." if module < 0 else f"mtp.{module}.layer.", f"layers.{index}."
    dense = Contents(f"{key}dense", tuple((t.name, t.shape) for t in found if not t.routed), prefix)
    names = tuple((t.name, t.shape[1:]) for t in found if t.routed)
    if not names:
        return dense, None
    total = spec.num_local_experts
    return dense, Contents(f"{key}experts", names, prefix, local, place * local, total)
