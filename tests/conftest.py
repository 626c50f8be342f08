"""What holds for all tests: no example of hypothesis fails by the clock, and tests that share what takes long
to make stay in one worker (`pytest -n 2 --dist loadgroup`), so that it is made once."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take a module's fixture (with one parameter), or ranks of tests.exec.spawn, are a group."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            group = "ranks" if hasattr(item.module, "pool") else _shared(item)
            if group:
                item.add_marker(pytest.mark.xdist_group(group))


def _shared(item: pytest.Function) -> str:
    """The module and the parameters of its fixtures that the test takes; empty where it takes none."""
    known = item._fixtureinfo.name2fixturedefs
    names = [name for name in item.fixturenames if name in known and known[name][-1].scope == "module"]
    if not names:
        return ""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return "/".join([item.module.__name__, *(str(given[name]) for name in names if name in given)])
