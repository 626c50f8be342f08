"""The keys of a Hugging Face config, typed; what becomes of those that no reader asks for.

Of these (unread_keys.yaml) what says that the network is another is refused, what may is named in the
model's `assumptions`, what says how a network is stored, trained or generated from is left.
"""

import re
from types import UnionType
from typing import Any

from mopsim.common.errors import MopError, shown
from mopsim.common.shipped import shipped
from mopsim.common.values import number_problem

Config = dict[str, Any]
UNREAD = "not read: "
"""How an assumption about keys that may or may not change a network begins."""
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
"""What an unread key may be and change nothing: there is no such mechanism."""
_KEYS = shipped("mopsim.spec", "unread_keys.yaml")
_BESIDE = re.compile("|".join(_KEYS["beside"]))
_MOST = 10


class ConfigReader:
    """Typed access to a config's fields. absent: what a key is that the config does not have. read: keys that
    were asked for. passed: keys that say what is left out of the network, which its assumptions tell. names:
    of keys that the architecture's configs call otherwise, what they are called, its own name first.

    `null` of a method: what a null is, and a key that is absent in `absent` too; without it they are refused.
    """

    def __init__(
        self,
        config: Config,
        origin: str,
        absent: Config | None = None,
        names: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.config, self.origin, self.absent, self._names = config, origin, absent or {}, names or {}
        self.read: set[str] = set()
        self.passed: set[str] = set()

    def named(self, key: str) -> str:
        """A key as the config calls it. Raises MopError where it has several names that differ."""
        return self.present(*self._names[key]) if key in self._names else key

    def has(self, key: str) -> bool:
        return self._has(self.named(key))

    def _has(self, key: str) -> bool:
        self.read.add(key)
        return self.config.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the config says that there is none of it; a key that is absent says nothing."""
        key = self.named(key)
        self.read.add(key)
        return self.config.get(key, 0) is None

    def present(self, *keys: str) -> str:
        """The key of several for one thing (transformers has renamed some) that the config has, or the first.
        Raises MopError where they contradict each other."""
        there = [key for key in keys if self._has(key)]
        for key in there[1:]:
            if self.config[key] != self.config[there[0]]:
                rule = f"is not {there[0]} {shown(self.config[there[0]])}, which it is another name of"
                raise self._refused(key, rule)
        return there[0] if there else keys[0]

    def word(self, key: str) -> Any:
        """Text that ModelSpec has the rules for."""
        key = self.named(key)
        return self.config[key] if self.has(key) and self.config[key] != "" else self.absent[key]

    def _get(self, key: str, null: Any) -> Any:
        if self.has(key):
            problem = number_problem(self.config[key])
            if problem:
                raise MopError(f"{self.origin}: {key}: {problem}")
            return self.config[key]
        value = null if key in self.config else self.absent.get(key, null)
        if value is None:
            known = f"null is refused; without the key it is {shown(self.absent.get(key))}"
            rule = known if key in self.absent else "missing, the field is required"
            raise MopError(f"{self.origin}: {key}: {rule}")
        return value

    def _typed(self, key: str, null: Any, kind: type | UnionType, rule: str) -> Any:
        key = self.named(key)
        value = self._get(key, null)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise MopError(f"{self.origin}: {key}: {shown(value)} must be {rule}")
        return value

    def integer(self, key: str, null: int | None = None) -> int:
        return int(self._typed(key, null, int, "an integer"))

    def count(self, key: str) -> int:
        """Of something that there is."""
        found = self.integer(key)
        if found < 1:
            raise MopError(f"{self.origin}: {self.named(key)}: {found} must be at least 1")
        return found

    def number(self, key: str, null: float | None = None) -> float:
        return float(self._typed(key, null, int | float, "a number"))

    def flag(self, key: str, null: bool | None = None) -> bool:
        return bool(self._typed(key, null, bool, "true or false"))

    def items(self, key: str) -> list[Any]:
        """A list; an empty one where the key is absent."""
        return list(self._typed(key, [], list, "a list"))

    def mapping(self, key: str) -> Config:
        """A mapping; a null counts as absent."""
        return dict(self._typed(key, self.absent.get(key, {}), dict, "a mapping"))

    def must_be(self, key: str, expected: Any, meaning: str) -> None:
        """Refuse a config whose `key` is there and is not `expected`: ModelSpec can't say what it means."""
        key = self.named(key)
        if self._has(key) and self.config[key] != expected:
            raise self._refused(key, meaning)

    def needs(self, key: str, expected: Any, meaning: str) -> None:
        """As must_be, of a key whose null is none of it (where there must be some, it is refused too)."""
        if expected and self.is_null(key):
            raise self._refused(key, meaning)
        self.must_be(key, expected, meaning)

    def _refused(self, key: str, meaning: str) -> MopError:
        return MopError(f"{self.origin}: {key}: {shown(self.config[key])} is refused: {meaning}")

    def unread(self, architecture: str) -> tuple[str, ...]:
        """What a model assumes of the keys that nothing asked for. Raises MopError for one that says that the
        network is another."""
        left = {k: v for k, v in self.config.items() if k not in self.read and v not in _NEUTRAL}
        left = {k: v for k, v in left.items() if v != 1 or not re.fullmatch(_KEYS["factors"], k)}
        for key, value in left.items():
            refused = (one["refused"] for one in _KEYS["mechanisms"] if re.fullmatch(one["keys"], key))
            rule = next(refused, "")
            if rule and key not in self.passed:
                raise MopError(f"{self.origin}: {key}: {shown(value)} is refused for {architecture}: {rule}")
        names = [shown(key) for key in left if not _BESIDE.fullmatch(key)]
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        return (f"{UNREAD}{', '.join(names[:_MOST])}{more}",) if names else ()
