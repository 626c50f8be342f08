"""What a script of this folder found, printed and kept."""

import json
import platform
from pathlib import Path
from typing import Any

import torch


def write(found: dict[str, Any], target: Path | None) -> None:
    """Print what was found, with the machine and torch's version before it, as JSON; keep it in `target`."""
    machine = platform.processor() or platform.machine()
    text = json.dumps({"machine": machine, "torch": torch.__version__, **found}, indent=2)
    print(text)
    if target:
        target.write_text(text + "\n")
