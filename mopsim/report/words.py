"""Sentences as templates: `templates/NAME.j2` says them, what they are of comes from Python."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from mopsim.report.page import templates


class Words:
    """The macros of a template, each a function that returns what it says, the lines joined as they are.
    known: what the macros know beside their arguments and the filters of `templates`; of these functions
    also as filters."""

    def __init__(self, name: str, **known: Any) -> None:
        self.name, self.known = name, known

    @cached_property
    def _said(self) -> Any:
        own = templates().overlay()
        own.filters = own.filters | {name: one for name, one in self.known.items() if callable(one)}
        return own.get_template(self.name, globals=self.known).module

    def __getattr__(self, macro: str) -> Callable[..., str]:
        if macro.startswith("_"):
            raise AttributeError(macro)
        return lambda *given: str(getattr(self._said, macro)(*given)).replace("\n", "")
