"""From a model's parameters to the tensors of its checkpoint files, by the table of its family."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.model import Transformer
from mopexec.model.initialize import is_stacked
from mopexec.weights.families import FAMILIES, Family, TensorPlace
from mopsim.common.errors import MopError
from mopsim.spec.model import ModelSpec

_INDEX = re.compile(r"\.(\d+)\.")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """A tensor of the files: its shape, and the parameter (the first of those) that it holds."""

    shape: Shape
    parameter: str


def family_of(architecture: str, origin: str = "config.json") -> Family:
    """The table of weights of `architecture`. Raises MopError where there is none."""
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise MopError(f"{origin}: architectures: {architecture!r} has no table of weights; known: {known}")
    return FAMILIES[architecture]


class Layout:
    """Where every parameter of `spec` lies in the files of `architecture`.

    Raises MopError where the architecture is unknown or has no place for a parameter.
    """

    def __init__(self, spec: ModelSpec, architecture: str, origin: str = "config.json") -> None:
        self.spec, self.family = spec, family_of(architecture, origin)
        model = Transformer(spec, torch.bfloat16, "meta")
        self.parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.buffers = {name: tuple(b.shape) for name, b in model.named_buffers()}

    def place(self, name: str) -> tuple[TensorPlace, int] | None:
        """(its place, the layer in the files) of a parameter; None where the architecture has none."""
        if name.startswith("mtp."):
            depth = int(name.split(".")[1])
            layer = self.spec.num_hidden_layers + depth
            name = re.sub(r"^mtp\.\d+\.layer\.", "layers.0.", name)
        else:
            found = _INDEX.search(name)
            layer = int(found.group(1)) if found else 0
        place = self.family.table.get(_INDEX.sub(".*.", name, count=1))
        return None if place is None else (place, layer)

    def tensor(self, name: str, expert: int | None = None) -> str:
        """The name of the file tensor of a parameter, or of its expert."""
        found = self.place(name)
        assert found is not None, f"{self.family.architecture} has no place for {name}"
        return found[0].tensor.format(layer=found[1], expert=expert)

    def view(self, name: str, expert: int | None, tensor: Tensor) -> Tensor:
        """The parameter (its expert) in the file tensor that holds it: a view in our orientation."""
        found = self.place(name)
        assert found is not None
        place = found[0]
        if place.row:
            tensor = tensor[0]
        if expert is not None and "{expert}" not in place.tensor:
            tensor = tensor[expert]
        if place.step > 1:
            tensor = tensor[..., place.first :: place.step]
        if place.parts > 1:
            tensor = tensor.chunk(place.parts, dim=-1)[place.part]
        return tensor.t() if place.transposed else tensor

    def wanted(self) -> dict[str, Wanted]:
        """Every tensor that the files must hold. Raises MopError where a parameter has no place, or shares
        one with others of another shape."""
        found: dict[str, Wanted] = {}
        for name, shape in self.held():
            for expert in range(shape[0]) if is_stacked(name) else (None,):
                tensor = self.tensor(name, expert)
                want = Wanted(self._shape(name, shape), name)
                if found.setdefault(tensor, want).shape != want.shape:
                    raise self._uneven(tensor, found[tensor].parameter, name)
        return found

    def held(self) -> Iterator[tuple[str, Shape]]:
        """Parameters and the buffers that the architecture has a place for, with their shapes."""
        for name, shape in self.parameters.items():
            if self.place(name) is None:
                architecture = self.family.architecture
                raise MopError(f"model: {name}: {architecture} has no tensor for this parameter")
            yield name, shape
        for name, shape in self.buffers.items():
            if self.place(name) is not None:
                yield name, shape

    def _uneven(self, tensor: str, one: str, other: str) -> MopError:
        shapes = f"{list(self.parameters[one])} and {list(self.parameters[other])}"
        rule = f"{self.family.architecture} has both as equal parts of {tensor}"
        return MopError(f"model: {one} and {other} have the shapes {shapes}: {rule}")

    def copies(self) -> dict[str, str]:
        """Tensors that equal another one, by name: allowed in files."""
        layers = range(self.spec.num_hidden_layers, self.spec.num_hidden_layers + len(self._mtp()))
        found = {}
        for tensor, original in self.family.copies.items():
            per_layer = "{layer}" in tensor
            if per_layer or self.spec.tie_word_embeddings:
                for layer in layers if per_layer else (0,):
                    found[tensor.format(layer=layer)] = original
        return found

    def _mtp(self) -> range:
        return range(self.spec.num_nextn_predict_layers)

    def _shape(self, name: str, shape: Shape) -> Shape:
        """Of the file tensor that holds a parameter of this shape."""
        found = self.place(name)
        assert found is not None
        place = found[0]
        if "{expert}" in place.tensor:
            shape = shape[1:]
        if place.transposed:
            shape = shape[::-1]
        return (1,) * place.row + (*shape[:-1], shape[-1] * place.step * place.parts)
