"""Where the program is: category, component, phase and tier of what runs now. For the tracker and the timers.

Plain module state, not thread-local: autograd's device threads run inside the scope of the `backward()` that
called them. A scope costs a few tenths of a microsecond, so it stays in the code when nothing measures.
"""

from typing import Any, Literal

from mopsim.spec.categories import CATEGORIES, COMPONENTS, PHASES


class Scope:
    """The innermost names in force. One instance per process: `NOW`."""

    __slots__ = ("category", "component", "host_compute", "phase", "tier", "uncounted")

    def __init__(self) -> None:
        self.category = "activations"
        self.component = "other"
        self.phase = "forward"
        self.tier: Literal["device", "host"] = "device"
        self.host_compute = False
        self.uncounted = False


NOW = Scope()


class _Scoped:
    """Sets one field of NOW on entry and restores it on exit; may be entered again after it was left."""

    __slots__ = ("_name", "_outer")
    field: str
    allowed: tuple[str, ...]

    def __init__(self, name: str) -> None:
        assert name in self.allowed, f"{self.field} {name!r} is not one of {', '.join(self.allowed)}"
        self._name = name

    def __enter__(self) -> None:
        self._outer = getattr(NOW, self.field)
        setattr(NOW, self.field, self._name)

    def __exit__(self, *_: object) -> None:
        setattr(NOW, self.field, self._outer)


class category(_Scoped):  # noqa: N801
    """`with category("dispatch"):` what is allocated inside belongs to that category (innermost wins)."""

    __slots__ = ()
    field, allowed = "category", CATEGORIES


class component(_Scoped):  # noqa: N801
    """`with component("experts"):` names the part of the model that runs inside."""

    __slots__ = ()
    field, allowed = "component", COMPONENTS


class phase(_Scoped):  # noqa: N801
    """`with phase("recompute"):` names the part of the step that runs inside."""

    __slots__ = ()
    field, allowed = "phase", PHASES


class _Sets:
    """Sets fields of NOW on entry and restores them on exit."""

    __slots__ = ("_outer", "_values")

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._outer = {name: getattr(NOW, name) for name in self._values}
        _set(self._values)

    def __exit__(self, *_: object) -> None:
        _set(self._outer)


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(NOW, name, value)


def host_compute() -> _Sets:
    """`with host_compute():` the host itself works inside (the host optimizer).

    Host tensors may be read, and what is allocated is host memory.
    """
    return _Sets(host_compute=True, tier="host")


def host_allocation(name: str) -> _Sets:
    """`with host_allocation("optimizer"):` what is allocated inside is host memory of that category."""
    assert name in CATEGORIES, f"category {name!r} is not one of {', '.join(CATEGORIES)}"
    return _Sets(category=name, tier="host")


def apart() -> _Sets:
    """`with apart():` nothing is named inside at first; hooks that ended early leave nothing behind."""
    fresh = Scope()
    return _Sets(**{name: getattr(fresh, name) for name in Scope.__slots__})


def uncounted() -> _Sets:
    """`with uncounted():` what is made inside is not the plan's memory (shape propagation, rank tables)."""
    return _Sets(uncounted=True)


def mark_passing(parameter: Any) -> None:
    """Its gradient is added to a buffer as soon as it is made, and freed."""
    parameter.passing = True


def passes(parameter: Any) -> bool:
    """Whether it was marked; what autograd saves of it may not be (a checkpoint detaches it)."""
    return bool(getattr(parameter, "passing", False))
