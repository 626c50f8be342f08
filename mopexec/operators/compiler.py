"""torch.compile as mopexec uses it: whole graphs, the compiler chosen in one place, and whether this machine
has what it calls.
"""

import functools
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mopsim.common.errors import SpecError

BACKEND = "inductor"
"""What compiles graphs. `aot_eager` traces them and runs torch's own operators, which needs no compiler."""
_VARIANTS = 64
"""Of one function (dtypes, shapes, flags) that may be compiled: torch raises an error above its own 8."""
_CXX = "clang++" if sys.platform == "darwin" else "g++"
"""TorchInductor's (torch._inductor.config.cpp.cxx)."""
Function = Callable[..., Any]


def compiled(function: Function, *, dynamic: bool | None = None) -> Function:
    """The function in one graph, compiled when it is first called. dynamic: sizes are unknown from the start;
    None: those that change."""

    @functools.cache
    def made(backend: str) -> Function:
        whole = functools.partial(torch.compile, function, dynamic=dynamic, fullgraph=True, backend=backend)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            return whole(recompile_limit=_VARIANTS)
        # older torch: a setting of a thread, and autograd calls from threads of its own
        patched: Function = torch._dynamo.config.patch(recompile_limit=_VARIANTS)(whole())
        return patched

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return made(BACKEND)(*args)

    return run


def check_compiler(field: str, *, cuda: bool) -> None:
    """Raise SpecError where TorchInductor would not find what it calls on this machine: a C++ compiler (for
    a GPU Triton, and a C compiler for it) that works, Python's headers, a directory to compile in."""
    if BACKEND != "inductor":
        return
    if cuda and importlib.util.find_spec("triton") is None:
        rule = "needs Triton, which is not installed: torch's wheels for CUDA bring it; 'none' runs without"
        raise SpecError(field, "block", rule)
    variable, usual = ("CC", ("gcc", "clang")) if cuda else ("CXX", (_CXX,))
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    found = next(filter(shutil.which, names), None)
    if found is None:
        lacking = f"{' or '.join(names)}, which is not found: install {usual[0]} or set {variable}"
        raise SpecError(field, "block", f"needs {lacking}; 'none' runs without")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        rule = f"needs Python's headers, and {header} is not found: install python3-dev; 'none' runs without"
        raise SpecError(field, "block", rule)
    problem = _problem(found, ".c" if cuda else ".cpp")
    if problem:
        rule = f"needs a compiler that works, and {problem.format(variable)}; 'none' runs without"
        raise SpecError(field, "block", rule)


_SOURCES = {".c": "#include <stdint.h>\nint64_t f(void) {return 1;}\n", ".cpp": "#include <cmath>\n"}


@functools.cache
def _problem(name: str, suffix: str) -> str:
    """Why the compiler makes no library of a small file, where TorchInductor's would lie; '' where it does.
    The variable that names the compiler is left open."""
    where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "TorchInductor's own directory")
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # which may be made by the import

        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            source, made = Path(folder) / f"small{suffix}", Path(folder) / "small.so"
            source.write_text(_SOURCES[suffix], encoding="utf-8")
            command = [name, "-shared", "-fPIC", str(source), "-o", str(made)]
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if ran.returncode == 0 and made.is_file() and made.stat().st_size:
                return ""
            said = (ran.stderr.strip().splitlines() or [f"it ends with {ran.returncode} and writes nothing"])[
                0
            ]
            said = said.replace("{", "{{").replace("}", "}}")
            return f"{name} makes no library of a small file in {where} ({said}): set {{}} to another"
    except OSError as error:
        told = error.strerror or error
        return f"{where} cannot be compiled in ({told}): set TORCHINDUCTOR_CACHE_DIR to another"
