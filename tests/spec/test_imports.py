"""mopsim stays light: no torch, and its slow libraries only where a command needs them."""

import subprocess
import sys

import pytest

from tests.patience import HANG


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import mopsim, mopsim.cli", "import mopsim.spec.presets, mopsim.spec.profiles"]
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    assert not loaded_after(statement) & {"torch", "scipy", "pandas", "matplotlib", "numpy"}


def test_help_reads_no_files() -> None:
    assert not loaded_after("import mopsim, mopsim.cli") & {"msgspec", "yaml", "mopsim.common.io"}


def test_presets_and_profiles_are_found_without_torch() -> None:
    statement = "from mopsim.spec.presets import load_model; from mopsim.spec.profiles import load_profile; "
    assert "torch" not in loaded_after(statement + "load_model('tiny'); load_profile('h200-sxm-141g')")
