"""Where the program is: category, component, phase and tier of what runs now. For the tracker and the timers.

Plain module state, not thread-local: autograd's device threads run inside the scope of the `backward()` that
called them. A scope costs a few tenths of a microsecond, so it stays in the code when nothing measures.
"""

from types import TracebackType
from typing import Literal

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


class host_compute:  # noqa: N801
    """`with host_compute():` the host itself works inside (the host optimizer).

    Host tensors may be read, and what is allocated is host memory.
    """

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = (NOW.host_compute, NOW.tier)
        NOW.host_compute, NOW.tier = True, "host"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        NOW.host_compute, NOW.tier = self._outer


class host_allocation:  # noqa: N801
    """`with host_allocation("optimizer"):` what is allocated inside is host memory of that category."""

    __slots__ = ("_name", "_outer")

    def __init__(self, name: str) -> None:
        assert name in CATEGORIES, f"category {name!r} is not one of {', '.join(CATEGORIES)}"
        self._name = name

    def __enter__(self) -> None:
        self._outer = (NOW.category, NOW.tier)
        NOW.category, NOW.tier = self._name, "host"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        NOW.category, NOW.tier = self._outer


class uncounted:  # noqa: N801
    """`with uncounted():` what is made inside is not the plan's memory (shape propagation, rank tables)."""

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = NOW.uncounted
        NOW.uncounted = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        NOW.uncounted = self._outer
