"""Faults in parallel arithmetic, streams, memory and checkpoints, and whether a test fails for each.

`python -m tests.bench.mutations reports/executor [WORD ..]`: applies the faults of mutations.yaml (only those
whose name has one of the words, the others as last reported) one at a time in a copy of the project, runs the
tests named there, and writes mutations.md and mutations.json. The tests must pass in the copy as it is. About
half a minute each.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mopsim.common import io
from mopsim.common.io import Spec

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_suffix(".yaml")
COPIED = ("mopexec", "mopsim", "tests", "hardware_profiles", "pyproject.toml")
LONGEST = 600
"""Seconds that a case's tests may take: ranks that wait for each other are a fault that was seen."""

HEAD = """# Mutations

`python -m tests.bench.mutations reports/executor`: each fault of tests/bench/mutations.yaml alone in a copy
of the project, and the tests that are to fail. {caught} of {all} are caught. The list was run in parts, and
cases again after a test was added: nothing had held gradients below the clipping limit, the ends of packed
documents that GPUs' attention is given, on fewer than 8 ranks, expert-tensor ranks with unequal rows, memory
of an input on the host that is lent too early, what batches of held-out data weigh, and initial values of
experts; tests/parity/test_peaks.py was written with the list. Two faults were taken off it, as they change
nothing that can be seen: rotary positions that do not restart with a document (only differences count), and
a strip of logits that lives until the next one is there (the gradient's strip is larger).

| fault | file | caught | by |
|---|---|---|---|
"""


class Mutation(Spec, frozen=True, kw_only=True):
    """In `file` the only occurrence of `find` becomes `replace`; one of `tests` (of pytest) is to fail."""

    name: str
    file: str
    find: str
    replace: str
    tests: list[str]


class Cases(Spec, frozen=True, kw_only=True):
    """What mutations.yaml has."""

    mutations: list[Mutation]


class Found(Spec, frozen=True, kw_only=True):
    """Whether a mutation was caught, and the test that failed first, or why none did."""

    name: str
    file: str
    caught: bool
    by: str


def load() -> list[Mutation]:
    """Every case. Raises MopError for a malformed file."""
    return io.load(CASES, Cases, "").mutations


def mutated(mutation: Mutation, text: str) -> str:
    """The file with the fault. Raises ValueError where `find` is not there once."""
    count = text.count(mutation.find)
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has its text {count} times")
    return text.replace(mutation.find, mutation.replace)


def run(mutation: Mutation, copy: Path) -> Found:
    """The case in the copy, which is afterwards as it was."""
    path = copy / mutation.file
    whole = path.read_text()
    path.write_text(mutated(mutation, whole))
    try:
        failed, by = _tests(copy, mutation.tests)
    finally:
        path.write_text(whole)
    return Found(name=mutation.name, file=mutation.file, caught=failed, by=by)


def _tests(copy: Path, arguments: list[str]) -> tuple[bool, str]:
    """Whether one of the tests fails, and which."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return True, f"no end within {LONGEST} s"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1, failed[0].removeprefix("FAILED ") if failed else "all pass"


def main(folder: Path, words: list[str]) -> None:
    cases, known = load(), folder / "mutations.json"
    found = (
        {one["name"]: io.convert(one, Found, "") for one in json.loads(known.read_text())} if words else {}
    )
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copy, passed = Path(scratch), set()
        for name in COPIED:
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy / name)
        for case in cases:
            if words and not any(word in case.name for word in words):
                continue
            if (arguments := tuple(case.tests)) not in passed:
                failed, by = _tests(copy, case.tests)
                if failed:
                    raise SystemExit(f"without a fault: {by} fails")
                passed.add(arguments)
            one = found[case.name] = run(case, copy)
            print(f"{'caught' if one.caught else 'NOT CAUGHT'}: {one.name}: {one.by}", flush=True)
            write(folder, [found[case.name] for case in cases if case.name in found])


def write(folder: Path, found: list[Found]) -> None:
    """mutations.json and mutations.md."""
    io.write_json(str(folder / "mutations.json"), [io.to_plain(one) for one in found])
    lines = [f"| {one.name} | {one.file} | {'yes' if one.caught else '**no**'} | {one.by} |" for one in found]
    head = HEAD.format(caught=sum(one.caught for one in found), all=len(found))
    io.write_text(folder / "mutations.md", head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
