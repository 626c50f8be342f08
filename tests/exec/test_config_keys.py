"""What transformers writes of a network that both know is read, or known to change nothing."""

from pathlib import Path

import pytest

from mopsim.spec.huggingface import ARCHITECTURES
from mopsim.spec.presets import load_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_of_transformers_is_known(architecture: str, tmp_path: Path) -> None:
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    config.architectures = [architecture]
    if getattr(config, "num_experts_per_tok", 0) is None:
        config.num_experts_per_tok = 2
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    assert load_model(tmp_path).assumptions == ()
