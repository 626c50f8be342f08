"""The table of composed kernels says where they are read from, and has every loss."""

import re
from typing import get_args, get_type_hints

import pytest

from mopsim.graph.rewrites.tensor_passes import COMPOSED
from mopsim.program.loss import CASTS, KEEP_SOFTMAX
from mopsim.spec.kernels import Kernels
from tests.together import together

OF_TORCH = {"gathered", *CASTS} - {"slices_in_place", *KEEP_SOFTMAX}
"""Losses that are torch's cross entropy on whatever they are given."""


@pytest.mark.parametrize("loss", sorted(set(get_args(get_type_hints(Kernels)["loss"])) - OF_TORCH))
def test_every_loss_that_is_not_torchs_has_its_own_passes(loss: str) -> None:
    """None is taken for another: a name that is not in the table is a KeyError."""
    assert f"loss_{loss}" in COMPOSED


@together(COMPOSED)
def test_a_source_is_a_file_or_a_release_and_not_a_description(name: str) -> None:
    how = COMPOSED[name]
    for one in filter(None, (how, how.ungated)):
        assert one.what
        assert not one.source or re.search(r"\.(py|cpp)\b|\d\.\d+|\w/\w", one.source), one.source
        assert not re.search(r"\.(py|cpp)\b", one.what), one.what
