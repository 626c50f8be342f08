"""Documents of a packed row that the host turns one after the other, as measured."""

import json
from pathlib import Path

import msgspec
import pytest

from mopsim.common.errors import SpecError
from mopsim.graph.host_costs import DOCUMENTS
from mopsim.program.host_time import kinds_of
from mopsim.spec.host import HostCosts
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy

FOUND = json.loads((Path(__file__).parents[2] / "reports/host/te_packed.json").read_text())["parts"]
replace = msgspec.structs.replace


@pytest.mark.parametrize(("name", "kind"), [("gpt_oss_20b", "rotary"), ("deepseek_v3", "latent_rotary")])
def test_each_document_more_takes_the_host_what_was_measured(name: str, kind: str) -> None:
    each = FOUND[kind.replace("_", " ")]["document"]
    assert DOCUMENTS[kind] == pytest.approx((each["forward"], each["backward"]), abs=0.06)
    core, strategy = load_stack("megatron-core"), Strategy(name="megatron", world_size=8)
    host = replace(core.host, documents=21.0)
    took = {}
    for rotary in ("fused", "halves"):
        eager = replace(core.kernels, rotary=rotary)
        for documents, given in ((1, core.host), (21, host)):
            stack = replace(core, kernels=eager, host=given)
            took[rotary, documents] = kinds_of(load_model(name), stack, strategy)["attention"]
    assert took["fused", 21] == took["fused", 1], "a kernel turns a row at once"
    for place in (0, 1):
        more = took["halves", 21][place] - took["halves", 1][place]
        assert more == pytest.approx(20 * DOCUMENTS[kind][place])


def test_a_row_has_a_document() -> None:
    with pytest.raises(SpecError, match=r"documents: 0\.0 must lie between 1 and 1e"):
        HostCosts(documents=0.0)
