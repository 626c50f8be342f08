"""What holds for all tests: no example of hypothesis fails by the clock, and tests that share what takes long
to make stay in one worker (`pytest -n 3 --dist loadgroup`), so that it is made once. None leaves the
environment changed for the next."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

gc.disable()  # until all is imported and collected: all of it stays
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")

DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
for number, handler in DEFAULTS.items():  # ignored in a background job or under nohup: children inherit it
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that pytest sets for each test, and torch once in a process."""


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Fails a test that leaves a variable of the environment changed, and takes it back."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    names = (before.keys() | after.keys()) - OTHERS
    left = sorted(name for name in names if before.get(name) != after.get(name))
    for name in left:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert not left, f"the test leaves the environment changed: {', '.join(left)}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take a module's fixture (with one parameter), or ranks of tests.exec.spawn, are a group."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            group = "ranks" if hasattr(item.module, "pool") else _shared(item)
            if group:
                item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: a collection of garbage looks at what tests leave, and seldom:
    what a simulation or a search makes has hardly any cycles (mopsim.common.garbage)."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _shared(item: pytest.Function) -> str:
    """The module and the parameters of its fixtures that the test takes; empty where it takes none."""
    known = item._fixtureinfo.name2fixturedefs
    names = [name for name in item.fixturenames if name in known and known[name][-1].scope == "module"]
    if not names:
        return ""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return "/".join([item.module.__name__, *(str(given[name]) for name in names if name in given)])
