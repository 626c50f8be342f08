"""Results with a key that is missing or wrong: a page, or one line that says what is wrong."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mopsim
from tests.sim.explored import results

WRONG: tuple[Any, ...] = (None, "x", -1, 0, [], {}, 1e308, True, "\u202e", [[]])
MISSING = object()


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and the first places of every list, as paths."""
    inner = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, Any]]:
    return results()


@pytest.mark.parametrize("seed", range(6))
def test_a_result_that_is_wrong_somewhere_is_shown_or_refused_in_one_line(
    made: dict[str, dict[str, Any]], seed: int, tmp_path: Path
) -> None:
    drawn, lines = random.Random(seed), []
    for _ in range(40):
        data = copy.deepcopy(made[drawn.choice(list(made))])
        *above, last = drawn.choice(list(places(data)))
        node: Any = data
        for step in above:
            node = node[step]
        value = drawn.choice((*WRONG, MISSING))
        if value is MISSING:
            del node[last]
        else:
            node[last] = value
        try:
            mopsim.explore(data, tmp_path / "page.html", timelines=1)
        except mopsim.MopError as refused:
            lines.append(str(refused))
    assert not [line for line in lines if not line.isprintable()]
