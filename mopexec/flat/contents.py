"""What the flat units hold: the network's parameters, in the order of its forward pass."""

from mopexec.flat.units import Contents, Shape
from mopsim.spec.model import ModelSpec
from mopsim.spec.tensors import layer_tensors, tensors


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
    """A layer's dense unit, and its experts unit at `place` of `degree` where it is MoE."""
    prefix, moe, experts = f"layers.{index}.", spec.is_moe_layer(index), spec.num_local_experts
    found, local = layer_tensors(spec, index, f"layers.{index}", moe), experts // degree
    dense = Contents(f"{prefix}dense", tuple((t.name, t.shape) for t in found if not t.routed), prefix)
    if not moe:
        return dense, None
    names = tuple((t.name, t.shape[1:]) for t in found if t.routed)
    return dense, Contents(f"{prefix}experts", names, prefix, local, place * local, experts)
