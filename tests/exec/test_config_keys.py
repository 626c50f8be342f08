"""What transformers writes of a network that both know is read, or known to change nothing."""

from pathlib import Path

import pytest

from mopsim.spec.architectures import ARCHITECTURES
from mopsim.spec.config_reader import UNREAD
from mopsim.spec.presets import load_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_of_transformers_is_known(architecture: str, tmp_path: Path) -> None:
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    config = getattr(config, "text_config", config)
    config.architectures = [architecture]
    for key, value in {"num_experts_per_tok": 2, "n_routed_experts": 8}.items():
        if getattr(config, key, 0) is None:
            setattr(config, key, value)
    if config.hidden_size % (2 * config.num_attention_heads):
        config.head_dim = 128
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    assert not [note for note in load_model(tmp_path).assumptions if note.startswith(UNREAD)]
