"""What the server of `tests.exec.spawn` imports before it forks. None of it is looked through for garbage,
there or in a rank: that would take 0.2 s and copy it all."""

import gc
from contextlib import suppress
from importlib import import_module

from tests.exec.spawn import IMPORTED

gc.disable()
for name in IMPORTED:
    with suppress(ImportError):
        import_module(name)
gc.enable()
gc.freeze()
