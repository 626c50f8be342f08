"""`mopexec export`: a run's newest checkpoint in Hugging Face's format."""

import sys
from pathlib import Path

from mopsim.common import io
from mopsim.common.outputs import check_outputs, say
from mopsim.common.units import format_bytes


def run(run: Path, out: Path, to: str, dtype: str | None, json: str | None) -> None:
    """Write `out`, say what it is. to: its format, of which there is one."""
    check_outputs({"--json": json}, {"--out": out})
    from mopexec.weights.export import export

    found = export(run, out, dtype)
    for problem in found.passed:
        print(f"mopexec: {problem}; the one before is written", file=sys.stderr)
    if json is not None:
        io.write_json(json, found)
    without = "" if found.tokenizer else ", without a tokenizer: the run keeps none"
    say(
        f"{found.architecture}: step {found.step}, {found.tensors} tensors, {format_bytes(found.bytes)} in "
        f"{found.dtype}, {found.files} file(s){without}; in {found.out}",
        stderr=json == "-",
    )
