"""What the flat units hold: the network's parameters, in the order of its forward pass."""

from mopexec.flat.units import Contents
from mopsim.spec.model import ModelSpec
from mopsim.spec.tensors import tensors


def outer_contents(spec: ModelSpec, rows: tuple[int, int] | None) -> dict[str, Contents]:
    """By key: embedding, learned positions, final norm and head, of which a network may lack the second, and
    has no fourth where embedding and head share a weight. rows: the vocabulary interval where it is split.
    """
    split = "embedding" if spec.tie_word_embeddings else "head"

    def named(key: str, start: str) -> Contents | None:
        names = tuple((t.name, t.shape) for t in tensors(spec) if t.name.startswith(start))
        return Contents(key, names, rows=rows if key == split else None) if names else None

    parts = {"embedding": "embedding.weight", "positions": "embedding.positions", "final": "final_norm."}
    found = {key: named(key, start) for key, start in (*parts.items(), ("head", "head."))}
    return {key: contents for key, contents in found.items() if contents is not None}


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
