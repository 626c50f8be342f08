"""torch.compile as mopexec uses it: whole graphs, the compiler chosen in one place, and whether this machine
has what it calls.
"""

import functools
import importlib.util
import inspect
import os
import shutil
import sys
import sysconfig
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
    a GPU Triton, and a C compiler for it) and Python's headers."""
    if BACKEND != "inductor":
        return
    if cuda and importlib.util.find_spec("triton") is None:
        rule = "needs Triton, which is not installed: torch's wheels for CUDA bring it; 'none' runs without"
        raise SpecError(field, "block", rule)
    variable, usual = ("CC", ("gcc", "clang")) if cuda else ("CXX", (_CXX,))
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        lacking = f"{' or '.join(names)}, which is not found: install {usual[0]} or set {variable}"
        raise SpecError(field, "block", f"needs {lacking}; 'none' runs without")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        rule = f"needs Python's headers, and {header} is not found: install python3-dev; 'none' runs without"
        raise SpecError(field, "block", rule)
