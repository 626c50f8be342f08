"""How far off predictions are, from published runs.

Fits and scores factor many small matrices. On these several threads of BLAS save nothing, and wait for each
other for minutes where other programs want the cores, so that one is used unless the environment says how
many; numpy reads this when it is first imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
